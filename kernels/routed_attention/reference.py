"""Routed attention in plain torch: the definition of the correct result.

It takes the memory of topk copies of the keys and values.

Letters: B images, R regions, T tokens of a region, N heads, D head dim, K regions routed to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.windows import partition, unpartition


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, num_heads: int, regions: int, scale: float
) -> Tensor:
    """See `op.routed_attention`, which checks the arguments."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (
        partition(x.to(dtype), region_size(x, regions), "block").unflatten(-1, (num_heads, -1)) for x in (q, k, v)
    )  # (B, R, T, N, D)
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    key, value = (x[image, routes].flatten(2, 3) for x in (key, value))  # (B, R, K T, N, D)
    weights = (scale * torch.einsum("brind,brjnd->brnij", query, key)).softmax(-1)
    out = torch.einsum("brnij,brjnd->brind", weights, value).flatten(-2)
    _, height, width, _ = checks.sizes(q)
    return unpartition(out, region_size(q, regions), (height, width), "block").to(q.dtype)


def region_size(x: Tensor, regions: int) -> tuple[int, int]:
    """Rows and columns of a region, for a map (B, H, W, C) with regions x regions of them."""
    _, height, width, _ = checks.sizes(x)
    return height // regions, width // regions
