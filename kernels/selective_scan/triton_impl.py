"""Selective scan in Triton: a program per image, direction and block of channels, forward and backward.

A program visits the tokens of its direction a tile at a time. It reads them where they are in the map, computes the
states of the tile by an associative scan in registers, and takes the last state along. The state before each tile is
stored. The backward pass visits the tiles from the last to the first, computes their states again, and scans the
gradients of the states the other way. Each direction has an output of its own, and so have the gradients that several
programs share; PyTorch sums them up, so results are the same each time.

Letters: B images, H, W map, T tokens, K directions, C channels, N numbers of a channel's state. Tiles are (tokens,
numbers, channels).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E

# One compiled kernel serves all sizes of maps.
NOT_SPECIALIZED = ("tokens", "height", "width", "tiles")


@triton.jit
def _program(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, COUNT: tl.constexpr):
    """Block of channels, direction and image of a program; neighbours read neighbouring channels."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    rest = tl.program_id(0) // BLOCKS
    return tl.program_id(0) % BLOCKS, (rest % COUNT).to(tl.int64), (rest // COUNT).to(tl.int64)


@triton.jit
def _place(visit, direction, tokens, height, width, ORDERS: tl.constexpr):
    """The tokens of the map that a direction visits at `visit`; ORDERS has two bits for each direction."""
    order = (ORDERS >> (2 * direction)) & 3
    place = tl.where(order >= 2, tokens - 1 - visit, visit)
    return tl.where(order % 2 == 1, place % height * width + place // height, place)


@triton.jit
def _load(ptr, offset, stride, column, valid, COLUMNS: tl.constexpr):
    """(rows, columns) in float32: the elements `column` of the rows at `offset`, 0 where there are none."""
    mask = valid[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + offset[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(x):
    """log(1 + e^x), with all digits where it is small; x above 20."""
    z = tl.exp2(-tl.abs(x) * LOG2E)
    s = z / (2.0 + z)  # log(1 + z) = 2 artanh(s), and s is at most 1/3
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * series)


@triton.jit
def _step(delta, bias, valid, SOFTPLUS: tl.constexpr):
    """delta' (tokens, channels), 0 for tokens that are not `valid`: they leave a state as it is."""
    step = delta + bias[None, :]
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(valid[:, None], step, 0.0)


@triton.jit
def _decay(step, A):
    """exp(delta' A), (tokens, numbers, channels), given A / log(2)."""
    return tl.exp2(step[:, None, :] * A[None, :, :])


@triton.jit
def _then(decay, state, next_decay, next_state):
    """One after the other of the functions h -> decay h + state."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _vector(ptr, direction, channel, CHANNELS: tl.constexpr):
    """A parameter of a direction, (channels), in float32; 0 if there is none."""
    if ptr is None:
        value = tl.zeros(channel.shape, tl.float32)
    else:
        value = tl.load(ptr + direction * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    return value


@triton.jit
def _numbers(ptr, base, number, channel, NUMBERS: tl.constexpr, CHANNELS: tl.constexpr):
    """Addresses and mask of (numbers, channels)."""
    mask = (number < NUMBERS)[:, None] & (channel < CHANNELS)[None, :]
    return ptr + base + number[:, None] * CHANNELS + channel[None, :], mask


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    x_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, out_ptr, states_ptr,
    x_stride, x_direction, delta_stride, delta_direction, b_stride, b_direction, c_stride, c_direction,
    tokens, height, width, tiles,
    ORDERS: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The output of a direction, (K, B, T, C), and the state before each tile, (B, K, tiles, N, C)."""
    block, direction, image = _program(CHANNELS, BLOCK_C, COUNT)
    channel, number, row = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    a_ptrs, inside = _numbers(a_ptr, direction * NUMBERS * CHANNELS, number, channel, NUMBERS, CHANNELS)
    A = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    D, bias = _vector(d_ptr, direction, channel, CHANNELS), _vector(bias_ptr, direction, channel, CHANNELS)
    images = tl.num_programs(0) // (COUNT * ((CHANNELS + BLOCK_C - 1) // BLOCK_C))
    state = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tile in range(tiles):
        base = ((image * COUNT + direction) * tiles + tile) * (NUMBERS * CHANNELS)
        state_ptrs, _ = _numbers(states_ptr, base, number, channel, NUMBERS, CHANNELS)
        tl.store(state_ptrs, state, mask=inside)
        visit = tile * BLOCK_T + row
        valid = visit < tokens
        place = _place(visit, direction, tokens, height, width, ORDERS)
        token = image * tokens + place
        x = _load(x_ptr + direction * x_direction, token, x_stride, channel, valid, CHANNELS)
        delta = _load(delta_ptr + direction * delta_direction, token, delta_stride, channel, valid, CHANNELS)
        B = _load(b_ptr + direction * b_direction, token, b_stride, number, valid, NUMBERS)
        C = _load(c_ptr + direction * c_direction, token, c_stride, number, valid, NUMBERS)
        step = _step(delta, bias, valid, SOFTPLUS)
        decay = _decay(step, A)
        added = (step * x)[:, None, :] * B[:, :, None]
        added += tl.where((row == 0)[:, None, None], decay * state[None, :, :], 0.0)
        _, states = tl.associative_scan((decay, added), 0, _then)
        state = tl.sum(tl.where((row == BLOCK_T - 1)[:, None, None], states, 0.0), 0)
        out = tl.sum(states * C[:, :, None], 1) + D[None, :] * x
        offset = (direction * images + image) * tokens + place
        mask = valid[:, None] & (channel < CHANNELS)[None, :]
        tl.store(out_ptr + offset[:, None] * CHANNELS + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kernel(
    grad_ptr, x_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, states_ptr,
    x_grad_ptr, delta_grad_ptr, a_grad_ptr, b_grad_ptr, c_grad_ptr, d_grad_ptr, bias_grad_ptr,
    grad_stride, x_stride, x_direction, delta_stride, delta_direction, b_stride, b_direction, c_stride, c_direction,
    tokens, height, width, tiles,
    ORDERS: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The gradients of a direction: delta and, if it is the direction's OWN, x (B, T, K, C), else x (K, B, T, C); B and
    C of each block (blocks, B, T, K, N); A of each image (B, K, N, C), D and the bias (B, K, C).

    With the gradient g_t of a state: g_t = C_t dout_t + decay_(t+1) g_(t+1), and exp(delta' A) h_(t-1) = h_t - added_t
    times g_t is the gradient of delta' A.
    """
    block, direction, image = _program(CHANNELS, BLOCK_C, COUNT)
    channel, number, row = block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    a_ptrs, inside = _numbers(a_ptr, direction * NUMBERS * CHANNELS, number, channel, NUMBERS, CHANNELS)
    A = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    D, bias = _vector(d_ptr, direction, channel, CHANNELS), _vector(bias_ptr, direction, channel, CHANNELS)
    images = tl.num_programs(0) // (COUNT * ((CHANNELS + BLOCK_C - 1) // BLOCK_C))
    arriving = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)  # the gradient of the first state of the tile after this one
    a_grad = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    d_grad = tl.zeros([BLOCK_C], tl.float32)
    bias_grad = tl.zeros([BLOCK_C], tl.float32)
    for reverse in range(tiles):
        tile = tiles - 1 - reverse
        base = ((image * COUNT + direction) * tiles + tile) * (NUMBERS * CHANNELS)
        state_ptrs, _ = _numbers(states_ptr, base, number, channel, NUMBERS, CHANNELS)
        state = tl.load(state_ptrs, mask=inside, other=0.0)
        visit = tile * BLOCK_T + row
        valid = visit < tokens
        place = _place(visit, direction, tokens, height, width, ORDERS)
        token = image * tokens + place
        x = _load(x_ptr + direction * x_direction, token, x_stride, channel, valid, CHANNELS)
        deltas = delta_ptr + direction * delta_direction
        delta = _load(deltas, token, delta_stride, channel, valid, CHANNELS)
        B = _load(b_ptr + direction * b_direction, token, b_stride, number, valid, NUMBERS)
        C = _load(c_ptr + direction * c_direction, token, c_stride, number, valid, NUMBERS)
        grad = _load(grad_ptr, token, grad_stride, channel, valid, CHANNELS)
        step = _step(delta, bias, valid, SOFTPLUS)
        product = step * x
        decay = _decay(step, A * LOG2E)
        own = product[:, None, :] * B[:, :, None]
        _, states = tl.associative_scan(
            (decay, own + tl.where((row == 0)[:, None, None], decay * state[None, :, :], 0.0)), 0, _then
        )

        after = visit + 1 < tokens
        next_token = image * tokens + _place(visit + 1, direction, tokens, height, width, ORDERS)
        next_step = _step(_load(deltas, next_token, delta_stride, channel, after, CHANNELS), bias, after, SOFTPLUS)
        next_decay = _decay(next_step, A * LOG2E)
        last = (row == BLOCK_T - 1)[:, None, None]
        given = grad[:, None, :] * C[:, :, None] + tl.where(last, next_decay * arriving[None, :, :], 0.0)
        _, grads = tl.associative_scan((next_decay, given), 0, _then, reverse=True)
        arriving = tl.sum(tl.where((row == 0)[:, None, None], grads, 0.0), 0)

        of_exponent = grads * (states - own)
        a_grad += tl.sum(of_exponent * step[:, None, :], 0)
        of_product = tl.sum(grads * B[:, :, None], 1)
        of_step = tl.sum(of_exponent * A[None, :, :], 1) + of_product * x
        if SOFTPLUS:
            of_step *= 1.0 / (1.0 + tl.exp2((delta + bias[None, :]) * -LOG2E))
        d_grad += tl.sum(grad * x, 0)
        bias_grad += tl.sum(tl.where(valid[:, None], of_step, 0.0), 0)

        mask = valid[:, None] & (channel < CHANNELS)[None, :]
        x_grad = step * of_product + D[None, :] * grad
        offset = (token * COUNT + direction)[:, None] * CHANNELS + channel[None, :]
        tl.store(delta_grad_ptr + offset, of_step.to(delta_grad_ptr.dtype.element_ty), mask=mask)
        if not OWN:
            offset = ((direction * images + image) * tokens + place)[:, None] * CHANNELS + channel[None, :]
        tl.store(x_grad_ptr + offset, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        mask = valid[:, None] & (number < NUMBERS)[None, :]
        rows = (block.to(tl.int64) * images * tokens + token) * COUNT + direction
        offset = rows[:, None] * NUMBERS + number[None, :]
        tl.store(b_grad_ptr + offset, tl.sum(grads * product[:, None, :], 2), mask=mask)
        tl.store(c_grad_ptr + offset, tl.sum(states * grad[:, None, :], 2), mask=mask)
    pair = image * COUNT + direction
    a_grad_ptrs, _ = _numbers(a_grad_ptr, pair * NUMBERS * CHANNELS, number, channel, NUMBERS, CHANNELS)
    tl.store(a_grad_ptrs, a_grad, mask=inside)
    if d_ptr is not None:
        tl.store(d_grad_ptr + pair * CHANNELS + channel, d_grad, mask=channel < CHANNELS)
    if bias_ptr is not None:
        tl.store(bias_grad_ptr + pair * CHANNELS + channel, bias_grad, mask=channel < CHANNELS)


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor]:
    """See `op.forward`."""
    batch, height, width, *_, channels = x.shape
    count, _, numbers = A.shape
    maps = _maps(x, delta, B, C)
    shared = _shared(x, A, softplus, directions)
    # In half precision, the output of one direction may exceed the range that the sum lies in.
    dtype = x.dtype if count == 1 else torch.float32
    outs = x.new_empty(count, batch, height, width, channels, dtype=dtype)
    states = x.new_empty(batch, count, shared["tiles"], numbers, channels, dtype=torch.float32)
    triton_common.launch(
        _fwd_kernel, **maps, **_parameters(A, D, delta_bias), out_ptr=outs, states_ptr=states, **shared
    )
    return outs[0] if count == 1 else outs.sum(0).to(x.dtype), states


def backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    *,
    softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    batch, height, width, *_, channels = x.shape
    count, _, numbers = A.shape
    maps = _maps(x, delta, B, C)
    shared = _shared(x, A, softplus, directions, backward=True)
    grad, (grad_stride, _) = _tokens(grad[:, :, :, None])
    blocks = triton.cdiv(channels, shared["BLOCK_C"])
    own = x.ndim == 5 or count == 1
    x_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if own
        else x.new_empty(count, *x.shape, dtype=torch.float32)
    )
    delta_grad = torch.empty_like(delta, memory_format=torch.contiguous_format)
    A_grads = states.new_empty(batch, count, numbers, channels)
    B_grads, C_grads = (states.new_empty(blocks, batch, height, width, count, numbers) for _ in range(2))
    D_grads, bias_grads = (
        states.new_empty(0 if parameter is None else batch, count, channels) for parameter in (D, delta_bias)
    )
    triton_common.launch(
        _bwd_kernel,
        grad_ptr=grad,
        **maps,
        **_parameters(A, D, delta_bias),
        states_ptr=states,
        x_grad_ptr=x_grad,
        delta_grad_ptr=delta_grad,
        a_grad_ptr=A_grads,
        b_grad_ptr=B_grads,
        c_grad_ptr=C_grads,
        d_grad_ptr=None if D is None else D_grads,
        bias_grad_ptr=None if delta_bias is None else bias_grads,
        grad_stride=grad_stride,
        OWN=own,
        **shared,
    )
    none = x.new_empty(0)
    return (
        x_grad if own else x_grad.sum(0).to(x.dtype),
        delta_grad,
        A_grads.sum(0).transpose(1, 2).contiguous().to(A.dtype),
        B_grads.sum(0).to(B.dtype),
        C_grads.sum(0).to(C.dtype),
        none if D is None else D_grads.sum(0).to(D.dtype),
        none.clone() if delta_bias is None else bias_grads.sum(0).to(delta_bias.dtype),
    )


def _tokens(tensor: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A map (B, H, W, K, .) as (B H W, K, .), and its strides of tokens and directions; copied if need be."""
    flat = tensor.flatten(0, 2)
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    return flat, (flat.stride(0), flat.stride(1))


def _maps(x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> dict[str, Any]:
    """The maps and their strides."""
    given: dict[str, Any] = {}
    for name, tensor in (("x", x), ("delta", delta), ("b", B), ("c", C)):
        tensor, strides = _tokens(tensor if tensor.ndim == 5 else tensor[:, :, :, None])
        given[f"{name}_ptr"] = tensor
        given[f"{name}_stride"] = strides[0]
        given[f"{name}_direction"] = strides[1] if name != "x" or x.ndim == 5 else 0
    return given


def _parameters(A: Tensor, D: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """The parameters of the directions, A as (K, N, C)."""
    return {
        "a_ptr": A.transpose(1, 2).contiguous(),
        "d_ptr": None if D is None else D.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
    }


def _shared(x: Tensor, A: Tensor, softplus: bool, directions: list[int], *, backward: bool = False) -> dict[str, Any]:
    """The grid, sizes and tiles. Both passes have tiles of as many tokens, before each of which a state is stored."""
    batch, height, width, *_, channels = x.shape
    count, _, numbers = A.shape
    block_n = triton.next_power_of_2(numbers)
    # Larger tiles and fewer warps spill registers in the backward pass.
    block_t, block_c = 16, 32 if block_n <= 2 else 16
    num_warps = 4 if block_n > 2 else 2 if backward else 1
    tokens = height * width
    return {
        "grid": (batch * count * triton.cdiv(channels, block_c),),
        "tokens": tokens,
        "height": height,
        "width": width,
        "tiles": triton.cdiv(tokens, block_t),
        "ORDERS": sum(order << (2 * k) for k, order in enumerate(directions)),
        "COUNT": count,
        "CHANNELS": channels,
        "NUMBERS": numbers,
        "SOFTPLUS": softplus,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "num_warps": num_warps,
        "num_stages": 1,
    }
