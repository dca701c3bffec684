"""Triton kernels without a GPU: the launches of a call, recorded instead of run, and their compiled forms."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoo.kernels import checks, dispatch, triton_common
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
OPTIONS = ("num_warps", "num_stages", "maxnreg")
SAMPLE = 2  # images whose indices are drawn; all others repeat them


@dataclass(frozen=True)
class Launch:
    """A kernel with all that distinguishes it in Triton's cache; hashable, to find equal ones."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # argument -> "*fp16", "i32", "constexpr"
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return str(self.kernel.fn.__name__)

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return dict(self.options).get("num_warps", 4)


@dataclass(frozen=True)
class Call:
    """A launch with its grid and its arguments."""

    launch: Launch
    programs: int
    arguments: dict[str, Any] = field(repr=False)

    @property
    def min_bytes(self) -> int:
        """The bytes of the tensors that the kernel takes, each once."""
        tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        return sum(x.nbytes for x in tensors.values())


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its resources, Triton's own form of it, and its disassembly."""

    registers: int  # per thread
    stack: int  # bytes per thread, of spilled registers and arrays
    shared: int  # bytes per program
    ttir: str
    assembly: str


def record(function: Callable[[], object], gpu: Machine, *, traced: bool = False) -> list[Call]:
    """The launches of `function` on `gpu`; it is to use tensors of device "meta", or fake ones of device "cuda".

    They are those of eager mode or, if `traced`, those of a compiled program.
    """
    found: list[Call] = []

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        given = dict(arguments)
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
        launch = Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)
        found.append(Call(launch, grid[0], given))
        if kernel.fn.__name__ == "_inverse_kernel":
            _write_inverse(given["routes_ptr"], given["order_ptr"], given["starts_ptr"])

    with ExitStack() as stack:
        stack.enter_context(_replaced(triton_common, "launch", note))
        stack.enter_context(_replaced(triton_common, "_assumed", gpu))
        stack.enter_context(_replaced(triton_common, "is_traced", lambda kernel: traced))
        function()
    return found


def _write_inverse(routes: Tensor, order: Tensor, starts: Tensor) -> None:
    """What the kernel that inverts routes computes: the bounds of the loop of another one."""
    if routes.device.type == "cpu":
        named, places = routes.flatten(1).sort(dim=1, stable=True)
        order.copy_((places // routes.shape[2]).view_as(order))
        starts.copy_(torch.searchsorted(named, torch.arange(starts.shape[1]).expand(starts.shape).contiguous()))


def record_case(
    cases: ModuleType, case: Any, *, batch: int, dtype: torch.dtype, gpu: Machine, traced: bool = False
) -> dict[str, list[Call]]:
    """The launches of the "forward" and "backward" pass of a case of an operator, given its module `cases`.

    Floating-point tensors have no contents. Integer tensors, such as routes, have those of a few images, repeated.
    """
    args, kwargs = _contents_of_indices(cases, case, batch, dtype)
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    outputs = []
    with ExitStack() as stack:
        stack.enter_context(dispatch.implementation("triton"))
        stack.enter_context(_replaced(dispatch, "triton_obstacle", lambda tensor: None))
        # Tensors with and without contents are on two devices, "cpu" and "meta".
        stack.enter_context(_replaced(checks, "tensors", lambda needed, **optional: None))
        forward = record(lambda: outputs.append(cases.FUNCTION(*args, **kwargs)), gpu, traced=traced)
        (out,) = outputs
        backward = record(lambda: torch.autograd.grad(out, wanted, torch.empty_like(out)), gpu, traced=traced)
    return {"forward": forward, "backward": backward}


def _contents_of_indices(cases: ModuleType, case: Any, batch: int, dtype: torch.dtype) -> tuple[list, dict[str, Any]]:
    """The arguments of a case: floating-point tensors and masks on "meta", integer tensors with contents."""
    options = {"dtype": dtype, "device": "cpu", "requires_grad": True}
    with FakeTensorMode():
        args, kwargs = cases.inputs(case, batch=batch, **options)
    given = dict(enumerate(args)) | kwargs
    drawn: dict[Any, Any] = {}
    for key, x in given.items():
        if isinstance(x, Tensor) and (x.is_floating_point() or x.dtype == torch.bool):
            empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            given[key] = empty.requires_grad_(x.requires_grad)
        elif isinstance(x, Tensor):
            if not drawn:
                few_args, few_kwargs = cases.inputs(case, batch=min(batch, SAMPLE), **options)
                drawn = dict(enumerate(few_args)) | few_kwargs
            few = drawn[key]
            given[key] = few.repeat(-(-batch // len(few)), *[1] * (few.ndim - 1))[:batch]
    return [given.pop(number) for number in range(len(args))], given


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile a launch for a target of TARGETS."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(
        source, target=TARGETS[target][1], options=dict(launch.options) | {"enable_fp_fusion": True}
    )
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers, stack = (
            int(_found(rf"\.{name}:\s+(\d+)", assembly)) for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            registers, stack = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
            assembly = _tool("nvdisasm", "-c", file.name)
    return Compiled(registers, stack, compiled.metadata.shared, compiled.asm["ttir"], assembly)


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's output"
    return found[1]


def _tool(name: str, *arguments: str) -> str:
    """The output of a tool that Triton brings along."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
