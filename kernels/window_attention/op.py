"""The specification of window attention, and its checks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.window_attention import reference


def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    layout: Literal["block", "grid"] = "block",
    bias_table: Tensor | None = None,
    bias_sign: Literal["query_minus_key", "key_minus_query"] = "query_minus_key",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention within windows of wh x ww tokens.

    For each window and head, out_i = sum_j softmax_j(scale * q_i . k_j + bias[offset(i, j)]) v_j over the window's
    tokens j. Token (ty, tx) of window (wy, wx) stands on the map at

        block:  (wy * wh + ty, wx * ww + tx)              neighbouring tokens (Swin, MaxViT block, stripes, HiLo)
        grid:   (ty * H / wh + wy, tx * W / ww + wx)      tokens spread evenly over the map (MaxViT grid)

    A stripe of CSWin is a block as wide or as high as the map.

    Args:
        qkv: (B, H, W, 3 * N * D), as a Linear writes query, key and value, each with its heads in order; with `q`,
            (B, H, W, 2 * N * D), key and value. H is a multiple of wh and W of ww: pad the map where it is not.
        num_heads: N.
        window_size: (wh, ww), or one number for both.
        layout: Which tokens make a window.
        bias_table: (N, 2 * wh - 1, 2 * ww - 1), added to the logits; its entry (r + wh - 1, c + ww - 1) is for tokens
            that are r rows and c columns of the window apart.
        bias_sign: Whether r and c are counted as query minus key (Swin, MaxViT, GC ViT) or key minus query (NAT).
        scale: Of the logits; D ** -0.5 if None.
        key_mask: (B, H, W) bool, True for tokens that may be attended to. A query with no such token in its window
            gives zeros.
        q: (B, wh * ww, N * D), queries that all windows of an image share (GC ViT's global attention).

    Returns:
        (B, H, W, N * D), in the type of `qkv`. Half-precision input is computed in float32.

    Raises:
        TypeError: an integer tensor, or types that differ.
        ValueError: a shape or an option is not as above.

    Source: Swin, arXiv 2103.14030, section 3.2; MaxViT, arXiv 2204.01697, section 3.2; GC ViT, arXiv 2206.09959,
    section 3.2.
    """
    wh, ww = checks.pair(window_size, "window_size")
    checks.floating(qkv=qkv, bias_table=bias_table, q=q)
    checks.shape(qkv, "qkv", (None,) * 4, "(B, H, W, channels)")
    batch, height, width, channels = qkv.shape
    head_dim = checks.split_heads(channels, 3 if q is None else 2, num_heads, "qkv")
    if height % wh or width % ww or not height or not width:
        raise ValueError(
            f"Got a map of {height} x {width} for windows of {wh} x {ww}; its sides have to be multiples of the "
            "window's: pad the map, and mask the padding with key_mask."
        )
    if layout not in ("block", "grid"):
        raise ValueError(f"Got {layout=}; it has to be 'block' or 'grid'.")
    if bias_sign not in ("query_minus_key", "key_minus_query"):
        raise ValueError(f"Got {bias_sign=}; it has to be 'query_minus_key' or 'key_minus_query'.")
    if bias_table is not None:
        checks.shape(bias_table, "bias_table", (num_heads, 2 * wh - 1, 2 * ww - 1), "(N, 2 wh - 1, 2 ww - 1)")
    if key_mask is not None:
        checks.shape(key_mask, "key_mask", (batch, height, width), "(B, H, W)")
        if key_mask.dtype != torch.bool:
            raise TypeError(f"Got key_mask of {key_mask.dtype}; it has to be bool, True for tokens that take part.")
    if q is not None:
        checks.shape(q, "q", (batch, wh * ww, num_heads * head_dim), "(B, wh ww, N D)")
    return reference.window_attention(
        qkv,
        num_heads=num_heads,
        window_size=(wh, ww),
        layout=layout,
        bias_table=bias_table,
        bias_sign=bias_sign,
        scale=checks.attention_scale(scale, head_dim),
        key_mask=key_mask,
        q=q,
    )
