"""Linear attention: all tokens attend to all tokens, at a cost that is linear in their number."""

from zoo.kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
