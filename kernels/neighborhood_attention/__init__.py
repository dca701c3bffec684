"""Attention of each token to the tokens around it."""

from zoo.kernels.neighborhood_attention.op import neighborhood_attention

__all__ = ["neighborhood_attention"]
