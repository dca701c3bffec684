"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich import progress as rich_progress

from zoo.recipes.runs import console, log


class Progress:
    """Shows the epochs of a run; a context manager.

    Args:
        shown: Whether this process shows anything at all.
        epochs: How many there are.
        updates: Updates in each.
        every: Where there is no terminal, one line every so many updates.
    """

    def __init__(self, shown: bool, epochs: int = 0, updates: int = 0, every: int = 1):
        self.epochs, self.updates, self.every, self.shown = epochs, updates, every, shown
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            rich_progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
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
        """Epoch number `epoch`, from 0, begins or goes on after `done` updates."""
        self.start(f"epoch {epoch + 1}/{self.epochs}", done)

    def start(self, title: str, done: int) -> None:
        """Training begins or goes on after `done` updates."""
        self.done, self.images = done, 0
        self.title = title
        self._start(title, self.updates, done)

    def advance(self, note: str, lr: float, images: int) -> None:
        """One update is done, on so many images; `note` says how it goes."""
        self.done += 1
        if self.bar.disable:
            if self.shown and self.done % self.every == 0 and self.done < self.updates:
                log.info("%s, update %d/%d: %s, lr %.2e", self.title, self.done, self.updates, note, lr)
            return
        elapsed = self.bar.tasks[-1].elapsed or 0.0
        if elapsed > 1:  # what came before is no measure of the speed
            note += f"  {self.images / elapsed:.0f} images/s"
        self.images += images
        self.bar.update(self.task, advance=1, note=note)

    def start_evaluation(self, batches: int | None) -> None:
        """Evaluation of `batches` batches begins."""
        self._start(f"{self.title} evaluation".lstrip(), batches)

    def advance_evaluation(self) -> None:
        """One batch is evaluated."""
        self.bar.advance(self.task)
