"""zoo-train: train a model.

zoo-train                                          test_van on handwritten digits
zoo-train model=van_b0 data=imagefolder data.root=/data/pets pretrained=true
                                                   fine-tune on a folder of images
zoo-train task=detect                              find digits in pictures; task=segment likewise
zoo-train recipe=coco/mask_rcnn_1x model=dinat_tiny data.root=/data/coco
torchrun --nproc-per-node 8 -m zoo.recipes.train recipe=imagenet/van_b0 data.root=/data/imagenet
                                                   a published recipe on eight GPUs
zoo-train run=runs/<folder> ...                    continue where that run stopped
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from zoo.recipes import cli, config
from zoo.recipes.tasks import task


def main() -> None:
    """Compose the configuration, check it, run the task."""
    config.register()
    cli.show_help(__doc__, config.Config)
    cli.check_overrides("zoo-train", config.Config)
    _train()


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="config")
def _train(cfg: DictConfig) -> None:
    with cli.friendly_errors("zoo-train"):
        task(cfg.task, "loop").train(cfg)


if __name__ == "__main__":
    sys.exit(main())
