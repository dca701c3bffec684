"""What `train`, `evaluate` and `predict` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        task: `classify`, `detect`, `segment` or `panoptic`.
        folder: The run folder; `evaluate` and `predict` take it, and so do all commands.
        metrics: The figures of the last evaluation by name: `top1`, `top5`, `bbox_AP`, `mask_AP`, `mIoU`, `PQ`, ... in
            percent, and the `loss` of classifiers.
        best: The best evaluation: its `epoch`, and the score that decides, such as `top1`. best.safetensors has its
            weights.
        history: A record per epoch or evaluation, the lines of metrics.jsonl: `epoch`, `update`, `lr`, `train_loss`,
            `val_top1`, ...
        stopped_early: Why the training ended before its full length, as a sentence; None if it did not.
        summary: The content of summary.json, which also has the parameters, the seconds, the versions, ...
    """

    task: str
    folder: Path
    metrics: Metrics
    best: Metrics
    history: list[dict[str, Any]]
    stopped_early: str | None
    summary: Mapping[str, Any]

    def model(self, checkpoint: str = "last", device: str = "cpu") -> nn.Module:
        """Load the model, in evaluation mode.

        A classifier maps images (B, C, H, W), float32 and normalized, to logits (B, classes); its `pretrained_cfg`, and
        the run's config.json, describe the normalization. Detectors and segmentors are MMDetection's and
        MMSegmentation's, with their `test_step`. `predict` prepares images itself.

        Args:
            checkpoint: `last`, the weights at the end of the training, or `best`.
            device: Where the model is placed.

        Raises:
            UserError: There are no such weights.
        """
        from zoo.recipes import config, early, tasks

        early.check_run(self.folder)
        settings = config.defaults(config.EvalConfig)
        settings.run, settings.checkpoint = str(self.folder), checkpoint
        return tasks.load(self.task, "evaluate").from_run(settings)[0].to(device).eval()


@dataclass(frozen=True)
class EvalResult:
    """An evaluation.

    Attributes:
        task: `classify`, `detect`, `segment` or `panoptic`.
        folder: The folder with eval.json, the pictures and the report.
        metrics: The figures by name, as those of `TrainResult`; those of a classifier include the number of `images`.
        per_class: The figures of each class, by its name, those of classes.json. A classifier has `top1`, the share of
            its images that are recognized, in percent; None stands for a class without images.
        classes: The names of the classes, in the order of their labels.
        confusion: How often label `row` was predicted as label `column`, in images or pixels: int64 (classes, classes).
            None for task=detect and task=panoptic, and if an image can have several labels.
        targets: The labels of a classifier's images, int64 (N,), in the order of the data set;
            bool (N, classes) if an image can have several labels. None for other tasks.
        predictions: The labels that it predicts for them, likewise. None for other tasks; `predict` returns predictions
            for single images.
        summary: The content of eval.json, which for a classifier also has the interval of its accuracy and its
            calibration.
    """

    task: str
    folder: Path
    metrics: Metrics
    per_class: Mapping[str, Metrics]
    classes: list[str]
    confusion: NDArray[np.int64] | None
    targets: NDArray[np.int64 | np.bool_] | None
    predictions: NDArray[np.int64 | np.bool_] | None
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one image, as a number of entries, N; H and W are the image's height and width.

    - A classifier (task=classify) has all classes as entries, with their probabilities as scores.
    - A detector (task=detect) has objects, with scores, boxes and, if it predicts them, masks.
    - A segmentor (task=segment) has all classes, in the order of the run, and labels.
    - A panoptic segmentor (task=panoptic) has segments, with boxes and labels.

    Attributes:
        source: The file, or the position in the list of images if it is not a file.
        size: H and W of the image in pixels, upright.
        classes: The name of the class of each entry; those of classifiers and detectors in falling order of the scores.
        scores: float32 (N,), from 0 to 1.
        boxes: Left, top, right and bottom of each entry in pixels of the image, float32 (N, 4).
        masks: The pixels of each object, bool (N, H, W).
        labels: For each pixel the position of its entry in `classes`, int64 (H, W); -1 if it belongs to none.
        chosen: Which classes a classifier of several labels per image gives it, by eval.threshold: bool (N,).
    """

    source: Path | int
    size: tuple[int, int]
    classes: list[str]
    scores: NDArray[np.float32] | None = None
    boxes: NDArray[np.float32] | None = None
    masks: NDArray[np.bool_] | None = None
    labels: NDArray[np.int64] | None = None
    chosen: NDArray[np.bool_] | None = None
