"""Neighborhood attention in Triton, forward and backward, on qkv as a Linear writes it.

A program takes the queries (for the gradients of key and value: the keys) of one tile of one dilation group, and loops
over the rectangle of their keys (queries) in steps of STEP_H x STEP_W. The softmax is computed in base 2.

Letters: B images, N heads, D head dim. Places, windows and dilation groups are those of `op.neighborhood_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import cost_model, triton_common
from zoo.kernels.triton_common import LOG2E, dot, load_rows, softmax_end, softmax_step, store_rows

# One compiled kernel serves all maps: specializing it on these sizes would not make it faster.
NOT_SPECIALIZED = ("batch", "height", "width", "num_heads", "dilation_h", "dilation_w", "per_program", "chunks")

# The sign bits of both halves of 32 bits.
SIGNS: tl.constexpr = tl.constexpr(-0x7FFF8000)


@triton.jit
def _window(place, places, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first neighbour of `place` in a group of `places`, and the place after the last."""
    if CAUSAL:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE - 1, places - 1)
        start = tl.maximum(leader - KERNEL + 1, 0)
        stop = place + 1
    else:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE // 2, places - 1)
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), places - KERNEL)
        stop = start + KERNEL
    return start, stop


@triton.jit
def _windows(first, last, places, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The neighbours of the places from `first` to `last`; neither end of the window ever moves back."""
    start, _ = _window(first, places, KERNEL, STRIDE, CAUSAL)
    _, stop = _window(last, places, KERNEL, STRIDE, CAUSAL)
    return start, stop


@triton.jit
def _watchers(first, last, places, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The queries that have one of the places from `first` to `last` as a neighbour: the inverse of `_windows`.

    No stride exceeds the kernel, so every place is a neighbour, and `whole` covers the clamped leaders at the end.
    """
    if CAUSAL:
        start = first
        leader = last + KERNEL - 1
        group = (leader - STRIDE + 1) // STRIDE
        whole = leader >= places - 1
    else:
        leader = first - KERNEL + 1 + KERNEL // 2
        group = tl.maximum(leader - STRIDE // 2 + STRIDE - 1, 0) // STRIDE
        start = tl.where(first < KERNEL, 0, group * STRIDE)
        group = (last + KERNEL // 2 - STRIDE // 2) // STRIDE
        whole = last >= places - KERNEL
    return start, tl.where(whole, places, tl.minimum((group + 1) * STRIDE, places))


@triton.jit
def _axis_tile(index, tiles, length, dilation, TILE: tl.constexpr):
    """Tile `index` of an axis with `tiles` per group: its group, first and last place, and the places of the group."""
    group = index // tiles
    places = (length - group + dilation - 1) // dilation
    first = index % tiles * TILE
    return group, first, tl.minimum(first + TILE, places) - 1, places


@triton.jit
def _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The head, image and tile of a program; the head varies fastest."""
    row_tiles, column_tiles = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H), tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    head, pid = pid % num_heads, pid // num_heads
    across, pid = pid % (column_tiles * dilation_w), pid // (column_tiles * dilation_w)
    down, image = pid % (row_tiles * dilation_h), (pid // (row_tiles * dilation_h)).to(tl.int64)
    row_tile = _axis_tile(down, row_tiles, height, dilation_h, TILE_H)
    column_tile = _axis_tile(across, column_tiles, width, dilation_w, TILE_W)
    return head, image, row_tile, column_tile


@triton.jit
def _rectangle(first_row, first_column, bottom, right, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of the places of a rectangle, and which of them are above `bottom` and left of `right`."""
    index = tl.arange(0, HEIGHT * WIDTH)
    row, column = first_row + index // WIDTH, first_column + index % WIDTH
    return row, column, (row < bottom) & (column < right)


@triton.jit
def _token(image, row, column, row_group, column_group, height, width, dilation_h, dilation_w):
    """The index of the token at a place of a dilation group."""
    return (image * height + row * dilation_h + row_group) * width + column * dilation_w + column_group


@triton.jit
def _offset(token, slots, slot, HEAD_DIM: tl.constexpr):
    """The offset of slot number `slot` of the `slots` of HEAD_DIM elements that each token has."""
    return (token * slots + slot) * HEAD_DIM


@triton.jit
def _scores(
    products, table_ptr, head, scale, query_row, query_column, key_row, key_column, query_valid, rows, columns,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
):  # fmt: skip
    """Scores, -inf for keys that are no neighbours; queries and keys have shapes that broadcast."""
    top, bottom = _window(query_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _window(query_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    # Row and column are the halves of one integer: one subtraction per pair, few registers per query. A negative half
    # borrows from the other, which does no harm: its own sign excludes the pair.
    start = tl.where(query_valid, top * 65536 + left, 0x40000000)
    size = (bottom - top - 1) * 65536 + (right - left - 1)
    ahead = key_row * 65536 + key_column - start
    inside = ((ahead | (size - ahead)) & SIGNS) == 0
    if table_ptr is None:
        return tl.where(inside, products * scale, float("-inf"))
    else:
        PITCH: tl.constexpr = 2 * KERNEL_W - 1
        query_entry = query_row * PITCH + query_column - (KERNEL_H - 1) * PITCH - (KERNEL_W - 1)
        entry = key_row * PITCH + key_column - query_entry
        table_ptr += head * (2 * KERNEL_H - 1) * PITCH
        # The bias is loaded last: in the other order, kernels take up to 16 registers more.
        return products * scale + tl.load(table_ptr + entry, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _hide(scores, mask_ptr, key_token, key_valid):
    """Scores (queries, keys), -inf for keys that the mask, if there is one, hides."""
    if mask_ptr is not None:
        taken = tl.load(mask_ptr + key_token, mask=key_valid, other=False)
        scores = tl.where(taken[None, :], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr, height, width, num_heads, dilation_h, dilation_w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Output and lse = log2(sum of exp(scores)) of one tile of queries."""
    pid = tl.program_id(0)
    head, image, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    # One offset for key and value saves registers here; in the backward pass, it takes more of them.
    inner = num_heads * HEAD_DIM
    sums = (image * (num_heads - 1) + head) * height * width

    query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    query_token = _token(image, query_row, query_column, row_group, column_group, height, width, dilation_h, dilation_w)
    q = load_rows(qkv_ptr, query_token * 3 * inner + head * HEAD_DIM, query_valid, HEAD_DIM, BLOCK_D)

    top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    highest = tl.full([TILE_H * TILE_W], float("-inf"), tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    row, column = top, left
    for _ in range(0, tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)):
        key_row, key_column, key_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
        key_token = _token(image, key_row, key_column, row_group, column_group, height, width, dilation_h, dilation_w)
        key_offset = key_token * 3 * inner + head * HEAD_DIM
        k = load_rows(qkv_ptr, key_offset + inner, key_valid, HEAD_DIM, BLOCK_D)
        v = load_rows(qkv_ptr, key_offset + 2 * inner, key_valid, HEAD_DIM, BLOCK_D)
        scores = _scores(
            dot(q, tl.trans(k), PRECISION), table_ptr, head, scale,
            query_row[:, None], query_column[:, None], key_row[None, :], key_column[None, :], query_valid[:, None],
            rows, columns, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W,
        )  # fmt: skip
        scores = _hide(scores, mask_ptr, key_token, key_valid)
        highest, total, acc = softmax_step(scores, v, highest, total, acc, PRECISION, LOG2E)
        column += STEP_W
        row += tl.where(column < right, 0, STEP_H)
        column = tl.where(column < right, column, left)

    divisor, lse = softmax_end(highest, total)
    store_rows(out_ptr, query_token * inner + head * HEAD_DIM, acc / divisor[:, None], query_valid, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + sums + query_token, lse, mask=query_valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_query_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, qkv_grad_ptr,
    height, width, num_heads, dilation_h, dilation_w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and delta = sum(out * grad), which the other kernels need."""
    pid = tl.program_id(0)
    head, image, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    sums = (image * (num_heads - 1) + head) * height * width

    query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    query_token = _token(image, query_row, query_column, row_group, column_group, height, width, dilation_h, dilation_w)
    q = load_rows(qkv_ptr, _offset(query_token, 3 * num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_ptr, _offset(query_token, num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, _offset(query_token, num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + sums + query_token, delta, mask=query_valid)
    lse = tl.load(lse_ptr + sums + query_token, mask=query_valid, other=0.0)

    top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    row, column = top, left
    for _ in range(0, tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)):
        key_row, key_column, key_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
        key_token = _token(image, key_row, key_column, row_group, column_group, height, width, dilation_h, dilation_w)
        k = load_rows(
            qkv_ptr, _offset(key_token, 3 * num_heads, num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D
        )
        v = load_rows(
            qkv_ptr, _offset(key_token, 3 * num_heads, 2 * num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D
        )
        scores = _scores(
            dot(q, tl.trans(k), PRECISION), table_ptr, head, scale,
            query_row[:, None], query_column[:, None], key_row[None, :], key_column[None, :], query_valid[:, None],
            rows, columns, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W,
        )  # fmt: skip
        scores = _hide(scores, mask_ptr, key_token, key_valid)
        weights = tl.exp2(scores * LOG2E - lse[:, None])
        scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        acc += dot(scores_grad.to(k.dtype), k, PRECISION)
        column += STEP_W
        row += tl.where(column < right, 0, STEP_H)
        column = tl.where(column < right, column, left)

    store_rows(
        qkv_grad_ptr, _offset(query_token, 3 * num_heads, head, HEAD_DIM), acc * scale, query_valid, HEAD_DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_key_value_kernel(
    qkv_ptr, table_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr, qkv_grad_ptr,
    height, width, num_heads, dilation_h, dilation_w, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from all queries that see them; scores are (keys, queries)."""
    pid = tl.program_id(0)
    head, image, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    sums = (image * (num_heads - 1) + head) * height * width

    key_row, key_column, key_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    key_token = _token(image, key_row, key_column, row_group, column_group, height, width, dilation_h, dilation_w)
    k = load_rows(qkv_ptr, _offset(key_token, 3 * num_heads, num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D)
    v = load_rows(
        qkv_ptr, _offset(key_token, 3 * num_heads, 2 * num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D
    )

    top, bottom = _watchers(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _watchers(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    # The last tile has no keys if its dilation group is one place shorter than the first group.
    bottom = tl.where((first_row < rows) & (first_column < columns), bottom, top)
    key_grad = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    value_grad = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    row, column = top, left
    for _ in range(0, tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)):
        query_row, query_column, query_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
        query_token = _token(
            image, query_row, query_column, row_group, column_group, height, width, dilation_h, dilation_w
        )
        q = load_rows(qkv_ptr, _offset(query_token, 3 * num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr, _offset(query_token, num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + sums + query_token, mask=query_valid, other=0.0)
        delta = tl.load(delta_ptr + sums + query_token, mask=query_valid, other=0.0)
        scores = _scores(
            dot(k, tl.trans(q), PRECISION), table_ptr, head, scale,
            query_row[None, :], query_column[None, :], key_row[:, None], key_column[:, None], query_valid[None, :],
            rows, columns, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W,
        )  # fmt: skip
        weights = tl.exp2(scores * LOG2E - lse[None, :])
        value_grad += dot(weights.to(grad.dtype), grad, PRECISION)
        scores_grad = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
        key_grad += dot(scores_grad.to(q.dtype), q, PRECISION)
        column += STEP_W
        row += tl.where(column < right, 0, STEP_H)
        column = tl.where(column < right, column, left)

    if mask_ptr is not None:
        taken = tl.load(mask_ptr + key_token, mask=key_valid, other=False)
        key_grad = tl.where(taken[:, None], key_grad, 0.0)
        value_grad = tl.where(taken[:, None], value_grad, 0.0)
    store_rows(
        qkv_grad_ptr,
        _offset(key_token, 3 * num_heads, num_heads + head, HEAD_DIM),
        key_grad * scale,
        key_valid,
        HEAD_DIM,
        BLOCK_D,
    )
    store_rows(
        qkv_grad_ptr,
        _offset(key_token, 3 * num_heads, 2 * num_heads + head, HEAD_DIM),
        value_grad,
        key_valid,
        HEAD_DIM,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_bias_kernel(
    qkv_ptr, table_ptr, mask_ptr, grad_ptr, lse_ptr, delta_ptr, partial_ptr,
    batch, height, width, num_heads, dilation_h, dilation_w, scale, origin_h, origin_w, steps_h, steps_w, per_program,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one step, summed over `per_program` tiles of queries.

    Unlike in the other kernels, the steps are at fixed places relative to the tile, so that a pair of the sum has the
    same entry of the table in all tiles and images.
    """
    pid = tl.program_id(0)
    head, pid = pid % num_heads, pid // num_heads
    step_row, step_column = pid // steps_w % steps_h, pid % steps_w
    chunk = pid // (steps_h * steps_w)
    row_tiles, column_tiles = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H), tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    down_tiles, across_tiles = row_tiles * dilation_h, column_tiles * dilation_w
    index, step = tl.arange(0, TILE_H * TILE_W), tl.arange(0, STEP_H * STEP_W)
    acc = tl.zeros([TILE_H * TILE_W, STEP_H * STEP_W], tl.float32)
    # The image varies fastest, so that a program has few different tiles.
    last = tl.minimum((chunk + 1) * per_program, batch * down_tiles * across_tiles)
    for number in range(chunk * per_program, last):
        image, tile = (number % batch).to(tl.int64), number // batch
        sums = (image * (num_heads - 1) + head) * height * width
        row_group, first_row, last_row, rows = _axis_tile(tile // across_tiles, row_tiles, height, dilation_h, TILE_H)
        column_group, first_column, last_column, columns = _axis_tile(
            tile % across_tiles, column_tiles, width, dilation_w, TILE_W
        )
        top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
        left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
        row = first_row + origin_h + step_row * STEP_H
        column = first_column + origin_w + step_column * STEP_W
        seen = (row < bottom) & (row + STEP_H > top) & (column < right) & (column + STEP_W > left)
        if seen & (first_row < rows) & (first_column < columns):
            query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
            query_token = _token(
                image, query_row, query_column, row_group, column_group, height, width, dilation_h, dilation_w
            )
            q = load_rows(qkv_ptr, _offset(query_token, 3 * num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_ptr, _offset(query_token, num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_ptr + sums + query_token, mask=query_valid, other=0.0)
            delta = tl.load(delta_ptr + sums + query_token, mask=query_valid, other=0.0)

            key_row, key_column = row + step // STEP_W, column + step % STEP_W
            key_valid = (key_row >= top) & (key_row < bottom) & (key_column >= left) & (key_column < right)
            key_token = _token(
                image, key_row, key_column, row_group, column_group, height, width, dilation_h, dilation_w
            )
            k = load_rows(
                qkv_ptr, _offset(key_token, 3 * num_heads, num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D
            )
            v = load_rows(
                qkv_ptr, _offset(key_token, 3 * num_heads, 2 * num_heads + head, HEAD_DIM), key_valid, HEAD_DIM, BLOCK_D
            )
            scores = _scores(
                dot(q, tl.trans(k), PRECISION), table_ptr, head, scale,
                query_row[:, None], query_column[:, None], key_row[None, :], key_column[None, :], query_valid[:, None],
                rows, columns, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W,
            )  # fmt: skip
            scores = _hide(scores, mask_ptr, key_token, key_valid)
            acc += tl.exp2(scores * LOG2E - lse[:, None]) * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])

    part = ((chunk.to(tl.int64) * num_heads + head) * steps_h + step_row) * steps_w + step_column
    pairs = index[:, None] * (STEP_H * STEP_W) + step[None, :]
    tl.store(partial_ptr + part * (TILE_H * TILE_W * STEP_H * STEP_W) + pairs, acc)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_bias_sum_kernel(
    partial_ptr, table_grad_ptr, num_heads, origin_h, origin_w, steps_h, steps_w, chunks,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One entry of the table's gradient: a sum over pairs of `_bwd_bias_kernel`, in a fixed order."""
    pid = tl.program_id(0)
    HEIGHT: tl.constexpr = 2 * KERNEL_H - 1
    WIDTH: tl.constexpr = 2 * KERNEL_W - 1
    head = pid // (HEIGHT * WIDTH)
    index = tl.arange(0, TILE_H * TILE_W)
    key_row = index // TILE_W + pid // WIDTH % HEIGHT - (KERNEL_H - 1) - origin_h
    key_column = index % TILE_W + pid % WIDTH - (KERNEL_W - 1) - origin_w
    part = (head * steps_h + key_row // STEP_H) * steps_w + key_column // STEP_W
    pair = index * (STEP_H * STEP_W) + key_row % STEP_H * STEP_W + key_column % STEP_W
    acc = tl.zeros([BLOCK, TILE_H * TILE_W], tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)[:, None]
        parts = chunk.to(tl.int64) * (num_heads * steps_h * steps_w) + part[None, :]
        offset = parts * (TILE_H * TILE_W * STEP_H * STEP_W) + pair[None, :]
        acc += tl.load(partial_ptr + offset, mask=chunk < chunks, other=0.0)
    tl.store(table_grad_ptr + pid, tl.sum(tl.sum(acc, 1), 0).to(table_grad_ptr.dtype.element_ty))


def forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    *,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `op.forward`."""
    qkv = qkv.contiguous()
    bias_table = None if bias_table is None else bias_table.contiguous()
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    lse = qkv.new_empty(batch, num_heads, height, width, dtype=torch.float32)
    common = _arguments(qkv, bias_table, key_mask, num_heads, kernel_size, dilation, stride, is_causal, scale)
    triton_common.launch(_fwd_kernel, _grid(batch, common), out_ptr=out, lse_ptr=lse, **common)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """See `op.backward`."""
    qkv, grad, out = qkv.contiguous(), grad.contiguous(), out.contiguous()
    bias_table = None if bias_table is None else bias_table.contiguous()
    batch = qkv.shape[0]
    qkv_grad, delta = torch.empty_like(qkv), torch.empty_like(lse)
    common = _arguments(qkv, bias_table, key_mask, num_heads, kernel_size, dilation, stride, is_causal, scale)
    common |= {"grad_ptr": grad, "lse_ptr": lse, "delta_ptr": delta}
    grid = _grid(batch, common)
    triton_common.launch(_bwd_query_kernel, grid, out_ptr=out, qkv_grad_ptr=qkv_grad, **common)
    triton_common.launch(_bwd_key_value_kernel, grid, qkv_grad_ptr=qkv_grad, **common)
    if bias_table is None or not bias_grad:
        return qkv_grad, qkv.new_empty(0)
    return qkv_grad, _bias_gradient(batch, bias_table, common)


def _bias_gradient(batch: int, bias_table: Tensor, common: dict[str, Any]) -> Tensor:
    """The gradient of the bias table, given `common`, the arguments of the other kernels."""
    tile, step, num_heads = (
        (common["TILE_H"], common["TILE_W"]),
        (common["STEP_H"], common["STEP_W"]),
        common["num_heads"],
    )
    origins, steps = [], []
    for axis, queries, keys in zip("HW", tile, step, strict=True):
        kernel, stride = common[f"KERNEL_{axis}"], common[f"STRIDE_{axis}"]
        # Keys are up to kernel - 1 places from a query. Most windows start at `usual`, and so does a step.
        usual = stride - kernel if common[f"CAUSAL_{axis}"] else stride // 2 - kernel // 2
        origin = usual - keys * triton.cdiv(usual + kernel - 1, keys)
        origins.append(origin)
        steps.append(triton.cdiv(queries + kernel - 1 - origin, keys))
    # Only as many programs as fill the GPU: each writes a tile of float32.
    number = batch * _tiles(common)
    most = triton.cdiv(8 * triton_common.machine(bias_table).num_processors, num_heads * steps[0] * steps[1])
    per_program = triton.cdiv(number, most)
    chunks = torch.sym_min(most, number)
    partial = bias_table.new_empty(chunks, num_heads, *steps, tile[0] * tile[1], step[0] * step[1], dtype=torch.float32)
    shape = {"origin_h": origins[0], "origin_w": origins[1], "steps_h": steps[0], "steps_w": steps[1]}
    triton_common.launch(
        _bwd_bias_kernel,
        (chunks * num_heads * steps[0] * steps[1],),
        partial_ptr=partial,
        batch=batch,
        per_program=per_program,
        **shape,
        **common,
    )
    table_grad = torch.empty_like(bias_table)
    triton_common.launch(
        _bwd_bias_sum_kernel,
        (table_grad.numel(),),
        partial_ptr=partial,
        table_grad_ptr=table_grad,
        num_heads=num_heads,
        chunks=chunks,
        **shape,
        **{name: common[name] for name in ("KERNEL_H", "KERNEL_W", "TILE_H", "TILE_W", "STEP_H", "STEP_W")},
        BLOCK=16,
        num_warps=4,
        num_stages=1,
    )
    return table_grad


def _arguments(
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> dict[str, Any]:
    """The arguments that all kernels share."""
    gpu = triton_common.machine(qkv)
    _, height, width, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    block = max(16, triton.next_power_of_2(head_dim))
    # A step is half a tile: gathering the biases of more keys takes too many registers. Both are smaller for heads of
    # many bytes.
    row = block * qkv.element_size()
    tokens = 64 if row <= 128 else 32 if row <= 256 else 16
    tile, step = cost_model.best_tiles(
        tuple(kernel_size), tuple(stride), tuple(is_causal), tokens, max(16, tokens // 2)
    )
    return {
        "qkv_ptr": qkv,
        "table_ptr": bias_table,
        "mask_ptr": None if key_mask is None else key_mask.contiguous(),
        "height": height,
        "width": width,
        "num_heads": num_heads,
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block,
        "PRECISION": triton_common.precision(qkv.dtype, gpu),
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "CAUSAL_H": is_causal[0],
        "CAUSAL_W": is_causal[1],
        "TILE_H": tile[0],
        "TILE_W": tile[1],
        "STEP_H": step[0],
        "STEP_W": step[1],
        "num_warps": 4 if row <= 256 else 8,
        "num_stages": 1,
    }


def _tiles(common: dict[str, Any]) -> int:
    """The number of tiles of an image, over all dilation groups."""
    tiles = 1
    for length, dilation, tile in (("height", "dilation_h", "TILE_H"), ("width", "dilation_w", "TILE_W")):
        tiles *= triton.cdiv(triton.cdiv(common[length], common[dilation]), common[tile]) * common[dilation]
    return tiles


def _grid(batch: int, common: dict[str, Any]) -> tuple[int]:
    return (batch * _tiles(common) * common["num_heads"],)
