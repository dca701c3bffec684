"""Depth-wise convolution and large-kernel attention against loops, by gradcheck, and their messages, for each
implementation. Seconds.
"""

import pytest
import timm
import torch

from zoo.kernels import depthwise_conv2d_nhwc, large_kernel_attention

from . import oracle

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


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case, biased):
    x, weight, bias, dilation = make(case)
    bias = bias if biased else None
    out = depthwise_conv2d_nhwc(x, weight, bias, dilation=dilation)
    torch.testing.assert_close(out, oracle.depthwise_conv(x, weight, bias, dilation))


@pytest.mark.parametrize("case", ["rectangle", "larger-than-the-map"])
def test_gradients(case):
    x, weight, bias, dilation = make(case, batch=1, channels=2)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d_nhwc(*t, dilation=dilation), inputs)


def lka_of_van():
    """VAN's module, and its weights as the operator takes them."""
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
BAD = [
    ((X, WEIGHT[..., :2], BIAS), 1, ValueError, "kernel of 3 x 2; both sides have to be odd"),
    ((X, WEIGHT[:2], BIAS), 1, ValueError, r"weight of shape \(2, 1, 3, 3\); expected \(C, 1, kh, kw\)"),
    ((X, WEIGHT, BIAS[:2]), 1, ValueError, r"bias of shape \(2,\)"),
    ((X[0], WEIGHT, BIAS), 1, ValueError, r"x of shape \(4, 4, 3\)"),
    ((X.int(), WEIGHT, BIAS), 1, TypeError, "x of torch.int32; it has to be floating point"),
    ((X, WEIGHT.half(), BIAS), 1, TypeError, "weight of torch.float16 with x of torch.float32"),
    ((X, WEIGHT, BIAS), 0, ValueError, "dilation=0; it has to be 1 or more"),
]


@pytest.mark.parametrize(("tensors", "dilation", "error", "message"), BAD, ids=[row[3][:30] for row in BAD])
def test_bad_input(tensors, dilation, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv2d_nhwc(*tensors, dilation=dilation)


def test_bad_pointwise_weight():
    with pytest.raises(ValueError, match=r"pointwise_weight of shape \(3, 3, 1, 1\); expected \(C, C\)"):
        large_kernel_attention(X, WEIGHT, BIAS, WEIGHT, BIAS, torch.zeros(3, 3, 1, 1), BIAS)
