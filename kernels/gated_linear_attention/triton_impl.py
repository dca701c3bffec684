"""Gated linear attention in Triton: a program visits the tokens of an image, head and direction, chunk after chunk.

The state stays in registers. Within a chunk, the decay of each pair of tokens is the exponential of the sum of the log
gates between them, which is at most 0, so nothing overflows. Products have operands of float32, rounded to TF32 for
half precision: float16 could not hold the states.

The backward pass visits the tokens again for the gradient of the queries, and then in reverse for the others. The
gradient of a log gate is the sum of q * dq - k * dk over the tokens from there on. What the tokens of a chunk give each
other cancels, rounded or not. Products with states are nearly exact, as their rounding would grow with the number of
tokens. No program adds to what another one writes, so results are the same each time.

Letters: B images, T tokens, N heads, K channels of a key, V channels of a value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.triton_common import LOG2E, dot, evenly_spaced, load_rows, store_rows

# Gates below 2 ** LEAST count as this: what is left of earlier tokens is far below the precision of float32, and the
# sums of log gates keep their digits.
LEAST: tl.constexpr = tl.constexpr(-40.0)
CHUNK = 16  # tokens; as many as a matrix product has rows at least
# One compiled kernel serves all numbers of tokens. Strides stay specialized: rows are read 16 bytes at a time only if
# Triton knows that they are multiples of 16.
NOT_SPECIALIZED = ("batch", "tokens")


@triton.jit
def _program(batch, HEADS: tl.constexpr):
    """Direction (1 for reverse), image and head of a program; neighbours read neighbouring heads of the same tokens."""
    rest = tl.program_id(0) // HEADS
    return rest // batch, (rest % batch).to(tl.int64), tl.program_id(0) % HEADS


@triton.jit
def _rows(ptr, first, token, valid, stride, HEADS: tl.constexpr, head, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head of a tensor (B, T, stride), in float32."""
    return load_rows(ptr, (first + token) * stride + head * DIM, valid, DIM, BLOCK_D).to(tl.float32)


@triton.jit
def _sums(
    gates_ptr, reverse_gates_ptr, reverse, first, token, valid, stride, reverse_stride, head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log2 of the gates of a chunk, their sums up to each token, and the sums of all."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    place = gates_ptr + ((first + token) * stride + head * DIM)[:, None] + channel
    if reverse_gates_ptr is not None:
        reverse_place = reverse_gates_ptr + ((first + token) * reverse_stride + head * DIM)[:, None] + channel
        place = tl.where(reverse == 1, reverse_place, place)
    gates = tl.load(place, mask=valid[:, None] & (channel < DIM), other=0.0).to(tl.float32) * LOG2E
    bounded = tl.maximum(gates, LEAST)
    return gates, tl.cumsum(bounded, 0), tl.sum(bounded, 0)


@triton.jit
def _decays(sums, BLOCK: tl.constexpr):
    """What is left of each token's key at each token from it on, (to, from, K); 0 at earlier ones."""
    at = tl.arange(0, BLOCK)
    later = (at[:, None] >= at[None, :])[:, :, None]
    return tl.exp2(tl.where(later, sums[:, None, :] - sums[None, :, :], float("-inf")))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, reverse_gates_ptr, out_ptr,
    scale, q_stride, k_stride, v_stride, gates_stride, reverse_gates_stride, batch, tokens,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of each direction, (directions, B, T, N, V)."""
    reverse, image, head = _program(batch, HEADS)
    first = image * tokens
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for start in range(0, tokens, BLOCK):
        step = start + tl.arange(0, BLOCK)
        valid = step < tokens
        token = tl.where(reverse == 1, tokens - 1 - step, step)
        q = _rows(q_ptr, first, token, valid, q_stride, HEADS, head, KEY_DIM, BLOCK_K) * scale
        k = _rows(k_ptr, first, token, valid, k_stride, HEADS, head, KEY_DIM, BLOCK_K)
        v = _rows(v_ptr, first, token, valid, v_stride, HEADS, head, VALUE_DIM, BLOCK_V)
        _, sums, end = _sums(
            gates_ptr, reverse_gates_ptr, reverse, first, token, valid, gates_stride, reverse_gates_stride, head,
            KEY_DIM, BLOCK_K,
        )  # fmt: skip
        weights = tl.sum(q[:, None, :] * k[None, :, :] * _decays(sums, BLOCK), 2)
        out = dot(weights, v, PRECISION) + dot(q * tl.exp2(sums), state, PRECISION)
        state = state * tl.exp2(end)[:, None] + dot(tl.trans(k * tl.exp2(end[None, :] - sums)), v, PRECISION)
        offset = (((reverse * batch + image) * tokens + token) * HEADS + head) * VALUE_DIM
        store_rows(out_ptr, offset, out, valid, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_q_kernel(
    grad_ptr, k_ptr, v_ptr, gates_ptr, reverse_gates_ptr, q_grad_ptr,
    scale, grad_stride, k_stride, v_stride, gates_stride, reverse_gates_stride, batch, tokens,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries from each direction, (directions, B, T, N, K), float32."""
    reverse, image, head = _program(batch, HEADS)
    first = image * tokens
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for start in range(0, tokens, BLOCK):
        step = start + tl.arange(0, BLOCK)
        valid = step < tokens
        token = tl.where(reverse == 1, tokens - 1 - step, step)
        grad = _rows(grad_ptr, first, token, valid, grad_stride, HEADS, head, VALUE_DIM, BLOCK_V) * scale
        k = _rows(k_ptr, first, token, valid, k_stride, HEADS, head, KEY_DIM, BLOCK_K)
        v = _rows(v_ptr, first, token, valid, v_stride, HEADS, head, VALUE_DIM, BLOCK_V)
        _, sums, end = _sums(
            gates_ptr, reverse_gates_ptr, reverse, first, token, valid, gates_stride, reverse_gates_stride, head,
            KEY_DIM, BLOCK_K,
        )  # fmt: skip
        weights_grad = dot(grad, tl.trans(v), PRECISION)
        q_grad = tl.sum(weights_grad[:, :, None] * k[None, :, :] * _decays(sums, BLOCK), 1)
        q_grad += dot(grad, tl.trans(state), STATE_PRECISION) * tl.exp2(sums)
        state *= tl.exp2(end)[:, None]
        state += dot(tl.trans(k * tl.exp2(end[None, :] - sums)), v, STATE_PRECISION)
        offset = (((reverse * batch + image) * tokens + token) * HEADS + head) * KEY_DIM
        store_rows(q_grad_ptr, offset, q_grad, valid, KEY_DIM, BLOCK_K)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, gates_ptr, reverse_gates_ptr, q_grad_ptr,
    k_grad_ptr, v_grad_ptr, gates_grad_ptr,
    scale, grad_stride, q_stride, k_stride, v_stride, gates_stride, reverse_gates_stride, batch, tokens,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys, values and log gates from each direction, (directions, B, T, N, K or V)."""
    reverse, image, head = _program(batch, HEADS)
    first = image * tokens
    state_grad = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    later = tl.zeros([BLOCK_K], tl.float32)
    chunks = tl.cdiv(tokens, BLOCK)
    for i in range(0, chunks):
        step = (chunks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        valid = step < tokens
        token = tl.where(reverse == 1, tokens - 1 - step, step)
        grad = _rows(grad_ptr, first, token, valid, grad_stride, HEADS, head, VALUE_DIM, BLOCK_V) * scale
        q = _rows(q_ptr, first, token, valid, q_stride, HEADS, head, KEY_DIM, BLOCK_K)
        k = _rows(k_ptr, first, token, valid, k_stride, HEADS, head, KEY_DIM, BLOCK_K)
        v = _rows(v_ptr, first, token, valid, v_stride, HEADS, head, VALUE_DIM, BLOCK_V)
        gates, sums, end = _sums(
            gates_ptr, reverse_gates_ptr, reverse, first, token, valid, gates_stride, reverse_gates_stride, head,
            KEY_DIM, BLOCK_K,
        )  # fmt: skip
        row = (reverse * batch + image) * tokens + token
        q_grad = load_rows(q_grad_ptr, (row * HEADS + head) * KEY_DIM, valid, KEY_DIM, BLOCK_K)
        decays = _decays(sums, BLOCK)
        products = q[:, None, :] * decays
        weights = tl.sum(products * k[None, :, :], 2)
        weights_grad = dot(grad, tl.trans(v), PRECISION)
        rest = tl.exp2(end[None, :] - sums)
        v_grad = dot(tl.trans(weights), grad, PRECISION) + dot(k * rest, state_grad, PRECISION)
        k_grad = tl.sum(weights_grad[:, :, None] * products, 0)
        k_grad += dot(v, tl.trans(state_grad), STATE_PRECISION) * rest
        state_grad = state_grad * tl.exp2(end)[:, None]
        state_grad += dot(tl.trans(q * tl.exp2(sums)), grad, STATE_PRECISION)
        own = q * q_grad - k * k_grad
        total = tl.sum(own, 0)
        gates_grad = own - tl.cumsum(own, 0) + (later + total)[None, :]
        later += total
        store_rows(k_grad_ptr, (row * HEADS + head) * KEY_DIM, k_grad, valid, KEY_DIM, BLOCK_K)
        store_rows(v_grad_ptr, (row * HEADS + head) * VALUE_DIM, v_grad, valid, VALUE_DIM, BLOCK_V)
        gates_grad = tl.where(gates < LEAST, 0.0, gates_grad)
        store_rows(gates_grad_ptr, (row * HEADS + head) * KEY_DIM, gates_grad, valid, KEY_DIM, BLOCK_K)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, *, scale: float
) -> Tensor:
    """See `op.forward`."""
    shared = _shared(q, k, v, log_gates, reverse_log_gates)
    q = _spaced(q)
    out = v.new_empty(shared["directions"], *v.shape)
    _launch(_fwd_kernel, shared, q_ptr=q, q_stride=q.stride(2), out_ptr=out, scale=scale)
    return _added(out, v)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gates: Tensor,
    reverse_log_gates: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    shared = _shared(q, k, v, log_gates, reverse_log_gates)
    grad, spaced = _spaced(grad), _spaced(q)
    directions = shared["directions"]
    q_grad = q.new_empty(directions, *q.shape, dtype=torch.float32)
    k_grad, v_grad = (x.new_empty(directions, *x.shape) for x in (k, v))
    gates_grad = shared["gates_ptr"].new_empty(directions, *log_gates.shape)
    of_output: dict[str, Any] = {"grad_ptr": grad, "grad_stride": grad.stride(2), "scale": scale}
    of_output["STATE_PRECISION"] = "ieee" if shared["PRECISION"] == "ieee" else "tf32x3"
    _launch(_bwd_q_kernel, shared, q_grad_ptr=q_grad, **of_output)
    _launch(
        _bwd_kv_kernel,
        shared | {"num_warps": 4 if shared["BLOCK_K"] <= 16 else 8},  # with fewer, registers spill
        q_ptr=spaced,
        q_stride=spaced.stride(2),
        q_grad_ptr=q_grad,
        k_grad_ptr=k_grad,
        v_grad_ptr=v_grad,
        gates_grad_ptr=gates_grad,
        **of_output,
    )
    of_gates, of_reverse = gates_grad[0].to(log_gates.dtype, copy=True), gates_grad.new_empty(0)
    if reverse_log_gates is not None:
        of_reverse = gates_grad[1].to(reverse_log_gates.dtype, copy=True)
    return _added(q_grad, q), _added(k_grad, k), _added(v_grad, v), of_gates, of_reverse


def _spaced(x: Tensor) -> Tensor:
    """(B, T, N, D) as a map (B, 1, T, N D) whose tokens are evenly spaced."""
    return evenly_spaced(x.flatten(2).unsqueeze(1))


def _added(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of both directions, in the dtype of `like`; the only one as it is."""
    return parts[0].to(like.dtype) if len(parts) == 1 else parts.sum(0, dtype=torch.float32).to(like.dtype)


def _shared(q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None) -> dict[str, Any]:
    """The arguments that all kernels have, and the number of directions."""
    (batch, tokens, num_heads, key_dim), value_dim = q.shape, v.shape[3]
    block_k, block_v = (max(triton.next_power_of_2(dim), 16) for dim in (key_dim, value_dim))
    gpu = triton_common.machine(q)
    k, v, gates = _spaced(k), _spaced(v), _spaced(log_gates)
    reverse_gates = None
    if reverse_log_gates is not None:  # a program reads the gates of its direction, by one address of one dtype
        dtype = torch.promote_types(log_gates.dtype, reverse_log_gates.dtype)
        gates, reverse_gates = gates.to(dtype), _spaced(reverse_log_gates.to(dtype))
    precision = triton_common.precision(q.dtype, gpu, memory_bound=True)
    return {
        "directions": 1 if reverse_gates is None else 2,
        "k_ptr": k,
        "v_ptr": v,
        "gates_ptr": gates,
        "reverse_gates_ptr": reverse_gates,
        "k_stride": k.stride(2),
        "v_stride": v.stride(2),
        "gates_stride": gates.stride(2),
        "reverse_gates_stride": 0 if reverse_gates is None else reverse_gates.stride(2),
        "batch": batch,
        "tokens": tokens,
        "HEADS": num_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK": CHUNK,
        # TF32 has as many digits as float16, and the range of float32.
        "PRECISION": precision if q.dtype == torch.float32 or gpu.is_amd else "tf32",
        "num_warps": 4 if block_k <= 32 else 8,
        "num_stages": 1 if gpu.is_amd else 2,
    }


def _launch(kernel: Any, shared: dict[str, Any], **arguments: Any) -> None:
    given = {name: value for name, value in shared.items() if name != "directions"}
    programs = shared["directions"] * given["batch"] * given["HEADS"]
    triton_common.launch(kernel, (programs,), **given, **arguments)
