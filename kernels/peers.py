"""What an operator's `peers.py` is made of: others' ways to compute it, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

Arguments = dict[str, Any]
# What an argument becomes before the clock starts; the gradient of the output comes as "grad".
Prepare = Callable[[str, Any], Any]


class CannotRunError(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator, called with the public function's arguments by name."""

    name: str
    compute: Callable[..., Tensor]
    prepare: Prepare = lambda name, value: value
    only_backward: bool = False


def bias_fixed(name: str, value: Any) -> Any:
    """Prepare a contender that has no gradient of the bias table."""
    return value.detach() if name == "bias_table" and value is not None else value


def without_bias(name: str, value: Any) -> Any:
    """Prepare a contender that has no bias table."""
    return None if name == "bias_table" else value


def pair(value: Any) -> tuple[Any, Any]:
    """`value` for rows and columns."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Matrix product, softmax, matrix product."""
    needs_no_mask(bias)
    scores = (query * scale) @ key.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def needs_no_mask(bias: Tensor | None) -> None:
    """A `bias` of all windows is a table; one for each window has a mask in it.

    Raises:
        CannotRunError: it has a mask.
    """
    if bias is not None and bias.dim() != 3:
        raise CannotRunError("not written for key_mask, where a window may have no key at all")


def flex_can(tensor: Tensor) -> None:
    """flex_attention can compute what `tensor` is a part of.

    Raises:
        CannotRunError: it cannot.
    """
    if tensor.device.type == "cpu" and tensor.requires_grad:
        raise CannotRunError("it has no backward pass on CPUs")


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled anew for each shape."""
    return torch.compile(flex_attention, dynamic=False)
