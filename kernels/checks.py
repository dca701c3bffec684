"""Checks that several operators share. Their errors state the value, what is allowed and what to do."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real

import torch
from torch import SymBool, SymFloat, SymInt, Tensor

# With ZOO_DEBUG=1, values on a GPU are checked too. Each check waits for the GPU.
DEBUG = os.environ.get("ZOO_DEBUG", "0") == "1"

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Tensors that may be float32 with half precision: autocast leaves them as they are.
PARAMETERS = (
    "bias_table", "temperature", "line_decay", "A", "D", "delta", "delta_bias", "log_gates", "reverse_log_gates",
)  # fmt: skip


def certain(condition: bool | SymBool) -> bool:
    """Whether `condition` holds; for symbolic sizes, as in torch.export, whether it holds for every value of them.

    A check then rejects only what is wrong for every size, and does not specialize an exported program.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """The sizes of `tensor`, as plain numbers under torch.jit.trace too, which otherwise records tensors.

    A traced operator is therefore valid for one map size only, as torch says in a warning.
    """
    return tuple(map(int, tensor.shape)) if torch.jit.is_tracing() else tuple(tensor.shape)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """`value` for rows and columns.

    Raises:
        TypeError: it is neither an int nor a pair of ints.
        ValueError: it is below 1.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int | SymInt) and not isinstance(v, bool) for v in values):
        raise TypeError(f"Got {name}={value!r}; give an int, or two of them for rows and columns.")
    if any(certain(v < 1) for v in values):
        raise ValueError(f"Got {name}={value!r}; it has to be 1 or more.")
    return values


def flags(value: bool | tuple[bool, bool], name: str) -> tuple[bool, bool]:
    """`value` for rows and columns.

    Raises:
        TypeError: it is neither a bool nor a pair of bools.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or not all(isinstance(v, bool) for v in values):
        raise TypeError(f"Got {name}={value!r}; give True or False, or two of them for rows and columns.")
    return values


def count(value: int, name: str) -> None:
    """Check that `value` is a count.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral | SymInt):
        raise TypeError(f"Got {name}={value!r}; give an int.")
    if certain(value < 1):
        raise ValueError(f"Got {name}={value!r}; it has to be 1 or more.")


def tensors(needed: dict[str, Tensor], **optional: Tensor | None) -> None:
    """Check that all `needed` arguments, and the `optional` ones that are not None, are dense tensors on one device.

    Raises:
        TypeError: one is not a tensor, or not dense.
        ValueError: the devices differ.
    """
    given = needed | {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Got {name} of type {type(tensor).__name__}; it has to be a torch.Tensor.")
        if tensor.layout != torch.strided:
            raise TypeError(f"Got {name} of layout {tensor.layout}; convert it with .to_dense().")
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise ValueError(
                f"Got {name} on {given[name].device} with {first} on {given[first].device}; move one of them."
            )


def floating(**tensors: Tensor | None) -> None:
    """Check that the tensors have one floating-point dtype; PARAMETERS may be float32 with half precision.

    Raises:
        TypeError: another dtype, or dtypes that differ.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"Got {name} of {tensor.dtype}; it has to be floating point of 16, 32 or 64 bits: convert it."
            )
    first, *others = given
    for name in others:
        allowed = [given[first].dtype]
        if name in PARAMETERS and allowed[0] in (torch.float16, torch.bfloat16):
            allowed.append(torch.float32)
        if given[name].dtype not in allowed:
            raise TypeError(
                f"Got {name} of {given[name].dtype} with {first} of {given[first].dtype}; "
                "they have to be of the same type: convert one of them."
            )


def shape(tensor: Tensor, name: str, expected: tuple[int | None, ...], letters: str) -> None:
    """Check that `tensor` has the `expected` sizes, where None is any; `letters` names them in the error.

    Raises:
        ValueError: the sizes differ.
    """
    given = sizes(tensor)
    if len(given) != len(expected) or any(
        want is not None and certain(have != want) for have, want in zip(given, expected, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"Got {name} of shape {given}; expected {letters} = ({wanted}).")


def mask(tensor: Tensor, name: str, expected: tuple[int, ...], letters: str) -> None:
    """Check that `tensor` is bool and has the `expected` sizes.

    Raises:
        TypeError: it is not bool.
        ValueError: the sizes differ.
    """
    shape(tensor, name, expected, letters)
    if tensor.dtype != torch.bool:
        raise TypeError(f"Got {name} of {tensor.dtype}; it has to be bool, True for tokens that take part.")


def split_heads(channels: int, parts: int, num_heads: int, name: str) -> int:
    """The head dimension of a tensor with `parts` times `num_heads` heads in its `channels`.

    Raises:
        TypeError: `num_heads` is not an int.
        ValueError: the channels are not a multiple of that, or there are no heads.
    """
    count(num_heads, "num_heads")
    if channels == 0 or channels % (parts * num_heads):
        what = f"{parts} x " if parts > 1 else ""
        raise ValueError(
            f"Got {channels} channels in {name} for {num_heads=}; they have to be a multiple of "
            f"{what}{num_heads} = {parts * num_heads}."
        )
    return channels // (parts * num_heads)


def attention_scale(scale: float | None, head_dim: int) -> float:
    """`scale` as a float, or head_dim ** -0.5 if it is None.

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN or infinite.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real | SymFloat | SymInt):
        raise TypeError(f"Got {scale=}; give a number, or None for head_dim ** -0.5.")
    if isinstance(scale, float) and not -math.inf < scale < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"Got {scale=}; it has to be finite.")
    return float(scale)


def not_negative(value: float, name: str) -> float:
    """`value` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Got {name}={value!r}; give a number.")
    if not 0 <= value < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"Got {name}={value!r}; it has to be 0 or more, and finite.")
    return float(value)


def map_size(height: int, width: int, name: str) -> None:
    """Check that a map has tokens.

    Raises:
        ValueError: it is empty.
    """
    if certain(height == 0) or certain(width == 0):
        raise ValueError(f"Got {name} of {height} x {width} tokens; a map has one or more.")
