"""Images with any number of labels: thresholds, scores over a data set, and the pictures that explain them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from zoo.messages import UserError, did_you_mean
from zoo.recipes import run_folder, sheet
from zoo.recipes.classify.accuracy import Normalize, gather_images, outputs
from zoo.recipes.config import InferenceConfig
from zoo.recipes.sheet import Tile

TITLES = {"mAP": "mAP", "F1": "F1", "F1_micro": "micro F1"}  # of the scores


@dataclass
class Evaluation:
    """The result of a pass over a data set of N images.

    `metrics` are mean binary cross-entropy `loss`; `mAP`, the mean over the classes of their average precision, and
    `F1`, that of their F1, over the classes for which it is defined; `F1_micro`, the F1 of all decisions together; all
    in percent; and the number of `images`. `targets` and `predictions` (N, classes) are the labels and the predicted
    ones, `logits` (N, classes) what the latter are from.
    """

    metrics: dict[str, float]
    targets: np.ndarray
    logits: np.ndarray
    predictions: np.ndarray
    corrupt: list[str]

    def per_class(self) -> dict[str, list[float | None]]:
        """Average precision and F1 of each class in percent; None where it is undefined, because no image has it."""
        return {"AP": _precisions(self.targets, self.logits), "F1": _f1(self.targets, self.predictions)}

    def by_name(self, classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """`per_class` by the names of the classes."""
        scores = self.per_class()
        return {name: {score: values[i] for score, values in scores.items()} for i, name in enumerate(classes)}

    def write_classes(self, folder: Path, classes: Sequence[str]) -> None:
        """Write `classes.json`."""
        run_folder.write_classes(folder, classes, self.per_class(), self.targets.sum(0).tolist(), "labels")


def thresholds(cfg: DictConfig, classes: Sequence[str]) -> np.ndarray:
    """The probability (classes,) from which on an image has a label, as `eval.threshold` says.

    Raises:
        UserError: It does not fit the classes.
    """
    given = cfg.eval.threshold
    value = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    if isinstance(value, Mapping):
        chosen = by_class("eval.threshold", value, classes)
        return np.array([chosen.get(name, InferenceConfig().threshold) for name in classes])
    if isinstance(value, list) and len(value) != len(classes):
        raise UserError(
            f"eval.threshold has {len(value)} numbers, but there are {len(classes)} classes: give one each."
        )
    return np.broadcast_to(np.asarray(value, dtype=np.float64), len(classes))


def by_class(key: str, values: Mapping[Any, float], classes: Sequence[str]) -> dict[str, float]:
    """The values of a mapping from names of classes, which YAML may have read as numbers.

    Raises:
        UserError: `key` names a class that there is not.
    """
    named = {str(name): value for name, value in values.items()}
    if unknown := [name for name in named if name not in classes]:
        hint = did_you_mean(unknown[0], classes) or f"the classes are {', '.join(classes[:20])}."
        raise UserError(f"{key} names {unknown[0]!r}, which is not a class: {hint}")
    return named


def refuse_threshold(cfg: DictConfig) -> None:
    """Refuse `eval.threshold` for images with one label each."""
    if cfg.eval.threshold != InferenceConfig().threshold:
        raise UserError(
            f"eval.threshold={cfg.eval.threshold} has no effect: each image has one label, the most probable class; "
            "leave it out."
        )


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    autocast: AbstractContextManager,
    limits: np.ndarray,
    on_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate `model` as `accuracy.measure` does; labels (B, classes) are those of `data.Samples`.

    Args:
        model: Maps images to logits (B, classes).
        loader: Batches of data.collate.
        normalize: Converts uint8 images to the model's input.
        autocast: The context of the forward pass, entered once per batch.
        limits: What `thresholds` returns.
        on_batch: Called after every batch, for progress.

    Raises:
        UserError: No image can be read.
    """
    all_logits, all_labels, bad, places = [], [], [], []
    for part, targets, names, numbers in outputs(model, loader, normalize, autocast, on_batch):
        all_logits.append(part.cpu())
        all_labels.append(targets.cpu())
        bad += names
        places.append(numbers)
    columns, corrupt = gather_images(places, (all_logits, all_labels), bad)
    logits, targets = map(torch.from_numpy, columns)
    loss = F.binary_cross_entropy_with_logits(logits.double(), targets.double()).item()
    labels = targets.numpy() > 0.5
    # Probabilities close to 1 are equal where logits are not.
    result = Evaluation({}, labels, logits.numpy(), logits.sigmoid().numpy() >= limits, corrupt)
    scores = {name: _mean(values) for name, values in result.per_class().items()}
    right = (labels & result.predictions).sum()
    result.metrics = {
        "loss": loss,
        "mAP": scores["AP"],
        "F1": scores["F1"],
        "F1_micro": 100 * 2 * float(right) / max(float(labels.sum() + result.predictions.sum()), 1),
        "images": len(labels),
    }
    return result


def _precisions(targets: np.ndarray, logits: np.ndarray) -> list[float | None]:
    from sklearn.metrics import average_precision_score

    return [
        100 * float(average_precision_score(labels, scores)) if labels.any() else None
        for labels, scores in zip(targets.T, logits.T, strict=True)
    ]


def _f1(targets: np.ndarray, found: np.ndarray) -> list[float | None]:
    from sklearn.metrics import f1_score

    scores = [float(f1_score(*columns, zero_division=np.nan)) for columns in zip(targets.T, found.T, strict=True)]
    return [None if math.isnan(score) else 100 * score for score in scores]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


@torch.no_grad()
def plot_predictions(
    path: Path,
    model: nn.Module,
    samples: Sequence,
    indices: Sequence[int],
    normalize: Normalize,
    classes: Sequence[str],
    limits: np.ndarray,
    rows: int = 4,
    columns: int = 8,
) -> None:
    """Draw validation images with their predicted labels: those with the most mistakes first.

    At most 512 images are classified, evenly spread.
    """
    step = max(1, math.ceil(len(indices) / 512))
    items = [samples[0, index] for index in list(indices)[::step]]
    items = [item for item in items if item[1][0] >= 0]
    model.eval()
    batches = [torch.stack([image for image, _, _ in items[i : i + 32]]) for i in range(0, len(items), 32)]
    probabilities = torch.cat([model(normalize(batch)).float().sigmoid().cpu() for batch in batches]).numpy()
    targets = torch.stack([target for _, target, _ in items]).numpy() > 0.5
    found = probabilities >= limits
    mistakes = (found != targets).sum(1)
    least_certain = np.abs(probabilities - limits).min(1)
    # Half of the sheet shows hard images, and half shows ordinary ones.
    order = np.lexsort((least_certain, -mistakes)).tolist()
    half = rows * columns // 2
    rest = order[half:]
    order = order[:half] + rest[:: max(1, len(rest) // half)][:half]
    wrong, looked_at = int((mistakes > 0).sum()), " looked at" * (step > 1)
    ordinary = f"; the last {len(order) - half} are ordinary ones" if rest else ""
    title = (
        f"A label wrong or missing: {wrong} of {len(items)} validation images{looked_at}. Those with the most mistakes "
        f"come first{ordinary}."
    )
    tiles = []
    for i in order:
        caption = _caption(found[i], targets[i], probabilities[i], classes)
        tiles.append([Tile(to_pil_image(items[i][0]).convert("RGB"), caption, wrong=bool(mistakes[i]))])
    sheet.write(path, tiles, title=title, columns=columns)


def _caption(found: np.ndarray, targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """The predicted labels with their probabilities, and the labels that are wrong or missing."""

    def named(chosen: np.ndarray) -> str:
        order = sorted(np.flatnonzero(chosen), key=lambda i: -probabilities[i])
        return ", ".join(f"{classes[i]} ({100 * probabilities[i]:.0f} %)" for i in order)

    wrong, missing = named(found & ~targets), named(targets & ~found)
    parts = (named(found & targets), wrong and f"wrong: {wrong}", missing and f"missing: {missing}")
    return "; ".join(filter(None, parts)) or "no label"
