"""The fast paths for CPUs against plain PyTorch: values and gradients, and when they are taken. 5 s."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import cpu, families
from zoo.cpu import by_image, linear
from zoo.layers import Mlp

SHAPES = [(5, 12), (2, 3, 4, 12), (1, 1, 1, 12), (1, 3, 1, 12), (12,)]


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operators(layer, x):
    with Operators() as seen:
        linear(layer, x)
    return seen.names


def make(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(12, 7, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias):
    layer, x = make(bias=bias), torch.randn(shape, requires_grad=True)
    parameters = list(layer.parameters())
    out, want = linear(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *parameters], grad)
    torch.testing.assert_close(found, torch.autograd.grad(want, [x, *parameters], grad), rtol=1e-5, atol=1e-6)


def test_inputs_may_have_any_strides():
    layer, x = make(), torch.randn(2, 12, 3, 4)
    for moved in (x.permute(0, 2, 3, 1), x[:1, :, ::2].permute(0, 2, 3, 1).expand(3, -1, -1, -1)):
        torch.testing.assert_close(
            linear(layer, moved), F.linear(moved, layer.weight, layer.bias), rtol=1e-5, atol=1e-6
        )
        assert linear(layer, moved).is_contiguous()


def test_second_derivative():
    layer, x = make(), torch.randn(1, 1, 3, 12, requires_grad=True)

    def curvature(out):
        (grad,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), layer.weight)[0]

    want = curvature(F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(curvature(linear(layer, x)), want, rtol=1e-4, atol=1e-4)


def test_torch_func_works():
    layer, x = make(), torch.randn(3, 2, 2, 4, 12)
    out, tangent = torch.func.jvp(partial(linear, layer), (x,), (x,))
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent, F.linear(x, layer.weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.vmap(partial(linear, layer))(x), out, rtol=1e-5, atol=1e-6)


def test_float32_on_a_cpu_goes_to_onednn():
    assert "convolution" in operators(make(), torch.randn(2, 3, 4, 12))


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (1, 2, 3, 2, 12)], ids=str)
def test_other_tokens_than_maps_stay_a_matrix_product(shape):
    assert "convolution" not in operators(make(), torch.randn(shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 4, 12), (1, 3, 4, 12), (2, 1, 1, 12)], ids=str)
def test_compiled_layers_go_to_onednn_without_copies(shape):
    """Copies would be generated kernels."""
    torch._dynamo.reset()
    layer, x = make(), torch.randn(shape)
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(partial(linear, layer), fullgraph=True), x)
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-6)
    assert code.count("extern_kernels.convolution(") == 1
    assert "cpp_fused" not in code


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_are_those_of_a_linear_layer(dynamic):
    torch._dynamo.reset()
    layer, compiled = make(), torch.compile(linear, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 4, 12), (3, 5, 2, 12)):
        x = torch.randn(shape, requires_grad=True)
        wanted = [x, *layer.parameters()]
        found, want = (torch.autograd.grad(out.sin().sum(), wanted) for out in (compiled(layer, x), layer(x)))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_stay_a_matrix_product(dtype):
    assert "convolution" not in operators(make(dtype), torch.randn(2, 3, 4, 12, dtype=dtype))


def test_autocast_stays_a_matrix_product():
    layer, x = make(), torch.randn(2, 3, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert "convolution" not in operators(layer, x)
        assert linear(layer, x).dtype == torch.bfloat16


def test_an_exported_program_has_a_linear_layer():
    program = torch.export.export(Mlp(12, 7), (torch.randn(2, 3, 4, 12),))
    names = {node.target.__name__ for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"linear.default", "gelu.default", "dropout.default"}


def test_quantized_weight_computes_its_own_linear_layer():
    class Halves(torch.Tensor):
        """A weight that only supports linear layers."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.linear:
                x, weight, bias = args
                return F.linear(x, weight.as_subclass(torch.Tensor), bias)
            return super().__torch_function__(function, types, args, kwargs)

        def __getitem__(self, index):
            raise NotImplementedError

    layer, x = make(), torch.randn(2, 3, 4, 12)
    want = linear(layer, x)
    del layer.weight
    layer.weight = make().weight.detach().as_subclass(Halves)
    torch.testing.assert_close(linear(layer, x), want, rtol=1e-5, atol=1e-6)


def test_no_tokens_give_no_tokens():
    assert linear(make(), torch.randn(2, 0, 3, 12)).shape == (2, 0, 3, 7)


def test_wrong_channels_are_refused_as_torch_does():
    with pytest.raises(RuntimeError, match=r"4x6 and 12x7"):
        linear(make(), torch.randn(1, 1, 4, 6))


def test_multiply_adds_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(make(bias=False), torch.randn(1, 1, 5, 12))
    assert counter.get_total_flops() == 2 * 5 * 12 * 7


WIDE_MODELS = [
    name
    for family in zoo.FAMILIES
    if hasattr(families.load(family), "by_image")
    for name in timm.list_models("test_*", module=family)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE_MODELS)
def test_one_image_at_a_time_gives_the_same(name, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model(name).eval().double()
    x = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        monkeypatch.setattr(cpu, "WIDE", 0)
        torch.testing.assert_close(model(x), want)


def sizes(x, widening, training=False):
    seen = []
    with torch.set_grad_enabled(training):
        by_image(nn.Identity(), lambda part: seen.append(len(part)) or part, x, widening)
    return seen


def test_only_wide_maps_in_inference_are_split_into_images():
    narrow, wide = torch.empty(2, 1024, 1024), torch.empty(2, 1024, 1025)  # of 4 bytes, widened by 2
    assert sizes(narrow, 2) == [2]
    assert sizes(wide, 2) == [1, 1]
    assert sizes(wide, 2, training=True) == [2]
    assert sizes(wide.bfloat16(), 2) == [2]
    assert sizes(torch.empty(1, 2048, 2048), 2) == [1]


def test_batch_norm_in_training_sees_all_images(monkeypatch):
    """Also if only its statistics are updated: the norm is in training mode, the model is not, without gradients."""
    monkeypatch.setattr(cpu, "WIDE", 0)
    model = timm.create_model("test_maxvit").eval()
    norm = model.stages[0].blocks[0].conv.norm2.train()
    with torch.no_grad():
        model(torch.randn(3, 3, 64, 64))
    assert norm.num_batches_tracked == 1
