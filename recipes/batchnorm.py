"""What BatchNorm can't be trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.recipes.errors import RunError

TOO_FEW = "Expected more than 1 value per channel when training"  # torch's words


def check_batchnorm(model: nn.Module, forward: Callable[[], Any], key: str) -> None:
    """Refuse one image a pass where a BatchNorm of `model` sees maps of one pixel: a single value has no variance.

    Args:
        model: The model, on the CPU; it is as before afterwards.
        forward: Runs the model on one image of the size of training.
        key: What sets that size.

    Raises:
        RunError: there is such a BatchNorm.
    """
    mode = model.training
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()
    except ValueError as error:
        if TOO_FEW not in str(error):
            raise
        raise RunError(remedy(key)) from error
    finally:
        model.train(mode)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def remedy(key: str) -> str:
    """What to do about it."""
    return (
        "trainer.batch_size=1 is too small for this model: its BatchNorm sees a single value of each channel, which "
        f"has no variance. Use trainer.batch_size=2 or more (of as many images), or a larger {key}."
    )
