"""Images that can't be read: each is skipped and logged once, and too many of them end a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.messages import UserError
from zoo.recipes import atomic_files, distributed
from zoo.recipes.logs import log


class CorruptFile(Exception):
    """An image or its label can't be read; `reason` says why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path} ({reason})")
        self.path = str(path)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Strip the traceback of a worker process from its UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


class CorruptImages:
    """The images that a run has not been able to read so far.

    Args:
        folder: The run folder, for a list of the images if there are too many.
        limit: data.max_corrupt.
        names: The images that are already known.
    """

    def __init__(self, folder: Path, limit: int, names: Iterable[str] = ()):
        self.folder, self.limit = folder, limit
        self.names = set(names)
        self.known = len(self.names)  # how many of them are known to all processes

    @property
    def news(self) -> int:
        """How many of them may be known only to this process."""
        return len(self.names) - self.known

    def note(self, names: Iterable[str]) -> None:
        """Log which images were skipped."""
        for name in names:
            if name not in self.names:
                self.names.add(name)
                log.warning("Skipped a corrupt image: %s", name)

    def share(self) -> None:
        """Exchange the names between all processes."""
        self.names = {name for part in distributed.gather(self.names) for name in part}
        self.known = len(self.names)

    def check(self, news: float, hint: str) -> None:
        """End the run if there are too many corrupt images.

        Args:
            news: The number of images that `share` has not exchanged yet, over all processes.
            hint: How to resume the run, for the message.

        Raises:
            UserError: There are too many of them; corrupt.txt in the run folder lists them.
        """
        if self.known + news <= self.limit:
            return
        self.share()
        names, path = sorted(self.names), self.folder / "corrupt.txt"
        if distributed.rank() == 0:
            atomic_files.write_text(path, "\n".join(names) + "\n")
        raise UserError(
            f"{len(names)} images are corrupt, more than data.max_corrupt={self.limit}; {path} lists them, beginning "
            f"with {names[0]}: repair or remove them, or raise data.max_corrupt. {hint}"
        )
