"""What the Triton implementations share: how they launch, on what machine, and their dot product."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from zoo.kernels.dispatch import interpreting

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies the bits of bfloat16 numbers, not their values.
INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@dataclass(frozen=True)
class Machine:
    """What the launch heuristics know of a GPU."""

    name: str  # "sm_90", "gfx942"
    num_processors: int

    @property
    def is_amd(self) -> bool:
        """Whether it is an AMD GPU."""
        return self.name.startswith("gfx")


SM_80 = Machine("sm_80", 108)
SM_90 = Machine("sm_90", 132)
SM_100 = Machine("sm_100", 148)
GFX942 = Machine("gfx942", 304)

AUTOTUNE = os.environ.get("ZOO_AUTOTUNE", "0") == "1"

_assumed: Machine | None = None


def machine(tensor: Tensor) -> Machine:
    """The GPU that `tensor` is on; an H100 where there is none (export from fake tensors, the interpreter)."""
    if _assumed is not None:
        return _assumed
    if tensor.device.type != "cuda" or not torch.cuda.is_available():
        return SM_90
    return _machine(tensor.device.index or 0)


@cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Machine(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Machine(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel` over `grid`; every launch of this package goes through here, so that tests can look at them.

    With ZOO_AUTOTUNE=1 in the environment, warps and stages are not those of the heuristics in `arguments` but the
    fastest of all, timed at the first launch with such sizes and kept in Triton's cache on disk.
    """
    if AUTOTUNE and not interpreting():
        kernel, options = _autotuned(kernel), ("num_warps", "num_stages")
        arguments = {name: value for name, value in arguments.items() if name not in options}
    wrap_triton(kernel)[grid](**arguments)


@cache
def _autotuned(kernel: Any) -> Any:
    # Kernels may be run as often as one likes: they write all of their outputs and nothing else.
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2, 3)]
    sizes = [name for name in kernel.arg_names if not name.endswith("_ptr") and name != "scale"]
    return triton.autotune(configs, key=sizes, cache_results=True)(kernel)


def precision(dtype: torch.dtype, gpu: Machine) -> str:
    """How float32 tiles are multiplied: as torch.set_float32_matmul_precision has it; AMD knows only "ieee"."""
    if dtype != torch.float32 or gpu.is_amd or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, added up in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)
