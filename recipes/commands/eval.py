"""zoo-eval: evaluate the model of a run, or a classifier by name.

zoo-eval runs/<folder>                             evaluate a run on its validation images
zoo-eval runs/<folder> checkpoint=best data=imagefolder data.root=/data/pets/test per_class=true
                                                   evaluate its best epoch on other images
zoo-eval model=van_b0 pretrained=true data=imagefolder data.root=/data/imagenet/val
                                                   evaluate published weights
zoo-eval runs/<folder> data.val_ann=/data/mine/test.json data.val_images=/data/mine/test
                                                   evaluate a detector on other images
zoo-eval runs/<folder> robustness=corruptions      evaluate a classifier also on corrupted images, such as blurred ones
zoo-eval model=van_b0 pretrained=true robustness=imagenet imagenet.v2=/data/imagenetv2 imagenet.a=/data/imagenet-a
                                                   evaluate an ImageNet classifier on ImageNet-V2 and -A
zoo-eval runs/<folder> fit_exits=true              thresholds and cost of early exit, for a model with several exits
zoo-eval recipe=coco/mask_rcnn_dinat_mini pretrained=<file> data.root=/data/coco
                                                   evaluate the authors' detector
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from zoo.recipes import cli, composition, config, early, reading, report, tasks

# Keys and groups of training, which do not affect an evaluation.
_OF_TRAINING = (
    *(
        "augment",
        "loss",
        "optim",
        "schedule",
        "log",
        "resume",
        "trainer",
        "exits",
        "dense",
        "distill",
        "probe",
        "mm",
        "published",
    ),
    *("data.train_", "data.sampling", "data.num_samples", "data.max_corrupt"),
)
_OF_BOTH = (
    *("trainer.batch_size", "trainer.device", "trainer.amp", "trainer.channels_last"),
    *("dense.scales", "dense.max_size", "dense.size_divisor", "dense.test_divisor"),
)


def main() -> None:
    """Compose and check the configuration, and evaluate. `zoo-eval <folder>` is short for `zoo-eval run=<folder>`."""
    config.register()
    cli.begin()
    origin = "which a run replaces with its own"
    cli.show_help(lambda: cli.print_help(__doc__, config.EvalConfig, origin, _matters), needs_words=True)
    cli.run("zoo-eval", "eval", config.EvalConfig, _evaluate, _with_run_key(sys.argv[1:]))


def _with_run_key(words: list[str]) -> list[str]:
    """`words`, with run= added to a folder that comes first."""
    place = next((i for i, word in enumerate(words) if word not in ("-m", "--multirun")), 0)
    first = words[place] if words else "-"
    if first.startswith("-") or ("=" in first and not os.path.isdir(first)):
        return words
    return [*words[:place], f"run={first}", *words[place + 1 :]]


def _matters(name: str) -> bool:
    return name in _OF_BOTH or not name.startswith(_OF_TRAINING)


def check(cfg: DictConfig) -> str:
    """Refuse a configuration with which no evaluation can start, and return its task.

    Raises:
        UserError: The message says why.
    """
    early.check(cfg)
    if cfg.run:
        early.check_run(Path(cfg.run))
    if cfg.out:
        early.check_folder(Path(cfg.out), "out")
    return reading.load_config(Path(cfg.run)).get("task", cfg.task) if cfg.run else cfg.task


def _evaluate(cfg: DictConfig) -> dict[str, Any]:
    task = check(cfg)
    return tasks.load(task, "evaluate").evaluate(cfg, composition.overridden(), report.write_or_warn)
