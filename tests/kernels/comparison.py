"""Comparison of two implementations of an operator, and the errors that are allowed."""

import torch

from zoo.kernels import implementation

# relative root mean square against float64; the Triton kernels round P and dS to bfloat16
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def run(choice, function, given):
    """The output of `function(**given)`, and the gradients of the arguments that require them."""
    with implementation(choice):
        out = function(**given)
    inputs = [x for x in given.values() if x.requires_grad]
    if not inputs:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_agree(function, given, choice="torch"):
    """`choice` and the reference agree on the output and on all gradients."""
    torch.testing.assert_close(run(choice, function, given), run("reference", function, given))


def assert_within_budget(got, want, dtype):
    """`got` was computed in `dtype`, `want` in float64 from the same numbers."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    error = ((got.double() - want).square().mean() / want.square().mean().clamp(min=1e-30)).sqrt().item()
    assert error <= BUDGET[dtype], f"relative RMS {error:.2e}, allowed {BUDGET[dtype]:.0e}"


def assert_precise(function, given, dtype, differentiated):
    """In `dtype`, the fast path errs no more than the budget allows, against the reference on the same numbers."""
    given = {name: x.to(dtype).requires_grad_(differentiated) for name, x in given.items()}
    exact = {name: x.detach().double().requires_grad_(differentiated) for name, x in given.items()}
    for got, want in zip(run("torch", function, given), run("reference", function, exact), strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, want, dtype)
