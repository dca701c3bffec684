"""Attention within the windows of a map: blocks, grids and stripes."""

from zoo.kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
