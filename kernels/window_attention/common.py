"""Definitions that implementations of window attention share."""

from __future__ import annotations

import torch
from torch import Tensor


def entries(wh: int, ww: int, sign: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column in the bias table of each query (row) and key (column), two tensors (T, T)."""
    y = torch.arange(wh, device=device).repeat_interleave(ww)
    x = torch.arange(ww, device=device).repeat(wh)
    down, right = (place[:, None] - place[None, :] for place in (y, x))
    if sign == "key_minus_query":
        down, right = -down, -right
    return down + wh - 1, right + ww - 1
