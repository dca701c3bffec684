"""Maps cut into windows, and put together again."""

from __future__ import annotations

from torch import Tensor


def partition(x: Tensor, window_size: tuple[int, int], layout: str) -> Tensor:
    """(B, H, W, C) -> (B, windows, tokens, C)."""
    (wh, ww), (height, width) = window_size, x.shape[1:3]
    if layout == "block":
        x = x.reshape(x.shape[0], height // wh, wh, width // ww, ww, -1).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.reshape(x.shape[0], wh, height // wh, ww, width // ww, -1).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3, 4).flatten(1, 2)


def unpartition(x: Tensor, window_size: tuple[int, int], size: tuple[int, int], layout: str) -> Tensor:
    """(B, windows, tokens, C) -> (B, H, W, C)."""
    (wh, ww), (height, width) = window_size, size
    x = x.reshape(x.shape[0], height // wh, width // ww, wh, ww, -1)
    x = x.permute(0, 1, 3, 2, 4, 5) if layout == "block" else x.permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], height, width, -1)
