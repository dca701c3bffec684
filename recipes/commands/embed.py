"""zoo-embed: write the features of images, one row for each, with a frozen model.

zoo-embed model=van_b0 pretrained=true photos/ out/  pooled features with published weights
zoo-embed run=runs/<folder> photos/ more/1.jpg out/  with the classifier of a run, of several folders and files
zoo-embed run=runs/<folder> photos/ out/ features=map
                                                   the last feature maps, before pooling
zoo-embed run=runs/<folder> photos/ out/ format=parquet
                                                   a Parquet file too (with pyarrow); also format=safetensors

The output folder gets features.npy (numbers as float32, a row for each image), names.csv (the file of each row) and
embed.json (the model, its weights and the preprocessing). Images are preprocessed as for an evaluation of the model.

The same command goes on after Ctrl-C or a crash, and adds images that are new or have changed; rows of other images
stay. Features of another model, of other weights or with another preprocessing are refused.

Files that can't be read as images are logged and left out; the command then ends with exit code 1.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.commands import discard_output
from zoo.messages import UserError
from zoo.recipes import cli, early, reading, tasks
from zoo.recipes.commands import arguments
from zoo.recipes.config import option

KINDS = ("pooled", "map")
FORMATS = ("npy", "parquet", "safetensors")


@dataclass
class EmbedConfig:
    """The settings of `zoo-embed`."""

    run: str = option("", "run folder of a classifier")
    checkpoint: str = option("last", "checkpoint of the run: last or best")
    model: str = option("", "in place of a run: any name that timm.create_model takes, with or without a tag")
    pretrained: Any = option(False, "weights of model=: true (the published ones), a checkpoint or a run folder")
    features: str = option("pooled", "features: pooled (a vector for each image) or map (the last feature map)")
    format: str = option("npy", "format: npy; parquet or safetensors for a file of this kind too")
    device: str = option("auto", "device: auto, cpu, cuda, cuda:N, mps or xpu")
    overrides: dict[str, Any] = option(dict, "")  # other keys with the values that replace those of the run


# Keys of zoo-eval that affect features.
_KEYS = (
    *("data.max_pixels", "data.img_size", "data.mean", "data.std", "data.interpolation", "data.crop_pct"),
    *("data.num_workers", "trainer.batch_size", "trainer.amp", "trainer.channels_last", "model_kwargs"),
)


def main() -> None:
    """Parse the command line and embed."""
    words = sys.argv[1:]
    cli.begin()
    cli.show_help(lambda: arguments.print_help(__doc__, EmbedConfig, _KEYS), needs_words=True)
    cli.refuse_flags("zoo-embed", words, arguments.keys_of(EmbedConfig), ())
    with cli.friendly_errors("zoo-embed"):
        cfg, paths, out = parse(words)
        _check_model(cfg)
        early.check_folder(out, "the output folder")
        from zoo.recipes.inputs import Inputs

        inputs = Inputs(paths, out)
        from zoo.recipes import logs

        logs.start_log(None, True)
        logs.console.on_broken_pipe = discard_output  # the files are written even if nothing reads the output
        tasks.load("classify", "embed").embed(cfg, inputs, out)


def parse(words: list[str]) -> tuple[EmbedConfig, list[Path], Path]:
    """Parse the arguments of a command line into settings, images (files and folders) and the output folder.

    Raises:
        UserError: An argument can't be used; the message says why.
    """
    cfg, paths, out = arguments.parse(EmbedConfig, words, mappings=("model_kwargs",))
    if str(cfg.pretrained).lower() in ("true", "false"):
        cfg.pretrained = str(cfg.pretrained).lower() == "true"
    for key, allowed in (("features", KINDS), ("format", FORMATS)):
        if cfg[key] not in allowed:
            raise UserError(
                f"{key}={cfg[key]} is not allowed: it has to be {', '.join(allowed[:-1])} or {allowed[-1]}."
            )
    if cfg.run and cfg.model:
        raise UserError(f"run={cfg.run} and model={cfg.model} are both given: leave out one of them.")
    if not cfg.run and not cfg.model:
        raise UserError(
            "nothing says which model: give run=<folder of a run>, or model=<name> with pretrained=true or =<file>."
        )
    if cfg.run and (cfg.pretrained or any(key.startswith("model_kwargs") for key in cfg.overrides)):
        key = "pretrained" if cfg.pretrained else "model_kwargs"
        raise UserError(f"{key} is for model=, but {cfg.run} is a run, with its own: leave it out.")
    for key in cfg.overrides:
        if key not in _KEYS and not key.startswith("model_kwargs."):
            raise UserError(f"{key} does not affect features: leave it out. These keys do: {', '.join(_KEYS)}.")
    if cfg.format == "parquet" and find_spec("pyarrow") is None:
        raise UserError("format=parquet needs pyarrow: run pip install pyarrow, or leave it out for a .npy file.")
    return cfg, paths, out


def _check_model(cfg: EmbedConfig) -> None:
    """Refuse a run, a model or weights that do not exist, and weights that are random."""
    if cfg.run:
        early.check_run(Path(cfg.run))
        task = reading.load_config(Path(cfg.run)).get("task", "classify")
        if task != "classify":
            raise UserError(f"{cfg.run} is a run of task={task}: give that of a classifier, or model=<name>.")
        return
    if os.path.isdir(cfg.model):
        raise UserError(f"model={cfg.model} is a folder: write run={cfg.model}.")
    early.check_model(cfg.model)
    early.check_pretrained(cfg.pretrained)
    if not cfg.pretrained:
        raise UserError(
            f"model={cfg.model} alone has random weights, whose features mean nothing: add pretrained=true for the "
            "published ones, or pretrained=<checkpoint or run folder>."
        )
