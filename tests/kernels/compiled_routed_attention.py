"""The resources of the compiled Triton routed attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.routed_attention import cases, triton_impl

from . import compilation, resources

# Each of them compiles its own kernels.
IMAGES = ("56x56x64-regions7-top1", "28x28x128-regions7-top4", "14x14x256-regions7-top16")
OTHERS = ("112x176x128-regions16-top4", "32x32x256-regions8-top16")


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
    check(IMAGES + OTHERS if target == "sm_90" else IMAGES, torch.float16, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(cases.KINDS[:2], dtype, "sm_90")
