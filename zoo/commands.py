"""Startup and exit of every command: versions, errors on one line, closed pipes. Standard library only."""

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

import zoo
from zoo.messages import UserError

__all__ = ["default_sigpipe", "discard_output", "fail", "friendly_errors", "versions"]


def versions() -> str:
    """The versions of zoo, torch, timm and Python in one line. Neither torch nor timm is imported."""
    parts = [f"zoo {zoo.__version__}"]
    for package in ("torch", "timm"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def fail(command: str, message: str, code: int = 1) -> NoReturn:
    """End the process with exit code `code` and one line on stderr."""
    _print_error(f"{command}: error: {message}")
    sys.exit(code)


@contextmanager
def default_sigpipe() -> Iterator[None]:
    """Within this context, a closed pipe ends the process silently, as when the output goes to `head`."""
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


def discard_output() -> None:
    """Redirect stdout to the null device, after the reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    print(message, file=sys.stderr)


@contextmanager
def friendly_errors(
    command: str,
    explain: Callable[[Exception], str | None] = lambda error: None,
    say: Callable[[str], None] = _print_error,
) -> Iterator[None]:
    """End the process with one line in place of a traceback if the user can correct the error.

    The exit code is that of the `UserError`, 1 for other errors, and 130 after Ctrl-C.

    Args:
        command: The name of the command, at the beginning of the line.
        explain: Returns the sentence to print for an error other than `UserError`, or None to raise the error.
        say: Prints the line.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        say(f"{command}: error: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        say(f"{command}: error: {explanation}")
        sys.exit(1)
