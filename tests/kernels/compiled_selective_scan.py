"""The resources of the compiled Triton selective scan for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels import launches
from zoo.kernels.selective_scan import cases

from . import compilation, resources

# One number for each channel and 16; four directions, one and two.
IMAGES = (
    "56x56x64-state1",
    "28x28x144-state1",
    "56x56x128-state1-rows",
    "1x197x384-state16-rows-rows_reversed-own-inputs",
)


def check(names, dtype, target):
    gpu, _ = compilation.TARGETS[target]
    found = []
    for name in names:
        recorded = launches.record_case(cases, cases.CASES[name], batch=8, dtype=dtype, gpu=gpu)
        found += [call.launch for calls in recorded.values() for call in calls]
    resources.check(found, target, "compiled_selective_scan.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(IMAGES, torch.float16, target)


def test_float32():
    check(IMAGES[:1], torch.float32, "sm_90")
