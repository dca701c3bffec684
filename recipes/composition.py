"""The starting point of a run: the command line, and the settings of its recipe before the user's changes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from zoo.recipes import cli, config

_called: list[str] | None = None


@contextmanager
def called(command: str, words: Sequence[str]) -> Iterator[None]:
    """Within this context, a program has called what `command` does with the arguments `words`."""
    global _called
    before, _called = _called, [command, *words]
    try:
        yield
    finally:
        _called = before


def command_line() -> str:
    """The command line of this process, or the one that does the same as the program's call, quoted for a shell."""
    if _called:
        return shlex.join(_called)
    name = Path(sys.argv[0]).name
    if name in ("train.py", "eval.py", "predict.py"):
        name = f"python -m zoo.recipes.{Path(name).stem}"
    return shlex.join([*shlex.split(name), *sys.argv[1:]])


def more_may_follow() -> bool:
    """Whether other work may follow in this process: a program called this run, or it is one of a sweep."""
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return bool(_called) or sweep


def recipe(task: str) -> tuple[str, dict[str, Any]]:
    """The arguments of this process that choose the task and the recipe, and the settings that result from them."""
    words = tuple(word for word in _arguments() if word.lstrip("+").partition("=")[0] in ("task", "recipe"))
    settings = composed(words)
    if settings["task"] != task:  # this run was started by another run
        words = (f"task={task}",)
        settings = composed(words)
    return " ".join(words), settings


def overridden() -> list[str]:
    """The keys and groups that the arguments of this process, or of the program's call, set."""
    return [word.partition("=")[0].lstrip("+") for word in _arguments()]


def _arguments() -> list[str]:
    if _called:
        return _called[1:]
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    """The settings that result from these arguments of a command line."""
    return OmegaConf.to_container(compose("config", words), resolve=True)


def compose(name: str, words: Sequence[str]) -> DictConfig:
    """The configuration that results from the arguments `words`; `name` is the file in `conf` with the defaults.

    Hydra is left as it is found: a program may use it for a configuration of its own.
    """
    config.register()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(cli.CONF, version_base="1.3"):
            return hydra.compose(name, list(words))
    finally:
        GlobalHydra.instance().hydra = before


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with dotted keys."""
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
