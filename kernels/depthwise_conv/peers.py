"""Depth-wise convolution by torch.nn.functional.conv2d, on maps of either memory format."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.peers import Arguments, Contender, pair

BACKWARD_FLOPS = 2.0  # operations of the backward pass, relative to those of the forward pass


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward."""
    height, width = arguments["weight"].shape[2:]
    return 2 * height * width


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Any) -> Tensor:
    steps = pair(dilation)
    padding = tuple(d * (k // 2) for d, k in zip(steps, weight.shape[2:], strict=True))
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=padding, dilation=steps, groups=x.shape[-1])
    return out.movedim(1, -1)


def _planes(name: str, value: Any) -> Any:
    """The memory format of a network in NCHW; the copy is not timed."""
    if name not in ("x", "grad"):
        return value
    return value.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_(value.requires_grad)


PEERS = (Contender("conv2d NCHW", _conv2d, _planes), Contender("conv2d NHWC", _conv2d))
