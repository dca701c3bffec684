"""Run folders: their locks and their files.

config.yaml          the whole configuration
start.json           command, data, and the settings of the recipe before the user's changes
train.log            what was printed
last.pt              everything needed to continue
previous.pt          the checkpoint before it; used if last.pt is damaged
best.safetensors     weights of the best epoch so far
metrics.jsonl        one line per epoch
metrics.csv          the same as a table (log.csv)
tensorboard/         the same for TensorBoard (log.tensorboard)
curves.png           the same as a plot
classes.json         the last evaluation by class
predictions.png      samples of the validation split
model.safetensors    the final weights and
config.json          their description: timm.create_model("local-dir:<run folder>") loads them
summary.json         the figures
report.html          all of it on one page
.lock                names the process that is writing to the folder
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo.messages import UserError
from zoo.recipes import distributed, early
from zoo.recipes.atomic_files import finite, write_text
from zoo.recipes.lock import Lock
from zoo.recipes.logs import log


def safe_name(name: str) -> str:
    """`name` with only the characters that are safe in the name of a folder."""
    return "".join(c if c.isalnum() or c in "._-=" else "-" for c in name).strip("-.")[:100]


@contextmanager
def locked_folder(folder: Path | None, prefix: str = "", name: str = "", key: str | None = "run") -> Iterator[Path]:
    """Create a folder if necessary and lock it, so that no other process writes to it (`Lock`).

    The first process of a run does so for all of them. A new folder is removed again if nothing was written to it.

    Args:
        folder: The folder; None for a new one below runs/, named by `prefix`, date, time and `name`.
        prefix: The beginning of a new folder's name.
        name: The end of a new folder's name.
        key: The setting that chooses another folder, for messages; None if it is an argument without a key.

    Raises:
        UserError: It can't be written to, or another process has locked it.
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
                with suppress(OSError):  # raised if something is in the folder
                    path.rmdir()


def default_folder(prefix: str, name: str) -> Path:
    """Create a new folder below runs/, named by `prefix`, date, time and `name`; no other process gets the same one.

    Raises:
        UserError: It can't be created.
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
            raise UserError(
                f"the folder {folder} can't be created ({error.strerror}): choose another with run=<folder>."
            ) from error


def make_folder(folder: Path, key: str | None = "run") -> None:
    """Create `folder` and check that it can be written to.

    `key` is the setting that names it; None if it is an argument without a key.

    Raises:
        UserError: It can't be created or written to.
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
        raise UserError(f"the folder {folder} can't be written to ({error.strerror}): choose another{way}.") from error


def warn_unwritable(folder: Path) -> None:
    """Warn before a long evaluation that `folder` can't be written to: the figures will only be printed."""
    try:
        early.check_folder(folder, "out")
    except UserError as error:
        log.warning("%s The figures will be printed only.", error)


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Write the resolved configuration."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `metrics.jsonl`, one line per epoch.

    The whole file is written every time, so that no epoch is in it twice after a run is resumed.
    """
    write_text(folder / "metrics.jsonl", _lines(history))


def has_metrics(folder: Path, history: list[dict[str, Any]]) -> bool:
    """Whether `metrics.jsonl` is what `write_metrics` writes for `history`."""
    path = folder / "metrics.jsonl"
    return path.is_file() and path.read_bytes() == _lines(history).encode()


def write_table(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `metrics.csv`, like `write_metrics`: a row per epoch, and a column per name, such as step_seconds.forward.

    What an epoch does not have, such as scores without an evaluation, is left empty.
    """
    rows = [_flat(finite(record)) for record in history]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "metrics.csv", text.getvalue())


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    nested = {name: value if isinstance(value, dict) else {"": value} for name, value in record.items()}
    return {f"{name}.{part}".rstrip("."): value for name, parts in nested.items() for part, value in parts.items()}


def _lines(history: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(finite(record)) + "\n" for record in history)


def write_classes(
    folder: Path,
    classes: Sequence[str],
    scores: dict[str, list[float | None]],
    counts: Sequence[int],
    unit: str,
    confusion: list[list[int]] | None = None,
) -> None:
    """Write `classes.json`: an evaluation by class.

    Args:
        folder: The folder of the run or the evaluation.
        classes: The names of the classes.
        scores: For each score, its value for each class in percent; None where there is no value.
        counts: How many images, objects or pixels of each class were evaluated.
        unit: What is counted: images, objects or pixels.
        confusion: [true label, predicted label, count] for all pairs that occur.
    """
    content = {"classes": list(classes), "scores": scores, "counts": list(counts), "unit": unit, "confusion": confusion}
    write_text(folder / "classes.json", json.dumps(finite(content)) + "\n")
