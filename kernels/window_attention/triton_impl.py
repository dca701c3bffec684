"""Window attention in Triton: a tile per window or per several small ones, a loop over tiles for large windows.

The kernels read and write the tokens of a window at their positions on the map, so that windows are never copied.
Windows are numbered across all images.

A window of several tiles is divided into blocks of its tokens. If the last one is at most half full, the loops over
blocks take it in a size of its own, REST. The kernels for such windows read the bias of all pairs of tokens, (N, PITCH,
PITCH), which one small kernel makes from the table. The bias from sums of decays is made of those of a tile's tokens.

Letters: B images, H, W map, N heads, D head dim, G windows of an image, T tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E, Machine, dot, load_rows, log2, softmax_step, store_rows

# The largest size of the partial sums of the bias table's gradient.
MAX_PARTIAL_BYTES = 64 << 20
# Programs for each processor, of kernels whose programs take several windows one after the other. These numbers, the
# stages of the loops and the limits of registers were the fastest of those that were timed on an H100.
FWD_PROGRAMS, SCORES_PROGRAMS = 4, 12
# The alignment of addresses follows from HEAD_DIM, so one compiled kernel serves all sizes of maps.
NOT_SPECIALIZED = (
    "num_heads", "token_heads", "tokens", "window_width", "windows_per_image", "windows_per_row", "window_down",
    "window_right", "token_down", "token_right", "bias_sign", "windows", "tiles", "tiles_per_program", "pack", "parts",
    "groups", "groups_per_program", "blocks", "windows_per_program", "first_head", "heads", "rows", "pitch",
)  # fmt: skip


@triton.jit
def _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right):
    """The index of a window's first token among the tokens of all maps."""
    place = window % windows_per_image
    first = place // windows_per_row * window_down + place % windows_per_row * window_right
    return (window // windows_per_image).to(tl.int64) * windows_per_image * tokens + first


@triton.jit
def _offset(token, window_width, token_down, token_right):
    """The distance of a token from the first token of its window, on the map."""
    return token // window_width * token_down + token % window_width * token_right


@triton.jit
def _entry(query, key, window_width, tokens, bias_sign):
    """The entry of queries (rows) and keys (columns) in the bias table of a head."""
    width = 2 * window_width - 1
    center = (tokens // window_width - 1) * width + window_width - 1
    query_entry = bias_sign * (query // window_width * width + query % window_width)
    key_entry = bias_sign * (key // window_width * width + key % window_width)
    return (center + query_entry)[:, None] - key_entry[None, :]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bias_kernel(table_ptr, bias_ptr, bias_sign, TOKENS: tl.constexpr, WINDOW_WIDTH: tl.constexpr, PITCH: tl.constexpr):
    """The bias of all pairs of tokens, (heads, PITCH, PITCH), -inf for keys beyond the window; 16 rows a program."""
    head = tl.program_id(0) // (PITCH // 16)
    query = tl.program_id(0) % (PITCH // 16) * 16 + tl.arange(0, 16)
    entries: tl.constexpr = (2 * (TOKENS // WINDOW_WIDTH) - 1) * (2 * WINDOW_WIDTH - 1)
    target = bias_ptr + head.to(tl.int64) * PITCH * PITCH + query[:, None] * PITCH
    for start in range(0, PITCH, 64):
        key = start + tl.arange(0, 64)
        entry = head * entries + _entry(query, key, WINDOW_WIDTH, TOKENS, bias_sign)
        inside = (query < TOKENS)[:, None] & (key < TOKENS)[None, :]
        bias = tl.load(table_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr.dtype.element_ty == tl.float16:  # its range is less than that of a float32 table
            bias = tl.minimum(tl.maximum(bias, -65504.0), 65504.0)
        bias = tl.where((key < TOKENS)[None, :], bias, float("-inf"))
        tl.store(target + key[None, :], bias.to(bias_ptr.dtype.element_ty), mask=(key < PITCH)[None, :])


@triton.jit
def _tile_bias(table_ptr, head, token, same, tokens, window_width, bias_sign):
    """The bias of the tokens of a tile of whole windows, -inf for pairs that are not in the `same` window."""
    if table_ptr is None:
        bias = tl.where(same, 0.0, float("-inf"))
    else:
        height = tokens // window_width
        entry = head * (2 * height - 1) * (2 * window_width - 1)
        entry += _entry(token, token, window_width, tokens, bias_sign)
        bias = tl.load(table_ptr + entry, mask=same, other=float("-inf")).to(tl.float32)
    return bias


@triton.jit
def _sums_between(decay_ptr, head, query_valid, query_position, key_valid, key_position, num_heads):
    """The differences between the sums of decays at queries (rows) and at keys (columns)."""
    of_query = tl.load(decay_ptr + query_position * num_heads + head, mask=query_valid, other=0.0).to(tl.float32)
    of_key = tl.load(decay_ptr + key_position * num_heads + head, mask=key_valid, other=0.0).to(tl.float32)
    return of_query[:, None] - of_key[None, :]


@triton.jit
def _through_sums(
    scores_grad, decay_ptr, head, query_valid, query_position, key_valid, key_position, num_heads
):  # fmt: skip
    """dS of queries (rows) and keys (columns), times the derivative of S by the key's sum.

    The derivative by the query's sum is the opposite.
    """
    between = _sums_between(decay_ptr, head, query_valid, query_position, key_valid, key_position, num_heads)
    return tl.where(between > 0.0, scores_grad, tl.where(between < 0.0, -scores_grad, 0.0))


@triton.jit
def _scores(
    q, k, bias, query_valid, query_position, key_valid, key_position, mask_ptr, decay_ptr, head, num_heads, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of queries (rows) and keys (columns), -inf for hidden keys; `_mask` explains `mask_ptr`."""
    scores = dot(q, tl.trans(k), PRECISION) * scale + bias
    if decay_ptr is not None:
        scores -= tl.abs(
            _sums_between(decay_ptr, head, query_valid, query_position, key_valid, key_position, num_heads)
        )  # fmt: skip
    if mask_ptr is not None:
        taken = tl.load(mask_ptr + key_position, mask=key_valid, other=0)
        if mask_ptr.dtype.element_ty == tl.int32:
            wanted = tl.load(mask_ptr + query_position, mask=query_valid, other=0) | 1
            scores = tl.where(wanted[:, None] == taken[None, :], scores, float("-inf"))
        else:
            scores = tl.where(taken[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _block_scores(
    q, k, bias_ptr, mask_ptr, decay_ptr, head, query, query_position, key, key_position, num_heads, tokens, scale,
    PRECISION: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """The scores of a block of a large window's queries and one of its keys, -inf for hidden keys."""
    if bias_ptr is None:
        bias = tl.where(key < tokens, 0.0, float("-inf"))[None, :]
    else:
        bias = tl.load(bias_ptr + (head.to(tl.int64) * PITCH + query)[:, None] * PITCH + key[None, :]).to(tl.float32)
    return _scores(
        q, k, bias, query < tokens, query_position, key < tokens, key_position, mask_ptr, decay_ptr, head, num_heads,
        scale, PRECISION,
    )  # fmt: skip


@triton.jit
def _key_block(
    q, k_ptr, v_ptr, bias_ptr, mask_ptr, decay_ptr, head, query, query_position, key, first,
    scale, num_heads, token_heads, tokens, window_width, token_down, token_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """A block of a large window's keys and values, and the scores of a block of queries."""
    position = first + _offset(key, window_width, token_down, token_right)
    row = (position * token_heads + head) * HEAD_DIM
    k = load_rows(k_ptr, row, key < tokens, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, row, key < tokens, HEAD_DIM, BLOCK_D)
    scores = _block_scores(
        q, k, bias_ptr, mask_ptr, decay_ptr, head, query, query_position, key, position, num_heads, tokens, scale,
        PRECISION, PITCH,
    )  # fmt: skip
    return k, v, scores


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    qkv_ptr, q_ptr, table_ptr, mask_ptr, decay_ptr, out_ptr, lse_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, windows, tiles, tiles_per_program, pack,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WINDOW_WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + bias) v for whole windows; a program takes a head and several tiles of windows."""
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = tl.program_id(0) % num_heads
    first_tile = tl.program_id(0) // num_heads * tiles_per_program
    row = tl.arange(0, BLOCK)
    token = row % tokens
    offset = _offset(token, window_width, token_down, token_right)
    same = (row // tokens)[:, None] == (row // tokens)[None, :]
    bias = _tile_bias(table_ptr, head, token, same, tokens, window_width, bias_sign)
    for tile in range(first_tile, min(first_tile + tiles_per_program, tiles)):
        window = tile * pack
        if PACKED:
            window += row // tokens
        valid = row < tl.where(window < windows, pack * tokens, 0)
        position = offset + _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
        key_row = (position * token_heads + head) * HEAD_DIM
        if q_ptr is None:
            q = load_rows(qkv_ptr, key_row, valid, HEAD_DIM, BLOCK_D)
            key_row += num_heads * HEAD_DIM
        else:
            query = (window // windows_per_image).to(tl.int64) * tokens + token
            q = load_rows(q_ptr, (query * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        k = load_rows(qkv_ptr, key_row, valid, HEAD_DIM, BLOCK_D)
        v = load_rows(qkv_ptr, key_row + num_heads * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        scores = _scores(
            q, k, bias, valid, position, valid, position, mask_ptr, decay_ptr, head, num_heads, scale, PRECISION
        )  # fmt: skip
        top = tl.max(scores, 1) * LOG2E
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores * LOG2E - top[:, None])
        # As `softmax_end`, but with the logarithm last, which takes fewer registers.
        total = tl.sum(weights, 1)
        divisor = tl.where(total == 0.0, 1.0, total)
        acc = dot(weights.to(v.dtype), v, PRECISION) * (1.0 / divisor)[:, None]
        store_rows(out_ptr, (position * num_heads + head) * HEAD_DIM, acc, valid, HEAD_DIM, BLOCK_D)
        lse = tl.where(total == 0.0, float("inf"), top + log2(divisor, PTX))
        statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + token
        tl.store(lse_ptr + statistic, lse, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kernel(
    grad_ptr, qkv_ptr, q_ptr, table_ptr, mask_ptr, decay_ptr, lse_ptr, qkv_grad_ptr, q_partial_ptr, scores_partial_ptr,
    decay_grad_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, windows, tiles, tiles_per_program, pack, parts, groups, groups_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, WINDOW_WIDTH: tl.constexpr,
):  # fmt: skip
    """All gradients for whole windows.

    dv = P^T do, dS = P (do v^T - rowsum(P do v^T)), dq = scale dS k, dk = scale dS^T q. If S contains -|c_i - c_j| of
    sums c of decays, dc = colsum(E) - rowsum(E) with E = dS sign(c_i - c_j).
    A program takes a head and several tiles of windows. It sums dS over them for the gradient of the bias table and,
    within a group (the windows of an image), dq for the gradient of a shared query.
    """
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    part = chunk % parts
    first_group = chunk // parts * groups_per_program
    row = tl.arange(0, BLOCK)
    token = row % tokens
    offset = _offset(token, window_width, token_down, token_right)
    same = (row // tokens)[:, None] == (row // tokens)[None, :]
    bias = _tile_bias(table_ptr, head, token, same, tokens, window_width, bias_sign)
    scores_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for group in range(first_group, min(first_group + groups_per_program, groups)):
        q_acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for tile in range(part * tiles_per_program, min((part + 1) * tiles_per_program, tiles)):
            window = tile * pack
            if PACKED:
                window += row // tokens
            valid = row < tl.where(window < windows, pack * tokens, 0)
            window += group * windows
            position = offset + _first_token(
                window, tokens, windows_per_image, windows_per_row, window_down, window_right
            )
            key_row = (position * token_heads + head) * HEAD_DIM
            if q_ptr is None:
                q = load_rows(qkv_ptr, key_row, valid, HEAD_DIM, BLOCK_D)
                key_row += num_heads * HEAD_DIM
            else:
                query = (window // windows_per_image).to(tl.int64) * tokens + token
                q = load_rows(q_ptr, (query * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            k = load_rows(qkv_ptr, key_row, valid, HEAD_DIM, BLOCK_D)
            v = load_rows(qkv_ptr, key_row + num_heads * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_ptr, (position * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + token
            lse = tl.load(lse_ptr + statistic, mask=valid, other=float("inf"))
            scores = _scores(
                q, k, bias, valid, position, valid, position, mask_ptr, decay_ptr, head, num_heads, scale, PRECISION
            )  # fmt: skip
            weights = tl.exp2(scores * LOG2E - lse[:, None])
            v_grad = dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
            scores_grad = weights * dot(grad, tl.trans(v), PRECISION)
            scores_grad -= weights * tl.sum(scores_grad, 1)[:, None]
            if scores_partial_ptr is not None:
                scores_acc += scores_grad
            if decay_grad_ptr is not None:
                through = _through_sums(scores_grad, decay_ptr, head, valid, position, valid, position, num_heads)
                tl.store(
                    decay_grad_ptr + position * num_heads + head, tl.sum(through, 0) - tl.sum(through, 1), mask=valid
                )
            scores_grad = scores_grad.to(q.dtype)
            k_grad = dot(tl.trans(scores_grad), q, PRECISION) * scale
            q_grad = dot(scores_grad, k, PRECISION)
            # The gradients of q, k and v are adjacent, as in a contiguous qkv.
            if q_ptr is None:
                grad_row = (position * 3 * num_heads + head) * HEAD_DIM
                store_rows(qkv_grad_ptr, grad_row, q_grad * scale, valid, HEAD_DIM, BLOCK_D)
                grad_row += num_heads * HEAD_DIM
            else:
                grad_row = (position * 2 * num_heads + head) * HEAD_DIM
                q_acc += q_grad
            store_rows(qkv_grad_ptr, grad_row, k_grad, valid, HEAD_DIM, BLOCK_D)
            store_rows(qkv_grad_ptr, grad_row + num_heads * HEAD_DIM, v_grad, valid, HEAD_DIM, BLOCK_D)
        if q_ptr is not None:
            query = (tl.cast(group, tl.int64) * parts + part) * pack * tokens + row
            query_row = (query * num_heads + head) * HEAD_DIM
            store_rows(q_partial_ptr, query_row, q_acc * scale, row < pack * tokens, HEAD_DIM, BLOCK_D)
    if scores_partial_ptr is not None:
        target = scores_partial_ptr + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
        tl.store(target + row[:, None] * BLOCK + row[None, :], scores_acc)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_large_kernel(
    qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, out_ptr, lse_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The output by an online softmax; a program takes a head and a block of the queries of a large window."""
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = tl.program_id(0) % num_heads
    window = tl.program_id(0) // num_heads // blocks
    query = tl.program_id(0) // num_heads % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = query < tokens
    first = _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
    position = first + _offset(query, window_width, token_down, token_right)
    if q_ptr is None:
        q = load_rows(qkv_ptr, (position * token_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        k_ptr = qkv_ptr + num_heads * HEAD_DIM
    else:
        shared = (window // windows_per_image).to(tl.int64) * tokens + query
        q = load_rows(q_ptr, (shared * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        k_ptr = qkv_ptr
    v_ptr = k_ptr + num_heads * HEAD_DIM
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    whole = tokens // BLOCK * BLOCK if REST > 0 else tokens
    for start in range(0, whole, BLOCK):
        _, v, scores = _key_block(
            q, k_ptr, v_ptr, bias_ptr, mask_ptr, decay_ptr, head, query, position, start + tl.arange(0, BLOCK), first,
            scale, num_heads, token_heads, tokens, window_width, token_down, token_right, HEAD_DIM, BLOCK_D,
            PRECISION, PITCH,
        )  # fmt: skip
        highest, total, acc = softmax_step(scores, v, highest, total, acc, PRECISION, LOG2E)
    if REST > 0:
        _, v, scores = _key_block(
            q, k_ptr, v_ptr, bias_ptr, mask_ptr, decay_ptr, head, query, position, whole + tl.arange(0, REST), first,
            scale, num_heads, token_heads, tokens, window_width, token_down, token_right, HEAD_DIM, BLOCK_D,
            PRECISION, PITCH,
        )  # fmt: skip
        highest, total, acc = softmax_step(scores, v, highest, total, acc, PRECISION, LOG2E)
    # The lines of `softmax_end`, in an order that spills no registers on sm_80.
    divisor = tl.where(total == 0.0, 1.0, total)
    acc *= (1.0 / divisor)[:, None]
    store_rows(out_ptr, (position * num_heads + head) * HEAD_DIM, acc, valid, HEAD_DIM, BLOCK_D)
    lse = tl.where(total == 0.0, float("inf"), highest + log2(divisor, PTX))
    statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + query
    tl.store(lse_ptr + statistic, lse, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_q_kernel(
    grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, out_ptr, lse_ptr, delta_ptr, qkv_grad_ptr, q_partial_ptr,
    decay_grad_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, blocks, windows, windows_per_program, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do out) and dq = scale dS k of a block of queries, and their part of the sums' gradient.

    A program takes one window or, if windows share the query, some windows of an image, over which it sums dq.
    """
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads // blocks
    query = tl.program_id(0) // num_heads % blocks * BLOCK + tl.arange(0, BLOCK)
    part = chunk % parts
    valid = query < tokens
    offset = _offset(query, window_width, token_down, token_right)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for place in range(part * windows_per_program, min((part + 1) * windows_per_program, windows)):
        window = chunk // parts * windows + place
        first = _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
        position = first + offset
        if q_ptr is None:
            q = load_rows(qkv_ptr, (position * token_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            k_ptr = qkv_ptr + num_heads * HEAD_DIM
        else:
            shared = (window // windows_per_image).to(tl.int64) * tokens + query
            q = load_rows(q_ptr, (shared * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            k_ptr = qkv_ptr
        v_ptr = k_ptr + num_heads * HEAD_DIM
        out_row = (position * num_heads + head) * HEAD_DIM
        grad = load_rows(grad_ptr, out_row, valid, HEAD_DIM, BLOCK_D)
        out = load_rows(out_ptr, out_row, valid, HEAD_DIM, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + query
        tl.store(delta_ptr + statistic, delta, mask=valid)
        lse = tl.load(lse_ptr + statistic, mask=valid, other=float("inf"))
        if decay_grad_ptr is not None:
            decay_acc = tl.zeros([BLOCK], tl.float32)
        whole = tokens // BLOCK * BLOCK if REST > 0 else tokens
        for start in range(0, whole, BLOCK):
            k, v, scores = _key_block(
                q, k_ptr, v_ptr, bias_ptr, mask_ptr, decay_ptr, head, query, position, start + tl.arange(0, BLOCK),
                first, scale, num_heads, token_heads, tokens, window_width, token_down, token_right, HEAD_DIM, BLOCK_D,
                PRECISION, PITCH,
            )  # fmt: skip
            weights = tl.exp2(scores * LOG2E - lse[:, None])
            scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
            if decay_grad_ptr is not None:
                key = start + tl.arange(0, BLOCK)
                key_position = first + _offset(key, window_width, token_down, token_right)
                through = _through_sums(
                    scores_grad, decay_ptr, head, valid, position, key < tokens, key_position, num_heads
                )  # fmt: skip
                decay_acc -= tl.sum(through, 1)
            acc += dot(scores_grad.to(k.dtype), k, PRECISION)
        if REST > 0:
            k, v, scores = _key_block(
                q, k_ptr, v_ptr, bias_ptr, mask_ptr, decay_ptr, head, query, position, whole + tl.arange(0, REST),
                first, scale, num_heads, token_heads, tokens, window_width, token_down, token_right, HEAD_DIM, BLOCK_D,
                PRECISION, PITCH,
            )  # fmt: skip
            weights = tl.exp2(scores * LOG2E - lse[:, None])
            scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
            if decay_grad_ptr is not None:
                key = whole + tl.arange(0, REST)
                key_position = first + _offset(key, window_width, token_down, token_right)
                through = _through_sums(
                    scores_grad, decay_ptr, head, valid, position, key < tokens, key_position, num_heads
                )  # fmt: skip
                decay_acc -= tl.sum(through, 1)
            acc += dot(scores_grad.to(k.dtype), k, PRECISION)
        if decay_grad_ptr is not None:
            tl.store(decay_grad_ptr + position * num_heads + head, decay_acc, mask=valid)
        if q_ptr is None:
            store_rows(
                qkv_grad_ptr, (position * 3 * num_heads + head) * HEAD_DIM, acc * scale, valid, HEAD_DIM, BLOCK_D
            )
    if q_ptr is not None:
        query_row = ((chunk.to(tl.int64) * tokens + query) * num_heads + head) * HEAD_DIM
        store_rows(q_partial_ptr, query_row, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_block(
    k, grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, head, window, query, key,
    key_position, first, scale, num_heads, token_heads, tokens, window_width, windows_per_image, token_down,
    token_right, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """A block of a large window's queries and output gradients, their `delta`, and the weights of a block of keys."""
    position = first + _offset(query, window_width, token_down, token_right)
    if q_ptr is None:
        q = load_rows(qkv_ptr, (position * token_heads + head) * HEAD_DIM, query < tokens, HEAD_DIM, BLOCK_D)
    else:
        shared = (window // windows_per_image).to(tl.int64) * tokens + query
        q = load_rows(q_ptr, (shared * num_heads + head) * HEAD_DIM, query < tokens, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, (position * num_heads + head) * HEAD_DIM, query < tokens, HEAD_DIM, BLOCK_D)
    statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + query
    lse = tl.load(lse_ptr + statistic, mask=query < tokens, other=float("inf"))
    delta = tl.load(delta_ptr + statistic, mask=query < tokens, other=0.0)
    scores = _block_scores(
        q, k, bias_ptr, mask_ptr, decay_ptr, head, query, position, key, key_position, num_heads, tokens, scale,
        PRECISION, PITCH,
    )  # fmt: skip
    weights = tl.exp2(scores * LOG2E - lse[:, None])
    return q, grad, delta, weights


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kv_kernel(
    grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, qkv_grad_ptr, decay_grad_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do of a block of keys, and their part of the sums' gradient.

    A program takes a head and a block of the keys of a window.
    """
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = tl.program_id(0) % num_heads
    window = tl.program_id(0) // num_heads // blocks
    key = tl.program_id(0) // num_heads % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = key < tokens
    first = _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
    key_position = first + _offset(key, window_width, token_down, token_right)
    key_row = (key_position * token_heads + head) * HEAD_DIM
    grad_row = (key_position * 2 * num_heads + head) * HEAD_DIM
    if q_ptr is None:
        key_row += num_heads * HEAD_DIM
        grad_row = (key_position * 3 * num_heads + num_heads + head) * HEAD_DIM
    k = load_rows(qkv_ptr, key_row, valid, HEAD_DIM, BLOCK_D)
    v = load_rows(qkv_ptr, key_row + num_heads * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    k_acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    v_acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if decay_grad_ptr is not None:
        decay_acc = tl.zeros([BLOCK], tl.float32)
    whole = tokens // BLOCK * BLOCK if REST > 0 else tokens
    for start in range(0, whole, BLOCK):
        q, grad, delta, weights = _query_block(
            k, grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, head, window,
            start + tl.arange(0, BLOCK), key, key_position, first, scale, num_heads, token_heads, tokens, window_width,
            windows_per_image, token_down, token_right, HEAD_DIM, BLOCK_D, PRECISION, PITCH,
        )  # fmt: skip
        v_acc += dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
        scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        if decay_grad_ptr is not None:
            query = start + tl.arange(0, BLOCK)
            position = first + _offset(query, window_width, token_down, token_right)
            through = _through_sums(
                scores_grad, decay_ptr, head, query < tokens, position, valid, key_position, num_heads
            )  # fmt: skip
            decay_acc += tl.sum(through, 0)
        k_acc += dot(tl.trans(scores_grad.to(q.dtype)), q, PRECISION)
    if REST > 0:
        q, grad, delta, weights = _query_block(
            k, grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, head, window,
            whole + tl.arange(0, REST), key, key_position, first, scale, num_heads, token_heads, tokens, window_width,
            windows_per_image, token_down, token_right, HEAD_DIM, BLOCK_D, PRECISION, PITCH,
        )  # fmt: skip
        v_acc += dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
        scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        if decay_grad_ptr is not None:
            query = whole + tl.arange(0, REST)
            position = first + _offset(query, window_width, token_down, token_right)
            through = _through_sums(
                scores_grad, decay_ptr, head, query < tokens, position, valid, key_position, num_heads
            )  # fmt: skip
            decay_acc += tl.sum(through, 0)
        k_acc += dot(tl.trans(scores_grad.to(q.dtype)), q, PRECISION)
    if decay_grad_ptr is not None:
        tl.store(decay_grad_ptr + key_position * num_heads + head, decay_acc, mask=valid)
    store_rows(qkv_grad_ptr, grad_row, k_acc * scale, valid, HEAD_DIM, BLOCK_D)
    store_rows(qkv_grad_ptr, grad_row + num_heads * HEAD_DIM, v_acc, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_scores_kernel(
    grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, scores_partial_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, blocks, windows, windows_per_program, first_head, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """The sum of dS over some windows; a program takes a head, a block of queries and a block of keys."""
    if TOKENS > 0:
        tokens = TOKENS
        window_width = WINDOW_WIDTH
    head = first_head + tl.program_id(0) % heads
    pair = tl.program_id(0) // heads % (blocks * blocks)
    chunk = tl.program_id(0) // heads // (blocks * blocks)
    query = pair // blocks * BLOCK + tl.arange(0, BLOCK)
    key = pair % blocks * BLOCK + tl.arange(0, BLOCK)
    key_offset = _offset(key, window_width, token_down, token_right)
    allowed = (query < tokens)[:, None] & (key < tokens)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window in range(chunk * windows_per_program, min((chunk + 1) * windows_per_program, windows)):
        first = _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
        key_position = first + key_offset
        key_row = (key_position * token_heads + head) * HEAD_DIM
        if q_ptr is None:
            key_row += num_heads * HEAD_DIM
        k = load_rows(qkv_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
        v = load_rows(qkv_ptr, key_row + num_heads * HEAD_DIM, key < tokens, HEAD_DIM, BLOCK_D)
        _, grad, delta, weights = _query_block(
            k, grad_ptr, qkv_ptr, q_ptr, bias_ptr, mask_ptr, decay_ptr, lse_ptr, delta_ptr, head, window, query, key,
            key_position, first, scale, num_heads, token_heads, tokens, window_width, windows_per_image, token_down,
            token_right, HEAD_DIM, BLOCK_D, PRECISION, PITCH,
        )  # fmt: skip
        acc += weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
    target = (chunk.to(tl.int64) * heads + tl.program_id(0) % heads) * tokens + query
    tl.store(scores_partial_ptr + target[:, None] * tokens + key[None, :], acc, mask=allowed)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_table_kernel(
    scores_grad_ptr, table_grad_ptr,
    heads, rows, pitch, tokens, window_width, bias_sign,
    BLOCK_ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias table: the sums of dS (`heads`, `pitch`, `pitch`) along its diagonals.

    The first `rows` rows and columns belong to tokens of windows. A program takes a head and some entries of the table.
    """
    head = tl.program_id(0) % heads
    entry = tl.program_id(0) // heads * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    window_height = tokens // window_width
    entries = (2 * window_height - 1) * (2 * window_width - 1)
    down = bias_sign * (entry // (2 * window_width - 1) - (window_height - 1))
    right = bias_sign * (entry % (2 * window_width - 1) - (window_width - 1))
    acc = tl.zeros([BLOCK_ENTRIES, BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        key = start + tl.arange(0, BLOCK)
        y = (key % tokens // window_width)[None, :] + down[:, None]
        x = (key % window_width)[None, :] + right[:, None]
        inside = (entry < entries)[:, None] & (key < rows)[None, :]
        inside &= (y >= 0) & (y < window_height) & (x >= 0) & (x < window_width)
        query = key[None, :] + (down * window_width + right)[:, None]
        address = (head.to(tl.int64) * pitch + query) * pitch + key[None, :]
        acc += tl.load(scores_grad_ptr + address, mask=inside, other=0.0)
    target = table_grad_ptr + head * entries + entry
    tl.store(target, tl.sum(acc, 1).to(table_grad_ptr.dtype.element_ty), mask=entry < entries)


@dataclass(frozen=True)
class _Plan:
    """The layout of the windows on the map, and their tiles."""

    block: int
    pack: int  # windows per tile; 0 if a window takes several tiles
    geometry: dict[str, int]  # arguments of all kernels
    bias_sign: int
    options: dict[str, Any]
    gpu: Machine

    @property
    def fwd_stages(self) -> int:
        """Stages of the loops of the forward pass; fewer of wide heads fit in shared memory."""
        return 1 if self.gpu.is_amd else 3 if self.block == 64 else 2


def _plan(
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    num_heads: int,
    wh: int,
    ww: int,
    grid: bool,
    key_minus_query: bool,
) -> _Plan:
    _, height, width, channels = qkv.shape
    head_dim = channels // (num_heads * (3 if q is None else 2))
    rows, columns = height // wh, width // ww
    gpu = triton_common.machine(qkv)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # The largest tiles with which the backward pass does not spill registers.
    row_bytes = block_d * qkv.element_size()
    block = 64 if row_bytes <= 128 else 32
    precision = triton_common.precision(qkv.dtype, gpu)
    # Tiles of float32 that are multiplied outside of the tensor cores take the registers of more warps.
    heavy = row_bytes > 128 or (precision == "ieee" and (row_bytes > 64 or qkv.dtype == torch.float32))
    geometry = {
        "num_heads": num_heads,
        "token_heads": qkv.stride(2) // head_dim,
        "tokens": wh * ww,
        "window_width": ww,
        "windows_per_image": rows * columns,
        "windows_per_row": columns,
        "window_down": width if grid else wh * width,
        "window_right": 1 if grid else ww,
        "token_down": rows * width if grid else width,
        "token_right": columns if grid else 1,
    }
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": block,
        "PRECISION": precision,
        # Windows with a bias have one size in a model. Stripes grow with the map: no kernel is compiled for their size.
        "TOKENS": 0 if bias_table is None else wh * ww,
        "WINDOW_WIDTH": 0 if bias_table is None else ww,
        "num_warps": 8 if heavy and not gpu.is_amd else 4,
    }
    return _Plan(block, block // (wh * ww), geometry, -1 if key_minus_query else 1, options, gpu)


def _readable(qkv: Tensor, head_dim: int) -> Tensor:
    """`qkv` if its tokens are evenly spaced and aligned to heads, as in a Linear's output or a slice of one."""
    down, right, inner = qkv.stride(1), qkv.stride(2), qkv.stride(3)
    even = down == qkv.shape[2] * right and qkv.stride(0) == qkv.shape[1] * down
    return triton_common.aligned(qkv) if even and inner == 1 and right % head_dim == 0 else qkv.contiguous()


def _arguments(
    plan: _Plan,
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    regions: Tensor | None,
    line_decay: Tensor | None,
    lse: Tensor,
    scale: float,
) -> dict[str, Any]:
    """The arguments of all kernels but the last."""
    return {
        "qkv_ptr": qkv,
        "q_ptr": None if q is None else q.contiguous(),
        **_bias(plan, bias_table, qkv.dtype),
        "mask_ptr": _mask(qkv, key_mask, regions),
        "decay_ptr": None if line_decay is None else line_decay.contiguous(),
        "lse_ptr": lse,
        "scale": scale,
        **plan.geometry,
        **plan.options,
    }


def _mask(qkv: Tensor, key_mask: Tensor | None, regions: Tensor | None) -> Tensor | None:
    """What the kernels read to hide keys, (B, H, W): a mask of keys, bool, or a code of each token, int32.

    The code is twice the label of the token, plus 1 if the token may be attended to. A query attends to a key if the
    codes are the same once 1 is set in the query's.
    """
    if regions is None:
        return None if key_mask is None else key_mask.contiguous()
    taken = 1 if key_mask is None else key_mask.int()
    return (2 * regions.int() + taken).expand(qkv.shape[0], -1, -1).contiguous()


def _bias(plan: _Plan, table: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments for the bias; for windows of several tiles, the bias of all pairs of tokens is computed."""
    table = None if table is None else table.contiguous()
    if plan.pack > 0:
        return {"table_ptr": table, "bias_sign": plan.bias_sign}
    if table is None:
        return {"bias_ptr": None, "PITCH": 0, "REST": 0}
    tokens = plan.options["TOKENS"]
    pitch = triton.cdiv(tokens, plan.block) * plan.block
    # Two bytes for half precision; a float32 table, as of autocast, is rounded to float16, finer than bfloat16.
    half = table.dtype == torch.float32 and dtype != torch.float32
    bias = table.new_empty(table.shape[0], pitch, pitch, dtype=torch.float16 if half else table.dtype)
    triton_common.launch(
        _bias_kernel,
        (table.shape[0] * pitch // 16,),
        table_ptr=table,
        bias_ptr=bias,
        bias_sign=plan.bias_sign,
        TOKENS=tokens,
        WINDOW_WIDTH=plan.options["WINDOW_WIDTH"],
        PITCH=pitch,
        num_warps=4,
        num_stages=1,
    )
    rest = max(16, triton.next_power_of_2(tokens % plan.block)) if tokens % plan.block else 0
    return {"bias_ptr": bias, "PITCH": pitch, "REST": rest if rest < plan.block else 0}


def _register_limit(plan: _Plan, arguments: dict[str, Any], limit: int) -> dict[str, int]:
    """The option that lets a thread have `limit` registers, so that one more program fits on a processor.

    Only where it was timed, and where at most 64 bytes are spilled. A program that is traced has no such option.
    """
    spills = any(arguments[name] is not None for name in ("q_ptr", "mask_ptr", "decay_ptr"))
    spills |= plan.options["BLOCK_D"] > 32
    timed = plan.gpu.name == "sm_90" and arguments["qkv_ptr"].element_size() == 2
    return {"maxnreg": limit} if timed and not spills and not triton_common.is_traced(_bwd_kernel) else {}


def _at_least_one(number: int) -> int:
    return cast("int", torch.sym_max(number, 1))


def forward(
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    regions: Tensor | None,
    line_decay: Tensor | None,
    *,
    num_heads: int,
    wh: int,
    ww: int,
    grid: bool,
    key_minus_query: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `op.forward`."""
    batch, height, width, channels = qkv.shape
    inner = channels // (3 if q is None else 2)
    qkv = _readable(qkv, inner // num_heads)
    plan = _plan(qkv, q, bias_table, num_heads, wh, ww, grid, key_minus_query)
    windows = batch * plan.geometry["windows_per_image"]
    out = qkv.new_empty(batch, height, width, inner)
    lse = qkv.new_empty(windows, num_heads, wh * ww, dtype=torch.float32)
    arguments = _arguments(plan, qkv, q, bias_table, key_mask, regions, line_decay, lse, scale)
    precision = triton_common.precision(qkv.dtype, plan.gpu, memory_bound=plan.pack > 0)
    arguments |= {"out_ptr": out, "PRECISION": precision, "PTX": plan.gpu.has_ptx}
    if plan.pack == 0:
        blocks = triton.cdiv(wh * ww, plan.block)
        triton_common.launch(
            _fwd_large_kernel, (num_heads * blocks * windows,), **arguments, blocks=blocks, num_stages=plan.fwd_stages
        )
        return out, lse
    tiles = triton.cdiv(windows, plan.pack)
    tiles_per_program = _at_least_one(triton.cdiv(tiles * num_heads, FWD_PROGRAMS * plan.gpu.num_processors))
    triton_common.launch(
        _fwd_kernel,
        (num_heads * triton.cdiv(tiles, tiles_per_program),),
        **arguments,
        windows=windows,
        tiles=tiles,
        tiles_per_program=tiles_per_program,
        pack=plan.pack,
        PACKED=plan.pack > 1,
        num_stages=plan.fwd_stages,
    )
    return out, lse


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
    *,
    num_heads: int,
    wh: int,
    ww: int,
    grid: bool,
    key_minus_query: bool,
    scale: float,
    bias_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    qkv = _readable(qkv, out.shape[3] // num_heads)
    plan = _plan(qkv, q, bias_table, num_heads, wh, ww, grid, key_minus_query)
    qkv_grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = _arguments(plan, qkv, q, bias_table, key_mask, regions, line_decay, lse, scale)
    arguments |= {"grad_ptr": grad.contiguous(), "num_stages": 1}
    # With a shared query, its gradient is summed over the windows of an image, a group; else all windows are one group.
    groups, windows = (1, lse.shape[0]) if q is None else (qkv.shape[0], plan.geometry["windows_per_image"])
    table_grad = qkv.new_empty(0)
    if bias_table is not None and bias_grad:
        table_grad = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    sums_grad = None
    if line_decay is not None and decay_grad:  # for large windows, the parts of queries and of keys
        sums_grad = line_decay.new_empty(2 if plan.pack == 0 else 1, *line_decay.shape, dtype=torch.float32)
    gradients = _backward_large if plan.pack == 0 else _backward_small
    q_partial = gradients(plan, arguments, groups, windows, qkv_grad, out, table_grad, sums_grad)
    q_grad, line_decay_grad = qkv.new_empty(0), qkv.new_empty(0)  # outputs of an operator must not be the same tensor
    if q is not None and q_partial is not None:
        q_grad = q_partial.sum(1).reshape(q.shape).to(q.dtype)
    if line_decay is not None and sums_grad is not None:
        line_decay_grad = sums_grad.sum(0).to(line_decay.dtype)
    return qkv_grad, q_grad, table_grad, line_decay_grad


def _backward_small(
    plan: _Plan,
    arguments: dict[str, Any],
    groups: int,
    windows: int,
    qkv_grad: Tensor,
    out: Tensor,
    table_grad: Tensor,
    sums_grad: Tensor | None,
) -> Tensor | None:
    """Write the gradients of qkv, of the table and, in one or two parts, of the sums of decays.

    Returns the partial sums (B, parts, T, N, D) of a shared query's gradient.
    """
    num_heads, tokens = plan.geometry["num_heads"], plan.geometry["tokens"]
    shared = arguments["q_ptr"] is not None
    tiles = triton.cdiv(windows, plan.pack)
    # Few programs, since each writes a tile of dS: as many as fit on the processors.
    limit = _register_limit(plan, arguments, 168)
    programs = (3 if limit else 2) * plan.gpu.num_processors
    tiles_each = _at_least_one(triton.cdiv(groups * tiles * num_heads, programs))
    tiles_per_program = _at_least_one(torch.sym_min(tiles_each, tiles))
    groups_per_program = _at_least_one(tiles_each // _at_least_one(tiles))
    parts = triton.cdiv(tiles, tiles_per_program)
    chunks = parts * triton.cdiv(groups, groups_per_program)
    q_partial = scores_partial = None
    if shared:
        q_partial = out.new_empty(
            groups, parts * plan.pack, tokens, num_heads, out.shape[3] // num_heads, dtype=torch.float32
        )
    if table_grad.numel():
        scores_partial = out.new_empty(chunks, num_heads, plan.block, plan.block, dtype=torch.float32)
    triton_common.launch(
        _bwd_kernel,
        (num_heads * chunks,),
        **arguments,
        **limit,
        qkv_grad_ptr=qkv_grad,
        q_partial_ptr=q_partial,
        scores_partial_ptr=scores_partial,
        decay_grad_ptr=sums_grad,
        windows=windows,
        tiles=tiles,
        tiles_per_program=tiles_per_program,
        pack=plan.pack,
        parts=parts,
        groups=groups,
        groups_per_program=groups_per_program,
        PACKED=plan.pack > 1,
    )
    if scores_partial is not None:
        _add_up_table(plan, scores_partial.sum(0), table_grad, plan.pack * tokens)
    return q_partial


def _backward_large(
    plan: _Plan,
    arguments: dict[str, Any],
    groups: int,
    windows: int,
    qkv_grad: Tensor,
    out: Tensor,
    table_grad: Tensor,
    sums_grad: Tensor | None,
) -> Tensor | None:
    """Write the gradients of qkv, of the table and, in one or two parts, of the sums of decays.

    Returns the partial sums (B, parts, T, N, D) of a shared query's gradient.
    """
    num_heads, tokens = plan.geometry["num_heads"], plan.geometry["tokens"]
    all_windows = groups * windows
    blocks = triton.cdiv(tokens, plan.block)
    delta = torch.empty_like(arguments["lse_ptr"])
    q_partial, parts, windows_per_program = None, 1, 1
    if arguments["q_ptr"] is None:
        groups, windows = windows, 1
    else:
        windows_per_program = triton.cdiv(all_windows * num_heads * blocks, 8 * plan.gpu.num_processors)
        windows_per_program = _at_least_one(torch.sym_min(windows_per_program, windows))
        parts = triton.cdiv(windows, windows_per_program)
        q_partial = out.new_empty(groups, parts, tokens, num_heads, out.shape[3] // num_heads, dtype=torch.float32)
    arguments |= {"delta_ptr": delta, "blocks": blocks}
    triton_common.launch(
        _bwd_q_kernel,
        (num_heads * blocks * parts * groups,),
        **arguments,
        out_ptr=out,
        qkv_grad_ptr=qkv_grad,
        q_partial_ptr=q_partial,
        decay_grad_ptr=None if sums_grad is None else sums_grad[0],
        windows=windows,
        windows_per_program=windows_per_program,
        parts=parts,
    )
    triton_common.launch(
        _bwd_kv_kernel,
        (num_heads * blocks * all_windows,),
        **arguments,
        **_register_limit(plan, arguments, 128),
        qkv_grad_ptr=qkv_grad,
        decay_grad_ptr=None if sums_grad is None else sums_grad[1],
    )
    if table_grad.numel():
        # As many heads and partial sums at a time as MAX_PARTIAL_BYTES allows.
        room = max(1, MAX_PARTIAL_BYTES // (4 * tokens**2))
        step = min(num_heads, room)
        chunks = max(1, min(room // step, SCORES_PROGRAMS * plan.gpu.num_processors // (step * blocks**2)))
        windows_per_program = _at_least_one(triton.cdiv(all_windows, chunks))
        chunks = triton.cdiv(all_windows, windows_per_program)
        for first_head in range(0, num_heads, step):
            heads = min(step, num_heads - first_head)
            scores_partial = out.new_empty(chunks, heads, tokens, tokens, dtype=torch.float32)
            triton_common.launch(
                _bwd_scores_kernel,
                (heads * blocks**2 * chunks,),
                **{name: value for name, value in arguments.items() if name != "REST"},
                scores_partial_ptr=scores_partial,
                windows=all_windows,
                windows_per_program=windows_per_program,
                first_head=first_head,
                heads=heads,
            )
            _add_up_table(plan, scores_partial.sum(0), table_grad[first_head : first_head + heads], tokens)
    return q_partial


def _add_up_table(plan: _Plan, scores_grad: Tensor, table_grad: Tensor, rows: int) -> None:
    """Write `table_grad`, given dS (heads, pitch, pitch)."""
    heads, height, width = table_grad.shape
    entries_per_program = 16
    triton_common.launch(
        _bwd_table_kernel,
        (heads * triton.cdiv(height * width, entries_per_program),),
        scores_grad_ptr=scores_grad,
        table_grad_ptr=table_grad,
        heads=heads,
        rows=rows,
        pitch=scores_grad.shape[1],
        tokens=plan.geometry["tokens"],
        window_width=plan.geometry["window_width"],
        bias_sign=plan.bias_sign,
        BLOCK_ENTRIES=entries_per_program,
        BLOCK=64,
        num_warps=4,
        num_stages=1,
    )
