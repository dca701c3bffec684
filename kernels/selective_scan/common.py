"""The names of the directions, which the custom operators take as numbers."""

from __future__ import annotations

from collections.abc import Iterable

# By number. An odd one goes along columns, one from 2 on is reversed.
DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")


def numbers(directions: Iterable[str]) -> list[int]:
    """The numbers of directions."""
    return [DIRECTIONS.index(name) for name in directions]


def names(directions: Iterable[int]) -> tuple[str, ...]:
    """The directions by their numbers."""
    return tuple(DIRECTIONS[number] for number in directions)
