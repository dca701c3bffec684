"""The resources of the compiled Triton routed attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.routed_attention import cases, triton_impl

from . import compilation, resources


def check(names, dtype, target):
    found = []
    for name in names:
        with compilation.fake_cuda():
            tensors, options = cases.inputs(cases.CASES[name], batch=8, dtype=dtype, device="cuda")

            def both(tensors=tensors, options=options):
                out, lse = triton_impl.forward(*tensors, **options)
                triton_impl.backward(torch.empty_like(out), *tensors, out, lse, **options)

            found += compilation.launches(both, compilation.TARGETS[target][0])
    resources.check(found, target, "compiled_routed_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(cases.CASES, torch.float16, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(cases.KINDS[:2], dtype, "sm_90")
