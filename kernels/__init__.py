"""Attention operators shared by all families, on channels-last tensors.

Each function's docstring is its specification, and its `reference.py` the plain implementation that defines what is
right. The fast paths (PyTorch on CPUs, Triton on GPUs) are to come behind the same functions.
"""

from zoo.kernels.depthwise_conv import depthwise_conv2d_nhwc, large_kernel_attention
from zoo.kernels.neighborhood_attention import neighborhood_attention
from zoo.kernels.routed_attention import routed_attention
from zoo.kernels.window_attention import window_attention

__all__ = [
    "depthwise_conv2d_nhwc",
    "large_kernel_attention",
    "neighborhood_attention",
    "routed_attention",
    "window_attention",
]
