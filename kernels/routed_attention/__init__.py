"""Attention of each region of a map to the regions that it is routed to."""

from zoo.kernels.routed_attention.op import routed_attention

__all__ = ["routed_attention"]
