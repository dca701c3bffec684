"""The specification of neighborhood attention, and its checks."""

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
            rows and c columns of places after the query: key minus query. Of the type of `qkv`; float32 beside half
            precision.
        scale: Of the logits; D ** -0.5 if None.
        key_mask: (B, H, W) bool, True for tokens that may be attended to. The neighbours are the same with it, without
            those that it hides. A query with no such token among its neighbours gives zeros.

    Returns:
        (B, H, W, N * D), in the type of `qkv`. Logits and softmax of half precision are float32. Under autocast, `qkv`
        is taken in its type.

    Raises:
        TypeError: an integer tensor, or types that differ; an option of another type.
        ValueError: a shape or an option is not as above, or devices differ.

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
    batch, *size, channels = checks.sizes(qkv)
    head_dim = checks.split_heads(channels, 3, num_heads, "qkv")
    checks.map_size(size[0], size[1], "qkv")
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
        checks.mask(key_mask, "key_mask", (batch, *size), "(B, H, W)")
    scale = checks.attention_scale(scale, head_dim)
    implementation = dispatch.choose("neighborhood_attention", qkv, head_dim)
    with dispatch.as_given(qkv):
        if implementation == "triton":
            layout = neighborhood_layout(size, kernel, dilations, strides, causal)
            if layout is not None:
                grid = layout == "grid"
                return window_op.forward(qkv, None, bias_table, key_mask, num_heads, *kernel, grid, True, scale)[0]
            return forward(qkv, bias_table, key_mask, num_heads, kernel, dilations, strides, causal, scale)[0]
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


# The rest is what torch knows of the Triton implementation; without Triton there is nothing to know.
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
    """The output (B, H, W, N D), and each query's log2 of its sum of exponentials, (B, N, H, W) float32."""
    from zoo.kernels.neighborhood_attention import triton_impl

    return triton_impl.forward(qkv, bias_table, key_mask, num_heads, kernel_size, dilation, stride, is_causal, scale)


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
    """Gradients of qkv and bias_table, the latter empty if it is None or not wanted."""
    from zoo.kernels.neighborhood_attention import triton_impl

    return triton_impl.backward(
        grad, qkv, bias_table, key_mask, out, lse, num_heads, kernel_size, dilation, stride, is_causal, scale, bias_grad
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias_table, key_mask, out, lse = ctx.saved_tensors
    if dispatch.again_differentiable(qkv, bias_table, grad):
        num_heads, kernel_size, dilation, stride, is_causal, scale = ctx.options

        def composite(qkv: Tensor, bias_table: Tensor | None) -> Tensor:
            return torch_impl.neighborhood_attention(
                qkv,
                num_heads=num_heads,
                kernel_size=tuple(kernel_size),
                dilation=tuple(dilation),
                stride=tuple(stride),
                is_causal=tuple(is_causal),
                bias_table=bias_table,
                scale=scale,
                key_mask=key_mask,
            )

        grads = dispatch.composite_gradients(composite, (qkv, bias_table), grad)
    else:
        wants_bias = bias_table is not None and ctx.needs_input_grad[1]
        qkv_grad, bias_grad = backward(grad, qkv, bias_table, key_mask, out, lse, *ctx.options, wants_bias)
        grads = qkv_grad, bias_grad if wants_bias else None
    return *grads, *(None,) * 7


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
