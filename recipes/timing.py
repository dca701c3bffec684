"""How long the parts of an update take."""

from __future__ import annotations

import time

import torch

EVERY = 11  # a prime: processes that load images in turn, up to ten of them, are met at every turn


class StepTimes:
    """Times the parts of one update in `EVERY`, from the second on; the others cost nothing.

    In a timed update the device is waited for between the parts, which it is not otherwise: what overlaps in ordinary
    updates counts in full.

    Args:
        device: Where the model is trained.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.count = 0  # updates that this process has begun
        self.active = self.started = False
        self.updates, self.seconds = 0, {}

    def begin(self) -> None:
        """An update begins."""
        self.count += 1
        self.active, self.started = self.count % EVERY == 2, False
        self.restart()

    def restart(self) -> None:
        """What happened since the last `lap` is no part of an update."""
        self.last = self._now() if self.active else 0.0

    def lap(self, part: str) -> None:
        """What happened since the last `lap`, or the beginning, was `part`."""
        if self.active:
            now = self._now()
            self.updates += not self.started  # an evaluation, and `take`, may come between `begin` and the first part
            self.started = True
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
            self.last = now

    def take(self) -> dict[str, float]:
        """How many updates were timed since this was last asked, as `updates`, and the seconds of each part of them."""
        taken = {"updates": self.updates, **self.seconds}
        self.updates, self.seconds = 0, {}
        return taken

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
