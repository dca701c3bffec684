"""Gathering along a dimension, with a gradient that is fast and reproducible in programs compiled for CPUs too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import dispatch


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.index_select(dim, index)`.

    Inductor would add the gradients of entries that are taken several times by atomic operations: several times slower
    than PyTorch's own operator, and in any order. Compiled programs therefore call that operator.
    """
    if dispatch.compiled_for_cpu(x) and dispatch.again_differentiable(x):
        return _Take.apply(x, dim, index)
    return x.index_select(dim, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.size = dim, x.shape[dim]
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _add(grad, ctx.dim, index, ctx.size), None, None


@torch.library.custom_op("zoo::index_add", mutates_args=(), device_types="cpu")
def _add(grad: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Zeros of `size` along `dim`, plus the slices of `grad` at `index`."""
    shape = list(grad.shape)
    shape[dim] = size
    return grad.new_zeros(shape).index_add(dim, index, grad)


@_add.register_fake
def _(grad: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    shape = list(grad.shape)
    shape[dim] = size
    return grad.new_empty(shape)
