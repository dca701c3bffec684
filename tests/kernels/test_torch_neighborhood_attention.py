"""Neighborhood attention's torch_impl against its reference. Some seconds."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from zoo.kernels import dispatch, implementation, neighborhood_attention
from zoo.kernels.neighborhood_attention import torch_impl

from .comparison import BUDGET, assert_agree, assert_precise, run
from .test_neighborhood_attention import CASES as SMALL
from .test_neighborhood_attention import hide

pytestmark = pytest.mark.slow

# map, kernel, dilation, stride, causal; sizes that are no multiples of a tile
CASES = {
    **SMALL,
    "tile-and-one": ((17, 9), (7, 5), (1, 1), (1, 1), (False, False)),
    "tiles-less-one": ((23, 15), (7, 7), (1, 1), (1, 1), (False, False)),
    "three-tiles": ((24, 8), (3, 7), (1, 1), (1, 1), (False, False)),
    "many-tiles": ((41, 33), (5, 3), (1, 1), (1, 1), (False, False)),
    "large-kernel": ((29, 19), (13, 11), (1, 1), (1, 1), (False, False)),
    "even": ((19, 21), (6, 4), (1, 1), (1, 1), (False, False)),
    "dilated": ((38, 23), (7, 5), (2, 3), (1, 1), (False, False)),
    "dilated-tiles": ((37, 41), (3, 3), (2, 2), (1, 1), (False, False)),
    "strided": ((23, 30), (7, 6), (1, 1), (3, 5), (False, False)),
    "strided-dilated": ((37, 21), (4, 3), (2, 1), (3, 2), (False, False)),
    "blocked-unevenly": ((20, 18), (7, 7), (1, 1), (7, 7), (False, False)),
    "causal": ((25, 18), (7, 5), (1, 1), (1, 1), (True, True)),
    "causal-strided-dilated": ((39, 20), (5, 7), (2, 1), (3, 4), (True, False)),
}


def call(case, biased=True, masked=False):
    """The differentiable tensors of a call, and a function of them."""
    size, kernel, dilation, stride, causal = CASES[case]
    g = torch.Generator().manual_seed(0)
    given = {"qkv": torch.randn(2, *size, 3 * 2 * 3, generator=g, dtype=torch.float64)}
    if biased:
        sizes = (2, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        given["bias_table"] = torch.randn(sizes, generator=g, dtype=torch.float64)
    options = {"num_heads": 2, "kernel_size": kernel, "dilation": dilation, "stride": stride, "is_causal": causal}
    options["key_mask"] = hide(given["qkv"]) if masked else None
    return given, lambda **tensors: neighborhood_attention(**tensors, **options)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, biased, masked, fused, monkeypatch):
    monkeypatch.setattr(dispatch, "fused_allowed", lambda: fused)
    given, function = call(case, biased, masked)
    assert_agree(function, given)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, masked):
    given, function = call(case, masked=masked)
    assert_agree(function, {name: x.requires_grad_() for name, x in given.items()})


@pytest.mark.parametrize("frozen", ["qkv", "bias_table"])
def test_gradients_of_one_input(frozen):
    given, function = call("tile-and-one")
    assert_agree(function, {name: x.requires_grad_(name != frozen) for name, x in given.items()})


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", ["tile-and-one", "dilated", "strided"])
def test_small_chunks(case, masked, monkeypatch):
    monkeypatch.setattr(torch_impl, "CHUNK", 1)
    given, function = call(case, masked=masked)
    assert_agree(function, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_half_precision(dtype):
    given, function = call("tile-and-one", masked=True)
    assert_precise(function, given, dtype, differentiated=False)


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [5, 6, 11])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_tiles_of_a_kind_have_the_same_bias(dilation, kernel, stride, causal):
    for length in range(kernel * dilation, kernel * dilation + 40):
        axis = torch_impl._axis(length, kernel, dilation, stride, causal, closed=True)
        offsets = torch_impl._tables(axis, torch.device("cpu"))[2]
        assert sorted(axis.order) == list(range(axis.tiles))
        assert all((kind == kind[0]).all() for kind in offsets.split(axis.kinds))


def test_a_large_map_has_few_kinds_of_tiles():
    assert torch_impl._axis(336, 7, 1, 1, False, closed=True).kinds == (1, 82, 1)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("case", ["causal", "tile-and-one"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, case, differentiated):
    given, function = call(case)
    assert_precise(function, given, dtype, differentiated)


def test_strided_input():
    given, function = call("tile-and-one")
    view = given["qkv"].movedim(-1, 1).contiguous().movedim(1, -1)
    torch.testing.assert_close(run("torch", function, given | {"qkv": view}), run("torch", function, given))


def test_double_backward():
    size, given = (10, 18), {}
    g = torch.Generator().manual_seed(0)
    for name, sizes in (("qkv", (1, *size, 3)), ("bias_table", (1, 5, 5))):
        given[name] = torch.randn(sizes, generator=g, dtype=torch.float64, requires_grad=True)

    def second(choice):
        with implementation(choice):
            out = neighborhood_attention(**given, num_heads=1, kernel_size=3)
        first = torch.autograd.grad(out.square().sum(), given.values(), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), given.values())

    torch.testing.assert_close(second("torch"), second("reference"))


def test_functional_transforms():
    given, function = call("tile-and-one")

    def loss(qkv):
        return function(qkv=qkv, bias_table=given["bias_table"]).square().sum()

    direction = torch.ones_like(given["qkv"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["qkv"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["qkv"]), want)
        slope = torch.func.jvp(loss, (given["qkv"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_compiles_as_one_graph(differentiated, masked):
    given, function = call("tile-and-one", masked=masked)
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", function, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "open"])
def test_compiled_forward_is_one_node(dynamic, dtype):
    torch._dynamo.reset()
    nodes = []

    def look(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    module = Module((2, 1), (1, 3), False)
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=look), dynamic=dynamic)
    for size in ((2, 20, 14), (3, 33, 17)):
        qkv = torch.randn(*size, 12)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            torch.testing.assert_close(compiled(qkv), module(qkv), rtol=0, atol=0)
    assert nodes.count("zoo.na2d_tiles.default") == (1 if dynamic else 2)
    assert not any("softmax" in node or "scaled_dot_product" in node for node in nodes)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_node_of_compiled_programs_is_a_proper_operator(biased, masked):
    given, _ = call("tile-and-one", biased, masked)
    mask = hide(given["qkv"]) if masked else None
    arguments = given["qkv"], given.get("bias_table"), mask, 2, (7, 5), (1, 1), (1, 1), (False, False), 0.5
    torch.library.opcheck(torch.ops.zoo.na2d_tiles.default, arguments)


class Module(torch.nn.Module):
    def __init__(self, dilation, stride, causal):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(2, 5, 9))
        self.options = {"kernel_size": (3, 5), "dilation": dilation, "stride": stride, "is_causal": causal}

    def forward(self, qkv):
        return neighborhood_attention(qkv, num_heads=2, bias_table=self.table, **self.options)


@pytest.mark.parametrize("options", [(1, 1, False), ((2, 1), (1, 3), False), (2, 1, (True, False))], ids=str)
def test_exports_with_open_sizes(options):
    module = Module(*options)
    dims = {axis: torch.export.Dim(name, min=10, max=99) for axis, name in enumerate(("batch", "rows", "columns"))}
    program = torch.export.export(module, (torch.randn(11, 20, 12, 12),), dynamic_shapes=(dims,))
    assert "zoo" not in str(program.graph)
    again = torch.randn(10, 33, 17, 12)
    torch.testing.assert_close(program.module()(again), module(again))


class Masked(Module):
    def forward(self, qkv, key_mask):
        return neighborhood_attention(qkv, num_heads=2, bias_table=self.table, key_mask=key_mask, **self.options)


def test_exports_with_a_mask_and_open_sizes():
    module = Masked(1, 1, False)
    dims = {axis: torch.export.Dim(name, min=10, max=99) for axis, name in enumerate(("batch", "rows", "columns"))}
    first, again = torch.randn(11, 20, 12, 12), torch.randn(10, 33, 17, 12)
    program = torch.export.export(module, (first, hide(first)), dynamic_shapes=(dims, dims))
    torch.testing.assert_close(program.module()(again, hide(again)), module(again, hide(again)))


def test_exports_with_open_columns():
    module = Module(1, 1, False)
    dims = ({2: torch.export.Dim("columns", min=10, max=99)},)
    program = torch.export.export(module, (torch.randn(2, 20, 12, 12),), dynamic_shapes=dims)
    again = torch.randn(2, 20, 19, 12)
    torch.testing.assert_close(program.module()(again), module(again))


def test_exports_with_an_open_batch():
    module = Module(1, 1, False)
    dims = ({0: torch.export.Dim("batch", min=2, max=100)},)
    program = torch.export.export(module, (torch.randn(2, 20, 12, 12),), dynamic_shapes=dims)
    assert any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)
    again = torch.randn(3, 20, 12, 12)
    torch.testing.assert_close(program.module()(again), module(again))
