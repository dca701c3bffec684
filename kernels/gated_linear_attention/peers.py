"""Gated linear attention without `zoo.kernels`: token after token, and the usual chunks.

Letters: B images, T tokens, N heads, K channels of a key, V channels of a value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.peers import Arguments, Contender

# Operations of the backward pass, relative to those of the forward pass: four matrix products to two.
BACKWARD_FLOPS = 2.0


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward: of the products with the state, in each direction."""
    directions = 1 if arguments["reverse_log_gates"] is None else 2
    return 4 * int(arguments["q"].shape[-1]) * directions


def _each_direction(scan: Any, **given: Any) -> Tensor:
    q, k, v = (given[name].float().transpose(1, 2) for name in ("q", "k", "v"))  # (B, N, T, channels)
    q = q * (q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"])
    out = scan(q, k, v, given["log_gates"].float().transpose(1, 2))
    if given["reverse_log_gates"] is not None:
        turned = (x.flip(2) for x in (q, k, v, given["reverse_log_gates"].float().transpose(1, 2)))
        out = out + scan(*turned).flip(2)
    return out.transpose(1, 2).to(given["q"].dtype)


def _loop(q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor) -> Tensor:
    gates, state, outs = log_gates.exp()[..., None], q.new_zeros(1), []
    for t in range(q.shape[2]):
        state = gates[:, :, t] * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outs, 2)


def _quotients(q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, chunk: int = 16) -> Tensor:
    """Chunks in which a pair's decay is the quotient of two products of gates, which overflows if gates are small."""
    tokens = q.shape[2]
    q, k, v, log_gates = (
        F.pad(x, (0, 0, 0, -tokens % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v, log_gates)
    )  # (B, N, chunks, chunk, channels)
    sums = log_gates.cumsum(3)
    middle, end = sums[..., chunk // 2, None, :], sums[..., -1:, :]
    weights = ((q * (sums - middle).exp()) @ (k * (middle - sums).exp()).mT).tril()
    own = (k * (end - sums).exp()).mT @ v
    decay, state, states = end.exp().mT, torch.zeros_like(own[:, :, 0]), []
    for n in range(q.shape[2]):
        states.append(state)
        state = decay[:, :, n] * state + own[:, :, n]
    out = weights @ v + (q * sums.exp()) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :tokens]


def _by_token(**given: Any) -> Tensor:
    return _each_direction(_loop, **given)


def _by_quotients(**given: Any) -> Tensor:
    return _each_direction(_quotients, **given)


PEERS = (Contender("loop", _by_token), Contender("quotients", _by_quotients))
