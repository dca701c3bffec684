"""Selective scan in plain torch, one token after the other: the definition of the correct result.

Letters: B images, H, W map, K directions, C channels, N numbers of a channel's state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks


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
    batch, height, width, *_, channels = checks.sizes(x)
    if x.is_meta:  # there is nothing to compute, and the loop would take minutes when a model's operations are counted
        return x.new_empty(batch, height, width, channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    values, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    total = torch.zeros_like(delta[:, :, :, 0])
    for k, direction in enumerate(directions):
        value = values if values.ndim == 4 else values[:, :, :, k]
        state = torch.zeros_like(delta[:, 0, 0, 0, :, None] * A[0])  # (B, C, N)
        out: dict[tuple[int, int], Tensor] = {}
        for row, column in _places(direction, height, width):
            step, token = delta[:, row, column, k, :, None], value[:, row, column, :, None]
            state = torch.exp(step * A[k]) * state + step * token * B[:, row, column, k, None, :]
            out[row, column] = (state * C[:, row, column, k, None, :]).sum(-1)
        rows = [torch.stack([out[row, column] for column in range(width)], 1) for row in range(height)]
        total = total + torch.stack(rows, 1)
        if D is not None:
            total = total + D[k].to(dtype) * value
    return total.to(x.dtype)


def _places(direction: str, height: int, width: int) -> list[tuple[int, int]]:
    """Row and column of the tokens, in the order in which they are visited."""
    if direction.startswith("rows"):
        places = [(row, column) for row in range(height) for column in range(width)]
    else:
        places = [(row, column) for column in range(width) for row in range(height)]
    return places[::-1] if direction.endswith("reversed") else places
