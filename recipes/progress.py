"""Progress of training and of other long work: a bar on a terminal and in notebooks, log lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich import progress as rich_progress
from rich.console import Console

from zoo.recipes.logs import console, log, shows_bars

T = TypeVar("T")


_LEAST = 0.5  # seconds between two states of a notebook's bar


class _InNotebook(rich_progress.Progress):
    """Bars of plain text, in one place of a cell's output, which is empty when they end.

    rich's own need ipywidgets, stay in the notebook as widgets that can't be shown without a kernel, and make an HTML
    block of each line that a program prints.
    """

    _place: Any = None
    _text = ""
    _drawn = 0.0

    def start(self) -> None:
        if not self.disable:
            from IPython.display import DisplayHandle

            self._place = DisplayHandle()
            self._place.display({"text/plain": ""}, raw=True)

    def stop(self) -> None:
        self._draw("")

    def refresh(self) -> None:
        now = time.monotonic()
        if self._place and now - self._drawn > _LEAST:
            self._drawn = now
            plain = Console(width=100, color_system=None, force_terminal=False, force_jupyter=False)
            with plain.capture() as drawn:
                plain.print(self.get_renderable())
            self._draw("\n".join(line.rstrip() for line in drawn.get().splitlines()))

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.refresh()

    def advance(self, *args: Any, **kwargs: Any) -> None:
        super().advance(*args, **kwargs)
        self.refresh()

    def _draw(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._place.update({"text/plain": text}, raw=True)


def _bars(*columns: rich_progress.ProgressColumn, shown: bool) -> rich_progress.Progress:
    """rich's bars for the console, which disappear when they end."""
    kind = _InNotebook if console.is_jupyter else rich_progress.Progress
    return kind(*columns, console=console, transient=True, disable=not (shown and shows_bars()))


class Progress:
    """Shows the progress of a run; a context manager.

    Args:
        shown: Whether this process shows anything.
        epochs: The number of epochs.
        updates: Updates per epoch.
        every: Without a terminal, log a line after this number of updates.
        done: Updates of the whole run that are already done.
        last: The update that ends the run; None for the last one of the last epoch.
    """

    def __init__(
        self, shown: bool, epochs: int = 0, updates: int = 0, every: int = 1, done: int = 0, last: int | None = None
    ):
        self.epochs, self.updates, self.every, self.shown = epochs, updates, every, shown
        self.left = (last or epochs * updates) - done  # updates of the whole run
        self.here = 0  # updates of this process
        self.begun: float | None = None
        self.bar = _bars(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            shown=shown,
        )
        self.task: Any = None
        self.title = ""

    def __enter__(self) -> Progress:
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)

    def _start(self, description: str, total: int | None, completed: int = 0) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(description, total=total, completed=completed, note="")

    def start_epoch(self, epoch: int, done: int) -> None:
        """Begin epoch number `epoch`, from 0, or continue it after `done` updates."""
        self.start(f"epoch {epoch + 1}/{self.epochs}", done)

    def start(self, title: str, done: int) -> None:
        """Begin training, or continue it after `done` updates."""
        self.done, self.images = done, 0
        self.title = title
        self._start(title, self.updates, done)

    def advance(self, note: str, lr: float, images: int) -> None:
        """Show that one update on `images` images is done; `note` has the current figures."""
        self.done += 1
        note += self._remaining()
        if self.bar.disable:
            if self.shown and self.done % self.every == 0 and self.done < self.updates:
                log.info("%s, update %d/%d: %s, lr %.2e", self.title, self.done, self.updates, note, lr)
            return
        elapsed = self.bar.tasks[-1].elapsed or 0.0
        if elapsed > 1:  # the first second says little about the speed
            note += f"  {self.images / elapsed:.0f} images/s"
        self.images += images
        self.bar.update(self.task, advance=1, note=note)

    def _remaining(self) -> str:
        """The time left for the whole run, evaluations included, from this process's time per update so far."""
        self.left -= 1
        if self.begun is None:  # the first update waits for workers and compilers
            self.begun = time.monotonic()
            return ""
        self.here += 1
        return _left((time.monotonic() - self.begun) / self.here * max(self.left, 0))

    def start_evaluation(self, batches: int | None) -> None:
        """Begin an evaluation of `batches` batches; None if their number is unknown."""
        self._start(f"{self.title} evaluation".lstrip(), batches)

    def advance_evaluation(self) -> None:
        """Show that one batch is evaluated."""
        self.bar.advance(self.task)
        if left := self.bar.tasks[-1].time_remaining:
            self.bar.update(self.task, note=_left(left))


def _left(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield `items`; after two seconds, a terminal or a notebook shows a progress bar."""
    bar = _bars(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        shown=True,
    )
    task, start, shown = bar.add_task(description, total=total), time.monotonic(), False
    try:
        for number, item in enumerate(items):
            if not shown and time.monotonic() - start > 2:
                bar.start()
                shown = True
            bar.update(task, completed=number)
            yield item
    finally:
        if shown:
            bar.stop()
