"""What `zoo-bench kernels --static` counts: the instructions and resources of compiled kernels, and modelled times."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from zoo.kernels import cost_model, instructions, launches, trip_counts
from zoo.kernels.launches import Call, Compiled
from zoo.tools import benchmark_kernels

if TYPE_CHECKING:
    from rich.table import Table

# The cases of the counts in docs/operators.md and of tests/gpu/kernel_times.py: each kind of kernel, and the sizes at
# which it is limited differently.
CASES = {
    "window": (
        "56x56x64-block7x7-key_minus_query",
        "14x14x256-block7x7-key_minus_query",
        "7x7x512-block7x7-key_minus_query",
        "96x96x64-block12x12-key_minus_query",
        "14x14x256-block14x14",
        "56x56x32-block56x1-unbiased",
        "56x56x64-block1x56-unbiased-line_decay",
        "14x14x64-block2x2-unbiased",
    ),
    "neighborhood": ("56x56x64-7x7", "14x14x256-7x7", "96x96x192-11x11"),
    "linear": (
        "56x56x96-heads3-relu-min100-temperature",
        "56x56x64-heads1-softmax-rope",
        "56x56x64-heads1-offset-rope",
    ),
    "flow": ("56x56x96-heads12", "7x7x768-heads12"),
    "selective": (
        "56x56x64-state1",
        "14x14x320-state1",
        "1x197x384-state16-rows-rows_reversed-own-inputs",
    ),
    "gated": ("3136x48-heads3", "196x192-heads12", "196x96-heads3"),
    "routed": ("56x56x64-regions7-top1", "28x28x128-regions7-top4", "14x14x256-regions7-top16"),
}
# The GPU whose time is modelled, and what to compile for each GPU of the cost model.
GPUS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
COMPILED_FOR = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}
# Per processor: registers, bytes of shared memory of which a program takes 1 KiB besides its own, warps, programs.
ROOM = {"sm_80": (65536, 164 << 10, 64, 32), "sm_90": (65536, 228 << 10, 64, 32), "sm_100": (65536, 228 << 10, 64, 32)}
TENSOR_CORE = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "v_mfma")
ACCESS = re.compile(r"^(LDGSTS|LDG|STG)\.(?:.*\.)?(128|64|U16|S16|16|U8|S8)$|^(LDGSTS|LDG|STG)(?:\.|$)")
AMD_ACCESS = re.compile(r"^(global|buffer)_(load|store)_(\w+)$")
AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    programs: int
    num_warps: int
    registers: int  # per thread
    stack: int  # bytes of spilled registers and arrays per thread
    shared: int  # bytes per program
    programs_per_processor: int | None  # as many as fit; None for AMD
    size: int  # instructions in the program's text
    step: int  # instructions of a trip of the innermost loop with the most work, for one warp
    warp_instructions: int | None  # of the launch; None for AMD, whose jumps are not followed
    exact: bool  # whether all loops were recognised, and their trips are known
    tensor_core: dict[str, int]  # instruction -> how often it occurs in the text
    accesses: dict[str, dict[int, int]]  # LDG, STG, LDGSTS -> bits per thread -> how often they occur in the text
    issue_us: float | None  # to issue all instructions at the rate of cost_model.ISSUED; None for AMD
    shared_us: float | None  # for the wavefronts of shared memory and of the L1 cache
    memory_us: float  # to move the kernel's tensors once

    @property
    def modelled_us(self) -> float | None:
        """The longest of the three."""
        return None if self.issue_us is None else max(self.issue_us, self.shared_us, self.memory_us)


@dataclass(frozen=True)
class Pass:
    """The launches of a case, forward or backward."""

    operator: str
    case: str
    dtype: str
    target: str
    batch: int
    kind: str
    least_us: float  # to move every input and output of the pass once, at the GPU's bandwidth
    kernels: list[Kernel]

    @property
    def modelled_us(self) -> float | None:
        """The sum over the kernels."""
        times = [kernel.modelled_us for kernel in self.kernels]
        return None if None in times else sum(times)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        rows = [asdict(kernel) | {"modelled_us": kernel.modelled_us} for kernel in self.kernels]
        return asdict(self) | {"modelled_us": self.modelled_us, "kernels": rows}


def passes(name: str, case: str, *, batch: int, dtype: str, target: str) -> list[Pass]:
    """Compile the launches of a case, forward and backward, and count."""
    operator = benchmark_kernels.OPERATORS[name]
    cases = import_module(f"{operator.function.__module__.rpartition('.')[0]}.cases")
    machine, _ = launches.TARGETS[target]
    number = benchmark_kernels.DTYPES[dtype]
    recorded = launches.record_case(cases, (cases.CASES | cases.TARGETS)[case], batch=batch, dtype=number, gpu=machine)
    gpu = cost_model.GPUS[GPUS.get(target, "MI300X")]
    return [
        Pass(
            operator=name,
            case=case,
            dtype=dtype,
            target=target,
            batch=batch,
            kind=kind,
            least_us=benchmark_kernels.least_bytes(name, case, batch, dtype, kind) / gpu.bandwidth * 1e6,
            kernels=[kernel(call, target, gpu) for call in calls],
        )
        for kind, calls in recorded.items()
    ]


def neighborhood_forward(case: Any, batch: int, gpu: str) -> list[Kernel]:
    """Compile the forward kernels of a case of neighborhood attention in half precision for a GPU, and count."""
    from zoo.kernels.neighborhood_attention import cases

    target = COMPILED_FOR[gpu]
    machine, _ = launches.TARGETS[target]
    recorded = launches.record_case(cases, case, batch=batch, dtype=torch.float16, gpu=machine)
    return [kernel(call, target, cost_model.GPUS[gpu]) for call in recorded["forward"]]


def kernel(call: Call, target: str, gpu: cost_model.GPU) -> Kernel:
    """Compile a launch and count."""
    compiled = launches.compile_launch(call.launch, target)
    sizes = instructions.sizes(compiled.assembly)
    total, step, exact, issue, shared = None, sizes["step"], True, None, None
    if target in GPUS:
        counts = count(call, compiled)
        total, step, exact = counts.total, counts.step, counts.exact
        issue = cost_model.issue_time(total, gpu) * 1e6
        shared = cost_model.wavefront_time(sum(wavefronts(name) * n for name, n in counts.executed.items()), gpu) * 1e6
    texts = instructions.opcodes(compiled.assembly)
    return Kernel(
        name=call.launch.name,
        programs=call.programs,
        num_warps=call.launch.num_warps,
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        programs_per_processor=programs_per_processor(compiled, call.launch.num_warps, target),
        size=sizes["instructions"],
        step=step,
        warp_instructions=total,
        exact=exact,
        tensor_core=_tensor_core(texts),
        accesses=_accesses(texts),
        issue_us=issue,
        shared_us=shared,
        memory_us=call.min_bytes / gpu.bandwidth / cost_model.MOVED * 1e6,
    )


def count(call: Call, compiled: Compiled) -> instructions.Counts:
    """The instructions of a launch."""
    given = [call.arguments[name] for name, kind in call.launch.signature if kind != "constexpr"]
    branches = trip_counts.executions(compiled.ttir, call.programs, given)
    return instructions.count(compiled.assembly, branches, call.programs, call.launch.num_warps)


def programs_per_processor(compiled: Compiled, num_warps: int, target: str) -> int | None:
    """How many programs a processor holds at a time, by registers, shared memory and warps; None for AMD."""
    if target not in ROOM:
        return None
    registers, shared, warps, programs = ROOM[target]
    of_warp = ceil(compiled.registers * 32 / 256) * 256  # registers are given to warps in units of 256
    by_registers = registers // 4 // of_warp * 4 // num_warps  # a quarter of the registers belongs to each scheduler
    return min(by_registers, shared // (compiled.shared + 1024), warps // num_warps, programs)


def wavefronts(opcode: str) -> float:
    """Clocks that an instruction takes in the pipe of shared memory and the L1 cache, if its addresses suit.

    A gather of single numbers is taken for three, which fits the counters of an H100. Bank conflicts are left out.
    """
    name, *parts = opcode.split(".")
    if name in ("LDSM", "STSM"):
        return float(parts[-1]) if parts[-1] in ("2", "4") else 1.0
    if name in ("LDG", "LDGSTS", "STG", "LDS", "STS"):
        return 4.0 if "128" in parts else 2.0 if "64" in parts else 3.0 if "U16" in parts and name == "LDG" else 1.0
    return 1.0 if name in ("SHFL", "ATOM", "ATOMS", "RED") else 0.0


def _tensor_core(texts: Counter[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for opcode, number in texts.items():
        name = opcode.split(".")[0]
        if name.startswith(TENSOR_CORE):
            found[name] += number
    return dict(found)


def _accesses(texts: Counter[str]) -> dict[str, dict[int, int]]:
    """The bits that each thread loads or stores at once, for each kind of access to global memory."""
    found: dict[str, dict[int, int]] = {}
    for opcode, number in texts.items():
        if match := ACCESS.match(opcode):
            kind, bits = match[1] or match[3], int(re.sub(r"\D", "", match[2] or "32"))
        elif match := AMD_ACCESS.match(opcode):
            width = next((bits for word, bits in AMD_WIDTHS.items() if word in match[3]), 32)
            kind, bits = match[2], width
        else:
            continue
        widths = found.setdefault(kind, {})
        widths[bits] = widths.get(bits, 0) + number
    return {kind: dict(sorted(widths.items(), reverse=True)) for kind, widths in sorted(found.items())}


def title(result: Pass) -> str:
    """The heading of a table."""
    text = f"{result.operator}/{result.case}, {result.dtype}, {result.target}, {result.kind}"
    if result.modelled_us is None:
        return text
    share = result.least_us / result.modelled_us
    return f"{text}: {result.modelled_us:.1f} us modelled, roofline {result.least_us:.1f} us ({share:.0%})"


def table(result: Pass) -> Table:
    """A row for each kernel."""
    from rich.table import Table

    table = Table()
    modelled = result.modelled_us is not None
    times = ("issue us", "L1 us", "memory us", "modelled us") if modelled else ()
    columns = ("kernel", "programs", "step", "M instr", "registers", "a processor", "shared", "spilled", "tensor cores")
    for column in (*columns, "global memory", *times):
        table.add_column(column, justify="left" if column in ("kernel", "tensor cores", "global memory") else "right")
    for row in result.kernels:
        figures = (row.issue_us, row.shared_us, row.memory_us, row.modelled_us) if modelled else ()
        table.add_row(
            row.name,
            f"{row.programs:,}",
            str(row.step or ""),
            "" if row.warp_instructions is None else f"{'' if row.exact else '~'}{row.warp_instructions / 1e6:.2f}",
            str(row.registers),
            "" if row.programs_per_processor is None else str(row.programs_per_processor),
            f"{row.shared:,}",
            str(row.stack),
            ", ".join(f"{number} {name}" for name, number in row.tensor_core.items()),
            "; ".join(
                f"{kind} {', '.join(f'{bits} x {number}' for bits, number in widths.items())}"
                for kind, widths in row.accesses.items()
            ),
            *(f"{figure:.1f}" for figure in figures),
        )
    return table
