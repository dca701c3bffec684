"""Flow attention in Triton: each pair of sums over the tokens is a pass over them, and needs the pair before it.

With f_i = sigmoid(q_i), g_j = sigmoid(k_j), and the flows of `op.flow_attention`, the passes of an image and head are

    forward    q, k   sinks = sum_i f_i,  sources = sum_j g_j
               q, k   shared = sum_i f_i / in_i,  drained = sum_j g_j / out_j
               k, v   matrix = sum_j g_j^T e^sent_j v_j,  total = sum_j e^sent_j
               q      the output
    backward   q      the gradients of the matrix and of `drained`
               k, v   those of `shared` and of `sinks`
               q      that of `sources`, and that of q
               k, v   those of k and v

What is sent is at most 1, so the softmax needs no maximum. A pass takes the parts of the tokens, whose sums are merged
(see `zoo.kernels.token_sums`). Flows are computed again in each pass: they are products with a vector.

Letters: B images, H, W map, T tokens, N heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.token_sums import (
    NOT_SPECIALIZED,
    factor_of_products,
    load_matrix,
    load_tokens,
    load_vector,
    merged,
    parts_of,
    program,
    store_tokens,
    store_vector,
    tiles_of,
)
from zoo.kernels.triton_common import LOG2E, dot, evenly_spaced, store_rows


@triton.jit
def _factor(ptr, eps, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A sum of tokens plus `eps`, with which a flow is a product, and what is added to that."""
    factor = tl.where(tl.arange(0, BLOCK_D) < HEAD_DIM, load_vector(ptr, HEAD_DIM, BLOCK_D) + eps, 0.0)
    return factor, eps * tl.sum(factor, 0) + eps


@triton.jit
def _product(x, vector):
    """x_i . vector for each token."""
    return tl.sum(x * vector[None, :], 1)


@triton.jit
def _weighted(x, weights):
    """sum_i weights_i x_i."""
    return tl.sum(x * weights[:, None], 0)


@triton.jit
def _inverse(x, factor, base, valid):
    """1 / flow, 0 for tokens that are not `valid`."""
    return tl.where(valid, 1.0 / (_product(x, factor) + base), 0.0)


@triton.jit
def _weights(sent, valid):
    """e^sent, clipped, 0 for tokens that are not `valid`."""
    return tl.where(valid, tl.exp2(tl.minimum(tl.maximum(sent, -1.0), 1.0) * LOG2E), 0.0)


@triton.jit
def _outer(x, y, PRECISION: tl.constexpr):
    """x^T y, for float32 `x` of any size; it may leave the range of float16, of which `y` may be."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    unit = tl.where(largest == 0.0, 1.0, largest)
    return dot(tl.trans((x / unit).to(y.dtype)), y, PRECISION) * unit


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sums_kernel(
    q_ptr, k_ptr, sums_ptr, q_stride, k_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sinks` and `sources` of each part, (B, N, parts, 2, D)."""
    head, part, image = program(parts, HEADS)
    sinks = tl.zeros([BLOCK_D], tl.float32)
    sources = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        sinks += tl.sum(tl.sigmoid(q.to(tl.float32)), 0)
        sources += tl.sum(tl.sigmoid(k.to(tl.float32)), 0)
    sums = sums_ptr + ((image * HEADS + head) * parts + part) * (2 * HEAD_DIM)
    store_vector(sums, sinks, HEAD_DIM, BLOCK_D)
    store_vector(sums + HEAD_DIM, sources, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _flows_kernel(
    q_ptr, k_ptr, sums_ptr, flows_ptr, eps, q_stride, k_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`shared` and `drained` of each part, (B, N, parts, 2, D)."""
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    sinks, sinks_base = _factor(sums_ptr + group * (2 * HEAD_DIM), eps, HEAD_DIM, BLOCK_D)
    sources, sources_base = _factor(sums_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, eps, HEAD_DIM, BLOCK_D)
    shared = tl.zeros([BLOCK_D], tl.float32)
    drained = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        sink, source = tl.sigmoid(q.to(tl.float32)), tl.sigmoid(k.to(tl.float32))
        shared += _weighted(sink, _inverse(sink, sources, sources_base, token < tokens))
        drained += _weighted(source, _inverse(source, sinks, sinks_base, token < tokens))
    flows = flows_ptr + (group * parts + part) * (2 * HEAD_DIM)
    store_vector(flows, shared, HEAD_DIM, BLOCK_D)
    store_vector(flows + HEAD_DIM, drained, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _state_kernel(
    k_ptr, v_ptr, flows_ptr, states_ptr, eps, k_stride, v_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The matrix of each part, and a row of `total`, (B, N, parts, D + 1, D)."""
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    shared, base = _factor(flows_ptr + group * (2 * HEAD_DIM), eps, HEAD_DIM, BLOCK_D)
    matrix = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        v = load_tokens(v_ptr, image, head, token, tokens, v_stride, HEAD_DIM, BLOCK_D, 0.0)
        source = tl.sigmoid(k.to(tl.float32))
        weights = _weights(_product(source, shared) + base, token < tokens)
        total += tl.sum(weights, 0)
        matrix += dot(tl.trans((source * weights[:, None]).to(v.dtype)), v, PRECISION)
    state = states_ptr + (group * parts + part) * ((HEAD_DIM + 1) * HEAD_DIM)
    row = tl.arange(0, BLOCK_D)
    store_rows(state, row * HEAD_DIM, matrix, row < HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_vector(state + HEAD_DIM * HEAD_DIM, total + tl.zeros([BLOCK_D], tl.float32), HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _out_kernel(
    q_ptr, sums_ptr, flows_ptr, state_ptr, out_ptr, eps, q_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a part of the queries."""
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    sources, sources_base = _factor(sums_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, eps, HEAD_DIM, BLOCK_D)
    drained, drained_base = _factor(flows_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, eps, HEAD_DIM, BLOCK_D)
    state = state_ptr + group * ((HEAD_DIM + 1) * HEAD_DIM)
    matrix, unit = factor_of_products(state, q_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    unit *= tokens / tl.load(state + HEAD_DIM * HEAD_DIM)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        sink = tl.sigmoid(q.to(tl.float32))
        gate = tl.sigmoid(_product(sink, drained) + drained_base)
        share = _inverse(sink, sources, sources_base, token < tokens)
        out = dot(sink.to(q.dtype), matrix, PRECISION) * (gate * share * unit)[:, None]
        store_tokens(out_ptr, out, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_sinks_kernel(
    grad_ptr, q_ptr, sums_ptr, flows_ptr, state_ptr, flows_grad_ptr, state_grads_ptr, sources_grads_ptr, q_grad_ptr,
    eps, grad_stride, q_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A pass over the queries, without or with the gradients of `shared` and `sinks`.

    Without them, it sums up the gradients of the matrix and of `drained`, (B, N, parts, D + 1, D); with them, that of
    `sources`, (B, N, parts, 1, D), and writes that of the queries.
    """
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    sources, sources_base = _factor(sums_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, eps, HEAD_DIM, BLOCK_D)
    drained, drained_base = _factor(flows_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, eps, HEAD_DIM, BLOCK_D)
    state = state_ptr + group * ((HEAD_DIM + 1) * HEAD_DIM)
    matrix, unit = factor_of_products(state, q_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    matrix = tl.trans(matrix)
    unit *= tokens / tl.load(state + HEAD_DIM * HEAD_DIM)
    vector_grad = tl.zeros([BLOCK_D], tl.float32)  # of `drained` or of `sources`
    if q_grad_ptr is None:
        matrix_grad = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    else:
        shared_grad = load_vector(flows_grad_ptr + group * (2 * HEAD_DIM), HEAD_DIM, BLOCK_D)
        sinks_grad = load_vector(flows_grad_ptr + group * (2 * HEAD_DIM) + HEAD_DIM, HEAD_DIM, BLOCK_D)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        grad = load_tokens(grad_ptr, image, head, token, tokens, grad_stride, HEAD_DIM, BLOCK_D, 0.0)
        sink = tl.sigmoid(q.to(tl.float32))
        gate = tl.sigmoid(_product(sink, drained) + drained_base)
        share = _inverse(sink, sources, sources_base, token < tokens)
        back = dot(grad, matrix, PRECISION) * (gate * share * unit)[:, None]
        along = tl.sum(sink * back, 1)  # the gradient of the logarithm of gate * share
        received_grad = along * (1.0 - gate)
        if q_grad_ptr is None:
            vector_grad += _weighted(sink, received_grad) + eps * tl.sum(received_grad, 0)
            matrix_grad += _outer(sink * (gate * share)[:, None], grad, PRECISION)
        else:
            incoming_grad = -share * (along + share * _product(sink, shared_grad))
            vector_grad += _weighted(sink, incoming_grad) + eps * tl.sum(incoming_grad, 0)
            q_grad = back + received_grad[:, None] * drained[None, :] + share[:, None] * shared_grad[None, :]
            q_grad += incoming_grad[:, None] * sources[None, :] + sinks_grad[None, :]
            q_grad *= sink * (1.0 - sink)
            store_tokens(q_grad_ptr, q_grad, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
    if q_grad_ptr is None:
        state_grad = state_grads_ptr + (group * parts + part) * ((HEAD_DIM + 1) * HEAD_DIM)
        row = tl.arange(0, BLOCK_D)
        store_rows(state_grad, row * HEAD_DIM, matrix_grad, row < HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_vector(state_grad + HEAD_DIM * HEAD_DIM, vector_grad, HEAD_DIM, BLOCK_D)
    else:
        store_vector(sources_grads_ptr + (group * parts + part) * HEAD_DIM, vector_grad, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_sources_kernel(
    k_ptr, v_ptr, sums_ptr, flows_ptr, state_ptr, state_grad_ptr, sources_grad_ptr, flows_grads_ptr,
    k_grad_ptr, v_grad_ptr, eps, k_stride, v_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A pass over the keys and values, without or with the gradient of `sources`.

    Without it, it sums up the gradients of `shared` and `sinks`, (B, N, parts, 2, D); with it, it writes those of the
    keys and values.
    """
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    sinks, sinks_base = _factor(sums_ptr + group * (2 * HEAD_DIM), eps, HEAD_DIM, BLOCK_D)
    shared, shared_base = _factor(flows_ptr + group * (2 * HEAD_DIM), eps, HEAD_DIM, BLOCK_D)
    state_grad = state_grad_ptr + group * ((HEAD_DIM + 1) * HEAD_DIM)
    matrix_grad, unit = factor_of_products(state_grad, k_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    drained_grad = load_vector(state_grad + HEAD_DIM * HEAD_DIM, HEAD_DIM, BLOCK_D)
    state = state_ptr + group * ((HEAD_DIM + 1) * HEAD_DIM)
    total = tl.load(state + HEAD_DIM * HEAD_DIM)
    # The mean of the gradients of what is sent, by the matrix as it is rounded below.
    products = load_matrix(state, HEAD_DIM, BLOCK_D) * matrix_grad.to(tl.float32)
    mean = tl.sum(tl.sum(products, 1), 0) * (unit / total)
    if k_grad_ptr is None:
        shared_grad = tl.zeros([BLOCK_D], tl.float32)
        sinks_grad = tl.zeros([BLOCK_D], tl.float32)
    else:
        sources_grad = load_vector(sources_grad_ptr + group * HEAD_DIM, HEAD_DIM, BLOCK_D)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        v = load_tokens(v_ptr, image, head, token, tokens, v_stride, HEAD_DIM, BLOCK_D, 0.0)
        source = tl.sigmoid(k.to(tl.float32))
        drain = _inverse(source, sinks, sinks_base, token < tokens)
        sent = _product(source, shared) + shared_base
        weights = _weights(sent, token < tokens) * (tokens / total)
        k_grad = dot(v, tl.trans(matrix_grad), PRECISION) * (weights * unit)[:, None]
        sent_grad = tl.sum(source * k_grad, 1) - weights * mean
        sent_grad = tl.where(tl.abs(sent) <= 1.0, sent_grad, 0.0)
        outgoing_grad = -drain * drain * _product(source, drained_grad)
        if k_grad_ptr is None:
            shared_grad += _weighted(source, sent_grad) + eps * tl.sum(sent_grad, 0)
            sinks_grad += _weighted(source, outgoing_grad) + eps * tl.sum(outgoing_grad, 0)
        else:
            v_grad = dot(source.to(v.dtype), matrix_grad, PRECISION) * (weights * unit)[:, None]
            store_tokens(v_grad_ptr, v_grad, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
            k_grad += sent_grad[:, None] * shared[None, :] + drain[:, None] * drained_grad[None, :]
            k_grad += outgoing_grad[:, None] * sinks[None, :] + sources_grad[None, :]
            k_grad *= source * (1.0 - source)
            store_tokens(k_grad_ptr, k_grad, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
    if k_grad_ptr is None:
        flows_grads = flows_grads_ptr + (group * parts + part) * (2 * HEAD_DIM)
        store_vector(flows_grads, shared_grad, HEAD_DIM, BLOCK_D)
        store_vector(flows_grads + HEAD_DIM, sinks_grad, HEAD_DIM, BLOCK_D)


def forward(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.forward`."""
    q, k, v = evenly_spaced(q), evenly_spaced(k), evenly_spaced(v)
    sizes = parts_of(q, num_heads)
    grid = (q.shape[0] * num_heads * sizes["parts"],)
    shared: dict[str, Any] = {"grid": grid, **sizes, **tiles_of(q, num_heads)}
    # Two tiles at once need the registers of a backward pass.
    of_both = shared | tiles_of(q, num_heads, backward=True)
    del of_both["PRECISION"]
    of_queries: dict[str, Any] = {"q_ptr": q, "q_stride": q.stride(2)}
    of_keys: dict[str, Any] = {"k_ptr": k, "k_stride": k.stride(2)}
    sums = _empty(q, sizes, num_heads, 2)
    triton_common.launch(_sums_kernel, sums_ptr=sums, **of_queries, **of_keys, **of_both)
    sums, _ = merged(sums, None)
    flows = _empty(q, sizes, num_heads, 2)
    triton_common.launch(_flows_kernel, sums_ptr=sums, flows_ptr=flows, eps=eps, **of_queries, **of_keys, **of_both)
    flows, _ = merged(flows, None)
    state = _empty(q, sizes, num_heads, q.shape[3] // num_heads + 1)
    triton_common.launch(
        _state_kernel, v_ptr=v, flows_ptr=flows, states_ptr=state, eps=eps, v_stride=v.stride(2), **of_keys, **shared
    )
    state, _ = merged(state, None)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    triton_common.launch(
        _out_kernel, sums_ptr=sums, flows_ptr=flows, state_ptr=state, out_ptr=out, eps=eps, **of_queries, **shared
    )
    return out, sums, flows, state


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    flows: Tensor,
    state: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    grad, q, k, v = evenly_spaced(grad), evenly_spaced(q), evenly_spaced(k), evenly_spaced(v)
    sizes = parts_of(q, num_heads)
    shared: dict[str, Any] = {
        "grid": (q.shape[0] * num_heads * sizes["parts"],),
        **sizes,
        **tiles_of(q, num_heads, backward=True),
        "sums_ptr": sums,
        "flows_ptr": flows,
        "state_ptr": state,
        "eps": eps,
    }
    of_sinks: dict[str, Any] = {"grad_stride": grad.stride(2), "q_stride": q.stride(2), **shared}
    over_sinks = partial(triton_common.launch, _bwd_sinks_kernel, grad_ptr=grad, q_ptr=q, **of_sinks)
    of_sources: dict[str, Any] = {"k_stride": k.stride(2), "v_stride": v.stride(2), **shared}
    over_sources = partial(triton_common.launch, _bwd_sources_kernel, k_ptr=k, v_ptr=v, **of_sources)
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    state_grad = _empty(q, sizes, num_heads, state.shape[2])
    over_sinks(flows_grad_ptr=None, state_grads_ptr=state_grad, sources_grads_ptr=None, q_grad_ptr=None)
    state_grad, _ = merged(state_grad, None)
    over_sources = partial(over_sources, state_grad_ptr=state_grad)
    flows_grad = _empty(q, sizes, num_heads, 2)
    over_sources(sources_grad_ptr=None, flows_grads_ptr=flows_grad, k_grad_ptr=None, v_grad_ptr=None)
    flows_grad, _ = merged(flows_grad, None)
    sources_grad = _empty(q, sizes, num_heads, 1)
    over_sinks(flows_grad_ptr=flows_grad, state_grads_ptr=None, sources_grads_ptr=sources_grad, q_grad_ptr=q_grad)
    sources_grad, _ = merged(sources_grad, None)
    over_sources(sources_grad_ptr=sources_grad, flows_grads_ptr=None, k_grad_ptr=k_grad, v_grad_ptr=v_grad)
    return q_grad, k_grad, v_grad


def _empty(q: Tensor, sizes: dict[str, int], num_heads: int, rows: int) -> Tensor:
    """A state of `rows` for each part of the tokens, (B, N, parts, rows, D)."""
    return q.new_empty(q.shape[0], num_heads, sizes["parts"], rows, q.shape[3] // num_heads, dtype=torch.float32)
