"""Kernels without a GPU: the launches of an operator, and the resources of the compiled kernels."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoo.kernels import triton_common
from zoo.kernels.triton_common import Machine

TARGETS = {
    "sm_80": (triton_common.SM_80, GPUTarget("cuda", 80, 32)),
    "sm_90": (triton_common.SM_90, GPUTarget("cuda", 90, 32)),
    "sm_100": (triton_common.SM_100, GPUTarget("cuda", 100, 32)),
    "gfx942": (triton_common.GFX942, GPUTarget("hip", "gfx942", 64)),
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with all that distinguishes it in Triton's cache; hashable, to find equal launches."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # argument -> "*fp16", "i32", "constexpr"
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Report:
    """The resources that a compiled kernel uses."""

    registers: int  # per thread
    stack: int  # bytes per thread, of spilled registers and arrays
    shared: int  # bytes per program


def launches(function: Callable[[], object], gpu: Machine) -> list[Launch]:
    """The launches of `function` on `gpu`, recorded instead of run; it is to use fake tensors of device "cuda"."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        options = tuple((name, arguments.pop(name)) for name in OPTIONS if name in arguments)
        signature, constants, aligned = [], [], []
        for parameter in kernel.params:
            name, value = parameter.name, arguments.pop(parameter.name)
            specialized = not parameter.do_not_specialize
            if isinstance(value, Tensor):
                signature.append((name, TYPES[value.dtype]))
                aligned.append(name)
            elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
                signature.append((name, "constexpr"))
                constants.append((name, value))
            elif isinstance(value, int):
                signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
                aligned += [name] if value % 16 == 0 and specialized else []
            else:
                signature.append((name, "fp32"))
        assert not arguments, f"{kernel} has no arguments {sorted(arguments)}"
        found.append(Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options))

    with mock.patch.object(triton_common, "launch", note), mock.patch.object(triton_common, "_assumed", gpu):
        function()
    return found


@contextmanager
def fake_cuda() -> Iterator[None]:
    """A context in which tensors of device "cuda" have no contents and need no GPU."""
    with FakeTensorMode():
        yield


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile a launch for a target of TARGETS."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(
        source, target=TARGETS[target][1], options={**dict(launch.options), "enable_fp_fusion": True}
    )
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        used = ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in used)
    else:
        registers, stack = _resources(compiled.asm["cubin"])
    return Report(registers, stack, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
