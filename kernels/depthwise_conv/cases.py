"""The shapes at which the families call depth-wise convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: the map, its channels and the kernel; `parts` maps for each image, where it is cut into stripes."""

    size: tuple[int, int]
    channels: int
    kernel_size: int
    dilation: int = 1
    parts: int = 1


CASES: dict[str, Case] = {
    # VAN-B1 to -B3 at 224 pixels: the two convolutions of large-kernel attention
    "van_b2-stage1-5x5": Case((56, 56), 64, 5),
    "van_b2-stage1-7x7": Case((56, 56), 64, 7, 3),
    "van_b2-stage2-5x5": Case((28, 28), 128, 5),
    "van_b2-stage2-7x7": Case((28, 28), 128, 7, 3),
    "van_b2-stage3-5x5": Case((14, 14), 320, 5),
    "van_b2-stage3-7x7": Case((14, 14), 320, 7, 3),
    "van_b2-stage4-5x5": Case((7, 7), 512, 5),
    "van_b2-stage4-7x7": Case((7, 7), 512, 7, 3),
    # CSWin-T: position encoding of the values, zeros at the stripe's border, half of the channels each way
    "cswin_tiny-stage1-lepe": Case((56, 1), 32, 3, parts=56),
    "cswin_tiny-stage2-lepe": Case((28, 2), 64, 3, parts=14),
    "cswin_tiny-stage3-lepe": Case((14, 7), 128, 3, parts=2),
    "cswin_tiny-stage4-lepe": Case((7, 7), 512, 3),
    # BiFormer-T: local context enhancement
    "biformer_tiny-stage1-lce": Case((56, 56), 64, 5),
    "biformer_tiny-stage2-lce": Case((28, 28), 128, 5),
    "biformer_tiny-stage3-lce": Case((14, 14), 256, 5),
    "biformer_tiny-stage4-lce": Case((7, 7), 512, 5),
}


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of `depthwise_conv2d_nhwc`."""
    generator = torch.Generator().manual_seed(0)
    taps = case.kernel_size**2
    x = torch.randn(batch * case.parts, *case.size, case.channels, generator=generator)
    weight = torch.randn(case.channels, 1, case.kernel_size, case.kernel_size, generator=generator) / taps**0.5
    bias = torch.randn(case.channels, generator=generator)
    made = tuple(tensor.to(device, dtype).requires_grad_(requires_grad) for tensor in (x, weight, bias))
    return made, {"dilation": case.dilation}
