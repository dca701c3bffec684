"""Selective scan in PyTorch: on CPUs by blocks of tokens, as an operator of our own; elsewhere by whole maps.

Programs to export, other devices and derivatives of higher order take plain operations on whole maps, `_scan`.

Letters: B images, H, W map, K directions, C channels, N numbers of a channel's state, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from zoo.kernels import checks, dispatch
from zoo.kernels.selective_scan import blocks
from zoo.kernels.selective_scan.common import names, numbers

# Tokens of a chunk in `_states`, each of which adds operations to a graph.
STEPS = 16
# Steps of `_states_by_doubling`: enough for 2 ** 20 chunks.
LEVELS = 20


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: tuple[str, ...],
) -> Tensor:
    """See `op.selective_scan`, which checks the arguments."""
    _, height, width, *_ = checks.sizes(x)
    if checks.certain(height == 1) or checks.certain(width == 1):  # a column is scanned as a row
        directions = tuple(name.replace("columns", "rows") for name in directions)
    if _in_blocks(x):
        return _forward(x, delta, A, B, C, D, delta_bias, delta_softplus, numbers(directions))[0]
    return _scan(x, delta, A, B, C, D, delta_bias, delta_softplus, directions)


def _in_blocks(x: Tensor) -> bool:
    """Whether our own operators compute the call. Programs to export consist of PyTorch's."""
    if x.device.type != "cpu" or torch.jit.is_tracing() or dispatch.transformed():
        return False
    return not torch.compiler.is_exporting()


def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: tuple[str, ...],
) -> Tensor:
    """The scan in plain operations, in which sizes may be symbolic."""
    _, height, width, *_ = checks.sizes(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.to(dtype)
    if x.ndim == 4:
        values = values[:, :, :, None].expand(-1, -1, -1, len(directions), -1)
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)

    def ordered(tensor: Tensor) -> Tensor:
        """(B, H, W, K, .) -> (B, K, T, .), tokens in the order of each direction."""
        parts = []
        for k, name in enumerate(directions):
            part = tensor[:, :, :, k]
            part = (part.transpose(1, 2) if name.startswith("columns") else part).flatten(1, 2)
            parts.append(part.flip(1) if name.endswith("reversed") else part)
        return torch.stack(parts, 1)

    step = ordered(delta)[..., None, :]  # (B, K, T, 1, C)
    decays = torch.exp(step * A.to(dtype).transpose(1, 2)[:, None])  # (B, K, T, N, C)
    added = ordered(delta * values)[..., None, :] * ordered(B.to(dtype))[..., None]
    out = (ordered(C.to(dtype))[..., None, :] @ _states(decays, added)).squeeze(-2)  # (B, K, T, C)
    total = None if D is None else (D.to(dtype) * values).sum(3)
    for part, name in zip(out.unbind(1), directions, strict=True):
        part = part.flip(1) if name.endswith("reversed") else part
        if name.startswith("columns"):
            part = part.unflatten(1, (width, height)).transpose(1, 2)
        else:
            part = part.unflatten(1, (height, width))
        total = part if total is None else total + part
    assert total is not None  # there is a direction
    return total.to(x.dtype)


def _states(decays: Tensor, added: Tensor) -> Tensor:
    """The states h_t = decays_t h_(t-1) + added_t of tokens (B, K, T, N, C), computed in chunks of STEPS tokens."""
    tokens = checks.sizes(added)[2]
    known = has_static_value(tokens)
    steps = min(int(tokens), STEPS) if known else STEPS
    if known:
        chunks = (int(tokens) + steps - 1) // steps
        missing = chunks * steps - int(tokens)
        padded = (F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor for tensor in (decays, added))
        cut = [tensor.unflatten(2, (chunks, steps)).unbind(3) for tensor in padded]
    else:
        # A graph for any number of tokens needs a number of chunks that is never 1. What is beyond the end is unused.
        chunks = tokens // steps + 2
        first = torch.arange(chunks, device=added.device) * steps
        places = [(first + step).clamp(max=tokens - 1) for step in range(steps)]
        cut = [tuple(tensor.index_select(2, place) for place in places) for tensor in (decays, added)]
    factors: list[Tensor] = []
    states: list[Tensor] = []
    for factor, state in zip(*cut, strict=True):
        states.append(state + factor * states[-1] if states else state)
        factors.append(factor * factors[-1] if factors else factor)
    out = torch.stack(states, 3)  # (B, K, chunks, steps, N, C)
    if not known or chunks > 1:
        ends = (_states if known else _states_by_doubling)(factors[-1], states[-1])
        out = out + torch.stack(factors, 3) * _shifted(ends, 1)[:, :, :, None]
    out = out.flatten(2, 3)
    if known:
        return out[:, :, :tokens]
    return out.index_select(2, torch.arange(tokens, device=out.device))  # a slice would restrict the sizes


def _states_by_doubling(factors: Tensor, states: Tensor) -> Tensor:
    """`_states` without a loop over the tokens, whose number may be symbolic: each step reaches twice as far back.

    The factor of the first token, before which there is nothing, is set to 0. So are then all products that reach back
    to it, and what stands in the place of earlier tokens does not count.
    """
    place = torch.arange(states.shape[2], device=states.device)
    factors = torch.where((place > 0)[:, None, None], factors, 0)
    for level in range(LEVELS):
        earlier = (place - 2**level).clamp(min=0)
        states = torch.addcmul(states, factors, states.index_select(2, earlier))
        factors = factors * factors.index_select(2, earlier)
    return states


def _shifted(tensor: Tensor, distance: int) -> Tensor:
    """`tensor` (B, K, T, ...), moved by some tokens to the end, and zeros at the start."""
    place = torch.arange(tensor.shape[2], device=tensor.device) - distance
    moved = tensor.index_select(2, place.clamp(min=0))
    return torch.where((place >= 0)[:, None, None], moved, 0)


@torch.library.custom_op("zoo::scan_blocks", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor]:
    """The output, and the state before each chunk for `_backward`."""
    return blocks.forward(x, delta, A, B, C, D, delta_bias, delta_softplus, names(directions))


@_forward.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor]:
    batch, height, width, *_, channels = x.shape
    d_state = A.shape[2]
    chunks = sum(blocks.Order(name, height, width, d_state * channels).chunks for name in names(directions))
    kept = x.new_empty(batch, chunks, d_state, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(batch, height, width, channels), kept


@torch.library.custom_op("zoo::scan_blocks_bwd", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    delta_softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors; those of D and delta_bias are empty if the tensors are None."""
    return blocks.backward(grad, x, delta, A, B, C, D, delta_bias, kept, delta_softplus, names(directions))


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    given = (x, delta, A, B, C, D, delta_bias)
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in given)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass the inputs of `_forward` or of the operator for GPUs, and the states it returned."""
    *tensors, ctx.delta_softplus, ctx.directions = inputs
    ctx.save_for_backward(*tensors, output[1])


def differentiated(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of what `save` kept, by `backward` or, if it has to be differentiable itself, by autograd."""

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *given, states = ctx.saved_tensors
        if dispatch.again_differentiable(*given, grad):

            def composite(
                x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
            ) -> Tensor:
                return _scan(x, delta, A, B, C, D, delta_bias, ctx.delta_softplus, names(ctx.directions))

            grads = dispatch.composite_gradients(composite, tuple(given), grad)
        else:
            found = backward(grad, *given, states, ctx.delta_softplus, ctx.directions)
            grads = tuple(None if tensor is None else x for tensor, x in zip(given, found, strict=True))
        return *grads, None, None

    return differentiate


_forward.register_autograd(differentiated(_backward), setup_context=save)
