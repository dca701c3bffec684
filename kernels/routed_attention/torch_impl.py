"""Routed attention in PyTorch, fast on CPUs: it gathers the keys and values of the routes, or masks all others.

Letters: B images, S regions along a side, R = S * S, T tokens of a region, N heads, D head dim, K regions routed to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.attention import attend, fused
from zoo.kernels.gather import take

# Gathering takes as long as attending to this many times more keys.
GATHERING = 4


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, num_heads: int, regions: int, scale: float
) -> Tensor:
    """See `op.routed_attention`, which checks the arguments."""
    batch, (_, height, width, channels) = q.shape[0], checks.sizes(q)
    head_dim, count = channels // num_heads, regions * regions
    fuse = fused(q, k, v)
    query, key, value = (_cut(x, regions, num_heads, fuse) for x in (q, k, v))  # (B, R, N, T, D)
    topk, tokens, keys = checks.sizes(routes)[2], checks.sizes(query)[3], checks.sizes(key)[3]
    # For a large map with few channels, the bias would be larger than the gathered keys and values.
    if checks.certain(count <= GATHERING * topk) and checks.certain(count * tokens <= 2 * topk * channels):
        bias = _bias_of_routes(routes, tokens, keys, query.dtype)
        query, key, value = (x.transpose(1, 2).flatten(2, 3) for x in (query, key, value))  # (B, N, R T, D)
    else:
        bias = None
        image, head = (torch.arange(n, device=q.device) for n in (batch, num_heads))
        rows = (image[:, None, None] * count + routes)[:, :, None] * num_heads + head[:, None]  # (B, R, N, K)
        key, value = (
            take(x.reshape(batch * count * num_heads, keys * head_dim), 0, rows.flatten()).reshape(
                batch * count, num_heads, topk * keys, head_dim
            )
            for x in (key, value)
        )  # (B R, N, K T, D)
        query = query.flatten(0, 1)
    out = attend(query, key, value, bias, scale, fuse=fuse).to(q.dtype)  # (B R, T, N, D) or (B, R T, N, D)
    out = out.reshape(batch, regions, regions, height // regions, width // regions, channels)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def _bias_of_routes(routes: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, R queries, R keys), a bias with which each token attends to the routes of its region only.

    It is the logarithm of how often a region is listed.
    """
    batch, count = routes.shape[0], checks.sizes(routes)[1]
    named = torch.zeros(batch, count, count, dtype=torch.promote_types(dtype, torch.float32), device=routes.device)
    named = named.scatter_add(2, routes, torch.ones_like(routes, dtype=named.dtype))
    bias = named.log()[:, None, :, None, :, None].expand(-1, 1, -1, queries, -1, keys)
    return bias.reshape(batch, 1, count * queries, count * keys)


def _cut(x: Tensor, regions: int, num_heads: int, fuse: bool) -> Tensor:
    """(B, H, W, N D) -> (B, R, N, T, D), in float32 or float64 if attention is not fused."""
    if not fuse:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    # A single reshape would specialize an exported program on the sizes that it was traced with.
    x = x.unflatten(3, (num_heads, -1)).unflatten(2, (regions, -1)).unflatten(1, (regions, -1))
    x = x.permute(0, 1, 3, 5, 2, 4, 6)  # (B, S, S, N, rows, columns, D)
    return x.flatten(4, 5).flatten(1, 2)
