"""A small call of each operator, for tests of what they have in common; `cases.py` of its folder has it."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from zoo.kernels import OPERATORS

CASES = {name: import_module(f"zoo.kernels.{name}.cases") for name in OPERATORS}
WITH_TRITON = [name for name in OPERATORS if find_spec(f"zoo.kernels.{name}.triton_impl")]


def call(name: str, *tensors: Tensor) -> Tensor:
    """The small call of an operator, of `make(name)` if no tensors are given."""
    return CASES[name].sample(*(tensors or make(name)))


def make(name: str, dtype: torch.dtype = torch.float32, *, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Tensors for the small call of an operator."""
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in CASES[name].SAMPLE_SHAPES)
    return tuple(x.to(dtype).requires_grad_(requires_grad) for x in tensors)


def of_images(tensors: tuple[Tensor, ...]) -> list[bool]:
    """Which of them are maps (B, H, W, channels), as the first is; the others belong to all images."""
    return [x.ndim == 4 and x.shape[:3] == tensors[0].shape[:3] for x in tensors]
