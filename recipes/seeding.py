"""Seeding of all random generators."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators from `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm's transforms and Mixup use the global generator
    torch.manual_seed(seed)
