"""Linear attention in Triton: one pass over keys and values for their sums, one over queries for the output.

The sums of an image and head, over the parts of its tokens (see `zoo.kernels.token_sums`), are the rows of its `state`:
D rows of the matrix mean_j(w_j (R_j f(k_j))^T v_j), one row mean_j(w_j f(k_j)) and, for the form "offset", one row
mean_j(w_j v_j). With softmax weights, a pass over the queries comes first, and the state of a part contains the log2 of
its sum of exponentials, `lse`, as in the softmax of tiles.

The backward pass takes the queries for the gradient of the state, then the keys and values. Only the softmax weights
need the queries a second time, since the gradient of the mean query comes from the keys.

Letters: B images, H, W map, T tokens, N heads, D head dim, f feature map, R rotation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import triton_common
from zoo.kernels.constants import constant
from zoo.kernels.rotation import axis_turns
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
def _feature(x, RELU: tl.constexpr):
    """f(x); 0 for -inf, which stands for what does not exist."""
    if RELU:
        feature = tl.maximum(x, 0.0)
    else:
        feature = tl.maximum(x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    return feature


@triton.jit
def _slope(x, RELU: tl.constexpr):
    """The derivative of f."""
    if RELU:
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        slope = tl.exp2(tl.minimum(x, 0.0) * LOG2E)
    return slope


@triton.jit
def _turns(turns_ptr, token, height, width, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosine and sine of each token and pair of channels, (rows, BLOCK_D / 2)."""
    QUARTER: tl.constexpr = HEAD_DIM // 4
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    row, column = (token // width)[:, None], (token % width)[:, None]
    place = tl.where(pair < QUARTER, row * QUARTER + pair, (height + column) * QUARTER + pair - QUARTER)
    mask = (token < tokens)[:, None] & (pair < 2 * QUARTER)
    cos = tl.load(turns_ptr + place, mask=mask, other=0.0)
    sin = tl.load(turns_ptr + (height + width) * QUARTER + place, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """x (ROWS, BLOCK_D) with each pair of adjacent channels turned."""
    first, second = tl.split(tl.reshape(x, (ROWS, BLOCK_D // 2, 2)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(turned, (ROWS, BLOCK_D))


@triton.jit
def _sum_of_parts(ptr, parts, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of `parts` vectors, in their order."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for part in range(parts):
        total += load_vector(ptr + part * HEAD_DIM, HEAD_DIM, BLOCK_D)
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _queries_kernel(
    q_ptr, sums_ptr, q_stride, tokens, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """sum_i f(q_i) of each part, (B, N, parts, D)."""
    head, part, image = program(parts, HEADS)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        total += tl.sum(_feature(q.to(tl.float32), RELU), 0)
    store_vector(sums_ptr + ((image * HEADS + head) * parts + part) * HEAD_DIM, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _state_kernel(
    k_ptr, v_ptr, queries_ptr, turns_ptr, states_ptr, lses_ptr,
    scale, k_stride, v_stride, tokens, height, width, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of each part, (B, N, parts, ROWS, D), and its `lse`, (B, N, parts), with softmax weights.

    The weights of a part have the sum 1 if they are those of a softmax; else they are 1 / T.
    """
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    matrix = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    key_mean = tl.zeros([BLOCK_D], tl.float32)
    value_mean = tl.zeros([BLOCK_D], tl.float32)
    if queries_ptr is not None:
        query = _sum_of_parts(queries_ptr + group * parts * HEAD_DIM, parts, HEAD_DIM, BLOCK_D)
        query *= scale * LOG2E / tokens
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        v = load_tokens(v_ptr, image, head, token, tokens, v_stride, HEAD_DIM, BLOCK_D, 0.0)
        key = _feature(k.to(tl.float32), RELU)
        turned = key
        if turns_ptr is not None:
            cos, sin = _turns(turns_ptr, token, height, width, tokens, HEAD_DIM, BLOCK_D)
            turned = _rotate(key, cos, sin, BLOCK, BLOCK_D)
        if queries_ptr is None:
            key_mean += tl.sum(key, 0)
            if OFFSET:
                value_mean += tl.sum(v.to(tl.float32), 0)
        else:
            scores = tl.where(token < tokens, tl.sum(key * query[None, :], 1), float("-inf"))
            new = tl.maximum(highest, tl.max(scores, 0))
            shrink = tl.exp2(highest - new)
            weights = tl.exp2(scores - new)
            highest = new
            total = total * shrink + tl.sum(weights, 0)
            matrix *= shrink
            turned *= weights[:, None]
            key_mean = key_mean * shrink + tl.sum(key * weights[:, None], 0)
            if OFFSET:
                value_mean = value_mean * shrink + tl.sum(v.to(tl.float32) * weights[:, None], 0)
        matrix += dot(tl.trans(turned.to(v.dtype)), v, PRECISION)
    if queries_ptr is None:
        factor = 1.0 / tokens
    else:
        factor = 1.0 / total
        tl.store(lses_ptr + group * parts + part, highest + tl.log2(total))
    state = states_ptr + (group * parts + part) * (ROWS * HEAD_DIM)
    row = tl.arange(0, BLOCK_D)
    store_rows(state, row * HEAD_DIM, matrix * factor, row < HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_vector(state + HEAD_DIM * HEAD_DIM, key_mean * factor, HEAD_DIM, BLOCK_D)
    if OFFSET:
        store_vector(state + (HEAD_DIM + 1) * HEAD_DIM, value_mean * factor, HEAD_DIM, BLOCK_D)


@triton.jit
def _denominator(z, valid, eps, least):
    """1 / max(z + eps, least), 0 for tokens that are not `valid`, and its derivative by z."""
    denominator = tl.maximum(z + eps, least)
    inverse = tl.where(valid, 1.0 / denominator, 0.0)
    return inverse, tl.where(z + eps >= least, -inverse * inverse, 0.0)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _out_kernel(
    q_ptr, temperature_ptr, turns_ptr, state_ptr, out_ptr,
    scale, eps, least, q_stride, tokens, height, width, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a part of the queries."""
    head, part, image = program(parts, HEADS)
    state = state_ptr + (image * HEADS + head) * (ROWS * HEAD_DIM)
    matrix, unit = factor_of_products(state, q_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    key_mean = load_vector(state + HEAD_DIM * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if OFFSET:
        value_mean = load_vector(state + (HEAD_DIM + 1) * HEAD_DIM, HEAD_DIM, BLOCK_D)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        query = _feature(q.to(tl.float32), RELU)
        z = tl.sum(query * key_mean[None, :], 1)
        if turns_ptr is not None:
            cos, sin = _turns(turns_ptr, token, height, width, tokens, HEAD_DIM, BLOCK_D)
            query = _rotate(query, cos, sin, BLOCK, BLOCK_D)
        out = dot(query.to(q.dtype), matrix, PRECISION) * unit
        if OFFSET:
            z *= scale
            inverse, _ = _denominator(z, token < tokens, eps, least)
            out = (scale + scale * inverse)[:, None] * out - z[:, None] * value_mean[None, :]
        else:
            inverse, _ = _denominator(z, token < tokens, eps, least)
            out *= inverse[:, None]
        if temperature_ptr is not None:
            out *= tl.load(temperature_ptr + head).to(tl.float32)
        store_tokens(out_ptr, out, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_queries_kernel(
    grad_ptr, q_ptr, temperature_ptr, turns_ptr, state_ptr, queries_grad_ptr,
    state_grads_ptr, temperature_grads_ptr, q_grad_ptr,
    scale, eps, least, grad_stride, q_stride, tokens, height, width, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a part of the queries, and what they contribute to those of the state and the temperature.

    With y_i = (R_i f(q_i)) M and out_i = t c_i y_i - t z_i mean(v), where c_i is a function of z_i:
    dM = sum_i (R_i f(q_i))^T t c_i do_i, and f(q_i) has the gradient R_i^-1 (t c_i do_i M^T) + dz_i mean(k), to which
    softmax weights add that of the mean query.
    """
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    state = state_ptr + group * (ROWS * HEAD_DIM)
    matrix, unit = factor_of_products(state, q_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    matrix = tl.trans(matrix)
    key_mean = load_vector(state + HEAD_DIM * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if OFFSET:
        value_mean = load_vector(state + (HEAD_DIM + 1) * HEAD_DIM, HEAD_DIM, BLOCK_D)
    temperature = 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + head).to(tl.float32)
        temperature_grad = tl.full([], 0.0, tl.float32)
    if state_grads_ptr is not None:
        # c_i is large where the keys are small; in this unit, R_i f(q_i) c_i suits half precision.
        key_unit = tl.minimum(tl.max(key_mean, 0), 1.0)
        key_unit = tl.where(key_unit == 0.0, 1.0, key_unit)
        matrix_grad = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        key_grad = tl.zeros([BLOCK_D], tl.float32)
        value_grad = tl.zeros([BLOCK_D], tl.float32)
    if queries_grad_ptr is not None:
        query_grad = _sum_of_parts(queries_grad_ptr + group * parts * HEAD_DIM, parts, HEAD_DIM, BLOCK_D) / tokens
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        q = load_tokens(q_ptr, image, head, token, tokens, q_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        grad = load_tokens(grad_ptr, image, head, token, tokens, grad_stride, HEAD_DIM, BLOCK_D, 0.0)
        x = q.to(tl.float32)
        query = _feature(x, RELU)
        z = tl.sum(query * key_mean[None, :], 1)
        turned = query
        if turns_ptr is not None:
            cos, sin = _turns(turns_ptr, token, height, width, tokens, HEAD_DIM, BLOCK_D)
            turned = _rotate(query, cos, sin, BLOCK, BLOCK_D)
        back = dot(grad, matrix, PRECISION) * unit
        along = tl.sum(turned * back, 1)
        if OFFSET:
            z *= scale
            inverse, slope = _denominator(z, token < tokens, eps, least)
            factor = scale + scale * inverse
            across = tl.sum(grad.to(tl.float32) * value_mean[None, :], 1)
            product = factor * along - z * across
            z_grad = scale * (scale * slope * along - across)
        else:
            factor, slope = _denominator(z, token < tokens, eps, least)
            product = factor * along
            z_grad = slope * along
        if temperature_ptr is not None:
            temperature_grad += tl.sum(product, 0)
            factor *= temperature
            z_grad *= temperature
        if state_grads_ptr is not None:
            scaled = turned * (factor * key_unit)[:, None]
            matrix_grad += dot(tl.trans(scaled.to(grad.dtype)), grad, PRECISION)
            key_grad += tl.sum(query * z_grad[:, None], 0)
            if OFFSET:
                value_grad -= tl.sum(grad.to(tl.float32) * (z * temperature)[:, None], 0)
        if q_grad_ptr is not None:
            q_grad = back * factor[:, None]
            if turns_ptr is not None:
                q_grad = _rotate(q_grad, cos, -sin, BLOCK, BLOCK_D)
            q_grad += z_grad[:, None] * key_mean[None, :]
            if queries_grad_ptr is not None:
                q_grad += query_grad[None, :]
            store_tokens(q_grad_ptr, q_grad * _slope(x, RELU), image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
    if state_grads_ptr is not None:
        state_grad = state_grads_ptr + (group * parts + part) * (ROWS * HEAD_DIM)
        row = tl.arange(0, BLOCK_D)
        store_rows(state_grad, row * HEAD_DIM, matrix_grad / key_unit, row < HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_vector(state_grad + HEAD_DIM * HEAD_DIM, key_grad, HEAD_DIM, BLOCK_D)
        if OFFSET:
            store_vector(state_grad + (HEAD_DIM + 1) * HEAD_DIM, value_grad, HEAD_DIM, BLOCK_D)
        if temperature_ptr is not None:
            tl.store(temperature_grads_ptr + (image * parts + part) * HEADS + head, temperature_grad)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_keys_kernel(
    k_ptr, v_ptr, queries_ptr, turns_ptr, state_ptr, lse_ptr, state_grad_ptr, k_grad_ptr, v_grad_ptr, queries_grad_ptr,
    scale, k_stride, v_stride, tokens, height, width, parts, per_part,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RELU: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a part of the keys and values and, with softmax weights, what they contribute to the queries'.

    With the weights a_j = w_j / T: v_j has the gradient a_j ((R_j f(k_j)) dM + dmean(v)), f(k_j) the gradient
    a_j (R_j^-1 (v_j dM^T) + dmean(k)), and a_j the sum of the products of its terms and these, without a_j.
    """
    head, part, image = program(parts, HEADS)
    group = image * HEADS + head
    state_grad = state_grad_ptr + group * (ROWS * HEAD_DIM)
    matrix_grad, unit = factor_of_products(state_grad, k_ptr.dtype.element_ty, HEAD_DIM, BLOCK_D)
    key_grad = load_vector(state_grad + HEAD_DIM * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if OFFSET:
        value_grad = load_vector(state_grad + (HEAD_DIM + 1) * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if queries_ptr is not None:
        query = _sum_of_parts(queries_ptr + group * parts * HEAD_DIM, parts, HEAD_DIM, BLOCK_D) * (scale / tokens)
        lse = tl.load(lse_ptr + group)
        query_grad = tl.zeros([BLOCK_D], tl.float32)
        # The mean of the gradients of the weights is the product of the state and its gradient.
        state = state_ptr + group * (ROWS * HEAD_DIM)
        products = load_matrix(state, HEAD_DIM, BLOCK_D) * load_matrix(state_grad, HEAD_DIM, BLOCK_D)
        delta = tl.sum(tl.sum(products, 1), 0)
        delta += tl.sum(load_vector(state + HEAD_DIM * HEAD_DIM, HEAD_DIM, BLOCK_D) * key_grad, 0)
        if OFFSET:
            delta += tl.sum(load_vector(state + (HEAD_DIM + 1) * HEAD_DIM, HEAD_DIM, BLOCK_D) * value_grad, 0)
    for start in range(part * per_part, min((part + 1) * per_part, tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        k = load_tokens(k_ptr, image, head, token, tokens, k_stride, HEAD_DIM, BLOCK_D, float("-inf"))
        v = load_tokens(v_ptr, image, head, token, tokens, v_stride, HEAD_DIM, BLOCK_D, 0.0)
        x = k.to(tl.float32)
        key = _feature(x, RELU)
        turned = key
        if turns_ptr is not None:
            cos, sin = _turns(turns_ptr, token, height, width, tokens, HEAD_DIM, BLOCK_D)
            turned = _rotate(key, cos, sin, BLOCK, BLOCK_D)
        v_grad = dot(turned.to(v.dtype), matrix_grad, PRECISION) * unit
        k_grad = dot(v, tl.trans(matrix_grad), PRECISION) * unit
        if OFFSET:
            v_grad += value_grad[None, :]
        if turns_ptr is not None:
            k_grad = _rotate(k_grad, cos, -sin, BLOCK, BLOCK_D)
        k_grad += key_grad[None, :]
        if queries_ptr is None:
            v_grad *= 1.0 / tokens
            k_grad *= 1.0 / tokens
        else:
            scores = tl.where(token < tokens, tl.sum(key * query[None, :], 1), float("-inf"))
            weights = tl.exp2(scores * LOG2E - lse)
            weights_grad = tl.sum(key * k_grad, 1)
            if OFFSET:
                weights_grad += tl.sum(v.to(tl.float32) * value_grad[None, :], 1)
            scores_grad = weights * (weights_grad - delta)
            v_grad *= weights[:, None]
            k_grad = k_grad * weights[:, None] + scores_grad[:, None] * query[None, :]
            query_grad += tl.sum(scores_grad[:, None] * key, 0)
        store_tokens(k_grad_ptr, k_grad * _slope(x, RELU), image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
        store_tokens(v_grad_ptr, v_grad, image, head, token, tokens, HEADS, HEAD_DIM, BLOCK_D)
    if queries_ptr is not None:
        store_vector(queries_grad_ptr + (group * parts + part) * HEAD_DIM, query_grad * scale, HEAD_DIM, BLOCK_D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None,
    *,
    num_heads: int,
    relu: bool,
    softmax: bool,
    offset: bool,
    rope: list[float] | None,
    scale: float,
    eps: float,
    denominator_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.forward`."""
    q, k, v = evenly_spaced(q), evenly_spaced(k), evenly_spaced(v)
    sizes = parts_of(q, num_heads)
    block = tiles_of(q, num_heads)
    programs = q.shape[0] * num_heads * sizes["parts"]
    shared: dict[str, Any] = {"grid": (programs,), **sizes, **block, "RELU": relu}
    form: dict[str, Any] = {"ROWS": _rows(q, num_heads, offset), "OFFSET": offset, "scale": scale}
    map_ = _map(q, rope)
    head_dim = q.shape[3] // num_heads
    queries = q.new_empty(q.shape[0], num_heads, sizes["parts"] if softmax else 0, head_dim, dtype=torch.float32)
    lses = queries.new_empty(queries.shape[:3])
    states = queries.new_empty(q.shape[0], num_heads, sizes["parts"], form["ROWS"], head_dim)
    if softmax:
        without_products = {name: x for name, x in shared.items() if name != "PRECISION"}
        triton_common.launch(_queries_kernel, q_ptr=q, sums_ptr=queries, q_stride=q.stride(2), **without_products)
    triton_common.launch(
        _state_kernel,
        k_ptr=k,
        v_ptr=v,
        queries_ptr=queries if softmax else None,
        states_ptr=states,
        lses_ptr=lses if softmax else None,
        k_stride=k.stride(2),
        v_stride=v.stride(2),
        **shared,
        **form,
        **map_,
    )
    state, lse = merged(states, lses if softmax else None)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    triton_common.launch(
        _out_kernel,
        q_ptr=q,
        temperature_ptr=None if temperature is None else temperature.contiguous(),
        state_ptr=state,
        out_ptr=out,
        q_stride=q.stride(2),
        **shared,
        **form,
        **map_,
        **_bounds(q, eps, denominator_min),
    )
    return out, state, queries, lses.new_empty(0) if lse is None else lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None,
    state: Tensor,
    queries: Tensor,
    lse: Tensor,
    *,
    num_heads: int,
    relu: bool,
    softmax: bool,
    offset: bool,
    rope: list[float] | None,
    scale: float,
    eps: float,
    denominator_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.backward`."""
    grad, q, k, v = evenly_spaced(grad), evenly_spaced(q), evenly_spaced(k), evenly_spaced(v)
    sizes = parts_of(q, num_heads)
    parts = sizes["parts"]
    shared: dict[str, Any] = {
        "grid": (q.shape[0] * num_heads * parts,),
        **sizes,
        **tiles_of(q, num_heads, backward=True),
        "RELU": relu,
        "ROWS": state.shape[2],
        "OFFSET": offset,
        "scale": scale,
        **_map(q, rope),
    }
    of_queries: dict[str, Any] = {
        "grad_ptr": grad,
        "q_ptr": q,
        "temperature_ptr": None if temperature is None else temperature.contiguous(),
        "state_ptr": state,
        "grad_stride": grad.stride(2),
        "q_stride": q.stride(2),
        **_bounds(q, eps, denominator_min),
    }
    q_grad, k_grad, v_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    state_grads = state.new_empty(*state.shape[:2], parts, *state.shape[2:])
    temperature_grads = state.new_empty(0 if temperature is None else q.shape[0], parts, num_heads)
    triton_common.launch(
        _bwd_queries_kernel,
        queries_grad_ptr=None,
        state_grads_ptr=state_grads,
        temperature_grads_ptr=None if temperature is None else temperature_grads,
        q_grad_ptr=None if softmax else q_grad,
        **of_queries,
        **shared,
    )
    state_grad, _ = merged(state_grads, None)
    queries_grad = torch.empty_like(queries)
    triton_common.launch(
        _bwd_keys_kernel,
        k_ptr=k,
        v_ptr=v,
        queries_ptr=queries if softmax else None,
        state_ptr=state,
        lse_ptr=lse if softmax else None,
        state_grad_ptr=state_grad,
        k_grad_ptr=k_grad,
        v_grad_ptr=v_grad,
        queries_grad_ptr=queries_grad if softmax else None,
        k_stride=k.stride(2),
        v_stride=v.stride(2),
        **shared,
    )
    if softmax:
        triton_common.launch(
            _bwd_queries_kernel,
            queries_grad_ptr=queries_grad,
            state_grads_ptr=None,
            temperature_grads_ptr=None,
            q_grad_ptr=q_grad,
            **of_queries,
            **shared,
        )
    temperature_grad = temperature_grads.sum((0, 1)) if temperature is not None else temperature_grads.new_empty(0)
    return q_grad, k_grad, v_grad, temperature_grad if temperature is None else temperature_grad.to(temperature.dtype)


def _rows(q: Tensor, num_heads: int, offset: bool) -> int:
    """The rows of a state."""
    return q.shape[3] // num_heads + (2 if offset else 1)


def _map(q: Tensor, rope: list[float] | None) -> dict[str, Any]:
    """The map's sides, and the table of rotations."""
    height, width = q.shape[1:3]
    table = None
    if rope is not None:
        table = constant(axis_turns, height, width, tuple(rope), torch.float32, like=q)
    return {"height": height, "width": width, "turns_ptr": table}


def _bounds(q: Tensor, eps: float, denominator_min: float) -> dict[str, Any]:
    """What is added to the denominators, and their lower bound."""
    tokens = q.shape[1] * q.shape[2]
    return {"eps": eps, "least": denominator_min / tokens if denominator_min > 0 else float("-inf")}
