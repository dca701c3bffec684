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
from zoo import cpu
from zoo.cpu import by_image, channels_last, convolution, linear, spatial_mean
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


@pytest.mark.parametrize(("threads", "images", "onednn"), [(1, 15, False), (1, 16, True), (2, 2, True)])
def test_float32_on_a_cpu_goes_to_onednn(threads, images, onednn, monkeypatch):
    """Where PyTorch would compute the convolution itself, the layer stays a matrix product."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert ("convolution" in operators(make(), torch.randn(images, 3, 4, 12))) == onednn


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (1, 2, 3, 2, 12)], ids=str)
def test_other_tokens_than_maps_stay_a_matrix_product(shape):
    assert "convolution" not in operators(make(), torch.randn(shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 4, 12), (1, 3, 4, 12), (2, 1, 1, 12)], ids=str)
def test_compiled_layers_go_to_onednn_without_copies(shape):
    """Copies would be generated kernels."""
    torch._dynamo.reset()
    layer, x = make(), torch.randn(shape)
    out, (code, *_) = run_and_get_code(torch.compile(partial(linear, layer), fullgraph=True), x)
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


@pytest.mark.parametrize("act", [None, nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_without_gradient(shape, act):
    layer, x = make(), torch.randn(shape)
    want = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        out = linear(layer, x, act)
    torch.testing.assert_close(out, want if act is None else act(want), rtol=1e-5, atol=1e-6)


def inputs(channels=12, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, channels, 7, 5, dtype=dtype).to(memory_format=torch.channels_last)


def trained(dim):
    """A batch norm with statistics, in evaluation mode."""
    norm = nn.BatchNorm2d(dim)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.eval()


def plain(layer, x, norm=None, act=None):
    return nn.Sequential(layer, norm or nn.Identity(), act or nn.Identity())(x)


CONVS = {
    "1x1": partial(nn.Conv2d, 12, 8, 1),
    "no-bias": partial(nn.Conv2d, 12, 8, 3, padding=1, bias=False),
    "strided": partial(nn.Conv2d, 12, 8, 3, 2, padding=(0, 1)),
    "depthwise": partial(nn.Conv2d, 12, 12, 5, padding=4, dilation=2, groups=12),
    "same": partial(nn.Conv2d, 12, 8, 3, padding="same"),
    "reflected": partial(nn.Conv2d, 12, 8, 3, padding=1, padding_mode="reflect"),
}


@torch.no_grad()
@pytest.mark.parametrize("act", [None, nn.GELU("tanh"), nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("conv", CONVS)
def test_convolution_is_that_of_its_modules(conv, normed, act):
    layer, x = CONVS[conv](), inputs()
    norm = trained(layer.out_channels) if normed else None
    for images in (x, x.contiguous(), x[:1], x[:0]):
        out = convolution(layer, images, norm, act)
        torch.testing.assert_close(out, plain(layer, images, norm, act), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16_errs_no_more_than_the_modules(autocast):
    conv, norm, act, layer = nn.Conv2d(12, 8, 3, padding=1), trained(8), nn.GELU(), make()
    modules = nn.ModuleList([conv, norm, act, layer]).bfloat16()
    x, tokens = inputs(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16).permute(0, 2, 3, 1)
    found = {}
    if autocast:
        modules.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found["fused"] = convolution(conv, x, norm, act), linear(layer, tokens, act)
        found["plain"] = plain(conv, x, norm, act), plain(layer, tokens, act=act)
    modules.double()
    want = plain(conv, x.double(), norm, act), plain(layer, tokens.double(), act=act)
    for fused, other, exact in zip(found["fused"], found["plain"], want, strict=True):
        assert fused.dtype == other.dtype == torch.bfloat16
        assert (fused - exact).square().mean() <= 1.05 * (other - exact).square().mean()


def test_fused_layers_are_one_operator():
    conv, norm, act = nn.Conv2d(12, 8, 1), trained(8), nn.GELU()
    with torch.no_grad(), torch.profiler.profile() as profile:
        convolution(conv, inputs(), norm, act)
        linear(make(), torch.randn(2, 12), act)
    names = {event.key for event in profile.key_averages()}
    assert names >= {"mkldnn::_convolution_pointwise", "mkldnn::_linear_pointwise"}
    assert not names & {"aten::gelu", "aten::batch_norm"}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act, self.fc = nn.Conv2d(12, 12, 3, 2, 1), trained(12), nn.GELU("tanh"), make()

    def forward(self, x):
        x = convolution(self.conv, x.permute(0, 3, 1, 2), self.norm, self.act)
        return linear(self.fc, x.permute(0, 2, 3, 1), self.act)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "open"])
def test_compiled_layers_without_gradients_are_nodes(dynamic, dtype):
    """They take maps without copies, and no kernel is generated for GELU."""
    torch._dynamo.reset()
    layers = Layers()
    compiled = torch.compile(layers, fullgraph=True, dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        _, (code,) = run_and_get_code(compiled, torch.randn(2, 7, 5, 12))
        for shape in ((2, 7, 5, 12), (3, 8, 9, 12), (1, 2, 1, 12)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), layers(x), rtol=1e-5, atol=2e-2 if dtype != torch.float32 else 1e-6)
    assert code.count("torch.ops.zoo.onednn_convolution.default(") == 1
    assert code.count("torch.ops.zoo.onednn_linear.default(") == 1
    assert "tanh()" not in code


@pytest.mark.slow
@pytest.mark.parametrize("act", ["none", "gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_nodes_of_compiled_programs_are_proper_operators(bias, act):
    layer, conv = make(bias=bias), nn.Conv2d(12, 12, 3, 2, 1, groups=2, bias=bias)
    given = [tuple(None if x is None else x.detach() for x in (m.weight, m.bias)) for m in (layer, conv)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # they have no gradient
    torch.library.opcheck(
        torch.ops.zoo.onednn_linear.default, (torch.randn(5, 12), *given[0], act, "none"), test_utils=tests
    )
    options = (1, 1), (2, 2), (1, 1), 2
    arguments = inputs(), *given[1], *options, act, "none"
    torch.library.opcheck(torch.ops.zoo.onednn_convolution.default, arguments, test_utils=tests)


@torch.no_grad()
def test_gray_images_become_channels_last():
    """The operator of compiled programs announces channels-last maps. Contiguous gray images could be either."""
    gray = torch.randn(2, 1, 8, 6)
    conv = nn.Conv2d(1, 12, 3, padding=1)
    arguments = conv.padding, conv.stride, conv.dilation, conv.groups
    assert cpu.fused_convolution(gray, conv.weight, None, *arguments) is None
    out = cpu.fused_convolution(cpu.channels_last(gray), conv.weight, conv.bias, *arguments)
    assert out.stride() == (576, 1, 72, 12)
    torch.testing.assert_close(out, conv(gray))


def test_gradients_of_a_convolution_are_those_of_its_modules():
    conv, norm, act, x = nn.Conv2d(12, 8, 1), trained(8), nn.GELU(), inputs().requires_grad_()
    parameters = [x, *conv.parameters(), *norm.parameters()]
    found = torch.autograd.grad(convolution(conv, x, norm, act).square().sum(), parameters)
    want = torch.autograd.grad(plain(conv, x, norm, act).square().sum(), parameters)
    torch.testing.assert_close(found, want)
    for module in (conv, norm):  # one of them is frozen
        module.requires_grad_(False)
        assert convolution(conv, x.detach(), norm, act).requires_grad == (module is conv)


@torch.no_grad()
def test_batch_norm_in_training_takes_the_statistics_of_the_batch():
    conv, norm, x = nn.Conv2d(12, 8, 1), trained(8).train(), inputs()
    want = F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True)
    torch.testing.assert_close(convolution(conv, x, norm), want)
    assert norm.num_batches_tracked == 1


@torch.no_grad()
@pytest.mark.parametrize("position", range(3), ids=["convolution", "norm", "activation"])
def test_hooks_of_fused_modules_run(position):
    modules, seen = [nn.Conv2d(12, 8, 1), trained(8), nn.GELU()], []
    modules[position].register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    conv, norm, act = modules
    torch.testing.assert_close(convolution(conv, inputs(), norm, act), plain(conv, inputs(), norm, act))
    assert len(seen) == 2
    if position == 2:
        linear(make(), torch.randn(2, 12), act)
        assert len(seen) == 3


@torch.no_grad()
def test_fusion_can_be_switched_off():
    with torch.backends.mkldnn.flags(enabled=False), torch.profiler.profile() as profile:
        linear(make(), torch.randn(2, 12))
    assert "mkldnn::_linear_pointwise" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_stay_a_matrix_product(dtype):
    assert "convolution" not in operators(make(dtype), torch.randn(2, 3, 4, 12, dtype=dtype))


def test_autocast_stays_a_matrix_product():
    layer, x = make(), torch.randn(2, 3, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert "convolution" not in operators(layer, x)
        assert linear(layer, x).dtype == torch.bfloat16


def test_an_exported_program_has_a_linear_layer():
    with torch.no_grad():
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


def wide_models():
    """A test model for each class of modules that call `by_image`."""
    found = {}
    for family in zoo.FAMILIES:
        for name in timm.list_models("test_*", module=family):
            for module in timm.create_model(name, device="meta").modules():
                if hasattr(module, "widening"):
                    found.setdefault(type(module), name)
    return sorted(set(found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", wide_models())
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


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_images_become_channels_last(shape):
    images = torch.randn(shape, requires_grad=True)
    out = channels_last(images)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, images)
    assert channels_last(out) is out
    assert torch.equal(torch.vmap(channels_last)(images[None]), images[None])
    weights = torch.randn(shape)
    (out * weights).sum().backward()
    assert torch.equal(images.grad, weights)


def test_only_images_become_channels_last():
    """What is no batch of images reaches the stem, which names what is wrong."""
    image = torch.randn(3, 8, 8)
    assert channels_last(image) is image


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_spatial_mean(dtype, memory_format):
    maps = (torch.randn(2, 5, 37, 41) + 3).to(dtype).to(memory_format=memory_format)
    want = maps.double().mean(dim=(2, 3))
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = spatial_mean(maps)
    operators = {event.name for event in profile.events()}
    assert ("aten::avg_pool2d" in operators) == (dtype == torch.bfloat16)
    assert got.dtype == dtype
    # Sums in half precision would err by more than a rounding.
    torch.testing.assert_close(got.double(), want, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)
    assert torch.equal(spatial_mean(maps.requires_grad_()), maps.mean(dim=(2, 3)))
