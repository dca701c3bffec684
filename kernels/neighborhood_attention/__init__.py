"""Attention of each token to its neighbourhood."""

from zoo.kernels.neighborhood_attention.op import neighborhood_attention

__all__ = ["neighborhood_attention"]
