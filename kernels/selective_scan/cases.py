"""Shapes at which models call the selective scan, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.selective_scan.op import Direction, selective_scan

FUNCTION = selective_scan
ALL: tuple[Direction, ...] = ("rows", "columns", "rows_reversed", "columns_reversed")
BOTH: tuple[Direction, ...] = ("rows", "rows_reversed")


@dataclass(frozen=True)
class Case:
    """One call, without the batch; `op.selective_scan` explains the options."""

    size: tuple[int, int]
    channels: int
    d_state: int = 1
    directions: tuple[Direction, ...] = ALL
    own_inputs: bool = False

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        name = f"{self.size[0]}x{self.size[1]}x{self.channels}-state{self.d_state}"
        name += f"-{'-'.join(self.directions)}" if self.directions != ALL else ""
        return name + "-own-inputs" * self.own_inputs


CASES = {
    case.name: case
    for case in (
        # four directions of one input, a number for each channel; images of 224 and 512 pixels
        Case((56, 56), 64),
        Case((28, 28), 144),
        Case((14, 14), 320),
        Case((128, 128), 64),
        # a single direction, to compare with other libraries
        Case((56, 56), 128, directions=("rows",)),
        # a sequence in both directions, each with an input of its own and 16 numbers for each channel
        Case((1, 197), 384, 16, BOTH, own_inputs=True),
        Case((1, 197), 768, 16, BOTH, own_inputs=True),
        Case((1, 730), 384, 16, BOTH, own_inputs=True),
    )
}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind.
KINDS = ("14x14x320-state1", "1x197x384-state16-rows-rows_reversed-own-inputs")


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION: steps and decays are those of a new model."""
    generator = torch.Generator().manual_seed(0)
    count, channels, numbers = len(case.directions), case.channels, case.d_state
    maps = (batch, *case.size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(requires_grad)

    x = normal(*maps, count, channels) if case.own_inputs else normal(*maps, channels)
    delta, B, C = normal(*maps, count, channels), normal(*maps, count, numbers), normal(*maps, count, numbers)
    D = normal(count, channels)
    A = -torch.arange(1.0, numbers + 1).expand(count, channels, numbers)
    # delta' from 0.001 to 0.1, as Mamba draws its bias
    steps = 0.001 * 100 ** torch.rand(count, channels, generator=generator)
    bias = steps + (-torch.expm1(-steps)).log()
    A, bias = (tensor.to(device, dtype, copy=True).requires_grad_(requires_grad) for tensor in (A, bias))
    return (x, delta, A, B, C, D), {"delta_bias": bias, "delta_softplus": True, "directions": case.directions}


# A small call, differentiable in all of its arguments; the first ones are maps (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8), (2, 4, 6, 16), (2, 4, 6, 4), (2, 4, 6, 4), (2, 8, 2), (2, 8), (2, 8))


def sample(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    delta, B, C = (tensor.unflatten(-1, (2, -1)) for tensor in (delta, B, C))
    return selective_scan(
        x,
        delta,
        -F.softplus(A),
        B,
        C,
        D,
        delta_bias=delta_bias,
        delta_softplus=True,
        directions=("rows", "columns_reversed"),
    )
