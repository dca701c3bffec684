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
            found, true = sample["pred_sem_seg"]["data"].cpu(), sample["gt_sem_seg"]["data"].cpu()
            self.results.append(count_pairs(true, found, self.classes, self.ignore_index))

    def compute_metrics(self, results: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Sum the counts of all images."""
        return {"confusion": sum_pairs(results, self.classes)}


def count_pairs(
    true: torch.Tensor, found: torch.Tensor, classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of an image by their true and their predicted class.

    Args:
        true: The true labels, of any shape.
        found: The predicted ones, of the same size.
        classes: The number of classes K.
        ignore_index: The label of ignored pixels.

    Returns:
        The pairs that occur, as true * K + found, and their counts: int64 (N,) each.
    """
    true, found = true.flatten(), found.flatten()
    counted = true != ignore_index
    counts = torch.bincount(true[counted].long() * classes + found[counted].long(), minlength=classes**2)
    present = counts.nonzero().flatten()
    return present.numpy(), counts[present].numpy()


def sum_pairs(results: Sequence[tuple[np.ndarray, np.ndarray]], classes: int) -> np.ndarray:
    """The confusion matrix (K, K) from what `count_pairs` returned for each image."""
    total = np.zeros(classes**2, dtype=np.int64)
    for present, counts in results:
        total[present] += counts
    return total.reshape(classes, classes)


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
