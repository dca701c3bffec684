"""Neighborhood attention without `zoo.kernels`: unfolded keys, flex_attention, and NATTEN.

Letters: B images, H, W map, N heads, D head dim, K keys of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from zoo.kernels.neighborhood_attention.common import neighbors
from zoo.kernels.peers import (
    Arguments,
    CannotRunError,
    Contender,
    bias_fixed,
    compiled_flex,
    flex_can,
    pair,
    without_bias,
)

# Operations of the backward pass, relative to those of the forward pass: five matrix products to two.
BACKWARD_FLOPS = 2.5


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward."""
    height, width = pair(arguments["kernel_size"])
    return 4 * height * width


def _neighborhoods(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    _takes_no_key_mask(given)
    qkv, heads = given["qkv"], given["num_heads"]
    height, width = qkv.shape[1:3]
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # B N HW D
    axes = tuple(
        (length, *options)
        for length, *options in zip(
            (height, width),
            *(pair(given[name]) for name in ("kernel_size", "dilation", "stride", "is_causal")),
            strict=True,
        )
    )
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query, key, value, given["bias_table"], scale, axes)
    return out.transpose(1, 2).flatten(-2).unflatten(1, (height, width))


def _takes_no_key_mask(given: dict[str, Any]) -> None:
    if given["key_mask"] is not None:
        raise CannotRunError("not written for key_mask")


def _unfold(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, scale: float, axes: Any) -> Tensor:
    """Copy the keys and values of each query."""
    index, down, right, valid = _neighbor_index(axes, query.device)  # (HW, K) each
    key, value = key[:, :, index], value[:, :, index]  # (B, N, HW, K, D)
    scores = (query * scale)[..., None, :] @ key.transpose(-2, -1)  # (B, N, HW, 1, K)
    if table is not None:
        scores = scores + table.to(scores.dtype)[:, down, right][:, :, None]
    if not valid.all():
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    return (scores.softmax(-1) @ value)[..., 0, :]


@cache
def _neighbor_index(axes: Any, device: torch.device) -> tuple[Tensor, ...]:
    """For each position, row by row: its neighbours, their rows and columns in the table, and a mask."""
    (rows, down, row_valid), (columns, right, column_valid) = (neighbors(*axis, device=device) for axis in axes)
    index = rows[:, None, :, None] * axes[1][0] + columns[None, :, None, :]
    down = (down + axes[0][1] - 1)[:, None, :, None].expand_as(index)
    right = (right + axes[1][1] - 1)[None, :, None, :].expand_as(index)
    valid = row_valid[:, None, :, None] & column_valid[None, :, None, :]
    return tuple(x.flatten(2).flatten(0, 1) for x in (index, down, right, valid))


def _flex_neighborhoods(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, scale: float, axes: Any
) -> Tensor:
    flex_can(query)
    block_mask, down, right = _flex_mask(axes, query.device)
    width = axes[1][0]
    if table is None:
        return compiled_flex()(query, key, value, block_mask=block_mask, scale=scale)

    def added(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[h, down[q // width, k // width], right[q % width, k % width]]

    return compiled_flex()(query, key, value, score_mod=added, block_mask=block_mask, scale=scale)


@cache
def _flex_mask(axes: Any, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    allowed, offsets = [], []
    for length, kernel, *rest in axes:
        found, offset, valid = neighbors(length, kernel, *rest, device=device)
        takes = torch.zeros(length, length, dtype=torch.bool, device=device)
        query = torch.arange(length, device=device)[:, None].expand_as(found)
        takes[query[valid], found[valid]] = True
        entry = torch.zeros(length, length, dtype=torch.int32, device=device)
        entry[query[valid], found[valid]] = (offset[valid] + kernel - 1).to(torch.int32)
        allowed.append(takes)
        offsets.append(entry)
    (rows, columns), (height, width) = allowed, (axis[0] for axis in axes)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rows[q // width, k // width] & columns[q % width, k % width]

    block_mask = create_block_mask(seen, None, None, height * width, height * width, device=device)
    down, right = offsets
    return block_mask, down, right


def _natten(**given: Any) -> Tensor:
    try:
        from natten import na2d
    except ImportError:
        raise CannotRunError("the package natten is not installed") from None
    _takes_no_key_mask(given)
    query, key, value = given["qkv"].unflatten(-1, (3, given["num_heads"], -1)).unbind(3)
    names = ("kernel_size", "dilation", "stride", "is_causal", "scale")
    return na2d(query, key, value, **{name: given[name] for name in names}).flatten(-2)


PEERS = (
    Contender("unfold", partial(_neighborhoods, _unfold)),
    Contender("flex", partial(_neighborhoods, _flex_neighborhoods)),
    Contender("flex, bias fixed", partial(_neighborhoods, _flex_neighborhoods), bias_fixed, only_backward=True),
    Contender("natten, no bias", _natten, without_bias),
)
