"""Operators in compiled and exported models. A minute."""

import io
from importlib import import_module

import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import zoo  # noqa: F401
from zoo.kernels import OPERATORS, window_attention

from . import calls
from .calls import WITH_TRITON, of_images

pytestmark = pytest.mark.slow

CHANNELS = 8


class Block(nn.Module):
    """A Linear, the small call of an operator and a Linear, on maps (B, H, W, CHANNELS)."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        tensors = calls.make(name)
        images = of_images(tensors)
        self.parts = [x.shape[-1] for x, each in zip(tensors, images, strict=True) if each]
        self.before = nn.Linear(CHANNELS, sum(self.parts))
        weights = [x for x, each in zip(tensors, images, strict=True) if not each]
        self.weights = nn.ParameterList(torch.randn(x.shape) for x in weights)
        self.after = nn.Linear(calls.call(name).shape[-1], CHANNELS)

    def forward(self, x):
        return self.after(calls.call(self.name, *self.before(x).split(self.parts, -1), *self.weights))


def operator(name):
    """The custom operator of the forward pass in Triton."""
    return import_module(f"zoo.kernels.{name}.op").forward._opoverload


def make(name, size=(2, 8, 12)):
    torch.manual_seed(0)
    return Block(name).eval(), torch.randn(*size, CHANNELS)


def gradients(model, function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    return out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))


@pytest.mark.parametrize(
    ("name", "backend"), [("window_attention", "inductor"), *((name, "aot_eager") for name in OPERATORS)]
)
def test_compiles_forward_and_backward(name, backend):
    torch._dynamo.reset()
    model, x = make(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(model, compiled, x), gradients(model, model, x))


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_for_open_sizes(name):
    torch._dynamo.reset()
    model, x = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 8, 12), (3, 20, 18)):
        x = torch.randn(*size, CHANNELS)
        torch.testing.assert_close(compiled(x), model(x))


def open_sizes():
    """Symbolic sizes of the batch and of the map, whose sides are multiples of those of the small calls."""
    return {"x": {0: Dim("batch", max=64), 1: 4 * Dim("rows", min=1, max=64), 2: 6 * Dim("columns", min=1, max=64)}}


@pytest.mark.parametrize("name", OPERATORS)
def test_exported_program_runs_at_other_sizes(name):
    model, x = make(name)
    program = torch.export.export(model, (x,), dynamic_shapes=open_sizes()).module()
    for size in ((2, 8, 12), (1, 12, 6), (3, 40, 36)):
        x = torch.randn(*size, CHANNELS)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["own-query", "shared-query"])
@pytest.mark.parametrize("layout", ["block", "grid"])
def test_exported_windows_may_become_one(layout, shared):
    """A model pads its maps to multiples of the window; a small image becomes a single window."""

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
@pytest.mark.parametrize("name", WITH_TRITON)
def test_exported_for_a_gpu_keeps_one_node(name, open_):
    with FakeTensorMode(), torch.device("cuda"):
        model, x = Block(name), torch.randn(2, 8, 12, CHANNELS)
        program = torch.export.export(model, (x,), dynamic_shapes=open_sizes() if open_ else None)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("zoo.")] == [str(operator(name))]
    assert not any("softmax" in t or "scaled_dot_product" in t for t in targets)


@pytest.mark.parametrize("name", WITH_TRITON)
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
    assert [any(str(operator(name)) == target for target in graph) for graph in graphs] == [True]


@pytest.mark.parametrize("name", OPERATORS)
def test_onnx_equals_eager(name):
    model, x = make(name)
    with timm.layers.set_exportable(True), torch.no_grad():
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_windows_of_open_size_are_right_in_onnx():
    """The whole map, as in models with global attention."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 2, 9, 9))

        def forward(self, x):
            height, width = x.shape[1:3]
            table = nn.functional.interpolate(self.table, (2 * height - 1, 2 * width - 1))[0]
            return window_attention(x, num_heads=2, window_size=(height, width), bias_table=table)

    model, sides = Whole(), {1: Dim("height", min=2, max=64), 2: Dim("width", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 4, 6, 24),), dynamic_shapes={"x": sides})
        written = torch.onnx.export(
            program, dynamic_shapes={"x": {1: "height", 2: "width"}}, dynamo=True, verbose=False
        )
    file = io.BytesIO()
    written.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for size in ((4, 6), (5, 3)):
        x = torch.randn(2, *size, 24)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)
