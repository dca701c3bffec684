"""The resources of the compiled Triton neighborhood attention for real shapes. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels.neighborhood_attention import triton_impl
from zoo.kernels.neighborhood_attention.cases import CASES, KINDS, inputs

from . import compilation, resources


def launches(names, dtype, target):
    """The launches of the forward and backward passes of these cases, one for each kernel that Triton compiles."""
    found = []
    with compilation.fake_cuda():
        for name in names:
            case = CASES[name]
            (qkv,), options = inputs(case, batch=64, dtype=dtype, device="cuda")
            table, mask = options.pop("bias_table"), options.pop("key_mask")
            rest = options | {"scale": 0.2}

            def run(qkv=qkv, table=table, mask=mask, rest=rest):
                out, lse = triton_impl.forward(qkv, table, mask, **rest)
                grad, wanted = torch.empty_like(out), table is not None
                triton_impl.backward(grad, qkv, table, mask, out, lse, **rest, bias_grad=wanted)

            found += compilation.launches(run, compilation.TARGETS[target][0])
    return dict.fromkeys(found)


def check(names, dtype, target):
    resources.check(launches(names, dtype, target), target, "compiled_neighborhood_attention.json")


@pytest.mark.parametrize("target", compilation.TARGETS)
def test_half_precision(target):
    check(CASES, torch.float16, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_types(dtype):
    check(KINDS[:2], dtype, "sm_90")


def test_few_programs_serve_all_shapes():
    assert len(launches(CASES, torch.float16, "sm_90")) <= 26
