"""Gated linear attention's torch_impl against its reference. Seconds."""

import pytest
import torch

from zoo.kernels import gated_linear_attention, implementation
from zoo.kernels.gated_linear_attention import torch_impl

from .comparison import BUDGET, assert_agree, assert_precise, run
from .test_gated_linear_attention import CASES, make


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    assert_agree(gated_linear_attention, make(case))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    assert_agree(gated_linear_attention, {name: x.requires_grad_() for name, x in make(case).items()})


@pytest.mark.parametrize("part", [1, 2 * 20 * 4, 2 * 20 * 5 * 4], ids=["a head", "heads", "images"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
def test_parts_give_the_whole(both, part, monkeypatch):
    given = make((20, both), batch=3, num_heads=5, key_dim=4, value_dim=6)
    with torch.inference_mode():
        whole = run("torch", gated_linear_attention, given)
        monkeypatch.setattr(torch_impl, "PART", part)
        torch.testing.assert_close(run("torch", gated_linear_attention, given), whole)
    assert_agree(gated_linear_attention, given)


@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("tokens", [63, 64, 65, 257, 272, 545])
def test_any_number_of_chunks(tokens, both):
    """Pairs of chunks are merged, then chunks at distances; the last of either may be missing."""
    given = make((tokens, both), batch=1, num_heads=1, key_dim=2, value_dim=2, factor=0.03)
    assert_agree(gated_linear_attention, {name: x.requires_grad_() for name, x in given.items()})


@pytest.mark.parametrize("differentiated", [False, True], ids=["output", "gradients"])
@pytest.mark.parametrize("case", ["forward", "three-chunks"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, case, differentiated):
    assert_precise(gated_linear_attention, make(case, factor=1 / 16), dtype, differentiated)


@pytest.mark.slow
def test_precision_over_many_tokens():
    given = make((4096, True), batch=1, num_heads=1, key_dim=8, value_dim=8, factor=1 / 200)
    assert_precise(gated_linear_attention, given, torch.float32, True)


@pytest.mark.parametrize("differentiated", [False, True], ids=["output", "gradients"])
def test_slices_of_one_tensor(differentiated):
    given = make("one-more-than-a-chunk", key_dim=4)
    joined = torch.cat(tuple(given.values()), -1)
    views = dict(zip(given, joined.chunk(len(given), -1), strict=True))
    given, views = (
        {name: x.detach().requires_grad_(differentiated) for name, x in tensors.items()} for tensors in (given, views)
    )
    torch.testing.assert_close(run("torch", gated_linear_attention, views), run("torch", gated_linear_attention, given))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forward", "one-more-than-a-chunk"])
def test_double_backward(case):
    given = make(case, batch=1, num_heads=1, key_dim=2, value_dim=2)
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x: gated_linear_attention(**dict(zip(given, x, strict=True))), inputs, fast_mode=True
        )


def test_functional_transforms():
    given = make("one-more-than-a-chunk")

    def loss(k):
        return gated_linear_attention(**given | {"k": k}).square().sum()

    direction = torch.ones_like(given["k"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["k"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["k"]), want)
        slope = torch.func.jvp(loss, (given["k"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True], ids=["output", "gradients"])
@pytest.mark.parametrize("case", ["forward", "three-chunks"])
def test_compiles_as_one_graph(case, differentiated):
    given = {name: x.requires_grad_(differentiated) for name, x in make(case).items()}
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", gated_linear_attention, given))


class Module(torch.nn.Module):
    def __init__(self, both):
        super().__init__()
        self.both = both

    def forward(self, x):
        *qkv, forward, backward = x.unflatten(-1, (5, 2, -1)).unbind(2)
        return gated_linear_attention(*qkv, -forward.abs(), -backward.abs() if self.both else None)


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
def test_exports_with_open_sizes(both):
    module = Module(both)
    dims = {0: torch.export.Dim("batch", max=99), 1: torch.export.Dim("tokens", max=9999)}
    program = torch.export.export(module, (torch.randn(2, 88, 40),), dynamic_shapes=(dims,)).module()
    for size in ((3, 16), (1, 1), (1, 1000)):
        again = torch.randn(*size, 40)
        torch.testing.assert_close(program(again), module(again))
