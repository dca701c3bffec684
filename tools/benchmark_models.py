"""What `zoo-bench models` measures: passes of whole models, and of timm's models of the same families."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

import zoo
from zoo import kernels
from zoo.checkpoints import manifest
from zoo.families import timm_name
from zoo.tools import benchmark_timing as timing
from zoo.tools.benchmark_timing import digits, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP1 = {"swin_tiny_patch4_window7_224": 81.3}  # arXiv 2103.14030, table 1
# Places for a label: the offset from its point, in points of 1/72 inch, and the side of the label that is there.
_BESIDE = [
    *[
        ((0, 6), "center", "bottom"),
        ((0, -6), "center", "top"),
        ((7, 0), "left", "center"),
        ((-7, 0), "right", "center"),
    ],
    *[((5, 5), "left", "bottom"), ((-5, -5), "right", "top"), ((0, 16), "center", "bottom")],
]


@dataclass
class Row(timing.Row):
    """The results of one contender in one kind of pass. `compile_seconds` is the time of its first call."""

    compile_seconds: float | None = None

    def figures(self, batch: int) -> dict[str, Any]:
        """The measurements, for JSON."""
        shared = super().figures()
        return {"images_per_s": batch / shared["median_s"], "compile_s": self.compile_seconds} | shared


Results = dict[str, dict[str, Row]]  # by kind of pass, then by label


@dataclass
class Contender:
    """A model, and how it runs.

    Attributes:
        name: The name of the model.
        model: The model.
        call: The model, compiled or not.
        compiled: Whether it is compiled.
        choice: The implementation of zoo.kernels, or None for the automatic choice.
        peer: The label of timm's model of the same family.
        shown: Whether it has a line in the table.
    """

    name: str
    model: nn.Module
    call: Callable[[Tensor], Tensor]
    compiled: bool
    choice: str | None = None
    peer: str | None = None
    shown: bool = True

    @property
    def label(self) -> str:
        """The name in tables."""
        return _label(self.name, self.compiled, self.choice)

    @property
    def ours(self) -> bool:
        """Whether the model is one of zoo."""
        return is_ours(self.name)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def _label(name: str, compiled: bool, choice: str | None = None) -> str:
    return ", ".join([name, *(["compiled"] if compiled else []), *([f"{choice} kernels"] if choice else [])])


def is_ours(name: str) -> bool:
    """Whether zoo registers the model `name`."""
    return timm.models.model_entrypoint(name).__module__.startswith("zoo.")


def contenders(
    names: list[str],
    against: str,
    *,
    size: tuple[int, int],
    device: str,
    compiled: bool = False,
    choices: tuple[str, ...] = (),
) -> list[Contender]:
    """The yardstick `against`, followed by the models `names`, each with timm's model of the same family.

    Args:
        names: Names of models.
        against: The model whose time is the unit.
        size: Height and width of the images, for models that take one size only.
        device: The device of the models.
        compiled: Whether to add each model compiled.
        choices: Implementations of zoo.kernels to run each model of zoo with; () for the automatic choice.
    """
    asked = list(dict.fromkeys([against, *names]))
    peers = {name: other for name in asked if (other := timm_name(name))}
    made = []
    for name in dict.fromkeys(n for asked_name in asked for n in (asked_name, peers.get(asked_name)) if n):
        model = _create(name, size).to(device)
        paths = choices if choices and is_ours(name) and name != against else (None,)
        for choice in paths:
            for compiling in (False, True)[: 1 + compiled]:
                call = torch.compile(model, dynamic=False) if compiling else model
                peer = _label(peers[name], compiling) if name in peers else None
                made.append(Contender(name, model, call, compiling, choice, peer, shown=name in asked))
    return made


def _create(name: str, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # it takes any size, as the models of zoo do
        return timm.create_model(name)


def measure(
    contenders: list[Contender],
    training: bool,
    *,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    seconds: float,
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Row]:
    """Check the results of every contender, then time them in turns. Ratios are in units of the first one's times.

    Args:
        contenders: The contenders. The first one is the yardstick.
        training: Whether to time a training step; otherwise inference.
        batch: The number of images.
        size: Height and width of the images.
        dtype: The dtype of autocast; torch.float32 for none.
        device: The device of the models.
        seconds: How long to time.
        rounds: The smallest number of turns.
        say: Shows the progress.
    """
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    rows, runs = {}, {}
    for contender in contenders:
        contender.model.train(training)
    for contender in contenders:
        say(f"{'compiling' if contender.compiled else 'checking'} {contender.label}")
        row = rows[contender.label] = Row(contender.label)
        run = _Pass(contender, images, dtype, training)
        try:
            row.compile_seconds = run.check()
        except Exception as fault:  # the other contenders still run
            row.failed(fault)
        else:
            runs[contender.label] = run
        contender.model.zero_grad()
        timing.release(device)

    yardstick = contenders[0].label
    if yardstick in runs:
        say("timing")
        for label, times in timing.alternately(runs, device, seconds, rounds).items():
            rows[label].times = times
        for label, run in runs.items():
            rows[label].ratios = [a / b for a, b in zip(rows[label].times, rows[yardstick].times, strict=True)]
            say(f"memory of {label}")
            rows[label].peak_bytes = timing.peak_bytes(run, device)
    return rows


class _Pass:
    """The call that is timed: a forward pass, or a training step that frees its gradients."""

    def __init__(self, contender: Contender, images: Tensor, dtype: torch.dtype, training: bool) -> None:
        self.contender, self.images, self.dtype, self.training = contender, images, dtype, training
        classes = max(1, contender.model.num_classes)
        self.labels = torch.arange(len(images), device=images.device) % classes

    def __call__(self) -> Tensor:
        out = self._forward_and_backward()
        self.contender.model.zero_grad()
        return out

    def check(self) -> float | None:
        """Raise FloatingPointError if a result is not finite. Returns the seconds of a compiled model's first call."""
        start = time.perf_counter()
        out = self._forward_and_backward()
        if out.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        what = {"the loss" if self.training else "the output": out}
        if self.training:
            what |= {
                f"the gradient of {n}": p.grad for n, p in self.contender.model.named_parameters() if p.grad is not None
            }
        for name, tensor in what.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"{name} is not finite")
        return took if self.contender.compiled else None

    def _forward_and_backward(self) -> Tensor:
        choice = self.contender.choice
        with kernels.implementation(choice) if choice else nullcontext(), torch.set_grad_enabled(self.training):
            with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                out = self.contender.call(self.images)
                if self.training:
                    out = F.cross_entropy(out, self.labels)
            if self.training:
                out.backward()
        return out.detach()


@contextmanager
def fresh_compiler(device: str, functions: int) -> Iterator[None]:
    """Within this context, torch compiles without a cache, up to `functions` versions of a function."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with TemporaryDirectory(prefix="zoo-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            # the models of a family share a forward method, and torch compiles only a few versions of it
            with torch._dynamo.config.patch(recompile_limit=functions):
                torch.compile(torch.sin)(torch.ones(8, device=device))  # compiles what all functions share
                yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            torch.compiler.reset()


def top1(name: str) -> float | None:
    """The published ImageNet-1k accuracy in percent; that of the first entry in the manifest for a model of zoo."""
    if name in _TOP1:
        return _TOP1[name]
    entries = (entry for family in zoo.FAMILIES for entry in manifest(family))
    first = next((entry for entry in entries if entry["model"] == name), {})
    return first.get("top1", {}).get("value")


def as_json(contenders: list[Contender], results: Results, batch: int) -> list[dict[str, Any]]:
    """All measurements, with an entry per contender."""
    entries = []
    for contender in contenders:
        entry: dict[str, Any] = {
            "name": contender.name,
            "compiled": contender.compiled,
            "kernels": contender.choice,
            "ours": contender.ours,
            "timm": timm_name(contender.name),
            "parameters": contender.parameters,
            "top1": top1(contender.name),
        }
        for what, rows in results.items():
            row = rows[contender.label]
            entry[what] = {"status": row.status, "reason": row.reason} | (row.figures(batch) if row.times else {})
        entries.append(entry)
    return entries


def table(contenders: list[Contender], results: Results, batch: int) -> Table:
    """The table: a line per model, with the time of timm's model of the same family in the last column."""
    compiled = any(contender.compiled for contender in contenders)
    peers = any(contender.peer for contender in contenders)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("", overflow="fold")
    for column in ("M weights", "images/s", "ms", *results, "MiB", *["compiled in s"] * compiled, *["timm's"] * peers):
        made.add_column(column, justify="right", no_wrap=True)

    def each(label: str, cell: Callable[[Row], str]) -> str:
        """Inference / training."""
        return " / ".join(cell(row) if row.times else "-" for row in (rows[label] for rows in results.values()))

    for contender in contenders:
        if contender.shown:
            label = contender.label
            cells = [
                f"{contender.parameters / 1e6:.1f}",
                each(label, lambda row: digits(batch / spread(row.times)[0])),
                each(label, lambda row: digits(spread(row.times)[0] * 1e3)),
                *(_with_spread(rows[label].ratios) for rows in results.values()),
                each(label, lambda row: digits(row.peak_bytes / 2**20)),
            ]
            if compiled:
                cells.append(each(label, lambda row: digits(row.compile_seconds)) if contender.compiled else "")
            if peers:
                ratio = contender.peer and each(contender.peer, lambda row: f"{spread(row.ratios)[0]:.2f}")
                cells.append(ratio or "")
            made.add_row(label, *cells)
    return made


def _with_spread(ratios: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*spread(ratios)) if ratios else "-"


def draw(path: Path, contenders: list[Contender], results: Results, where: str) -> None:
    """Draw the speed of inference, in units of the yardstick's, against published accuracy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(contenders, results, where).savefig(path, dpi=150)


def picture(contenders: list[Contender], results: Results, where: str) -> Figure:
    """The figure that `draw` writes: a colour per family, and a thin line from timm's model to that of zoo."""
    from matplotlib.figure import Figure

    speeds = {label: 1 / spread(row.ratios)[0] for label, row in results["inference"].items() if row.ratios}
    known = [c for c in contenders if c.shown and c.label in speeds and top1(c.name) is not None]
    modules = list(dict.fromkeys(timm.models.model_entrypoint(c.name).__module__ for c in known))
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    axes = figure.subplots()
    labels = []
    for contender in known:
        place = (speeds[contender.label], top1(contender.name))
        number = modules.index(timm.models.model_entrypoint(contender.name).__module__)
        color = f"C{number % 10}" if contender.ours else "black"
        axes.plot(*place, marker="D" if contender.compiled else "o", color=color)
        labels.append((contender.label, place))
        if contender.peer in speeds:
            other = (speeds[contender.peer], place[1])
            axes.plot(*other, marker="o", color=color, fillstyle="none")
            axes.plot([other[0], place[0]], [place[1]] * 2, color=color, linewidth=0.8, marker="")
            labels.append(("timm's", other))
    yardstick = contenders[0].label
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "123468" else "")
    axes.margins(0.14)
    axes.set_xlabel(f"inference, images per second, in units of {yardstick}'s")
    axes.set_ylabel("published ImageNet-1k top-1, %")
    axes.set_title(f"Speed and published accuracy\n{where}", fontsize=10)
    axes.grid(alpha=0.3)
    arrow = {"arrowstyle": "->", "color": "0.4"}
    middle = {
        "xycoords": "axes fraction",
        "textcoords": "axes fraction",
        "color": "0.4",
        "ha": "center",
        "va": "center",
    }
    axes.annotate("better", (0.98, 0.97), (0.88, 0.88), arrowprops=arrow, **middle)
    _write_beside(axes, labels)
    return figure


def _write_beside(axes: Axes, labels: list[tuple[str, tuple[float, float]]]) -> None:
    """Write each label above, below or beside its point, where it touches neither a point nor another label."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform([at for _, at in labels])]
    for text, place in labels:
        for offset, across, up in _BESIDE:
            written = axes.annotate(
                text, place, offset, textcoords="offset points", ha=across, va=up, fontsize=7.5, annotation_clip=False
            )
            box = written.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if offset != _BESIDE[-1][0]:
                written.remove()
        taken.append(box)
