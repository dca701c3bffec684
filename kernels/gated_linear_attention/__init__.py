"""Gated linear attention: a recurrent state that every token decays, and adds its key and value to."""

from zoo.kernels.gated_linear_attention.op import gated_linear_attention

__all__ = ["gated_linear_attention"]
