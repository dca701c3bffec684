"""The log of the commands: the console, and `train.log` in a run folder."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

console = Console()
_errors = Console(stderr=True)
log = logging.getLogger("zoo")


def shows_bars() -> bool:
    """Whether the console shows progress bars: on a terminal, and in a notebook."""
    return console.is_terminal or console.is_jupyter


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        target = _errors if record.levelno >= logging.ERROR else console
        if target.is_jupyter:  # where rich makes an HTML block of every line
            print(self.format(record), file=target.file)
        else:
            target.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def start_log(folder: Path | None, primary: bool) -> None:
    """Print the log, and append it to `train.log` in `folder`; processes other than the primary print warnings only."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.INFO if primary else logging.WARNING)
    log.addHandler(_ConsoleHandler())
    if folder and primary:
        handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
