"""What a model costs: its multiply-adds, and parameters, multiply-adds and outputs by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import implementation
from zoo.messages import count_text

__all__ = ["Layer", "counting", "describe", "layers", "multiply_adds", "without_values"]


@dataclass(frozen=True)
class Layer:
    """A part of a model.

    Attributes:
        name: The name of the module; empty for what belongs to no module that is listed.
        kind: Its class; empty if there is none.
        output: The shape of its (first) output for one image, without the batch; None if it returns no tensor.
        parameters: The number of its parameters.
        trained: The number of those that are not frozen.
        multiply_adds: The multiply-adds for one image.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    trained: int
    multiply_adds: int


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the operations of what runs inside: matrix products and convolutions, and nothing else.

    Yields:
        PyTorch's counter. A multiply-add is two operations.
    """
    with torch.no_grad(), implementation("reference"), FlopCounterMode(display=False) as counter:
        yield counter


def multiply_adds(model: nn.Module, size: Sequence[int]) -> int:
    """The multiply-adds of a classifier for one image of `size` (C, H, W).

    The model is not changed, and nothing is computed.

    Raises:
        Exception: A model of timm may do anything on the meta device.
    """
    with sdpa_kernel(SDPBackend.MATH), counting() as counter:
        without_values(model).eval()(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops() // 2


def layers(model: nn.Module, size: Sequence[int]) -> list[Layer]:
    """The parts of a classifier: its stages, and the modules beside them, in their order.

    Modules without parameters and multiply-adds are left out.

    Args:
        model: The model, which is not changed.
        size: The size of an image, (C, H, W).

    Raises:
        Exception: A model of timm may do anything on the meta device.
    """
    empty = without_values(model).eval()
    listed = dict(_parts(empty))
    outputs: dict[str, tuple[int, ...] | None] = {}
    for name, module in listed.items():
        module.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: _shape(out)}))
    with sdpa_kernel(SDPBackend.MATH), counting() as counter:
        empty(torch.empty(1, *size, device="meta"))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root, left = type(empty).__name__, counter.get_total_flops()
    seen: set[int] = set()
    found = []
    for name, module in listed.items():
        own = flops.get(f"{root}.{name}", 0)
        left -= own
        counts = _counts(model.get_submodule(name), seen)
        found.append(Layer(name, type(module).__name__, outputs.get(name), *counts, own // 2))
    found.append(Layer("", "", None, *_counts(model, seen), left // 2))
    return [layer for layer in found if layer.parameters or layer.multiply_adds]


def describe(found: Sequence[Layer]) -> str:
    """The parameters of each layer, and all multiply-adds, in a line; of more than 8, the stages are taken together."""
    parts: dict[str, list[Layer]] = {}
    for layer in found:
        name = layer.name if len(found) <= 8 else layer.name.partition(".")[0]
        parts.setdefault(name or "others", []).append(layer)
    words = []
    for name, these in parts.items():
        if count := sum(layer.parameters for layer in these):
            frozen = " (frozen)" if not any(layer.trained for layer in these) else ""
            words.append(f"{name} {count_text(count)}{frozen}")
    total = sum(layer.multiply_adds for layer in found)
    return f"Parameters by layer: {', '.join(words)}. Multiply-adds for an image: {count_text(total)}."


def without_values(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """A copy of `model` on the meta device, but for parameters and buffers whose names are not `chosen`."""
    on_meta: dict[int, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if chosen(name):
            empty = torch.empty_like(tensor, device="meta")
            on_meta[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, on_meta)


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name; the stages in place of the module that holds them."""
    named = [info["module"] for info in getattr(model, "feature_info", None) or () if "module" in info]
    holders = {name.partition(".")[0] for name in named if "." in name}
    for name, module in model.named_children():
        if name in holders:
            yield from ((f"{name}.{inner}", part) for inner, part in module.named_children())
        else:
            yield name, module


def _shape(output: Any) -> tuple[int, ...] | None:
    while isinstance(output, list | tuple) and output:
        output = output[0]
    return tuple(output.shape[1:]) if isinstance(output, Tensor) else None


def _counts(module: nn.Module, seen: set[int]) -> tuple[int, int]:
    """The parameters of `module` that are not in `seen`, to which they are added, and how many of them are trained."""
    new = [parameter for parameter in module.parameters() if id(parameter) not in seen]
    seen.update(map(id, new))
    return sum(p.numel() for p in new), sum(p.numel() for p in new if p.requires_grad)
