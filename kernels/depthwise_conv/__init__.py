"""Depth-wise convolution on channels-last maps, and large-kernel attention, which consists of two of them."""

from zoo.kernels.depthwise_conv.op import depthwise_conv2d_nhwc, large_kernel_attention

__all__ = ["depthwise_conv2d_nhwc", "large_kernel_attention"]
