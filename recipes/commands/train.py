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

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from zoo.recipes import cli, config, early, report, tasks
from zoo.recipes.dense.formats import look


def main() -> None:
    """Compose and check the configuration, and run the task."""
    config.register()
    cli.begin()
    origin = "which data=, task= and recipe= may change"
    cli.show_help(lambda: cli.print_help(__doc__, config.Config, origin), needs_words=False)
    cli.run("zoo-train", "config", config.Config, _train, look.with_option(sys.argv[1:]))


def _train(cfg: DictConfig) -> dict[str, Any]:
    config.check(cfg)
    overridden = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    config.check_effect_on_probe(cfg, overridden)
    early.check(cfg)
    return tasks.load(cfg.task, "train").train(cfg, report.write_or_warn)
