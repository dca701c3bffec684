"""Gated linear attention in plain torch: the definition of the correct result.

Letters: B images, T tokens, N heads, K channels of a key, V channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, *, scale: float
) -> Tensor:
    """See `op.gated_linear_attention`, which checks the arguments."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    query, key, value = scale * q.to(dtype), k.to(dtype), v.to(dtype)
    added = key[..., None] @ value[..., None, :]  # (B, T, N, K, V)
    out = query[..., None, :] @ _states(added, log_gates.to(dtype), reverse=False)
    if reverse_log_gates is not None:
        out = out + query[..., None, :] @ _states(added, reverse_log_gates.to(dtype), reverse=True)
    return out.squeeze(-2).to(q.dtype)


def _states(added: Tensor, log_gates: Tensor, reverse: bool) -> Tensor:
    """The state after each token, (B, T, N, K, V), when the tokens are visited in order or in reverse."""
    if added.is_meta:  # there is nothing to compute, and the loop would take minutes when operations are counted
        return added
    order = [*zip(log_gates[..., None].exp().unbind(1), added.unbind(1), strict=True)]
    state = torch.zeros_like(added[:, 0])
    states = []
    for gates, product in reversed(order) if reverse else order:
        state = gates * state + product
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, 1)
