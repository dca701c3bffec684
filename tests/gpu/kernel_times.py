"""The kernels of the main cases, one after the other: for their times, for compute-sanitizer and for Nsight Compute.

`python tests/gpu/kernel_times.py --times` prints the median time of each kernel, next to the least time that the memory
allows; without `--times` each case runs once, between the marks that `ncu --profile-from-start off` waits for.
`--counters FILE.csv` runs nothing and makes a table of what ncu wrote.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch
import triton

from zoo.kernels import OPERATORS, implementation
from zoo.tools.benchmark_static import CASES

ROUNDS = 20
# The operator's name and the case's.
LISTED = [(name, case) for name in OPERATORS for case in CASES.get(name.partition("_")[0], ())]
# What `--counters` reads: our name, ncu's, and the factor between them.
COUNTERS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "warp_instructions": ("sm__inst_executed.sum", 1),
    "issued_percent": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "dram_bytes": ("dram__bytes.sum", 1),
    "wavefronts": ("l1tex__data_pipe_lsu_wavefronts.sum", 1),
    "registers": ("launch__registers_per_thread", 1),
    "programs": ("launch__grid_dim_x", 1),
}


def calls(operator, case, batch, dtype):
    """Forward and backward of one case, as functions."""
    module = import_module(f"zoo.kernels.{operator}.cases")
    args, kwargs = module.inputs(module.CASES[case], batch=batch, dtype=dtype, device="cuda", requires_grad=True)
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]

    def forward():
        with implementation("triton"):
            return module.FUNCTION(*args, **kwargs)

    out = forward()
    grad = torch.randn_like(out)
    moved = sum(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    least = {"forward": moved + out.nbytes, "backward": moved + 2 * out.nbytes + sum(x.nbytes for x in wanted)}

    def backward():
        torch.autograd.grad(out, wanted, grad, retain_graph=True)

    return {"forward": forward, "backward": backward}, least


def copy_bandwidth():
    """Bytes a second that a copy reads and writes."""
    source, target = torch.empty(2, 1 << 30, dtype=torch.int8, device="cuda")
    copies = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        copies.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(copies) * 1e3


def time_kernels(run, flush):
    """Milliseconds per kernel and call, each with a cold cache."""
    run()
    torch.cuda.synchronize()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(ROUNDS):
            flush.zero_()
            run()
        torch.cuda.synchronize()
    found = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us() / 1e3)
    # The flush is a fill of 256 MiB; every other kernel runs once or more in each round.
    return {
        name: {"ms": statistics.median(times), "launches": len(times) / ROUNDS}
        for name, times in found.items()
        if "Memset" not in name and "FillFunctor<signed char>" not in name
    }


def counters(path):
    """The launches in a file of `ncu --csv --page raw`, each with its case, its kernel and COUNTERS."""
    if not path.exists():
        sys.exit(f"kernel_times: error: there is no {path}; ncu writes it with --csv --page raw --log-file.")
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if line.startswith('"')))
    missing = [name for name, _ in COUNTERS.values() if not rows or name not in rows[0]]
    if missing:
        sys.exit(f"kernel_times: error: {path} has no {', '.join(missing)}; tools/gpu_session.sh counts them.")
    found, case = [], "?"
    for row in rows[1:]:  # the first holds the units
        # Only the thread that calls a pass has its mark, and the backward pass runs in another one.
        marks = re.findall(r":(\w+/\S+) (?:forward|backward)", " ".join(row[name] for name in row if "Range" in name))
        case = marks[0] if marks else case
        numbers = {name: float(row[key].replace(",", "")) * factor for name, (key, factor) in COUNTERS.items()}
        found.append({"case": case, "kernel": row["Kernel Name"]} | numbers)
    return found


def print_counters(launches):
    """A line for each launch of our kernels."""
    print("     us  M instr  issued  warps  MB moved  M wavefronts  registers  programs  kernel")
    case = None
    for launch in launches:
        if launch["case"] != case:
            case = launch["case"]
            print(case)
        print(
            f"{launch['us']:7.1f}  {launch['warp_instructions'] / 1e6:7.2f}  {launch['issued_percent']:5.0f}%"
            f"  {launch['warps_percent']:4.0f}%  {launch['dram_bytes'] / 1e6:8.1f}  {launch['wavefronts'] / 1e6:12.2f}"
            f"  {launch['registers']:9.0f}  {launch['programs']:8.0f}  {launch['kernel'][:60]}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of operator/case")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--counters", type=Path, metavar="FILE.csv", help="make a table of what ncu wrote, run nothing")
    options = parser.parse_args()
    if options.counters:
        found = counters(options.counters)
        print_counters(found)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    print(f"{torch.cuda.get_device_name()}, batch {options.batch}, {options.dtype}", end="")
    bandwidth = copy_bandwidth() if options.times else None
    print(f"; a copy moves {bandwidth / 1e12:.2f} TB/s" if bandwidth else "")
    flush = torch.empty(256 << 20 if options.times else 0, dtype=torch.int8, device="cuda")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    machine |= {"batch": options.batch, "dtype": options.dtype, "bandwidth": bandwidth}
    results = []
    for operator, case in LISTED:
        if not any(fnmatch(f"{operator}/{case}", pattern) for pattern in options.cases):
            continue
        runs, least = calls(operator, case, options.batch, getattr(torch, options.dtype))
        for kind, run in runs.items():
            if not options.times:
                run()
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                torch.cuda.nvtx.range_push(f"{operator}/{case} {kind}")
                run()
                torch.cuda.synchronize()
                torch.cuda.nvtx.range_pop()
                torch.cuda.cudart().cudaProfilerStop()
                continue
            floor = least[kind] / bandwidth * 1e3
            kernels = time_kernels(run, flush)
            total = sum(kernel["ms"] * kernel["launches"] for kernel in kernels.values())
            print(f"{operator}/{case} {kind}: {total * 1e3:.1f} us, floor {floor * 1e3:.1f} us ({floor / total:.0%})")
            for name, kernel in kernels.items():
                print(f"    {kernel['ms'] * 1e3:9.1f} us x {kernel['launches']:g}  {name[:90]}")
            results.append({"case": f"{operator}/{case}", "pass": kind, "floor_ms": floor, "kernels": kernels})
            if options.json:
                options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
