"""Neighborhood attention against loops over single tokens, by gradcheck, and its messages, for each
implementation. Some seconds.
"""

import pytest
import torch

from zoo.kernels import implementation, neighborhood_attention, window_attention

from . import oracle

pytestmark = pytest.mark.usefixtures("each_implementation")

# map, kernel, dilation, stride, causal
CASES = {
    "plain": ((7, 6), (3, 3), (1, 1), (1, 1), (False, False)),
    "whole-map": ((3, 3), (3, 3), (1, 1), (1, 1), (False, False)),
    "kernel-1": ((3, 4), (1, 1), (1, 1), (1, 1), (False, False)),
    "rectangle": ((5, 9), (3, 5), (1, 1), (1, 1), (False, False)),
    "even": ((7, 8), (4, 2), (1, 1), (1, 1), (False, False)),
    "dilated": ((7, 9), (3, 3), (2, 3), (1, 1), (False, False)),
    "dilated-exactly": ((6, 6), (3, 3), (2, 2), (1, 1), (False, False)),
    "strided": ((8, 7), (5, 3), (1, 1), (2, 3), (False, False)),
    "strided-dilated": ((11, 7), (4, 3), (2, 1), (3, 2), (False, False)),
    "blocked": ((6, 8), (3, 4), (1, 1), (3, 4), (False, False)),
    "striped": ((4, 6), (4, 3), (1, 1), (2, 3), (False, False)),
    "causal": ((5, 6), (3, 3), (1, 1), (1, 1), (True, True)),
    "causal-rows": ((6, 5), (4, 3), (1, 1), (1, 1), (True, False)),
    "causal-strided-dilated": ((9, 7), (3, 3), (2, 1), (2, 3), (True, True)),
}


def make(case, batch=2, num_heads=2, head_dim=3):
    (height, width), kernel, dilation, stride, causal = CASES[case]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * num_heads * head_dim, generator=g, dtype=torch.float64)
    table = torch.randn(num_heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, generator=g, dtype=torch.float64)
    options = {"num_heads": num_heads, "kernel_size": kernel, "dilation": dilation, "stride": stride}
    return qkv, table, options | {"is_causal": causal}


def hide(qkv):
    """A mask that differs by image and leaves the first queries nothing."""
    batch, height, width, _ = qkv.shape
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, : height // 2 + 1, : width // 2 + 1] = False
    return mask


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case, biased):
    qkv, table, options = make(case)
    table = table if biased else None
    want = oracle.neighborhood_attention(qkv, *options.values(), table, 0.7)
    torch.testing.assert_close(neighborhood_attention(qkv, bias_table=table, scale=0.7, **options), want)


@pytest.mark.parametrize("case", CASES)
def test_mask_agrees_with_loops(case):
    qkv, table, options = make(case)
    mask = hide(qkv)
    want = oracle.neighborhood_attention(qkv, *options.values(), table, 0.7, mask)
    got = neighborhood_attention(qkv, bias_table=table, scale=0.7, key_mask=mask, **options)
    torch.testing.assert_close(got, want)


def test_query_without_a_key_gives_zeros():
    qkv, _, options = make("plain")
    mask = torch.ones(2, 7, 6, dtype=torch.bool)
    mask[:, :3, :3] = False  # the neighbours of the first two rows' first two tokens
    out = neighborhood_attention(qkv, key_mask=mask, **options)
    zeros = (out == 0).all(-1)
    assert zeros[:, :2, :2].all()
    assert zeros.sum() == 2 * 4


def test_numbers_stand_for_both_axes():
    qkv, table, options = make("causal")
    got = neighborhood_attention(qkv, num_heads=2, kernel_size=3, is_causal=True, bias_table=table)
    torch.testing.assert_close(got, neighborhood_attention(qkv, bias_table=table, **options))


def test_kernel_and_stride_alike_are_window_attention():
    qkv, table, _ = make("blocked")
    got = neighborhood_attention(qkv, num_heads=2, kernel_size=(3, 4), stride=(3, 4), bias_table=table)
    options = {"num_heads": 2, "window_size": (3, 4), "bias_table": table, "bias_sign": "key_minus_query"}
    torch.testing.assert_close(got, window_attention(qkv, **options))


def test_dilation_that_fills_the_map_is_grid_attention():
    qkv, table, options = make("dilated-exactly")
    got = neighborhood_attention(qkv, bias_table=table, **options)
    grid = {"window_size": (3, 3), "layout": "grid", "bias_sign": "key_minus_query"}
    torch.testing.assert_close(got, window_attention(qkv, num_heads=2, bias_table=table, **grid))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", ["plain", "strided-dilated", "causal-strided-dilated"])
def test_gradients(case, masked):
    qkv, table, options = make(case, batch=1, num_heads=1, head_dim=2)
    inputs = (qkv.requires_grad_(), table.requires_grad_())
    options["key_mask"] = hide(qkv) if masked else None
    assert torch.autograd.gradcheck(lambda x, t: neighborhood_attention(x, bias_table=t, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    qkv, table, options = make("dilated")
    qkv, table = qkv.to(dtype), table.to(dtype)
    with implementation("reference"):
        out = neighborhood_attention(qkv, bias_table=table, **options)
    want = neighborhood_attention(qkv.double(), bias_table=table.double(), **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_strided_input():
    qkv, table, options = make("plain")
    view = qkv.movedim(-1, 1).contiguous().movedim(1, -1)
    got, want = (neighborhood_attention(x, bias_table=table, **options) for x in (view, qkv))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_compiles_as_one_graph():
    qkv, table, options = make("strided-dilated")

    def function(x, t):
        return neighborhood_attention(x, bias_table=t, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, table), function(qkv, table))


QKV = torch.zeros(1, 6, 5, 12)
BAD = [
    ({"kernel_size": 7}, ValueError, "kernel_size 7 with dilation 1 for a map of 6 rows.*product 7"),
    ({"dilation": (1, 2)}, ValueError, "kernel_size 3 with dilation 2 for a map of 5 columns"),
    ({"stride": 4}, ValueError, "stride 4 with kernel_size 3 along rows"),
    ({"stride": 0}, ValueError, "stride=0; it has to be 1 or more"),
    ({"kernel_size": 2.5}, TypeError, "kernel_size=2.5; give an int, or two"),
    ({"num_heads": 5}, ValueError, "12 channels in qkv for num_heads=5"),
    ({"bias_table": torch.zeros(2, 5, 3)}, ValueError, r"bias_table of shape \(2, 5, 3\).*\(2, 5, 5\)"),
    ({"bias_table": torch.zeros(2, 5, 5, dtype=torch.int64)}, TypeError, "bias_table of torch.int64"),
    ({"key_mask": torch.ones(1, 5, 6, dtype=torch.bool)}, ValueError, r"key_mask of shape .*\(1, 6, 5\)"),
    ({"key_mask": torch.ones(1, 6, 5)}, TypeError, "key_mask of torch.float32; it has to be bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention(QKV, **{"num_heads": 2, "kernel_size": 3} | change)
