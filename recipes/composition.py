"""The starting point of a run: the command line, and the settings of its recipe before the user's changes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from zoo.recipes import cli, config


def command_line() -> str:
    """The command line of this process, quoted for a shell."""
    name = Path(sys.argv[0]).name
    if name in ("train.py", "eval.py", "predict.py"):
        name = f"python -m zoo.recipes.{Path(name).stem}"
    return shlex.join([*shlex.split(name), *sys.argv[1:]])


def recipe(task: str) -> tuple[str, dict[str, Any]]:
    """The arguments of this process that choose the task and the recipe, and the settings that result from them."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    words = tuple(word for word in words if word.lstrip("+").partition("=")[0] in ("task", "recipe"))
    settings = composed(words)
    if settings["task"] != task:  # this run was started by another run
        words = (f"task={task}",)
        settings = composed(words)
    return " ".join(words), settings


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    """The settings that result from these arguments of a command line."""
    config.register()
    if GlobalHydra.instance().is_initialized():
        cfg = hydra.compose("config", list(words))
    else:
        with hydra.initialize_config_dir(cli.CONF, version_base="1.3"):
            cfg = hydra.compose("config", list(words))
    return OmegaConf.to_container(cfg, resolve=True)


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with dotted keys."""
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
