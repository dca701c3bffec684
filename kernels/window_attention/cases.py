"""Real shapes of window attention, for tests, compile checks and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer's shapes; `op.window_attention` explains them."""

    map_size: tuple[int, int]
    num_heads: int
    window_size: tuple[int, int]
    head_dim: int = 32
    layout: str = "block"
    bias: bool = True
    bias_sign: str = "query_minus_key"
    shared_query: bool = False
    key_mask: bool = False


def _cases() -> dict[str, Case]:
    cases = {}
    for layout in ("block", "grid"):  # MaxViT tiny; 12 and 16 are the windows at 384 and 512 pixels
        for window in (7, 12, 16):
            for stage in range(1, 5):
                side = (window << 3) >> (stage - 1)
                name = f"maxvit_tiny_{32 * window}-stage{stage}-{layout}"
                cases[name] = Case(
                    (side, side), 2 << (stage - 1), (window, window), layout=layout, bias_sign="key_minus_query"
                )
    for shared in (False, True):  # GC ViT tiny at 224 pixels, large at 384 and 512
        for variant, heads, windows in (
            ("tiny_224", 2, (7, 7, 14, 7)),
            ("large_384", 6, (12, 12, 24, 12)),
            ("large_512", 6, (16, 16, 32, 16)),
        ):
            for stage, window in enumerate(windows):
                side = int(variant[-3:]) // 4 >> stage
                name = f"gcvit_{variant}-stage{stage + 1}-{'global' if shared else 'local'}"
                cases[name] = Case((side, side), heads << stage, (window, window), shared_query=shared)
    for variant, heads, dim, side, widths in (  # each branch has half of the heads
        ("tiny_224", 1, 32, 56, (1, 2, 7, 7)),
        ("base_384", 2, 24, 96, (1, 2, 12, 12)),
    ):
        for stage, width in enumerate(widths):
            size = side >> stage
            name = f"cswin_{variant}-stage{stage + 1}"
            if stage == 3:
                cases[name] = Case((size, size), 2 * heads << stage, (size, size), dim, bias=False)
            else:
                cases[f"{name}-columns"] = Case((size, size), heads << stage, (size, width), dim, bias=False)
                cases[f"{name}-rows"] = Case((size, size), heads << stage, (width, size), dim, bias=False)
    cases["litv2_small_224-stage3-high"] = Case((14, 14), 2, (2, 2), bias=False)
    for stage in range(3):  # the dilated blocks, whose neighborhoods are those of a grid
        side = 56 >> stage
        name = f"dinat_tiny_224-stage{stage + 1}-dilated"
        cases[name] = Case((side, side), 2 << stage, (7, 7), layout="grid", bias_sign="key_minus_query")
    cases["maxvit_tiny_224-stage1-block-padded"] = Case((56, 56), 2, (7, 7), bias_sign="key_minus_query", key_mask=True)
    return cases


CASES = _cases()


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of `op.window_attention`, with random numbers, the same on all devices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator)
        return values.to(device, dtype).requires_grad_(requires_grad)

    (height, width), (wh, ww) = case.map_size, case.window_size
    channels = case.num_heads * case.head_dim
    key_mask = None
    if case.key_mask:  # the last rows and columns are padding
        key_mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
        key_mask[:, : height - height // 8, : width - width // 8] = True
    return (normal(batch, height, width, (2 if case.shared_query else 3) * channels),), {
        "num_heads": case.num_heads,
        "window_size": case.window_size,
        "layout": case.layout,
        "bias_table": normal(case.num_heads, 2 * wh - 1, 2 * ww - 1) if case.bias else None,
        "bias_sign": case.bias_sign,
        "key_mask": key_mask,
        "q": normal(batch, wh * ww, channels) if case.shared_query else None,
    }
