"""Routed attention in Triton compiled for GPUs that need not be there. Run by test_triton_routed_attention.py."""

import pytest
import torch

from zoo.kernels import testing
from zoo.kernels.routed_attention import cases, triton_impl

from . import resources

KINDS = ("biformer_tiny-stage1", "biformer_tiny-stage3")


def check(names, dtype, target):
    found = []
    for name in names:
        with testing.fake_cuda():
            tensors, options = cases.inputs(cases.CASES[name], batch=8, dtype=dtype, device="cuda")

            def both(tensors=tensors, options=options):
                out, lse = triton_impl.forward(*tensors, **options)
                triton_impl.backward(torch.empty_like(out), *tensors, out, lse, **options)

            found += testing.launches(both, testing.TARGETS[target][0])
    resources.check(found, target, "compiled_routed_attention.json")


@pytest.mark.parametrize("target", testing.TARGETS)
def test_half_precision(target):
    check(cases.CASES, torch.float16, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(KINDS, dtype, "sm_90")
