"""What commands load: a model by its name or from a run folder, with or without weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg, split_model_name_tag
from torch import nn

from zoo import checkpoints
from zoo.tools.cli import ToolError


class OptionError(ToolError):
    """Options that contradict each other."""


@dataclass
class Loaded:
    """A model in eval mode, its name and weights for captions, and timm's data configuration of it.

    `fixed` says whether it takes images of one size only.
    """

    model: nn.Module
    name: str
    weights: str
    config: dict[str, Any]
    fixed: bool


def load(
    name: str,
    pretrained: bool | str = False,
    *,
    features: bool = False,
    num_classes: int | None = None,
    size: Sequence[int] | None = None,
    checkpoint: str = "last",
) -> Loaded:
    """The model `name`: one that timm.create_model takes, or the folder of a classifier's finished run.

    Args:
        name: Of timm, with or without tag; "hf-hub:..."; or a folder with config.json and model.safetensors.
        pretrained: With the published weights, or those of this file.
        features: Make it a model that gives the feature maps of all stages.
        num_classes: Of the classifier, if it is not to be that of the weights.
        size: Height and width of the images, for models that are made for one size.
        checkpoint: Of a run folder: the weights of its "last" epoch, model.safetensors, or of its "best".

    Raises:
        ToolError: there is no such model, file or weights, or they do not fit together.
    """
    folder = Path(name)
    source, label, weights, config, fixed = name, name.rpartition("/")[2], "random weights", None, False
    kwargs: dict[str, Any] = {"features_only": True} if features else {}
    if folder.is_dir() and not timm.is_model(name):
        if not all((folder / file).is_file() for file in ("config.json", "model.safetensors")):
            raise ToolError(
                f"{name} has no config.json and model.safetensors: give the folder of a classifier's finished run."
            )
        for option, given in (("--pretrained", pretrained), ("--num-classes", num_classes is not None)):
            if given:
                raise OptionError(
                    f"got {option} with a run folder, which has its own weights and classes: leave it out."
                )
        source, label, weights = f"local-dir:{name}", folder.resolve().name, "its last weights"
        kwargs["pretrained"] = True
        if checkpoint == "best":
            best = folder / "best.safetensors"
            if not best.is_file():
                raise ToolError(f"{name} has no best.safetensors: its last weights are its only ones.")
            weights = "its best weights"
            kwargs["pretrained_cfg_overlay"] = {"source": "", "file": str(best), "custom_load": False}
        fixed = _described(folder / "config.json").get("fixed_input_size", False)
    elif checkpoint != "last":
        raise OptionError(f"got --checkpoint {checkpoint} with {name}, which is no run folder: leave it out.")
    elif ":" not in name:  # else of the Hugging Face hub
        _check_name(name)
        config = timm.get_pretrained_cfg(split_model_name_tag(name)[0])
        fixed = bool(config and config.fixed_input_size)
    elif isinstance(pretrained, str):
        raise OptionError(f"got --pretrained {pretrained} with {name}, which has its own weights: give no file.")
    if pretrained:
        kwargs["pretrained"], weights = True, "published weights"
    if isinstance(pretrained, str):
        kwargs |= _own_weights(Path(pretrained), config)
        weights = f"weights of {Path(pretrained).name}"
    if num_classes is not None and not features:
        kwargs["num_classes"] = num_classes
    if fixed and size:
        kwargs["img_size"] = tuple(size)
    try:
        checkpoints.check_network(source, bool(pretrained) and not isinstance(pretrained, str))
        model = timm.create_model(source, **kwargs).eval()
    except Exception as error:  # of the many things that timm, a download or a file can raise
        using = f" with {pretrained if isinstance(pretrained, str) else 'the published weights'}" if pretrained else ""
        raise ToolError(f"{name} can't be made{using}: {reason(error)}.") from error
    return Loaded(model, label, weights, resolve_model_data_config(model), fixed)


def _described(path: Path) -> dict[str, Any]:
    """What a run's config.json says of its model's input."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ToolError(f"{path} can't be read ({reason(error)}): train the model again, or write it anew.") from error
    found = content.get("pretrained_cfg") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not isinstance(content.get("architecture"), str):
        raise ToolError(f"{path} is not the description of a model: it names no architecture and pretrained_cfg.")
    return found


def _check_name(name: str) -> None:
    if "/" in name or name.startswith("."):
        raise ToolError(f"there is no folder {name}: give the folder of a finished run, or a model's name.")
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "zoo-models lists zoo's, timm.list_models() all."
        raise ToolError(f"there is no model {architecture}: {hint}")
    full = timm.list_models(f"{architecture}*", include_tags=True)
    tags = [other_tag for other, other_tag in map(split_model_name_tag, full) if other == architecture and other_tag]
    if tag and tag not in tags:
        raise ToolError(f"{architecture} has no weights {tag}: it has {', '.join(tags) or 'none'}.")


def _own_weights(file: Path, config: PretrainedCfg | None) -> dict[str, Any]:
    """Keywords that have timm load `file`, with as many classes as it has."""
    try:
        overlay, classes = checkpoints.file_overlay(file, config)
    except FileNotFoundError:
        raise ToolError(
            f"there is no file {file}: --pretrained takes a checkpoint, or nothing for published weights."
        ) from None
    except (ValueError, OSError) as error:
        raise ToolError(f"{file} can't be read as a checkpoint: {reason(error)}.") from error
    return {"pretrained_cfg_overlay": overlay} | ({} if classes is None else {"num_classes": classes})


def reason(error: BaseException) -> str:
    """The beginning of what `error` says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 600 else f"{text[:600]} ...").rstrip(".")
