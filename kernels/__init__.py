"""Attention operators shared by all families, on channels-last tensors.

The docstring of a function is its specification, and its `reference.py` is the plain implementation that defines the
correct result. `torch_impl.py` is fast on CPUs and runs anywhere; `triton_impl.py` is for GPUs. Each call runs the
implementation that suits its tensors, unless `set_implementation`, `implementation` or the environment variable
ZOO_KERNELS chooses another.
"""

from pkgutil import iter_modules

from zoo.kernels.checks import certain, sizes
from zoo.kernels.depthwise_conv import depthwise_conv2d_nhwc, large_kernel_attention
from zoo.kernels.dispatch import as_given, implementation, set_implementation, use
from zoo.kernels.flow_attention import flow_attention
from zoo.kernels.gated_linear_attention import gated_linear_attention
from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.neighborhood_attention import neighborhood_attention
from zoo.kernels.rotation import rotate_2d
from zoo.kernels.routed_attention import routed_attention
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.window_attention import window_attention

# Each operator is a folder; tests and benchmarks find its cases and peers there.
OPERATORS = tuple(sorted(folder.name for folder in iter_modules(__path__) if folder.ispkg))

# The functions of all operators, the choice of their implementation, and what modules around them need as well:
# `as_given` (autocast), `certain` and `sizes` (sizes that are symbolic or traced), `rotate_2d` (positions).
__all__ = [
    "OPERATORS",
    "as_given",
    "certain",
    "depthwise_conv2d_nhwc",
    "flow_attention",
    "gated_linear_attention",
    "implementation",
    "large_kernel_attention",
    "linear_attention",
    "neighborhood_attention",
    "rotate_2d",
    "routed_attention",
    "selective_scan",
    "set_implementation",
    "sizes",
    "use",
    "window_attention",
]
