"""The weights of a run: writing and reading their files, and the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

import zoo
from zoo.messages import UserError, one_line
from zoo.recipes import config, reading
from zoo.recipes.atomic_files import atomic
from zoo.recipes.logs import log
from zoo.recipes.run_checkpoints import last_checkpoint


def save_weights(path: Path, weights: dict[str, torch.Tensor], model: str, classes: Sequence[str]) -> None:
    """Write `weights` as safetensors, atomically. The metadata names the model and the classes."""
    metadata = {"format": "pt", "model": model, "classes": json.dumps(list(classes)), "zoo": zoo.__version__}
    with atomic(path) as file:
        file.write(to_safetensors(weights, metadata))


class _Weights(TypedDict):
    model: dict[str, torch.Tensor]


class _Training(_Weights, total=False):
    """The weights in a checkpoint."""

    ema: dict[str, torch.Tensor] | None


def load_weights(folder: Path, which: str) -> tuple[dict[str, torch.Tensor], list[str], Path]:
    """The weights of a run, the names of its classes, and the file that holds them.

    Args:
        folder: The run folder.
        which: `best`, or `last`: the final weights, or those of the last checkpoint if the run is not finished.

    Raises:
        UserError: There are no such weights, or they can't be read.
    """
    path = folder / ("best.safetensors" if which == "best" else "model.safetensors")
    if not path.is_file():
        state, path, damage = last_checkpoint(folder)
        if damage:
            log.warning("%s", damage)
        training = state.get("training", state)  # a detector's state has its weights at the top
        reading.check(training, _Training, path)
        classes = reading.check(state["identity"].get("classes"), list[str], f"{path}: its list of classes")
        return training.get("ema") or training["model"], classes, path
    try:
        with safe_open(path, framework="pt") as opened:
            classes = reading.check(json.loads((opened.metadata() or {})["classes"]), list[str], "its list of classes")
        return load_file(path), classes, path
    except (SafetensorError, OSError, UserError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}): delete it, and last.pt is read instead.") from error


def load_model(
    cfg: DictConfig,
    overridden: Sequence[str],
    check: Callable[[DictConfig], None],
    build: Callable[[DictConfig, list[str]], nn.Module],
) -> tuple[nn.Module, DictConfig, list[str], str]:
    """Load the model of the run `cfg.run`.

    Returns the model, its configuration with the user's changes, its classes, and the file of its weights.

    Args:
        cfg: The composed configuration of an evaluation.
        overridden: The keys and groups that the user set; others come from the run.
        check: Checks the configuration.
        build: Builds the model for a configuration and classes.

    Raises:
        UserError: There is no such run, or its weights can't be read or do not fit.
    """
    folder = Path(cfg.run)
    cfg = config.of_run(cfg, reading.load_config(folder), overridden)
    check(cfg)
    _check_probe(folder, cfg)
    weights, classes, path = load_weights(folder, cfg.checkpoint)
    model = build(cfg, classes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit {cfg.model}: {one_line(error, 400)}.") from error
    return model, cfg, classes, str(path)


def _check_probe(folder: Path, cfg: DictConfig) -> None:
    """Refuse weights that the run of a probe does not have: it has those of its end, unless it is of k-NN."""
    if cfg.probe.kind == "none":
        return
    if cfg.probe.kind == "knn":
        raise UserError(f"{folder} is a run of probe=knn, which has no weights: give one of probe=linear or probe=ep.")
    if cfg.checkpoint == "best":
        raise UserError(f"{folder} is a run of a probe, which has no best epoch: leave out checkpoint=best.")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} is a run of a probe that did not end: start it again with its command.")


def prediction_config(settings: Any) -> tuple[DictConfig, list[str]]:
    """The configuration of an evaluation that `load_model` needs, and the keys that the user set.

    Args:
        settings: A `PredictConfig`.

    Raises:
        UserError: A value is of the wrong type.
    """
    cfg = config.defaults(config.EvalConfig)
    cfg.run, cfg.checkpoint = settings.run, settings.checkpoint
    for key, value in settings.overrides.items():
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={value}: {str(error).splitlines()[0]}.") from error
    return cfg, list(settings.overrides)
