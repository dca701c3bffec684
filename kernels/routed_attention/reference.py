"""Routed attention in plain torch: what is right, in the memory of topk copies of the keys and values.

Letters: B images, R regions, T tokens of a region, N heads, D head dim, K regions routed to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, num_heads: int, regions: int, scale: float
) -> Tensor:
    """See `op.routed_attention`, which has checked everything."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (to_regions(x.to(dtype), regions).unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    key, value = (x[image, routes].flatten(2, 3) for x in (key, value))  # (B, R, K T, N, D)
    weights = (scale * torch.einsum("brind,brjnd->brnij", query, key)).softmax(-1)
    out = torch.einsum("brnij,brjnd->brind", weights, value).flatten(-2)
    return from_regions(out, regions, tuple(q.shape[1:3])).to(q.dtype)


def to_regions(x: Tensor, regions: int) -> Tensor:
    """(B, H, W, C) -> (B, R, T, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, regions, height // regions, regions, width // regions, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, regions**2, -1, channels)


def from_regions(x: Tensor, regions: int, size: tuple[int, int]) -> Tensor:
    """(B, R, T, C) -> (B, H, W, C)."""
    height, width = size
    x = x.reshape(x.shape[0], regions, regions, height // regions, width // regions, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)
