"""zoo-predict: what a run's detector or segmentor finds in images.

zoo-predict run=runs/<folder> image.jpg out/       one image, or several
zoo-predict run=runs/<folder> photos/ out/         a folder of images, and those below it
zoo-predict run=runs/<folder> photos/ out/ checkpoint=best score=0.3
                                                   the best epoch's weights; objects of 30 % and more

The output folder gets a picture for each image, and predictions.json (COCO's format; detection) or a PNG of labels for
each image in labels/ (segmentation).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.recipes import cli, config
from zoo.recipes.config import option
from zoo.recipes.errors import RunError


@dataclass
class PredictConfig:
    """`zoo-predict`."""

    run: str = option("", "run folder of a detector or segmentor")
    checkpoint: str = option("last", "checkpoint of the run: last or best")
    score: float = option(0.5, "score from which on an object is drawn and written, 0-1")
    device: str = option("auto", "device: auto, cpu, cuda, cuda:N, mps or xpu")


def main() -> None:
    """Read the command line and predict."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__.strip(), "\n\nKeys (key=value):")
        for item in fields(PredictConfig):
            print(f"  {item.name + '=':<30}{item.metadata['help']}")
        sys.exit(0)
    with cli.friendly_errors("zoo-predict"):
        cfg, inputs, out = parse(words)
        from zoo.recipes import runs
        from zoo.recipes.tasks import task

        runs.start_log(None, True)
        name = runs.load_config(Path(cfg.run)).get("task", "classify")
        if name == "classify":
            raise RunError(f"{cfg.run} is a classifier's run: zoo-predict is for task=detect and task=segment.")
        task(name, "predict").predict(cfg, inputs, out)


def parse(words: list[str]) -> tuple[PredictConfig, list[Path], Path]:
    """The settings, the images (files and folders) and the output folder that the words of a command line name.

    Raises:
        RunError: they do not fit.
    """
    names = [item.name for item in fields(PredictConfig)]
    settings, paths = [], []
    for word in words:
        key = word.partition("=")[0]
        if "=" not in word or Path(word).exists():
            paths.append(Path(word))
        elif key in names:
            settings.append(word)
        else:
            guess = config.nearest(key, names)
            hint = f": did you mean {guess}?" if guess else "."
            raise RunError(f"there is no key {key!r}{hint} There are {', '.join(names)}.")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(PredictConfig), OmegaConf.from_dotlist(settings))
    except OmegaConfBaseException as error:
        raise RunError(f"{' '.join(settings)}: {str(error).splitlines()[0]}.") from error
    if not cfg.run:
        raise RunError("run is not set: give the folder of a run, run=runs/<folder>.")
    if len(paths) < 2:
        raise RunError("give the images (files or folders) and then the output folder.")
    if not 0 <= cfg.score <= 1:
        raise RunError(f"score={cfg.score} is not allowed: it has to be between 0 and 1.")
    return cfg, paths[:-1], paths[-1]


if __name__ == "__main__":
    sys.exit(main())
