"""Parts of the operators' `peers.py`: other ways to compute an operator, for benchmarks."""

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
# Converts an argument, given its name, before the clock starts; the gradient of the output has the name "grad".
Prepare = Callable[[str, Any], Any]


class CannotRunError(Exception):
    """The reason why a contender cannot run."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator, called with the arguments of the public function by name."""

    name: str
    compute: Callable[..., Tensor]
    prepare: Prepare = lambda name, value: value
    only_backward: bool = False


def bias_fixed(name: str, value: Any) -> Any:
    """Detach the bias table, for contenders without its gradient."""
    return value.detach() if name == "bias_table" and value is not None else value


def without_bias(name: str, value: Any) -> Any:
    """Drop the bias table, for contenders without it."""
    return None if name == "bias_table" else value


def pair(value: Any) -> tuple[Any, Any]:
    """`value` for rows and columns."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention by PyTorch's fused function."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention as a matrix product, a softmax and a matrix product."""
    needs_no_mask(bias)
    scores = (query * scale) @ key.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def needs_no_mask(bias: Tensor | None) -> None:
    """Check that `bias` comes from a table, the same for all windows, and contains no mask.

    Raises:
        CannotRunError: it contains a mask.
    """
    if bias is not None and bias.dim() != 3:
        raise CannotRunError("not written for key_mask, regions and line_decay")


def flex_can(tensor: Tensor) -> None:
    """Check that flex_attention supports the call that `tensor` belongs to.

    Raises:
        CannotRunError: it does not.
    """
    if tensor.device.type == "cpu" and tensor.requires_grad:
        raise CannotRunError("it has no backward pass on CPUs")


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled for each shape."""
    return torch.compile(flex_attention, dynamic=False)
