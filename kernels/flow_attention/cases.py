"""Shapes at which models call flow attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.flow_attention.op import flow_attention

FUNCTION = flow_attention


@dataclass(frozen=True)
class Case:
    """One call, without the batch: the map and its heads."""

    size: tuple[int, int]
    num_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The shapes."""
        return f"{self.size[0]}x{self.size[1]}x{self.num_heads * self.head_dim}-heads{self.num_heads}"


CASES = {
    case.name: case
    for case in (
        # all stages; images of 224 pixels
        Case((56, 56), 12, 8),
        Case((28, 28), 12, 16),
        Case((14, 14), 12, 32),
        Case((7, 7), 12, 64),
        # detection at 800 x 1344 pixels
        Case((200, 336), 12, 8),
    )
}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind.
KINDS = ("14x14x384-heads12",)


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION: q, k and v are slices of one tensor."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, *case.size, 3 * case.num_heads * case.head_dim, generator=generator).to(device, dtype)
    parts = tuple(part.detach().requires_grad_(requires_grad) for part in qkv.chunk(3, -1))
    return parts, {"num_heads": case.num_heads}


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8),) * 3


def sample(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    return flow_attention(q, k, v, num_heads=2)
