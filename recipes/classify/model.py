"""The model of a classifier: creating it, and its input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from timm.data import resolve_model_data_config
from timm.models._hub import save_config_for_hf  # its public sibling, save_for_hf, also writes the weights
from torch import nn

from zoo.backbone import Backbone
from zoo.efficient_probing import probing_head
from zoo.messages import UserError, one_line
from zoo.opening import open_model
from zoo.recipes.atomic_files import atomic
from zoo.recipes.config import Config, DataConfig


def build_model(
    cfg: Config, num_classes: int | None, in_chans: int | None = None, new_classifier: bool = False
) -> nn.Module:
    """Create `cfg.model`, with the weights that `cfg.pretrained` names.

    Args:
        cfg: The configuration.
        num_classes: Size of the classifier; that of the weights if None.
        in_chans: Channels of the input; those of the model if None.
        new_classifier: Whether the classifier of the weights is not loaded, even if it has `num_classes` classes.

    Raises:
        UserError: There is no such model, argument, file or tag.
    """
    given = {"num_classes": num_classes, "in_chans": in_chans}
    kwargs = dict(cfg.model_kwargs) | {name: value for name, value in given.items() if value is not None}
    opened = open_model(cfg.model, cfg.pretrained, size=cfg.data.img_size, new_classifier=new_classifier, **kwargs)
    return opened.model.train()


def input_config(model: nn.Module, cfg: DataConfig) -> dict[str, Any]:
    """timm's data configuration of `model` (input_size, mean, std, ...), with the overrides in the data section `cfg`.

    Raises:
        UserError: The mean or the standard deviation has another number of channels than the model, or the model does
            not take images of `cfg.img_size`.
    """
    names = ("img_size", "mean", "std", "interpolation", "crop_pct")
    overrides = {name: cfg[name] for name in names if cfg[name] is not None}
    if cfg.name in ("digits", "digit_crops"):
        overrides.setdefault("crop_pct", 1.0)  # digits reach the edge
    channels = getattr(model, "in_chans", model.pretrained_cfg["input_size"][0])
    for name in ("mean", "std"):
        if len(overrides.get(name, [0])) not in (1, channels):
            raise UserError(
                f"data.{name}={list(overrides[name])} has {len(overrides[name])} numbers, but the model takes "
                f"{channels} channels: give one number, or one per channel."
            )
    config = resolve_model_data_config(model, args={**overrides, "in_chans": channels})
    config["input_size"] = (channels, *config["input_size"][1:])
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    if cfg.img_size is not None:
        _check_size(model, config["input_size"])
    return config


def write_description(
    folder: Path, model: nn.Module, cfg: Config, classes: Sequence[str], data_config: dict[str, Any]
) -> None:
    """Write `config.json`: what `timm.create_model("local-dir:<folder>")` needs besides the weights.

    Efficient probing on one of timm's models is not an argument of timm: its number of queries is written beside those,
    for `open_model`.
    """
    head = None if isinstance(model, Backbone) else probing_head(model)
    arguments = OmegaConf.to_container(cfg.model_kwargs)
    if head:
        arguments.pop("global_pool")
    about = {"label_names": list(classes)} | ({"efficient_probing": head.pool.num_queries} if head else {})
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    with atomic(folder / "config.json") as file:
        save_config_for_hf(
            model,
            file.name,
            model_config=about,
            model_args=arguments,
            data_config={name: data_config[name] for name in names},
        )


def _check_size(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Run the model on an image: only this shows whether a model with a minimum or a fixed size takes it."""
    training, weight = model.training, next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(weight.new_zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"data.img_size={input_size[1]} can't be used with this model: {one_line(first)}.") from error
    finally:
        model.train(training)
