"""Finding the format of a data set and converting it."""

from __future__ import annotations

from pathlib import Path

from zoo.messages import UserError
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.formats import cityscapes, look, voc, yolo
from zoo.recipes.dense.formats.converted import Converted


def detection(cfg: DataConfig, training: bool, masks: bool) -> Converted | None:
    """The data of `cfg` as COCO JSON, if they are of another format; None if they are COCO's.

    Args:
        cfg: The configuration.
        training: Both splits are needed; otherwise only the validation split.
        masks: The method learns masks.

    Raises:
        UserError: The data can't be used.
    """
    root = _root(cfg, cfg.val_ann or (training and cfg.train_ann))
    if root is None:
        return None
    look.refuse("detect", root)
    if folder := look.voc_root(root):
        found = voc.read_detection(folder, _splits(cfg, training), cfg.max_pixels)
    elif look.kind(root) == "yolo":
        found = yolo.read_detection(look.yolo_file(root), _splits(cfg, training), cfg.max_pixels)
    else:
        return None
    for key in ("train_images", "val_images"):
        if getattr(cfg, key):
            raise UserError(
                f"data.{key}={getattr(cfg, key)} can't be used with {found.source}, which names its images: leave it "
                "out."
            )
    if masks and not found.has_masks:
        raise UserError(
            f"{found.source} in data.root={root} has boxes without masks: find boxes alone with dense.masks=false."
        )
    return found


def segmentation(cfg: DataConfig, training: bool) -> Converted | None:
    """The data of `cfg` as lists of images and labels, if they are of another format; None if they are folders.

    Args:
        cfg: The configuration.
        training: Both splits are needed; otherwise only the validation split.

    Raises:
        UserError: The data can't be used.
    """
    given = cfg.val_images or cfg.val_labels or (training and (cfg.train_images or cfg.train_labels))
    root = _root(cfg, given)
    if root is None:
        return None
    look.refuse("segment", root)
    if look.kind(root) == "cityscapes":
        found = cityscapes.read_segmentation(root, _splits(cfg, training))
    elif folder := look.voc_root(root):
        found = voc.read_segmentation(folder, _splits(cfg, training))
    else:
        return None
    for key, value in (("ignore_index", found.ignore_index), ("reduce_zero_label", False)):
        if getattr(cfg, key) not in (value, None):
            raise UserError(
                f"data.{key}={getattr(cfg, key)} can't be used with {found.source}, which has {value}: leave it out."
            )
    return found


def _root(cfg: DataConfig, given: object) -> Path | None:
    """The folder or file to look at; None for digit scenes, and if the files are `given`."""
    if given or not cfg.root or cfg.name == "digit_scenes" or not Path(cfg.root).exists():
        return None
    return Path(cfg.root).resolve()


def _splits(cfg: DataConfig, training: bool) -> dict[str, str]:
    return ({"train": cfg.train_split} if training else {}) | {"val": cfg.val_split}
