"""What the Triton window attention uses when compiled for real shapes. Run by test_triton_window_attention.py."""

import pytest
import torch

from zoo.kernels import testing
from zoo.kernels.window_attention import triton_impl
from zoo.kernels.window_attention.cases import CASES, inputs

from . import resources

# One of each kind: a tile for a window, several tiles with a shared query, other heads, a tile for several windows.
KINDS = (
    "maxvit_tiny_224-stage1-block",
    "gcvit_tiny_224-stage3-global",
    "cswin_base_384-stage1-rows",
    "litv2_small_224-stage3-high",
)


def launches(names, dtype, target):
    """What forward and backward of these cases launch, each program that Triton would compile once."""
    found = []
    with testing.fake_cuda():
        for name in names:
            case = CASES[name]
            (qkv,), options = inputs(case, batch=64, dtype=dtype, device="cuda")
            tensors = qkv, options["q"], options["bias_table"], options["key_mask"]
            key_minus_query = case.bias_sign == "key_minus_query"
            rest = case.num_heads, *case.window_size, case.layout == "grid", key_minus_query, 0.2

            def run(tensors=tensors, rest=rest, bias=case.bias):
                out, lse = triton_impl.forward(*tensors, *rest)
                triton_impl.backward(torch.empty_like(out), *tensors, out, lse, *rest, bias)

            found += testing.launches(run, testing.TARGETS[target][0])
    return dict.fromkeys(found)


def check(names, dtype, target):
    resources.check(launches(names, dtype, target), target, "compiled_window_attention.json")


@pytest.mark.parametrize("target", testing.TARGETS)
def test_half_precision(target):
    check(CASES, torch.float16, target)


def test_small_windows_with_mask_or_shared_query():
    check(("maxvit_tiny_224-stage1-block-padded", "gcvit_tiny_224-stage1-global"), torch.float16, "sm_90")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(KINDS[:2], dtype, "sm_90")


def test_few_programs_serve_all_shapes():
    assert len(launches(CASES, torch.float16, "sm_90")) <= 25
