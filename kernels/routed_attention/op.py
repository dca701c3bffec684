"""The specification of routed attention, and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.routed_attention import reference


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    num_heads: int,
    regions: int,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of the tokens of each region to all tokens of the regions that it is routed to.

    Maps are cut into S x S equal regions, numbered row by row. For each region r and head,
    out_i = sum_j softmax_j(scale * q_i . k_j) v_j for the tokens i of r, over the tokens j of regions
    routes[b, r, 0], ..., routes[b, r, topk - 1]. A region that is named twice counts twice. Gradients flow to q, k and
    v, not through the choice of routes.

    Args:
        q: (B, H, W, N * D).
        k: (B, H', W', N * D); H' and W' may differ from H and W, where keys and values are pooled.
        v: Like `k`.
        routes: (B, S * S, topk) int64, numbers of regions, from 0 to S * S - 1.
        num_heads: N.
        regions: S; divides H, W, H' and W'.
        scale: Of the logits; D ** -0.5 if None.

    Returns:
        (B, H, W, N * D), in the type of `q`. Half-precision input is computed in float32.

    Raises:
        TypeError: an integer tensor where floats belong, types that differ, or routes that are not int64.
        ValueError: a shape or an option is not as above. The numbers in `routes` are not looked at.

    Source: BiFormer, arXiv 2303.08810, section 3.2.
    """
    checks.floating(q=q, k=k, v=v)
    checks.shape(q, "q", (None,) * 4, "(B, H, W, channels)")
    batch, height, width, channels = q.shape
    head_dim = checks.split_heads(channels, 1, num_heads, "q")
    checks.shape(k, "k", (batch, None, None, channels), "(B, H', W', channels of q)")
    checks.shape(v, "v", tuple(k.shape), "the shape of k")
    if regions < 1:
        raise ValueError(f"Got {regions=}; it has to be 1 or more.")
    for name, (rows, columns) in (("q", (height, width)), ("k and v", tuple(k.shape[1:3]))):
        if rows % regions or columns % regions or not rows or not columns:
            raise ValueError(
                f"Got {name} of {rows} x {columns} tokens for {regions} x {regions} regions; "
                f"both sides have to be multiples of {regions}: pad the map."
            )
    checks.shape(routes, "routes", (batch, regions**2, None), "(B, S * S, topk)")
    if routes.dtype != torch.int64:
        raise TypeError(f"Got routes of {routes.dtype}; they have to be int64, as torch.topk gives them.")
    if routes.shape[2] == 0:
        raise ValueError("Got routes to no region; each region needs one or more.")
    scale = checks.attention_scale(scale, head_dim)
    return reference.routed_attention(q, k, v, routes, num_heads=num_heads, regions=regions, scale=scale)
