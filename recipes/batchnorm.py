"""A check of the input size that BatchNorm needs in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.messages import UserError

TOO_FEW = "Expected more than 1 value per channel when training"  # part of torch's message


def check_batchnorm(model: nn.Module, forward: Callable[[], Any], key: str) -> None:
    """Refuse a batch of one image if a BatchNorm of `model` gets a map of one pixel: a single value has no variance.

    Args:
        model: The model, on the CPU; it is left unchanged.
        forward: Runs the model on one image of the size used in training.
        key: The setting for that size.

    Raises:
        UserError: There is such a BatchNorm.
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
        raise UserError(remedy(key)) from error
    finally:
        model.train(mode)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def remedy(key: str) -> str:
    """The message that says what to do."""
    return (
        "trainer.batch_size=1 is too small for this model: its BatchNorm gets a single value of each channel, which "
        f"has no variance. Use trainer.batch_size=2 or more (with at least as many training images), or a larger {key}."
    )
