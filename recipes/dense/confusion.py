"""The confusion matrix of a segmentor, as a metric of MMEngine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Confusion(BaseMetric):
    """The metric `confusion`: an array (K, K) of the pixels of class `row` that are predicted as class `column`.

    Args:
        classes: The number of classes K.
        ignore_index: The label of ignored pixels.
    """

    def __init__(self, classes: int, ignore_index: int):
        super().__init__()
        self.classes, self.ignore_index = classes, ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count the pixels of a batch; only pairs of classes that occur in an image are stored."""
        for sample in data_samples:
            found = sample["pred_sem_seg"]["data"].flatten().cpu()
            true = sample["gt_sem_seg"]["data"].flatten().cpu()
            counted = true != self.ignore_index
            pairs = true[counted].long() * self.classes + found[counted].long()
            counts = torch.bincount(pairs, minlength=self.classes**2)
            present = counts.nonzero().flatten()
            self.results.append((present.numpy(), counts[present].numpy()))

    def compute_metrics(self, results: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Sum the counts of all images."""
        total = np.zeros(self.classes**2, dtype=np.int64)
        for present, counts in results:
            total[present] += counts
        return {"confusion": total.reshape(self.classes, self.classes)}


def class_scores(confusion: np.ndarray) -> dict[str, list[float | None]]:
    """The `IoU` and `accuracy` of each class in percent from an array (K, K); None if there is nothing to find."""
    right, true, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return {"IoU": _percent(right, true + found - right), "accuracy": _percent(right, true)}


def _percent(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [100 * a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]


def pairs(confusion: np.ndarray) -> list[list[int]]:
    """[true label, predicted label, pixels] for all pairs that occur, from an array (K, K)."""
    rows, columns = confusion.nonzero()
    return np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
