"""The data of a run of detection, segmentation or panoptic segmentation."""

from __future__ import annotations

from omegaconf import DictConfig

from zoo.recipes.dense.detection_data import DetectionData, open_detection
from zoo.recipes.dense.panoptic_data import PanopticData, open_panoptic
from zoo.recipes.dense.segmentation_data import SegmentationData, open_segmentation
from zoo.recipes.dense.settings import finds_masks

Data = DetectionData | SegmentationData | PanopticData


def open_data(cfg: DictConfig, training: bool = True, classes: list[str] | None = None) -> Data:
    """The data of `cfg`, checked.

    Raises:
        UserError: They can't be used.
    """
    if cfg.task == "segment":
        return open_segmentation(cfg.data, training, classes)
    if cfg.task == "panoptic":
        return open_panoptic(cfg.data, training, classes, cfg.dense.num_things)
    return open_detection(cfg.data, training, classes, masks=finds_masks(cfg))
