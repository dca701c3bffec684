"""Shapes at which models call gated linear attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.gated_linear_attention.op import gated_linear_attention

FUNCTION = gated_linear_attention


@dataclass(frozen=True)
class Case:
    """One call, without the batch; `op.gated_linear_attention` explains the options."""

    tokens: int
    num_heads: int
    head_dim: int = 16  # of queries and keys; values have twice as many channels
    both: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """The tokens as a map of one row."""
        return 1, self.tokens

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        shape = f"{self.tokens}x{self.num_heads * self.head_dim}-heads{self.num_heads}"
        return shape + ("" if self.both else "-forward")


def _cases() -> Iterator[Case]:
    # four stages of an image of 224 pixels, the first with one direction too
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):
        yield Case(side * side, heads)
    yield Case(56 * 56, 3, both=False)
    yield Case(56 * 56, 4)
    # patches of 16 pixels, the narrow and the wide model
    yield Case(14 * 14, 3, 32)
    yield Case(14 * 14, 12, 32)
    # detection at 800 x 1344 pixels
    yield Case(200 * 336, 3)


CASES = {case.name: case for case in _cases()}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind.
KINDS = ("784x96-heads6", "3136x48-heads3-forward", "196x96-heads3")
# The reference keeps the state of each token.
LARGE = ("67200x48-heads3",)


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION: q, k and v are slices of one tensor, gates are float32 or more."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, case.tokens, case.num_heads, case.head_dim)
    qkv = torch.randn(*shape[:2], 4 * case.num_heads * case.head_dim, generator=generator).to(device, dtype)
    parts = [x.unflatten(-1, (case.num_heads, -1)) for x in qkv.split(_channels(case), -1)]
    for _ in range(1 + case.both):
        logits = torch.randn(shape, generator=generator)
        parts.append((F.logsigmoid(logits) / 16).to(device, torch.promote_types(dtype, torch.float32)))
    return tuple(x.detach().requires_grad_(requires_grad) for x in parts), {}


def _channels(case: Case) -> tuple[int, int, int]:
    """Of q, k and v."""
    channels = case.num_heads * case.head_dim
    return channels, channels, 2 * channels


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8),) * 5


def sample(q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    tensors = (q, k, v, F.logsigmoid(log_gates), F.logsigmoid(reverse_log_gates))
    out = gated_linear_attention(*(x.flatten(1, 2).unflatten(-1, (2, -1)) for x in tensors))
    return out.reshape(v.shape)
