"""Shapes at which models call routed attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.routed_attention.op import routed_attention

FUNCTION = routed_attention


@dataclass(frozen=True)
class Case:
    """One call: the map, its heads, the regions along a side, and the number that each region is routed to."""

    size: tuple[int, int]
    num_heads: int
    regions: int
    topk: int
    head_dim: int = 32

    @property
    def name(self) -> str:
        """The shapes."""
        height, width = self.size
        return f"{height}x{width}x{self.num_heads * self.head_dim}-regions{self.regions}-top{self.topk}"


CASES = {
    case.name: case
    for case in (
        # images of 224 pixels
        Case((56, 56), 2, 7, 1),
        Case((28, 28), 4, 7, 4),
        Case((14, 14), 8, 7, 16),
        Case((56, 56), 3, 7, 1),
        Case((28, 28), 6, 7, 4),
        Case((14, 14), 12, 7, 16),
        # detection at 800 x 1344 pixels, each map padded to multiples of 16
        Case((208, 336), 2, 16, 1),
        Case((112, 176), 4, 16, 4),
        Case((64, 96), 8, 16, 16),
        # segmentation at 512 x 512 pixels
        Case((128, 128), 2, 8, 1),
        Case((64, 64), 4, 8, 4),
        Case((32, 32), 8, 8, 16),
    )
}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind; the first two differ most.
KINDS = ("56x56x64-regions7-top1", "14x14x256-regions7-top16")


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION: q, k and v are slices of one tensor, no route repeats."""
    generator = torch.Generator().manual_seed(0)
    channels = case.num_heads * case.head_dim
    qkv = torch.randn(batch, *case.size, 3 * channels, generator=generator).to(device, dtype)
    parts = tuple(part.detach().requires_grad_(requires_grad) for part in qkv.chunk(3, -1))
    affinity = torch.rand(batch, case.regions**2, case.regions**2, generator=generator)
    routes = affinity.topk(case.topk).indices.to(device)
    return (*parts, routes), {"num_heads": case.num_heads, "regions": case.regions, "scale": channels**-0.5}


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8),) * 3


def sample(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    routes = torch.tensor([[0, 1], [2, 2], [3, 1], [3, 0]], device=q.device).expand(q.shape[0], -1, -1)
    return routed_attention(q, k, v, routes, num_heads=2, regions=2)
