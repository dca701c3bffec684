"""zoo-predict: predict the content of images with the model of a run.

zoo-predict run=runs/<folder> image.jpg out/       predict one image, or several
zoo-predict run=runs/<folder> photos/ out/         predict the images in a folder and its subfolders
zoo-predict run=runs/<folder> photos/ out/ checkpoint=best score=0.3
                                                   use the best epoch; keep objects with scores of 30 % or more
zoo-predict run=runs/<folder> photos/ out/ temperature=1.3
                                                   use the temperature that zoo-eval printed for a classifier
zoo-predict run=runs/<folder> photos/ out/ eval.resize=false eval.window=[512,512]
                                                   predict large photos in windows, at their own size
zoo-predict run=runs/<folder> photos/ out/ eval.threshold=0.3
                                                   give an image all labels whose probability is 30 % or more

For a classifier, it prints a table and writes three files to the output folder: predictions.csv and predictions.json
(the five most probable classes of each image, with their probabilities) and predictions.png (a sheet of the images with
their classes). If images have several labels, the column `labels` has those that are predicted. For a detector or a
segmentor, it writes a picture for each image. A detector's objects are written to predictions.json, in COCO's format. A
segmentor's labels are written to labels/, as a PNG for each image, with 16 bits if there are more than 256 classes. For
task=panoptic, both are written, in COCO's panoptic format.

Files that can't be read as images are logged and left out; the command then ends with exit code 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zoo.commands import discard_output
from zoo.messages import UserError
from zoo.recipes import cli, early, reading, tasks
from zoo.recipes.commands import arguments
from zoo.recipes.config import InferenceConfig, option


@dataclass
class PredictConfig:
    """The settings of `zoo-predict`."""

    run: str = option("", "run folder")
    checkpoint: str = option("last", "checkpoint of the run: last or best")
    score: float | None = option(
        None, "lowest score of the objects that are drawn and written, 0-1 (detectors only); 0.5 if null"
    )
    temperature: float = option(1.0, "temperature that divides the logits, as zoo-eval fits it (classifiers only)")
    device: str = option("auto", "device: auto, cpu, cuda, cuda:N, mps or xpu")
    overrides: dict[str, Any] = option(dict, "")  # other keys with the values that replace those of the run


# Keys of zoo-eval that affect predictions, by the kind of the run.
_OF_CLASSIFIERS = (
    *("data.max_pixels", "data.img_size", "data.mean", "data.std", "data.interpolation", "data.crop_pct"),
    *("trainer.batch_size", "trainer.amp", "trainer.channels_last", "eval.threshold"),
)
_OF_DETECTORS = (
    *("data.max_pixels", "data.mean", "data.std", "mm"),
    *("dense.scales", "dense.max_size", "dense.size_divisor", "dense.test_divisor"),
    *(f"eval.{item.name}" for item in fields(InferenceConfig) if item.name != "threshold"),
)


def main() -> None:
    """Parse the command line and predict."""
    words = sys.argv[1:]
    cli.begin()
    keys = (*_OF_CLASSIFIERS, *_OF_DETECTORS)
    cli.show_help(lambda: arguments.print_help(__doc__, PredictConfig, keys), needs_words=True)
    cli.refuse_flags("zoo-predict", words, arguments.keys_of(PredictConfig), ())
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
        check_effect(cfg.overrides, name)
        tasks.load(name, "predict").predict(cfg, inputs, out)


def parse(words: list[str]) -> tuple[PredictConfig, list[Path], Path]:
    """Parse the arguments of a command line into settings, images (files and folders) and the output folder.

    Raises:
        UserError: An argument can't be used; the message says why.
    """
    cfg, paths, out = arguments.parse(PredictConfig, words, mappings=("mm",))
    return _checked(cfg), paths, out


def settings(words: Sequence[str]) -> PredictConfig:
    """The settings that the arguments key=value give.

    Raises:
        UserError: An argument can't be used; the message says why.
    """
    return _checked(arguments.settings(PredictConfig, words, mappings=("mm",)))


def _checked(cfg: PredictConfig) -> PredictConfig:
    if not cfg.run:
        raise UserError("run is not set: give the folder of a run, run=runs/<folder>.")
    if not 0 < cfg.temperature < math.inf:
        raise UserError(f"temperature={cfg.temperature} is not allowed: it has to be above 0.")
    if cfg.score is not None and not 0 <= cfg.score <= 1:
        raise UserError(f"score={cfg.score} is not allowed: it has to be between 0 and 1.")
    return cfg


def check_effect(overrides: Iterable[str], task: str) -> None:
    """Refuse keys that do not affect predictions.

    Raises:
        UserError: The message names the key and those that do.
    """
    keys = _OF_CLASSIFIERS if task == "classify" else _OF_DETECTORS
    for key in overrides:
        if key not in keys and key.partition(".")[0] not in keys:
            raise UserError(
                f"{key} does not affect the predictions of a run with task={task}: leave it out. "
                f"These keys do: {', '.join(keys)}."
            )
