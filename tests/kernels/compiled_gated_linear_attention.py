"""The resources of the compiled Triton gated linear attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.gated_linear_attention import cases

from . import compilation
from .resources import check_cases


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check_cases(cases, cases.KINDS if target == "sm_90" else cases.KINDS[:1], torch.float16, target)


def test_float32():
    check_cases(cases, cases.KINDS[:1], torch.float32, "sm_90")
