"""What `zoo-bench models` measures: passes of whole models, and of timm's models of the same families."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
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
from zoo import costs, kernels
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
    *[
        ((x * far, y * far), {-1: "right", 0: "center", 1: "left"}[x], "top" if y < 0 else "bottom")
        for far in (20, 30, 40, 50)
        for x, y in ((-1, -1), (1, -1), (0, -1), (1, 1), (-1, 1), (0, 1))
    ],
]
NEAR = 16  # From places farther away, a line leads to the point.


# What a time is divided by, besides that of the unit, in the same turn -> the column of the table.
BASELINES = {"timm": "/ timm's", "float32": "/ float32", "eager": "/ eager"}


@dataclass
class Row(timing.Row):
    """The results of one contender in one kind of pass.

    Attributes:
        compile_seconds: The time of a compiled model's first call.
        against: The times in units of those of each baseline, by its name in `BASELINES`.
        shares: The operations per second in units of those of the matrix product in the same turn.
    """

    compile_seconds: float | None = None
    against: dict[str, list[float]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def figures(self, batch: int) -> dict[str, Any]:
        """The measurements, for JSON."""
        shared = super().figures()
        found = {f"ratio_to_{name}": ratios for name, ratios in self.against.items()}
        if self.shares:
            found["matmul_share"] = self.shares
        spreads = {key: dict(zip(("median", "low", "high"), spread(each), strict=True)) for key, each in found.items()}
        return {"images_per_s": batch / shared["median_s"], "compile_s": self.compile_seconds} | shared | spreads


Results = dict[str, dict[str, Row]]  # by kind of pass, then by label


@dataclass
class Contender:
    """A model, and how it runs.

    Attributes:
        name: The name of the model.
        model: The model.
        call: The model, compiled or not.
        compiled: Whether it is compiled.
        dtype: The name of the dtype of autocast, or of the model and the images; "float32" for neither.
        cast: Whether the model and the images have that dtype, without autocast.
        choice: The implementation of zoo.kernels, or None for the automatic choice.
        peer: The name of timm's model of the same family.
        flops: The operations of a forward pass of one image, two for a multiply-add; None if they can't be counted.
    """

    name: str
    model: nn.Module
    call: Callable[[Tensor], Tensor]
    compiled: bool = False
    dtype: str = "float32"
    cast: bool = False
    choice: str | None = None
    peer: str | None = None
    flops: int | None = None

    @property
    def precision(self) -> str:
        """The dtype, and whether it is cast."""
        return f"{self.dtype} cast" if self.cast else self.dtype

    @property
    def mode(self) -> str:
        """How it runs, in words."""
        return ", ".join([self.precision, *self._further])

    @property
    def label(self) -> str:
        """The name and the mode, without "float32"."""
        return ", ".join([self.name, *([] if self.dtype == "float32" else [self.precision]), *self._further])

    @property
    def _further(self) -> list[str]:
        return [*(["compiled"] if self.compiled else []), *([f"{self.choice} kernels"] if self.choice else [])]

    @property
    def ours(self) -> bool:
        """Whether the model is one of zoo."""
        return is_ours(self.name)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def baselines(self) -> dict[str, str]:
        """The label of each contender that it is compared with, by its name in `BASELINES`."""
        found = {}
        if self.peer:
            found["timm"] = replace(self, name=self.peer, choice=None).label
        if self.dtype != "float32":
            found["float32"] = replace(self, dtype="float32", cast=False).label
        if self.compiled:
            found["eager"] = replace(self, compiled=False).label
        return found


@dataclass
class Product:
    """A product of matrices, as a linear layer with bias computes it, by the fastest of torch's ways.

    Attributes:
        dtype: The name of its dtype.
        way: "nn.Linear" or "1x1 convolution".
        features: The number of input and of output features.
        tokens: The number of rows.
        run: Computes it.
    """

    dtype: str
    way: str
    features: int
    tokens: int
    run: Callable[[], Tensor]

    @property
    def label(self) -> str:
        """The name among the results."""
        return f"matrix product, {self.dtype}"

    @property
    def flops(self) -> int:
        """The operations, two for a multiply-add."""
        return 2 * self.tokens * self.features**2


def product(dtype: str, device: str) -> Product:
    """The product in `dtype`, after a trial of all ways to compute it."""
    features, tokens = (4096, 16384) if device == "cuda" else (1024, 4096)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
        for shape in ((tokens, features), (features, features), (features,))
    )
    pixels, filters = x[None, None].permute(0, 3, 1, 2), weight[:, :, None, None]
    ways = {
        "nn.Linear": torch.no_grad()(lambda: F.linear(x, weight, bias)),
        "1x1 convolution": torch.no_grad()(lambda: F.conv2d(pixels, filters, bias)),
    }
    tried = timing.alternately(ways, device, seconds=0.2, rounds=3)
    way = min(tried, key=lambda name: spread(tried[name])[0])
    return Product(dtype, way, features, tokens, ways[way])


def is_ours(name: str) -> bool:
    """Whether zoo registers the model `name`."""
    return timm.models.model_entrypoint(name).__module__.startswith("zoo.")


def contenders(
    names: list[str],
    against: str,
    *,
    size: tuple[int, int],
    device: str,
    dtypes: tuple[str, ...] = ("float32",),
    cast: bool = False,
    compiled: Collection[str] = (),
    choices: tuple[str, ...] = (),
) -> list[Contender]:
    """The yardstick `against`, followed by the models `names`, each with timm's model of the same family.

    Args:
        names: Names of models.
        against: The model whose time is the unit.
        size: Height and width of the images.
        device: The device of the models.
        dtypes: The names of the dtypes to run each model in, the unit's first.
        cast: Whether to add each model cast to the dtypes other than float32.
        compiled: Names of models to add compiled, too, with timm's model of each and the yardstick.
        choices: Implementations of zoo.kernels to run each model of zoo with; () for the automatic choice.
    """
    asked = list(dict.fromkeys([against, *names]))
    peers = {name: other for name in asked if (other := timm_name(name))}
    compiling = {other for name in compiled for other in (against, name, peers.get(name))}
    made = []
    for name in dict.fromkeys(n for asked_name in asked for n in (asked_name, peers.get(asked_name)) if n):
        model = _create(name, size).to(device)
        flops = count_flops(model, size)
        paths = choices if choices and is_ours(name) and name != against else (None,)
        for dtype in dtypes:
            for casting in (False, True)[: 1 + (cast and dtype != "float32")]:
                run = copy.deepcopy(model).to(getattr(torch, dtype)) if casting else model
                for choice in paths:
                    for fused in (False, True)[: 1 + (name in compiling)]:
                        call = torch.compile(run, dynamic=False) if fused else run
                        how = {"compiled": fused, "dtype": dtype, "cast": casting, "choice": choice}
                        made.append(Contender(name, run, call, **how, peer=peers.get(name), flops=flops))
    return made


def count_flops(model: nn.Module, size: tuple[int, int]) -> int | None:
    """The operations of a forward pass of one image, twice the multiply-adds of `zoo-models`; None if it fails."""
    try:
        return 2 * costs.multiply_adds(model, (3, *size))
    except Exception:  # the pass that is timed will say why
        return None


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
    device: str,
    seconds: float,
    rounds: int,
    products: tuple[Product, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Row]:
    """Check the results of every contender, then time them in turns. Ratios are in units of the first one's times.

    Args:
        contenders: The contenders. The first one is the yardstick.
        training: Whether to time a training step; otherwise inference.
        batch: The number of images.
        size: Height and width of the images.
        device: The device of the models.
        seconds: How long to time.
        rounds: The smallest number of turns.
        products: Products of matrices to time in the same turns, for shares of their rates.
        say: Shows the progress.
    """
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    rows, runs = {}, {}
    for contender in contenders:
        contender.model.train(training)
    for contender in contenders:
        say(f"{'compiling' if contender.compiled else 'checking'} {contender.label}")
        row = rows[contender.label] = Row(contender.label)
        run = _Pass(contender, images, training)
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
        everything = runs | {one.label: one.run for one in products}
        for label, times in timing.alternately(everything, device, seconds, rounds).items():
            rows.setdefault(label, Row(label)).times = times
        for contender in contenders:
            if contender.label in runs:
                _compare(contender, rows, yardstick, products, batch * (3 if training else 1))
        for label, run in runs.items():
            say(f"memory of {label}")
            rows[label].peak_bytes = timing.peak_bytes(run, device)
    return rows


def _compare(
    contender: Contender, rows: dict[str, Row], yardstick: str, products: tuple[Product, ...], forwards: int
) -> None:
    """Divide the times of a contender by those of others in the same turn. Its call costs so many forward passes."""
    row = rows[contender.label]

    def ratios(label: str) -> list[float]:
        return [a / b for a, b in zip(row.times, rows[label].times, strict=True)]

    row.ratios = ratios(yardstick)
    row.against = {
        name: ratios(label) for name, label in contender.baselines().items() if label in rows and rows[label].times
    }
    for one in products:
        if one.dtype == contender.dtype and contender.flops:
            row.shares = [forwards * contender.flops / one.flops / ratio for ratio in ratios(one.label)]


class _Pass:
    """The call that is timed: a forward pass, or a training step that frees its gradients."""

    def __init__(self, contender: Contender, images: Tensor, training: bool) -> None:
        self.contender, self.training = contender, training
        self.dtype = getattr(torch, contender.dtype)
        self.images = images.to(self.dtype) if contender.cast else images
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
        choice, autocast = self.contender.choice, self.images.dtype != self.dtype
        with kernels.implementation(choice) if choice else nullcontext(), torch.set_grad_enabled(self.training):
            with torch.autocast(self.images.device.type, self.dtype, enabled=autocast):
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
            # past the limit, it would run them without compilation
            with torch._dynamo.config.patch(recompile_limit=functions, fail_on_recompile_limit_hit=True):
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
            "dtype": contender.dtype,
            "cast": contender.cast,
            "compiled": contender.compiled,
            "kernels": contender.choice,
            "ours": contender.ours,
            "timm": timm_name(contender.name),
            "parameters": contender.parameters,
            "flops": contender.flops,
            "top1": top1(contender.name),
        }
        for what, rows in results.items():
            row = rows[contender.label]
            entry[what] = {"status": row.status, "reason": row.reason} | (row.figures(batch) if row.times else {})
        entries.append(entry)
    return entries


def rates(products: tuple[Product, ...], rows: dict[str, Row]) -> list[dict[str, Any]]:
    """The products of matrices in one kind of pass, for JSON; [] if nothing was timed."""
    return [
        {
            "dtype": one.dtype,
            "way": one.way,
            "features": one.features,
            "tokens": one.tokens,
            "flops_per_s": one.flops / spread(rows[one.label].times)[0],
            "times_s": rows[one.label].times,
        }
        for one in products
        if one.label in rows
    ]


def table(contenders: list[Contender], rows: dict[str, Row], batch: int, what: str) -> Table:
    """The table of one kind of pass. With several modes, each model has a line with its name, and one for each mode."""
    timed = [rows[contender.label] for contender in contenders]
    baselines = [name for name in BASELINES if any(name in row.against for row in timed)]
    shares = any(row.shares for row in timed)
    compiled = any(contender.compiled for contender in contenders)
    several = len({contender.mode for contender in contenders}) > 1
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    made.add_column("", overflow="fold")
    columns = ["M\nweights", "images\n/s", "ms", what, *(BASELINES[name] for name in baselines)]
    for column in columns + ["of\nmatmul"] * shares + ["MiB"] + ["compiled\nin s"] * compiled:
        made.add_column(column, justify="right", no_wrap=True)

    before = None
    for contender in contenders:
        row, weights = rows[contender.label], f"{contender.parameters / 1e6:.1f}"
        if several and contender.name != before:
            before = contender.name
            made.add_row(contender.name, weights)
        cells = ["" if several else weights]
        if row.times:
            median = spread(row.times)[0]
            cells += [digits(batch / median), digits(median * 1e3), _with_spread(row.ratios)]
            cells += [f"{spread(row.against[name])[0]:.2f}" if name in row.against else "" for name in baselines]
            cells += [f"{spread(row.shares)[0]:.0%}" if row.shares else ""] * shares
            cells += [digits(row.peak_bytes / 2**20)]
            cells += ["" if row.compile_seconds is None else digits(row.compile_seconds)] * compiled
        else:
            cells += ["-"] * 3
        made.add_row(f"  {contender.mode}" if several else contender.label, *cells)
    return made


def notes(contenders: list[Contender], rows: dict[str, Row], products: tuple[Product, ...], what: str) -> list[str]:
    """What the columns of a table mean."""
    timed = [rows[contender.label] for contender in contenders]
    words = {
        "timm": "timm's model of the family",
        "float32": "the same model in float32",
        "eager": "the same model without compilation",
    }
    used = [name for name in BASELINES if any(name in row.against for row in timed)]
    unit = contenders[0]
    unit_mode = f" in {unit.mode}" if len({(each.precision, each.compiled) for each in contenders}) > 1 else ""
    found = [f"{what}: time in units of {unit.name}'s{unit_mode}"]
    found += [f"{BASELINES[name]}: time divided by that of {words[name]}" for name in used]
    if any(row.shares for row in timed):
        each = (
            f"{rate['flops_per_s'] / 1e9:,.0f} in {rate['dtype']} by {rate['way']}" for rate in rates(products, rows)
        )
        found.append(f"of matmul: share of the GFLOP/s of a linear layer of {products[0].features}, {', '.join(each)}")
    return found + summary(contenders, rows)


def summary(contenders: list[Contender], rows: dict[str, Row]) -> list[str]:
    """For each baseline and mode, the median and the largest ratio of zoo's models; [] for less than two models."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for contender in filter(lambda each: each.ours, contenders):
        for name, each in rows[contender.label].against.items():
            ratios.setdefault((name, contender.mode), {})[contender.name] = spread(each)[0]
    found = []
    for (name, mode), by_model in sorted(ratios.items(), key=lambda item: list(BASELINES).index(item[0][0])):
        if len(by_model) > 1:
            worst = max(by_model, key=lambda model: by_model[model])
            median = spread(list(by_model.values()))[0]
            found.append(f"{mode} {BASELINES[name]} {median:.2f} ({by_model[worst]:.2f} for {worst})")
    return [f"median of zoo's models (largest): {'; '.join(found)}"] if found else []


def _with_spread(ratios: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*spread(ratios)) if ratios else "-"


def draw(path: Path, contenders: list[Contender], results: Results, where: str) -> None:
    """Draw the speed of inference, in units of the yardstick's, against published accuracy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(contenders, results, where).savefig(path, dpi=150)


def picture(contenders: list[Contender], results: Results, where: str) -> Figure:
    """The figure that `draw` writes: a colour per family, and a thin line from timm's model to that of zoo.

    Each dtype has a panel. Models that are compiled, too, have a name only where they are not.
    """
    from matplotlib.figure import Figure

    speeds = {label: 1 / spread(row.ratios)[0] for label, row in results["inference"].items() if row.ratios}
    peers = {contender.peer for contender in contenders}
    known = [c for c in contenders if c.name not in peers and c.label in speeds and top1(c.name) is not None]
    modules = list(dict.fromkeys(timm.models.model_entrypoint(c.name).__module__ for c in known))
    panels = list(dict.fromkeys(contender.precision for contender in known))
    figure = Figure(figsize=(7.2, 5 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    labels: dict[Axes, list[tuple[str, tuple[float, float]]]] = {axes: [] for axes in all_axes}
    for axes, precision in zip(all_axes, panels, strict=True):
        for contender in (c for c in known if c.precision == precision):
            place = (speeds[contender.label], top1(contender.name))
            number = modules.index(timm.models.model_entrypoint(contender.name).__module__)
            color = f"C{number % 10}" if contender.ours else "black"
            marker = "D" if contender.compiled else "o"
            named = not contender.compiled or contender.baselines()["eager"] not in speeds
            text = ", ".join([contender.name, *contender.mode.split(", ")[1:]])
            axes.plot(*place, marker=marker, color=color)
            labels[axes].append((text if named else "", place))
            peer = contender.baselines().get("timm")
            if peer in speeds:
                other = (speeds[peer], place[1])
                axes.plot(*other, marker=marker, color=color, fillstyle="none")
                axes.plot([other[0], place[0]], [place[1]] * 2, color=color, linewidth=0.8, marker="")
                labels[axes].append(("timm's" if named else "", other))
        _finish(axes)
        heading = [precision] * (len(panels) > 1) + ["diamonds: compiled"] * any(c.compiled for c in known)
        axes.set_title(", ".join(heading), fontsize=9, loc="left")
    unit = contenders[0]
    all_axes[-1].set_xlabel(f"inference, images per second, in units of {unit.label}'s")
    figure.suptitle(f"Speed and published accuracy\n{where}", fontsize=10)
    figure.draw_without_rendering()  # places the panels
    for axes in all_axes:
        _write_beside(axes, labels[axes])
    return figure


def _finish(axes: Axes) -> None:
    """Scales, grid, and an arrow to the better corner."""
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "123468" else "")
    axes.margins(0.14)
    axes.set_ylabel("published ImageNet-1k top-1, %")
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


def _write_beside(axes: Axes, labels: list[tuple[str, tuple[float, float]]]) -> None:
    """Write each label above, below or beside its point, where it touches neither a point nor another label."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform([at for _, at in labels])]
    for text, place in labels:
        for offset, across, up in _BESIDE if text else ():
            written = axes.annotate(
                text, place, offset, textcoords="offset points", ha=across, va=up, fontsize=7.5, annotation_clip=False
            )
            box = written.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if offset != _BESIDE[-1][0]:
                written.remove()
        if text:
            taken.append(box)
            if max(map(abs, offset)) > NEAR:
                line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
                axes.annotate("", place, offset, textcoords="offset points", arrowprops=line)
