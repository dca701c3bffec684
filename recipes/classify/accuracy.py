"""Accuracy of a classifier over a data set, and the pictures that explain it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from zoo.messages import UserError
from zoo.recipes import distributed, plots, run_folder, sheet
from zoo.recipes.atomic_files import atomic
from zoo.recipes.sheet import Tile


@dataclass
class Evaluation:
    """The result of a pass over a data set.

    `metrics` are mean cross-entropy `loss`; `top1`, `top5` and `balanced_accuracy`, the mean of the accuracies of the
    classes, in percent; and the number of `images`. `targets` and `predictions` are the labels, in the order of the
    images; `logits` are those of the same images (images, classes), float32, if they were kept.
    """

    metrics: dict[str, float]
    targets: np.ndarray
    predictions: np.ndarray
    corrupt: list[str]
    logits: np.ndarray | None = None

    def confusion(self, num_classes: int) -> np.ndarray:
        """The confusion matrix: how often class `row` was predicted as class `column`."""
        counts = np.bincount(self.targets * num_classes + self.predictions, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def pairs(self, num_classes: int) -> list[list[int]]:
        """[label, prediction, count] for all pairs that occur: few, compared with the matrix of many classes."""
        pairs, counts = np.unique(self.targets * num_classes + self.predictions, return_counts=True)
        return np.stack([pairs // num_classes, pairs % num_classes, counts], axis=1).tolist()

    def per_class(self, num_classes: int) -> list[float | None]:
        """Top-1 accuracy of each class in percent; None for a class without images."""
        right = np.bincount(self.targets[self.targets == self.predictions], minlength=num_classes)
        images = np.bincount(self.targets, minlength=num_classes)
        return [100 * r / n if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)]

    def write_classes(self, folder: Path, classes: Sequence[str]) -> None:
        """Write `classes.json`."""
        number = len(classes)
        counts, scores = np.bincount(self.targets, minlength=number).tolist(), {"top1": self.per_class(number)}
        run_folder.write_classes(folder, classes, scores, counts, "images", self.pairs(number))


class Normalize:
    """Moves uint8 images to the device and normalizes them with the model's mean and standard deviation."""

    def __init__(self, data_config: dict[str, Any], device: torch.device, channels_last: bool = False):
        self.mean = 255 * torch.tensor(data_config["mean"], device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(data_config["std"], device=device).view(1, -1, 1, 1)
        self.device = device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images (B, C, H, W), uint8, to float32 on the device."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images.float().sub_(self.mean).div_(self.std)


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    autocast: AbstractContextManager,
    on_batch: Callable[[], None] | None = None,
    most_logits: int = 0,
) -> Evaluation:
    """Evaluate `model`, in evaluation mode, on every image of `loader`; each image counts once over all processes.

    Args:
        model: Maps images to logits (B, classes).
        loader: Batches of data.collate; the label -1 marks an image that can't be read, which does not count.
        normalize: Converts uint8 images to the model's input.
        autocast: The context of the forward pass, entered once per batch.
        on_batch: Called after every batch, for progress.
        most_logits: The logits are kept if they are at most this many numbers.

    Raises:
        UserError: No image can be read.
    """
    evaluator = ClassificationEvaluator(device=normalize.device)
    targets, predictions, corrupt, places = [], [], [], []
    kept: list[torch.Tensor] = []
    room = most_logits // distributed.world_size()
    for logits, labels, names, numbers in outputs(model, loader, normalize, autocast, on_batch):
        if len(labels):
            evaluator.update(logits, labels)
        targets.append(labels.cpu())
        predictions.append(logits.argmax(1).cpu())
        corrupt += names
        places.append(numbers)
        room -= logits.numel()
        if room >= 0:
            kept.append(logits.cpu())
        else:
            kept.clear()
    columns, names = gather_images(places, (targets, predictions, kept), corrupt)
    metrics = dict(evaluator.compute(distributed=distributed.world_size() > 1))
    all_targets, all_predictions, all_logits = columns
    result = Evaluation(
        metrics={**metrics, "images": len(all_targets)},
        targets=all_targets,
        predictions=all_predictions,
        corrupt=names,
        logits=all_logits,
    )
    recalls = [value for value in result.per_class(logits.shape[1]) if value is not None]
    result.metrics["balanced_accuracy"] = sum(recalls) / len(recalls)
    return result


def outputs(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    autocast: AbstractContextManager,
    on_batch: Callable[[], None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]]:
    """Yield logits (B, classes), labels, names of corrupt images and places for each batch of this process's share.

    The arguments are those of `measure`. Images that do not count are left out. The place of an image (int64) is its
    number among those of all processes.
    """
    left, first = evaluation_sample_limit(loader), distributed.rank()
    model.eval()
    for images, labels, names in loader:
        count = len(labels) if left is None else min(left, len(labels))
        left = None if left is None else left - count
        with autocast:
            logits = model(normalize(images)).float()
        labels = labels.to(logits.device, non_blocking=True)[:count]
        good = (labels if labels.ndim == 1 else labels[:, 0]) >= 0
        places = first + distributed.world_size() * torch.arange(count)
        first += distributed.world_size() * count
        yield logits[:count][good], labels[good], names if count else [], places[good.cpu()]
        if on_batch:
            on_batch()


def gather_images(
    places: Sequence[torch.Tensor], columns: Sequence[Sequence[torch.Tensor]], corrupt: Sequence[str]
) -> tuple[list[Any], list[str]]:
    """Gather what all processes found for their images.

    Args:
        places: The places of the images, by batch.
        columns: What was found, each by batch; empty if it was not kept.
        corrupt: Names of corrupt images.

    Returns:
        An array for each column, in the order of the images, or None if a process has not kept it; and the names.

    Raises:
        UserError: No image could be read.
    """
    mine = [torch.cat(list(values)).numpy() if values else None for values in (places, *columns)]
    parts = distributed.gather((mine, corrupt))
    names = sorted({name for part in parts for name in part[1]})
    full = [rows for rows, _ in parts if rows[0] is not None and len(rows[0])]
    if not full:
        raise UserError(
            f"no image could be read for evaluation: the first of {len(names)} corrupt ones is {names[:1]}."
        )
    if len(full) == 1:
        return full[0][1:], names
    order, *gathered = (
        None if any(values is None for values in column) else np.concatenate(column)
        for column in zip(*full, strict=True)
    )
    order = np.argsort(order)
    return [None if column is None else column[order] for column in gathered], names


@torch.no_grad()
def plot_predictions(
    path: Path,
    model: nn.Module,
    samples: Sequence,
    indices: Sequence[int],
    normalize: Normalize,
    classes: Sequence[str],
    rows: int = 4,
    columns: int = 8,
) -> None:
    """Draw validation images with their predictions: wrong ones first, then the least certain ones.

    At most 512 images are classified, evenly spread.
    """
    step = max(1, math.ceil(len(indices) / 512))
    items = [samples[0, index] for index in list(indices)[::step]]
    items = [item for item in items if item[1] >= 0]
    model.eval()
    probabilities = torch.cat(
        [
            model(normalize(torch.stack([image for image, _, _ in items[i : i + 32]]))).float().softmax(1).cpu()
            for i in range(0, len(items), 32)
        ]
    )
    scores, answers = probabilities.max(1)
    targets = torch.tensor([target for _, target, _ in items])
    # Half of the sheet shows hard images, and half shows ordinary ones.
    order = torch.argsort(scores + (answers == targets).float()).tolist()
    half = rows * columns // 2
    rest = order[half:]
    order = order[:half] + rest[:: max(1, len(rest) // half)][:half]
    wrong, looked_at = int((answers != targets).sum()), " looked at" * (step > 1)
    ordinary = f"; the last {len(order) - half} are ordinary ones" if rest else ""
    title = (
        f"Wrong: {wrong} of {len(items)} validation images{looked_at}. The wrong ones and the least certain come "
        f"first{ordinary}."
    )
    tiles = []
    for i in order:
        right = bool(answers[i] == targets[i])
        said = f"{classes[answers[i]]} ({100 * scores[i]:.0f} %)"
        caption = said if right else f"{said}, is {classes[targets[i]]}"
        tiles.append([Tile(to_pil_image(items[i][0]).convert("RGB"), caption, wrong=not right)])
    sheet.write(path, tiles, title=title, columns=columns)


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def plot_confusion(
    path: Path, confusion: np.ndarray, classes: Sequence[str], title: str, limit: int = 40, unit: str = "images"
) -> None:
    """Plot the confusion matrix in percent of each row; of many classes, the `limit` with the most mistakes.

    `unit` is what the matrix counts.
    """
    images = confusion.sum(1)
    shown = np.arange(len(classes))
    if len(classes) > limit:
        mistakes = images + confusion.sum(0) - 2 * confusion.diagonal()
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:limit])
        title += f"\nthe {limit} of {len(classes)} classes with the most mistakes"
    percent = 100 * confusion[np.ix_(shown, shown)] / np.maximum(images[shown, None], 1)
    size = max(4.0, 0.34 * len(shown) + 2.2)
    figure = plots.new_figure(figsize=(size + 0.8, size), dpi=110)
    axes = figure.add_subplot()
    drawn = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if len(shown) <= 20:
        for row, column in zip(*np.nonzero(percent), strict=True):
            value = percent[row, column]
            color = "white" if value > 55 else "black"
            axes.text(
                column, row, f"{value:.0f}" if value >= 1 else "<1", ha="center", va="center", size=7, color=color
            )
    names = [_short(classes[i]) for i in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
    axes.set_yticks(
        range(len(shown)), [f"{name} ({images[i]})" for i, name in zip(shown, names, strict=True)], fontsize=8
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel(f"true ({unit})")
    axes.set_title(title, fontsize=9)
    figure.colorbar(drawn, label="% of the true class", shrink=0.8)
    with atomic(path) as file:
        figure.savefig(file, format="png")


def percentage(value: float) -> str:
    """`value` in percent, formatted; "-" if there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f} %"
