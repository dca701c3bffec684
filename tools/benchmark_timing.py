"""How `zoo-bench` measures time and memory: contenders run in turns, so that ratios hold on a busy machine, too."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MAX_ROUNDS = 500


@dataclass
class Row:
    """The results of one contender.

    Attributes:
        name: The contender.
        status: "timed", or why not: "wrong", "failed" or "not run".
        reason: The reason in words, if it is not timed.
        times: The time of each turn in seconds.
        ratios: The times in units of the yardstick's time in the same turn.
        peak_bytes: The most memory that a call allocates, besides its inputs.
    """

    name: str
    status: str = "timed"
    reason: str = ""
    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def failed(self, fault: Exception) -> None:
        """Record the first line of an error; two lines if the first one only announces the next."""
        first, second = [*filter(None, map(str.strip, str(fault).splitlines())), "", ""][:2]
        text = f"{first} {second}" if first.endswith(":") else first
        self.status, self.reason = "failed", f"{type(fault).__name__}: {text}"

    def figures(self) -> dict[str, Any]:
        """The measurements, for JSON."""
        median, low, high = spread(self.times)
        return {
            "median_s": median,
            "low_s": low,
            "high_s": high,
            "ratio": dict(zip(("median", "low", "high"), spread(self.ratios), strict=True)) if self.ratios else None,
            "peak_bytes": self.peak_bytes,
            "times_s": self.times,
        }


def alternately(
    runs: dict[str, Callable[[], object]], device: str, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Time all runs in turns, for `seconds` and at least `rounds` turns, after a warm-up call. Returns seconds."""
    clock = _GpuClock() if device == "cuda" else _cpu_clock
    for run in runs.values():
        clock(run)
    names, times = list(runs), {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(max(rounds, MAX_ROUNDS)):
        if turn >= rounds and time.perf_counter() - start > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:  # so that no run always follows the same one
            times[name].append(clock(runs[name]))
    return times


def _cpu_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = run()
    end = time.perf_counter()
    del kept
    return end - start


class _GpuClock:
    """Times a call with CUDA events, with a cold L2 cache. A wait on the GPU hides the time to launch the kernels."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(4_000_000)
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that a call allocates, besides its inputs, from PyTorch's allocator."""
    release(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def release(device: str) -> None:
    """Free unused memory of the GPU."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    """The machine that was measured: names, versions, threads."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "timm": installed("timm"),
        "natten": installed("natten"),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(values: list[float]) -> tuple[float, float, float]:
    """The median, and the bounds of the middle 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


def digits(number: float) -> str:
    """A number with three significant digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
