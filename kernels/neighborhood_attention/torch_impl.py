"""Neighborhood attention in PyTorch, fast on CPUs: tiles of queries that share the keys around them.

Along an axis, the places of each dilation group are divided into tiles of a few queries. All tiles have the same number
of keys, as many as any of them needs, shifted inward at the borders; a bias of -inf hides those that are not neighbours
of a query. The bias is the same for all tiles away from the borders, so a map has few kinds of tiles, often 3 x 3.

Letters: B images, H, W map, N heads, D head dim, U tiles, T queries and K keys of a tile, P kinds of tiles. On a single
axis, L is the length of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from zoo.kernels import checks, dispatch
from zoo.kernels.attention import attend, fused
from zoo.kernels.constants import constant
from zoo.kernels.gather import take
from zoo.kernels.window_attention.torch_impl import window_attention
from zoo.kernels.windows import neighborhood_layout

TILE = 4
CHUNK = 2**20  # elements to gather at a time if no gradient is needed


def can_run(
    size: Sequence[int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
) -> bool:
    """Whether `neighborhood_attention` can run on a map of this size.

    It cannot if torch.export keeps the size symbolic: the number of tiles would specialize the program.
    """
    if not torch.compiler.is_exporting() or all(has_static_value(length) for length in size):
        return True
    return neighborhood_layout(size, kernel_size, dilation, stride, is_causal) is not None


def neighborhood_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    bias_table: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """See `op.neighborhood_attention`, which checks the arguments."""
    batch, (images, height, width, channels) = qkv.shape[0], checks.sizes(qkv)
    layout = neighborhood_layout((height, width), kernel_size, dilation, stride, is_causal)
    if layout is not None:
        return window_attention(
            qkv,
            num_heads=num_heads,
            window_size=kernel_size,
            layout=layout,
            bias_table=bias_table,
            bias_sign="key_minus_query",
            scale=scale,
            key_mask=key_mask,
            regions=None,
            line_decay=None,
            q=None,
        )
    if dispatch.compiled_for_cpu(qkv) and fused(qkv, bias_table):
        axes = kernel_size, dilation, stride, is_causal
        return _uncompiled(qkv, bias_table, key_mask, num_heads, *axes, scale)
    closed = has_static_value(height) and has_static_value(width)
    rows, columns = (
        _axis(*options, closed=closed)
        for options in zip((height, width), kernel_size, dilation, stride, is_causal, strict=True)
    )
    fuse = closed and fused(qkv, bias_table)
    head_dim = channels // (3 * num_heads)
    source = qkv if fuse else qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    bias = _bias(bias_table, rows, columns, source)  # (P, N, T, K)

    if closed and rows.tiles == columns.tiles == 1:
        parts = source.reshape(batch, height * width, 3, num_heads, head_dim)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        taken = None if key_mask is None else key_mask.flatten(1)
        out = _attend(query, key, value, bias, taken, scale, fuse=fuse)
        return out.reshape(batch, height, width, num_heads * head_dim).to(qkv.dtype)

    queries, keys = rows.tile * columns.tile, rows.keys * columns.keys
    counts = queries, keys, keys
    entries = source.reshape(-1, head_dim)
    index = constant(_gathered, rows, columns, num_heads, like=qkv)  # (U, T + 2 K)
    image, head = (torch.arange(count, device=qkv.device) for count in (batch, num_heads))
    parts = (image * (height * width * 3 * num_heads))[:, None, None] + head[:, None]  # (B, N, 1)

    def compute(index: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            take(entries, 0, (part[:, None, None] + parts).flatten()).reshape(
                checks.sizes(part)[0], batch, num_heads, count, head_dim
            )
            for part, count in zip(index.split(counts, 1), counts, strict=True)
        )
        taken = None
        if key_mask is not None:
            token = index[:, queries : queries + keys] // (3 * num_heads)  # (U, K)
            taken = key_mask.flatten(1).index_select(1, token.flatten()).unflatten(1, token.shape).transpose(0, 1)
        if bias.ndim == 4:
            query, key, value = (x.flatten(0, 1) for x in (query, key, value))
            taken = None if taken is None else taken.flatten(0, 1)
        return _attend(query, key, value, bias, taken, scale, fuse=fuse).reshape(-1, num_heads * head_dim)

    if closed and (fuse or not dispatch.again_differentiable(qkv, bias_table)):
        chunks = []
        for kind, like in enumerate(index.split([u * v for u in rows.kinds for v in columns.kinds])):
            size = checks.sizes(like)[0]
            if not torch.compiler.is_compiling():
                size = max(1, CHUNK // max(1, images * num_heads * sum(counts) * head_dim))
            chunks += [compute(part, bias[kind : kind + 1]) for part in like.split(size)]
        out = torch.cat(chunks)
    else:
        if closed:
            bias = take(bias, 0, constant(_kinds, rows, columns, like=qkv))
        out = compute(index, bias[:, None])  # (U B T, N D)
    tile, slot = constant(_places, rows, columns, like=qkv)
    place = (tile * batch + image[:, None, None]) * queries + slot  # (B, H, W)
    out = take(out, 0, place.flatten()).reshape(batch, height, width, num_heads * head_dim)
    return out.to(qkv.dtype)


# Inductor would take minutes to compile the program, in which each kind of tiles has attention of its own, and gather
# more slowly. Programs that compute gradients are small, since they treat all tiles alike.
@torch.library.custom_op("zoo::na2d_tiles", mutates_args=(), device_types="cpu")
def _uncompiled(
    qkv: Tensor,
    bias_table: Tensor | None,
    key_mask: Tensor | None,
    num_heads: int,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """`neighborhood_attention` as one node of a compiled program for CPUs, without gradients."""
    axes = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    options: dict[str, Any] = {name: tuple(pair) for name, pair in axes.items()}
    with dispatch.as_given(qkv):
        out = neighborhood_attention(
            qkv, num_heads=num_heads, **options, bias_table=bias_table, scale=scale, key_mask=key_mask
        )
    return out.contiguous()


@_uncompiled.register_fake
def _(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, taken: Tensor | None, scale: float, *, fuse: bool
) -> Tensor:
    """`attend` to the keys that are `taken`, (..., K) bool or None for all; zeros for queries without such a key."""
    if taken is None:
        return attend(query, key, value, bias, scale, fuse=fuse)
    bias = torch.where(taken[..., None, None, :], bias, -torch.inf)
    any_key = (bias != -torch.inf).any(-1, keepdim=True)  # (..., N, T, 1)
    # Queries without a key attend to all keys until the end: if all their logits were -inf, the result would be NaN.
    out = attend(query, key, value, torch.where(any_key, bias, 0), scale, fuse=fuse)
    return torch.where(any_key.transpose(-3, -2), out, 0)


class _Axis(NamedTuple):
    """The tiles of one axis; hashable, as part of the key of `constant`."""

    length: int
    kernel: int
    dilation: int
    stride: int
    causal: bool
    tile: int  # T
    keys: int  # K
    tiles: int  # U, one dilation group after another
    order: tuple[int, ...] | None  # the tiles sorted by kind; None for symbolic sizes
    kinds: tuple[int, ...]  # the number of tiles of each kind


def _axis(length: int, kernel: int, dilation: int, stride: int, causal: bool, *, closed: bool) -> _Axis:
    places = (length + dilation - 1) // dilation
    if closed:
        # A group that is little longer than the keys of a tile is one tile; others are divided nearly evenly.
        tile = places if 2 * places <= 3 * (kernel + TILE - 1) else -(-places // -(-places // TILE))
    else:
        # A compiled program is for one tile or for several; a group has at least as many places as the kernel.
        tile = TILE if checks.certain(places > TILE) else max(1, min(TILE, kernel - 1))
    tiles = dilation * ((places + tile - 1) // tile)
    # The windows of the queries of a tile start no further apart than their leaders are.
    keys = kernel + (tile - 1 if causal else -(-(tile - 1) // stride) * stride)
    if checks.certain(places <= keys):
        keys = places
    order, kinds = None, (tiles,)
    if closed:
        reach = kernel if causal else kernel // 2
        before, after = stride + reach, stride + max(tile + kernel // 2, keys - reach)
        order, kinds = _alike(length, dilation, stride, tile, before, after)
    return _Axis(length, kernel, dilation, stride, causal, tile, keys, tiles, order, kinds)


@torch.compiler.assume_constant_result
def _alike(
    length: int, dilation: int, stride: int, tile: int, before: int, after: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `order` and `kinds` of an axis.

    Tiles are of one kind if their distances to the borders are equal, or at least `before` and `after`, and they start
    at the same place relative to the stride.
    """
    found: dict[tuple[int, int, int], list[int]] = {}
    per_group = -(-length // (dilation * tile))
    for unit in range(dilation * per_group):
        group, first = unit // per_group, unit % per_group * tile
        left = -(-(length - group) // dilation) - first
        found.setdefault((min(first, before), min(left, after), first % stride), []).append(unit)
    return tuple(unit for units in found.values() for unit in units), tuple(len(units) for units in found.values())


def _bias(table: Tensor | None, rows: _Axis, columns: _Axis, source: Tensor) -> Tensor:
    """(P, N, T, K), -inf for keys that are not neighbours of the query; (U, N, T, K) for symbolic sizes."""
    if table is None:
        table = source.new_zeros(1, 2 * rows.kernel - 1, 2 * columns.kernel - 1)
    table = F.pad(table.to(torch.promote_types(table.dtype, torch.float32)), (0, 1, 0, 1), value=-torch.inf)
    for dim, axis in ((2, columns), (1, rows)):
        offsets = constant(_offsets, axis, like=source)
        table = take(table, dim, offsets.flatten()).unflatten(dim, offsets.shape)
    return table.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(0, 1)


def _tables(axis: _Axis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the queries (U, T) and keys (U, K) of the tiles in order, and offsets (U, T, K) as in `_offsets`."""
    group, tile = (torch.arange(n, device=device) for n in (axis.dilation, axis.tiles // axis.dilation))
    group, tile = (x.flatten() for x in torch.broadcast_tensors(group[:, None], tile))
    if axis.order is not None:
        order = torch.tensor(axis.order, device=device)
        group, tile = group[order], tile[order]
    group = group[:, None]
    places = (axis.length - group + axis.dilation - 1) // axis.dilation
    query = tile[:, None] * axis.tile + torch.arange(axis.tile, device=device)
    query = torch.minimum(query, places - 1)
    begun = query // axis.stride * axis.stride
    if axis.causal:
        start = torch.minimum(begun + axis.stride - 1, places - 1) - axis.kernel + 1
        last = query
    else:
        leader = torch.minimum(begun + axis.stride // 2, places - 1)
        start = torch.minimum((leader - axis.kernel // 2).clamp(min=0), places - axis.kernel)
        last = start + axis.kernel - 1
    first = torch.minimum(start[:, :1], places - axis.keys).clamp(min=0)
    key = first + torch.arange(axis.keys, device=device)
    seen = (key[:, None] >= start[..., None]) & (key[:, None] <= last[..., None])
    offsets = torch.where(seen, key[:, None] - query[..., None] + axis.kernel - 1, 2 * axis.kernel - 1)
    key = torch.minimum(key, places - 1)
    return query * axis.dilation + group, key * axis.dilation + group, offsets


def _offsets(axis: _Axis, device: torch.device) -> Tensor:
    """(P, T, K), indices of rows or columns of the bias table, which is padded by one; (U, T, K) for symbolic sizes."""
    offsets = _tables(axis, device)[2]
    if axis.order is None:
        return offsets
    return offsets[torch.tensor(list(accumulate((0, *axis.kinds[:-1]))), device=device)]


def _gathered(rows: _Axis, columns: _Axis, num_heads: int, device: torch.device) -> Tensor:
    """(U, T + 2 K), indices of the queries, keys and values of a tile, for an image's first head."""
    (*down, _), (*right, _) = (_tables(axis, device) for axis in (rows, columns))
    query, key = (
        torch.cat(
            [
                (y[:, None, :, None] * columns.length + x[None, :, None]).flatten(2).flatten(0, 1)
                for y in ys.split(rows.kinds)
                for x in xs.split(columns.kinds)
            ]
        )
        for ys, xs in zip(down, right, strict=True)
    )
    return torch.cat([query * 3, key * 3 + 1, key * 3 + 2], 1) * num_heads


def _kinds(rows: _Axis, columns: _Axis, device: torch.device) -> Tensor:
    """(U,), the kind of each tile."""
    counts = [u * v for u in rows.kinds for v in columns.kinds]
    return torch.tensor([kind for kind, count in enumerate(counts) for _ in range(count)], device=device)


def _places(rows: _Axis, columns: _Axis, device: torch.device) -> Tensor:
    """(2, H, W), the tile of each position and its index in the tile."""
    (tile, slot, begin, count), (tile_x, slot_x, begin_x, count_x) = (_find(axis, device) for axis in (rows, columns))
    tile, slot, begin, count = (x[:, None] for x in (tile, slot, begin, count))
    # Tiles are sorted by the kinds of their rows and columns, then row by row.
    unit = begin * columns.tiles + count * begin_x + (tile - begin) * count_x + (tile_x - begin_x)
    return torch.stack([unit, slot * columns.tile + slot_x])


def _find(axis: _Axis, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each position: its tile, its index there, the first tile of that kind, and their number; each (L,)."""
    position = torch.arange(axis.length, device=device)
    group, place = position % axis.dilation, position // axis.dilation
    unit = group * (axis.tiles // axis.dilation) + place // axis.tile
    if axis.order is None:
        return unit, place % axis.tile, torch.zeros_like(unit), torch.full_like(unit, axis.tiles)
    tile = torch.tensor(axis.order, device=device).argsort()[unit]
    begins = accumulate((0, *axis.kinds[:-1]))
    kinds = [(begin, count) for begin, count in zip(begins, axis.kinds, strict=True) for _ in range(count)]
    begin, count = torch.tensor(kinds, device=device).unbind(1)
    return tile, place % axis.tile, begin[tile], count[tile]
