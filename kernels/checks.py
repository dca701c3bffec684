"""Errors that several operators share: the value, what is allowed, what to do. Every implementation raises the same."""

from __future__ import annotations

import torch
from torch import SymBool, SymInt, Tensor


def certain(condition: bool | SymBool) -> bool:
    """Whether `condition` holds; for sizes that are still open, as in torch.export, whether it holds for all of them.

    So a check refuses what is certainly wrong, and an exported program is not tied to the sizes it was traced with.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """`value` for rows and columns.

    Raises:
        TypeError: it is neither an int nor two.
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
        TypeError: it is neither a bool nor two.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or not all(isinstance(v, bool) for v in values):
        raise TypeError(f"Got {name}={value!r}; give True or False, or two of them for rows and columns.")
    return values


def floating(**tensors: Tensor | None) -> None:
    """Tensors are of one floating-point type, on one device; a `bias_table` may be float32 beside half precision.

    Raises:
        TypeError: an integer tensor, or types that differ.
        ValueError: devices that differ.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"Got {name} of {tensor.dtype}; it has to be floating point: convert it with .float().")
    first, *others = given
    for name in others:
        allowed = [given[first].dtype]
        if name == "bias_table" and allowed[0] in (torch.float16, torch.bfloat16):
            allowed.append(torch.float32)
        if given[name].dtype not in allowed:
            raise TypeError(
                f"Got {name} of {given[name].dtype} with {first} of {given[first].dtype}; "
                "they have to be of the same type: convert one of them."
            )
        if given[name].device != given[first].device:
            raise ValueError(
                f"Got {name} on {given[name].device} with {first} on {given[first].device}; move one of them."
            )


def shape(tensor: Tensor, name: str, expected: tuple[int | None, ...], letters: str) -> None:
    """`tensor` has the `expected` sizes, None being any; `letters` names them for the error.

    Raises:
        ValueError: it does not.
    """
    sizes = tuple(tensor.shape)
    if len(sizes) != len(expected) or any(
        want is not None and certain(have != want) for have, want in zip(sizes, expected, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"Got {name} of shape {sizes}; expected {letters} = ({wanted}).")


def split_heads(channels: int, parts: int, num_heads: int, name: str) -> int:
    """The head dimension of a tensor with `parts` times `num_heads` heads in its `channels`.

    Raises:
        ValueError: the channels can't be divided so, or there are no heads.
    """
    if num_heads < 1:
        raise ValueError(f"Got {num_heads=}; it has to be 1 or more.")
    if channels == 0 or channels % (parts * num_heads):
        what = f"{parts} x " if parts > 1 else ""
        raise ValueError(
            f"Got {channels} channels in {name} for {num_heads=}; they have to be a multiple of "
            f"{what}{num_heads} = {parts * num_heads}."
        )
    return channels // (parts * num_heads)


def attention_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or the usual head_dim ** -0.5 for None."""
    return head_dim**-0.5 if scale is None else float(scale)
