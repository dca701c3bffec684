"""Sums over the tokens of a head in Triton, shared by operators that attend to all tokens at a linear cost.

The tokens of an image are divided into parts, whatever the batch. A program takes a part and a head; the sums of the
parts are merged in their order, so results are the same each time. The sums of an image and head are the rows of its
state, vectors of D numbers; the first D rows may be a matrix.

Letters: B images, H, W map, T tokens, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import load_rows, store_rows

# A part has at most this many tokens: enough to make its matrix small next to what is read for it.
PART = 1024
# One compiled kernel serves all sizes of maps. Strides stay specialized: rows are read 16 bytes at a time only if
# Triton knows that they are multiples of 16.
NOT_SPECIALIZED = ("tokens", "height", "width", "parts", "per_part")


@triton.jit
def program(parts, HEADS: tl.constexpr):
    """Head, part and image of a program; neighbours read neighbouring heads of the same tokens."""
    rest = tl.program_id(0) // HEADS
    return tl.program_id(0) % HEADS, rest % parts, (rest // parts).to(tl.int64)


@triton.jit
def load_tokens(
    ptr, image, head, token, tokens, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr
):  # fmt: skip
    """Rows of a map (B, T, stride)."""
    return load_rows(ptr, (image * tokens + token) * stride + head * HEAD_DIM, token < tokens, HEAD_DIM, BLOCK_D, OTHER)


@triton.jit
def store_tokens(
    ptr, value, image, head, token, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The inverse of `load_tokens`, for a contiguous map."""
    offset = ((image * tokens + token) * HEADS + head) * HEAD_DIM
    store_rows(ptr, offset, value, token < tokens, HEAD_DIM, BLOCK_D)


@triton.jit
def load_vector(ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of a state, (BLOCK_D,): HEAD_DIM numbers, then 0."""
    channel = tl.arange(0, BLOCK_D)
    return tl.load(ptr + channel, mask=channel < HEAD_DIM, other=0.0)


@triton.jit
def store_vector(ptr, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_vector`."""
    channel = tl.arange(0, BLOCK_D)
    tl.store(ptr + channel, value, mask=channel < HEAD_DIM)


@triton.jit
def load_matrix(ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The matrix of a state, float32."""
    row = tl.arange(0, BLOCK_D)
    return load_rows(ptr, row * HEAD_DIM, row < HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def factor_of_products(ptr, dtype: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The matrix of a state in `dtype`, divided by its largest number, and that number; it may exceed float16."""
    matrix = load_matrix(ptr, HEAD_DIM, BLOCK_D)
    largest = tl.max(tl.max(tl.abs(matrix), 1), 0)
    unit = tl.where(largest == 0.0, 1.0, largest)
    return (matrix / unit).to(dtype), unit


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _merge_kernel(
    states_ptr, lses_ptr, state_ptr, lse_ptr, parts,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the states of all parts, in their order; with `lses`, each times 2^(lse of the part - lse)."""
    BLOCKS: tl.constexpr = (ROWS + BLOCK - 1) // BLOCK
    group = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    if lses_ptr is not None:
        highest = tl.full([], float("-inf"), tl.float32)
        for part in range(parts):
            highest = tl.maximum(highest, tl.load(lses_ptr + group * parts + part))
        total = tl.full([], 0.0, tl.float32)
        for part in range(parts):
            total += tl.exp2(tl.load(lses_ptr + group * parts + part) - highest)
        lse = highest + tl.log2(total)
        tl.store(lse_ptr + group, lse, mask=tl.program_id(0) % BLOCKS == 0)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for part in range(parts):
        states = states_ptr + (group * parts + part) * (ROWS * HEAD_DIM)
        state = load_rows(states, row * HEAD_DIM, row < ROWS, HEAD_DIM, BLOCK_D)
        if lses_ptr is not None:
            state *= tl.exp2(tl.load(lses_ptr + group * parts + part) - lse)
        acc += state
    store_rows(state_ptr + group * (ROWS * HEAD_DIM), row * HEAD_DIM, acc, row < ROWS, HEAD_DIM, BLOCK_D)


def merged(states: Tensor, lses: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The state (B, N, ROWS, D) of all parts, and its `lse` (B, N)."""
    batch, heads, parts, rows, head_dim = states.shape
    if parts == 1:
        return states.squeeze(2), None if lses is None else lses.squeeze(2)
    state = states.new_empty(batch, heads, rows, head_dim)
    lse = None if lses is None else lses.new_empty(batch, heads)
    block = 16
    triton_common.launch(
        _merge_kernel,
        (batch * heads * triton.cdiv(rows, block),),
        states_ptr=states,
        lses_ptr=lses,
        state_ptr=state,
        lse_ptr=lse,
        parts=parts,
        ROWS=rows,
        HEAD_DIM=head_dim,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return state, lse


def parts_of(q: Tensor, num_heads: int) -> dict[str, int]:
    """The parts of an image, each of whole tiles and not empty."""
    tokens, block = q.shape[1] * q.shape[2], tiles_of(q, num_heads)["BLOCK"]
    per_part = triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, PART)), block) * block
    return {"tokens": tokens, "parts": triton.cdiv(tokens, per_part), "per_part": per_part}


def tiles_of(q: Tensor, num_heads: int, *, backward: bool = False) -> dict[str, Any]:
    """The sizes of tiles, the precision of products, warps and stages."""
    head_dim = q.shape[3] // num_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    gpu = triton_common.machine(q)
    # As many tokens and as few warps as spill no registers; AMD's warps have twice as many threads. In float32, heads
    # of more than 64 channels spill some in the backward pass nevertheless.
    if q.element_size() > 2:
        block = 16 if backward or block_d >= 128 else 32
        num_warps = 16 if block_d >= 128 else 8 if block_d >= 64 and backward and not gpu.is_amd else 4
    else:
        block = 64 if block_d < (64 if backward else 128) else 32
        num_warps = 8 if block_d >= (64 if backward and not gpu.is_amd else 128) else 4
    return {
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": block,
        "PRECISION": triton_common.precision(q.dtype, gpu, memory_bound=True),
        "num_warps": num_warps,
        "num_stages": 1 if gpu.is_amd else 2,
    }
