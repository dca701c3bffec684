"""Routed attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import checks, constants, dispatch
from zoo.kernels.routed_attention import reference, torch_impl


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

    Maps are divided into S x S equal regions, numbered row by row. For each region r and head,
    out_i = sum_j softmax_j(scale * q_i . k_j) v_j for the tokens i of r, over the tokens j of regions
    routes[b, r, 0], ..., routes[b, r, topk - 1]. A region that is listed twice counts twice. Gradients flow to q, k and
    v, not through the choice of routes.

    Args:
        q: (B, H, W, N * D).
        k: (B, H', W', N * D); H' and W' may differ from H and W, if keys and values are pooled.
        v: As `k`.
        routes: (B, S * S, topk) int64, numbers of regions, from 0 to S * S - 1.
        num_heads: N.
        regions: S; divides H, W, H' and W'.
        scale: Factor of the logits; D ** -0.5 if None.

    Returns:
        (B, H, W, N * D), in the dtype of `q`. Logits and softmax are float32 for half precision. Under autocast, `q`,
        `k` and `v` are converted to its dtype.

    Raises:
        TypeError: an integer tensor for q, k or v, dtypes that differ, or routes that are not int64.
        ValueError: a shape or an option other than those above, or devices that differ. The values of `routes` are
            checked on CPUs, and on GPUs only with ZOO_DEBUG=1 in the environment, since the check waits for the GPU
            (so a CUDA graph cannot capture it); never in compiled, exported or transformed code. Where they are not
            checked, a value out of range is undefined behaviour.

    Source: BiFormer, arXiv 2303.08810, section 3.2.
    """
    checks.tensors({"q": q, "k": k, "v": v, "routes": routes})
    q, k, v = dispatch.autocast(q, k, v)
    checks.floating(q=q, k=k, v=v)
    checks.shape(q, "q", (None,) * 4, "(B, H, W, channels)")
    batch, height, width, channels = checks.sizes(q)
    head_dim = checks.split_heads(channels, 1, num_heads, "q")
    checks.shape(k, "k", (batch, None, None, channels), "(B, H', W', channels of q)")
    checks.shape(v, "v", checks.sizes(k), "the shape of k")
    checks.count(regions, "regions")
    for name, (rows, columns) in (("q", (height, width)), ("k and v", checks.sizes(k)[1:3])):
        checks.map_size(rows, columns, name)
        if checks.certain(rows % regions != 0) or checks.certain(columns % regions != 0):
            raise ValueError(
                f"Got {name} of {rows} x {columns} tokens for {regions} x {regions} regions; "
                f"both sides have to be multiples of {regions}: pad the map."
            )
    checks.shape(routes, "routes", (batch, regions**2, None), "(B, S * S, topk)")
    if routes.dtype != torch.int64:
        raise TypeError(f"Got routes of {routes.dtype}; they have to be int64, as torch.topk gives them.")
    if checks.certain(checks.sizes(routes)[2] == 0):
        raise ValueError("Got routes to no region; each region needs one or more.")
    _check_routes(routes, regions)
    scale = checks.attention_scale(scale, head_dim)
    implementation = dispatch.choose("routed_attention", q, head_dim)
    with dispatch.as_given(q):
        if implementation == "triton":
            return forward(q, k, v, routes, num_heads=num_heads, regions=regions, scale=scale)[0]
        compute = reference if implementation == "reference" else torch_impl
        return compute.routed_attention(q, k, v, routes, num_heads=num_heads, regions=regions, scale=scale)


def _check_routes(routes: Tensor, regions: int) -> None:
    if not (checks.DEBUG or routes.device.type == "cpu") or constants.only_traced(routes) or routes.numel() == 0:
        return
    least, most = (number.item() for number in routes.aminmax())
    if least < 0 or most >= regions**2:
        raise ValueError(
            f"Got routes from {least} to {most} for {regions} x {regions} regions; they have to be from 0 to "
            f"{regions**2 - 1}."
        )


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::routed_attn")
def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, num_heads: int, regions: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, N D), and log2 of each query's sum of exponentials by regions, (B, S S, N, T) float32."""
    from zoo.kernels.routed_attention import triton_impl

    return triton_impl.forward(q, k, v, routes, num_heads=num_heads, regions=regions, scale=scale)


@dispatch.triton_op("zoo::routed_attn_bwd")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    regions: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from zoo.kernels.routed_attention import triton_impl

    return triton_impl.backward(grad, q, k, v, routes, out, lse, num_heads=num_heads, regions=regions, scale=scale)


_OPTIONS = ("num_heads", "regions", "scale")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = dict(zip(_OPTIONS, inputs[4:], strict=True))


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, routes, out, lse = ctx.saved_tensors
    if dispatch.again_differentiable(q, k, v, grad):

        def composite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch_impl.routed_attention(q, k, v, routes, **ctx.options)

        grads = dispatch.composite_gradients(composite, (q, k, v), grad)
    else:
        grads = backward(grad, q, k, v, routes, out, lse, **ctx.options)
    routes_grad = None
    return *grads, routes_grad, *(None,) * len(ctx.options)


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
