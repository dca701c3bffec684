"""Gated linear attention in Triton, interpreted, against float64. Run by test_triton.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import gated_linear_attention
from zoo.kernels.gated_linear_attention import op

from . import comparison
from .comparison import assert_kernels_agree, assert_second_derivatives, assert_within_budget

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# tokens, heads, channels of keys and values, whether both directions
SHAPES = {
    "one-token": (1, 2, 16, 32, True),
    "one-less-than-a-chunk": (15, 1, 16, 16, False),
    "one-chunk": (16, 2, 8, 16, True),
    "one-more-than-a-chunk": (17, 3, 24, 40, True),
    "several-chunks": (70, 1, 16, 32, True),
    "wide-heads": (20, 1, 64, 128, False),
}


def make(shape, dtype, batch=2, gates=torch.float32):
    """The tensors of a call by name, and the gradient of its output."""
    tokens, heads, key_dim, value_dim, both = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    sizes = (batch, tokens, heads)
    given = {
        name: torch.randn(*sizes, dim, generator=g).to(dtype)
        for name, dim in (("q", key_dim), ("k", key_dim), ("v", value_dim))
    }
    for name in ("log_gates", "reverse_log_gates")[: 1 + both]:
        given[name] = (F.logsigmoid(torch.randn(*sizes, key_dim, generator=g)) / 4).to(gates)
    return given, torch.randn(*sizes, value_dim, generator=g).to(dtype)


def gradients(given, grad, choice):
    return comparison.gradients(gated_linear_attention, given, grad, {}, choice)


def check(given, grad):
    # The gates of a single token have the gradient 0, the difference of two large terms.
    assert_kernels_agree(gated_linear_attention, given, grad, {}, given["q"].dtype, floor=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape, dtype):
    check(*make(shape, dtype))


def test_bfloat16():
    check(*make("one-more-than-a-chunk", torch.bfloat16))


def test_gates_in_half_precision():
    check(*make("one-more-than-a-chunk", torch.float16, gates=torch.float16))


@pytest.mark.parametrize("other", ["log_gates", "reverse_log_gates"])
def test_gates_of_two_dtypes(other):
    given, grad = make("one-more-than-a-chunk", torch.float16)
    check(given | {other: given[other].half()}, grad)


@pytest.mark.parametrize("gate", [-10.0, -100.0, -1e30, -math.inf], ids=str)
def test_small_gates(gate):
    given, grad = make("several-chunks", torch.float32)
    g = torch.Generator().manual_seed(1)
    for name in ("log_gates", "reverse_log_gates"):
        given[name] = torch.where(torch.rand(given[name].shape, generator=g) < 0.2, gate, given[name])
    check(given, grad)


def test_states_may_exceed_float16():
    given, grad = make("several-chunks", torch.float16)
    given |= {name: 100 * given[name].abs() for name in "kv"} | {"q": given["q"] / 1000}
    states = torch.einsum("btnk,btnv->bnkv", given["k"].float(), given["v"].float())
    assert states.max() > torch.finfo(torch.float16).max
    out = gradients(given, grad, "triton")[0]
    want = gradients({name: x.double() for name, x in given.items()}, grad.double(), "reference")[0]
    assert_within_budget(out, want, torch.float16)


def test_views():
    """Slices of one projection are read in place; tokens in another order are copied."""
    given, grad = make("one-more-than-a-chunk", torch.float32)
    k, v = torch.cat((given["k"].flatten(2), given["v"].flatten(2)), -1).split((72, 120), -1)
    q = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    given |= {"q": q, "k": k.unflatten(-1, (3, -1)), "v": v.unflatten(-1, (3, -1))}
    assert not any(given[name].is_contiguous() for name in "qkv")
    check(given, grad[:1].expand(grad.shape))


def test_an_image_has_the_same_results_in_any_batch():
    given, grad = make("several-chunks", torch.float16)
    many = gradients(given, grad, "triton")
    alone = gradients({name: x[1:] for name, x in given.items()}, grad[1:], "triton")
    for a, b in zip(many, alone, strict=True):
        assert torch.equal(a[1:], b)


def test_double_backward():
    given, grad = make("one-more-than-a-chunk", torch.float32, batch=1)
    assert_second_derivatives(gated_linear_attention, given, grad, {})


@pytest.mark.parametrize("shape", ["one-token", "one-less-than-a-chunk"])
def test_operators_are_registered_rightly(shape, fake_tensors_launch_nothing):
    given, grad = make(shape, torch.float32)
    tensors = [given.get(name) for name in ("q", "k", "v", "log_gates", "reverse_log_gates")]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    differentiable = [x if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(op.forward, (*differentiable, 0.3), test_utils=utils)
    torch.library.opcheck(op.backward, (grad, *tensors, 0.3), test_utils=utils)
