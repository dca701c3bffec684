"""The shapes at which BiFormer calls routed attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: the map, its heads, and how it is routed."""

    size: tuple[int, int]
    num_heads: int
    regions: int
    topk: int
    head_dim: int = 32


CASES: dict[str, Case] = {
    # BiFormer-T and -S at 224 pixels
    "biformer_tiny-stage1": Case((56, 56), 2, 7, 1),
    "biformer_tiny-stage2": Case((28, 28), 4, 7, 4),
    "biformer_tiny-stage3": Case((14, 14), 8, 7, 16),
    # BiFormer-B
    "biformer_base-stage1": Case((56, 56), 3, 7, 1),
    "biformer_base-stage2": Case((28, 28), 6, 7, 4),
    "biformer_base-stage3": Case((14, 14), 12, 7, 16),
    # COCO at 800 x 1344 pixels, each map padded to multiples of 16
    "biformer_small_det-stage1": Case((208, 336), 2, 16, 1),
    "biformer_small_det-stage2": Case((112, 176), 4, 16, 4),
    "biformer_small_det-stage3": Case((64, 96), 8, 16, 16),
    # ADE20K at 512 x 512 pixels
    "biformer_small_seg-stage1": Case((128, 128), 2, 8, 1),
    "biformer_small_seg-stage2": Case((64, 64), 4, 8, 4),
    "biformer_small_seg-stage3": Case((32, 32), 8, 8, 16),
}


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of `routed_attention`: parts of one projection, routes without repetition."""
    generator = torch.Generator().manual_seed(0)
    channels = case.num_heads * case.head_dim
    qkv = torch.randn(batch, *case.size, 3 * channels, generator=generator).to(device, dtype)
    parts = tuple(part.detach().requires_grad_(requires_grad) for part in qkv.chunk(3, -1))
    affinity = torch.rand(batch, case.regions**2, case.regions**2, generator=generator)
    routes = affinity.topk(case.topk).indices.to(device)
    return (*parts, routes), {"num_heads": case.num_heads, "regions": case.regions, "scale": channels**-0.5}
