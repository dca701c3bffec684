"""Early ends of a run, and advice on errors of the operating system."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from typing import Any

from zoo.messages import UserError, one_line


class NoEffect(UserError):
    """A key or group that the user set has no effect, because of the value of another key.

    In a sweep over the other key, this is no mistake if a run has a value with which it has an effect.

    Args:
        message: The error, as a sentence.
        key: The key or group.
        other: The other key.
        values: The values of `other` with which `key` has an effect; if none are given, any but null.
    """

    def __init__(self, message: str, key: str, other: str, *values: Any):
        super().__init__(message)
        self.key, self.other, self.values = key, other, values

    def allows(self, value: Any) -> bool:
        """Whether `key` has an effect if the other key has this value."""
        return value in self.values if self.values else value is not None


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes. torch's file writer raises an error of its own on top of any other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def of_the_system(error: BaseException) -> str | None:
    """What the user can do if the system refused files or memory, or killed a process. None for other errors."""
    for cause in causes(error):
        text = one_line(cause, 200)
        number = getattr(cause, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
            return "too many files are open: raise the limit (ulimit -n 4096), or set data.num_workers=0."
        if "DataLoader worker" in text or (isinstance(cause, ConnectionResetError) and _of_a_worker(cause)):
            return f"a process that loads images died ({text}), often because memory ran out: lower data.num_workers."
        if number == errno.ENOMEM or isinstance(cause, MemoryError) or any(words in text for words in _NO_MEMORY):
            return "there is too little memory: lower trainer.batch_size or data.num_workers, or end other programs."
        if "can't start new thread" in text or (number == errno.EAGAIN and isinstance(cause, BlockingIOError)):
            return (
                "no more processes or threads can be started: raise the limit (ulimit -u), or set data.num_workers=0."
            )
    return None


def _of_a_worker(error: BaseException) -> bool:
    """Whether `error` was raised while a tensor or a message of another process was received."""
    files = (frame.filename.replace(os.sep, "/") for frame in traceback.extract_tb(error.__traceback__))
    return any("/multiprocessing/" in file for file in files)


_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "failed to map segment")
