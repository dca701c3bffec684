"""Neighborhood attention in Triton, forward and backward, on qkv as a Linear writes it.

A program takes the queries (for the gradients of key and value: the keys) of one tile of one dilation group, in several
images one after the other, and loops over the rectangle of their keys (queries) in steps of STEP_H x STEP_W. What is
added to the logits comes from a table that `_table_kernel` makes for each call: the bias, or -inf for a key that is no
neighbour. The softmax is computed in base 2.

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
from zoo.kernels.triton_common import LOG2E, Machine, dot, load_rows, softmax_end, softmax_step, store_rows

# One compiled kernel serves all maps: specializing it on these sizes would not make it faster.
NOT_SPECIALIZED = (
    "batch", "height", "width", "num_heads", "dilation_h", "dilation_w", "table_size", "per_program", "chunks"
)  # fmt: skip


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
    """The head, chunk of images and tile of a program; the head varies fastest."""
    row_tiles, column_tiles = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H), tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    head, pid = pid % num_heads, pid // num_heads
    across, pid = pid % (column_tiles * dilation_w), pid // (column_tiles * dilation_w)
    down, chunk = pid % (row_tiles * dilation_h), pid // (row_tiles * dilation_h)
    row_tile = _axis_tile(down, row_tiles, height, dilation_h, TILE_H)
    column_tile = _axis_tile(across, column_tiles, width, dilation_w, TILE_W)
    return head, chunk, row_tile, column_tile


@triton.jit
def _rectangle(first_row, first_column, bottom, right, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of the places of a rectangle, and which of them are above `bottom` and left of `right`."""
    index = tl.arange(0, HEIGHT * WIDTH)
    row, column = first_row + index // WIDTH, first_column + index % WIDTH
    return row, column, (row < bottom) & (column < right)


@triton.jit
def _token(row, column, row_group, column_group, width, dilation_h, dilation_w):
    """The index, within its image, of the token at a place of a dilation group."""
    return (row * dilation_h + row_group) * width + column * dilation_w + column_group


@triton.jit
def _offset(token, slots, slot, HEAD_DIM: tl.constexpr):
    """The offset of slot number `slot` of the `slots` of HEAD_DIM elements that each token has."""
    return token.to(tl.int64) * (slots * HEAD_DIM) + slot * HEAD_DIM


@triton.jit
def _next_step(row, column, left, right, STEP_H: tl.constexpr, STEP_W: tl.constexpr):
    """The first row and column of the step after the one at `row` and `column`."""
    column += STEP_W
    row += tl.where(column < right, 0, STEP_H)
    return row, tl.where(column < right, column, left)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _table_kernel(
    bias_ptr, table_ptr, table_size,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr,
    SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What is added to the logits, in base 2, of one head, or of all without a bias: its bias, or -inf.

    Both axes have a block for each shift, the places of a query after the start of its window, and one of -inf, for
    queries beyond the map. A block is the KERNEL neighbours, preceded by PAD keys that are none; PAD more follow the
    last block. Without a bias, one block serves all shifts, unless the axis is causal. The table of a head takes about
    0.15 MB for a kernel of 7 x 7, 9 MB for 31 x 31 and 100 MB for 63 x 63.
    """
    blocks = tl.cdiv(table_size, BLOCK)
    head = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row, column = index // PITCH, index % PITCH
    # The neighbour's place in the window, and the query's.
    down, right = row % (KERNEL_H + PAD_H) - PAD_H, column % (KERNEL_W + PAD_W) - PAD_W
    below, beside = row // (KERNEL_H + PAD_H), column // (KERNEL_W + PAD_W)
    inside = (down >= 0) & (below < SHIFTS_H) & (right >= 0) & (beside < SHIFTS_W) & (index < table_size)
    if CAUSAL_H:
        inside = inside & (down <= below)
    if CAUSAL_W:
        inside = inside & (right <= beside)
    value = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        entry = (head * (2 * KERNEL_H - 1) + down - below + KERNEL_H - 1) * (2 * KERNEL_W - 1)
        entry += right - beside + KERNEL_W - 1
        value = tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32) * LOG2E
    value = tl.where(inside, value, float("-inf"))
    tl.store(table_ptr + head.to(tl.int64) * table_size + index, value, mask=index < table_size)


@triton.jit
def _axis_entry(
    place, places,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, SHIFTS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Where an axis of the table has the key at place 0 for the query at `place`; other keys are at their distance."""
    start, _ = _window(place, places, KERNEL, STRIDE, CAUSAL)
    shift = (place >= places).to(tl.int32) if SHIFTS == 1 else tl.minimum(place - start, SHIFTS)
    return shift * (KERNEL + PAD) + PAD - start


@triton.jit
def _entry(
    row, column, rows, columns,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr, SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """The entry of the table for the query at `row` and `column` and the key at place (0, 0)."""
    down = _axis_entry(row, rows, KERNEL_H, STRIDE_H, CAUSAL_H, SHIFTS_H, PAD_H)
    return down * PITCH + _axis_entry(column, columns, KERNEL_W, STRIDE_W, CAUSAL_W, SHIFTS_W, PAD_W)


@triton.jit
def _gather(ptr, PTX: tl.constexpr):
    """The float32 numbers at the pointers `ptr`.

    Triton gives the result of `tl.load` a layout of its own, and converts it to that of the scores. Assembly is
    elementwise, so that the pointers are computed in the layout of the scores.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptr.to(tl.uint64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptr)


@triton.jit
def _hide(scores, mask_ptr, key_token, key_valid):
    """Scores (queries, keys), -inf for keys that the mask, if there is one, hides."""
    if mask_ptr is not None:
        taken = tl.load(mask_ptr + key_token, mask=key_valid, other=False)
        scores = tl.where(taken[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _load_sums(ptr, valid):
    """lse and delta, which lie side by side, in one load; inf and 0 for queries that are not `valid`."""
    ptr = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    both = tl.load(ptr) if valid is None else tl.load(ptr, mask=valid, other=0x7F800000)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, lse_ptr,
    batch, height, width, num_heads, dilation_h, dilation_w, table_size, per_program, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr, SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Output and lse = log2(sum of exp(scores)) of one tile of queries."""
    pid = tl.program_id(0)
    head, chunk, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    first_image, last_image = chunk * per_program, tl.minimum((chunk + 1) * per_program, batch)
    size = (height * width).to(tl.int64)
    inner = num_heads * HEAD_DIM

    query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    query_token = _token(query_row, query_column, row_group, column_group, width, dilation_h, dilation_w)
    top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    steps = tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)
    entry = _entry(
        query_row, query_column, rows, columns,
        KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W, SHIFTS_H, SHIFTS_W, PAD_H, PAD_W, PITCH,
    )  # fmt: skip
    # The distances between the keys of a step are known when the kernel is compiled: added last, they cost nothing.
    key = tl.arange(0, STEP_H * STEP_W)
    table_ptr += head.to(tl.int64) * table_size
    entries = (table_ptr + entry)[:, None] + (key // STEP_W * PITCH + key % STEP_W)[None, :]
    for image in range(first_image, last_image):
        qkv_image = qkv_ptr + image * size * (3 * inner)
        mask_image = None if mask_ptr is None else mask_ptr + image * size
        q = load_rows(qkv_image, _offset(query_token, 3 * num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D)
        highest = tl.full([TILE_H * TILE_W], float("-inf"), tl.float32)
        total = tl.zeros([TILE_H * TILE_W], tl.float32)
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        row, column = top, left
        for _ in range(0, steps):
            key_row, key_column, key_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
            key_token = _token(key_row, key_column, row_group, column_group, width, dilation_h, dilation_w)
            key_offset = _offset(key_token, 3 * num_heads, head, HEAD_DIM)
            k = load_rows(qkv_image, key_offset + inner, key_valid, HEAD_DIM, BLOCK_D)
            v = load_rows(qkv_image, key_offset + 2 * inner, key_valid, HEAD_DIM, BLOCK_D)
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + _gather(entries + (row * PITCH + column), PTX)
            scores = _hide(scores, mask_image, key_token, key_valid)
            highest, total, acc = softmax_step(scores, v, highest, total, acc, PRECISION)
            row, column = _next_step(row, column, left, right, STEP_H, STEP_W)

        divisor, lse = softmax_end(highest, total)
        out_offset = _offset(query_token, num_heads, head, HEAD_DIM)
        store_rows(
            out_ptr + image * size * inner, out_offset, acc * (1.0 / divisor)[:, None], query_valid, HEAD_DIM, BLOCK_D
        )
        tl.store(lse_ptr + (image * num_heads + head) * size + query_token, lse, mask=query_valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_query_kernel(
    qkv_ptr, table_ptr, mask_ptr, out_ptr, grad_ptr, lse_ptr, sums_ptr, qkv_grad_ptr,
    batch, height, width, num_heads, dilation_h, dilation_w, table_size, per_program, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr, SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; lse and delta = sum(out * grad), side by side, for the other kernels."""
    pid = tl.program_id(0)
    head, chunk, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    first_image, last_image = chunk * per_program, tl.minimum((chunk + 1) * per_program, batch)
    size = (height * width).to(tl.int64)
    inner = num_heads * HEAD_DIM

    query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    query_token = _token(query_row, query_column, row_group, column_group, width, dilation_h, dilation_w)
    top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    steps = tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)
    entry = _entry(
        query_row, query_column, rows, columns,
        KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W, SHIFTS_H, SHIFTS_W, PAD_H, PAD_W, PITCH,
    )  # fmt: skip
    # The distances between the keys of a step are known when the kernel is compiled: added last, they cost nothing.
    key = tl.arange(0, STEP_H * STEP_W)
    table_ptr += head.to(tl.int64) * table_size
    entries = (table_ptr + entry)[:, None] + (key // STEP_W * PITCH + key % STEP_W)[None, :]
    qkv_offset = _offset(query_token, 3 * num_heads, head, HEAD_DIM)
    out_offset = _offset(query_token, num_heads, head, HEAD_DIM)
    for image in range(first_image, last_image):
        qkv_image = qkv_ptr + image * size * (3 * inner)
        mask_image = None if mask_ptr is None else mask_ptr + image * size
        q = load_rows(qkv_image, qkv_offset, query_valid, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_ptr + image * size * inner, out_offset, query_valid, HEAD_DIM, BLOCK_D)
        out = load_rows(out_ptr + image * size * inner, out_offset, query_valid, HEAD_DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        sums = (image * num_heads + head) * size + query_token
        lse = tl.load(lse_ptr + sums, mask=query_valid, other=float("inf"))
        tl.store(sums_ptr + 2 * sums, lse, mask=query_valid)
        tl.store(sums_ptr + 2 * sums + 1, delta, mask=query_valid)
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        row, column = top, left
        for _ in range(0, steps):
            key_row, key_column, key_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
            key_token = _token(key_row, key_column, row_group, column_group, width, dilation_h, dilation_w)
            key_offset = _offset(key_token, 3 * num_heads, head, HEAD_DIM)
            k = load_rows(qkv_image, key_offset + inner, key_valid, HEAD_DIM, BLOCK_D)
            v = load_rows(qkv_image, key_offset + 2 * inner, key_valid, HEAD_DIM, BLOCK_D)
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + _gather(entries + (row * PITCH + column), PTX)
            scores = _hide(scores, mask_image, key_token, key_valid)
            weights = tl.exp2(scores - lse[:, None])
            scores_grad = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
            acc += dot(scores_grad.to(k.dtype), k, PRECISION)
            row, column = _next_step(row, column, left, right, STEP_H, STEP_W)

        store_rows(qkv_grad_ptr + image * size * (3 * inner), qkv_offset, acc * scale, query_valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_key_value_kernel(
    qkv_ptr, table_ptr, mask_ptr, grad_ptr, sums_ptr, qkv_grad_ptr,
    batch, height, width, num_heads, dilation_h, dilation_w, table_size, per_program, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr, SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from all queries that see them; scores are (keys, queries)."""
    pid = tl.program_id(0)
    head, chunk, row_tile, column_tile = _tile(pid, height, width, num_heads, dilation_h, dilation_w, TILE_H, TILE_W)
    row_group, first_row, last_row, rows = row_tile
    column_group, first_column, last_column, columns = column_tile
    first_image, last_image = chunk * per_program, tl.minimum((chunk + 1) * per_program, batch)
    size = (height * width).to(tl.int64)
    inner = num_heads * HEAD_DIM

    key_row, key_column, key_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
    key_token = _token(key_row, key_column, row_group, column_group, width, dilation_h, dilation_w)
    key_offset = _offset(key_token, 3 * num_heads, head, HEAD_DIM)
    top, bottom = _watchers(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
    left, right = _watchers(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
    # The last tile has no keys if its dilation group is one place shorter than the first group.
    bottom = tl.where((first_row < rows) & (first_column < columns), bottom, top)
    steps = tl.cdiv(bottom - top, STEP_H) * tl.cdiv(right - left, STEP_W)
    entries = (table_ptr + head.to(tl.int64) * table_size + key_row * PITCH + key_column)[:, None]
    for image in range(first_image, last_image):
        qkv_image, grad_image = qkv_ptr + image * size * (3 * inner), grad_ptr + image * size * inner
        sums_image = sums_ptr + (image * num_heads + head) * size * 2
        k = load_rows(qkv_image, key_offset + inner, key_valid, HEAD_DIM, BLOCK_D)
        v = load_rows(qkv_image, key_offset + 2 * inner, key_valid, HEAD_DIM, BLOCK_D)
        key_grad = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        value_grad = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        row, column = top, left
        for _ in range(0, steps):
            query_row, query_column, query_valid = _rectangle(row, column, bottom, right, STEP_H, STEP_W)
            query_token = _token(query_row, query_column, row_group, column_group, width, dilation_h, dilation_w)
            q = load_rows(
                qkv_image, _offset(query_token, 3 * num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D
            )
            grad = load_rows(
                grad_image, _offset(query_token, num_heads, head, HEAD_DIM), query_valid, HEAD_DIM, BLOCK_D
            )
            # The table excludes the pairs of queries beyond the map, so their sums may be those of any query.
            query_token = _token(
                tl.minimum(query_row, rows - 1), tl.minimum(query_column, columns - 1),
                row_group, column_group, width, dilation_h, dilation_w,
            )  # fmt: skip
            lse, delta = _load_sums(sums_image + 2 * query_token, None)
            entry = _entry(
                query_row, query_column, rows, columns,
                KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W, SHIFTS_H, SHIFTS_W, PAD_H, PAD_W, PITCH,
            )  # fmt: skip
            scores = dot(k, tl.trans(q), PRECISION) * (scale * LOG2E) + _gather(entries + entry[None, :], PTX)
            weights = tl.exp2(scores - lse[None, :])
            value_grad += dot(weights.to(grad.dtype), grad, PRECISION)
            scores_grad = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
            key_grad += dot(scores_grad.to(q.dtype), q, PRECISION)
            row, column = _next_step(row, column, left, right, STEP_H, STEP_W)

        if mask_ptr is not None:
            taken = tl.load(mask_ptr + image * size + key_token, mask=key_valid, other=False)
            key_grad = tl.where(taken[:, None], key_grad, 0.0)
            value_grad = tl.where(taken[:, None], value_grad, 0.0)
        qkv_grad_image = qkv_grad_ptr + image * size * (3 * inner)
        store_rows(qkv_grad_image, key_offset + inner, key_grad * scale, key_valid, HEAD_DIM, BLOCK_D)
        store_rows(qkv_grad_image, key_offset + 2 * inner, value_grad, key_valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_bias_kernel(
    qkv_ptr, table_ptr, mask_ptr, grad_ptr, sums_ptr, partial_ptr,
    batch, height, width, num_heads, dilation_h, dilation_w, table_size, per_program, scale,
    origin_h, origin_w, steps_h, steps_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr, CAUSAL_W: tl.constexpr, SHIFTS_H: tl.constexpr, SHIFTS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PITCH: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one step, summed over `per_program` tiles of queries.

    Unlike in the other kernels, the steps are at fixed places relative to the tile, so that a pair of the sum has the
    same entry of the bias in all tiles and images.
    """
    pid = tl.program_id(0)
    head, pid = pid % num_heads, pid // num_heads
    step_row, step_column = pid // steps_w % steps_h, pid % steps_w
    chunk = pid // (steps_h * steps_w)
    row_tiles, column_tiles = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H), tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    down_tiles, across_tiles = row_tiles * dilation_h, column_tiles * dilation_w
    query, key = tl.arange(0, TILE_H * TILE_W), tl.arange(0, STEP_H * STEP_W)
    size = (height * width).to(tl.int64)
    inner = num_heads * HEAD_DIM
    table_ptr += head.to(tl.int64) * table_size
    acc = tl.zeros([TILE_H * TILE_W, STEP_H * STEP_W], tl.float32)
    # The image varies fastest, so that a program has few different tiles.
    first, last = chunk * per_program, tl.minimum((chunk + 1) * per_program, batch * down_tiles * across_tiles)
    for tile in range(first // batch, tl.cdiv(last, batch)):
        row_group, begin_row, last_row, rows = _axis_tile(tile // across_tiles, row_tiles, height, dilation_h, TILE_H)
        column_group, begin_column, last_column, columns = _axis_tile(
            tile % across_tiles, column_tiles, width, dilation_w, TILE_W
        )
        # The last tile overlaps the one before it, as windows at the border do: its steps are those of the others.
        first_row = tl.maximum(tl.minimum(begin_row, rows - TILE_H), 0)
        first_column = tl.maximum(tl.minimum(begin_column, columns - TILE_W), 0)
        top, bottom = _windows(first_row, last_row, rows, KERNEL_H, STRIDE_H, CAUSAL_H)
        left, right = _windows(first_column, last_column, columns, KERNEL_W, STRIDE_W, CAUSAL_W)
        row = first_row + origin_h + step_row * STEP_H
        column = first_column + origin_w + step_column * STEP_W
        seen = (row < bottom) & (row + STEP_H > top) & (column < right) & (column + STEP_W > left)
        seen = seen & (begin_row < rows) & (begin_column < columns)

        query_row, query_column, query_valid = _rectangle(first_row, first_column, rows, columns, TILE_H, TILE_W)
        query_valid = query_valid & (query_row >= begin_row) & (query_column >= begin_column)
        query_token = _token(query_row, query_column, row_group, column_group, width, dilation_h, dilation_w)
        key_row, key_column = row + key // STEP_W, column + key % STEP_W
        key_valid = (key_row >= top) & (key_row < bottom) & (key_column >= left) & (key_column < right)
        key_token = _token(key_row, key_column, row_group, column_group, width, dilation_h, dilation_w)
        entry = _entry(
            query_row, query_column, rows, columns,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, CAUSAL_H, CAUSAL_W, SHIFTS_H, SHIFTS_W, PAD_H, PAD_W, PITCH,
        )  # fmt: skip
        entries = (table_ptr + entry)[:, None] + (key_row * PITCH + key_column)[None, :]
        bias = _gather(tl.where(seen, entries, table_ptr), PTX)
        qkv_offset = _offset(query_token, 3 * num_heads, head, HEAD_DIM)
        out_offset = _offset(query_token, num_heads, head, HEAD_DIM)
        key_offset = _offset(key_token, 3 * num_heads, head, HEAD_DIM)
        first_image = tl.maximum(first - tile * batch, 0)
        last_image = tl.where(seen, tl.minimum(last - tile * batch, batch), first_image)
        for image in range(first_image, last_image):
            qkv_image = qkv_ptr + image * size * (3 * inner)
            q = load_rows(qkv_image, qkv_offset, query_valid, HEAD_DIM, BLOCK_D)
            k = load_rows(qkv_image, key_offset + inner, key_valid, HEAD_DIM, BLOCK_D)
            v = load_rows(qkv_image, key_offset + 2 * inner, key_valid, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_ptr + image * size * inner, out_offset, query_valid, HEAD_DIM, BLOCK_D)
            sums_image = sums_ptr + (image * num_heads + head) * size * 2
            lse, delta = _load_sums(sums_image + 2 * query_token, query_valid)
            scores = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias
            mask_image = None if mask_ptr is None else mask_ptr + image * size
            scores = _hide(scores, mask_image, key_token, key_valid)
            acc += tl.exp2(scores - lse[:, None]) * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])

    part = ((chunk.to(tl.int64) * num_heads + head) * steps_h + step_row) * steps_w + step_column
    pairs = query[:, None] * (STEP_H * STEP_W) + key[None, :]
    tl.store(partial_ptr + part * (TILE_H * TILE_W * STEP_H * STEP_W) + pairs, acc)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_bias_sum_kernel(
    partial_ptr, bias_grad_ptr, num_heads, origin_h, origin_w, steps_h, steps_w, chunks,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One entry of the bias's gradient: a sum over pairs of `_bwd_bias_kernel`, in a fixed order."""
    pid = tl.program_id(0)
    HEIGHT: tl.constexpr = 2 * KERNEL_H - 1
    WIDTH: tl.constexpr = 2 * KERNEL_W - 1
    head = pid // (HEIGHT * WIDTH)
    index = tl.arange(0, TILE_H * TILE_W)
    key_row = index // TILE_W + pid // WIDTH % HEIGHT - (KERNEL_H - 1) - origin_h
    key_column = index % TILE_W + pid % WIDTH - (KERNEL_W - 1) - origin_w
    # Keys that no step has are neighbours of no query at this place of a tile.
    computed = (key_row >= 0) & (key_row < steps_h * STEP_H) & (key_column >= 0) & (key_column < steps_w * STEP_W)
    part = (head * steps_h + key_row // STEP_H) * steps_w + key_column // STEP_W
    pair = index * (STEP_H * STEP_W) + key_row % STEP_H * STEP_W + key_column % STEP_W
    acc = tl.zeros([BLOCK, TILE_H * TILE_W], tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)[:, None]
        parts = chunk.to(tl.int64) * (num_heads * steps_h * steps_w) + part[None, :]
        offset = parts * (TILE_H * TILE_W * STEP_H * STEP_W) + pair[None, :]
        acc += tl.load(partial_ptr + offset, mask=(chunk < chunks) & computed[None, :], other=0.0)
    tl.store(bias_grad_ptr + pid, tl.sum(tl.sum(acc, 1), 0).to(bias_grad_ptr.dtype.element_ty))


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
    qkv = triton_common.aligned(qkv.contiguous())
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    lse = qkv.new_empty(batch, num_heads, height, width, dtype=torch.float32)
    common, shapes = _arguments(qkv, bias_table, key_mask, num_heads, kernel_size, dilation, stride, is_causal, scale)
    _launch(_fwd_kernel, common, shapes["fwd"], out_ptr=out, lse_ptr=lse)
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
    qkv, grad, out = (triton_common.aligned(x.contiguous()) for x in (qkv, grad, out))
    qkv_grad, sums = torch.empty_like(qkv), lse.new_empty(*lse.shape, 2)
    common, shapes = _arguments(qkv, bias_table, key_mask, num_heads, kernel_size, dilation, stride, is_causal, scale)
    common |= {"grad_ptr": grad, "sums_ptr": sums}
    _launch(_bwd_query_kernel, common, shapes["query"], out_ptr=out, lse_ptr=lse, qkv_grad_ptr=qkv_grad)
    _launch(_bwd_key_value_kernel, common, shapes["key_value"], qkv_grad_ptr=qkv_grad)
    if bias_table is None or not bias_grad:
        return qkv_grad, qkv.new_empty(0)
    return qkv_grad, _bias_gradient(bias_table, common, shapes["bias"])


def _bias_gradient(bias_table: Tensor, common: dict[str, Any], shape: dict[str, int]) -> Tensor:
    """The gradient of the bias table, given the arguments of the kernels and the shape of this one."""
    num_heads = common["num_heads"]
    tile, step = ((shape[f"{name}_H"], shape[f"{name}_W"]) for name in ("TILE", "STEP"))
    # The steps reach from the first to the last neighbour of any tile, relative to the tile's first place. Those of
    # kernels of more than about two tiles reach further at the map's borders.
    origins, steps = [], []
    for axis, queries, keys in zip("HW", tile, step, strict=True):
        kernel, stride = common[f"KERNEL_{axis}"], common[f"STRIDE_{axis}"]
        if common[f"CAUSAL_{axis}"]:
            origin, end = 1 - kernel, queries
        else:
            before = kernel // 2 - stride // 2
            origin = min(1 - before - stride, queries - kernel)
            end = max(queries - 1 - before + kernel, kernel)
        origins.append(origin)
        steps.append(triton.cdiv(end - origin, keys))
    # Programs that fill the GPU, three to a processor, and sum at most 96 tiles each. Their number has a limit, since
    # each writes a tile of float32.
    number = common["batch"] * _tiles(common, shape)
    fill = 3 * triton_common.machine(bias_table).num_processors
    parts = num_heads * steps[0] * steps[1]
    most = torch.sym_max(max(1, 2 * fill // parts), torch.sym_min(max(1, 10 * fill // parts), triton.cdiv(number, 96)))
    per_program = triton.cdiv(number, most)
    chunks = torch.sym_min(most, number)
    partial = bias_table.new_empty(chunks, num_heads, *steps, tile[0] * tile[1], step[0] * step[1], dtype=torch.float32)
    places = {"origin_h": origins[0], "origin_w": origins[1], "steps_h": steps[0], "steps_w": steps[1]}
    triton_common.launch(
        _bwd_bias_kernel,
        (chunks * parts,),
        partial_ptr=partial,
        per_program=per_program,
        **places,
        **common,
        **shape,
    )
    bias_grad = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
    triton_common.launch(
        _bwd_bias_sum_kernel,
        (bias_grad.numel(),),
        partial_ptr=partial,
        bias_grad_ptr=bias_grad,
        num_heads=num_heads,
        chunks=chunks,
        **places,
        KERNEL_H=common["KERNEL_H"],
        KERNEL_W=common["KERNEL_W"],
        **{name: shape[name] for name in ("TILE_H", "TILE_W", "STEP_H", "STEP_W")},
        num_warps=4,
        num_stages=1,
        BLOCK=16,
    )
    return bias_grad


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
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """The arguments that the kernels share, among them the table, which this computes; and the shape of each kernel."""
    gpu = triton_common.machine(qkv)
    batch, height, width, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    shapes = _shapes(head_dim, qkv.dtype, kernel_size, stride, is_causal, key_mask is not None, gpu)
    layout: dict[str, Any] = {}
    sides = []
    for number, axis in enumerate("HW"):
        kernel, causal = kernel_size[number], is_causal[number]
        shifts = kernel if causal or bias_table is not None else 1
        # The keys of a step are at most this far outside of the window of a query of the tile.
        pad = max(shape[f"TILE_{axis}"] + shape[f"STEP_{axis}"] for shape in shapes.values()) + stride[number] - 3
        layout |= {f"KERNEL_{axis}": kernel, f"CAUSAL_{axis}": causal, f"SHIFTS_{axis}": shifts, f"PAD_{axis}": pad}
        sides.append((shifts + 1) * (kernel + pad) + pad)
    layout["PITCH"] = sides[1]
    table = qkv.new_empty(1 if bias_table is None else num_heads, *sides, dtype=torch.float32)
    size, block = sides[0] * sides[1], 1024
    triton_common.launch(
        _table_kernel,
        (len(table) * triton.cdiv(size, block),),
        bias_ptr=None if bias_table is None else bias_table.contiguous(),
        table_ptr=table,
        table_size=size,
        **layout,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return layout | {
        "qkv_ptr": qkv,
        "table_ptr": table,
        "mask_ptr": None if key_mask is None else key_mask.contiguous(),
        "batch": batch,
        "height": height,
        "width": width,
        "num_heads": num_heads,
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "table_size": 0 if bias_table is None else size,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block(head_dim),
        "PRECISION": triton_common.precision(qkv.dtype, gpu),
        "PTX": gpu.has_ptx,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
    }, shapes


def _block(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _shapes(
    head_dim: int,
    dtype: torch.dtype,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    masked: bool,
    gpu: Machine,
) -> dict[str, dict[str, int]]:
    """The tiles, steps, warps, stages and registers of each kernel of tiles."""
    row = _block(head_dim) * dtype.itemsize
    tokens = 64 if row <= 128 else 32 if row <= 256 else 16
    # Large steps take fewer instructions, and more registers, float32's most.
    keys = tokens // 2 if dtype == torch.float32 else tokens
    # These were the fastest on an H100: with fewer registers, more programs run on a processor, which hides latency.
    limited = gpu.name == "sm_90" and dtype != torch.float32 and head_dim <= 32

    def shape(keys: int, num_stages: int, registers: int) -> dict[str, int]:
        tile, step = cost_model.best_tiles(tuple(kernel_size), tuple(stride), tuple(is_causal), tokens, max(16, keys))
        sides = {"TILE_H": tile[0], "TILE_W": tile[1], "STEP_H": step[0], "STEP_W": step[1]}
        options = {"num_warps": 4 if row <= 256 else 8, "num_stages": num_stages}
        return sides | options | ({"maxnreg": registers} if limited else {})

    return {
        "fwd": shape(keys, 3, 112),
        "query": shape(keys, 3, 128) if limited else shape(keys // 2, 1, 0),
        "key_value": shape(keys // 2, 1, 128),
        "bias": shape(keys, 3, 255 if masked else 168),  # with a mask, 168 would spill
    }


def _tiles(common: dict[str, Any], shape: dict[str, int]) -> int:
    """The number of tiles of an image, over all dilation groups."""
    tiles = 1
    for length, dilation, tile in (("height", "dilation_h", "TILE_H"), ("width", "dilation_w", "TILE_W")):
        tiles *= triton.cdiv(triton.cdiv(common[length], common[dilation]), shape[tile]) * common[dilation]
    return tiles


def _launch(kernel: Any, common: dict[str, Any], shape: dict[str, int], **arguments: Any) -> None:
    """Launch a kernel whose programs take one tile of several images, for which they compute places only once."""
    batch, tiles = common["batch"], _tiles(common, shape) * common["num_heads"]
    # Only with enough programs, so that the GPU stays full.
    enough = 16 * triton_common.machine(common["qkv_ptr"]).num_processors
    images = torch.sym_max(1, torch.sym_min(4, batch * tiles // enough))
    grid = (triton.cdiv(batch, images) * tiles,)
    triton_common.launch(kernel, grid, per_program=images, **common, **shape, **arguments)
