"""Window attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.window_attention import reference, torch_impl

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    regions: Tensor | None = None,
    line_decay: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention within windows of wh x ww tokens.

    For each window and head, out_i = sum_j softmax_j(scale * q_i . k_j + bias[offset(i, j)]) v_j over the tokens j of
    the window. Token (ty, tx) of window (wy, wx) is at this position of the map:

        block:  (wy * wh + ty, wx * ww + tx)              adjacent tokens (Swin, MaxViT's blocks, HiLo)
        grid:   (ty * H / wh + wy, tx * W / ww + wx)      tokens spread evenly over the map (MaxViT's grids)

    A stripe (CSWin) is a block that is as wide or as high as the map.

    Args:
        qkv: (B, H, W, 3 * N * D), query, key and value as a Linear writes them, each with its heads in order; with `q`,
            (B, H, W, 2 * N * D), key and value. H is a multiple of wh and W is a multiple of ww: pad other maps.
        num_heads: N.
        window_size: (wh, ww), or one number for both.
        layout: Which tokens form a window.
        bias_table: (N, 2 * wh - 1, 2 * ww - 1), added to the logits. Entry (r + wh - 1, c + ww - 1) is for tokens that
            are r rows and c columns of the window apart. It has the dtype of `qkv`; float32 is allowed with half
            precision.
        bias_sign: Whether r and c are query minus key (Swin, GC ViT) or key minus query (NAT, MaxViT).
        scale: Factor of the logits; D ** -0.5 if None.
        key_mask: (B, H, W) bool, True for tokens that may be attended to. A query without such a token in its window
            gives zeros.
        regions: (B, H, W), or (1, H, W) for all images, labels: integers from -2 ** 30 to 2 ** 30 - 1. A token attends
            only to tokens of its window that have the same label (Swin's shifted windows), and only to those that
            `key_mask` allows.
        line_decay: (B, H, W, N), for windows of one row or one column: sums c of decays along the window, up to and
            with each token. `-abs(c_i - c_j)` is added to the logits of tokens i and j (PPMA), so each decay between
            two tokens lowers their weights. It has the dtype of `qkv`; float32 is allowed with half precision.
        q: (B, wh * ww, N * D), queries that all windows of an image share (GC ViT's global attention). With `regions`,
            each has the label of the token in its place.

    Returns:
        (B, H, W, N * D), in the dtype of `qkv`. Logits and softmax are float32 for half precision. Under autocast,
        `qkv` and `q` are converted to its dtype.

    Raises:
        TypeError: a tensor of a wrong dtype, dtypes that differ, or an option of the wrong type.
        ValueError: a shape or an option other than those above, or devices that differ.

    Source: Swin, arXiv 2103.14030, section 3.2; MaxViT, arXiv 2204.01697, section 3.2; GC ViT, arXiv 2206.09959,
    section 3.2; PPMA, arXiv 2506.15940.
    """
    wh, ww = checks.pair(window_size, "window_size")
    checks.tensors({"qkv": qkv}, bias_table=bias_table, key_mask=key_mask, regions=regions, line_decay=line_decay, q=q)
    qkv, q = dispatch.autocast(qkv, q)
    checks.floating(qkv=qkv, bias_table=bias_table, line_decay=line_decay, q=q)
    checks.shape(qkv, "qkv", (None,) * 4, "(B, H, W, channels)")
    batch, height, width, channels = checks.sizes(qkv)
    head_dim = checks.split_heads(channels, 3 if q is None else 2, num_heads, "qkv")
    checks.map_size(height, width, "qkv")
    if checks.certain(height % wh != 0) or checks.certain(width % ww != 0):
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
        checks.mask(key_mask, "key_mask", (batch, height, width), "(B, H, W)")
    if regions is not None:
        _check_regions(regions, batch, height, width)
    if line_decay is not None:
        checks.shape(line_decay, "line_decay", (batch, height, width, num_heads), "(B, H, W, N)")
        if checks.certain(wh != 1) and checks.certain(ww != 1):
            raise ValueError(
                f"Got line_decay for windows of {wh} x {ww}; it is for windows of one row or one column: use a "
                "bias_table, or such windows."
            )
    if q is not None:
        checks.shape(q, "q", (batch, wh * ww, num_heads * head_dim), "(B, wh ww, N D)")

    scale = checks.attention_scale(scale, head_dim)
    implementation = dispatch.choose("window_attention", qkv, head_dim)
    with dispatch.as_given(qkv):
        if implementation == "triton":
            return forward(
                qkv,
                q,
                bias_table,
                key_mask,
                regions,
                line_decay,
                num_heads=num_heads,
                wh=wh,
                ww=ww,
                grid=layout == "grid",
                key_minus_query=bias_sign == "key_minus_query",
                scale=scale,
            )[0]
        compute = reference.window_attention if implementation == "reference" else torch_impl.window_attention
        return compute(
            qkv,
            num_heads=num_heads,
            window_size=(wh, ww),
            layout=layout,
            bias_table=bias_table,
            bias_sign=bias_sign,
            scale=scale,
            key_mask=key_mask,
            regions=regions,
            line_decay=line_decay,
            q=q,
        )


def _check_regions(regions: Tensor, batch: int, height: int, width: int) -> None:
    one = regions.ndim == 3 and checks.certain(checks.sizes(regions)[0] == 1)
    checks.shape(regions, "regions", (1 if one else batch, height, width), "(B or 1, H, W)")
    if regions.dtype not in LABELS:
        raise TypeError(f"Got regions of {regions.dtype}; it has to be a signed integer or uint8, a label per token.")


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::window_attn")
def forward(
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    regions: Tensor | None,
    line_decay: Tensor | None,
    num_heads: int,
    wh: int,
    ww: int,
    grid: bool,
    key_minus_query: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, N D), and log2 of each query's sum of exponentials by windows, (B G, N, T) float32."""
    from zoo.kernels.window_attention import triton_impl

    return triton_impl.forward(
        qkv,
        q,
        bias_table,
        key_mask,
        regions,
        line_decay,
        num_heads=num_heads,
        wh=wh,
        ww=ww,
        grid=grid,
        key_minus_query=key_minus_query,
        scale=scale,
    )


@dispatch.triton_op("zoo::window_attn_bwd")
def backward(
    grad: Tensor,
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    regions: Tensor | None,
    line_decay: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    wh: int,
    ww: int,
    grid: bool,
    key_minus_query: bool,
    scale: float,
    bias_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, q, bias_table and line_decay; empty if the tensor is None or its gradient is not needed."""
    from zoo.kernels.window_attention import triton_impl

    return triton_impl.backward(
        grad,
        qkv,
        q,
        bias_table,
        key_mask,
        regions,
        line_decay,
        out,
        lse,
        num_heads=num_heads,
        wh=wh,
        ww=ww,
        grid=grid,
        key_minus_query=key_minus_query,
        scale=scale,
        bias_grad=bias_grad,
        decay_grad=decay_grad,
    )


_OPTIONS = ("num_heads", "wh", "ww", "grid", "key_minus_query", "scale")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = dict(zip(_OPTIONS, inputs[6:], strict=True))


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q, bias_table, key_mask, regions, line_decay, out, lse = ctx.saved_tensors
    options = ctx.options
    if dispatch.again_differentiable(qkv, q, bias_table, line_decay, grad):

        def composite(qkv: Tensor, q: Tensor | None, bias_table: Tensor | None, line_decay: Tensor | None) -> Tensor:
            return torch_impl.window_attention(
                qkv,
                num_heads=options["num_heads"],
                window_size=(options["wh"], options["ww"]),
                layout="grid" if options["grid"] else "block",
                bias_table=bias_table,
                bias_sign="key_minus_query" if options["key_minus_query"] else "query_minus_key",
                scale=options["scale"],
                key_mask=key_mask,
                regions=regions,
                line_decay=line_decay,
                q=q,
            )

        grads = dispatch.composite_gradients(composite, (qkv, q, bias_table, line_decay), grad)
    else:
        wanted = {
            "bias_grad": bias_table is not None and ctx.needs_input_grad[2],
            "decay_grad": line_decay is not None and ctx.needs_input_grad[5],
        }
        tensors = qkv, q, bias_table, key_mask, regions, line_decay, out, lse
        qkv_grad, q_grad, bias_grad, decay_grad = backward(grad, *tensors, **options, **wanted)
        grads = (
            qkv_grad,
            None if q is None else q_grad,
            bias_grad if wanted["bias_grad"] else None,
            decay_grad if wanted["decay_grad"] else None,
        )
    *first, decay_grad = grads
    key_mask_grad = regions_grad = None
    return *first, key_mask_grad, regions_grad, decay_grad, *(None,) * len(options)


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
