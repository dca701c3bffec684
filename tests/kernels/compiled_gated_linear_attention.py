"""The resources of the compiled Triton gated linear attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels import launches
from zoo.kernels.gated_linear_attention import cases

from . import compilation, resources


def check(names, dtype, target):
    gpu, _ = compilation.TARGETS[target]
    found = []
    for name in names:
        recorded = launches.record_case(cases, cases.CASES[name], batch=8, dtype=dtype, gpu=gpu)
        found += [call.launch for calls in recorded.values() for call in calls]
    resources.check(found, target, "compiled_gated_linear_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(cases.KINDS if target == "sm_90" else cases.KINDS[:1], torch.float16, target)


def test_float32():
    check(cases.KINDS[:1], torch.float32, "sm_90")
