"""Code that the Triton implementations share: launches, properties of the GPU, and parts of kernels."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from zoo.kernels.constants import only_traced
from zoo.kernels.dispatch import interpreting

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies the bit patterns of bfloat16 numbers instead of their values.
INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@dataclass(frozen=True)
class Machine:
    """The properties of a GPU that the launch heuristics depend on."""

    name: str  # "sm_90", "gfx942"
    num_processors: int

    @property
    def is_amd(self) -> bool:
        """Whether it is an AMD GPU."""
        return self.name.startswith("gfx")

    @property
    def has_ptx(self) -> bool:
        """Whether kernels may contain PTX: on NVIDIA GPUs, not in the interpreter."""
        return not self.is_amd and not interpreting()


SM_80 = Machine("sm_80", 108)
SM_90 = Machine("sm_90", 132)
SM_100 = Machine("sm_100", 148)
GFX942 = Machine("gfx942", 304)

AUTOTUNE = os.environ.get("ZOO_AUTOTUNE", "0") == "1"

_assumed: Machine | None = None


def machine(tensor: Tensor) -> Machine:
    """The GPU of `tensor`; an H100 if there is none (export from fake tensors, the interpreter)."""
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
    """Run `kernel` over `grid`. Every launch of this package goes through this function, so that tests can record them.

    It runs on the device of the first tensor in `arguments`, on the stream that is current there; Triton itself would
    take the current device. In a program that is traced, the compiler sees to that; it takes no `maxnreg`, the limit of
    registers of a thread.

    With ZOO_AUTOTUNE=1 in the environment, Triton's autotuner replaces the warps and stages in `arguments`: it times
    all choices at the first launch with these sizes of map, heads and windows, whatever the batch, and keeps the result
    in Triton's cache on disk. It cannot time a launch that a CUDA graph captures; such a launch keeps the warps and
    stages in `arguments`, unless the sizes were tuned before.
    """
    traced = is_traced(kernel)
    if traced:
        arguments.pop("maxnreg", None)  # the tracer does not know this option
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" and not traced else nullcontext():
        if AUTOTUNE and not interpreting() and (traced or _may_tune(kernel, arguments)):
            kernel = _autotuned(kernel)
            options = ("num_warps", "num_stages", "maxnreg")
            arguments = {name: value for name, value in arguments.items() if name not in options}
        # Triton 3.10 no longer contracts a * b + c by default.
        wrap_triton(kernel)[grid](**arguments, enable_fp_fusion=True)


def is_traced(kernel: Any) -> bool:
    """Whether launches of `kernel` are traced now, as by torch.compile, rather than run."""
    return wrap_triton(kernel) is not kernel


# Arguments that depend on the batch: they do not change which number of warps and stages is best.
BATCH_SIZES = frozenset((
    "batch", "chunks", "first_head", "groups", "groups_per_program", "parts", "per_program", "tiles",
    "tiles_per_program", "windows", "windows_per_program",
))  # fmt: skip


@cache
def _autotuned(kernel: Any) -> Any:
    # Repeated runs are safe: a kernel writes only its outputs, and all of them.
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (1, 2, 4, 8) for stages in (1, 2, 3)]
    return triton.autotune(configs, key=_sizes(kernel), cache_results=True)(kernel)


def _sizes(kernel: Any) -> list[str]:
    """The arguments of `kernel` that its choice of warps and stages may depend on, apart from the dtypes of tensors."""
    names: list[str] = kernel.arg_names
    return [name for name in names if not name.endswith("_ptr") and name != "scale" and name not in BATCH_SIZES]


_tuned: set[tuple[Any, ...]] = set()


def _may_tune(kernel: Any, arguments: dict[str, Any]) -> bool:
    """Whether the autotuner has timed `kernel` with the sizes in `arguments`, or may do so now."""
    dtypes = (getattr(arguments[name], "dtype", None) for name in kernel.arg_names)
    key = (kernel, *(arguments[name] for name in _sizes(kernel)), *dtypes)
    if key not in _tuned and torch.cuda.is_current_stream_capturing():
        return False
    _tuned.add(key)
    return True


def precision(dtype: torch.dtype, gpu: Machine, *, memory_bound: bool = False) -> str:
    """The precision of products of float32 tiles: "ieee", "tf32" or "tf32x3"; AMD only has "ieee".

    It is "ieee" unless the user allows TF32 in matrix products, in whichever way: torch.set_float32_matmul_precision
    with "high" or "medium", which are the same to cuBLAS and to us, torch.backends.cuda.matmul.allow_tf32, or the
    fp32_precision of torch.backends.cuda.matmul or torch.backends. Then it is "tf32", or "tf32x3" for a kernel that is
    `memory_bound`: three products of TF32 are nearly as exact as one of float32, and take no longer than one of TF32
    where a kernel waits for memory.
    """
    if dtype != torch.float32 or gpu.is_amd or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32x3" if memory_bound else "tf32"


def aligned(x: Tensor) -> Tensor:
    """`x`, a map (B, H, W, channels), or a contiguous copy if only its address keeps it from loads of 16 bytes.

    Triton compiles narrow loads, without a pipeline, for an address that is not a multiple of 16, as of a slice of
    channels; they take longer than the copy. A program that is traced has no addresses yet.
    """
    if only_traced(x) or x.data_ptr() % 16 == 0 or x.stride(2) * x.element_size() % 16 != 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def log2(x, PTX: tl.constexpr):
    """log2 of float32 numbers that are not subnormal, by one instruction where the kernel may contain PTX."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


def evenly_spaced(x: Tensor) -> Tensor:
    """`x`, a map (B, H, W, channels), if its tokens are evenly spaced and aligned, as in slices; else a copy."""
    _, height, width, _ = x.shape
    step = x.stride(2)
    even = x.stride() == (height * width * step, width * step, step, 1)
    return aligned(x) if even else x.contiguous()


@triton.jit
def load_rows(ptr, offset, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """(rows, BLOCK_D): HEAD_DIM elements from each `offset`, then OTHER; OTHER for rows that are not `valid`."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None] if HEAD_DIM == BLOCK_D else valid[:, None] & (channel < HEAD_DIM)
    return tl.load(ptr + offset[:, None] + channel, mask=mask, other=OTHER)


@triton.jit
def store_rows(ptr, offset, value, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of `ptr`."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None] if HEAD_DIM == BLOCK_D else valid[:, None] & (channel < HEAD_DIM)
    tl.store(ptr + offset[:, None] + channel, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(scores, v, highest, total, acc, PRECISION: tl.constexpr, UNIT: tl.constexpr = 1.0):
    """One step of the online softmax over tiles of keys, with scores (queries, keys) that are -inf if hidden.

    The scores times UNIT are in base 2: UNIT is 1, or LOG2E for natural scores. `highest`, `total` and `acc` are the
    largest base-2 score, the sum of the weights and the weighted sum of the values so far; they start at -inf, 0 and 0.
    A query may have no key in the steps so far.
    """
    new = tl.maximum(highest, tl.max(scores, 1) * UNIT)
    shift = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(highest - shift)
    weights = tl.exp2(scores * UNIT - shift[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, PRECISION)
    return new, total, acc


@triton.jit
def softmax_end(highest, total):
    """The divisor of `acc`, and log2 of the sum of exponentials, after the last `softmax_step`.

    For a query without keys, the latter is inf, so that its weights are 0 in the backward pass too.
    """
    divisor = tl.where(total == 0.0, 1.0, total)
    return divisor, tl.where(total == 0.0, float("inf"), highest + tl.log2(divisor))
