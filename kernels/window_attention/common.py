"""Definitions that implementations of window attention share."""

from __future__ import annotations

import torch
from torch import Tensor


def entries(wh: int, ww: int, sign: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column in the bias table of each query (row) and key (column), two tensors (T, T)."""
    # `repeat` of a symbolic size is wrong in ONNX.
    y = torch.arange(wh, device=device)[:, None].expand(wh, ww).flatten()
    x = torch.arange(ww, device=device)[None, :].expand(wh, ww).flatten()
    down, right = (place[:, None] - place[None, :] for place in (y, x))
    if sign == "key_minus_query":
        down, right = -down, -right
    return down + wh - 1, right + ww - 1
