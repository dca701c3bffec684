"""Attention operators shared by all families, on channels-last tensors.

Each function's docstring is its specification, and its `reference.py` the plain implementation that defines what is
right. Behind the same functions are `torch_impl.py`, fast on CPUs and running anywhere, and `triton_impl.py` for GPUs;
each call runs what suits its tensors, or what `set_implementation`, `implementation` or the environment variable
ZOO_KERNELS choose.
"""

from pkgutil import iter_modules

from zoo.kernels.checks import certain, sizes
from zoo.kernels.depthwise_conv import depthwise_conv2d_nhwc, large_kernel_attention
from zoo.kernels.dispatch import as_given, implementation, set_implementation, use
from zoo.kernels.neighborhood_attention import neighborhood_attention
from zoo.kernels.routed_attention import routed_attention
from zoo.kernels.window_attention import window_attention

# Every operator has a folder, in which tests, benchmarks and documents find the rest.
OPERATORS = tuple(sorted(folder.name for folder in iter_modules(__path__) if folder.ispkg))

# The functions of all operators, the choice of their implementation, and what modules around them need as well:
# `as_given` (autocast), `certain` and `sizes` (sizes that are symbolic or traced).
__all__ = [
    "OPERATORS",
    "as_given",
    "certain",
    "depthwise_conv2d_nhwc",
    "implementation",
    "large_kernel_attention",
    "neighborhood_attention",
    "routed_attention",
    "set_implementation",
    "sizes",
    "use",
    "window_attention",
]
