"""Shapes at which models call neighborhood attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.neighborhood_attention.op import neighborhood_attention

FUNCTION = neighborhood_attention


@dataclass(frozen=True)
class Case:
    """One call, without the batch; `op.neighborhood_attention` explains the options."""

    size: tuple[int, int]
    num_heads: int
    kernel_size: tuple[int, int] = (7, 7)
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    is_causal: tuple[bool, bool] = (False, False)
    head_dim: int = 32
    bias: bool = True
    key_mask: bool = False

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        (height, width), (kh, kw) = self.size, self.kernel_size
        name = f"{height}x{width}x{self.num_heads * self.head_dim}-{kh}x{kw}"
        for option, value in (("dilation", self.dilation), ("stride", self.stride)):
            name += f"-{option}{value[0]}" if value != (1, 1) else ""
        return name + "-unbiased" * (not self.bias) + "-masked" * self.key_mask


def _square(side: int, num_heads: int, kernel: int = 7, dilation: int = 1) -> Case:
    return Case((side, side), num_heads, (kernel, kernel), (dilation, dilation))


CASES = {
    case.name: case
    for case in (
        # Images of 224 pixels: a dilated kernel spans the map (grid attention), and the last map is one window.
        _square(56, 2),
        _square(56, 2, dilation=8),
        _square(28, 4),
        _square(28, 4, dilation=4),
        _square(14, 8),
        _square(14, 8, dilation=2),
        _square(7, 16),
        _square(56, 4),
        _square(14, 16),
        _square(14, 12),
        # images of 384 pixels
        _square(96, 6),
        _square(96, 6, dilation=13),
        _square(48, 12),
        _square(48, 12, dilation=6),
        _square(24, 24),
        _square(24, 24, dilation=3),
        _square(12, 48),
        _square(96, 6, 11),
        _square(96, 6, 11, 8),
        _square(24, 24, 11, 2),
        _square(12, 48, 11),
        # segmentation of 512 x 512 pixels
        _square(128, 2, dilation=16),
        _square(32, 8, dilation=4),
        # a map that is padded below and on the right, the padding hidden from all queries
        Case((56, 56), 2, key_mask=True),
        # Generalized NA: with the stride, queries share windows.
        Case((56, 56), 2, stride=(2, 2)),
        Case((64, 64), 4, (16, 16), stride=(8, 8), head_dim=64, bias=False),
    )
}
# The default of `zoo-bench kernels`.
TARGETS = {"target-56x56x64": _square(56, 2), "target-14x14x256": _square(14, 8)}
# One of each kind, for tests whose result is the same within a kind; the first two differ most.
KINDS = ("14x14x256-7x7", "64x64x256-16x16-stride8-unbiased", "14x14x256-7x7-dilation2", "56x56x64-7x7-stride2")
# The reference takes gigabytes for one image of these: it copies the keys of each query.
LARGE = ("64x64x256-16x16-stride8-unbiased", "96x96x192-11x11", "96x96x192-11x11-dilation8")


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

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(requires_grad)

    qkv = normal(batch, *case.size, 3 * case.num_heads * case.head_dim)
    kh, kw = case.kernel_size
    key_mask = None
    if case.key_mask:  # the last rows and columns are padding
        height, width = case.size
        key_mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
        key_mask[:, : height - height // 8, : width - width // 8] = True
    return (qkv,), {
        "num_heads": case.num_heads,
        "kernel_size": case.kernel_size,
        "dilation": case.dilation,
        "stride": case.stride,
        "is_causal": case.is_causal,
        "bias_table": normal(case.num_heads, 2 * kh - 1, 2 * kw - 1) if case.bias else None,
        "key_mask": key_mask,
    }


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 24), (2, 5, 5))


def sample(qkv: Tensor, bias_table: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    return neighborhood_attention(qkv, num_heads=2, kernel_size=3, bias_table=bias_table)
