"""Depth-wise convolution and large-kernel attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.depthwise_conv import reference, torch_impl


def depthwise_conv2d_nhwc(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: int | tuple[int, int] = 1
) -> Tensor:
    """Depth-wise convolution with stride 1 and zeros around the map, which keeps its size.

    out[b, y, x, c] = bias[c] + sum_ij weight[c, 0, i, j] * in[b, y + (i - kh // 2) * dy, x + (j - kw // 2) * dx, c].

    Args:
        x: (B, H, W, C).
        weight: (C, 1, kh, kw) with odd kh and kw, as in torch.nn.Conv2d.
        bias: (C,), or None.
        dilation: Distance between the taps, or a pair for rows and columns.

    Returns:
        (B, H, W, C), in the dtype of `x`. Under autocast, all tensors are converted to its dtype.

    Raises:
        TypeError: an integer tensor, or dtypes that differ.
        ValueError: a shape or an option other than those above.
    """
    dilations = checks.pair(dilation, "dilation")
    checks.tensors({"x": x, "weight": weight}, bias=bias)
    x, weight, bias = dispatch.autocast(x, weight, bias)
    checks.floating(x=x, weight=weight, bias=bias)
    checks.shape(x, "x", (None,) * 4, "(B, H, W, C)")
    _, height, width, channels = checks.sizes(x)
    checks.count(channels, "channels")
    checks.map_size(height, width, "x")
    checks.shape(weight, "weight", (channels, 1, None, None), "(C, 1, kh, kw)")
    if bias is not None:
        checks.shape(bias, "bias", (channels,), "(C,)")
    kernel_height, kernel_width = checks.sizes(weight)[2:]
    if not kernel_height % 2 or not kernel_width % 2:
        raise ValueError(
            f"Got a kernel of {kernel_height} x {kernel_width}; both sides have to be odd, so that it has a "
            "middle: pad it with zeros on one side."
        )
    with dispatch.as_given(x):
        return _implementation().depthwise_conv2d_nhwc(x, weight, bias, dilation=dilations)


def large_kernel_attention(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    dilation: int | tuple[int, int] = 3,
) -> Tensor:
    """x * Linear(DWConv, dilated (DWConv(x))): a large receptive field as a gate, without a sigmoid.

    VAN uses a 5 x 5 kernel, then a 7 x 7 kernel with dilation 3; together they cover 23 x 23 pixels.

    Args:
        x: (B, H, W, C).
        depthwise_weight: (C, 1, kh, kw), of the first convolution.
        depthwise_bias: (C,), or None.
        dilated_weight: (C, 1, kh, kw), of the second convolution.
        dilated_bias: (C,), or None.
        pointwise_weight: (C, C), output channels first: the weight (C, C, 1, 1) of a 1 x 1 convolution, flattened.
        pointwise_bias: (C,), or None.
        dilation: Dilation of the second convolution.

    Returns:
        (B, H, W, C), in the dtype of `x`. Under autocast, all tensors are converted to its dtype.

    Raises:
        TypeError: an integer tensor, or dtypes that differ.
        ValueError: a shape or an option other than those above.

    Source: VAN, arXiv 2202.09741, section 3.2.
    """
    weights = {
        "depthwise_weight": depthwise_weight,
        "dilated_weight": dilated_weight,
        "pointwise_weight": pointwise_weight,
    }
    biases = {"depthwise_bias": depthwise_bias, "dilated_bias": dilated_bias, "pointwise_bias": pointwise_bias}
    checks.tensors({"x": x} | weights, **biases)
    x, depthwise_weight, depthwise_bias, dilated_weight, dilated_bias, pointwise_weight, pointwise_bias = (
        dispatch.autocast(
            x, depthwise_weight, depthwise_bias, dilated_weight, dilated_bias, pointwise_weight, pointwise_bias
        )
    )
    checks.floating(x=x, pointwise_weight=pointwise_weight, pointwise_bias=pointwise_bias)
    checks.shape(x, "x", (None,) * 4, "(B, H, W, C)")
    channels = checks.sizes(x)[-1]
    checks.count(channels, "channels")
    checks.shape(pointwise_weight, "pointwise_weight", (channels, channels), "(C, C)")
    if pointwise_bias is not None:
        checks.shape(pointwise_bias, "pointwise_bias", (channels,), "(C,)")
    gate = depthwise_conv2d_nhwc(x, depthwise_weight, depthwise_bias)
    gate = depthwise_conv2d_nhwc(gate, dilated_weight, dilated_bias, dilation=dilation)
    with dispatch.as_given(x):
        # Of a cropped map, PyTorch makes a batch of matrices, and a copy of the weight for each.
        return x * F.linear(gate.contiguous(), pointwise_weight, pointwise_bias)


def _implementation() -> ModuleType:
    # There is no Triton form, so "triton" runs PyTorch. These operators are memory-bound: cuDNN's channels-last
    # convolutions suffice until a profile on a GPU shows otherwise, and Inductor fuses the 1 x 1 and the product.
    return reference if dispatch.current() == "reference" else torch_impl
