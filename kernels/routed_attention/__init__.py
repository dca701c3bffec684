"""Attention of the tokens of each region of a map to the regions that the region is routed to."""

from zoo.kernels.routed_attention.op import routed_attention

__all__ = ["routed_attention"]
