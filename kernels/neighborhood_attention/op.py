"""The specification of neighborhood attention, and its checks."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.neighborhood_attention import reference


def neighborhood_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    bias_table: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention of each token to the kh x kw tokens around it.

    out_i = sum_j softmax_j(scale * q_i . k_j + bias[offset(i, j)]) v_j over the neighbours j of i, which are the
    product of its neighbours along rows and columns. On an axis of length L, with kernel k, dilation d and stride s,
    position i is place p = i // d of the group of positions with its remainder g = i mod d; the group has
    n = ceil((L - g) / d) places. Then

        leader = min((p // s) * s + s // 2, n - 1)
        start  = min(max(leader - k // 2, 0), n - k)

    and the neighbours are the k places from start on, positions place * d + g. So the window is centred where it can
    be and shifted inward at the border, where every token still has k neighbours; an even k has one more before the
    leader than after it. With s > 1 the tokens of a group of s share the window of its middle one (Generalized NA);
    s = k is window attention. With causal attention the leader is the last of the group of s,
    min((p // s) * s + s - 1, n - 1), and the neighbours are the places in (leader - k, p], fewer than k at the start.

    Args:
        qkv: (B, H, W, 3 * N * D), as a Linear writes query, key and value, each with its heads in order.
        num_heads: N.
        kernel_size: k, or (kh, kw).
        dilation: d, or one each for rows and columns; kernel_size * dilation may not exceed the map's sides.
        stride: s, likewise; at most kernel_size.
        is_causal: Whether tokens see only places up to their own, likewise.
        bias_table: (N, 2 * kh - 1, 2 * kw - 1), added to the logits; its entry (r + kh - 1, c + kw - 1) is for a key r
            rows and c columns of places after the query: key minus query.
        scale: Of the logits; D ** -0.5 if None.

    Returns:
        (B, H, W, N * D), in the type of `qkv`. Half-precision input is computed in float32.

    Raises:
        TypeError: an integer tensor, or types that differ.
        ValueError: a shape or an option is not as above.

    Source: NAT, arXiv 2204.07143, section 3.1; DiNAT, arXiv 2209.15001, section 3; Generalized NA, arXiv 2504.16922,
    section 3.
    """
    kernel, dilations = checks.pair(kernel_size, "kernel_size"), checks.pair(dilation, "dilation")
    strides = checks.pair(stride, "stride")
    causal = (is_causal, is_causal) if isinstance(is_causal, bool) else tuple(is_causal)
    checks.floating(qkv=qkv, bias_table=bias_table)
    checks.shape(qkv, "qkv", (None,) * 4, "(B, H, W, channels)")
    head_dim = checks.split_heads(qkv.shape[-1], 3, num_heads, "qkv")
    for name, length, k, d, s in zip(("rows", "columns"), qkv.shape[1:3], kernel, dilations, strides, strict=True):
        if k * d > length:
            raise ValueError(
                f"Got kernel_size {k} with dilation {d} for a map of {length} {name}; their product {k * d} may not "
                "exceed it: pad the map, or lower one of them."
            )
        if s > k:
            raise ValueError(
                f"Got stride {s} with kernel_size {k} along {name}; it may not exceed the kernel: lower it."
            )
    if bias_table is not None:
        sizes = (num_heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        checks.shape(bias_table, "bias_table", sizes, "(N, 2 kh - 1, 2 kw - 1)")
    return reference.neighborhood_attention(
        qkv,
        num_heads=num_heads,
        kernel_size=kernel,
        dilation=dilations,
        stride=strides,
        is_causal=causal,
        bias_table=bias_table,
        scale=checks.attention_scale(scale, head_dim),
    )
