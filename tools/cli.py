"""What the commands share: errors in one line without a traceback, and a console that says what is under way."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from zoo.messages import UserError
from zoo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console


class ToolError(UserError):
    """A mistake that the user of a tool can correct, described in one sentence."""


class Parser(argparse.ArgumentParser):
    """A command line that shows its description and examples as they are written, and errors in one line.

    Without the words that it needs it shows its help, on stderr.
    """

    def __init__(self, **settings):
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)
        if " " not in self.prog:  # not of a sub-command
            self.add_argument("--version", action="version", version=versions(), help="show what is installed")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, which `parse_args` calls."""
        words = sys.argv[1:] if args is None else args
        if not words and any(action.required for action in self._actions):
            self.print_help(sys.stderr)  # and then the error
        with _end_with_the_reader():
            return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process."""
        self.exit(2, f"{self.prog}: error: {message}; --help shows what there is.\n")


@contextmanager
def _end_with_the_reader() -> Iterator[None]:
    """Within, what reads the output, such as `head`, may end this process without a word."""
    if not hasattr(signal, "SIGPIPE"):
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        signal.signal(signal.SIGPIPE, before)


@contextmanager
def friendly_errors(command: str) -> Iterator[None]:
    """Print what the user can mend in one line, and end the process: with 1, or 130 for Ctrl-C."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        fail(command, str(error))
    except OSError as error:
        fail(command, f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)


def fail(command: str, message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr."""
    print(f"{command}: error: {message}", file=sys.stderr)
    sys.exit(code)


def count(text: str) -> int:
    """An option that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of 1 or more")
    return int(text)


def index(text: str) -> int:
    """An option that is a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of 0 or more")
    return int(text)


def console() -> Console:
    """For results: as wide as the terminal, or as the widest line where it is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 240, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def progress(label: str) -> Iterator[Callable[[str], None]]:
    """Says on stderr what is under way, in a line that changes; nothing where stderr is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status(label) as status:
        yield lambda text: status.update(f"{label}: {text}")
