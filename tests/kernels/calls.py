"""The small call of each operator, from `cases.py` of its folder, for tests that all operators share."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from zoo.kernels import OPERATORS

CASES = {name: import_module(f"zoo.kernels.{name}.cases") for name in OPERATORS}
WITH_TRITON = [name for name in OPERATORS if find_spec(f"zoo.kernels.{name}.triton_impl")]


def call(name: str, *tensors: Tensor) -> Tensor:
    """The small call of an operator, on `make(name)` if no tensors are given."""
    return CASES[name].sample(*(tensors or make(name)))


def make(name: str, dtype: torch.dtype = torch.float32, *, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Tensors for the small call of an operator."""
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in CASES[name].SAMPLE_SHAPES)
    return tuple(x.to(dtype).requires_grad_(requires_grad) for x in tensors)


def of_images(tensors: tuple[Tensor, ...]) -> list[bool]:
    """Whether each tensor is a map (B, H, W, channels) like the first; the others are shared by all images."""
    return [x.ndim == 4 and x.shape[:3] == tensors[0].shape[:3] for x in tensors]
