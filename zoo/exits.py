"""Early exit: each image is classified by the first of a model's classifiers that is certain enough.

Any model works that has `num_exits` and `forward_exits(images)`, a generator. It yields the logits (B, classes) of one
exit after the other, and computes each when it is asked for. `send(indices)` continues with some of the images only.
`zoo-train` also calls `set_exit_training()`, after which the output in training is the logits of all exits, a tuple.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import implementation

__all__ = ["certainty", "exit_costs", "fit_thresholds", "has_exits", "leave_early", "leaving"]


def has_exits(model: nn.Module) -> bool:
    """Whether a model has several exits."""
    return getattr(model, "num_exits", 1) > 1


def certainty(logits: Tensor) -> Tensor:
    """How certain an exit is of each image: its largest probability, (..., classes) -> (...), float32 or float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).amax(-1)


@torch.no_grad()
def leave_early(model: Any, images: Tensor, thresholds: Sequence[float | None]) -> tuple[Tensor, Tensor]:
    """Classify images, each by the first exit whose certainty reaches its threshold.

    Later exits are computed for the images that are left, and not at all if there are none.

    Args:
        model: A model with exits, in evaluation mode.
        images: (B, C, H, W).
        thresholds: One for each exit but the last, from 0 to 1; None lets no image leave.

    Returns:
        The logits (B, classes), and the number of the exit that each image took, from 0: (B,), int64.

    Raises:
        ValueError: There are other numbers of exits and thresholds.
    """
    if len(thresholds) != model.num_exits - 1:
        raise ValueError(
            f"Got {len(thresholds)} thresholds for a model of {model.num_exits} exits: give one for each but the last."
        )
    exits = model.forward_exits(images)
    logits = next(exits)
    result, taken = torch.zeros_like(logits), torch.full((len(images),), len(thresholds), device=logits.device)
    left = torch.arange(len(images), device=logits.device)
    for number, threshold in enumerate(thresholds):
        leaves = certainty(logits) >= _limit(threshold)
        result[left[leaves]], taken[left[leaves]] = logits[leaves], number
        stays = (~leaves).nonzero()[:, 0]
        if not len(stays):
            return result, taken
        left = left[stays]
        logits = exits.send(stays)
    result[left] = logits
    return result, taken


def exit_costs(model: Any, input_size: Sequence[int]) -> list[int]:
    """Multiply-adds for one image of `input_size` (C, H, W) that leaves at each exit, as PyTorch counts them.

    Matrix products and convolutions count, and nothing else. Nothing is computed, and the model is not changed.
    """
    model, counter = copy.deepcopy(model).to("meta").eval(), FlopCounterMode(display=False)
    with torch.no_grad(), implementation("reference"), counter:
        exits = model.forward_exits(torch.empty(1, *input_size, device="meta"))
        return [counter.get_total_flops() // 2 for _ in exits]


def fit_thresholds(certainties: Tensor, shares: Sequence[float]) -> list[float | None]:
    """Thresholds with which about these shares of images leave at each exit.

    At each exit, the most certain of the images that are left leave it. Equal certainties leave together.

    Args:
        certainties: (N, exits), for all images and exits.
        shares: The share of all images that leaves at each exit; what is left leaves at the last one.

    Returns:
        A threshold for each exit but the last; None if no image leaves.
    """
    thresholds: list[float | None] = []
    left = torch.ones(len(certainties), dtype=torch.bool)
    for number, share in enumerate(shares[:-1]):
        values = certainties[left, number].sort(descending=True).values
        count = min(round(share * len(certainties)), len(values))
        thresholds.append(values[count - 1].item() if count else None)
        left &= certainties[:, number] < _limit(thresholds[-1])
    return thresholds


def leaving(certainties: Tensor, thresholds: Sequence[float | None]) -> Tensor:
    """The number of the exit that each image takes, from 0: certainties (N, exits) -> (N,), int64."""
    enough = certainties[:, :-1] >= torch.tensor(list(map(_limit, thresholds)), dtype=certainties.dtype)
    return torch.cat((enough, torch.ones(len(enough), 1, dtype=torch.bool)), 1).int().argmax(1)


def _limit(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold
