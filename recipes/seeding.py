"""Seeding of all random generators."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators from `numbers`, those of all devices."""
    torch.manual_seed(seed_cpu(*numbers))


def seed_cpu(*numbers: int) -> int:
    """Seed the generators of the CPU as `seed_all` does, and return the seed. Fast enough for every image.

    For devices that are not in use yet, `torch.manual_seed` notes the stack of its caller each time.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm's transforms and Mixup use the global generator
    torch.default_generator.manual_seed(seed)
    return seed
