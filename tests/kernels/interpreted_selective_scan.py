"""The selective scan in Triton, interpreted, against float64. Run by test_triton.py."""

from functools import partial

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from zoo.kernels import selective_scan
from zoo.kernels.selective_scan import common, op

from . import comparison
from .comparison import assert_kernels_agree, assert_second_derivatives, assert_within_budget
from .test_selective_scan import ALL, made

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan", "scans_of_slices")

# map, channels, numbers, options; a tile has 16 tokens, and 32 channels if these have one or two numbers, else 16
CASES = {
    "one-token": ((1, 1), 3, 1, {"directions": ALL}),
    "one-less-than-a-tile": ((1, 15), 3, 1, {"directions": ("rows", "rows_reversed")}),
    "one-more-than-a-tile": ((1, 17), 33, 1, {"directions": ALL}),
    "several-tiles": ((5, 10), 4, 2, {"directions": ("columns", "rows_reversed")}),
    "odd-numbers": ((5, 7), 17, 5, {"directions": ("rows_reversed", "columns_reversed"), "own": True}),
    "sixteen-numbers": ((1, 17), 8, 16, {"directions": ("rows",), "own": True, "without": ("D",)}),
    "without-bias": ((3, 3), 4, 1, {"directions": ("columns_reversed",), "without": ("D", "delta_bias")}),
    "without-softplus": ((4, 9), 4, 1, {"directions": ("rows", "columns"), "delta_softplus": False}),
}


@pytest.fixture
def scans_of_slices(monkeypatch):
    """The interpreter scans one number at a time, in seconds per tile; here, one slice along the axis at a time."""

    def generic_scan(self, inputs):
        count = inputs[0].handle.data.shape[self.axis]
        outs = []
        for i in range(count):
            now = tuple(self.to_tensor(np.take(x.handle.data, i, self.axis), x.dtype) for x in inputs)
            outs.append(self.combine_fn.fn(*outs[-1], *now) if outs else now)
        return [
            self.to_tensor(np.stack([out[j].handle.data for out in outs], self.axis), x.dtype)
            for j, x in enumerate(inputs)
        ]

    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)


def make(case, dtype, batch=2):
    """The tensors of a call by name, the gradient of its output, and its other options."""
    size, channels, numbers, options = CASES[case]
    given, options = made(size, channels, numbers, batch=batch, **{"delta_softplus": True} | options)
    grad = torch.randn(batch, *size, channels, generator=torch.Generator().manual_seed(1))
    return {name: x.to(dtype) for name, x in given.items()}, grad.to(dtype), options


gradients = partial(comparison.gradients, selective_scan)
check = partial(assert_kernels_agree, selective_scan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, dtype):
    check(*make(case, dtype))


def test_bfloat16():
    check(*make("one-more-than-a-tile", torch.bfloat16))


def test_small_steps_keep_their_digits():
    """The steps of a new model are from 0.001 to 0.1."""
    given, grad, options = make("several-tiles", torch.float32)
    given["delta_bias"] = given["delta_bias"] - 7
    check(given, grad, options)


def test_large_steps_forget_everything():
    given, grad, options = make("several-tiles", torch.float32)
    given["delta"] = given["delta"].abs() * 1e3
    found = gradients(given, grad, options, "triton")
    assert all(torch.isfinite(x).all() for x in found)
    exact = {name: x.double() for name, x in given.items()}
    want = gradients(exact, grad.double(), options, "reference")[0]
    assert_within_budget(found[0], want, torch.float32)


def test_float32_steps_and_parameters_with_half_precision():
    given, grad, options = make("one-more-than-a-tile", torch.bfloat16)
    check({name: x if name in "xBC" else x.float() for name, x in given.items()}, grad, options)


def test_views():
    """Slices of one projection are read in place; a map with another memory format is copied."""
    given, grad, options = make("several-tiles", torch.float32)
    B, C = torch.cat((given["B"], given["C"]), -1).chunk(2, -1)
    x = given["x"].movedim(-1, 1).contiguous().movedim(1, -1)
    assert not any(view.is_contiguous() for view in (B, C, x))
    check(given | {"x": x, "B": B, "C": C}, grad[:1].expand(grad.shape), options)


def test_an_image_has_the_same_results_in_any_batch():
    given, grad, options = make("several-tiles", torch.float16)
    one = {name: x[1:] if x.ndim > 3 else x for name, x in given.items()}
    many, alone = gradients(given, grad, options, "triton"), gradients(one, grad[1:], options, "triton")
    for name, a, b in zip(("out", *given), many, alone, strict=True):
        assert name in ("A", "D", "delta_bias") or torch.equal(a[1:], b)


def test_double_backward():
    given, grad, options = make("one-less-than-a-tile", torch.float32, batch=1)
    assert_second_derivatives(selective_scan, given, grad, options)


@pytest.mark.parametrize("case", ["one-token", "without-bias"])
def test_operators_are_registered_rightly(case, fake_tensors_launch_nothing):
    given, grad, options = make(case, torch.float32)
    tensors = [given.get(name) for name in ("x", "delta", "A", "B", "C", "D", "delta_bias")]
    settings = options["delta_softplus"], common.numbers(options["directions"])
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(op.forward, (*leaves, *settings), test_utils=utils)
    _, states = op.forward(*tensors, *settings)
    torch.library.opcheck(op.backward, (grad, *tensors, states, *settings), test_utils=utils)
