"""Flow attention: all tokens attend to all tokens, at a linear cost, with sources and sinks that compete."""

from zoo.kernels.flow_attention.op import flow_attention

__all__ = ["flow_attention"]
