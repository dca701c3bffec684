"""Depth-wise convolution in plain torch: the definition of the correct result."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks


def depthwise_conv2d_nhwc(x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: tuple[int, int]) -> Tensor:
    """See `op.depthwise_conv2d_nhwc`, which checks the arguments."""
    padding = tuple(d * (k // 2) for d, k in zip(dilation, checks.sizes(weight)[2:], strict=True))
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=padding, dilation=dilation, groups=checks.sizes(x)[-1])
    return out.movedim(1, -1)
