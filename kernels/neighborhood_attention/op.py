"""Neighborhood attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.neighborhood_attention import reference, torch_impl
from zoo.kernels.window_attention import op as window_op
from zoo.kernels.windows import neighborhood_layout


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
    key_mask: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention of each token to the kh x kw tokens around it.

    out_i = sum_j softmax_j(scale * q_i . k_j + bias[offset(i, j)]) v_j over the neighbours j of i, which are the
    product of its neighbours along rows and columns. On an axis of length L, with kernel k, dilation d and stride s,
    position i is place p = i // d of the group of positions with its remainder g = i mod d; the group has
    n = ceil((L - g) / d) places. Then

        leader = min((p // s) * s + s // 2, n - 1)
        start  = min(max(leader - k // 2, 0), n - k)

    and the neighbours are the k places that begin at start, at positions place * d + g. The window is centred where
    possible and shifted inward at the border, so that every token has k neighbours; with an even k, one more precedes
    the leader than follows it. With s > 1, s consecutive tokens share the window of the middle one (Generalized NA);
    s = k is window attention. With causal attention, the leader is the last of the s tokens,
    min((p // s) * s + s - 1, n - 1), and the neighbours are the places in (leader - k, p], fewer than k at the start.

    Args:
        qkv: (B, H, W, 3 * N * D), query, key and value as a Linear writes them, each with its heads in order.
        num_heads: N.
        kernel_size: k, or (kh, kw).
        dilation: d, or a pair for rows and columns; kernel_size * dilation must not exceed the sides of the map.
        stride: s, or a pair for rows and columns; at most kernel_size.
        is_causal: Whether tokens attend only to places up to their own; one bool, or a pair for rows and columns.
        bias_table: (N, 2 * kh - 1, 2 * kw - 1), added to the logits. Entry (r + kh - 1, c + kw - 1) is for a key whose
            place is r rows and c columns after the query's: key minus query. It has the dtype of `qkv`; float32 is
            allowed with half precision.
        scale: Factor of the logits; D ** -0.5 if None.
        key_mask: (B, H, W) bool, True for tokens that may be attended to. It hides neighbours and does not replace
            them. A query whose neighbours are all hidden gives zeros.

    Returns:
        (B, H, W, N * D), in the dtype of `qkv`. Logits and softmax are float32 for half precision. Under autocast,
        `qkv` is converted to its dtype.

    Raises:
        TypeError: an integer tensor, dtypes that differ, or an option of the wrong type.
        ValueError: a shape or an option other than those above, or devices that differ.

    Source: NAT, arXiv 2204.07143, section 3.1; DiNAT, arXiv 2209.15001, section 3; Generalized NA, arXiv 2504.16922,
    section 3.
    """
    kernel, dilations = checks.pair(kernel_size, "kernel_size"), checks.pair(dilation, "dilation")
    strides = checks.pair(stride, "stride")
    causal = checks.flags(is_causal, "is_causal")
    checks.tensors({"qkv": qkv}, bias_table=bias_table, key_mask=key_mask)
    (qkv,) = dispatch.autocast(qkv)
    checks.floating(qkv=qkv, bias_table=bias_table)
    checks.shape(qkv, "qkv", (None,) * 4, "(B, H, W, channels)")
    batch, height, width, channels = checks.sizes(qkv)
    size = height, width
    head_dim = checks.split_heads(channels, 3, num_heads, "qkv")
    checks.map_size(height, width, "qkv")
    for name, length, k, d, s in zip(("rows", "columns"), size, kernel, dilations, strides, strict=True):
        if checks.certain(k * d > length):
            raise ValueError(
                f"Got kernel_size {k} with dilation {d} for a map of {length} {name}; their product {k * d} may not "
                "exceed it: pad the map, or lower one of them."
            )
        if checks.certain(s > k):
            raise ValueError(
                f"Got stride {s} with kernel_size {k} along {name}; it may not exceed the kernel: lower it."
            )
    if bias_table is not None:
        sizes = (num_heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        checks.shape(bias_table, "bias_table", sizes, "(N, 2 kh - 1, 2 kw - 1)")
    if key_mask is not None:
        checks.mask(key_mask, "key_mask", (batch, height, width), "(B, H, W)")
    scale = checks.attention_scale(scale, head_dim)
    implementation = dispatch.choose("neighborhood_attention", qkv, head_dim)
    with dispatch.as_given(qkv):
        if implementation == "triton":
            layout = neighborhood_layout(size, kernel, dilations, strides, causal)
            if layout is not None:
                return window_op.forward(
                    qkv,
                    None,
                    bias_table,
                    key_mask,
                    None,  # regions
                    None,  # line_decay
                    num_heads=num_heads,
                    wh=kernel[0],
                    ww=kernel[1],
                    grid=layout == "grid",
                    key_minus_query=True,
                    scale=scale,
                )[0]
            return forward(
                qkv,
                bias_table,
                key_mask,
                num_heads=num_heads,
                kernel_size=kernel,
                dilation=dilations,
                stride=strides,
                is_causal=causal,
                scale=scale,
            )[0]
        tiled = implementation == "torch" and torch_impl.can_run(size, kernel, dilations, strides, causal)
        compute = torch_impl if tiled else reference
        return compute.neighborhood_attention(
            qkv,
            num_heads=num_heads,
            kernel_size=kernel,
            dilation=dilations,
            stride=strides,
            is_causal=causal,
            bias_table=bias_table,
            scale=scale,
            key_mask=key_mask,
        )


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::na2d")
def forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, N D), and log2 of each query's sum of exponentials, (B, N, H, W) float32."""
    from zoo.kernels.neighborhood_attention import triton_impl

    return triton_impl.forward(
        qkv,
        bias_table,
        key_mask,
        num_heads=num_heads,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        scale=scale,
    )


@dispatch.triton_op("zoo::na2d_bwd")
def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and bias_table; the latter is empty if the table is None or its gradient is not needed."""
    from zoo.kernels.neighborhood_attention import triton_impl

    return triton_impl.backward(
        grad,
        qkv,
        bias_table,
        key_mask,
        out,
        lse,
        num_heads=num_heads,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        scale=scale,
        bias_grad=bias_grad,
    )


_OPTIONS = ("num_heads", "kernel_size", "dilation", "stride", "is_causal", "scale")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = dict(zip(_OPTIONS, inputs[3:], strict=True))


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias_table, key_mask, out, lse = ctx.saved_tensors
    options = ctx.options
    if dispatch.again_differentiable(qkv, bias_table, grad):
        pairs = {name: tuple(options[name]) for name in ("kernel_size", "dilation", "stride", "is_causal")}

        def composite(qkv: Tensor, bias_table: Tensor | None) -> Tensor:
            return torch_impl.neighborhood_attention(qkv, **options | pairs, bias_table=bias_table, key_mask=key_mask)

        grads = dispatch.composite_gradients(composite, (qkv, bias_table), grad)
    else:
        wants_bias = bias_table is not None and ctx.needs_input_grad[1]
        qkv_grad, bias_grad = backward(grad, qkv, bias_table, key_mask, out, lse, **options, bias_grad=wants_bias)
        grads = qkv_grad, bias_grad if wants_bias else None
    key_mask_grad = None
    return *grads, key_mask_grad, *(None,) * len(options)


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
