"""The resources of the compiled Triton selective scan for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.selective_scan import cases

from . import compilation
from .resources import check_cases

# One number for each channel and 16; four directions, one and two.
IMAGES = (
    "56x56x64-state1",
    "28x28x144-state1",
    "56x56x128-state1-rows",
    "1x197x384-state16-rows-rows_reversed-own-inputs",
)


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check_cases(cases, IMAGES, torch.float16, target)


def test_float32():
    check_cases(cases, IMAGES[:1], torch.float32, "sm_90")
