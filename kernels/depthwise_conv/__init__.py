"""Depth-wise convolutions on channels-last maps, and the large-kernel attention made of them."""

from zoo.kernels.depthwise_conv.op import depthwise_conv2d_nhwc, large_kernel_attention

__all__ = ["depthwise_conv2d_nhwc", "large_kernel_attention"]
