"""Shapes at which models call depth-wise convolution, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.depthwise_conv.op import depthwise_conv2d_nhwc

FUNCTION = depthwise_conv2d_nhwc


@dataclass(frozen=True)
class Case:
    """One call: the map, its channels and the kernel; `stripes` maps for each image if it is cut into stripes."""

    size: tuple[int, int]
    channels: int
    kernel_size: int
    dilation: int = 1
    stripes: int = 1

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        name = f"{self.size[0]}x{self.size[1]}x{self.channels}-{self.kernel_size}x{self.kernel_size}"
        name += f"-dilation{self.dilation}" if self.dilation > 1 else ""
        return name + (f"-stripes{self.stripes}" if self.stripes > 1 else "")


CASES = {
    case.name: case
    for case in (
        # the two convolutions of large-kernel attention, images of 224 pixels
        Case((56, 56), 64, 5),
        Case((56, 56), 64, 7, 3),
        Case((28, 28), 128, 5),
        Case((28, 28), 128, 7, 3),
        Case((14, 14), 320, 5),
        Case((14, 14), 320, 7, 3),
        Case((7, 7), 512, 5),
        Case((7, 7), 512, 7, 3),
        # position encoding of the values of attention within stripes, half of the channels each way
        Case((56, 1), 32, 3, stripes=56),
        Case((28, 2), 64, 3, stripes=14),
        Case((14, 7), 128, 3, stripes=2),
        Case((7, 7), 512, 3),
        # position encoding of the values of routed attention
        Case((14, 14), 256, 5),
    )
}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind.
KINDS = ("14x14x320-7x7-dilation3", "14x7x128-3x3-stripes2")


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION, normally distributed, the same on all devices."""
    generator = torch.Generator().manual_seed(0)
    taps = case.kernel_size**2
    x = torch.randn(batch * case.stripes, *case.size, case.channels, generator=generator)
    weight = torch.randn(case.channels, 1, case.kernel_size, case.kernel_size, generator=generator) / taps**0.5
    bias = torch.randn(case.channels, generator=generator)
    made = tuple(tensor.to(device, dtype).requires_grad_(requires_grad) for tensor in (x, weight, bias))
    return made, {"dilation": case.dilation}


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8), (8, 1, 3, 3), (8,))


def sample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    return depthwise_conv2d_nhwc(x, weight, bias, dilation=2)
