"""The shapes at which the families use neighborhood attention, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of `neighborhood_attention`, but for the batch."""

    size: tuple[int, int]
    num_heads: int
    kernel_size: tuple[int, int] = (7, 7)
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    is_causal: tuple[bool, bool] = (False, False)
    head_dim: int = 32
    bias: bool = True
    key_mask: bool = False


def _square(side: int, num_heads: int, kernel: int = 7, dilation: int = 1) -> Case:
    return Case((side, side), num_heads, (kernel, kernel), (dilation, dilation))


CASES: dict[str, Case] = {
    # At 224 pixels a dilated block spans the map (grid attention), and stage 4 is one window.
    "dinat_tiny-stage1-dense": _square(56, 2),
    "dinat_tiny-stage1-dilated": _square(56, 2, dilation=8),
    "dinat_tiny-stage2-dense": _square(28, 4),
    "dinat_tiny-stage2-dilated": _square(28, 4, dilation=4),
    "dinat_tiny-stage3-dense": _square(14, 8),
    "dinat_tiny-stage3-dilated": _square(14, 8, dilation=2),
    "dinat_tiny-stage4": _square(7, 16),
    "dinat_base-stage1-dense": _square(56, 4),
    "dinat_base-stage3-dense": _square(14, 16),
    "dinat_iso_small-dense": _square(14, 12),
    "dinat_large_384-stage1-dense": _square(96, 6),
    "dinat_large_384-stage1-dilated": _square(96, 6, dilation=13),
    "dinat_large_384-stage2-dense": _square(48, 12),
    "dinat_large_384-stage2-dilated": _square(48, 12, dilation=6),
    "dinat_large_384-stage3-dense": _square(24, 24),
    "dinat_large_384-stage3-dilated": _square(24, 24, dilation=3),
    "dinat_large_384-stage4": _square(12, 48),
    "dinat_large_384_11x11-stage1-dense": _square(96, 6, 11),
    "dinat_large_384_11x11-stage1-dilated": _square(96, 6, 11, 8),
    "dinat_large_384_11x11-stage3-dilated": _square(24, 24, 11, 2),
    "dinat_large_384_11x11-stage4": _square(12, 48, 11),
    # Segmentation of 512 x 512 pixels.
    "dinat_tiny_ade20k-stage1-dilated": _square(128, 2, dilation=16),
    "dinat_tiny_ade20k-stage3-dilated": _square(32, 8, dilation=4),
    # A map that is padded below and on the right, the padding seen by none.
    "dinat_tiny-stage1-dense-padded": Case((56, 56), 2, key_mask=True),
    # Generalized NA: with the stride, queries share windows; no family has it yet.
    "gna-56-kernel7-stride2": Case((56, 56), 2, stride=(2, 2)),
    "gna-64-kernel16-stride8": Case((64, 64), 4, (16, 16), stride=(8, 8), head_dim=64, bias=False),
}


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of `neighborhood_attention` for `case`, of normal random numbers."""
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
