"""The resources of the compiled Triton linear attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.linear_attention import cases

from . import compilation
from .resources import check_cases

# Heads of 64, 96 and 32 channels, and the three forms.
IMAGES = (
    "56x56x64-heads1-softmax-rope",
    "56x56x96-heads1-offset-rope",
    "56x56x96-heads3-relu-min100-temperature",
)


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check_cases(cases, IMAGES if target == "sm_90" else IMAGES[:1], torch.float16, target)


def test_float32():
    check_cases(cases, IMAGES[:1], torch.float32, "sm_90")
