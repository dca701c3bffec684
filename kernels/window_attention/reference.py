"""Window attention in plain torch: the definition of the correct result.

Letters: B images, H, W map, N heads, D head dim, G windows, T tokens of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.window_attention.common import entries
from zoo.kernels.windows import partition, unpartition


def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    window_size: tuple[int, int],
    layout: str,
    bias_table: Tensor | None,
    bias_sign: str,
    scale: float,
    key_mask: Tensor | None,
    regions: Tensor | None,
    line_decay: Tensor | None,
    q: Tensor | None,
) -> Tensor:
    """See `op.window_attention`, which checks the arguments."""
    _, height, width, channels = checks.sizes(qkv)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    windows = partition(qkv.to(dtype), window_size, layout)  # (B, G, T, C)
    parts = 3 if q is None else 2
    parts = windows.unflatten(-1, (parts, num_heads, channels // (parts * num_heads)))
    *queries, key, value = parts.movedim((3, 4), (0, 3)).unbind(0)  # (B, G, N, T, D)
    if q is None:
        (query,) = queries
    else:
        query = q.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)[:, None]  # (B, 1, N, T, D)
    logits = scale * query @ key.transpose(-2, -1)  # (B, G, N, T, T)
    if bias_table is not None:
        logits = logits + expand_bias(bias_table.to(dtype), window_size, bias_sign)
    if line_decay is not None:
        sums = partition(line_decay.to(dtype), window_size, layout).transpose(2, 3)  # (B, G, N, T)
        logits = logits - (sums[..., :, None] - sums[..., None, :]).abs()
    taken = logits.new_ones((), dtype=torch.bool)
    if key_mask is not None:
        taken = partition(key_mask[..., None], window_size, layout)[..., 0][:, :, None, None]  # (B, G, 1, 1, T)
    if regions is not None:
        labels = partition(regions[..., None], window_size, layout)[:, :, None]  # (B or 1, G, 1, T, 1)
        taken = taken & (labels == labels.mT)  # (B, G, 1, T, T)
    if key_mask is not None or regions is not None:
        logits = logits.masked_fill(~taken, -torch.inf)
    weights = logits.softmax(-1)
    if key_mask is not None:
        weights = torch.where(taken.any(-1, keepdim=True), weights, 0)
    out = (weights @ value).transpose(2, 3).flatten(-2)  # (B, G, T, N D)
    return unpartition(out, window_size, (height, width), layout).to(qkv.dtype)


def expand_bias(table: Tensor, window_size: tuple[int, int], sign: str) -> Tensor:
    """(N, 2 wh - 1, 2 ww - 1) -> (N, T, T), the bias for each query (row) and key (column)."""
    rows, columns = entries(*window_size, sign, table.device)
    return table[:, rows, columns]
