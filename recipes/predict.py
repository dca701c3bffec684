"""zoo-predict: what a run's model sees in images.

zoo-predict run=runs/<folder> image.jpg out/       one image, or several
zoo-predict run=runs/<folder> photos/ out/         a folder of images, and those below it
zoo-predict run=runs/<folder> photos/ out/ checkpoint=best score=0.3
                                                   the best epoch's weights; objects of 30 % and more

Of a classifier's run a table is printed, and the output folder gets predictions.csv and predictions.json (the first
five classes of every image with their probabilities) and predictions.png (a sheet of the images with their classes).
Of a detector's or segmentor's run it gets a picture for each image, and predictions.json (COCO's format; detection) or
a PNG of labels for each image in labels/ (segmentation; 16 bits if there are more than 256 classes).

Files that can't be read as images are named and left out; the command then ends with exit code 1.
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
    """`zoo-predict`."""

    run: str = option("", "run folder")
    checkpoint: str = option("last", "checkpoint of the run: last or best")
    score: float | None = option(
        None, "score from which on an object is drawn and written, 0-1 (detectors only); 0.5 if null"
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
    """Parse the words of a command line into settings, images (files and folders) and the output folder.

    Raises:
        UserError: A word can't be used; the message says why.
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
            raise UserError(f"there is no key {key!r}{hint} There are {', '.join(_KEYS)}; a file is ./{word}.")
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
