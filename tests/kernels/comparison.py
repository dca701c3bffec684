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


def norm(x):
    """The root mean square."""
    return x.square().mean().sqrt().item()


def gradients(function, given, grad, options, choice):
    """The output of `function(**given, **options)`, and the gradients of all of `given`, for `grad` at the output."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    with implementation(choice):
        out = function(**leaves, **options)
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)


def assert_kernels_agree(function, given, grad, options, dtype=None, floor=0.0, allowed=1):
    """The Triton kernels err no more than the budget allows, against the reference in float64 on the same numbers.

    Args:
        function: The operator.
        given: Its tensors by name.
        grad: The gradient of its output.
        options: Its other arguments.
        dtype: The type whose budget counts; None for that of each result.
        floor: The least size of a gradient, relative to the output's: it may be the small difference of large terms.
        allowed: A factor of the budget.
    """
    found = gradients(function, given, grad, options, "triton")
    exact = {name: x.double() for name, x in given.items()}
    wanted = gradients(function, exact, grad.double(), options, "reference")
    for name, got, want in zip(("out", *given), found, wanted, strict=True):
        assert got.dtype == given.get(name, grad).dtype
        assert got.shape == want.shape
        assert torch.isfinite(got).all()
        size = max(norm(want), floor * norm(wanted[0]), 1e-15)
        assert norm(got.double() - want) <= allowed * BUDGET[dtype or got.dtype] * size, name


def assert_second_derivatives(function, given, grad, options):
    """Derivatives of the gradients through the Triton kernels in float32, against the reference in float64."""

    def second(dtype, choice):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
        with implementation(choice):
            out = function(**leaves, **options)
            firsts = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in firsts), list(leaves.values()))

    for got, want in zip(second(torch.float32, "triton"), second(torch.float64, "reference"), strict=True):
        assert_within_budget(got, want, torch.float32)
