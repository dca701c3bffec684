"""Routed attention in Triton: the keys of the routes are read where they are, without a copy.

Letters: B images, H, W map, R = S * S regions, T tokens of a region (of q, or of k and v), N heads, D head dim.

All queries of a region have the same list of keys: entry n is token n % T of region routes[n // T]. A program takes a
region, or a part of one, and goes through its list. For the gradients of keys and values, the list of queries of a
region comes from the inverse routes, sorted by region (CSR), so that a single program computes each sum, in a fixed
order.

Regions of a few tokens do not fill a tile. If each is routed to many of the others, a program takes several regions,
goes through all keys of the image, and adds the bias of the regions: log2 of how often one lists another, -inf if it
does not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E, dot, evenly_spaced, load_rows, softmax_end, softmax_step, store_rows

# Sizes of regions are constants, so that divisions by them, several for each token, compile to products.
# A tile holds AREAS regions, with PAD rows for the tokens of each; or, if AREAS is 1, PAD tokens of a list.


@triton.jit
def _tile(area, token, REGIONS: tl.constexpr, TOKENS: tl.constexpr, AREAS: tl.constexpr, PAD: tl.constexpr):
    """The region and the token of each row of a tile that starts at `area` and `token`, and which rows exist."""
    index = tl.arange(0, AREAS * PAD)
    if AREAS == 1:
        token += index
        valid = token < TOKENS
    else:
        area += index // PAD
        token += index % PAD
        valid = (area < REGIONS * REGIONS) & (token < TOKENS)
    return area, token, valid


@triton.jit
def _program(REGIONS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, AREAS: tl.constexpr, PAD: tl.constexpr):
    """Head, image, first region and first token of a program."""
    BLOCKS: tl.constexpr = (TOKENS + PAD - 1) // PAD
    TILES: tl.constexpr = (REGIONS * REGIONS + AREAS - 1) // AREAS
    rest = tl.program_id(0) // HEADS
    image = (rest // (BLOCKS * TILES)).to(tl.int64)
    return tl.program_id(0) % HEADS, image, rest // BLOCKS % TILES * AREAS, rest % BLOCKS * PAD


@triton.jit
def _places(image, area, token, REGIONS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Indices of tokens of regions of HEIGHT x WIDTH tokens in (B H W)."""
    y = area // REGIONS * HEIGHT + token // WIDTH
    x = area % REGIONS * WIDTH + token % WIDTH
    return image * (REGIONS * HEIGHT * REGIONS * WIDTH) + (y * (REGIONS * WIDTH) + x)


@triton.jit
def _inverse_kernel(
    routes_ptr, order_ptr, starts_ptr, REGIONS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The regions that list a region of an image, in their order: `order` (B, R topk) from `starts` (B, R + 1) on."""
    AREAS: tl.constexpr = REGIONS * REGIONS
    image = (tl.program_id(0) // AREAS).to(tl.int64)
    region = tl.program_id(0) % AREAS
    entry = tl.arange(0, BLOCK)
    begin = 0
    for first in range(0, AREAS * TOPK, BLOCK):
        valid = first + entry < AREAS * TOPK
        listed = tl.load(routes_ptr + image * (AREAS * TOPK) + first + entry, mask=valid, other=AREAS)
        begin += tl.sum((listed < region).to(tl.int32))
    starts = starts_ptr + image * (AREAS + 1) + region
    tl.store(starts, begin)
    for first in range(0, AREAS * TOPK, BLOCK):
        valid = first + entry < AREAS * TOPK
        listed = tl.load(routes_ptr + image * (AREAS * TOPK) + first + entry, mask=valid, other=AREAS)
        found = (listed == region).to(tl.int32)
        place = image * (AREAS * TOPK) + begin + tl.cumsum(found) - 1
        tl.store(order_ptr + place, (first + entry) // TOPK, mask=found == 1)
        begin += tl.sum(found)
    if region == AREAS - 1:
        tl.store(starts + 1, begin)


@triton.jit
def _bias_kernel(
    routes_ptr, bias_ptr, batch, REGIONS: tl.constexpr, TOPK: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """bias (B, R, PITCH): log2 of how often each region of an image lists each other one, -inf if it does not."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < batch * (REGIONS * REGIONS)
    area = tl.arange(0, PITCH)
    count = tl.zeros([BLOCK, PITCH], tl.int32)
    for index in range(TOPK):
        route = tl.load(routes_ptr + row * TOPK + index, mask=valid, other=-1)
        count += (route.to(tl.int32)[:, None] == area[None, :]).to(tl.int32)
    bias = tl.where(count == 0, float("-inf"), tl.log2(tl.maximum(count, 1).to(tl.float32)))
    tl.store(bias_ptr + row[:, None] * PITCH + area[None, :], bias, mask=valid[:, None])


@triton.jit
def _bias(bias_ptr, image, query_area, key_area, REGIONS: tl.constexpr, PITCH: tl.constexpr):
    """The bias of a broadcast of `query_area` and `key_area`; any number for regions past the last one."""
    row = image * (REGIONS * REGIONS) + query_area
    return tl.load(bias_ptr + row * PITCH + key_area, mask=query_area < REGIONS * REGIONS, other=0.0)


@triton.jit
def _keys(
    routes_ptr, bias_ptr, image, area, start,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    KEY_AREAS: tl.constexpr, KEY_PAD: tl.constexpr,
):  # fmt: skip
    """Places of the keys of the step from `start` on, which of them exist, and which of them no bias hides."""
    if bias_ptr is None:
        index = start + tl.arange(0, KEY_PAD)
        valid = index < KEY_H * KEY_W * TOPK
        routes = routes_ptr + (image * (REGIONS * REGIONS) + area) * TOPK
        key_area = tl.load(routes + index // (KEY_H * KEY_W), mask=valid, other=0).to(tl.int32)
        token = index % (KEY_H * KEY_W)
        shown = valid
    else:
        key_area, token, valid = _tile(start, 0, REGIONS, KEY_H * KEY_W, KEY_AREAS, KEY_PAD)
        shown = token < KEY_H * KEY_W
    return _places(image, key_area, token, REGIONS, KEY_H, KEY_W), valid, shown


@triton.jit
def _scores(
    query, key, shown, bias_ptr, image, area, start, scale, REGIONS: tl.constexpr, PITCH: tl.constexpr,
    AREAS: tl.constexpr, PAD: tl.constexpr, KEY_AREAS: tl.constexpr, KEY_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of queries, from region `area` on, and keys, from region `start` on; -inf if not `shown`."""
    scores = dot(query, tl.trans(key), PRECISION) * (scale * LOG2E)
    if bias_ptr is not None:
        rows, columns = area + tl.arange(0, AREAS), start + tl.arange(0, KEY_AREAS)
        bias = _bias(bias_ptr, image, rows[:, None], columns[None, :], REGIONS, PITCH)
        scores = tl.reshape(scores, (AREAS, PAD, KEY_AREAS, KEY_PAD)) + bias[:, None, :, None]
        scores = tl.reshape(scores, (AREAS * PAD, KEY_AREAS * KEY_PAD))
    return tl.where(shown[None, :], scores, float("-inf"))


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, routes_ptr, bias_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, scale,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, HEADS: tl.constexpr, PITCH: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    AREAS: tl.constexpr, PAD: tl.constexpr, KEY_AREAS: tl.constexpr, KEY_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j 2^(s_ij - lse_i) v_j with s = scale log2(e) q k', lse_i = log2 sum_j 2^s_ij; online over j."""
    TOKENS: tl.constexpr = QUERY_H * QUERY_W
    END: tl.constexpr = KEY_H * KEY_W * TOPK if bias_ptr is None else REGIONS * REGIONS
    STEP: tl.constexpr = KEY_PAD if bias_ptr is None else KEY_AREAS
    head, image, first, token = _program(REGIONS, HEADS, TOKENS, AREAS, PAD)
    area, token, valid = _tile(first, token, REGIONS, TOKENS, AREAS, PAD)
    places = _places(image, area, token, REGIONS, QUERY_H, QUERY_W)
    query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)

    highest = tl.full([AREAS * PAD], float("-inf"), tl.float32)
    total = tl.zeros([AREAS * PAD], tl.float32)
    acc = tl.zeros([AREAS * PAD, BLOCK_D], tl.float32)
    for start in range(0, END, STEP):
        keys, taken, shown = _keys(
            routes_ptr, bias_ptr, image, first, start, REGIONS, TOPK, KEY_H, KEY_W, KEY_AREAS, KEY_PAD
        )
        key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        scores = _scores(
            query, key, shown, bias_ptr, image, first, start, scale, REGIONS, PITCH, AREAS, PAD, KEY_AREAS, KEY_PAD,
            PRECISION,
        )  # fmt: skip
        highest, total, acc = softmax_step(scores, value, highest, total, acc, PRECISION)

    divisor, lse = softmax_end(highest, total)
    store_rows(out_ptr, (places * HEADS + head) * HEAD_DIM, acc * (1.0 / divisor)[:, None], valid, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + ((image * (REGIONS * REGIONS) + area) * HEADS + head) * TOKENS + token, lse, mask=valid)


@triton.jit
def _bwd_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, routes_ptr, bias_ptr, out_ptr, lse_ptr, delta_ptr, q_grad_ptr,
    grad_stride, q_stride, k_stride, v_stride, scale,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, HEADS: tl.constexpr, PITCH: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    AREAS: tl.constexpr, PAD: tl.constexpr, KEY_AREAS: tl.constexpr, KEY_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_grad_i = scale sum_j p_ij (grad_i v_j - delta_i) k_j with delta_i = grad_i out_i, stored for k and v."""
    TOKENS: tl.constexpr = QUERY_H * QUERY_W
    END: tl.constexpr = KEY_H * KEY_W * TOPK if bias_ptr is None else REGIONS * REGIONS
    STEP: tl.constexpr = KEY_PAD if bias_ptr is None else KEY_AREAS
    head, image, first, token = _program(REGIONS, HEADS, TOKENS, AREAS, PAD)
    area, token, valid = _tile(first, token, REGIONS, TOKENS, AREAS, PAD)
    places = _places(image, area, token, REGIONS, QUERY_H, QUERY_W)
    query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, places * grad_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, (places * HEADS + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    statistics = ((image * (REGIONS * REGIONS) + area) * HEADS + head) * TOKENS + token
    lse = tl.load(lse_ptr + statistics, mask=valid, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=valid)

    acc = tl.zeros([AREAS * PAD, BLOCK_D], tl.float32)
    for start in range(0, END, STEP):
        keys, taken, shown = _keys(
            routes_ptr, bias_ptr, image, first, start, REGIONS, TOPK, KEY_H, KEY_W, KEY_AREAS, KEY_PAD
        )
        key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        scores = _scores(
            query, key, shown, bias_ptr, image, first, start, scale, REGIONS, PITCH, AREAS, PAD, KEY_AREAS, KEY_PAD,
            PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        scores_grad = weights * (dot(grad, tl.trans(value), PRECISION) - delta[:, None])
        acc += dot(scores_grad.to(key.dtype), key, PRECISION)
    store_rows(q_grad_ptr, (places * HEADS + head) * HEAD_DIM, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _bwd_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, order_ptr, starts_ptr, bias_ptr, lse_ptr, delta_ptr, k_grad_ptr, v_grad_ptr,
    grad_stride, q_stride, k_stride, v_stride, scale,
    REGIONS: tl.constexpr, TOPK: tl.constexpr, HEADS: tl.constexpr, PITCH: tl.constexpr,
    QUERY_H: tl.constexpr, QUERY_W: tl.constexpr, KEY_H: tl.constexpr, KEY_W: tl.constexpr,
    AREAS: tl.constexpr, PAD: tl.constexpr, KEY_AREAS: tl.constexpr, KEY_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v_grad_j = sum_i p_ij grad_i and k_grad_j = scale sum_i p_ij (grad_i v_j - delta_i) q_i over the inverse list."""
    TOKENS: tl.constexpr = QUERY_H * QUERY_W
    STEP: tl.constexpr = PAD if bias_ptr is None else AREAS
    head, image, first, token = _program(REGIONS, HEADS, KEY_H * KEY_W, KEY_AREAS, KEY_PAD)
    area, token, valid = _tile(first, token, REGIONS, KEY_H * KEY_W, KEY_AREAS, KEY_PAD)
    keys = _places(image, area, token, REGIONS, KEY_H, KEY_W)
    key = load_rows(k_ptr, keys * k_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    value = load_rows(v_ptr, keys * v_stride + head * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)

    if bias_ptr is None:
        starts = starts_ptr + image * (REGIONS * REGIONS + 1) + first
        begin = tl.load(starts)
        end = (tl.load(starts + 1) - begin) * TOKENS
        order = order_ptr + image * (REGIONS * REGIONS * TOPK) + begin
    else:
        end = REGIONS * REGIONS
    key_acc = tl.zeros([KEY_AREAS * KEY_PAD, BLOCK_D], tl.float32)
    value_acc = tl.zeros([KEY_AREAS * KEY_PAD, BLOCK_D], tl.float32)
    for start in range(0, end, STEP):
        if bias_ptr is None:
            index = start + tl.arange(0, PAD)
            taken = index < end
            source = tl.load(order + index // TOKENS, mask=taken, other=0)
            source_token = index % TOKENS
        else:
            source, source_token, taken = _tile(start, 0, REGIONS, TOKENS, AREAS, PAD)
        places = _places(image, source, source_token, REGIONS, QUERY_H, QUERY_W)
        statistics = ((image * (REGIONS * REGIONS) + source) * HEADS + head) * TOKENS + source_token
        query = load_rows(q_ptr, places * q_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, places * grad_stride + head * HEAD_DIM, taken, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + statistics, mask=taken, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=taken, other=0.0)
        # Queries that do not exist have zeros for q and grad, so they contribute nothing.
        scores = dot(key, tl.trans(query), PRECISION) * (scale * LOG2E)
        if bias_ptr is not None:
            rows, columns = first + tl.arange(0, KEY_AREAS), start + tl.arange(0, AREAS)
            bias = _bias(bias_ptr, image, columns[None, :], rows[:, None], REGIONS, PITCH)
            scores = tl.reshape(scores, (KEY_AREAS, KEY_PAD, AREAS, PAD)) + bias[:, None, :, None]
            scores = tl.reshape(scores, (KEY_AREAS * KEY_PAD, AREAS * PAD))
        weights = tl.exp2(scores - lse[None, :])
        value_acc += dot(weights.to(grad.dtype), grad, PRECISION)
        scores_grad = weights * (dot(value, tl.trans(grad), PRECISION) - delta[None, :])
        key_acc += dot(scores_grad.to(query.dtype), query, PRECISION)
    store_rows(k_grad_ptr, (keys * HEADS + head) * HEAD_DIM, key_acc * scale, valid, HEAD_DIM, BLOCK_D)
    store_rows(v_grad_ptr, (keys * HEADS + head) * HEAD_DIM, value_acc, valid, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, *, num_heads: int, regions: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `op.forward`."""
    q, k, v, routes = evenly_spaced(q), evenly_spaced(k), evenly_spaced(v), routes.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[0], regions**2, num_heads, _tokens(q, regions), dtype=torch.float32)
    bias = _region_bias(q, k, routes, num_heads, regions)
    triton_common.launch(
        _fwd_kernel,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        routes_ptr=routes,
        bias_ptr=bias,
        out_ptr=out,
        lse_ptr=lse,
        q_stride=q.stride(2),
        k_stride=k.stride(2),
        v_stride=v.stride(2),
        **_common(_fwd_kernel, q, k, routes, bias, num_heads, regions, scale),
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
    grad, q, k, v = evenly_spaced(grad), evenly_spaced(q), evenly_spaced(k), evenly_spaced(v)
    routes = routes.contiguous()
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    bias = _region_bias(q, k, routes, num_heads, regions)
    arguments: dict[str, Any] = {
        "grad_ptr": grad,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "lse_ptr": lse,
        "delta_ptr": torch.empty_like(lse),
        "grad_stride": grad.stride(2),
        "q_stride": q.stride(2),
        "k_stride": k.stride(2),
        "v_stride": v.stride(2),
    }
    triton_common.launch(
        _bwd_q_kernel,
        routes_ptr=routes,
        out_ptr=out,
        q_grad_ptr=q_grad,
        **arguments,
        **_common(_bwd_q_kernel, q, k, routes, bias, num_heads, regions, scale),
    )
    order, starts = (None, None) if bias is not None else _inverse(routes, regions)
    triton_common.launch(
        _bwd_kv_kernel,
        order_ptr=order,
        starts_ptr=starts,
        k_grad_ptr=k_grad,
        v_grad_ptr=v_grad,
        **arguments,
        **_common(_bwd_kv_kernel, q, k, routes, bias, num_heads, regions, scale),
    )
    return q_grad, k_grad, v_grad


def _inverse(routes: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """For each image, the regions that list region 0, those that list region 1, ..., and the start of each part."""
    order = torch.empty_like(routes, dtype=torch.int32)
    starts = order.new_empty(routes.shape[0], regions**2 + 1)
    triton_common.launch(
        _inverse_kernel,
        (routes.shape[0] * regions**2,),
        routes_ptr=routes,
        order_ptr=order,
        starts_ptr=starts,
        REGIONS=regions,
        TOPK=routes.shape[2],
        BLOCK=256,
        num_warps=4,
        num_stages=1,
    )
    return order, starts


def _region_bias(q: Tensor, k: Tensor, routes: Tensor, num_heads: int, regions: int) -> Tensor | None:
    """The bias of the regions (B, R, PITCH) if going through all keys takes less time than going through lists.

    This is so if the lists lead to no more than twice as many pairs of a row of a tile and a key.
    """
    pad, key_pad, topk = _pad(q, regions), _pad(k, regions), routes.shape[2]
    if 0 in (pad, key_pad) or regions**2 * pad * key_pad > 2 * topk * 16 * _tokens(k, regions):
        return None
    pitch = max(triton.next_power_of_2(regions**2), _step(q, num_heads))
    bias = q.new_empty(q.shape[0], regions**2, pitch, dtype=torch.float32)
    block = max(1, 1024 // pitch)
    triton_common.launch(
        _bias_kernel,
        (triton.cdiv(q.shape[0] * regions**2, block),),
        routes_ptr=routes,
        bias_ptr=bias,
        batch=q.shape[0],
        REGIONS=regions,
        TOPK=topk,
        PITCH=pitch,
        BLOCK=block,
        num_warps=2,
        num_stages=1,
    )
    return bias


def _tokens(x: Tensor, regions: int) -> int:
    return (x.shape[1] // regions) * (x.shape[2] // regions)


def _pad(x: Tensor, regions: int) -> int:
    """The number of rows for the tokens of a region in a tile of several regions; 0 if it is too large for that."""
    return next((size for size in (1, 2, 4, 8) if _tokens(x, regions) <= size), 0)


def _block(x: Tensor, regions: int) -> int:
    """The number of tokens of a program that takes one region: those of the region, at most 64."""
    return next((size for size in (16, 32) if _tokens(x, regions) <= size), 64)


def _step(q: Tensor, num_heads: int) -> int:
    """The number of tokens of a step: as many as the registers hold."""
    half = q.element_size() == 2
    return min(max((4096 if half else 1024) // _block_d(q, num_heads), 16), 64 if half else 32)


def _block_d(q: Tensor, num_heads: int) -> int:
    return max(triton.next_power_of_2(q.shape[3] // num_heads), 16)


def _common(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    routes: Tensor,
    bias: Tensor | None,
    num_heads: int,
    regions: int,
    scale: float,
) -> dict[str, Any]:
    """The grid of `kernel` and the arguments that all kernels share."""
    for_keys = kernel is _bwd_kv_kernel  # a program owns keys, else queries
    own, other = (k, q) if for_keys else (q, k)
    step = _step(q, num_heads)
    gpu = triton_common.machine(q)
    # The rows of a step and the stages of its pipeline are those that took the least time on an H100.
    if bias is None:
        tile = 1, _block(own, regions)
        step_tile = 1, min(step, {_fwd_kernel: 64, _bwd_q_kernel: tile[1], _bwd_kv_kernel: 2 * tile[1]}[kernel])
        stages = 1 if for_keys and tile[1] == 64 else 2
    else:
        pad, other_pad = _pad(own, regions), _pad(other, regions)
        tile = step // pad, pad
        step_tile = max(step // 2, 16) // other_pad, other_pad
        stages = 3
    query_tile, key_tile = (step_tile, tile) if for_keys else (tile, step_tile)
    rows = tile[0] * tile[1]
    programs = triton.cdiv(regions**2, tile[0]) * triton.cdiv(_tokens(own, regions), tile[1])
    precision = triton_common.precision(q.dtype, gpu)
    large = (q.element_size() == 4 and precision == "ieee") or _block_d(q, num_heads) == 128
    return {
        "grid": (q.shape[0] * programs * num_heads,),
        "scale": scale,
        "REGIONS": regions,
        "TOPK": routes.shape[2],
        "HEADS": num_heads,
        "PITCH": 0 if bias is None else bias.shape[2],
        "QUERY_H": q.shape[1] // regions,
        "QUERY_W": q.shape[2] // regions,
        "KEY_H": k.shape[1] // regions,
        "KEY_W": k.shape[2] // regions,
        "AREAS": query_tile[0],
        "PAD": query_tile[1],
        "KEY_AREAS": key_tile[0],
        "KEY_PAD": key_tile[1],
        "HEAD_DIM": q.shape[3] // num_heads,
        "BLOCK_D": _block_d(q, num_heads),
        "PRECISION": precision,
        "num_warps": max(rows // 16, 2) * 2 if large else rows // 16,
        "num_stages": 1 if gpu.is_amd else stages,
    }
