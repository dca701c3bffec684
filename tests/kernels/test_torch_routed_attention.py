"""Routed attention's torch_impl against its reference. Seconds."""

import pytest
import torch

from zoo.kernels import dispatch, implementation, routed_attention

from .comparison import BUDGET, assert_agree, assert_precise, run
from .test_routed_attention import CASES, make


def call(case, **sizes):
    """The differentiable tensors of a call, and a function of them."""
    q, k, v, routes, options = make(case, **sizes)
    return {"q": q, "k": k, "v": v}, lambda **tensors: routed_attention(**tensors, routes=routes, **options)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, fused, monkeypatch):
    monkeypatch.setattr(dispatch, "fused_allowed", lambda: fused)
    assert_agree(*reversed(call(case)))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    given, function = call(case)
    assert_agree(function, {name: x.requires_grad_() for name, x in given.items()})


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, differentiated):
    given, function = call("all-regions")
    assert_precise(function, given, dtype, differentiated)


def test_region_named_twice():
    given, _ = call("plain")
    routes = torch.tensor([0, 1, 1]).expand(2, 4, 3)
    given = {name: x.requires_grad_() for name, x in given.items()}
    assert_agree(lambda **tensors: routed_attention(**tensors, routes=routes, num_heads=2, regions=2), given)


def test_strided_input():
    given, function = call("plain")
    views = {name: x.movedim(-1, 1).contiguous().movedim(1, -1) for name, x in given.items()}
    torch.testing.assert_close(run("torch", function, views), run("torch", function, given))


@pytest.mark.slow
def test_double_backward():
    given, function = call("pooled-keys", batch=1, num_heads=1, head_dim=2)
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(lambda q, k, v: function(q=q, k=k, v=v), inputs)


def test_functional_transforms():
    given, function = call("plain")

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
    given, function = call("plain")
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", function, given))


class Routed(torch.nn.Module):
    def forward(self, q, k, v, routes):
        return routed_attention(q, k, v, routes, num_heads=2, regions=3)


class FindsRoutes(Routed):
    def forward(self, q, k, v, routes):
        parts = (x.unflatten(2, (3, -1)).unflatten(1, (3, -1)) for x in (q, k))
        query, key = (x.mean((2, 4)).flatten(1, 2) for x in parts)
        return super().forward(q, k, v, (query @ key.mT).topk(routes.shape[2]).indices)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Routed(), FindsRoutes()], ids=["given", "found"])
def test_exports_with_open_sizes(model):
    batch, rows, columns = (torch.export.Dim(name, min=2, max=20) for name in ("batch", "rows", "columns"))
    sizes = {0: batch, 1: 3 * rows, 2: 3 * columns}

    def inputs(batch, height, width):
        routes = torch.rand(batch, 9, 9).topk(4).indices
        return *(torch.randn(batch, height, width, 8) for _ in range(3)), routes

    program = torch.export.export(model, inputs(2, 6, 9), dynamic_shapes=(sizes, sizes, sizes, {0: batch}))
    again = inputs(3, 12, 15)
    torch.testing.assert_close(program.module()(*again), model(*again))
