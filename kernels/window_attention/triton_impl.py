"""Window attention in Triton: a tile per window or per several small ones, a loop over tiles for large windows.

The kernels read and write the tokens of a window at their positions on the map, so that windows are never copied.
Windows are numbered across all images.

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
from zoo.kernels.triton_common import LOG2E, Machine, dot, load_rows, softmax_step, store_rows

# The largest size of the partial sums of the bias table's gradient.
MAX_PARTIAL_BYTES = 64 << 20
# The alignment of addresses follows from HEAD_DIM, so one compiled kernel serves all sizes.
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
def _added(table_ptr, head, query, key, allowed, tokens, window_width, bias_sign):
    """The base-2 bias of the scores of queries (rows) and keys (columns), -inf for pairs that are not `allowed`."""
    if table_ptr is None:
        added = tl.where(allowed, 0.0, float("-inf"))
    else:
        width = 2 * window_width - 1
        center = (tokens // window_width - 1) * width + window_width - 1
        query_entry = bias_sign * (query // window_width * width + query % window_width)
        key_entry = bias_sign * (key // window_width * width + key % window_width)
        entry = (head * (2 * center + 1) + center + query_entry)[:, None] - key_entry[None, :]
        added = tl.load(table_ptr + entry, mask=allowed, other=float("-inf")).to(tl.float32) * LOG2E
    return added


@triton.jit
def _scores(q, k, added, key_valid, key_position, mask_ptr, scale, PRECISION: tl.constexpr):
    """Base-2 scores of queries (rows) and keys (columns), -inf for hidden keys."""
    scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + added
    if mask_ptr is not None:
        taken = tl.load(mask_ptr + key_position, mask=key_valid, other=False)
        scores = tl.where(taken[None, :], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    qkv_ptr, q_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, windows, tiles, tiles_per_program, pack,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + bias) v for whole windows; a program takes a head and several tiles of windows."""
    head = tl.program_id(0) % num_heads
    first_tile = tl.program_id(0) // num_heads * tiles_per_program
    row = tl.arange(0, BLOCK)
    token = row % tokens
    offset = _offset(token, window_width, token_down, token_right)
    same = (row // tokens)[:, None] == (row // tokens)[None, :]
    added = _added(table_ptr, head, token, token, same, tokens, window_width, bias_sign)
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
        scores = _scores(q, k, added, valid, position, mask_ptr, scale, PRECISION)
        top = tl.max(scores, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - top[:, None])
        # As `softmax_end`, but with the logarithm last, which takes fewer registers.
        total = tl.sum(weights, 1)
        divisor = tl.where(total == 0.0, 1.0, total)
        acc = dot(weights.to(v.dtype), v, PRECISION) / divisor[:, None]
        store_rows(out_ptr, (position * num_heads + head) * HEAD_DIM, acc, valid, HEAD_DIM, BLOCK_D)
        lse = tl.where(total == 0.0, float("inf"), top + tl.log2(divisor))
        statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + token
        tl.store(lse_ptr + statistic, lse, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kernel(
    grad_ptr, qkv_ptr, q_ptr, table_ptr, mask_ptr, lse_ptr, qkv_grad_ptr, q_partial_ptr, scores_partial_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, windows, tiles, tiles_per_program, pack, parts, groups, groups_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients for whole windows.

    dv = P^T do, dS = P (do v^T - rowsum(P do v^T)), dq = scale dS k, dk = scale dS^T q.
    A program takes a head and several tiles of windows. It sums dS over them for the gradient of the bias table and,
    within a group (the windows of an image), dq for the gradient of a shared query.
    """
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    part = chunk % parts
    first_group = chunk // parts * groups_per_program
    row = tl.arange(0, BLOCK)
    token = row % tokens
    offset = _offset(token, window_width, token_down, token_right)
    same = (row // tokens)[:, None] == (row // tokens)[None, :]
    added = _added(table_ptr, head, token, token, same, tokens, window_width, bias_sign)
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
            scores = _scores(q, k, added, valid, position, mask_ptr, scale, PRECISION)
            weights = tl.exp2(scores - lse[:, None])
            v_grad = dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
            scores_grad = weights * dot(grad, tl.trans(v), PRECISION)
            scores_grad -= weights * tl.sum(scores_grad, 1)[:, None]
            if scores_partial_ptr is not None:
                scores_acc += scores_grad
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
    qkv_ptr, q_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output by an online softmax; a program takes a head and a block of the queries of a large window."""
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
    for start in range(0, tokens, BLOCK):
        key = start + tl.arange(0, BLOCK)
        key_position = first + _offset(key, window_width, token_down, token_right)
        key_row = (key_position * token_heads + head) * HEAD_DIM
        k = load_rows(k_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
        allowed = (query < tokens)[:, None] & (key < tokens)[None, :]
        added = _added(table_ptr, head, query, key, allowed, tokens, window_width, bias_sign)
        scores = _scores(q, k, added, key < tokens, key_position, mask_ptr, scale, PRECISION)
        highest, total, acc = softmax_step(scores, v, highest, total, acc, PRECISION)
    # The lines of `softmax_end`, in an order that spills no registers on sm_80.
    divisor = tl.where(total == 0.0, 1.0, total)
    acc /= divisor[:, None]
    store_rows(out_ptr, (position * num_heads + head) * HEAD_DIM, acc, valid, HEAD_DIM, BLOCK_D)
    lse = tl.where(total == 0.0, float("inf"), highest + tl.log2(divisor))
    statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + query
    tl.store(lse_ptr + statistic, lse, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_q_kernel(
    grad_ptr, qkv_ptr, q_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr, delta_ptr, qkv_grad_ptr, q_partial_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, blocks, windows, windows_per_program, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do out) and dq = scale dS k of a block of queries.

    A program takes one window or, if windows share the query, some windows of an image, over which it sums dq.
    """
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
        for start in range(0, tokens, BLOCK):
            key = start + tl.arange(0, BLOCK)
            key_position = first + _offset(key, window_width, token_down, token_right)
            key_row = (key_position * token_heads + head) * HEAD_DIM
            k = load_rows(k_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
            v = load_rows(v_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
            allowed = (query < tokens)[:, None] & (key < tokens)[None, :]
            added = _added(table_ptr, head, query, key, allowed, tokens, window_width, bias_sign)
            scores = _scores(q, k, added, key < tokens, key_position, mask_ptr, scale, PRECISION)
            weights = tl.exp2(scores - lse[:, None])
            scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
            acc += dot(scores_grad.to(k.dtype), k, PRECISION)
        if q_ptr is None:
            store_rows(
                qkv_grad_ptr, (position * 3 * num_heads + head) * HEAD_DIM, acc * scale, valid, HEAD_DIM, BLOCK_D
            )
    if q_ptr is not None:
        query_row = ((chunk.to(tl.int64) * tokens + query) * num_heads + head) * HEAD_DIM
        store_rows(q_partial_ptr, query_row, acc * scale, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kv_kernel(
    grad_ptr, qkv_ptr, q_ptr, table_ptr, mask_ptr, lse_ptr, delta_ptr, qkv_grad_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = P^T do; a program takes a head and a block of the keys of a window."""
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
    for start in range(0, tokens, BLOCK):
        query = start + tl.arange(0, BLOCK)
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
        allowed = (query < tokens)[:, None] & (key < tokens)[None, :]
        added = _added(table_ptr, head, query, key, allowed, tokens, window_width, bias_sign)
        scores = _scores(q, k, added, valid, key_position, mask_ptr, scale, PRECISION)
        weights = tl.exp2(scores - lse[:, None])
        v_acc += dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
        scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        k_acc += dot(tl.trans(scores_grad.to(q.dtype)), q, PRECISION)
    store_rows(qkv_grad_ptr, grad_row, k_acc * scale, valid, HEAD_DIM, BLOCK_D)
    store_rows(qkv_grad_ptr, grad_row + num_heads * HEAD_DIM, v_acc, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_scores_kernel(
    grad_ptr, qkv_ptr, q_ptr, table_ptr, mask_ptr, lse_ptr, delta_ptr, scores_partial_ptr,
    scale, num_heads, token_heads, tokens, window_width, windows_per_image, windows_per_row, window_down, window_right,
    token_down, token_right, bias_sign, blocks, windows, windows_per_program, first_head, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of dS over some windows; a program takes a head, a block of queries and a block of keys."""
    head = first_head + tl.program_id(0) % heads
    pair = tl.program_id(0) // heads % (blocks * blocks)
    chunk = tl.program_id(0) // heads // (blocks * blocks)
    query = pair // blocks * BLOCK + tl.arange(0, BLOCK)
    key = pair % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = query < tokens
    offset = _offset(query, window_width, token_down, token_right)
    key_offset = _offset(key, window_width, token_down, token_right)
    allowed = valid[:, None] & (key < tokens)[None, :]
    added = _added(table_ptr, head, query, key, allowed, tokens, window_width, bias_sign)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window in range(chunk * windows_per_program, min((chunk + 1) * windows_per_program, windows)):
        first = _first_token(window, tokens, windows_per_image, windows_per_row, window_down, window_right)
        position = first + offset
        key_position = first + key_offset
        key_row = (key_position * token_heads + head) * HEAD_DIM
        if q_ptr is None:
            q = load_rows(qkv_ptr, (position * token_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
            key_row += num_heads * HEAD_DIM
        else:
            shared = (window // windows_per_image).to(tl.int64) * tokens + query
            q = load_rows(q_ptr, (shared * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        k = load_rows(qkv_ptr, key_row, key < tokens, HEAD_DIM, BLOCK_D)
        v = load_rows(qkv_ptr, key_row + num_heads * HEAD_DIM, key < tokens, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, (position * num_heads + head) * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        statistic = (tl.cast(window, tl.int64) * num_heads + head) * tokens + query
        lse = tl.load(lse_ptr + statistic, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + statistic, mask=valid, other=0.0)
        scores = _scores(q, k, added, key < tokens, key_position, mask_ptr, scale, PRECISION)
        weights = tl.exp2(scores - lse[:, None])
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
    programs: int  # enough to fill the GPU
    geometry: dict[str, int]  # arguments of all kernels
    options: dict[str, Any]
    gpu: Machine


def _plan(qkv: Tensor, q: Tensor | None, num_heads: int, wh: int, ww: int, grid: bool, key_minus_query: bool) -> _Plan:
    _, height, width, channels = qkv.shape
    head_dim = channels // (num_heads * (3 if q is None else 2))
    rows, columns = height // wh, width // ww
    gpu = triton_common.machine(qkv)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # The largest tiles with which the backward pass does not spill registers.
    row_bytes = block_d * qkv.element_size()
    block = 64 if row_bytes <= 128 else 32
    heavy = row_bytes > 64 or qkv.element_size() == 4
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
        "bias_sign": -1 if key_minus_query else 1,
    }
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": block,
        "PRECISION": triton_common.precision(qkv.dtype, gpu),
        "num_warps": 8 if heavy and not gpu.is_amd else 4,
    }
    return _Plan(block, block // (wh * ww), 8 * gpu.num_processors, geometry, options, gpu)


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
    lse: Tensor,
    scale: float,
) -> dict[str, Any]:
    """The arguments of all kernels but the last."""
    return {
        "qkv_ptr": qkv,
        "q_ptr": None if q is None else q.contiguous(),
        "table_ptr": None if bias_table is None else bias_table.contiguous(),
        "mask_ptr": None if key_mask is None else key_mask.contiguous(),
        "lse_ptr": lse,
        "scale": scale,
        **plan.geometry,
        **plan.options,
    }


def _at_least_one(number: int) -> int:
    return cast("int", torch.sym_max(number, 1))


def forward(
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
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
    plan = _plan(qkv, q, num_heads, wh, ww, grid, key_minus_query)
    windows = batch * plan.geometry["windows_per_image"]
    out = qkv.new_empty(batch, height, width, inner)
    lse = qkv.new_empty(windows, num_heads, wh * ww, dtype=torch.float32)
    arguments = _arguments(plan, qkv, q, bias_table, key_mask, lse, scale) | {"out_ptr": out}
    if plan.pack == 0:
        blocks = triton.cdiv(wh * ww, plan.block)
        triton_common.launch(
            _fwd_large_kernel, (num_heads * blocks * windows,), **arguments, blocks=blocks, num_stages=1
        )
        return out, lse
    tiles = triton.cdiv(windows, plan.pack)
    tiles_per_program = _at_least_one(triton.cdiv(tiles * num_heads, plan.programs))
    triton_common.launch(
        _fwd_kernel,
        (num_heads * triton.cdiv(tiles, tiles_per_program),),
        **arguments,
        windows=windows,
        tiles=tiles,
        tiles_per_program=tiles_per_program,
        pack=plan.pack,
        PACKED=plan.pack > 1,
        num_stages=1 if plan.gpu.is_amd else 2,
    )
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    q: Tensor | None,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    qkv = _readable(qkv, out.shape[3] // num_heads)
    plan = _plan(qkv, q, num_heads, wh, ww, grid, key_minus_query)
    qkv_grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = _arguments(plan, qkv, q, bias_table, key_mask, lse, scale)
    arguments |= {"grad_ptr": grad.contiguous(), "num_stages": 1}
    # With a shared query, its gradient is summed over the windows of an image, a group; else all windows are one group.
    groups, windows = (1, lse.shape[0]) if q is None else (qkv.shape[0], plan.geometry["windows_per_image"])
    table_grad = qkv.new_empty(0)
    if bias_table is not None and bias_grad:
        table_grad = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    gradients = _backward_large if plan.pack == 0 else _backward_small
    q_partial = gradients(plan, arguments, groups, windows, qkv_grad, out, table_grad)
    if q is None or q_partial is None:
        return qkv_grad, qkv.new_empty(0), table_grad
    return qkv_grad, q_partial.sum(1).reshape(q.shape).to(q.dtype), table_grad


def _backward_small(
    plan: _Plan,
    arguments: dict[str, Any],
    groups: int,
    windows: int,
    qkv_grad: Tensor,
    out: Tensor,
    table_grad: Tensor,
) -> Tensor | None:
    """Write `qkv_grad` and `table_grad`; return the partial sums (B, parts, T, N, D) of a shared query's gradient."""
    num_heads, tokens = plan.geometry["num_heads"], plan.geometry["tokens"]
    shared = arguments["q_ptr"] is not None
    tiles = triton.cdiv(windows, plan.pack)
    # Few programs, since each writes a tile of dS; two of them fit on a processor.
    tiles_each = _at_least_one(triton.cdiv(groups * tiles * num_heads, plan.programs // 2))
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
        qkv_grad_ptr=qkv_grad,
        q_partial_ptr=q_partial,
        scores_partial_ptr=scores_partial,
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
) -> Tensor | None:
    """Write `qkv_grad` and `table_grad`; return the partial sums (B, parts, T, N, D) of a shared query's gradient."""
    num_heads, tokens = plan.geometry["num_heads"], plan.geometry["tokens"]
    all_windows = groups * windows
    blocks = triton.cdiv(tokens, plan.block)
    delta = torch.empty_like(arguments["lse_ptr"])
    q_partial, parts, windows_per_program = None, 1, 1
    if arguments["q_ptr"] is None:
        groups, windows = windows, 1
    else:
        windows_per_program = triton.cdiv(all_windows * num_heads * blocks, plan.programs)
        windows_per_program = _at_least_one(torch.sym_min(windows_per_program, windows))
        parts = triton.cdiv(windows, windows_per_program)
        q_partial = out.new_empty(groups, parts, tokens, num_heads, out.shape[3] // num_heads, dtype=torch.float32)
    triton_common.launch(
        _bwd_q_kernel,
        (num_heads * blocks * parts * groups,),
        **arguments,
        out_ptr=out,
        delta_ptr=delta,
        qkv_grad_ptr=qkv_grad,
        q_partial_ptr=q_partial,
        blocks=blocks,
        windows=windows,
        windows_per_program=windows_per_program,
        parts=parts,
    )
    triton_common.launch(
        _bwd_kv_kernel,
        (num_heads * blocks * all_windows,),
        **arguments,
        delta_ptr=delta,
        qkv_grad_ptr=qkv_grad,
        blocks=blocks,
    )
    if table_grad.numel():
        # As many heads and partial sums at a time as MAX_PARTIAL_BYTES allows.
        room = max(1, MAX_PARTIAL_BYTES // (4 * tokens**2))
        step = min(num_heads, room)
        chunks = max(1, min(room // step, plan.programs // 2 // (step * blocks**2)))
        windows_per_program = _at_least_one(triton.cdiv(all_windows, chunks))
        chunks = triton.cdiv(all_windows, windows_per_program)
        for first_head in range(0, num_heads, step):
            heads = min(step, num_heads - first_head)
            scores_partial = out.new_empty(chunks, heads, tokens, tokens, dtype=torch.float32)
            triton_common.launch(
                _bwd_scores_kernel,
                (heads * blocks**2 * chunks,),
                **arguments,
                delta_ptr=delta,
                scores_partial_ptr=scores_partial,
                blocks=blocks,
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
        bias_sign=plan.geometry["bias_sign"],
        BLOCK_ENTRIES=entries_per_program,
        BLOCK=64,
        num_warps=4,
        num_stages=1,
    )
