"""The resources of the compiled Triton flow attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.flow_attention import cases

from . import compilation
from .resources import check_cases

# Heads of 8 and 64 channels: several parts and one. Heads of 16 channels have the tiles of those of 8.
IMAGES = ("56x56x96-heads12", "7x7x768-heads12")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check_cases(cases, (*IMAGES, "14x14x384-heads12") if target == "sm_90" else IMAGES, torch.float16, target)


def test_float32():
    check_cases(cases, IMAGES, torch.float32, "sm_90")
