"""Window attention without `zoo.kernels`: windows are copied, with three implementations of attention.

Letters: B images, H, W map, N heads, D head dim, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.peers import (
    Arguments,
    Contender,
    bias_fixed,
    compiled_flex,
    flex_can,
    needs_no_mask,
    pair,
    sdpa,
    softmax,
)
from zoo.kernels.window_attention.reference import expand_bias
from zoo.kernels.windows import partition, unpartition

# Operations of the backward pass, relative to those of the forward pass: five matrix products to two.
BACKWARD_FLOPS = 2.5


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward."""
    height, width = pair(arguments["window_size"])
    return 4 * height * width


def _windows(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    """Copy the windows, attend, copy them back."""
    qkv, heads, size, layout = (given[name] for name in ("qkv", "num_heads", "window_size", "layout"))
    size = pair(size)
    parts = 3 if given["q"] is None else 2
    cut = partition(qkv, size, layout)  # (B, windows, T, C)
    count = cut.shape[1]
    *query, key, value = cut.flatten(0, 1).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if given["q"] is not None:
        shared = given["q"].unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, T, D)
        query = [shared[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)]
    bias = None
    if given["bias_table"] is not None:
        bias = expand_bias(given["bias_table"].to(qkv.dtype), size, given["bias_sign"])  # (N, T, T)
    if given["key_mask"] is not None:
        taken = partition(given["key_mask"][..., None], size, layout).flatten(0, 1)[..., 0][:, None, None]
        hidden = torch.zeros(taken.shape, dtype=qkv.dtype, device=qkv.device).masked_fill(~taken, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    if given["regions"] is not None:
        labels = partition(given["regions"].expand(len(qkv), -1, -1)[..., None], size, layout).flatten(0, 1)
        other = (labels != labels.mT)[:, None]  # (B windows, 1, T, T)
        hidden = torch.zeros(other.shape, dtype=qkv.dtype, device=qkv.device).masked_fill(other, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    if given["line_decay"] is not None:
        sums = partition(given["line_decay"].to(qkv.dtype), size, layout).flatten(0, 1).mT  # (B windows, N, T)
        decay = -(sums[..., :, None] - sums[..., None, :]).abs()
        bias = decay if bias is None else bias + decay
    scale = query[0].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query[0], key, value, bias, scale).transpose(1, 2).flatten(-2).unflatten(0, (-1, count))
    return unpartition(out, size, tuple(qkv.shape[1:3]), layout)


def _flex_windows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    flex_can(query)
    needs_no_mask(bias)
    if bias is None:
        return compiled_flex()(query, key, value, scale=scale)

    def added(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[h, q, k]

    return compiled_flex()(query, key, value, score_mod=added, scale=scale)


PEERS = (
    Contender("sdpa", partial(_windows, sdpa)),
    Contender("softmax", partial(_windows, softmax)),
    Contender("flex", partial(_windows, _flex_windows)),
    Contender("flex, bias fixed", partial(_windows, _flex_windows), bias_fixed, only_backward=True),
)
