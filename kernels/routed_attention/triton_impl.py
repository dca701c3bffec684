"""Routed attention in Triton: keys are gathered tile by tile through the routes, and never copied.

Letters: B images, H, W map, R = S * S regions, T tokens of a region (of q, or of k and v), N heads, D head dim.

A query's list of keys is that of its region: entry n is token n % T of region routes[n // T]. The gradients of keys and
values go the other way: a region's list of queries comes from the inverse routes, sorted by region (CSR), so that every
sum has one owner and one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E, dot

# Of the values that differ between calls, only strides help the compiler by their divisibility.
_SIZES = ["height", "width", "key_height", "key_width", "regions", "topk", "num_heads"]


@triton.jit
def _program(height, width, regions, num_heads, BLOCK: tl.constexpr):
    """Head, region, image and first token of a program that owns BLOCK tokens of a region; the tokens of a region."""
    tokens = (height // regions) * (width // regions)
    blocks = tl.cdiv(tokens, BLOCK)
    pid = tl.program_id(0)
    rest = pid // num_heads // blocks
    areas = regions * regions
    return pid % num_heads, rest % areas, rest // areas, pid // num_heads % blocks * BLOCK, tokens


@triton.jit
def _places(image, region, token, height, width, regions):
    """Where tokens of regions stand in (B H W)."""
    rows, columns = height // regions, width // regions
    y = region // regions * rows + token // columns
    x = region % regions * columns + token % columns
    return (image * height + y).to(tl.int64) * width + x


@triton.jit
def _load(ptr, places, stride, head, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels of a head, one row for each place; 0 where not `valid`."""
    channel = tl.arange(0, BLOCK_D)
    offsets = places[:, None] * stride + head * HEAD_DIM + channel[None, :]
    return tl.load(ptr + offsets, mask=valid[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(ptr, value, places, stride, head, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `_load`."""
    channel = tl.arange(0, BLOCK_D)
    offsets = places[:, None] * stride + head * HEAD_DIM + channel[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=valid[:, None] & (channel < HEAD_DIM)[None, :])


@triton.jit
def _routed_keys(routes_ptr, row, start, count, image, height, width, regions, topk, BLOCK_K: tl.constexpr):
    """Places of the keys from `start` on in the list of `count` keys of a region, and which of them there are."""
    tokens = (height // regions) * (width // regions)
    index = start + tl.arange(0, BLOCK_K)
    valid = index < count
    region = tl.load(routes_ptr + row * topk + index // tokens, mask=valid, other=0).to(tl.int32)
    return _places(image, region, index % tokens, height, width, regions), valid


@triton.jit(do_not_specialize=_SIZES)
def _fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    routes_ptr,
    out_ptr,
    lse_ptr,
    q_stride,
    k_stride,
    v_stride,
    height,
    width,
    key_height,
    key_width,
    regions,
    topk,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i = sum_j 2^(s_ij - lse_i) v_j with s = scale log2(e) q k', lse_i = log2 sum_j 2^s_ij; online over j."""
    head, region, image, first, tokens = _program(height, width, regions, num_heads, BLOCK_Q)
    token = first + tl.arange(0, BLOCK_Q)
    valid = token < tokens
    places = _places(image, region, token, height, width, regions)
    query = _load(q_ptr, places, q_stride, head, valid, HEAD_DIM, BLOCK_D)

    row = image.to(tl.int64) * regions * regions + region
    count = (key_height // regions) * (key_width // regions) * topk
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_K):
        keys, taken = _routed_keys(routes_ptr, row, start, count, image, key_height, key_width, regions, topk, BLOCK_K)
        key = _load(k_ptr, keys, k_stride, head, taken, HEAD_DIM, BLOCK_D)
        value = _load(v_ptr, keys, v_stride, head, taken, HEAD_DIM, BLOCK_D)
        scores = dot(query, tl.trans(key), PRECISION) * (scale * LOG2E)
        scores = tl.where(taken[None, :], scores, -float("inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + dot(weights.to(value.dtype), value, PRECISION)
        top = above

    _store(out_ptr, acc / total[:, None], places, num_heads * HEAD_DIM, head, valid, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (row * num_heads + head) * tokens + token, top + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _bwd_q_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    routes_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    q_grad_ptr,
    grad_stride,
    q_stride,
    k_stride,
    v_stride,
    height,
    width,
    key_height,
    key_width,
    regions,
    topk,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q_grad_i = scale sum_j p_ij (grad_i v_j - delta_i) k_j with delta_i = grad_i out_i, kept for the other kernel."""
    head, region, image, first, tokens = _program(height, width, regions, num_heads, BLOCK_Q)
    token = first + tl.arange(0, BLOCK_Q)
    valid = token < tokens
    places = _places(image, region, token, height, width, regions)
    query = _load(q_ptr, places, q_stride, head, valid, HEAD_DIM, BLOCK_D)
    grad = _load(grad_ptr, places, grad_stride, head, valid, HEAD_DIM, BLOCK_D)
    out = _load(out_ptr, places, num_heads * HEAD_DIM, head, valid, HEAD_DIM, BLOCK_D)
    row = image.to(tl.int64) * regions * regions + region
    statistics = (row * num_heads + head) * tokens + token
    lse = tl.load(lse_ptr + statistics, mask=valid, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=valid)

    count = (key_height // regions) * (key_width // regions) * topk
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_K):
        keys, taken = _routed_keys(routes_ptr, row, start, count, image, key_height, key_width, regions, topk, BLOCK_K)
        key = _load(k_ptr, keys, k_stride, head, taken, HEAD_DIM, BLOCK_D)
        value = _load(v_ptr, keys, v_stride, head, taken, HEAD_DIM, BLOCK_D)
        scores = dot(query, tl.trans(key), PRECISION) * (scale * LOG2E)
        scores = tl.where(taken[None, :], scores, -float("inf"))
        weights = tl.exp2(scores - lse[:, None])
        scores_grad = weights * (dot(grad, tl.trans(value), PRECISION) - delta[:, None])
        acc += dot(scores_grad.to(key.dtype), key, PRECISION)
    _store(q_grad_ptr, acc * scale, places, num_heads * HEAD_DIM, head, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def _bwd_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    order_ptr,
    starts_ptr,
    lse_ptr,
    delta_ptr,
    k_grad_ptr,
    v_grad_ptr,
    grad_stride,
    q_stride,
    k_stride,
    v_stride,
    height,
    width,
    key_height,
    key_width,
    regions,
    topk,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """v_grad_j = sum_i p_ij grad_i and k_grad_j = scale sum_i p_ij (grad_i v_j - delta_i) q_i over the inverse list."""
    head, region, image, first, key_tokens = _program(key_height, key_width, regions, num_heads, BLOCK_K)
    token = first + tl.arange(0, BLOCK_K)
    keys = _places(image, region, token, key_height, key_width, regions)
    valid = token < key_tokens
    key = _load(k_ptr, keys, k_stride, head, valid, HEAD_DIM, BLOCK_D)
    value = _load(v_ptr, keys, v_stride, head, valid, HEAD_DIM, BLOCK_D)

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
        query = _load(q_ptr, places, q_stride, head, taken, HEAD_DIM, BLOCK_D)
        grad = _load(grad_ptr, places, grad_stride, head, taken, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + statistics, mask=taken, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=taken, other=0.0)
        # Queries that are not there have zeros for q and grad, and so add nothing.
        weights = tl.exp2(dot(key, tl.trans(query), PRECISION) * (scale * LOG2E) - lse[None, :])
        value_acc += dot(weights.to(grad.dtype), grad, PRECISION)
        scores_grad = weights * (dot(value, tl.trans(grad), PRECISION) - delta[None, :])
        key_acc += dot(scores_grad.to(query.dtype), query, PRECISION)
    _store(k_grad_ptr, key_acc * scale, keys, num_heads * HEAD_DIM, head, valid, HEAD_DIM, BLOCK_D)
    _store(v_grad_ptr, value_acc, keys, num_heads * HEAD_DIM, head, valid, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, num_heads: int, regions: int, scale: float
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
    """For each image the entries of `routes`, sorted by the region they name, and where each region's begin."""
    batch = routes.shape[0]
    named, order = routes.flatten(1).int().sort(dim=1, stable=True)
    numbers = torch.arange(regions**2 + 1, dtype=torch.int32, device=routes.device).repeat(batch, 1)
    return order, torch.searchsorted(named, numbers, out_int32=True)


def _even(x: Tensor) -> Tensor:
    """`x` with one distance between neighbouring tokens, as parts of one projection have it; copied if need be."""
    _, height, width, _ = x.shape
    step = x.stride(2)
    return x if x.stride() == (height * width * step, width * step, step, 1) else x.contiguous()


def _tokens(x: Tensor, regions: int) -> int:
    return (x.shape[1] // regions) * (x.shape[2] // regions)


def _block(x: Tensor, regions: int) -> int:
    """The tokens that a program owns: a region's, or 64 of them."""
    return next((size for size in (16, 32) if _tokens(x, regions) <= size), 64)


def _step(q: Tensor, num_heads: int) -> int:
    """The tokens of the other side that a program takes at once: as many as its registers hold."""
    half = q.element_size() == 2
    return min(max((4096 if half else 1024) // _block_d(q, num_heads), 16), 64 if half else 32)


def _block_d(q: Tensor, num_heads: int) -> int:
    return max(triton.next_power_of_2(q.shape[3] // num_heads), 16)


def _common(q: Tensor, k: Tensor, routes: Tensor, num_heads: int, regions: int, scale: float) -> dict[str, object]:
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
