"""Depth-wise convolution's torch_impl against its reference. Seconds."""

import pytest
import torch

from zoo.kernels import depthwise_conv2d_nhwc, implementation, large_kernel_attention

from .comparison import BUDGET, assert_agree, assert_precise, run
from .test_depthwise_conv import CASES as SMALL

# map, kernel, dilation
CASES = {
    **SMALL,
    "dilated-exactly": ((12, 9), (7, 7), (3, 3)),
    "dilated-unevenly": ((13, 17), (7, 5), (3, 4)),
    "dilated-beyond-the-map": ((4, 3), (7, 7), (3, 3)),
    "dilated-columns": ((8, 19), (3, 7), (1, 3)),
    "dilated-a-little": ((8, 9), (3, 3), (2, 2)),
}


def call(case, channels=3):
    """The differentiable tensors of a call, and a function of them."""
    size, kernel, dilation = CASES[case]
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, *size, channels), "weight": (channels, 1, *kernel), "bias": (channels,)}
    given = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return given, lambda x, weight, bias=None: depthwise_conv2d_nhwc(x, weight, bias, dilation=dilation)


def call_large_kernel_attention():
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 11, 8, 4),
        "depthwise_weight": (4, 1, 5, 5),
        "depthwise_bias": (4,),
        "dilated_weight": (4, 1, 7, 7),
        "dilated_bias": (4,),
        "pointwise_weight": (4, 4),
        "pointwise_bias": (4,),
    }
    given = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return given, large_kernel_attention


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, biased):
    given, function = call(case)
    if not biased:
        del given["bias"]
    assert_agree(function, given)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    given, function = call(case)
    assert_agree(function, {name: x.requires_grad_() for name, x in given.items()})


def test_large_kernel_attention():
    given, function = call_large_kernel_attention()
    assert_agree(function, given)
    assert_agree(function, {name: x.requires_grad_() for name, x in given.items()})


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("case", ["3x3", "dilated-unevenly"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, case, differentiated):
    given, function = call(case)
    assert_precise(function, given, dtype, differentiated)


@pytest.mark.parametrize("make", [lambda: call("dilated-unevenly"), call_large_kernel_attention], ids=["conv", "lka"])
def test_autocast_casts_all_tensors(make):
    given, function = make()
    given = {name: x.float() for name, x in given.items()}
    want = run("torch", function, {name: x.bfloat16() for name, x in given.items()})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run("torch", function, given), want, rtol=0, atol=0)


def test_strided_input():
    given, function = call("dilated-unevenly")
    view = given["x"].movedim(-1, 1).contiguous().movedim(1, -1)
    torch.testing.assert_close(run("torch", function, given | {"x": view}), run("torch", function, given))


@pytest.mark.slow
def test_double_backward():
    given, function = call("dilated-a-little", channels=2)
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(function, inputs)


def test_functional_transforms():
    given, function = call("dilated-unevenly")

    def loss(x):
        return function(**given | {"x": x}).square().sum()

    direction = torch.ones_like(given["x"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["x"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["x"]), want)
        slope = torch.func.jvp(loss, (given["x"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_compiles_as_one_graph(differentiated):
    given, function = call("dilated-unevenly")
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", function, given))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 7, groups=3)

    def forward(self, x):
        return depthwise_conv2d_nhwc(x, self.conv.weight, self.conv.bias, dilation=3)


@pytest.mark.slow
def test_exports_with_open_sizes():
    module = Module()
    dims = {axis: torch.export.Dim(name, min=2, max=99) for axis, name in enumerate(("batch", "rows", "columns"))}
    program = torch.export.export(module, (torch.randn(2, 8, 11, 3),), dynamic_shapes=(dims,))
    again = torch.randn(3, 16, 9, 3)
    torch.testing.assert_close(program.module()(again), module(again))
