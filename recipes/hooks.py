"""Hooks: functions of a program that `zoo.recipes.train` calls while it trains.

A run folder never contains them, and a run that is continued has only those of the new call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.messages import UserError, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class TrainingState:
    """What a hook receives.

    Attributes:
        task: `classify`, `detect`, `segment` or `panoptic`.
        folder: The run folder.
        epoch: The epochs that are done, a whole number at the end of an epoch.
        update: The updates that are done, 1 after the first one.
        updates: The updates of the whole run.
        metrics: Figures by name. After an update, the `loss` of its images, for detectors and segmentors with its
            parts, and the learning rate `lr`; the loss is None if the update was skipped. After an evaluation or an
            epoch, the line that metrics.jsonl has for it: `train_loss`, `val_top1`, ...
        model: The model in training, without a wrapper for several processes. After the hook, all of its modules are in
            training or evaluation mode as before.
        optimizer: The optimizer.
    """

    task: str
    folder: Path
    epoch: float
    update: int
    updates: int
    metrics: Mapping[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    _stopped: bool = field(default=False, init=False, repr=False)

    def stop(self) -> None:
        """End the training after this hook, as if it had its full length: it is evaluated, and its files are written.

        Calling `train` again with the same settings and run folder, and without `stop`, continues the run.
        """
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped


Hook = Callable[[TrainingState], object]


@dataclass(frozen=True)
class Hooks:
    """Functions that `train` calls; what they return is ignored.

    An error in a hook ends the training and is raised by `train`; the run is saved before. If torchrun starts several
    processes, each of them calls its hooks, and `stop` in one of them ends the training in all. An error in one of them
    does not save the run, which continues from its last checkpoint.

    Attributes:
        after_update: Called after every step of the optimizer, and after one that was skipped because the loss was not
            finite.
        after_evaluation: Called after every evaluation, when its figures are written.
        after_epoch: Called at the end of every epoch, after its evaluation if it has one, and at the end of the
            training.
    """

    after_update: Hook | None = None
    after_evaluation: Hook | None = None
    after_epoch: Hook | None = None


def check_hooks(hooks: Any) -> None:
    """Refuse what can't be the hooks of a training, and would be ignored.

    Raises:
        UserError: The message says what they have to be.
    """
    if not (hooks is None or isinstance(hooks, Hooks)):
        raise UserError(
            f"hooks={one_line(repr(hooks), 60)} are no Hooks: write hooks=Hooks(after_update=<function>), or "
            "after_evaluation or after_epoch."
        )
    for item in fields(Hooks) if hooks else ():
        hook = getattr(hooks, item.name)
        if not (hook is None or callable(hook)):
            raise UserError(f"{item.name}={one_line(repr(hook), 60)} is not a function that takes a TrainingState.")


class HookFailed(Exception):
    """A hook raised `error`; `train` raises that in its place, so that no handler takes it for an error of a run."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error
