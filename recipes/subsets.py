"""Evenly spread subsets of lists that are too long to be checked, drawn or shown in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from zoo.recipes.config import DataConfig

T = TypeVar("T")


def evenly_spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of `items`, evenly spread, in their order."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def files_to_check(items: Sequence[T], cfg: DataConfig) -> list[T]:
    """All items, or `data.check_files` of them, spread evenly."""
    return evenly_spread(items, len(items) if cfg.check_files < 0 else cfg.check_files)
