"""Atomic writing of files: a file holds either its old content or all of its new content."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from zoo.messages import UserError
from zoo.recipes.errors import causes
from zoo.recipes.lock import temporary


@contextmanager
def atomic(path: Path, before: Path | None = None) -> Iterator[BinaryIO]:
    """Open `path` for writing, so that it holds either its old content or all of the new content.

    Args:
        path: The file.
        before: The path at which the old content of `path` is kept; None to discard it.

    Raises:
        UserError: The content could not be written (disk full, folder not writable); `path` is unchanged.
    """
    draft = temporary(path)
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before:
            _keep(path, before)
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name has to survive a power failure too
        finally:
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        cause = next((e for e in causes(error) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        kept = f"; {path.name} is as it was before" if path.exists() else ""
        raise UserError(
            f"could not write {path}: {os.strerror(cause.errno) if cause.errno else cause}{kept}. "
            f"{'Free some space' if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 'Fix that'} "
            "and start the same command again."
        ) from error


def _keep(path: Path, before: Path) -> None:
    """Keep the content of `path` as `before` too, as a hard link if the file system has them."""
    if path.exists():
        before.unlink(missing_ok=True)
        try:
            os.link(path, before)
        except OSError:  # a file system without hard links
            os.replace(path, before)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of numbers that are not finite, which JSON can't represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
