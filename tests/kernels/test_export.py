"""Operators inside models that are compiled and exported. A minute."""

import io

import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import zoo  # noqa: F401
from zoo.kernels import depthwise_conv2d_nhwc, neighborhood_attention, routed_attention, window_attention

from .calls import CALLS

pytestmark = pytest.mark.slow

CHANNELS = 8
OPERATORS = {
    "window_attention": "zoo::window_attn",
    "neighborhood_attention": "zoo::na2d",
    "routed_attention": "zoo::routed_attn",
}
WEIGHTS = {
    "window_attention": (2, 3, 7),
    "neighborhood_attention": (2, 5, 5),
    "depthwise_conv2d_nhwc": (CHANNELS, 1, 3, 3),
}


class Block(nn.Module):
    """Linear, an operator, Linear; on maps (B, H, W, CHANNELS)."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.before = nn.Linear(CHANNELS, CHANNELS if name == "depthwise_conv2d_nhwc" else 3 * CHANNELS)
        if name in WEIGHTS:
            self.weight = nn.Parameter(torch.randn(WEIGHTS[name]))
        self.after = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        return self.after(getattr(self, self.name)(self.before(x)))

    def window_attention(self, x):
        return window_attention(x, num_heads=2, window_size=(2, 4), bias_table=self.weight)

    def neighborhood_attention(self, x):
        return neighborhood_attention(x, num_heads=2, kernel_size=3, bias_table=self.weight)

    def routed_attention(self, x):
        q, k, v = x.chunk(3, -1)
        parts = (z.detach().unflatten(2, (2, -1)).unflatten(1, (2, -1)) for z in (q, k))
        query, key = (z.mean((2, 4)).flatten(1, 2) for z in parts)
        routes = (query @ key.transpose(-2, -1)).topk(2).indices
        return routed_attention(q, k, v, routes, num_heads=2, regions=2)

    def depthwise_conv2d_nhwc(self, x):
        return depthwise_conv2d_nhwc(x, self.weight, None, dilation=2)


def make(name, size=(2, 8, 12)):
    torch.manual_seed(0)
    return Block(name).eval(), torch.randn(*size, CHANNELS)


def gradients(model, function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    return out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))


@pytest.mark.parametrize(
    ("name", "backend"), [("window_attention", "inductor"), *((name, "aot_eager") for name in CALLS)]
)
def test_compiles_forward_and_backward(name, backend):
    torch._dynamo.reset()
    model, x = make(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(model, compiled, x), gradients(model, model, x))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_open_sizes(name):
    torch._dynamo.reset()
    model, x = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 8, 12), (3, 20, 16)):
        x = torch.randn(*size, CHANNELS)
        torch.testing.assert_close(compiled(x), model(x))


def open_sizes():
    """Batch and map, which windows of (2, 4) and regions of 2 x 2 divide."""
    return {"x": {0: Dim("batch", max=64), 1: 2 * Dim("rows", min=2, max=64), 2: 4 * Dim("columns", min=2, max=64)}}


@pytest.mark.parametrize("name", CALLS)
def test_exported_program_runs_at_other_sizes(name):
    model, x = make(name)
    program = torch.export.export(model, (x,), dynamic_shapes=open_sizes()).module()
    for size in ((2, 8, 12), (1, 10, 8), (3, 40, 36)):
        x = torch.randn(*size, CHANNELS)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["own-query", "shared-query"])
@pytest.mark.parametrize("layout", ["block", "grid"])
def test_exported_windows_may_become_one(layout, shared):
    """A model pads its maps to windows, and a small image ends as a single one."""

    class Padded(nn.Module):
        def forward(self, x, table, q):
            height, width = x.shape[1:3]
            x = nn.functional.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
            mask = nn.functional.pad(
                x.new_ones(x.shape[0], height, width, dtype=torch.bool), (0, -width % 4, 0, -height % 4)
            )
            q = q if shared else None
            return window_attention(x, num_heads=2, window_size=4, layout=layout, bias_table=table, q=q, key_mask=mask)[
                :, :1, :1
            ]

    table, batch = torch.randn(2, 7, 7), Dim("batch", max=64)
    sides = {1: Dim("height", min=2, max=512), 2: Dim("width", min=2, max=512)}
    shapes = {"x": {0: batch, **sides}, "table": None, "q": {0: batch}}

    def inputs(batch, height, width):
        return torch.randn(batch, height, width, 16 if shared else 24), table, torch.randn(batch, 16, 8)

    program = torch.export.export(Padded(), inputs(2, 10, 14), dynamic_shapes=shapes).module()
    for size in ((1, 3, 3), (3, 9, 21)):
        given = inputs(*size)
        torch.testing.assert_close(program(*given), Padded()(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("open_", [False, True], ids=["fixed", "open"])
@pytest.mark.parametrize("name", OPERATORS)
def test_exported_for_a_gpu_keeps_one_node(name, open_):
    with FakeTensorMode(), torch.device("cuda"):
        model, x = Block(name), torch.randn(2, 8, 12, CHANNELS)
        program = torch.export.export(model, (x,), dynamic_shapes=open_sizes() if open_ else None)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("zoo.")] == [f"{OPERATORS[name].replace('::', '.')}.default"]
    assert not any("softmax" in t or "scaled_dot_product" in t for t in targets)


@pytest.mark.parametrize("name", OPERATORS)
def test_training_on_a_gpu_is_traced_as_one_graph(name):
    torch._dynamo.reset()
    graphs = []

    def look(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with FakeTensorMode(), torch.device("cuda"):
        model, x = Block(name), torch.randn(2, 8, 12, CHANNELS)
        compiled = torch.compile(model, fullgraph=True, backend=look)
        compiled(x)
    assert [any(OPERATORS[name].split("::")[1] in target for target in graph) for graph in graphs] == [True]


@pytest.mark.parametrize("name", CALLS)
def test_onnx_equals_eager(name):
    model, x = make(name)
    with timm.layers.set_exportable(True), torch.no_grad():
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)
