"""One small call of each operator, for tests of what they have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels import depthwise_conv2d_nhwc, neighborhood_attention, routed_attention, window_attention


@dataclass(frozen=True)
class Call:
    """`function` of floating-point tensors of `shapes`; the first is a map (B, H, W, channels)."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def window(qkv, bias_table):
    return window_attention(qkv, num_heads=2, window_size=(2, 3), bias_table=bias_table)


def neighborhood(qkv, bias_table):
    return neighborhood_attention(qkv, num_heads=2, kernel_size=3, bias_table=bias_table)


def routed(q, k, v):
    routes = torch.tensor([[0, 1], [2, 2], [3, 1], [3, 0]], device=q.device).expand(q.shape[0], -1, -1)
    return routed_attention(q, k, v, routes, num_heads=2, regions=2)


def depthwise(x, weight, bias):
    return depthwise_conv2d_nhwc(x, weight, bias, dilation=2)


CALLS = {
    "window_attention": Call(window, ((2, 4, 6, 24), (2, 3, 5))),
    "neighborhood_attention": Call(neighborhood, ((2, 4, 6, 24), (2, 5, 5))),
    "routed_attention": Call(routed, ((2, 4, 6, 8),) * 3),
    "depthwise_conv2d_nhwc": Call(depthwise, ((2, 4, 6, 8), (8, 1, 3, 3), (8,))),
}
# those with a Triton form
ATTENTION = [name for name in CALLS if name != "depthwise_conv2d_nhwc"]


def make(name: str, dtype: torch.dtype = torch.float32, *, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Tensors for a call."""
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in CALLS[name].shapes)
    return tuple(x.to(dtype).requires_grad_(requires_grad) for x in tensors)
