"""Sweeps (-m): run folders named by what varies, and a table of all runs at the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from zoo.messages import one_line
from zoo.recipes.errors import NoEffect
from zoo.recipes.tasks import SCORES

PRIMARY = os.environ.get("RANK", "0") == "0"  # under torchrun, only one process names folders and prints


def varied(overrides: Sequence[str], asked: Sequence[str]) -> dict[str, str]:
    """The values, by key, in which a run of a sweep differs from the others.

    Args:
        overrides: The overrides of the run.
        asked: The arguments of the sweep. Keys that none of them sets to a single value are chosen by Hydra's sweeper.
    """
    fixed = {word.key_or_group for word in _parsed(asked) if not word.is_sweep_override()}
    own = _parsed(overrides)
    return {word.key_or_group: _text(word.value()) for word in own if word.key_or_group not in fixed}


def _text(value: Any) -> str:
    """A value as a user types it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _parsed(words: Sequence[str]) -> list[Override]:
    """The overrides in the arguments `words`."""
    return OverridesParser.create().parse_overrides([word for word in words if "=" in word and word[0] != "-"])


def has_effect(error: NoEffect, asked: Sequence[str]) -> bool:
    """Whether the key of `error`, which has no effect in the present run of a sweep, has one in another run of it.

    Args:
        error: What the present run raised.
        asked: The arguments of the sweep. They have to set the key, to a single value.
    """
    words = [word for word in _parsed(asked) if not word.key_or_group.startswith("hydra")]
    if [word.is_sweep_override() for word in words if word.key_or_group == error.key] != [False]:
        return False
    try:
        [runs] = BasicSweeper.split_arguments(words, None)
        return any(error.allows(OmegaConf.select(_composed(run), error.other)) for run in runs)
    except (HydraException, OmegaConfBaseException):  # another sweeper, or a run that fails
        return False


def without(key: str, cfg: DictConfig) -> DictConfig:
    """The configuration of the present run, without the override of `key`, in its folder."""
    overrides = HydraConfig.get().overrides
    with read_write(overrides):
        overrides.task = [word for word in overrides.task if word.partition("=")[0].lstrip("+") != key]
    found = _composed([word for word in overrides.task if not word.startswith("hydra")])
    for name in ("run", "out"):
        if name in cfg:
            found[name] = cfg[name]
    return found


def _composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration that a run of this sweep has with other overrides."""
    return hydra.compose(HydraConfig.get().job.config_name, list(overrides))


def name_folder(cfg: DictConfig, asked: Sequence[str]) -> list[str]:
    """Name the output folder of a run by what varies, unless the user named it; returns the override as a list."""
    from zoo.recipes import run_folder

    key = "out" if "out" in cfg else "run"
    if cfg[key] or not PRIMARY:
        return []
    values = varied(HydraConfig.get().overrides.task, asked)
    label = "-".join(f"{name}={value}" for name, value in values.items() if name not in ("model", "run"))
    if key == "run" or not cfg.run:
        cfg[key] = str(run_folder.default_folder("eval-" if key == "out" else "", f"{cfg.model}-{label}"))
    elif label:
        cfg.out = str(Path(cfg.run, run_folder.safe_name(f"eval-{label}")))
    return [f"{key}={cfg[key]}"] if cfg[key] else []


def discard_folder(cfg: DictConfig) -> None:
    """Remove the folder of a run that failed before it wrote anything."""
    with suppress(OSError):  # it is not empty
        Path(cfg.get("out") or cfg.run or "").rmdir()


class Sweep(Callback):
    """Collects the runs of a sweep in this process, and prints a table of them at the end."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.runs: list[tuple[dict[str, str], Path, Any]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the arguments of the sweep."""
        self.asked = list(config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember a run."""
        if config.hydra.mode == RunMode.MULTIRUN:
            folder = job_return.cfg.get("out") or job_return.cfg.run or ""
            values = varied(config.hydra.overrides.task, self.asked)
            self.runs.append((values, Path(folder), job_return.return_value))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print a table of the runs, with the best one marked, and exit with 1 if one failed."""
        if not self.runs or not PRIMARY:
            return
        from rich.console import Console

        done = [str(folder) for _, folder, result in self.runs if isinstance(result, dict)]
        # Lines are folded to fit a terminal; in a file, they may be long.
        Console(width=None if sys.stdout.isatty() else 240).print(_table(self.runs))
        failed = [(folder, error) for _, folder, error in self.runs if not isinstance(error, dict)]
        if len(done) > 1:
            print(f"Side by side: {shlex.join(['zoo-report', *done])}")
        if failed:
            print(f"{len(failed)} of {len(self.runs)} runs failed.", file=sys.stderr)
            sys.exit(1)


def _classes(result: dict[str, Any]) -> int:
    """The number of classes of a training, or of an evaluation with scores by class; 0 if it is not known."""
    number = result.get("classes", result.get("per_class", ()))
    return number if isinstance(number, int) else len(number)


def _table(jobs: Sequence[tuple[dict[str, str], Path, Any]]) -> Any:
    """A row for each run: what varies, the scores in percent or the error, and the folder."""
    from rich.table import Table
    from rich.text import Text

    keys = list(dict.fromkeys(key for values, _, _ in jobs for key in values))
    results = [result for _, _, result in jobs if isinstance(result, dict)]
    names = {name: title for result in results[:1] for name, title in SCORES[result["task"]].items()}
    names = {name: title for name, title in names.items() if any(name in result["metrics"] for result in results)}
    if all(0 < _classes(result) <= 5 for result in results):
        names.pop("top5", None)  # it is 100 %
    main = next(iter(names), None)
    figures = [result["metrics"].get(main) or 0.0 for result in results]
    best = results[figures.index(max(figures))] if main and len(results) > 1 else None
    table = Table(*keys, *(f"{title} %" for title in names.values()), box=None, header_style="bold", pad_edge=False)
    table.add_column("folder", overflow="fold")
    for values, folder, result in jobs:
        row = [values.get(key, "") for key in keys]
        if isinstance(result, dict):
            shown = [result["metrics"].get(name) for name in names]
            row += ["" if figure is None else f"{figure:.2f}" for figure in shown]
            if result is best:
                row[len(keys)] += " best"
            row.append(str(folder))
        else:
            row += [*["-"] * len(names), f"failed: {one_line(result)}."]
        table.add_row(*map(Text, row), style="bold" if result is best else None)
    return table
