"""The resources of the compiled Triton linear attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels import launches
from zoo.kernels.linear_attention import cases

from . import compilation, resources

# Heads of 64, 96 and 32 channels, and the three forms.
IMAGES = (
    "56x56x64-heads1-softmax-rope",
    "56x56x96-heads1-offset-rope",
    "56x56x96-heads3-relu-min100-temperature",
)


def check(names, dtype, target):
    gpu, _ = compilation.TARGETS[target]
    found = []
    for name in names:
        recorded = launches.record_case(cases, cases.CASES[name], batch=8, dtype=dtype, gpu=gpu)
        found += [call.launch for calls in recorded.values() for call in calls]
    resources.check(found, target, "compiled_linear_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(IMAGES if target == "sm_90" else IMAGES[:1], torch.float16, target)


def test_float32():
    check(IMAGES[:1], torch.float32, "sm_90")
