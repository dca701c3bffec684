"""Shapes at which models call window attention, and a small call; tests and benchmarks read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.window_attention.op import window_attention

FUNCTION = window_attention


@dataclass(frozen=True)
class Case:
    """One call, without the batch; `op.window_attention` explains the options."""

    size: tuple[int, int]
    num_heads: int
    window_size: tuple[int, int]
    head_dim: int = 32
    layout: str = "block"
    bias: bool = True
    bias_sign: str = "query_minus_key"
    shared_query: bool = False
    key_mask: bool = False
    regions: bool = False
    line_decay: bool = False

    @property
    def name(self) -> str:
        """The shapes, and what differs from the defaults."""
        (height, width), (wh, ww) = self.size, self.window_size
        name = f"{height}x{width}x{self.num_heads * self.head_dim}-{self.layout}{wh}x{ww}"
        name += f"-{self.bias_sign}" if self.bias and self.bias_sign != "query_minus_key" else ""
        name += "-unbiased" * (not self.bias) + "-shared_query" * self.shared_query + "-masked" * self.key_mask
        return name + "-regions" * self.regions + "-line_decay" * self.line_decay


def _cases() -> Iterator[Case]:
    # Blocks and grids that alternate, key minus query; images of 224, 384 and 512 pixels.
    for layout in ("block", "grid"):
        for window in (7, 12, 16):
            for stage in range(4):
                side = 8 * window >> stage
                yield Case((side, side), 2 << stage, (window, window), layout=layout, bias_sign="key_minus_query")
    # Blocks with queries of their own and with shared ones, query minus key; images of 224, 384 and 512 pixels.
    for shared in (False, True):
        for side, heads, windows in ((56, 2, (7, 7, 14, 7)), (96, 6, (12, 12, 24, 12)), (128, 6, (16, 16, 32, 16))):
            for stage, window in enumerate(windows):
                yield Case((side >> stage,) * 2, heads << stage, (window, window), shared_query=shared)
    # Stripes, half of the heads each way, then the whole map; images of 224 and 384 pixels.
    for heads, dim, side, widths in ((1, 32, 56, (1, 2, 7)), (2, 24, 96, (1, 2, 12))):
        for stage, width in enumerate(widths):
            size = side >> stage
            yield Case((size, size), heads << stage, (size, width), dim, bias=False)
            yield Case((size, size), heads << stage, (width, size), dim, bias=False)
        yield Case((side >> 3,) * 2, 2 * heads << 3, (side >> 3,) * 2, dim, bias=False)
    yield Case((14, 14), 2, (2, 2), bias=False)
    # a map that is padded below and on the right, the padding hidden from all queries
    yield Case((56, 56), 2, (7, 7), bias_sign="key_minus_query", key_mask=True)
    # windows that are shifted by half of their size; images of 224 and 384 pixels
    yield Case((56, 56), 3, (7, 7), regions=True)
    yield Case((24, 24), 12, (12, 12), regions=True)
    # rows and columns with decays; images of 224 and 512 pixels
    for side, heads, dim in ((56, 4, 16), (28, 4, 32), (128, 4, 16), (64, 4, 32)):
        yield Case((side, side), heads, (1, side), dim, bias=False, line_decay=True)
        yield Case((side, side), heads, (side, 1), dim, bias=False, line_decay=True)


CASES = {case.name: case for case in _cases()}
# The default of `zoo-bench kernels`.
TARGETS = {"target-56x56x64": Case((56, 56), 2, (7, 7)), "target-14x14x256": Case((14, 14), 8, (7, 7))}
# One of each kind, for tests whose result is the same within a kind; the first two differ most.
KINDS = (
    "14x14x256-block7x7-key_minus_query",
    "14x14x256-block14x14-shared_query",
    "24x24x256-grid12x12-key_minus_query",
    "24x24x192-block12x24-unbiased",
    "14x14x64-block2x2-unbiased",
)


def inputs(
    case: Case,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments of FUNCTION, normally distributed, the same on all devices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator)
        return values.to(device, dtype).requires_grad_(requires_grad)

    (height, width), (wh, ww) = case.size, case.window_size
    channels = case.num_heads * case.head_dim
    key_mask = None
    if case.key_mask:  # the last rows and columns are padding
        key_mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
        key_mask[:, : height - height // 8, : width - width // 8] = True
    regions = None
    if case.regions:  # of a map that was rolled up and left by half a window
        down, right = (
            (torch.arange(side) >= side - window).int() + (torch.arange(side) >= side - window // 2).int()
            for side, window in ((height, wh), (width, ww))
        )
        regions = (3 * down[:, None] + right)[None].to(device)  # (1, H, W)
    line_decay = None
    if case.line_decay:  # sums of steps of 0.1 on average
        steps = 0.2 * torch.rand(batch, height, width, case.num_heads, generator=torch.Generator().manual_seed(1))
        line_decay = -steps.cumsum(2 if wh == 1 else 1).to(device, torch.promote_types(dtype, torch.float32))
        line_decay.requires_grad_(requires_grad)
    return (normal(batch, height, width, (2 if case.shared_query else 3) * channels),), {
        "num_heads": case.num_heads,
        "window_size": case.window_size,
        "layout": case.layout,
        "bias_table": normal(case.num_heads, 2 * wh - 1, 2 * ww - 1) if case.bias else None,
        "bias_sign": case.bias_sign,
        "key_mask": key_mask,
        "regions": regions,
        "line_decay": line_decay,
        "q": normal(batch, wh * ww, channels) if case.shared_query else None,
    }


# A small call, differentiable in all of its arguments; the first is a map (B, H, W, channels).
SAMPLE_SHAPES = ((2, 4, 6, 24), (2, 3, 5))


def sample(qkv: Tensor, bias_table: Tensor) -> Tensor:
    """FUNCTION of tensors of SAMPLE_SHAPES."""
    return window_attention(qkv, num_heads=2, window_size=(2, 3), bias_table=bias_table)
