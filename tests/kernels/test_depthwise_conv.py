"""Depth-wise convolution and large-kernel attention against loops, gradcheck, and rejected arguments. Seconds."""

import pytest
import timm
import torch

from zoo.kernels import depthwise_conv2d_nhwc, large_kernel_attention

from . import random_calls

pytestmark = pytest.mark.usefixtures("each_implementation")

# map, kernel, dilation
CASES = {
    "3x3": ((5, 6), (3, 3), (1, 1)),
    "1x1": ((2, 3), (1, 1), (1, 1)),
    "7x7-dilated": ((9, 8), (7, 7), (3, 3)),
    "rectangle": ((6, 5), (5, 3), (1, 2)),
    "larger-than-the-map": ((2, 1), (5, 5), (1, 1)),
}


def make(case, batch=2, channels=3):
    size, kernel, dilation = CASES[case]
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, *size, channels), (channels, 1, *kernel), (channels,))
    return *(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes), dilation


def loops(x, weight, bias, dilation):
    out = torch.zeros_like(x)
    _, height, width, _ = x.shape
    kh, kw = weight.shape[2:]
    for y in range(height):
        for z in range(width):
            for i in range(kh):
                for j in range(kw):
                    u, w = y + (i - kh // 2) * dilation[0], z + (j - kw // 2) * dilation[1]
                    if 0 <= u < height and 0 <= w < width:
                        out[:, y, z] += weight[:, 0, i, j] * x[:, u, w]
    return out if bias is None else out + bias


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case, biased):
    x, weight, bias, dilation = make(case)
    bias = bias if biased else None
    out = depthwise_conv2d_nhwc(x, weight, bias, dilation=dilation)
    torch.testing.assert_close(out, loops(x, weight, bias, dilation))


@pytest.mark.parametrize("case", ["rectangle", "larger-than-the-map"])
def test_gradients(case):
    x, weight, bias, dilation = make(case, batch=1, channels=2)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d_nhwc(*t, dilation=dilation), inputs)


def lka_of_van():
    """A module of VAN, and its weights as arguments of the operator."""
    lka = timm.create_model("test_van").double().stages[0].blocks[0].attn.lka
    convs = (lka.dw_conv, lka.dw_dilated_conv, lka.pw_conv)
    weights = [tensor for conv in convs for tensor in (conv.weight.detach(), conv.bias.detach())]
    weights[4] = weights[4].flatten(1)
    return lka, weights


def test_large_kernel_attention_is_that_of_van():
    lka, weights = lka_of_van()
    x = torch.randn(2, 9, 7, weights[0].shape[0], dtype=torch.float64)
    want = lka(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(large_kernel_attention(x, *weights), want)


def test_gradients_of_large_kernel_attention():
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 3, 2), (2, 1, 3, 3), (2,), (2, 1, 3, 3), (2,), (2, 2), (2,))
    inputs = tuple(torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *t: large_kernel_attention(*t, dilation=2), inputs)


X, WEIGHT, BIAS = torch.zeros(1, 4, 4, 3), torch.zeros(3, 1, 3, 3), torch.zeros(3)


def call(**change):
    """A valid call, with some arguments changed."""
    return depthwise_conv2d_nhwc(**{"x": X, "weight": WEIGHT, "bias": BIAS} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"weight": WEIGHT[..., :2]}, ValueError, "kernel of 3 x 2; both sides have to be odd"),
    ({"weight": WEIGHT[..., :0]}, ValueError, "kernel of 3 x 0; both sides have to be odd"),
    ({"weight": WEIGHT[:2]}, ValueError, r"weight of shape \(2, 1, 3, 3\); expected \(C, 1, kh, kw\)"),
    ({"weight": WEIGHT.half()}, TypeError, "weight of torch.float16 with x of torch.float32"),
    ({"weight": None}, TypeError, "weight of type NoneType"),
    ({"bias": BIAS[:2]}, ValueError, r"bias of shape \(2,\)"),
    ({"x": X[0]}, ValueError, r"x of shape \(4, 4, 3\)"),
    ({"x": X.int()}, TypeError, "x of torch.int32; it has to be floating point"),
    ({"x": X[:, :0]}, ValueError, "x of 0 x 4 tokens"),
    ({"x": X[..., :0], "weight": WEIGHT[:0], "bias": None}, ValueError, "channels=0; it has to be 1 or"),
    ({"dilation": 0}, ValueError, "dilation=0; it has to be 1 or more"),
]
BAD_LARGE_KERNELS = [
    ({"pointwise_weight": torch.zeros(3, 3, 1, 1)}, ValueError, r"shape \(3, 3, 1, 1\); expected \(C, C\)"),
    ({"pointwise_weight": None}, TypeError, "pointwise_weight of type NoneType"),
    ({"x": X[:, :0]}, ValueError, "x of 0 x 4 tokens"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LARGE_KERNELS, ids=[row[2] for row in BAD_LARGE_KERNELS])
def test_bad_input_of_large_kernel_attention(change, error, message):
    weights = {f"{name}_weight": WEIGHT for name in ("depthwise", "dilated")} | {"pointwise_weight": torch.zeros(3, 3)}
    biases = {f"{name}_bias": BIAS for name in ("depthwise", "dilated", "pointwise")}
    with pytest.raises(error, match=message):
        large_kernel_attention(**{"x": X} | weights | biases | change)


def random_call(rng):
    sides = rng.choice((1, 3, 3, 5, 2, 0)), rng.choice((1, 3, 3, 2))
    tensors = {
        "x": random_calls.tensor(rng, *random_calls.size(rng), 4),
        "weight": random_calls.tensor(rng, 4, 1, *sides),
    }
    tensors["bias"] = random_calls.tensor(rng, 4)
    return depthwise_conv2d_nhwc, tensors | {"dilation": rng.choice(random_calls.NUMBERS)}
