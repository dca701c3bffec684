"""Run folders: what a run leaves behind, written so that nothing is lost.

config.yaml          the whole configuration
start.json           command, data, and the settings of the recipe before the user's changes
train.log            what was printed
last.pt              everything needed to continue
previous.pt          the same, one checkpoint before; taken up where last.pt is damaged
best.safetensors     weights of the best epoch so far
metrics.jsonl        one line per epoch
curves.png           the same, drawn
classes.json         the last evaluation, class by class
predictions.png      samples of the validation split
model.safetensors    the final weights and
config.json          their description: timm.create_model("local-dir:<run folder>") loads them
summary.json         the figures
report.html          all of it in one page
.lock                who is writing to the folder, while somebody is
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from zoo.recipes import distributed, early, reading
from zoo.recipes.errors import RunError, causes, of_the_system
from zoo.recipes.lock import Lock, temporary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

console = Console()
_errors = Console(stderr=True)
log = logging.getLogger("zoo")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        target = _errors if record.levelno >= logging.ERROR else console
        target.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def start_log(folder: Path | None, primary: bool) -> None:
    """Print the log of the first process, and append it to `train.log` in `folder` too; others print warnings only."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.INFO if primary else logging.WARNING)
    log.addHandler(_ConsoleHandler())
    if folder and primary:
        handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)


def command() -> str:
    """The command line of this process, as one would type it."""
    name = Path(sys.argv[0]).name
    if name == "train.py":
        name = "python -m zoo.recipes.train"
    return shlex.join([*shlex.split(name), *sys.argv[1:]])


@contextmanager
def atomic(path: Path, before: Path | None = None) -> Iterator[BinaryIO]:
    """Open `path` for writing such that it holds either what it held before or all of the new content.

    Args:
        path: The file.
        before: What `path` held is found there afterwards.

    Raises:
        RunError: the content could not be written (disk full, folder not writable); `path` is as it was.
    """
    draft = temporary(path)
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before:
            _keep(path, before)
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to survive a power cut
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        cause = next((e for e in causes(error) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        kept = f"; {path.name} is as it was before" if path.exists() else ""
        raise RunError(
            f"could not write {path}: {os.strerror(cause.errno) if cause.errno else cause}{kept}. "
            f"{'Free some space' if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 'Mend that'} "
            "and start the same command again."
        ) from error


def _keep(path: Path, before: Path) -> None:
    """Give what `path` holds the name `before`, too."""
    if path.exists():
        before.unlink(missing_ok=True)
        try:
            os.link(path, before)
        except OSError:  # a file system without hard links
            os.replace(path, before)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, atomically; what it held becomes previous.pt.

    So a whole checkpoint is there at every moment, and the one before it too from the second on: twice the size of a
    checkpoint on the disk, three times while one is being written.
    """
    with atomic(path, before=path.with_name("previous.pt")) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Nothing in the file is executed.

    Raises:
        RunError: the file is missing, damaged (to a single bit) or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch reads without looking at its checksums; this takes half as long again
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}: is {path.parent} the folder of a run?") from None
    except Exception as error:  # zipfile's and torch's, of damaged files, are of many kinds
        system = of_the_system(error)
        if system:
            raise RunError(f"the checkpoint {path} can't be read: {system}") from error
        reason = (str(error).strip().splitlines() or ["incomplete"])[0].rstrip(".")
        raise RunError(f"the checkpoint {path} can't be read ({reason}): delete it, or start another run.") from error
    if not isinstance(state, dict) or not reading.Checkpoint.__required_keys__ <= state.keys():
        raise RunError(f"{path} is not a checkpoint of zoo-train: give the folder of a run.")
    return reading.check(state, reading.Checkpoint, path)


def safe_name(name: str) -> str:
    """`name` as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "._-=" else "-" for c in name).strip("-.")[:100]


def last_checkpoint(folder: Path) -> tuple[dict[str, Any], Path, str]:
    """The last checkpoint of a run that is whole, its file, and what was wrong with last.pt if it isn't that one.

    Raises:
        RunError: there is none.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    try:
        return load_checkpoint(last), last, ""
    except RunError as error:
        try:
            state = load_checkpoint(previous)
        except RunError as other:
            raise (other if previous.exists() and not last.exists() else error) from None
        wrong = str(error).partition(":")[0] if last.exists() else f"{last} is missing"
        return state, previous, f"{wrong[0].upper()}{wrong[1:]}: {previous}, the checkpoint before it, is used."


def set_aside(last: Path) -> None:
    """Give a damaged checkpoint the name damaged.pt, so that it never takes the place of a whole previous.pt.

    Raises:
        RunError: it can't be renamed.
    """
    if last.exists():
        try:
            last.replace(last.with_name("damaged.pt"))
        except OSError as error:
            raise RunError(f"the damaged {last} can't be renamed ({error.strerror}): move it away.") from error


def has_checkpoint(folder: Path) -> bool:
    """Whether a run left a checkpoint in `folder`, whole or not."""
    return (folder / "last.pt").exists() or (folder / "previous.pt").exists()


@contextmanager
def taken(folder: Path | None, prefix: str = "", name: str = "", key: str = "run") -> Iterator[Path]:
    """Own a folder, which is made if need be: no other process writes to it meanwhile (`Lock`).

    Of several processes of a run the first makes and locks it for all. If nothing was written, a new one goes again.

    Args:
        folder: The folder; a new one below runs/, of `prefix`, date, time and `name`, if None.
        prefix: See above.
        name: See above.
        key: What the user sets to choose another folder.

    Raises:
        RunError: it can't be written to, or another process has it.
    """
    lock, new = None, False

    def take() -> Path:
        nonlocal lock, new
        new = folder is None or not folder.exists()
        path = folder or default_folder(prefix, name)
        make_folder(path, key)
        with _writable(path, key):
            lock = Lock(path, key)
            lock.acquire()
        return path

    path = distributed.first(take)
    try:
        yield path
    finally:
        if lock:
            lock.release()
            if new:
                with suppress(OSError):  # which says that something is in it
                    path.rmdir()


def default_folder(prefix: str, name: str) -> Path:
    """Make a new folder below runs/, named by `prefix`, date, time and `name`; no other process gets the same.

    Raises:
        RunError: it can't be made.
    """
    stem = f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(name)}"
    number, folder = 1, Path("runs") / stem
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = Path("runs") / f"{stem}-{number}"
        except OSError as error:
            raise RunError(
                f"the folder {folder} can't be made ({error.strerror}): choose another with run=<folder>."
            ) from error


def make_folder(folder: Path, key: str | None = "run") -> None:
    """Create `folder`, which the configuration's `key` names (None: a word), and make sure that it can be written to.

    Raises:
        RunError: it can't.
    """
    with _writable(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()


@contextmanager
def _writable(folder: Path, key: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        way = f" with {key}=<folder>" if key else ""
        raise RunError(f"the folder {folder} can't be written to ({error.strerror}): choose another{way}.") from error


def warn_unwritable(folder: Path) -> None:
    """Say before a long evaluation that nothing can be written to `folder`: its figures are printed all the same."""
    try:
        early.check_folder(folder, "out")
    except RunError as error:
        log.warning("%s The figures will be printed only.", error)


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Write the resolved configuration."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `metrics.jsonl`, one line per epoch.

    It is written anew every time, so that after a resume no epoch stands in it twice.
    """
    write_text(folder / "metrics.jsonl", _lines(history))


def has_metrics(folder: Path, history: list[dict[str, Any]]) -> bool:
    """Whether `metrics.jsonl` is what `write_metrics` makes of `history`."""
    path = folder / "metrics.jsonl"
    return path.is_file() and path.read_bytes() == _lines(history).encode()


def _lines(history: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(_finite(record)) + "\n" for record in history)


def write_classes(
    folder: Path,
    classes: Sequence[str],
    scores: dict[str, list[float | None]],
    counts: Sequence[int],
    unit: str,
    confusion: list[list[int]] | None = None,
) -> None:
    """Write `classes.json`: an evaluation, class by class.

    Args:
        folder: Of the run, or of the evaluation.
        classes: The names.
        scores: Name of a score -> its value for each class in percent, None where it has none.
        counts: How much of each class was evaluated,
        unit: and of what: images, objects or pixels.
        confusion: [true label, predicted label, how many] for all pairs that occur.
    """
    content = {"classes": list(classes), "scores": scores, "counts": list(counts), "unit": unit, "confusion": confusion}
    write_text(folder / "classes.json", json.dumps(_finite(content)) + "\n")


def new_figure(**settings: Any) -> Figure:
    """A figure of Matplotlib's that draws names as they are: dollar signs in them are no formulas."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    return Figure(layout="constrained", **settings)


def plot_curves(path: Path, history: list[dict[str, Any]], title: str, scores: dict[str, str]) -> None:
    """Draw loss, scores and learning rate over the epochs.

    Args:
        path: The picture.
        history: A record per epoch: `epoch`, `lr`, and what there is of `train_loss`, `val_loss`, `train_<score>`,
            `val_<score>`.
        title: Of the picture.
        scores: The names of the scores, in percent, and how to call them; the best of the first one is marked.
    """
    from matplotlib.ticker import MaxNLocator

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(record["epoch"], record[key]) for record in history if record.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    figure = new_figure(figsize=(12, 3.8), dpi=120)
    figure.suptitle(title, fontsize=11)
    loss, score, rate = figure.subplots(1, 3)
    for key, where in (("train_loss", "training (augmented)"), ("val_loss", "validation")):
        if series(key)[0]:
            loss.plot(*series(key), marker=".", label=where)
    for name, label in scores.items():
        for split, where in (("train", "training (augmented)"), ("val", "validation")):
            if series(f"{split}_{name}")[0]:
                score.plot(*series(f"{split}_{name}"), marker=".", label=where if len(scores) == 1 else label)
    main, label = next(iter(scores.items()))
    epochs, values = series(f"val_{main}")
    if values:
        best = max(range(len(values)), key=values.__getitem__)
        score.axhline(values[best], color="grey", linewidth=0.8, linestyle=":")
        score.set_title(f"{label}: best {values[best]:.2f} % in epoch {epochs[best]}, last {values[-1]:.2f} %", size=9)
    rate.plot(*series("lr"), marker=".", color="tab:green")
    loss.set_title("loss", size=9)
    rate.set_title("learning rate at the end of the epoch", size=9)
    score.set_ylabel("%")
    for axes in (loss, score, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    loss.legend(fontsize=8)
    if score.lines:
        score.legend(fontsize=8, loc="lower right")
    with atomic(path) as file:
        figure.savefig(file, format="png")


def start_wandb(folder: Path, cfg: DictConfig, run_id: str | None) -> Any:
    """Start (or continue, with its id) the run's record at Weights & Biases; None where it is disabled.

    Raises:
        RunError: it can't start, and `log.wandb=online` asked for it.
    """
    if cfg.log.wandb == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            project=cfg.log.project,
            name=folder.name,
            dir=str(folder),
            mode=cfg.log.wandb,
            id=run_id,
            resume="allow" if run_id else None,
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        if cfg.log.wandb == "online":
            raise RunError(f"wandb can't start ({error}): run `wandb login`, or use log.wandb=offline.") from error
        log.warning("wandb can't start (%s); the run goes on without it.", error)
        return None


def log_pictures(record: Any, paths: list[Path]) -> None:
    """Add pictures to a record of `start_wandb`."""
    import wandb

    record.log({path.stem: wandb.Image(str(path)) for path in paths})
