"""TensorFlow's checkpoints, read without TensorFlow, and Keras's names and layouts of variables turned into PyTorch's.

A checkpoint has an index, `<name>.index`, and one or more files of values, `<name>.data-00000-of-00001`. The index is a
table in the format of LevelDB, without compression. Its keys are the names of the variables. Its values are messages of
protocol buffers (BundleEntryProto) that say where in the data a variable is, and its type and shape.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["is_checkpoint", "read", "to_torch"]

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a table
FOOTER = 48  # bytes
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
AVERAGE = "/ExponentialMovingAverage"
# The last part of the name of a variable of a model, in Keras and in PyTorch. All others belong to the optimizer.
LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "weight": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "relative_position_embedding": "relative_position_embedding",
}


def is_checkpoint(path: str | os.PathLike, head: bytes) -> bool:
    """Whether a file, which begins with `head`, is an index, or an archive that may hold a checkpoint."""
    return Path(path).suffix == ".index" or head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar"


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The variables of a checkpoint, by TensorFlow's names and in its layouts.

    Args:
        path: The index, with the data beside it, or an archive with both.

    Raises:
        ValueError: It is not a checkpoint, or not a whole one.
    """
    path = Path(path)
    if path.suffix == ".index":
        return _variables(path.read_bytes(), lambda end: open(path.with_suffix(end), "rb"))
    with tarfile.open(path) as archive:
        found = (member for member in archive if member.isfile())
        members = {member.name: member for member in found if re.search(r"\.(index|data-\d+-of-\d+)$", member.name)}
        if sum(member.size for member in members.values()) > 8 * os.path.getsize(path):
            raise ValueError("it unpacks to more than eight times its size")
        indices = [name for name in members if name.endswith(".index")]  # the graph, .meta, is not needed
        if len(indices) != 1:
            raise ValueError(f"the archive has {len(indices)} TensorFlow checkpoints")

        def unpack(name: str) -> IO[bytes]:
            file = archive.extractfile(members[name])
            assert file is not None  # a file, not a folder
            return file

        with unpack(indices[0]) as file:
            index = file.read()
        return _variables(index, lambda end: unpack(indices[0].removesuffix(".index") + end))


def _variables(index: bytes, open_data: Callable[[str], IO[bytes]]) -> dict[str, Tensor]:
    """The variables that an index lists; `open_data` opens the file of values whose name has the given end."""
    table = dict(_table(index))
    shards = _message(table.pop(b"")).get(1, [1])[0]
    entries: dict[int, list[tuple[int, str, dict[int, list[Any]]]]] = {}
    for key, value in table.items():
        entry = _message(value)
        if entry.get(1, [0])[0] in DTYPES:  # others are strings, which hold no weights
            entries.setdefault(entry.get(3, [0])[0], []).append((entry.get(4, [0])[0], key.decode(), entry))
    variables = {}
    for shard, listed in entries.items():
        with open_data(f".data-{shard:05d}-of-{shards:05d}") as data:
            if sum(entry.get(5, [0])[0] for _, _, entry in listed) > data.seek(0, os.SEEK_END):
                raise ValueError("its values are not complete")
            for offset, name, entry in sorted(listed, key=lambda item: item[:2]):
                dtype, size = DTYPES[entry[1][0]], entry.get(5, [0])[0]
                shape = [_message(dim).get(1, [0])[0] for dim in _message(entry.get(2, [b""])[0]).get(2, [])]
                data.seek(offset)
                content = bytearray(data.read(size))
                if len(content) != size or size != torch.Size(shape).numel() * dtype.itemsize:
                    raise ValueError("its values are not complete")
                values = torch.frombuffer(content, dtype=dtype) if size else torch.empty(0, dtype=dtype)
                variables[name] = values.reshape(shape)
    return variables


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a LevelDB table."""
    if len(content) < FOOTER or struct.unpack("<Q", content[-8:])[0] != MAGIC:
        raise ValueError("its index is not a table of TensorFlow")
    numbers = _numbers(content[-FOOTER:-8])
    next(numbers), next(numbers)  # where the meta index is
    for _, handle in _block(content, next(numbers), next(numbers)):
        place = _numbers(handle)
        yield from _block(content, next(place), next(place))


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. Each key is stored as its difference from the one before."""
    if content[offset + size] != 0:
        raise ValueError("its index is compressed")
    block = content[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    place, key = 0, b""
    while place < end:
        shared, place = _number(block, place)
        own, place = _number(block, place)
        length, place = _number(block, place)
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + length]
        place += length


def _message(content: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: ints, or bytes for strings and messages."""
    fields: dict[int, list[Any]] = {}
    place = 0
    while place < len(content):
        tag, place = _number(content, place)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, place = _number(content, place)
        elif kind == 2:
            length, place = _number(content, place)
            value, place = content[place : place + length], place + length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value, place = int.from_bytes(content[place : place + length], "little"), place + length
        else:
            raise ValueError("its index has a field of an unknown kind")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _numbers(content: bytes) -> Iterator[int]:
    place = 0
    while place < len(content):
        number, place = _number(content, place)
        yield number


def _number(content: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, seven bits a byte, and the place after it."""
    number = shift = 0
    while True:
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def to_torch(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Variables of Keras's layers with PyTorch's names and layouts.

    For example, `a/kernel` (h, w, C, C') becomes `a.weight` (C', C, h, w).
    Averages take the place of the variables that they are averages of. What belongs to the optimizer is left out.
    """
    names = {name: name for name in variables if not name.endswith(AVERAGE)}
    names |= {name.removesuffix(AVERAGE): name for name in variables if name.endswith(AVERAGE)}
    tensors = {}
    for name, source in names.items():
        layer, _, leaf = name.rpartition("/")
        if leaf in LEAVES and not re.search(r"(^|/)(Adam|AdamWeightDecay|Momentum|RMSProp)(_\d)?(/|$)", layer):
            value = variables[source]
            bias = variables.get(f"{layer}/bias")
            tensors[f"{layer}/{LEAVES[leaf]}".replace("/", ".")] = _transposed(leaf, value, bias).contiguous()
    return tensors


def _transposed(leaf: str, value: Tensor, bias: Tensor | None) -> Tensor:
    """A variable in PyTorch's layout."""
    if leaf == "relative_position_embedding":
        return value
    if leaf == "depthwise_kernel":
        return value.permute(2, 3, 0, 1)
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    if value.ndim == 3:  # a linear layer to heads (C, N, D), or from heads (N, D, C) or (C, N, D)
        if bias is not None and bias.ndim == 2:
            return value.flatten(1).T
        return value.flatten(1) if bias is not None and len(bias) != value.shape[2] else value.flatten(0, 1).T
    return value.T if leaf in ("kernel", "weight") and value.ndim == 2 else value.flatten()
