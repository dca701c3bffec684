"""Depth-wise convolution in PyTorch, fast on CPUs: a dilated kernel becomes a dense one on the phases of the map.

Letters: B images, H, W map, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from zoo.kernels import checks, dispatch

# If the taps reach further to the side, oneDNN has no fast convolution and becomes 10 to 50 times slower.
FAST_REACH = 6


def depthwise_conv2d_nhwc(x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, int]) -> Tensor:
    """See `op.depthwise_conv2d_nhwc`, which checks the arguments."""
    if x.device.type != "cpu":
        return _convolve(x, weight, bias, dilation=dilation)
    # Few CPUs support float16 convolutions; on the others, they take a hundred times as long as in float32.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    inputs = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # Any dilation makes the gradients slow. Phases of symbolic sizes would restrict an exported program to multiples.
    slow = dilation[1] * (checks.sizes(weight)[3] // 2) > FAST_REACH or dispatch.again_differentiable(x, weight, bias)
    closed = all(has_static_value(side) for side in checks.sizes(x)[1:3])
    convolve = _by_phases if dilation != (1, 1) and slow and closed else _convolve
    return convolve(*inputs, dilation=dilation).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, int]) -> Tensor:
    padding = tuple(d * (k // 2) for d, k in zip(dilation, checks.sizes(weight)[2:], strict=True))
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=padding, dilation=dilation, groups=checks.sizes(x)[-1])
    return out.movedim(1, -1)


def _by_phases(x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, int]) -> Tensor:
    """Pixels with the same remainder only see each other: each such phase is a small map with zeros around it."""
    batch, (_, height, width, channels) = x.shape[0], checks.sizes(x)
    dy, dx = dilation
    rows, columns = (height + dy - 1) // dy, (width + dx - 1) // dx
    x = F.pad(x, (0, 0, 0, columns * dx - width, 0, rows * dy - height))
    phases = x.reshape(batch, rows, dy, columns, dx, channels).permute(2, 4, 0, 1, 3, 5)
    phases = phases.reshape(dy * dx * batch, rows, columns, channels)
    out = _convolve(phases, weight, bias, dilation=(1, 1))
    out = out.reshape(dy, dx, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
    return out.reshape(batch, rows * dy, columns * dx, channels)[:, :height, :width]
