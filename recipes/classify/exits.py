"""Classifiers with several exits: their loss in training, and what early exit costs and gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zoo.exits import certainty, fit_thresholds, leaving
from zoo.recipes import logs, plots
from zoo.recipes.atomic_files import atomic
from zoo.recipes.classify.accuracy import Normalize, gather_images, outputs, percentage

# The shares of images that leave at each exit are a geometric series with one of these ratios; large ones cost more.
RATIOS = [0.2 * 25 ** (i / 8) for i in range(9)]


class ExitLoss(nn.Module):
    """The weighted sum of all exits' losses, and of what each exit but the last learns from the last.

    Args:
        criterion: The loss of logits (B, classes) and targets.
        weights: Weights of the exits' losses.
        distill: Weight of the Kullback-Leibler divergence of each exit from the last, which gets no gradient from it.
    """

    def __init__(self, criterion: Any, weights: Sequence[float], distill: float):
        super().__init__()
        self.criterion, self.weights, self.distill = criterion, weights, distill

    def forward(self, outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """The loss of the logits of all exits, from the first to the last."""
        parts = zip(self.weights, outputs, strict=True)
        loss: Any = sum(weight * self.criterion(logits, target) for weight, logits in parts)
        *others, last = (logits.float() for logits in outputs)
        teacher = last.detach().softmax(1)
        for logits in others if self.distill else ():
            loss = loss + self.distill * F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
        return loss


@torch.no_grad()
def measure_exits(
    model: Any,
    loader: DataLoader,
    normalize: Normalize,
    autocast: AbstractContextManager,
    on_batch: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The certainty of every exit in every image of `loader`, and whether it is right: (N, exits), float32 and bool.

    The arguments are those of `accuracy.measure`.
    """
    every = _AllExits(model)
    sure, right, places = [], [], []
    for logits, labels, _, numbers in outputs(every, loader, normalize, autocast, on_batch):
        sure.append(certainty(logits.cpu()))
        right.append((logits.argmax(-1) == labels[:, None]).cpu())
        places.append(numbers)
    (certainties, rights), _ = gather_images(places, (sure, right), ())
    return torch.from_numpy(certainties), torch.from_numpy(rights)


class _AllExits(nn.Module):
    """A model with several exits as one whose logits are (B, exits, classes), float32."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([logits.float() for logits in self.model.forward_exits(images)], 1)


def exit_report(certainties: Tensor, right: Tensor, costs: Sequence[int], seed: int) -> dict[str, Any]:
    """Each exit alone, and early exit with thresholds for several budgets.

    Thresholds are fitted on all images. Their accuracy and cost are those of each half of the images with thresholds
    that were fitted on the other half: a fit on the same images would look better than it is.

    Args:
        certainties, right: What `measure_exits` returns.
        costs: Multiply-adds up to each exit.
        seed: Decides which images are in which half.

    Returns:
        `exits`, with the `multiply_adds` and `top1` of each exit for all images; `early`, with the mean
        `multiply_adds`, `top1`, the `shares` that leave at each exit, and `thresholds` (null: no image leaves), from
        small budgets to large ones.
    """
    price = torch.tensor(costs, dtype=torch.float64)
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    halves = order[::2], order[1::2]
    exits = [
        {"multiply_adds": cost, "top1": 100 * share}
        for cost, share in zip(costs, right.double().mean(0).tolist(), strict=True)
    ]
    early = []
    for ratio in RATIOS:
        powers = [ratio**k for k in range(len(costs))]
        shares = [power / sum(powers) for power in powers]
        taken = torch.empty(len(right), dtype=torch.int64)
        for fitted, held_out in (halves, halves[::-1]):
            taken[held_out] = leaving(certainties[held_out], fit_thresholds(certainties[fitted], shares))
        early.append(
            {
                "multiply_adds": round(price[taken].mean().item()),
                "top1": 100 * right.gather(1, taken[:, None]).double().mean().item(),
                "shares": (taken.bincount(minlength=len(costs)) / len(taken)).tolist(),
                "thresholds": fit_thresholds(certainties, shares),
            }
        )
    return {"images": len(right), "exits": exits, "early": early}


def plot_exits(path: Path, report: dict[str, Any], title: str) -> None:
    """Draw accuracy over multiply-adds: of each exit alone, and of early exit."""
    figure = plots.new_figure(figsize=(6, 4), dpi=120)
    axes = figure.add_subplot()
    for name, marker, label in (("exits", "o--", "one exit for all images"), ("early", ".-", "early exit")):
        points = [(point["multiply_adds"] / 1e6, point["top1"]) for point in report[name]]
        axes.plot(*zip(*points, strict=True), marker, label=label)
    for number, point in enumerate(report["exits"], 1):
        place = (point["multiply_adds"] / 1e6, point["top1"])
        axes.annotate(str(number), place, xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.15)
    axes.set_xlabel("multiply-adds per image, millions")
    axes.set_ylabel("top-1, %")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    with atomic(path) as file:
        figure.savefig(file, format="png")


def log_exits(report: dict[str, Any]) -> None:
    """Print each exit, and early exit with the shares of images that leave at each."""
    table = Table("images that leave at each exit", "multiply-adds", "top-1")
    count = len(report["exits"])
    alone = [{**point, "shares": [n == i for n in range(count)]} for i, point in enumerate(report["exits"])]
    for point in (*alone, *report["early"]):
        shares = ", ".join(f"{100 * share:.0f}" for share in point["shares"])
        table.add_row(f"{shares} %", f"{point['multiply_adds'] / 1e6:.1f} M", percentage(point["top1"]))
    logs.console.print(table)
