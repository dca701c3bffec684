"""zoo-predict: predict the content of images with the model of a run.

zoo-predict run=runs/<folder> image.jpg out/       predict one image, or several
zoo-predict run=runs/<folder> photos/ out/         predict the images in a folder and its subfolders
zoo-predict run=runs/<folder> photos/ out/ checkpoint=best score=0.3
                                                   use the best epoch; keep objects with scores of 30 % or more

For a classifier, it prints a table and writes three files to the output folder: predictions.csv and predictions.json
(the five most probable classes of each image, with their probabilities) and predictions.png (a sheet of the images with
their classes). For a detector or a segmentor, it writes a picture for each image. A detector's objects are written to
predictions.json, in COCO's format. A segmentor's labels are written to labels/, as a PNG for each image, with 16 bits
if there are more than 256 classes.

Files that can't be read as images are logged and left out; the command then ends with exit code 1.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.commands import discard_output
from zoo.messages import UserError, did_you_mean
from zoo.recipes import cli, early, reading, tasks
from zoo.recipes.config import option


@dataclass
class PredictConfig:
    """The settings of `zoo-predict`."""

    run: str = option("", "run folder")
    checkpoint: str = option("last", "checkpoint of the run: last or best")
    score: float | None = option(
        None, "lowest score of the objects that are drawn and written, 0-1 (detectors only); 0.5 if null"
    )
    device: str = option("auto", "device: auto, cpu, cuda, cuda:N, mps or xpu")


_KEYS = [item.name for item in fields(PredictConfig)]


def main() -> None:
    """Parse the command line and predict."""
    words = sys.argv[1:]
    cli.begin()
    cli.show_help(_print_help, needs_words=True)
    cli.refuse_flags("zoo-predict", words, _KEYS, ())
    with cli.friendly_errors("zoo-predict"):
        cfg, paths, out = parse(words)
        early.check_run(Path(cfg.run))
        early.check_folder(out, "the output folder")
        from zoo.recipes.inputs import Inputs

        inputs = Inputs(paths, out)
        from zoo.recipes import logs

        logs.start_log(None, True)
        logs.console.on_broken_pipe = discard_output  # the files are written even if nothing reads the output
        name = reading.load_config(Path(cfg.run)).get("task", "classify")
        tasks.load(name, "predict").predict(cfg, inputs, out)


def _print_help() -> None:
    print(__doc__.strip(), "\n\nKeys with their defaults (key=value):")
    for name, help, default in cli.defaults(PredictConfig):
        cli.print_entry(f"{name}={default}", help, 20)


def parse(words: list[str]) -> tuple[PredictConfig, list[Path], Path]:
    """Parse the arguments of a command line into settings, images (files and folders) and the output folder.

    Raises:
        UserError: An argument can't be used; the message says why.
    """
    cfg, paths = OmegaConf.structured(PredictConfig), []
    for word in words:
        key, _, value = word.partition("=")
        if "=" not in word or os.path.lexists(word) or not key.isidentifier():
            paths.append(Path(word))
        elif key in _KEYS:
            try:
                cfg[key] = None if value == "null" else cli.home(value)
            except OmegaConfBaseException as error:
                raise UserError(f"{word}: {str(error).splitlines()[0]}.") from error
        else:
            hint = did_you_mean(key, _KEYS, cutoff=0.5)
            hint = f": {hint}" if hint else "."
            raise UserError(f"there is no key {key!r}{hint} There are {', '.join(_KEYS)}; for a file, write ./{word}.")
    if not cfg.run:
        raise UserError("run is not set: give the folder of a run, run=runs/<folder>.")
    if len(paths) < 2:
        raise UserError("give the images (files or folders) and then the output folder.")
    if cfg.score is not None and not 0 <= cfg.score <= 1:
        raise UserError(f"score={cfg.score} is not allowed: it has to be between 0 and 1.")
    if cfg.checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint={cfg.checkpoint} is not allowed: it has to be last or best.")
    return cfg, paths[:-1], paths[-1]


if __name__ == "__main__":
    main()
