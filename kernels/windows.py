"""Windows of a map: partition, its inverse, and the neighborhoods that are windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels import checks


def partition(x: Tensor, window_size: tuple[int, int], layout: str) -> Tensor:
    """(B, H, W, C) -> (B, windows, tokens, C)."""
    (wh, ww), (_, height, width, channels) = window_size, checks.sizes(x)
    if layout == "block":
        x = x.reshape(x.shape[0], height // wh, wh, width // ww, ww, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.reshape(x.shape[0], wh, height // wh, ww, width // ww, channels).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3, 4).flatten(1, 2)


def unpartition(x: Tensor, window_size: tuple[int, int], size: tuple[int, int], layout: str) -> Tensor:
    """(B, windows, tokens, C) -> (B, H, W, C)."""
    (wh, ww), (height, width), channels = window_size, size, checks.sizes(x)[-1]
    x = x.reshape(x.shape[0], height // wh, width // ww, wh, ww, channels)
    x = x.permute(0, 1, 3, 2, 4, 5) if layout == "block" else x.permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0], height, width, channels)


def cut(x: Tensor, window_size: tuple[int, int], layout: str) -> Tensor:
    """(B, H, W, C) -> (B * windows, tokens, C), for the symbolic sizes of torch.export too."""
    if not _open(*checks.sizes(x)):
        return partition(x, window_size, layout).flatten(0, 1)
    (wh, ww), (batch, height, width, channels) = window_size, x.shape
    rows, columns = height // wh, width // ww
    # A reshape would specialize the program on the sizes that it was traced with, so tokens are indexed instead. The
    # remainders are differences: ONNX has a remainder by constants only.
    window = torch.arange(batch * rows * columns, device=x.device)[:, None]
    token = torch.arange(wh * ww, device=x.device)
    above, ty = window // columns, token // ww
    image, wx, tx = above // rows, window - above * columns, token - ty * ww
    wy = above - image * rows
    y, column = (wy * wh + ty, wx * ww + tx) if layout == "block" else (ty * rows + wy, tx * columns + wx)
    number = (image * height + y) * width + column
    return x.reshape(-1, channels).index_select(0, number.flatten()).unflatten(0, number.shape)


def join(x: Tensor, window_size: tuple[int, int], size: tuple[int, int, int], layout: str) -> Tensor:
    """The inverse of `cut`: (B * windows, tokens, C) -> (B, H, W, C), with `size` B, H, W."""
    (wh, ww), (batch, height, width) = window_size, size
    rows, columns = height // wh, width // ww
    if not _open(*checks.sizes(x), height, width):
        return unpartition(x.unflatten(0, (batch, rows * columns)), window_size, (height, width), layout)
    image, y, column = (torch.arange(n, device=x.device) for n in size)
    image, y = image[:, None, None], y[:, None]
    if layout == "block":
        wy, wx = y // wh, column // ww
        ty, tx = y - wy * wh, column - wx * ww
    else:
        ty, tx = y // rows, column // columns
        wy, wx = y - ty * rows, column - tx * columns
    number = ((image * rows + wy) * columns + wx) * (wh * ww) + ty * ww + tx
    return x.flatten(0, 1).index_select(0, number.flatten()).unflatten(0, number.shape)


def neighborhood_layout(
    size: Sequence[int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
) -> str | None:
    """The layout in which neighborhood attention equals window attention; None if there is none.

    The window then has the size of the kernel, and the bias sign is key minus query. For symbolic sizes, the layout has
    to be right for all of their values.
    """
    if any(is_causal):
        return None
    axes = list(zip(size, kernel_size, dilation, stride, strict=True))
    # A dilation group of the size of the kernel has a single window, with any stride.
    if all(checks.certain(length == k * d) for length, k, d, _ in axes):
        return "grid"
    # Windows that do not overlap are adjacent blocks if the last one does not have to move inward.
    if all(
        d == 1 and (checks.certain(length == k) or (s == k and checks.certain(length % k == 0)))
        for length, k, d, s in axes
    ):
        return "block"
    return None


def _open(*sizes: int) -> bool:
    return not all(isinstance(size, int) for size in sizes)
