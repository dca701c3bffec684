"""The kernels of the main cases, one after the other: for their times, for compute-sanitizer and for Nsight Compute.

`python tests/gpu/kernel_times.py --times` prints the median time of each kernel, next to the least time that the memory
allows; without `--times` each case runs once, between the marks that `ncu --profile-from-start off` waits for.
"""

import argparse
import json
import statistics
from collections import defaultdict
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import torch

from zoo.kernels import implementation

# The shapes of the review of the kernels: each kind of kernel, and the sizes at which it is limited differently.
CASES = {
    "window_attention": (
        "56x56x64-block7x7-key_minus_query",
        "14x14x256-block7x7-key_minus_query",
        "7x7x512-block7x7-key_minus_query",
        "96x96x64-block12x12-key_minus_query",
        "14x14x256-block14x14",
        "56x56x32-block56x1-unbiased",
        "14x14x64-block2x2-unbiased",
    ),
    "neighborhood_attention": ("56x56x64-7x7", "14x14x256-7x7", "96x96x192-11x11"),
    "routed_attention": ("56x56x64-regions7-top1", "28x28x128-regions7-top4", "14x14x256-regions7-top16"),
}
ROUNDS = 20


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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="*", help="pattern of operator/case")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    source, target = torch.empty(2, 1 << 30, dtype=torch.int8, device="cuda")
    copies = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        copies.append(start.elapsed_time(end))
    bandwidth = 2 * source.nbytes / statistics.median(copies) * 1e3
    where = f"{torch.cuda.get_device_name()}, batch {options.batch}, {options.dtype}"
    print(f"{where}; a copy moves {bandwidth / 1e12:.2f} TB/s")
    del source, target
    results = []
    for operator, cases in CASES.items():
        for case in (case for case in cases if fnmatch(f"{operator}/{case}", options.cases)):
            runs, least = calls(operator, case, options.batch, getattr(torch, options.dtype))
            for kind, run in runs.items():
                floor = least[kind] / bandwidth * 1e3
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
                kernels = time_kernels(run, flush)
                total = sum(kernel["ms"] * kernel["launches"] for kernel in kernels.values())
                print(
                    f"{operator}/{case} {kind}: {total * 1e3:.1f} us, floor {floor * 1e3:.1f} us ({floor / total:.0%})"
                )
                for name, kernel in kernels.items():
                    print(f"    {kernel['ms'] * 1e3:9.1f} us x {kernel['launches']:g}  {name[:90]}")
                results.append({"case": f"{operator}/{case}", "pass": kind, "floor_ms": floor, "kernels": kernels})
                if options.json:
                    options.json.write_text(json.dumps({"bandwidth": bandwidth, "results": results}, indent=1))


if __name__ == "__main__":
    main()
