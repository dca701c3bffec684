"""Timing of the parts of an update: loading, forward, backward, optimizer."""

from __future__ import annotations

import time

import torch

EVERY = 11  # a prime, so that each of up to ten workers, which load images in turn, is measured


class StepTimes:
    """Times the parts of every `EVERY`-th update, from the second one on; other updates are not slowed down.

    A timed update synchronizes with the device between its parts, so that work which overlaps in other updates counts
    in full.

    Args:
        device: Where the model is trained.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.count = 0  # updates that this process has begun
        self.active = self.started = False
        self.updates, self.seconds = 0, {}

    def begin(self) -> None:
        """Begin an update."""
        self.count += 1
        self.active, self.started = self.count % EVERY == 2, False
        self.restart()

    def restart(self) -> None:
        """Discard the time since the last `lap`: it is not part of an update."""
        self.last = self._now() if self.active else 0.0

    def lap(self, part: str) -> None:
        """Count the time since the last `lap` or `begin` as `part`."""
        if self.active:
            now = self._now()
            self.updates += not self.started  # an evaluation, and `take`, may come between `begin` and the first part
            self.started = True
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
            self.last = now

    def take(self) -> dict[str, float]:
        """The number of `updates` timed since the last call, and the seconds of each of their parts."""
        taken = {"updates": self.updates, **self.seconds}
        self.updates, self.seconds = 0, {}
        return taken

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
