"""Flow attention in Triton, interpreted, against float64. Run by test_triton.py."""

from functools import partial

import pytest
import torch

from zoo.kernels import flow_attention
from zoo.kernels.flow_attention import op

from . import comparison
from .comparison import assert_kernels_agree, assert_second_derivatives

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# map, heads, head dim
SHAPES = {
    "one-token": ((1, 1), 2, 16),
    "one-less-than-a-tile": ((7, 9), 1, 32),
    "one-more-than-a-tile": ((5, 13), 2, 8),
    "several-parts": ((1, 1100), 1, 16),
    "odd-heads": ((6, 5), 3, 24),
    "wide-heads": ((4, 9), 1, 96),
}


def make(shape, dtype, batch=2, **options):
    """The tensors of a call by name, the gradient of its output, and its other options."""
    size, num_heads, head_dim = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    tensors = (2 * torch.randn(batch, *size, num_heads * head_dim, generator=g) for _ in range(4))
    q, k, v, grad = (x.to(dtype) for x in tensors)
    return {"q": q, "k": k, "v": v}, grad, {"num_heads": num_heads, **options}


gradients = partial(comparison.gradients, flow_attention)


def check(given, grad, options):
    # With a single token, the gradients of q and k are nearly 0.
    floor = 1 / (grad.shape[1] * grad.shape[2])
    assert_kernels_agree(flow_attention, given, grad, options, grad.dtype, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape, dtype):
    check(*make(shape, dtype))


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_eps(eps):
    check(*make("odd-heads", torch.float32, eps=eps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_flows_may_exceed_float16_and_shares_may_vanish(dtype):
    """Keys whose sigmoids are tiny let a query's share of them be huge, and large values the sums."""
    given, grad, options = make("one-more-than-a-tile", dtype)
    given = {"q": given["q"] + 4, "k": given["k"] - 12, "v": 2000 * given["v"]}
    assert given["k"].float().sigmoid().mean() < 1e-3
    assert given["v"].abs().max() > 5000
    check(given, grad / 2000, options)


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_sigmoids_of_zero_and_of_one(level):
    x = torch.full((1, 5, 13, 16), level)
    out, *grads = gradients({"q": x, "k": x, "v": x}, torch.ones_like(x), {"num_heads": 2}, "triton")
    want, *_ = gradients(dict.fromkeys("qkv", x), torch.ones_like(x), {"num_heads": 2}, "reference")
    torch.testing.assert_close(out, want)
    assert all(grad.isfinite().all() for grad in grads)


def test_views():
    """Slices of one projection are read in place; a map with another memory format is copied."""
    given, grad, options = make("odd-heads", torch.float32)
    k, v = torch.cat((given["k"], given["v"]), -1).chunk(2, -1)
    q = given["q"].movedim(-1, 1).contiguous().movedim(1, -1)
    assert not any(x.is_contiguous() for x in (q, k, v))
    check({"q": q, "k": k, "v": v}, grad[:1].expand(grad.shape), options)


def test_an_image_has_the_same_results_in_any_batch():
    given, grad, options = make("several-parts", torch.float16)
    one = {name: x[1:] for name, x in given.items()}
    many, alone = gradients(given, grad, options, "triton"), gradients(one, grad[1:], options, "triton")
    for a, b in zip(many, alone, strict=True):
        assert torch.equal(a[1:], b)


def test_double_backward():
    given, grad, options = make("odd-heads", torch.float32)
    assert_second_derivatives(flow_attention, given, grad, options)


def test_operators_are_registered_rightly(fake_tensors_launch_nothing):
    given, grad, _ = make("one-token", torch.float32)
    settings = (2, 1e-6)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.forward, (*(x.requires_grad_() for x in given.values()), *settings), test_utils=utils)
    plain = [x.detach() for x in given.values()]
    _, *kept = op.forward(*plain, *settings)
    torch.library.opcheck(op.backward, (grad, *plain, *kept, *settings), test_utils=utils)
