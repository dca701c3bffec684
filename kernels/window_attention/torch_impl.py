"""Window attention in PyTorch, fast on CPUs: windows are copied once, then go through fused attention.

Letters: B images, H, W map, N heads, D head dim, G windows, T tokens of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.attention import attend, fused
from zoo.kernels.constants import constant
from zoo.kernels.gather import take
from zoo.kernels.window_attention.common import entries
from zoo.kernels.windows import cut, join

MAX_BIAS = 64 * 2**20  # bytes


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
    batch, (_, height, width, channels) = qkv.shape[0], checks.sizes(qkv)
    fuse = fused(qkv, bias_table, line_decay, q)
    windows = cut(qkv, window_size, layout)  # (B G, T, C)
    if not fuse:
        # Converted once here instead of three times at the products.
        windows = windows.to(torch.promote_types(qkv.dtype, torch.float32))
    parts = 3 if q is None else 2
    head_dim = channels // (parts * num_heads)
    windows = windows.unflatten(-1, (parts, num_heads, head_dim))
    *queries, key, value = windows.permute(2, 0, 3, 1, 4).unbind(0)  # (B G, N, T, D)
    if q is None:
        (query,) = queries
    else:
        (wh, ww), query = window_size, q.to(windows.dtype).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
        per_image = (height // wh) * (width // ww)
        if isinstance(per_image, int):
            query = query[:, None].expand(-1, per_image, -1, -1, -1).flatten(0, 1)
        else:
            query = take(query, 0, torch.arange(windows.shape[0], device=qkv.device) // per_image)

    plain = key_mask is None and regions is None and line_decay is None
    if fuse and bias_table is not None and plain and _is_large(num_heads, window_size, bias_table):
        out = _attend_by_rows(query, key, value, bias_table, window_size, bias_sign, scale)
        return join(out.flatten(2), window_size, (batch, height, width), layout)
    bias = None if bias_table is None else expand_bias(bias_table, window_size, bias_sign)[None]
    taken = any_key = None
    if regions is not None:
        labels = cut(regions.expand(batch, -1, -1)[..., None], window_size, layout)  # (B G, T, 1)
        taken = (labels == labels.mT)[:, None]  # (B G, 1, T, T)
    if key_mask is not None:
        keys = cut(key_mask[..., None], window_size, layout)[:, None, None, :, 0]  # (B G, 1, 1, T)
        taken = keys if taken is None else taken & keys
        any_key = taken.any(-1, keepdim=True)
    if taken is not None:
        # Queries without a key are not masked until the end: if all their logits were -inf, the result would be NaN.
        shown = taken if any_key is None else taken | ~any_key
        hidden = torch.where(shown, 0.0, -torch.inf).to(query.dtype if bias is None else bias.dtype)
        bias = hidden if bias is None else hidden + bias
    if line_decay is not None:
        sums = cut(line_decay.to(torch.promote_types(qkv.dtype, torch.float32)), window_size, layout).mT  # (B G, N, T)
        decay = -(sums[..., :, None] - sums[..., None, :]).abs()
        bias = decay if bias is None else decay + bias
    out = attend(query, key, value, bias, scale, fuse=fuse)  # (B G, T, N, D)
    if any_key is not None:
        out = torch.where(any_key.transpose(1, 2), out, 0)
    return join(out.to(qkv.dtype).flatten(2), window_size, (batch, height, width), layout)


def _is_large(num_heads: int, window_size: tuple[int, int], table: Tensor) -> bool:
    """Whether the bias of all pairs of tokens exceeds MAX_BIAS; False for the symbolic sizes of torch.export."""
    wh, ww = window_size
    if not (isinstance(wh, int) and isinstance(ww, int)):
        return False
    return num_heads * (wh * ww) ** 2 * table.element_size() > MAX_BIAS


def _attend_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    window_size: tuple[int, int],
    sign: str,
    scale: float,
) -> Tensor:
    """Attention (B G, T, N, D) of few rows of queries at a time, so that the bias of all pairs never exists at once."""
    (wh, ww), num_heads = window_size, query.shape[1]
    if sign == "query_minus_key":
        table = table.flip(1, 2)
    # Entry (n, a, b, y, x) is that of key (y, x) for the query in row wh - 1 - a and column ww - 1 - b. This is a view.
    shifted = table.unfold(1, wh, 1).unfold(2, ww, 1)
    step = max(1, MAX_BIAS // (num_heads * ww * wh * ww * table.element_size()))
    parts = []
    for first in range(0, wh, step):
        last = min(first + step, wh)
        bias = shifted[:, wh - last : wh - first].flip(1, 2).reshape(1, num_heads, (last - first) * ww, wh * ww)
        parts.append(attend(query[:, :, first * ww : last * ww], key, value, bias, scale, fuse=True))
    return torch.cat(parts, 1)


def expand_bias(table: Tensor, window_size: tuple[int, int], sign: str) -> Tensor:
    """(N, 2 wh - 1, 2 ww - 1) -> (N, T, T), the bias for each query (row) and key (column)."""
    index = constant(_entries, *window_size, sign, like=table)
    tokens = window_size[0] * window_size[1]
    return take(table.flatten(1), 1, index).reshape(-1, tokens, tokens)


def _entries(wh: int, ww: int, sign: str, device: torch.device) -> Tensor:
    """(T T,), indices of a flattened table."""
    rows, columns = entries(wh, ww, sign, device)
    return (rows * (2 * ww - 1) + columns).flatten()
