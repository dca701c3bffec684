"""What a probe computes from features: votes of neighbours, and classifiers trained at several learning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.efficient_probing import EfficientProbing

_CHUNK = 512  # rows of features that are scored at once


def nearest_votes(
    bank: Tensor, labels: Tensor, features: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """The votes (B, num_classes) of the k most similar rows of `bank` for each row of `features`.

    A neighbour votes for its class with exp(cosine similarity / temperature), as in DINO's evaluation (arXiv
    2104.14294, appendix A). The votes of a row are divided by their sum.

    Args:
        bank: Features (N, C) of images whose classes are known.
        labels: Their classes (N,).
        features: Features (B, C).
        num_classes: Number of classes.
        k: Number of neighbours, at most N.
        temperature: See above.
    """
    similarity, places = (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    weights = (similarity / temperature).softmax(1)
    return weights.new_zeros(len(features), num_classes).scatter_add_(1, labels[places], weights)


class LinearHeads(nn.Module):
    """One linear classifier per learning rate, on standardized features: (B, dim) -> (rates, B, num_classes).

    All of them are one batched product. The classifiers begin at zero.

    Args:
        mean: The mean (dim,) of the training features.
        std: Their standard deviation (dim,).
        num_classes: Number of classes.
        count: Number of learning rates.
    """

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int, count: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.heads = nn.ModuleList(nn.Linear(len(mean), num_classes) for _ in range(count))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) -> (rates, B, num_classes)."""
        x = (x - self.mean) / self.std
        heads: Any = self.heads
        weight = torch.stack([head.weight for head in heads])
        bias = torch.stack([head.bias for head in heads])
        return torch.baddbmm(bias[:, None], x.expand(len(weight), -1, -1), weight.transpose(1, 2))

    def plain(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first classifier for features that are not standardized."""
        head: Any = self.heads[0]
        weight = head.weight / self.std
        return weight, head.bias - weight @ self.mean


class ProbingHeads(nn.Module):
    """One head of efficient probing per learning rate: tokens (B, N, dim) -> (rates, B, num_classes).

    Args:
        head: The head that all of them begin as.
        count: Number of learning rates.
    """

    def __init__(self, head: EfficientProbing, count: int):
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))
        for copied in self.heads:
            copied.pool.prefix_tokens = 0  # the features have none

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (rates, B, num_classes)."""
        return torch.stack([head(x) for head in self.heads])


@dataclass
class Rows:
    """Rows of features with their labels.

    Attributes:
        values: The features (N, ...), possibly mapped from a file.
        labels: (N,), int64.
        rows: The rows that are used, (n,).
        prepare: Converts features, on the device, to the input of the heads.
        device: Where to compute.
    """

    values: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    prepare: Callable[[Tensor], Tensor]
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """The input of the heads and the labels for some of the rows."""
        rows = self.rows[places]
        features = torch.from_numpy(np.ascontiguousarray(self.values[rows])).to(self.device)
        with torch.no_grad():
            return self.prepare(features), torch.from_numpy(self.labels[rows]).to(self.device)

    def batches(self, size: int = _CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, in batches."""
        for first in range(0, len(self), size):
            yield self.batch(np.arange(first, min(first + size, len(self))))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of features (N, C)."""
        total: Any = 0.0
        squares: Any = 0.0
        for x, _ in self.batches():
            total, squares = total + x.double().sum(0), squares + x.double().square().sum(0)
        mean = total / len(self)
        variance = (squares / len(self) - mean.square()).clamp_min(0)
        # A channel that is almost constant in training could otherwise be huge for another image.
        std = (variance + 1e-5 * variance.mean() + 1e-12).sqrt()
        return mean.float(), std.float()


class Fit:
    """Trains heads at several learning rates at once, each as if it were alone. The rates fall to 0 along a cosine.

    Args:
        heads: A module with one of its `heads` per learning rate; it returns their logits (rates, B, classes).
        rates: The learning rates.
        data: The rows to train on.
        epochs: Number of passes.
        batch_size: Rows in an update.
        seed: Determines the order of the rows in each epoch.
    """

    def __init__(
        self, heads: LinearHeads | ProbingHeads, rates: list[float], data: Rows, epochs: int, batch_size: int, seed: int
    ):
        self.heads, self.rates, self.data, self.epochs, self.seed = heads, rates, data, epochs, seed
        self.batch_size = min(batch_size, len(data))
        self.updates = max(1, len(data) // self.batch_size)  # of an epoch: an incomplete batch is left out
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads.heads, rates, strict=True)]
        self.optimizer: torch.optim.Optimizer
        if isinstance(heads, LinearHeads):
            self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        length = epochs * self.updates
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: (1 + math.cos(math.pi * min(update, length) / length)) / 2
        )
        self.epoch = 0

    def run_epoch(self, on_update: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
        """Train for an epoch; returns the mean loss and the share of right answers in training, for each rate.

        Args:
            on_update: Called after each update with the losses (rates,).
        """
        self.heads.train()
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.data))
        losses: Any = 0.0
        right: Any = 0.0
        for number in range(self.updates):
            x, y = self.data.batch(order[number * self.batch_size : (number + 1) * self.batch_size])
            logits = self.heads(x)
            loss = _losses(logits, y)
            self.optimizer.zero_grad()
            loss.sum().backward()  # the heads share no parameter, so the gradient of each is that of its own loss
            self.optimizer.step()
            self.schedule.step()
            losses = losses + loss.detach()
            right = right + (logits.detach().argmax(2) == y).float().mean(1)
            on_update(loss.detach())
        self.epoch += 1
        return losses / self.updates, right / self.updates


@torch.no_grad()
def score(heads: nn.Module, data: Rows) -> tuple[list[float | None], list[float]]:
    """Top-1 accuracy in percent and mean loss for each learning rate; None and inf for one that diverged."""
    heads.eval()
    right: Any = 0.0
    losses: Any = 0.0
    for x, y in data.batches():
        logits = heads(x)
        right = right + (logits.argmax(2) == y).double().sum(1)
        losses = losses + _losses(logits, y).double() * len(y)
    found = (losses / len(data)).tolist()
    top1 = (100 * right / len(data)).tolist()
    finite = [math.isfinite(loss) for loss in found]
    return (
        [value if good else None for value, good in zip(top1, finite, strict=True)],
        [loss if good else math.inf for loss, good in zip(found, finite, strict=True)],
    )


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of each rate: logits (rates, B, classes) and labels (B,) to (rates,)."""
    rates, batch, _ = logits.shape
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(rates), reduction="none").view(rates, batch).mean(1)
