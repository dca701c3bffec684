"""Flow attention in PyTorch, fast on CPUs.

Letters: B images, H, W map, N heads, D head dim, T tokens.

The tokens of a head are the columns of matrices (D, T), so that flows and sums are vectors of T adjacent numbers,
however few channels a head has. In eager mode on CPUs, a few heads are computed at a time, whose numbers stay in the
cache, and their gradient is written out: autograd would pass over the tokens more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.constants import only_traced

# Numbers of the queries that are computed at once.
PART = 1 << 19


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """See `op.flow_attention`, which checks the arguments."""
    if only_traced(q) or q.device.type != "cpu":
        return _composite(q, k, v, num_heads, eps)
    if dispatch.again_differentiable(q, k, v):
        result: Tensor = _FlowAttention.apply(q, k, v, num_heads, eps)
        return result
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for part in _parts(q, num_heads):
        _write(out, _forward(*(_columns(x, num_heads)[part] for x in (q, k, v)), eps=eps).out, num_heads, part)
    return out


def _composite(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    """All heads at once, in operations that autograd differentiates."""
    _, height, width, _ = checks.sizes(q)
    out = _forward(*(_columns(x, num_heads) for x in (q, k, v)), eps=eps).out
    return out.to(q.dtype).permute(0, 3, 1, 2).flatten(2).unflatten(1, (height, width))


class _Flows(NamedTuple):
    """The output, and what its gradient needs, of tensors (B, N, D, T)."""

    out: Tensor
    sink: Tensor
    source: Tensor
    weighted: Tensor  # the values times `weights`
    # (B, N, 1, T)
    share: Tensor  # 1 / the flow into each sink
    drain: Tensor  # 1 / the flow out of each source
    gate: Tensor  # the sigmoid of what a sink receives
    sent: Tensor
    weights: Tensor
    # (B, N, D, 1): the sums that are the other factor of each flow, plus eps
    sources: Tensor
    sinks: Tensor
    drained: Tensor
    shared: Tensor
    matrix: Tensor  # (B, N, D, D), of which the output is the product with `sink`


def _forward(query: Tensor, key: Tensor, value: Tensor, *, eps: float) -> _Flows:
    dtype = torch.promote_types(query.dtype, torch.float32)
    sink, source = (x.to(dtype).contiguous().sigmoid() for x in (query, key))

    def total(x: Tensor) -> Tensor:
        return x.sum(3, keepdim=True) + eps

    def flow(x: Tensor, other: Tensor) -> Tensor:
        return other.mT @ x + (eps * other.sum(2, keepdim=True) + eps)

    sources, sinks = total(source), total(sink)
    share, drain = flow(sink, sources).reciprocal(), flow(source, sinks).reciprocal()
    drained, shared = total(source * drain), total(sink * share)
    gate, sent = flow(sink, drained).sigmoid(), flow(source, shared)
    weights = query.shape[3] * sent.clamp(-1, 1).softmax(3)
    weighted = weights * value.to(dtype).contiguous()
    matrix = weighted @ source.mT
    out = (gate * share) * (matrix @ sink)
    return _Flows(
        out, sink, source, weighted, share, drain, gate, sent, weights, sources, sinks, drained, shared, matrix
    )


class _FlowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved: list[Tensor] = []
        for part in _parts(q, num_heads):
            flows = _forward(*(_columns(x, num_heads)[part] for x in (q, k, v)), eps=eps)
            _write(out, flows.out, num_heads, part)
            saved += flows[1:]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.num_heads, ctx.eps = num_heads, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        num_heads, eps = ctx.num_heads, ctx.eps
        with dispatch.as_given(q):
            if dispatch.again_differentiable(q, k, v, grad):
                grads = dispatch.composite_gradients(
                    lambda q, k, v: _composite(q, k, v, num_heads, eps), (q, k, v), grad
                )
                return *grads, None, None
            written = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
            size = len(_Flows._fields) - 1
            for i, part in enumerate(_parts(q, num_heads)):
                flows = _Flows(grad, *saved[i * size : (i + 1) * size])
                for into, x in zip(written, _gradients(_columns(grad, num_heads)[part], flows, eps), strict=True):
                    _write(into, x, num_heads, part)
        return *written, None, None


def _gradients(grad: Tensor, flows: _Flows, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, (B, N, D, T), from that of the output."""
    _, sink, source, weighted, share, drain, gate, sent, weights, sources, sinks, drained, shared, matrix = flows

    def total(x: Tensor, factor: Tensor) -> Tensor:
        """sum_i factor_i (x_i + eps), (B, N, D, 1)."""
        return (x * factor).sum(3, keepdim=True) + eps * factor.sum(3, keepdim=True)

    def products(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(2, keepdim=True)

    def add(x: Tensor, *terms: tuple[Tensor, Tensor]) -> None:
        """Add the products of vectors (B, N, D, 1) and (B, N, 1, T) to `x`."""
        columns, rows = zip(*terms, strict=True)
        x.flatten(0, 1).baddbmm_(torch.cat(columns, 3).flatten(0, 1), torch.cat(rows, 2).flatten(0, 1))

    scaled = grad.to(sink.dtype).contiguous() * (gate * share)
    sink_grad = matrix.mT @ scaled
    along = products(sink, sink_grad)  # the gradient of the logarithm of gate * share
    matrix_grad = scaled @ sink.mT
    received_grad = along * (1 - gate)
    drained_grad = total(sink, received_grad)

    value_grad = weights * (matrix_grad @ source)
    source_grad = matrix_grad.mT @ weighted
    sent_grad = products(source, source_grad)  # times `weights`, as the softmax has it
    sent_grad = (sent_grad - weights * sent_grad.mean(3, keepdim=True)) * (sent.abs() <= 1)
    shared_grad = total(source, sent_grad)
    outgoing_grad = -drain.square() * (drained_grad.mT @ source)
    sinks_grad = total(source, outgoing_grad)
    incoming_grad = -share * (along + share * (shared_grad.mT @ sink))
    sources_grad = total(sink, incoming_grad)

    one = torch.ones_like(share)
    add(sink_grad, (drained, received_grad), (shared_grad, share), (sources, incoming_grad), (sinks_grad, one))
    add(source_grad, (shared, sent_grad), (drained_grad, drain), (sinks, outgoing_grad), (sources_grad, one))
    backward = torch.ops.aten.sigmoid_backward
    return backward(sink_grad, sink), backward(source_grad, source), value_grad


def _columns(x: Tensor, num_heads: int) -> Tensor:
    """The tokens of each head as columns: (B, H, W, N D) to (B, N, D, T), without a copy if `x` allows it."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1)


def _write(x: Tensor, columns: Tensor, num_heads: int, part: tuple[slice, slice]) -> None:
    """Write `columns` to a part of a contiguous `x`, in its dtype."""
    _columns(x, num_heads)[part] = columns


def _parts(q: Tensor, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Images and heads that are computed at once."""
    batch, height, width, channels = q.shape
    head = height * width * channels // num_heads
    count = -(-num_heads * head // PART)  # the parts of an image
    heads = -(-num_heads // min(num_heads, count))
    images = max(1, PART // (head * num_heads))
    for image in range(0, batch, images):
        for first in range(0, num_heads, heads):
            yield slice(image, image + images), slice(first, first + heads)
