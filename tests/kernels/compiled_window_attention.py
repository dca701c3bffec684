"""The resources of the compiled Triton window attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.window_attention import triton_impl
from zoo.kernels.window_attention.cases import CASES, KINDS, inputs

from . import compilation, resources


def launches(names, dtype, target):
    """The launches of the forward and backward passes of these cases, one for each kernel that Triton compiles."""
    found = []
    with compilation.fake_cuda():
        for name in names:
            case = CASES[name]
            (qkv,), options = inputs(case, batch=64, dtype=dtype, device="cuda")
            optional = "q", "bias_table", "key_mask", "regions", "line_decay"
            tensors = qkv, *(options[key] for key in optional)
            key_minus_query = case.bias_sign == "key_minus_query"
            rest = {"num_heads": case.num_heads, "grid": case.layout == "grid", "key_minus_query": key_minus_query}
            rest |= {"wh": case.window_size[0], "ww": case.window_size[1], "scale": 0.2}

            def run(tensors=tensors, rest=rest, case=case):
                out, lse = triton_impl.forward(*tensors, **rest)
                wanted = {"bias_grad": case.bias, "decay_grad": case.line_decay}
                triton_impl.backward(torch.empty_like(out), *tensors, out, lse, **rest, **wanted)

            found += compilation.launches(run, compilation.TARGETS[target][0])
    return dict.fromkeys(found)


def check(names, dtype, target):
    resources.check(launches(names, dtype, target), target, "compiled_window_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(KINDS, torch.float16, target)


def test_more_kinds():
    names = "56x56x64-block7x7-key_minus_query-masked", "56x56x64-block7x7-shared_query", "56x56x32-block56x1-unbiased"
    shifted = "56x56x96-block7x7-regions", "24x24x384-block12x12-regions"
    lines = "56x56x64-block1x56-unbiased-line_decay", "128x128x64-block128x1-unbiased-line_decay"
    more = "14x14x256-block14x14", "16x16x512-block16x16-key_minus_query"
    check((*names, *more, *shifted, *lines), torch.float16, "sm_90")


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_float32_with_tf32(tf32):
    check(KINDS[:2], torch.float32, "sm_90")
    (forward,) = (x for x in launches(KINDS[:1], torch.float32, "sm_90") if x.name == "_fwd_kernel")
    assert dict(forward.constants)["PRECISION"] == "tf32x3"
    assert dict(forward.options)["num_warps"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(KINDS[:2], dtype, "sm_90")


def test_one_program_per_window_size_serves_all_maps():
    """What a size compiles: forward, backward and table, with the query of its own or a shared one."""
    assert len(launches(CASES, torch.float16, "sm_90")) <= 84
    stripes = [name for name, case in CASES.items() if not case.bias and not case.line_decay]
    assert len(launches(stripes, torch.float16, "sm_90")) <= 12
    decayed = [name for name, case in CASES.items() if case.line_decay]
    assert len(launches(decayed, torch.float16, "sm_90")) <= 9
