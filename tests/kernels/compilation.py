"""Kernels without a GPU: the launches of an operator, and their compiled forms."""

from torch._subclasses.fake_tensor import FakeTensorMode as fake_cuda

from zoo.kernels.launches import TARGETS, compile_launch, record

__all__ = ["TARGETS", "compile_launch", "fake_cuda", "launches"]


def launches(function, gpu):
    """The kernels that `function` launches on `gpu`, with fake tensors of device "cuda"."""
    return [call.launch for call in record(function, gpu)]
