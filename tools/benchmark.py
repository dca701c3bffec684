"""zoo-bench: how fast the models and operators are, and what neighborhood attention costs at least."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from zoo import FAMILIES, manifest
from zoo.messages import OptionError, UserError, did_you_mean, size_text, unknown_model
from zoo.tools import cli

if TYPE_CHECKING:
    from rich.console import Console

    from zoo.tools.benchmark_kernels import Result, Row
    from zoo.tools.benchmark_models import Contender, Product, Results
    from zoo.tools.benchmark_models import Row as ModelRow

# The first words of the folders' names, found without importing zoo.kernels, which imports torch.
_FOLDERS = find_spec("zoo.kernels").submodule_search_locations
OPERATORS = tuple(sorted(folder.name.partition("_")[0] for folder in iter_modules(_FOLDERS) if folder.ispkg))
DTYPES = ("fp32", "bf16", "fp16")
AUTOCAST = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MODELS = tuple(name for family in FAMILIES for name in manifest.examples(family))
PATHS = ("reference", "torch", "triton")
AGAINST = "swin_tiny_patch4_window7_224"

MODEL_PASSES = f"""\
Time inference and the training step of whole models, in units of a common model, next to timm's models of the families.

Inference is a forward pass in eval mode without gradients. A training step is a forward pass in train mode, cross
entropy and a backward pass. It has no optimizer, whose time depends on the number of parameters alone. Weights and
images are random. Each model runs in every dtype of --dtype by autocast, with --cast also cast to it, and with
--compile each of these also compiled. Every contender first runs once, and its results have to be finite. One that
fails is named with the reason. The others run in turns in one process, and each time is divided by that of
{AGAINST} (or --against, in the first dtype, not compiled) in the same turn, so that other load on
the machine affects both alike. So are times by those of timm's model in the same mode, of the same model in float32,
and of the same model without compilation. Figures are medians; the middle 80 % of the turns are in brackets.

"of matmul" compares operations per second with those of a matrix product in the same dtype and the same turn: a linear
layer of 1024 features (4096 on a GPU), as nn.Linear or as a 1x1 convolution, whichever is faster. A model's operations
are its matrix products and convolutions, as zoo-models counts them; a training step counts as three forward passes.
Memory is the most that a call allocates besides weights and images. The time to compile is that of the first call,
without a cache."""
MODEL_EXAMPLES = """\
examples:
  zoo-bench models --threads 2                              one or two of each family, about ten minutes
  zoo-bench models --dtype float32 bfloat16 --compile       all modes, two hours on two cores
  zoo-bench models --compile gc_vit_tiny,maxvit_tiny        all models, two of them and timm's of these also compiled
  zoo-bench models dinat_tiny resnet50 --no-training        models of zoo and timm by name
  zoo-bench models van_b0 --batch-size 1 --dtype bfloat16   the latency of one image
  zoo-bench models cswin_tiny --kernels reference,torch     the implementations of zoo's operators compared
  zoo-bench models --device cuda --dtype float16 --compile --json all.json --picture all.png"""

KERNELS = """\
Time the operators of zoo.kernels against other ways to compute the same results.

For each case, the output and the gradients of every contender are first compared with the formula in float64. A
contender that fails or is wrong is named, but not timed. The others run in turns, so that other load on the machine
affects all alike. "x ours" is a contender's time in units of that of zoo in the same turn: above 1, it is slower than
zoo. Figures are medians, with the middle 80 % of the runs in brackets. Memory is the most that a call allocates beyond
its inputs.

With --static, nothing runs and no GPU is needed: the Triton kernels of each case are compiled for a GPU, and their
instructions counted in the disassembly. A step is one trip of the innermost loop with the most work; "M instr" is what
all warps of the launch execute, in millions. Times are modelled, not measured: the longest of the time to issue the
instructions, at 65 % of the peak, the time of shared memory and L1 cache, at 70 %, and the time to move the kernel's
tensors once, at 90 %. Waiting is not modelled. LDG, LDGSTS and STG are accesses to global memory, as the bits of a
thread x how often they stand in the kernel."""
KERNELS_EXAMPLES = """\
examples:
  zoo-bench kernels                                      the target cases on the CPU, about two minutes
  zoo-bench kernels --cases '56x56x64-7x7*' --backward   cases by name
  zoo-bench kernels --operators depthwise --dtype bf16   all cases of an operator
  zoo-bench kernels --device cuda --all --dtype fp16 bf16 --json all.json --picture all.png
  zoo-bench kernels --static --target sm_90 gfx942       the instructions of compiled kernels, two minutes
  zoo-bench kernels --static --cases 56x56x64-7x7        those of one case"""

SIMULATE = """\
Count what neighborhood attention costs on a GPU, without running it: the tiles of keys and values that the tiles of
queries visit, which bound the speed-up over full attention; the bytes and operations; and the shortest possible time on
GPUs by name. Softmax and kernel launches are not counted: times are lower bounds, and nothing is measured.

--static also compiles zoo's forward kernel for these GPUs and counts its instructions, as `zoo-bench kernels --static`
does. Most of our kernels are limited by the rate of instructions, so its time is far above the lower bounds."""
SIMULATE_EXAMPLES = """\
examples:
  zoo-bench simulate --size 56x56 --kernel 7
  zoo-bench simulate --size 56x56 --kernel 7 --heads 2 --batch 128 --gpu H100 --static
  zoo-bench simulate --size 56x56 --kernel 7 --dilation 8 --heads 2 --batch 128 --gpu H100 MI300X
  zoo-bench simulate --size 256x256 --kernel 80x80 --stride 16 --heads 24 --head-dim 128"""

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Rows x columns of the queries of a program, and of the keys of one of its steps.
TILES = (((8, 8), (4, 16)), ((8, 8), (8, 8)), ((8, 8), (2, 32)), ((4, 16), (4, 16)), ((16, 16), (8, 16)))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run the subcommand."""
    options = parser().parse_args(arguments)
    options.command_line = shlex.join(["zoo-bench", *(sys.argv[1:] if arguments is None else arguments)])
    with cli.friendly_errors(f"zoo-bench {options.command}"):
        options.run(options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="zoo-bench", description=f"Measure and predict {__doc__.partition(': ')[2]}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=cli.Parser)

    def command(name: str, description: str, epilog: str, run: Callable[..., None]) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=description.partition(":")[0].partition(".\n")[0].replace("\n", " "),
            description=description,
            epilog=epilog,
        )
        added.set_defaults(run=run)
        return added

    add = command("kernels", KERNELS, KERNELS_EXAMPLES, _kernels).add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (cpu)")
    add(
        "--operators",
        nargs="+",
        choices=OPERATORS,
        metavar="NAME",
        help=f"all cases of these operators: {', '.join(OPERATORS)}",
    )
    add("--cases", metavar="GLOB", help="cases whose name, or operator/name, matches ('target-*')")
    add("--all", action="store_true", help="all cases of all operators, like --cases '*'")
    add("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out, such as flex")
    add("--batch", type=cli.count, metavar="N", help="number of images (4; on a GPU 128)")
    add("--dtype", nargs="+", choices=DTYPES, metavar="TYPE", help=f"{', '.join(DTYPES)} (fp32; on a GPU fp16)")
    add(
        "--backward",
        action=argparse.BooleanOptionalAction,
        help="also time the backward pass, alone and with the forward pass (off, except for the target cases)",
    )
    add("--threads", type=cli.count, metavar="N", help="number of threads of PyTorch on the CPU (PyTorch's default)")
    add("--seconds", type=_positive, default=5.0, metavar="S", help="how long to time for each table (5)")
    add("--bandwidth", type=_positive, metavar="GB/s", help="memory bandwidth, for the roofline (known for some GPUs)")
    add(
        "--peak",
        type=_positive,
        metavar="TFLOP/s",
        help="peak rate of the processor, for the roofline (known for some GPUs)",
    )
    add("--static", action="store_true", help="count the instructions of compiled Triton kernels instead")
    add(
        "--target",
        nargs="+",
        choices=TARGETS,
        metavar="NAME",
        help=f"what to compile for with --static: {', '.join(TARGETS)} (sm_90)",
    )
    add("--json", type=Path, metavar="FILE", help="write all measurements as JSON, after each table")
    add("--picture", type=Path, metavar="FILE", help="draw times in units of zoo's, as .png, .svg or .pdf")

    add = command("models", MODEL_PASSES, MODEL_EXAMPLES, _models).add_argument
    add(
        "models",
        nargs="*",
        type=_without_tag,
        metavar="MODEL",
        help=f"names of models that timm knows, including those of zoo ({', '.join(MODELS)})",
    )
    add(
        "--against",
        type=_without_tag,
        default=AGAINST,
        metavar="MODEL",
        help="the model whose time is the unit (%(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (cpu)")
    add("--batch-size", type=cli.count, metavar="N", help="number of images (4; on a GPU 128)")
    add(
        "--size",
        type=_pair,
        default=(224, 224),
        metavar="HxW",
        help="size of the images, or one number for both sides (224)",
    )
    add(
        "--dtype",
        nargs="+",
        type=lambda text: AUTOCAST.get(text, text),
        choices=tuple(AUTOCAST.values()),
        default=["float32"],
        metavar="TYPE",
        help=f"dtypes of autocast, {', '.join(AUTOCAST.values())}; float32 for none (float32)",
    )
    add(
        "--cast",
        action="store_true",
        help="also run every model with weights and images cast to the dtypes other than float32, without autocast",
    )
    add("--threads", type=cli.count, metavar="N", help="number of threads of PyTorch on the CPU (PyTorch's default)")
    for what, name in (("--inference", "inference"), ("--training", "the training step")):
        add(what, action=argparse.BooleanOptionalAction, default=True, help=f"time {name} (on)")
    add(
        "--compile",
        nargs="?",
        type=lambda text: text.split(","),
        default=(),
        const=[],
        metavar="MODEL,...",
        help="also run every model, or only these, compiled; on a CPU, a minute per model, dtype and kind of pass",
    )
    add(
        "--kernels",
        type=lambda text: text.split(","),
        default=[],
        metavar="PATH,...",
        help=f"run zoo's models with each of these implementations of its operators: {', '.join(PATHS)}",
    )
    add("--seconds", type=_positive, default=60.0, metavar="S", help="how long to time each kind of pass (60)")
    add(
        "--rounds",
        type=cli.count,
        default=10,
        metavar="N",
        help="smallest number of turns, however long they take (10)",
    )
    add("--json", type=Path, metavar="FILE", help="write all measurements as JSON, after each kind of pass")
    add("--picture", type=Path, metavar="FILE", help="draw speed against published accuracy, as .png, .svg or .pdf")

    add = command("simulate", SIMULATE, SIMULATE_EXAMPLES, _simulate).add_argument
    add("--size", type=_pair, required=True, metavar="HxW", help="size of the map, such as 56x56")
    add("--kernel", type=_pair, required=True, metavar="K", help="kernel size: 7, or 7x5 for rows x columns")
    add("--dilation", type=_pair, default=(1, 1), metavar="D", help="dilation, in the same form (1)")
    add("--stride", type=_pair, default=(1, 1), metavar="S", help="stride, in the same form (1)")
    add("--causal", action="store_true", help="tokens attend only to positions up to their own, along both axes")
    add("--heads", type=cli.count, default=1, metavar="N", help="number of heads (1)")
    add("--head-dim", type=cli.count, default=32, metavar="D", help="channels of a head (32)")
    add("--batch", type=cli.count, default=1, metavar="N", help="number of images (1)")
    add("--gpu", nargs="+", metavar="NAME", help="names of GPUs (all that are known)")
    add("--static", action="store_true", help="also model the time of zoo's kernel, compiled for these GPUs")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def _without_tag(text: str) -> str:
    """The name without its tag, since the weights are random."""
    return text.partition(".")[0]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number above 0")
    return number


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sizes = tuple(int(part or found[1]) for part in found.groups()) if found else (0, 0)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give rows x columns such as 56x40, or one number for both")
    return sizes


def _kernels(options: argparse.Namespace) -> None:
    if options.static:
        _static(options)
        return
    if options.target:
        raise OptionError("got --target without --static: add it.")
    _prepare(options)
    from zoo.tools import benchmark_kernels, benchmark_timing

    chosen = _chosen_cases(options, {name: list(op.cases) for name, op in benchmark_kernels.OPERATORS.items()})
    _check_contenders(options, benchmark_kernels.OPERATORS)

    on_gpu = options.device == "cuda"
    batch = options.batch or (128 if on_gpu else 4)
    dtypes = options.dtype or (["fp16"] if on_gpu else ["fp32"])
    backward = options.backward if options.backward is not None else _only_targets(options)
    machine = benchmark_timing.machine(options.device)
    peaks = _peaks(options, machine["gpu"])
    console = cli.console()
    where = _where(machine)
    console.print(f"{where}; torch {machine['torch']}, triton {machine['triton']}; batch {batch}")

    tables = [
        (name, case, dtype, b) for name, case in chosen for dtype in dtypes for b in (False, True)[: 1 + backward]
    ]
    results: list[Result] = []
    absent: dict[tuple[str, str], int] = {}
    try:
        for number, (name, case, dtype, with_backward) in enumerate(tables, 1):
            kind = "backward" if with_backward else "forward"
            label = f"[{number}/{len(tables)}] {_label(name, case, dtype, kind)}"
            with cli.progress(label, log=True) as say:
                found = benchmark_kernels.measure(
                    name,
                    case,
                    batch=batch,
                    dtype=dtype,
                    device=options.device,
                    backward=with_backward,
                    seconds=options.seconds,
                    leave_out=tuple(options.without),
                    say=say,
                )
            results += found
            for row in found[0].rows:
                if row.status == "not run":
                    absent[row.name, row.reason] = absent.get((row.name, row.reason), 0) + 1
            for result in found:
                _print_result(console, result, peaks, on_gpu)
            if options.json:
                _write_json(options.json, {"machine": machine, "results": [_as_json(r, peaks) for r in results]})
    finally:
        if options.picture and any(row.ratios for result in results for row in result.rows):
            _draw(options.picture, results, where)
    for (contender, reason), count in absent.items():
        console.print(f"[dim]not run: {contender}: {reason} ({count} of {len(tables)} tables)[/]")
    for path in filter(None, (options.json, options.picture)):
        console.print(f"written: {path}")
    _judge(options, results)


def _static(options: argparse.Namespace) -> None:
    """Count the instructions of compiled kernels."""
    usual = vars(parser().parse_args(["kernels"]))
    for name in ("device", "without", "backward", "threads", "seconds", "bandwidth", "peak", "picture"):
        if getattr(options, name) != usual[name]:
            raise OptionError(f"got --{name} with --static, which measures nothing: leave it out.")
    _check_compiler()
    import torch
    import triton

    from zoo.tools import benchmark_kernels, benchmark_static

    known = {name: list(op.cases) for name, op in benchmark_kernels.OPERATORS.items()}
    if _only_targets(options):
        chosen = [(name, case) for name, cases in benchmark_static.CASES.items() for case in cases]
    else:
        chosen = _chosen_cases(options, known)
    without = [name for name in dict.fromkeys(name for name, _ in chosen) if name not in benchmark_static.CASES]
    chosen = [(name, case) for name, case in chosen if name not in without]
    if not chosen:
        raise OptionError(f"got only cases of {', '.join(without)}, which has no Triton kernels: choose others.")
    batch = options.batch or 128
    tables = [
        (target, name, case, dtype)
        for target in dict.fromkeys(options.target or ["sm_90"])
        for name, case in chosen
        for dtype in options.dtype or ["fp16"]
    ]
    console = cli.console()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    console.print(f"compiled by triton {versions['triton']} (torch {versions['torch']}); batch {batch}; nothing is run")
    results: list[benchmark_static.Pass] = []
    for number, (target, name, case, dtype) in enumerate(tables, 1):
        with cli.progress(f"[{number}/{len(tables)}] {target}, {name}/{case}, {dtype}", log=True):
            found = benchmark_static.passes(name, case, batch=batch, dtype=dtype, target=target)
        results += found
        for result in found:
            console.print(benchmark_static.title(result), style="bold")
            console.print(benchmark_static.table(result))
        if options.json:
            _write_json(options.json, {"versions": versions, "passes": [result.as_json() for result in results]})
    if not all(kernel.exact for result in results for kernel in result.kernels):
        console.print("~: some loops were not recognised or depend on the inputs, and are counted once.", style="dim")
    if without:
        console.print(f"[dim]left out: {', '.join(without)}, which has no Triton kernels[/]")
    if options.json:
        console.print(f"written: {options.json}")


def _check_compiler() -> None:
    if find_spec("triton") is None:
        raise UserError("got --static, but triton, which compiles the kernels, is not installed: install it.")
    from zoo.kernels import dispatch

    if dispatch.interpreting():
        raise UserError("got --static with TRITON_INTERPRET set, so that Triton compiles nothing: unset it.")


def _prepare(options: argparse.Namespace) -> None:
    """Check the options that `kernels` and `models` share, and set up PyTorch accordingly."""
    _check_file(options.picture, (".png", ".svg", ".pdf"), options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints to stderr
    # By default oneDNN keeps 1024 compiled layers. With more models than that in turns, it compiles them at every call,
    # which took up to 1.7 times as long as the calls.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got --device cuda, but PyTorch finds no GPU: use --device cpu.")
    if options.threads:
        torch.set_num_threads(options.threads)
    # float32 without TF32, for the other contenders, too
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _where(machine: dict[str, Any]) -> str:
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def _check_file(path: Path | None, endings: tuple[str, ...], options: argparse.Namespace) -> None:
    if path is not None and path.suffix not in endings:
        raise OptionError(f"got --picture {path}: its name has to end in {', '.join(endings)}.")


def _only_targets(options: argparse.Namespace) -> bool:
    return not (options.all or options.cases or options.operators)


def _chosen_cases(options: argparse.Namespace, known: dict[str, list[str]]) -> list[tuple[str, str]]:
    if options.cases and options.all:
        raise OptionError("got --cases and --all: give one of them.")
    operators = options.operators or OPERATORS
    pairs = [(name, case) for name in dict.fromkeys(operators) for case in known[name]]
    pattern = options.cases or ("target-*" if _only_targets(options) else "*")
    chosen = [(name, case) for name, case in pairs if fnmatch(case, pattern) or fnmatch(f"{name}/{case}", pattern)]
    if not chosen:
        names = list(dict.fromkeys(f"{name}/{case}" if "/" in pattern else case for name, case in pairs))
        known = f"there are {', '.join(names[:4])} and others."
        hint = did_you_mean(pattern.strip("*"), names, count=3, cutoff=0.3) or known
        where = f" of {', '.join(options.operators)}" if options.operators else ""
        raise OptionError(f"got --cases {pattern!r}, which matches no case{where}: {hint}")
    return chosen


def _check_contenders(options: argparse.Namespace, operators: dict[str, Any]) -> None:
    names = list(dict.fromkeys(c.name for operator in operators.values() for c in operator.contenders))
    # flex stands for both of its forms
    options.without = [n for n in names for given in options.without if n == given or n.startswith(f"{given},")] + [
        given for given in options.without if not any(n == given or n.startswith(f"{given},") for n in names)
    ]
    for name in options.without:
        if name not in names:
            raise OptionError(f"got --without {name!r}: there are {', '.join(repr(n) for n in names)}.")


def _peaks(options: argparse.Namespace, gpu: str | None) -> tuple[float, float] | None:
    """The peak bandwidth and rate in bytes and operations per second, as given or as known for the GPU."""
    from zoo.kernels.cost_model import GPUS

    # "NVIDIA H100 80GB HBM3" is an H100
    known = next((spec for name, spec in GPUS.items() if name in (gpu or "").replace("-", " ").split()), None)
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else known and known.bandwidth
    flops = options.peak * 1e12 if options.peak else known and known.flops
    return (bandwidth, flops) if bandwidth and flops else None


def _label(operator: str, case: str, dtype: str, kind: str) -> str:
    return f"{operator}/{case}, {dtype}, {kind}"


def _least_time(result: Result, peaks: tuple[float, float] | None) -> float | None:
    return max(result.min_bytes / peaks[0], result.flops / peaks[1]) if peaks else None


def _print_result(console: Console, result: Result, peaks: tuple[float, float] | None, on_gpu: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from zoo.tools.benchmark_timing import digits, spread

    title = _label(result.operator, result.case, result.dtype, result.kind)
    work = f"at least {result.min_bytes / 2**20:.1f} MiB moved, {result.flops / 1e9:.3g} GFLOP wanted"
    table = Table()
    rate, unit = (1e12, "TFLOP/s") if on_gpu else (1e9, "GFLOP/s")
    least = _least_time(result, peaks)
    for column in ("", "ms", "x ours", "peak MiB", "GB/s", unit, "error", *(["of roofline"] if least else [])):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    timed = sorted((row for row in result.rows if row.times), key=lambda row: spread(row.times)[0])
    for row in timed:
        median, low, high = spread(row.times)
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*spread(row.ratios)) if row.ratios else ""
        cells = [
            f"{row.name}{' (ours)' if row.name == result.ours else ''}",
            f"{digits(median * 1e3)} ({digits(low * 1e3)}-{digits(high * 1e3)})",
            ratio,
            f"{row.peak_bytes / 2**20:.1f}",
            f"{result.min_bytes / median / 1e9:.3g}",
            f"{result.flops / median / rate:.3g}",
            f"{row.error:.0e}",
            *([f"{least / median:.0%}"] if least else []),
        ]
        table.add_row(*cells, style="bold" if row.name == result.ours else None)
    console.print(f"{title}: {work}", style="bold")
    console.print(table)
    for row in result.rows:
        if row.status in ("wrong", "failed"):
            console.print(Text(f"not timed: {row.name} {row.status}: {row.reason}", style="red"))
    console.print()


def _as_json(result: Result, peaks: tuple[float, float] | None) -> dict[str, Any]:
    from zoo.tools.benchmark_timing import spread

    least = _least_time(result, peaks)

    def row_as_json(row: Row) -> dict[str, Any]:
        error = row.error if row.error is not None and math.isfinite(row.error) else None
        entry: dict[str, Any] = {"name": row.name, "status": row.status, "reason": row.reason, "error": error}
        if row.times:
            median = spread(row.times)[0]
            entry |= row.figures()
            entry |= {
                "bytes_per_s": result.min_bytes / median,
                "flops_per_s": result.flops / median,
                "roofline_fraction": least and least / median,
            }
        return entry

    return {
        "operator": result.operator,
        "case": result.case,
        "dtype": result.dtype,
        "pass": result.kind,
        "batch": result.batch,
        "min_bytes": result.min_bytes,
        "flops": result.flops,
        "ours": result.ours,
        "contenders": [row_as_json(row) for row in result.rows],
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _judge(options: argparse.Namespace, results: list[Result]) -> None:
    """Raise an error if nothing was timed, or if an implementation of zoo is wrong."""
    if not any(row.times for result in results for row in result.rows):
        raise UserError("nothing could be timed; the reasons are above.")
    for result in results:
        for row in result.rows:
            if row.name in ("triton", "torch", "reference") and row.status in ("wrong", "failed"):
                label = _label(result.operator, result.case, result.dtype, result.kind)
                raise UserError(f"zoo's {row.name} {row.status} in {label}: {row.reason}.")


def _draw(path: Path, results: list[Result], where: str) -> None:
    """Draw times in units of zoo's as bars, a group per table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from zoo.tools.benchmark_timing import digits, spread

    groups = [(result, [row for row in result.rows if row.ratios]) for result in results]
    groups = [(result, sorted(rows, key=lambda r: spread(r.ratios)[0])) for result, rows in groups if rows]
    names = list(dict.fromkeys(row.name for result in results for row in result.rows))
    colors = {name: plt.get_cmap("tab20").colors[i % 20] for i, name in enumerate(names)}
    height = sum(len(rows) + 1.5 for _, rows in groups)
    figure, axes = plt.subplots(figsize=(11, max(2.5, 0.24 * height + 1.2)), layout="constrained")
    top = max(spread(row.ratios)[0] for _, rows in groups for row in rows)
    bottom = min(min(spread(row.ratios)[0] for _, rows in groups for row in rows), 1.0) / 1.5
    limit = 3 * top  # longer lines are cut, so that their labels stay in the picture
    y = 0.0
    for result, rows in groups:
        label = _label(result.operator, result.case, result.dtype, result.kind)
        axes.text(bottom, y - 0.1, f" {label}, batch {result.batch}", va="center", fontsize=9, weight="bold")
        for row in rows:
            y += 1
            median, low, high = (min(max(ratio, bottom), limit) for ratio in spread(row.ratios))
            axes.barh(y, median - bottom, left=bottom, height=0.85, color=colors[row.name])
            if row.name != result.ours:
                axes.plot([low, high], [y, y], color="black", linewidth=1)
            ours = " (ours)" if row.name == result.ours else ""
            text = f"  {row.name}{ours}: {median:.2f}x, {digits(spread(row.times)[0] * 1e3)} ms"
            axes.text(high, y, text, va="center", fontsize=8)
        y += 1.5
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(bottom, 4 * limit)
    axes.set_ylim(y - 0.8, -0.8)
    axes.set_yticks([])
    axes.set_xlabel("time as a multiple of ours (median; line: where eight of ten runs lie)")
    ticks = [base * 10**power for power in range(-2, 4) for base in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if bottom <= tick <= 4 * limit])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(where, fontsize=10)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _models(options: argparse.Namespace) -> None:
    for path in options.kernels:
        if path not in PATHS:
            raise OptionError(f"got --kernels with {path!r}: it takes {', '.join(PATHS)}, separated by commas.")
    options.dtype = list(dict.fromkeys(options.dtype))
    if options.cast and options.dtype == ["float32"]:
        raise OptionError("got --cast, but only float32, which nothing is cast to: add --dtype bfloat16 or float16.")
    if not (options.inference or options.training):
        raise OptionError("got --no-inference and --no-training, which leaves nothing to time: leave one of them out.")
    if options.picture and not options.inference:
        raise OptionError("got --picture and --no-inference, but it shows that of inference: leave one of them out.")
    _prepare(options)
    from zoo.tools import benchmark_models, benchmark_timing

    names = options.models or list(MODELS)
    if options.compile == []:  # without names
        options.compile = names
    _check_models(options, names)
    batch = options.batch_size or (128 if options.device == "cuda" else 4)
    machine = benchmark_timing.machine(options.device)
    where = _where(machine)
    setting = f"batch {batch}, {size_text(options.size)}, {' and '.join(options.dtype)}"
    console = cli.console()
    console.print(f"{where}; torch {machine['torch']}, timm {machine['timm']}; {setting}")

    with ExitStack() as stack:
        with cli.progress("creating the models", log=True):
            contenders = benchmark_models.contenders(
                names,
                options.against,
                size=options.size,
                device=options.device,
                dtypes=tuple(options.dtype),
                cast=options.cast,
                compiled=options.compile,
                choices=tuple(options.kernels),
            )
            products = tuple(benchmark_models.product(dtype, options.device) for dtype in options.dtype)
        if options.compile:
            stack.enter_context(benchmark_models.fresh_compiler(options.device, 4 * len(contenders)))
        keys = ("against", "size", "dtype", "cast", "compile", "seconds", "rounds")
        content = {
            "command": options.command_line,
            "machine": machine,
            "settings": {key: getattr(options, key) for key in keys} | {"batch_size": batch},
            "matmul": {},
        }
        results: benchmark_models.Results = {}
        passes = [what for what in ("inference", "training") if getattr(options, what)]
        for number, what in enumerate(passes, 1):
            with cli.progress(f"[{number}/{len(passes)}] {what}, {len(contenders)} contenders", log=True) as say:
                rows = results[what] = benchmark_models.measure(
                    contenders,
                    what == "training",
                    batch=batch,
                    size=options.size,
                    device=options.device,
                    seconds=options.seconds,
                    rounds=options.rounds,
                    products=products,
                    say=say,
                )
            content["matmul"][what] = benchmark_models.rates(products, rows)
            content["models"] = benchmark_models.as_json(contenders, results, batch)
            if options.json:
                _write_json(options.json, content)
            _print_models(console, contenders, rows, batch, what, products)
    if options.picture:
        benchmark_models.draw(options.picture, contenders, results, f"{where}; {setting}")
    for path in filter(None, (options.json, options.picture)):
        console.print(f"written: {path}")
    _judge_models(options, contenders, results)


def _check_models(options: argparse.Namespace, names: list[str]) -> None:
    import timm
    import torch

    from zoo.kernels import dispatch
    from zoo.tools import benchmark_models

    for name in (options.against, *names):
        if not timm.is_model(name):
            raise OptionError(unknown_model(name, timm.list_models()))
    for name in options.compile:
        if name not in (options.against, *names):
            raise OptionError(f"got --compile with {name!r}, which is none of the models: {', '.join(names)}.")
    if options.kernels and not any(map(benchmark_models.is_ours, names)):
        raise OptionError("got --kernels, but no model of zoo, and no other model uses them: add one.")
    if "triton" in options.kernels and (obstacle := dispatch.triton_obstacle(torch.empty(0, device=options.device))):
        raise UserError(f"got --kernels with 'triton', which can't run here: {obstacle}.")
    if options.picture and not any(benchmark_models.top1(name) for name in names):
        raise OptionError("got --picture, but none of the models has a published accuracy: leave it out.")


def _print_models(
    console: Console,
    contenders: list[Contender],
    rows: dict[str, ModelRow],
    batch: int,
    what: str,
    products: tuple[Product, ...],
) -> None:
    from rich.text import Text

    from zoo.tools import benchmark_models

    console.print()
    console.print(benchmark_models.table(contenders, rows, batch, what))
    console.print()
    for note in benchmark_models.notes(contenders, rows, products, what):
        console.print(note, style="dim")
    reasons: dict[str, list[str]] = {}
    for row in rows.values():
        if row.status == "failed":
            reasons.setdefault(row.reason, []).append(row.name)
    for reason, labels in reasons.items():
        console.print(Text(f"not timed: {'; '.join(labels)}, {what}: {reason}", style="red"))


def _judge_models(options: argparse.Namespace, contenders: list[Contender], results: Results) -> None:
    """Raise an error if the unit or a model of zoo failed."""
    for what, rows in results.items():
        unit = next(iter(rows.values()))
        if unit.status == "failed":
            raise UserError(f"{unit.name}, the unit, failed in {what} ({unit.reason}): choose another with --against.")
        for contender in contenders:
            row = rows[contender.label]
            if contender.ours and row.status == "failed":
                raise UserError(f"zoo's {row.name} failed in {what}: {row.reason}.")


def _simulate(options: argparse.Namespace) -> None:
    from rich.table import Table

    from zoo.kernels import cost_model

    gpus = options.gpu or list(cost_model.GPUS)
    for gpu in gpus:
        if gpu not in cost_model.GPUS:
            raise OptionError(f"got --gpu {gpu!r}: there are {', '.join(cost_model.GPUS)}.")
    if options.static:
        _check_compiler()
    causal = (options.causal, options.causal)
    window = (options.size, options.kernel, options.dilation)
    rows = []
    try:
        for query_tile, key_tile in TILES:
            tiles = {"query_tile": query_tile, "key_tile": key_tile, "is_causal": causal}
            counted = cost_model.simulate(
                *window,
                options.stride,
                **tiles,
                num_heads=options.heads,
                head_dim=options.head_dim,
                batch=options.batch,
            )
            rows.append(
                {
                    "query_tile": query_tile,
                    "key_tile": key_tile,
                    "key_tiles": counted.key_tiles,
                    "dense_key_tiles": counted.dense_key_tiles,
                    "speedup_bound": counted.speedup_bound,
                    "utilization": counted.utilization,
                    "flops_issued": counted.flops_issued,
                    "flops_wanted": counted.flops_wanted,
                    "bytes_minimum": counted.bytes_minimum,
                    "seconds": {gpu: cost_model.roofline_time(counted, gpu) for gpu in gpus},
                    "recommended_stride": cost_model.recommend_stride(*window, **tiles),
                }
            )
    except ValueError as error:
        raise OptionError(str(error)) from error

    first, console = rows[0], cli.console()
    console.print(
        f"{size_text(options.size)} map, kernel {size_text(options.kernel)}, dilation {size_text(options.dilation)}, "
        f"stride {size_text(options.stride)}{', causal' if options.causal else ''}; {options.heads} heads of "
        f"{options.head_dim}, batch {options.batch}, half precision, forward\n"
        f"At least {first['bytes_minimum'] / 1e6:.4g} MB moved, {first['flops_wanted'] / 1e9:.4g} GFLOP wanted.",
    )
    table = Table()
    for column in ("queries", "keys", "K/V tiles", "of all", "bound", "useful", "GFLOP", "stride"):
        table.add_column(column, justify="right")
    for gpu in gpus:
        table.add_column(gpu, justify="right")
    for row in rows:
        table.add_row(
            size_text(row["query_tile"]),
            size_text(row["key_tile"]),
            f"{row['key_tiles']:,}",
            f"{row['dense_key_tiles']:,}",
            f"{row['speedup_bound']:.2f}",
            f"{row['utilization']:.0%}",
            f"{row['flops_issued'] / 1e9:.4g}",
            size_text(row["recommended_stride"]),
            *(f"{row['seconds'][gpu] * 1e6:.4g}" for gpu in gpus),
        )
    console.print(table)
    console.print(
        "K/V tiles: visited, and those of full attention, for one head of one image; bound: on the speed-up over full\n"
        "attention; useful: the needed part of GFLOP, a count of whole tiles; stride: the smallest with the fewest\n"
        "tiles; GPUs: lower bounds in microseconds.",
        style="dim",
    )
    ours = _our_kernel(options, gpus) if options.static else {}
    for gpu, kernel in ours.items():
        console.print(
            f"zoo's forward pass on {gpu}: {kernel['warp_instructions'] / 1e6:.1f} M instructions, "
            f"{kernel['step']} a step; modelled, not measured: {kernel['modelled_us']:.4g} us."
        )
    if options.json:
        keys = ("size", "kernel", "dilation", "stride", "causal", "heads", "head_dim", "batch")
        settings = {key: getattr(options, key) for key in keys}
        _write_json(options.json, {"settings": settings, "tiles": rows} | ({"kernel": ours} if ours else {}))
        console.print(f"written: {options.json}")


def _our_kernel(options: argparse.Namespace, gpus: list[str]) -> dict[str, dict[str, Any]]:
    """The counts of our forward kernel and its modelled time, for each GPU that they are known for."""
    from zoo.kernels.neighborhood_attention.cases import Case
    from zoo.tools import benchmark_static

    if options.head_dim > 128:
        raise OptionError(
            f"got --static with --head-dim {options.head_dim}: zoo's kernel has tiles for heads of up to 128 channels."
        )
    case = Case(
        options.size,
        options.heads,
        options.kernel,
        options.dilation,
        options.stride,
        (options.causal, options.causal),
        options.head_dim,
    )
    found = {}
    for gpu in gpus:
        if gpu not in benchmark_static.COMPILED_FOR:
            continue
        with cli.progress(f"compiling for {gpu}", log=True):
            kernels = benchmark_static.neighborhood_forward(case, options.batch, gpu)
        found[gpu] = {
            "warp_instructions": sum(kernel.warp_instructions for kernel in kernels),
            "step": next(kernel.step for kernel in kernels if kernel.tensor_core),  # others prepare tables
            "modelled_us": sum(kernel.modelled_us for kernel in kernels),
        }
    if not found:
        known = ", ".join(benchmark_static.COMPILED_FOR)
        raise OptionError(f"got --static with --gpu {' '.join(gpus)}: times are modelled for {known}.")
    return found


if __name__ == "__main__":
    main()
