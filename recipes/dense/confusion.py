"""Which classes a segmentor takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Confusion(BaseMetric):
    """How many pixels of class `row` were taken for class `column`, as the metric `confusion`: an array (K, K).

    Args:
        classes: K.
        ignore_index: Label of pixels that do not count.
    """

    def __init__(self, classes: int, ignore_index: int):
        super().__init__()
        self.classes, self.ignore_index = classes, ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count the pixels of a batch; of an image, only the pairs that occur are kept, few of many classes'."""
        for sample in data_samples:
            found = sample["pred_sem_seg"]["data"].flatten().cpu()
            true = sample["gt_sem_seg"]["data"].flatten().cpu()
            counted = true != self.ignore_index
            pairs = true[counted].long() * self.classes + found[counted].long()
            counts = torch.bincount(pairs, minlength=self.classes**2)
            present = counts.nonzero().flatten()
            self.results.append((present.numpy(), counts[present].numpy()))

    def compute_metrics(self, results: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Add up the images' counts."""
        total = np.zeros(self.classes**2, dtype=np.int64)
        for present, counts in results:
            total[present] += counts
        return {"confusion": total.reshape(self.classes, self.classes)}


def class_scores(confusion: np.ndarray) -> dict[str, list[float | None]]:
    """Each class's `IoU` and `accuracy` in percent, None where there is nothing to find, from an array (K, K)."""
    right, true, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return {"IoU": _percent(right, true + found - right), "accuracy": _percent(right, true)}


def _percent(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [100 * a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]


def pairs(confusion: np.ndarray) -> list[list[int]]:
    """[true label, predicted label, pixels] for all pairs that occur in an array (K, K)."""
    rows, columns = confusion.nonzero()
    return np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
