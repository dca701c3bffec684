"""The data of a detection or segmentation run."""

from __future__ import annotations

from omegaconf import DictConfig

from zoo.recipes.dense.detection_data import DetectionData, open_detection
from zoo.recipes.dense.segmentation_data import SegmentationData, open_segmentation
from zoo.recipes.dense.settings import finds_masks


def open_data(
    cfg: DictConfig, training: bool = True, classes: list[str] | None = None
) -> DetectionData | SegmentationData:
    """The data of `cfg`, checked.

    Raises:
        UserError: They can't be used.
    """
    if cfg.task == "segment":
        return open_segmentation(cfg.data, training, classes)
    return open_detection(cfg.data, training, classes, masks=finds_masks(cfg))
