"""zoo-train: train a model.

zoo-train                                          train test_van on handwritten digits
zoo-train model=van_b0 data=imagefolder data.root=/data/pets pretrained=true
                                                   fine-tune on a folder of images
zoo-train probe=linear model=van_b0 pretrained=true data=imagefolder data.root=/data/pets
                                                   probe the frozen features; also probe=knn and probe=ep
zoo-train task=detect                              detect digits in images; also task=segment and task=panoptic
zoo-train recipe=coco/mask_rcnn_1x model=dinat_tiny data.root=/data/coco
torchrun --nproc-per-node 8 -m zoo.recipes.train recipe=imagenet/van_b0 data.root=/data/imagenet
                                                   run a published recipe on eight GPUs
zoo-train run=runs/<folder> ...                    continue where that run stopped
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig

from zoo.recipes import cli, composition, config, early, report, tasks
from zoo.recipes.dense.formats import look


def main() -> None:
    """Compose and check the configuration, and run the task."""
    config.register()
    cli.begin()
    origin = "which data=, task= and recipe= may change"
    cli.show_help(lambda: cli.print_help(__doc__, config.Config, origin), needs_words=False)
    cli.run("zoo-train", "config", config.Config, _train, look.with_option(sys.argv[1:]))


def check(cfg: DictConfig) -> None:
    """Refuse a configuration with which no training can start.

    Raises:
        UserError: The message says why.
    """
    config.check(cfg)
    config.check_effect_on_probe(cfg, composition.overridden())
    early.check(cfg)
    config.check_effect_on_classifier(cfg, composition.overridden())


def _train(cfg: DictConfig) -> dict[str, Any]:
    check(cfg)
    return tasks.load(cfg.task, "train").train(cfg, report.write_or_warn)
