"""The selective scan without `zoo.kernels`: copies of the map in each order, states in memory.

Letters: B images, H, W map, K directions, C channels, N numbers of a channel's state, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.peers import Arguments, Contender

BACKWARD_FLOPS = 2.5  # operations of the backward pass, relative to those of the forward pass


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward: the decay, the state and the sum for each number."""
    count, _, d_state = arguments["A"].shape
    return 7 * int(count) * int(d_state)


def _ordered(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The decays and delta' B x of all tokens in the order of each direction, (T, B, K, C, N)."""
    x, delta = given["x"], given["delta"].float()
    if given["delta_bias"] is not None:
        delta = delta + given["delta_bias"]
    delta = F.softplus(delta) if given["delta_softplus"] else delta
    x = x[:, :, :, None] if x.ndim == 4 else x
    step = _turn(delta, given["directions"])[..., None]
    added = _turn(delta * x, given["directions"])[..., None] * _turn(given["B"], given["directions"])[..., None, :]
    return torch.exp(step * given["A"]), added


def _turn(tensor: Tensor, directions: tuple[str, ...]) -> Tensor:
    """(B, H, W, K, .) -> (T, B, K, .)."""
    parts = []
    for k, name in enumerate(directions):
        part = tensor[:, :, :, k]
        part = (part.transpose(1, 2) if name.startswith("columns") else part).flatten(1, 2)
        parts.append(part.flip(1) if name.endswith("reversed") else part)
    return torch.stack(parts, 2).transpose(0, 1)


def _ended(states: Tensor, given: dict[str, Any]) -> Tensor:
    """The output for states (T, B, K, C, N)."""
    x, directions = given["x"], given["directions"]
    _, height, width, *_ = x.shape
    out = (states * _turn(given["C"], directions)[..., None, :]).sum(-1).transpose(0, 1)  # (B, T, K, C)
    parts = []
    for part, name in zip(out.unbind(2), directions, strict=True):
        part = part.flip(1) if name.endswith("reversed") else part
        columns = name.startswith("columns")
        part = part.unflatten(1, (width, height) if columns else (height, width))
        parts.append(part.transpose(1, 2) if columns else part)
    total = torch.stack(parts).sum(0)
    if given["D"] is not None:
        x = x[:, :, :, None] if x.ndim == 4 else x
        total = total + (given["D"] * x).sum(3)
    return total.to(x.dtype)


def _token_loop(**given: Any) -> Tensor:
    decays, added = _ordered(given)
    state = torch.zeros_like(added[0])
    states = []
    for decay, token in zip(decays.unbind(0), added.unbind(0), strict=True):
        state = torch.addcmul(token, decay, state)
        states.append(state)
    return _ended(torch.stack(states), given)


def _doubling(**given: Any) -> Tensor:
    """In log2(T) steps, each for all tokens (Hillis and Steele)."""
    decays, states = _ordered(given)
    reach = 1
    while reach < len(states):
        states = torch.cat((states[:reach], states[reach:] + decays[reach:] * states[:-reach]))
        decays = torch.cat((decays[:reach], decays[reach:] * decays[:-reach]))
        reach *= 2
    return _ended(states, given)


PEERS = (Contender("loop over tokens", _token_loop), Contender("doubling", _doubling))
