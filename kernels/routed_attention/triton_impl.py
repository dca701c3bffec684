"""Routed attention in Triton: keys are gathered tile by tile through the routes, without a copy.

Letters: B images, H, W map, R = S * S regions, T tokens of a region (of q, or of k and v), N heads, D head dim.

All queries of a region have the same list of keys: entry n is token n % T of region routes[n // T]. For the gradients
of keys and values, the list of queries of a region comes from the inverse routes, sorted by region (CSR), so that a
single program computes each sum, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E, dot, load_rows, softmax_end, softmax_step, store_rows

# Among the values that differ between calls, only the strides are worth specializing: on divisibility by 16.
NOT_SPECIALIZED = ("height", "width", "key_height", "key_width", "regions", "topk", "num_heads")


@triton.jit
def _program(height, width, regions, num_heads, BLOCK: tl.constexpr):
    """Head, region, image and first token of a program of BLOCK tokens of a region, and the tokens of a region."""
    tokens = (height // regions) * (width // regions)
    blocks = tl.cdiv(tokens, BLOCK)
    pid = tl.program_id(0)
    rest = pid // num_heads // blocks
    areas = regions * regions
    return pid % num_heads, rest % areas, rest // areas, pid // num_heads % blocks * BLOCK, tokens


@triton.jit
def _places(image, region, token, height, width, regions):
    """Indices of tokens of regions in (B H W)."""
    rows, columns = height // regions, width // regions
    y = region // regions * rows + token // columns
    x = region % regions * columns + token % columns
    return (image * height + y).to(tl.int64) * width + x


@triton.jit
def _routed_keys(routes_ptr, row, start, count, image, height, width, regions, topk, BLOCK_K: tl.constexpr):
    """Places of the keys from `start` on in a region's list of `count` keys, and which of them exist."""
    tokens = (height // regions) * (width // regions)
    index = start + tl.arange(0, BLOCK_K)
    valid = index < count
    region = tl.load(routes_ptr + row * topk + index // tokens, mask=valid, other=0).to(tl.int32)
    return _places(image, region, index % tokens, height, width, regions), valid


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr,
    q_stride, k_stride, v_stride, height, width, key_height, key_width, regions, topk, num_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j 2^(s_ij - lse_i) v_j with s = scale log2(e) q k', lse_i = log2 sum_j 2^s_ij; online over j."""
    head, region, image, first, tokens = _program(height, width, regions, num_heads, BLOCK_Q)
    token = first + tl.arange(0, BLOCK_Q)
    valid = token < tokens
    places = _places(image, region, token, height, width, regions)
    query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)

    row = image.to(tl.int64) * regions * regions + region
    count = (key_height // regions) * (key_width // regions) * topk
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_K):
        keys, taken = _routed_keys(routes_ptr, row, start, count, image, key_height, key_width, regions, topk, BLOCK_K)
        key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        scores = dot(query, tl.trans(key), PRECISION) * (scale * LOG2E)
        scores = tl.where(taken[None, :], scores, float("-inf"))
        highest, total, acc = softmax_step(scores, value, highest, total, acc, PRECISION)

    divisor, lse = softmax_end(highest, total)
    store_rows(out_ptr, (places * num_heads + head) * HEAD_DIM, acc / divisor[:, None], valid, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (row * num_heads + head) * tokens + token, lse, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, routes_ptr, out_ptr, lse_ptr, delta_ptr, q_grad_ptr,
    grad_stride, q_stride, k_stride, v_stride, height, width, key_height, key_width, regions, topk, num_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q_grad_i = scale sum_j p_ij (grad_i v_j - delta_i) k_j with delta_i = grad_i out_i, stored for k and v."""
    head, region, image, first, tokens = _program(height, width, regions, num_heads, BLOCK_Q)
    token = first + tl.arange(0, BLOCK_Q)
    valid = token < tokens
    places = _places(image, region, token, height, width, regions)
    query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, places * grad_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, (places * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    row = image.to(tl.int64) * regions * regions + region
    statistics = (row * num_heads + head) * tokens + token
    lse = tl.load(lse_ptr + statistics, mask=valid, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=valid)

    count = (key_height // regions) * (key_width // regions) * topk
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_K):
        keys, taken = _routed_keys(routes_ptr, row, start, count, image, key_height, key_width, regions, topk, BLOCK_K)
        key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        scores = dot(query, tl.trans(key), PRECISION) * (scale * LOG2E)
        scores = tl.where(taken[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - lse[:, None])
        scores_grad = weights * (dot(grad, tl.trans(value), PRECISION) - delta[:, None])
        acc += dot(scores_grad.to(key.dtype), key, PRECISION)
    store_rows(q_grad_ptr, (places * num_heads + head) * HEAD_DIM, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, order_ptr, starts_ptr, lse_ptr, delta_ptr, k_grad_ptr, v_grad_ptr,
    grad_stride, q_stride, k_stride, v_stride, height, width, key_height, key_width, regions, topk, num_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """v_grad_j = sum_i p_ij grad_i and k_grad_j = scale sum_i p_ij (grad_i v_j - delta_i) q_i over the inverse list."""
    head, region, image, first, key_tokens = _program(key_height, key_width, regions, num_heads, BLOCK_K)
    token = first + tl.arange(0, BLOCK_K)
    keys = _places(image, region, token, key_height, key_width, regions)
    valid = token < key_tokens
    key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)

    areas = regions * regions
    tokens = (height // regions) * (width // regions)
    starts = starts_ptr + image.to(tl.int64) * (areas + 1) + region
    begin = tl.load(starts)
    count = (tl.load(starts + 1) - begin) * tokens
    order = order_ptr + image.to(tl.int64) * areas * topk + begin
    key_acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_Q):
        index = start + tl.arange(0, BLOCK_Q)
        taken = index < count
        source = tl.load(order + index // tokens, mask=taken, other=0).to(tl.int32) // topk
        places = _places(image, source, index % tokens, height, width, regions)
        row = image.to(tl.int64) * areas + source
        statistics = (row * num_heads + head) * tokens + index % tokens
        query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, places * grad_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + statistics, mask=taken, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=taken, other=0.0)
        # Queries past the end of the list have zeros for q and grad, so they contribute nothing.
        weights = tl.exp2(dot(key, tl.trans(query), PRECISION) * (scale * LOG2E) - lse[None, :])
        value_acc += dot(weights.to(grad.dtype), grad, PRECISION)
        scores_grad = weights * (dot(value, tl.trans(grad), PRECISION) - delta[None, :])
        key_acc += dot(scores_grad.to(query.dtype), query, PRECISION)
    store_rows(k_grad_ptr, (keys * num_heads + head) * HEAD_DIM, key_acc * scale, valid, HEAD_DIM, BLOCK_D)
    store_rows(v_grad_ptr, (keys * num_heads + head) * HEAD_DIM, value_acc, valid, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, num_heads: int, regions: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `op.forward`."""
    q, k, v, routes = _even(q), _even(k), _even(v), routes.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[0], regions**2, num_heads, _tokens(q, regions), dtype=torch.float32)
    block = _block(q, regions)
    triton_common.launch(
        _fwd_kernel,
        (q.shape[0] * regions**2 * triton.cdiv(_tokens(q, regions), block) * num_heads,),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        routes_ptr=routes,
        out_ptr=out,
        lse_ptr=lse,
        q_stride=q.stride(2),
        k_stride=k.stride(2),
        v_stride=v.stride(2),
        BLOCK_Q=block,
        BLOCK_K=_step(q, num_heads),
        **_common(q, k, routes, num_heads, regions, scale),
        **_options(q, num_heads, block),
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    num_heads: int,
    regions: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    grad, q, k, v, routes = _even(grad), _even(q), _even(k), _even(v), routes.contiguous()
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = {
        "grad_stride": grad.stride(2),
        "q_stride": q.stride(2),
        "k_stride": k.stride(2),
        "v_stride": v.stride(2),
    }
    common = _common(q, k, routes, num_heads, regions, scale)
    block, step = _block(q, regions), _step(q, num_heads)
    triton_common.launch(
        _bwd_q_kernel,
        (q.shape[0] * regions**2 * triton.cdiv(_tokens(q, regions), block) * num_heads,),
        grad_ptr=grad,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        routes_ptr=routes,
        out_ptr=out,
        lse_ptr=lse,
        delta_ptr=delta,
        q_grad_ptr=q_grad,
        BLOCK_Q=block,
        BLOCK_K=step,
        **strides,
        **common,
        **_options(q, num_heads, block),
    )
    order, starts = _inverse(routes, regions)
    block = _block(k, regions)
    triton_common.launch(
        _bwd_kv_kernel,
        (k.shape[0] * regions**2 * triton.cdiv(_tokens(k, regions), block) * num_heads,),
        grad_ptr=grad,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        order_ptr=order,
        starts_ptr=starts,
        lse_ptr=lse,
        delta_ptr=delta,
        k_grad_ptr=k_grad,
        v_grad_ptr=v_grad,
        BLOCK_Q=step,
        BLOCK_K=block,
        **strides,
        **common,
        **_options(q, num_heads, block),
    )
    return q_grad, k_grad, v_grad


def _inverse(routes: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """For each image, the entries of `routes` sorted by region, and the start of the entries of each region."""
    batch = routes.shape[0]
    named, order = routes.flatten(1).int().sort(dim=1, stable=True)
    numbers = torch.arange(regions**2 + 1, dtype=torch.int32, device=routes.device).repeat(batch, 1)
    return order, torch.searchsorted(named, numbers, out_int32=True)


def _even(x: Tensor) -> Tensor:
    """`x` if its tokens are evenly spaced and aligned, as in slices of a projection; else a contiguous copy."""
    _, height, width, _ = x.shape
    step = x.stride(2)
    even = x.stride() == (height * width * step, width * step, step, 1)
    return triton_common.aligned(x) if even else x.contiguous()


def _tokens(x: Tensor, regions: int) -> int:
    return (x.shape[1] // regions) * (x.shape[2] // regions)


def _block(x: Tensor, regions: int) -> int:
    """The number of tokens of a program: those of a region, at most 64."""
    return next((size for size in (16, 32) if _tokens(x, regions) <= size), 64)


def _step(q: Tensor, num_heads: int) -> int:
    """The number of tokens of the other side in a step: as many as the registers hold."""
    half = q.element_size() == 2
    return min(max((4096 if half else 1024) // _block_d(q, num_heads), 16), 64 if half else 32)


def _block_d(q: Tensor, num_heads: int) -> int:
    return max(triton.next_power_of_2(q.shape[3] // num_heads), 16)


def _common(q: Tensor, k: Tensor, routes: Tensor, num_heads: int, regions: int, scale: float) -> dict[str, Any]:
    return {
        "height": q.shape[1],
        "width": q.shape[2],
        "key_height": k.shape[1],
        "key_width": k.shape[2],
        "regions": regions,
        "topk": routes.shape[2],
        "num_heads": num_heads,
        "scale": scale,
        "HEAD_DIM": q.shape[3] // num_heads,
        "BLOCK_D": _block_d(q, num_heads),
        "PRECISION": triton_common.precision(q.dtype, triton_common.machine(q)),
    }


def _options(q: Tensor, num_heads: int, block: int) -> dict[str, int]:
    large = q.element_size() == 4 or _block_d(q, num_heads) == 128
    warps = (4 if block == 64 else 2) * (2 if large else 1)
    return {"num_warps": warps, "num_stages": 1 if triton_common.machine(q).is_amd else 2}
