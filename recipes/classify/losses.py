"""Losses of classifiers, and weights for classes of which there are few images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from timm.loss import BinaryCrossEntropy
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from zoo.messages import UserError, first_few
from zoo.recipes.classify.multi_label import by_class
from zoo.recipes.errors import NoEffect

_MOST_SHARES = 12  # classes whose shares are listed
_LARGEST = 1e6

TITLES = {"ce": "cross-entropy", "bce": "binary cross-entropy", "focal": "focal loss"}


class ClassLoss(nn.Module):
    """Cross-entropy, binary cross-entropy or focal loss, with weights of the classes.

    With one label per image, the loss of an image is multiplied by the weight of its class; that of a mixed image, by
    the mean weight of its labels. The mean over the images is not divided by their weights: so accumulated gradients,
    and those of several processes, are those of the whole batch. The smoothed part of a label has no weights, with
    which rare classes would be predicted everywhere. With several labels, the positive term of a class is multiplied.

    The focal loss is that of RetinaNet (https://arxiv.org/abs/1708.02002) without alpha, whose part the weights have.
    It and binary cross-entropy are means over the classes, as in timm.

    Args:
        name: `ce`, `bce` or `focal`.
        weights: The weights of the classes (classes,); None for no weights.
        multi_label: Whether targets are those of several labels per image.
        smoothing: Label smoothing, unless `soft_targets`.
        gamma: The exponent of the focal loss.
        soft_targets: Whether targets are mixed, and smoothed before.
    """

    weights: torch.Tensor | None

    def __init__(
        self,
        name: str,
        weights: torch.Tensor | None = None,
        multi_label: bool = False,
        smoothing: float = 0.0,
        gamma: float = 2.0,
        soft_targets: bool = False,
    ):
        super().__init__()
        self.name, self.multi_label, self.gamma = name, multi_label, gamma
        self.smoothing = 0.0 if soft_targets else smoothing
        self.register_buffer("weights", weights)
        # With several labels, timm moves each label towards 0.5.
        self.binary = BinaryCrossEntropy(self.smoothing, reduction="none", smooth_dense=multi_label)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, classes) and targets: labels (B,), or dense ones (B, classes)."""
        logits = logits.float()
        dense = targets.ndim == 2
        if self.name == "ce":
            each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        else:
            losses = self.binary(logits, targets) if self.name == "bce" else self._focal(logits, targets)
            if self.multi_label and self.weights is not None:  # not timm's pos_weight, which smoothed labels multiply
                losses = losses * (1 + targets * (self.weights - 1))
            each = losses.mean(1)
        if self.weights is not None and not self.multi_label:
            each = each * ((targets * self.weights).sum(1) if dense else self.weights[targets])
        return each.mean()

    def _focal(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        number = logits.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, number).float() * (1 - self.smoothing) + self.smoothing / number
        elif self.multi_label:
            targets = targets * (1 - self.smoothing) + 0.5 * self.smoothing
        return sigmoid_focal_loss(logits, targets, alpha=-1, gamma=self.gamma)


def make_loss(cfg: DictConfig, weights: np.ndarray | None, multi_label: bool) -> nn.Module | None:
    """The loss that `cfg.loss` chooses; None for timm's default, which is plain (binary) cross-entropy.

    Raises:
        UserError: It can't be used with these labels.
    """
    usual = "bce" if multi_label else "ce"
    name = cfg.loss.name or usual
    if multi_label and name == "ce":
        raise UserError("loss.name=ce is for one label per image, but the data has several: set it to bce or focal.")
    if name != "focal" and cfg.loss.gamma != 2.0:
        message = f"loss.gamma={cfg.loss.gamma} has no effect with loss.name={name}: set loss.name=focal."
        raise NoEffect(message, "loss.gamma", "loss.name", "focal")
    if name == usual and weights is None:
        return None
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    mixed = bool(cfg.augment.mixup or cfg.augment.cutmix)
    return ClassLoss(name, tensor, multi_label, cfg.augment.smoothing, cfg.loss.gamma, mixed)


def class_weights(
    cfg: DictConfig, classes: Sequence[str], counts: Sequence[int] | None, images: int, multi_label: bool
) -> np.ndarray | None:
    """The weights (classes,) that `loss.weights` asks for; None if it is null.

    Args:
        cfg: The configuration.
        classes: The names of the classes.
        counts: The training images of each class; None if they are not known.
        images: The number of training images.
        multi_label: Whether an image has several labels.

    Raises:
        UserError: They do not fit the classes, or the counts are needed and not known.
    """
    given = OmegaConf.to_container(cfg.loss.weights) if OmegaConf.is_config(cfg.loss.weights) else cfg.loss.weights
    if given is None:
        return None
    if given == "balanced":
        if counts is None:
            raise unknown_labels("loss.weights=balanced", cfg)
        # A class without images has the weight 1, which nothing is multiplied by.
        known = np.maximum(np.asarray(counts, dtype=np.float64), 1)
        if multi_label:  # as often wrong with as without the label
            return np.where(np.asarray(counts) > 0, np.maximum(images - known, 1) / known, 1.0)
        return np.where(np.asarray(counts) > 0, images / (np.count_nonzero(counts) * known), 1.0)
    if isinstance(given, Mapping):
        _check_numbers(given.values(), given)
        chosen = by_class("loss.weights", given, classes)
        return np.array([chosen.get(name, 1.0) for name in classes], dtype=np.float64)
    if not isinstance(given, list):
        raise UserError(
            f"loss.weights={given} is not allowed: it has to be balanced, a list of numbers, numbers by class such as "
            "{cat: 2, dog: 0.5}, or null."
        )
    _check_numbers(given, given)
    if len(given) != len(classes):
        raise UserError(
            f"loss.weights has {len(given)} numbers, but there are {len(classes)} classes ({first_few(classes, 20)}): "
            "give one number each, in this order."
        )
    return np.array(given, dtype=np.float64)


def _check_numbers(values: Any, given: Any) -> None:
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 < value <= _LARGEST:
            raise UserError(f"loss.weights={given} is not allowed: {value!r} has to be a number above 0, at most 1e6.")


def unknown_labels(setting: str, cfg: DictConfig) -> UserError:
    """The error for a setting that needs the labels of the training images before they are read."""
    return UserError(
        f"{setting} needs the label of every training image before training, which data.name={cfg.data.name} does not "
        "list: use image folders or data=csv."
    )


def describe(cfg: DictConfig, classes: Sequence[str], weights: np.ndarray | None, multi_label: bool) -> str:
    """The loss in words."""
    name = cfg.loss.name or ("bce" if multi_label else "ce")
    text = TITLES[name] + (f" (gamma {cfg.loss.gamma:g})" if name == "focal" else "")
    if weights is not None:
        low, high = int(weights.argmin()), int(weights.argmax())
        what = "weights of the positive terms" if multi_label else "class weights"
        text += f", {what} from {weights[low]:.3g} ({classes[low]}) to {weights[high]:.3g} ({classes[high]})"
    return text


def shares(classes: Sequence[str], counts: Sequence[int], images: int) -> str:
    """How many images each class has, with their shares: the largest and the smallest, if there are many classes."""

    def of(i: int) -> str:
        return f"{classes[i]}: {counts[i]:,} ({100 * counts[i] / max(images, 1):.3g} %)"

    order = sorted(range(len(classes)), key=lambda i: -counts[i])
    if len(order) <= _MOST_SHARES:
        return ", ".join(of(i) for i in range(len(classes)))
    half = _MOST_SHARES // 2
    return f"{', '.join(map(of, order[:half]))}, ..., {', '.join(map(of, order[-half:]))}"


def count_classes(labels: Sequence[Any], number: int) -> list[int]:
    """How many of `labels`, indices of classes or tuples of them, are of each class."""
    found = Counter(label for item in labels for label in (item if isinstance(item, tuple) else (item,)))
    return [found[i] for i in range(number)]
