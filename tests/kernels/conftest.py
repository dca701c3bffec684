"""Fixtures of the operators' tests."""

import pytest
import torch
from torch._subclasses.fake_tensor import is_fake

from zoo.kernels import implementation


@pytest.fixture(params=["reference", "torch"])
def each_implementation(request):
    """Runs a test with each of the implementations for CPUs."""
    with implementation(request.param):
        yield


@pytest.fixture
def unwritten_outputs_are_nan(monkeypatch):
    """A kernel that does not write all of its output cannot pass."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args, plain=plain, **kwargs):
            out = plain(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def fake_tensors_launch_nothing(monkeypatch):
    """Triton's interpreter cannot run on tensors without contents."""
    from zoo.kernels import triton_common

    launch = triton_common.launch

    def launch_unless_fake(kernel, grid, **arguments):
        if not any(map(is_fake, arguments.values())):
            launch(kernel, grid, **arguments)

    monkeypatch.setattr(triton_common, "launch", launch_unless_fake)
