"""Shapes at which models call linear attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.linear_attention.op import linear_attention

FUNCTION = linear_attention


@dataclass(frozen=True)
class Case:
    """One call, without the batch; `op.linear_attention` explains the options."""

    size: tuple[int, int]
    num_heads: int
    head_dim: int = 64
    feature_map: str = "elu_plus_one"
    key_weights: str = "uniform"
    normalization: str = "ratio"
    rope: bool = False
    denominator_min: float = 0.0
    temperature: bool = False

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        name = f"{self.size[0]}x{self.size[1]}x{self.num_heads * self.head_dim}-heads{self.num_heads}"
        name += f"-{self.feature_map}" if self.feature_map != "elu_plus_one" else ""
        name += f"-{self.key_weights}" if self.key_weights != "uniform" else ""
        name += f"-{self.normalization}" if self.normalization != "ratio" else ""
        name += "-rope" * self.rope
        name += f"-min{self.denominator_min:g}" if self.denominator_min else ""
        return name + "-temperature" * self.temperature


def _cases() -> Iterator[Case]:
    # ReLU features and bounded denominators, all stages; images of 224 pixels, the largest map of 384 pixels
    bounded: dict[str, Any] = {"feature_map": "relu", "denominator_min": 100.0, "temperature": True}
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24), (96, 4)):
        yield Case((side, side), heads, 32, **bounded)
    # rotated features, keys with softmax weights and the offset form, the first two stages
    forms: tuple[dict[str, Any], ...] = ({"key_weights": "softmax"}, {"normalization": "offset"})
    for form in forms:
        for side, heads, dim in ((56, 1, 64), (28, 2, 64), (56, 1, 96), (28, 2, 96)):
            yield Case((side, side), heads, dim, rope=True, **form)
        # detection at 800 x 1344 pixels
        yield Case((200, 336), 1, 64, rope=True, **form)


CASES = {case.name: case for case in _cases()}
# The default of `zoo-bench kernels`.
TARGETS: dict[str, Case] = {}
# One of each kind, for tests whose result is the same within a kind.
KINDS = (
    "14x14x384-heads12-relu-min100-temperature",
    "28x28x128-heads2-softmax-rope",
    "28x28x192-heads2-offset-rope",
)


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION: q, k and v are slices of one tensor."""
    generator = torch.Generator().manual_seed(0)
    channels, quarter = case.num_heads * case.head_dim, case.head_dim // 4
    qkv = torch.randn(batch, *case.size, 3 * channels, generator=generator).to(device, dtype)
    parts = tuple(part.detach().requires_grad_(requires_grad) for part in qkv.chunk(3, -1))
    temperature = None
    if case.temperature:
        temperature = torch.rand(case.num_heads, generator=generator).to(device, dtype).requires_grad_(requires_grad)
    return parts, {
        "num_heads": case.num_heads,
        "feature_map": case.feature_map,
        "key_weights": case.key_weights,
        "normalization": case.normalization,
        "rope": tuple(10000.0 ** (-i / max(1, quarter - 1)) for i in range(quarter)) if case.rope else None,
        "eps": 0.0 if case.denominator_min else 1e-6,
        "denominator_min": case.denominator_min,
        "temperature": temperature,
    }


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 8),) * 3 + ((2,),)


def sample(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    return linear_attention(q, k, v, num_heads=2, key_weights="softmax", rope=(0.5,), temperature=temperature)
