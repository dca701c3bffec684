"""The resources of the compiled Triton flow attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels import launches
from zoo.kernels.flow_attention import cases

from . import compilation, resources

# Heads of 8 and 64 channels: several parts and one. Heads of 16 channels have the tiles of those of 8.
IMAGES = ("56x56x96-heads12", "7x7x768-heads12")


def check(names, dtype, target):
    gpu, _ = compilation.TARGETS[target]
    found = []
    for name in names:
        recorded = launches.record_case(cases, cases.CASES[name], batch=8, dtype=dtype, gpu=gpu)
        found += [call.launch for calls in recorded.values() for call in calls]
    resources.check(found, target, "compiled_flow_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check((*IMAGES, "14x14x384-heads12") if target == "sm_90" else IMAGES, torch.float16, target)


def test_float32():
    check(IMAGES, torch.float32, "sm_90")
