"""The cache of files that the commands make. Each folder in it appears complete, in one step."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """The folder of the cache, beside torch's; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Create `folder` with the files that `write` writes into the folder that it gets.

    Several processes may call this at the same time: all but the first to finish fail. A process that is killed leaves
    nothing behind that would be used.

    Raises:
        OSError: `folder` exists and is not empty, or can't be written.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        write(temporary)
        os.rename(temporary, folder)  # replaces an empty folder, but never one with files
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; folders of the last hour may still be in use."""
    for path in folder.parent.glob(f".{folder.name}-????????.tmp"):
        with suppress(FileNotFoundError):  # it may have been renamed just now
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path, ignore_errors=True)
