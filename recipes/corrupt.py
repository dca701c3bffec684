"""Images that can't be read: skipped, named once each, and too many of them end a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.recipes import atomic_files, distributed
from zoo.recipes.errors import RunError
from zoo.recipes.logs import log


class CorruptFile(Exception):
    """An image, or what belongs to it, can't be read; `reason` says why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path} ({reason})")
        self.path = str(path)


@contextmanager
def worker_errors() -> Iterator[None]:
    """What a worker has to tell the user comes without the worker's traceback."""
    try:
        yield
    except RunError as error:
        raise RunError(str(error).rpartition(f"{RunError.__name__}: ")[2].strip()) from error


class CorruptImages:
    """What a run could not read so far.

    Args:
        folder: The run folder, for the list of them if there are too many.
        limit: data.max_corrupt.
        names: Those that the run knew before.
    """

    def __init__(self, folder: Path, limit: int, names: Iterable[str] = ()):
        self.folder, self.limit = folder, limit
        self.names = set(names)
        self.known = len(self.names)  # how many of them all processes know of

    @property
    def news(self) -> int:
        """How many of them this process alone may know of."""
        return len(self.names) - self.known

    def note(self, names: Iterable[str]) -> None:
        """Say which images were skipped."""
        for name in names:
            if name not in self.names:
                self.names.add(name)
                log.warning("Skipped a corrupt image: %s", name)

    def share(self) -> None:
        """Let all processes know all of them."""
        self.names = {name for part in distributed.gather(self.names) for name in part}
        self.known = len(self.names)

    def check(self, news: float, kept: str) -> None:
        """End the run if there are too many; `news` are those of all processes, `kept` says what is left of the run.

        Raises:
            RunError: there are; corrupt.txt in the run folder lists them.
        """
        if self.known + news <= self.limit:
            return
        self.share()
        names, path = sorted(self.names), self.folder / "corrupt.txt"
        if distributed.rank() == 0:
            atomic_files.write_text(path, "\n".join(names) + "\n")
        raise RunError(
            f"{len(names)} images are corrupt, more than data.max_corrupt={self.limit}; {path} lists them, beginning "
            f"with {names[0]}: repair or remove them, or raise data.max_corrupt. {kept}"
        )
