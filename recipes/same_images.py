"""Refusing a validation on training images, whose scores say nothing about other images."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zoo.messages import UserError
from zoo.recipes.config import DataConfig
from zoo.recipes.logs import log

_Path = str | os.PathLike[str]


def check(cfg: DataConfig, train: Sequence[_Path], val: Sequence[_Path]) -> None:
    """Refuse validation images that are training images too, or only warn of them if `data.same_images` allows it.

    The names of folders do not matter, nor do links: files of one name are compared by their place in the file system.

    Raises:
        UserError: There are such images; the message has their number and the first of them.
    """
    names = set(map(os.path.basename, train)) & set(map(os.path.basename, val))
    known = {_place(path) for path in train if os.path.basename(path) in names} - {None}
    shared = [path for path in val if os.path.basename(path) in names and _place(path) in known]
    if not shared:
        return
    what = f"{len(shared)} of the {len(val)} validation images are training images too; the first is {shared[0]}"
    if not cfg.same_images:
        raise UserError(f"{what}: give each split its own images, or allow this with data.same_images=true.")
    log.warning("%s: scores on them say nothing about other images.", what)


def _place(path: _Path) -> tuple[int, int] | None:
    """What tells a file from all others; None if it can't be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
