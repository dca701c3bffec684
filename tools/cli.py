"""What the tools share: the argument parser, types of options, errors in one line, console and progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from zoo import commands
from zoo.commands import default_sigpipe, versions
from zoo.messages import UserError

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the line breaks of its description, and prints an error on one line.

    If required arguments are missing, it also prints the help on stderr.
    """

    def __init__(self, **settings):
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)
        if " " not in self.prog:  # not for a subcommand
            self.add_argument("--version", action="version", version=versions(), help="print the installed versions")

    def parse_known_args(self, args=None, namespace=None):
        """The method of argparse that `parse_args` calls."""
        words = sys.argv[1:] if args is None else args
        # argparse also calls an argument that may come any number of times, or never, required.
        if not words and any(action.required and action.nargs != "*" for action in self._actions):
            self.print_help(sys.stderr)  # argparse then adds the error
        with default_sigpipe():
            return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options.\n")


def friendly_errors(command: str) -> AbstractContextManager[None]:
    """End the process with one line in place of a traceback if the user can correct the error."""
    return commands.friendly_errors(command, explain=_explained)


def _explained(error: Exception) -> str | None:
    if not isinstance(error, OSError):
        return None
    return f"{error.filename}: {error.strerror}." if error.filename else str(error)


def count(text: str) -> int:
    """The type of an option that takes a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of 1 or more")
    return int(text)


def index(text: str) -> int:
    """The type of an option that takes a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of 0 or more")
    return int(text)


def check_target(file: Path, force: bool) -> None:
    """Check that a command can write `file`.

    Raises:
        UserError: The file exists and `force` is not set, or its folder can't be written to.
    """
    if file.exists() and not force:
        raise UserError(f"{file} exists; --force replaces it.")
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{file} can't be written: {parent} is not a folder that you may write to; give another with -o."
        )


def console() -> Console:
    """The console for results. Where stdout is not a terminal, lines are not wrapped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 240, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def progress(label: str, log: bool = False) -> Iterator[Callable[[str], None]]:
    """Show on stderr what the command is doing, in a line that changes.

    Args:
        label: The text that stays.
        log: Whether to print `label` once where stderr is not a terminal; nothing is shown there otherwise.

    Yields:
        A function that shows a text after the label.
    """
    from rich.console import Console

    console = Console(file=sys.stderr)  # even while sys.stderr is redirected
    if console.is_terminal:
        with console.status(label) as status:
            yield lambda text: status.update(f"{label}: {text}")
        return
    if log:
        print(label, file=sys.stderr, flush=True)
    yield lambda text: None
