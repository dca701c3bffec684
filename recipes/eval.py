"""zoo-eval: how good a run's model is, or a classifier by name.

zoo-eval runs/<folder>                             the run's model on its validation images
zoo-eval runs/<folder> checkpoint=best data=imagefolder data.root=/data/pets/test per_class=true
                                                   its best epoch on other images
zoo-eval model=van_b0 pretrained=true data=imagefolder data.root=/data/imagenet/val
                                                   published weights
zoo-eval runs/<folder> data.val_ann=/data/mine/test.json data.val_images=/data/mine/test
                                                   a detector on other images
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from zoo.recipes import cli, config
from zoo.recipes.tasks import task


def main() -> None:
    """Compose the configuration, check it, evaluate. `zoo-eval <folder>` is short for `zoo-eval run=<folder>`."""
    config.register()
    cli.show_help(__doc__, config.EvalConfig)
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and ("=" not in sys.argv[1] or Path(sys.argv[1]).is_dir()):
        quoted = sys.argv[1].replace("'", r"\'")
        sys.argv[1] = f"run='{quoted}'"
    cli.check_overrides("zoo-eval", config.EvalConfig)
    _evaluate()


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="eval")
def _evaluate(cfg: DictConfig) -> None:
    with cli.friendly_errors("zoo-eval"):
        from zoo.recipes import runs

        name = runs.load_config(Path(cfg.run)).get("task", cfg.task) if cfg.run else cfg.task
        overridden = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
        task(name, "score").score(cfg, overridden)


if __name__ == "__main__":
    sys.exit(main())
