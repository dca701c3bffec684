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
        self.done, self.images_at_start = done, None
        self.title = f"epoch {epoch + 1}/{self.epochs}"
        self._start(self.title, self.updates, done)

    def advance(self, tallies: dict[str, float], processes: int, lr: float) -> None:
        """One update is done; `tallies` are this process's sums over the epoch."""
        self.done += 1
        images = max(tallies["images"], 1)
        note = f"loss {tallies['loss'] / images:.3f}  top-1 {100 * tallies['right'] / images:.1f} %"
        if self.bar.disable:
            if self.shown and self.done % self.every == 0 and self.done < self.updates:
                log.info("%s, update %d/%d: %s, lr %.2e", self.title, self.done, self.updates, note, lr)
            return
        self.bar.update(self.task, advance=1, note=note + self._speed(images * processes))

    def _speed(self, images: float) -> str:
        elapsed = self.bar.tasks[-1].elapsed or 0.0
        if self.images_at_start is None:
            self.images_at_start = images
        return f"  {(images - self.images_at_start) / elapsed:.0f} images/s" if elapsed > 1 else ""

    def start_evaluation(self, batches: int | None) -> None:
        """Evaluation of `batches` batches begins."""
        self._start(f"{self.title} evaluation".lstrip(), batches)

    def advance_evaluation(self) -> None:
        """One batch is evaluated."""
        self.bar.advance(self.task)

    def end_epoch(self, record: dict[str, Any], improved: bool) -> None:
        """Print the line of an epoch."""
        train = f"loss {record['train_loss']:.4f}"
        if record["train_top1"] is not None:
            train += f" top-1 {record['train_top1']:.2f} %"
        val = ""
        if "val_top1" in record:
            val = f" | validation loss {record['val_loss']:.4f} top-1 {record['val_top1']:.2f} %"
        log.info(
            "%s | training %s%s%s | %.0f images/s",
            self.title,
            train,
            val,
            " (best)" if improved else "",
            record["images_per_second"],
        )
