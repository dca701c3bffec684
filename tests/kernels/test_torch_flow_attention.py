"""Flow attention's torch_impl against its reference. Seconds."""

import pytest
import torch

from zoo.kernels import flow_attention, implementation
from zoo.kernels.flow_attention import torch_impl

from .comparison import BUDGET, assert_agree, assert_precise, run
from .test_flow_attention import CASES, make


def call(case, **sizes):
    """The differentiable tensors of a call, and a function of them."""
    given, options = make(case, **sizes)
    return given, lambda **tensors: flow_attention(**tensors, **options)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("case", CASES)
def test_agrees(case, differentiated):
    given, function = call(case)
    assert_agree(function, {name: x.requires_grad_(differentiated) for name, x in given.items()})


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("part", [1, 100, 250], ids=["a-head", "an-image", "two-images"])
def test_parts(part, differentiated, monkeypatch):
    """The results do not depend on how many heads and images are computed at once."""
    monkeypatch.setattr(torch_impl, "PART", part)
    given, function = call("map", batch=3)
    assert_agree(function, {name: x.requires_grad_(differentiated) for name, x in given.items()})


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, differentiated):
    given, function = call("map")
    assert_precise(function, given, dtype, differentiated)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_slices_of_one_tensor(differentiated):
    given, function = call("map")
    joined = torch.cat(tuple(given.values()), -1)
    views = dict(zip(given, joined.chunk(3, -1), strict=True))
    given, views = (
        {name: x.detach().requires_grad_(differentiated) for name, x in tensors.items()} for tensors in (given, views)
    )
    torch.testing.assert_close(run("torch", function, views), run("torch", function, given))


@pytest.mark.slow
def test_double_backward():
    given, function = call("map", batch=1, num_heads=1)
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x: function(**dict(zip(given, x, strict=True))), inputs, fast_mode=True
        )


def test_functional_transforms():
    given, function = call("map")

    def loss(k):
        return function(**given | {"k": k}).square().sum()

    direction = torch.ones_like(given["k"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["k"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["k"]), want)
        slope = torch.func.jvp(loss, (given["k"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_compiles_as_one_graph(differentiated):
    given, function = call("map")
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", function, given))


class Module(torch.nn.Module):
    def forward(self, x):
        return flow_attention(*x.chunk(3, -1), num_heads=2)


@pytest.mark.slow
def test_exports_with_open_sizes():
    module = Module()
    dims = {axis: torch.export.Dim(name, max=99) for axis, name in enumerate(("batch", "rows", "columns"))}
    program = torch.export.export(module, (torch.randn(2, 8, 11, 24),), dynamic_shapes=(dims,)).module()
    for size in ((3, 16, 9), (1, 1, 1)):
        again = torch.randn(*size, 24)
        torch.testing.assert_close(program(again), module(again))
