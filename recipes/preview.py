"""Pictures of the batches that a training would use: `zoo-look batch`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from zoo.messages import UserError
from zoo.recipes import cli, config, early, tasks
from zoo.recipes.dense.formats import look
from zoo.recipes.logs import log


class _Warnings(logging.Handler):
    """Collects what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def preview(words: Sequence[str], out: Path, images: int) -> dict[str, Any]:
    """Draw a sheet of the first training images as the network gets them.

    Args:
        words: The arguments of `zoo-train`.
        out: The PNG to write.
        images: The largest number of images.

    Returns:
        The `model`, its input's `size`, the `images` drawn, with the `labels` of each, and `notes` for the user.

    Raises:
        UserError: The training could not start either; the message is that of `zoo-train`.
    """
    found: dict[str, Any] = {}

    def draw(cfg: DictConfig) -> None:
        config.check(cfg)
        early.check(cfg)
        warnings = _Warnings()
        before = log.handlers
        log.handlers = [warnings]
        try:
            drawn = tasks.load(cfg.task, "preview").preview(cfg, out, images)
        finally:
            log.handlers = before
        found.update(drawn | {"notes": warnings.lines + drawn["notes"]})

    if {"-m", "--multirun"} & set(words):
        raise UserError("zoo-look batch draws the images of one training: leave out -m, and give each key one value.")
    config.register()
    before = sys.argv[:]
    try:
        cli.run("zoo-look batch", "config", config.Config, draw, look.with_option(list(words)))
    finally:
        sys.argv[:] = before
    if not found:  # --cfg printed the configuration
        sys.exit(0)
    return found
