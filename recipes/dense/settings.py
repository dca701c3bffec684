"""Checks of the settings for detection and segmentation, and values that follow from several settings."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from zoo.messages import UserError
from zoo.recipes import config, distributed
from zoo.recipes.dense import views
from zoo.recipes.errors import NoEffect

METHODS = {"detect": config.DETECTORS, "segment": config.SEGMENTORS, "panoptic": config.PANOPTIC_METHODS}
# Where each task's models and transforms are registered.
SCOPES = {"detect": "mmdet", "segment": "mmseg", "panoptic": "mmdet"}

# Settings of classification that have no effect here: refused, so that a value is not ignored silently.
_UNUSED = (
    "augment.scale",
    "augment.ratio",
    "augment.vflip",
    "augment.color_jitter",
    "augment.auto_augment",
    "augment.interpolation",
    "augment.mixup",
    "augment.cutmix",
    "augment.smoothing",
    "augment.re_prob",
    "augment.repeats",
    "data.crop_pct",
    "data.img_size",
    "data.interpolation",
    "optim.clip_mode",
    "schedule.cooldown_epochs",
    "schedule.warmup_epochs",
)
# Values of the demo's augmentation, which are not refused.
_DEMO_VALUES = {"augment.scale": [1.0, 1.0], "augment.ratio": [1.0, 1.0], "augment.interpolation": "bicubic"}


@dataclass
class RunLength:
    """The length of a run.

    Attributes:
        updates: All updates of the weights.
        per_epoch: Updates that see every training image once.
        accumulate: Iterations (forward passes of each process) in an update.
        batch: Images in an update, over all processes.
        evaluate_every: Updates between two evaluations.
    """

    updates: int
    per_epoch: int
    accumulate: int
    batch: int
    evaluate_every: int


def check(cfg: DictConfig) -> None:
    """Refuse settings that can't be used for detection or segmentation.

    Raises:
        UserError: The message names the key, its value and what is allowed.
    """
    config.check(cfg)
    dense, defaults = cfg.dense, config.defaults()
    methods = METHODS[cfg.task]
    if dense.method not in methods:
        raise UserError(
            f"dense.method={dense.method!r} can't be used with task={cfg.task}: it has {', '.join(methods)}."
        )
    if cfg.trainer.freeze:
        remedy = "use dense.frozen_stages=<number>"
        message = f"trainer.freeze={cfg.trainer.freeze} has no effect with task={cfg.task}: {remedy}."
        raise NoEffect(message, "trainer.freeze", "task", "classify")
    for key in _UNUSED:
        value = OmegaConf.select(cfg, key)
        if value not in (OmegaConf.select(defaults, key), _DEMO_VALUES.get(key)):
            message = f"{key}={value} has no effect with task={cfg.task}: leave it out (see the keys of dense)."
            raise NoEffect(message, key, "task", "classify")
    rules = {
        "dense.max_size": (dense.max_size >= max(dense.scales, default=0), "no less than the largest of dense.scales"),
        "dense.detr_crop": (not dense.detr_crop or cfg.task == "detect", f"false for task={cfg.task}"),
        "schedule.sched": (
            cfg.schedule.sched in ("cosine", "multistep", "poly", "constant"),
            "cosine, multistep, poly or constant",
        ),
        "trainer.parallel": (cfg.trainer.parallel == "ddp", f"ddp for task={cfg.task}"),
        "model_kwargs.in_chans": (cfg.model_kwargs.get("in_chans", 3) == 3, f"3 for task={cfg.task}"),
    }
    for key, (fine, allowed) in rules.items():
        if not fine:
            raise UserError(f"{key}={OmegaConf.select(cfg, key)} is not allowed: it has to be {allowed}.")
    views.check(cfg)


def finds_masks(cfg: DictConfig) -> bool:
    """Whether the method of `cfg` predicts instance masks, if the data have them.

    Raises:
        UserError: dense.masks=false with a method that predicts only masks.
    """
    if cfg.dense.method in config.PANOPTIC_METHODS and not cfg.dense.masks:
        raise UserError(f"dense.masks=false can't be used with dense.method={cfg.dense.method}: it needs masks.")
    return cfg.dense.masks and cfg.dense.method not in ("retinanet", "dino")


def run_length(cfg: DictConfig, images: int) -> RunLength:
    """The length of a run with `cfg` on `images` training images.

    Raises:
        UserError: trainer.effective_batch_size is not a multiple of trainer.batch_size over all processes.
    """
    accumulate, batch = distributed.batches(cfg.trainer)
    per_epoch = -(-images // batch)
    updates = cfg.dense.updates or cfg.trainer.epochs * per_epoch
    return RunLength(updates, per_epoch, accumulate, batch, min(cfg.trainer.eval_every * per_epoch, updates))


def learning_rate(cfg: DictConfig) -> float:
    """`optim.lr`, or by default a value for fine-tuning a transformer."""
    return cfg.optim.lr if cfg.optim.lr is not None else 1e-4
