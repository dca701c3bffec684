"""Neighborhood attention against loops over single tokens, gradcheck, and rejected arguments. Some seconds."""

import pytest
import torch

from zoo.kernels import implementation, neighborhood_attention, window_attention

from . import oracle, random_calls

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
    """A mask that differs between images and hides all neighbours of the first queries."""
    batch, height, width, _ = qkv.shape
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, : height // 2 + 1, : width // 2 + 1] = False
    return mask


def axis_neighbors(i, length, k, d, s, causal):
    """The neighbours of position i along an axis, with their offsets in places."""
    group = [j for j in range(length) if j % d == i % d]
    p, n = group.index(i), len(group)
    block = [q for q in range(n) if q // s == p // s]
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        return [(group[q], q - p) for q in range(n) if leader - k < q <= p]
    leader = min(block[0] + s // 2, n - 1)
    # the k places whose window, centred on the leader, is shifted by as little as possible to lie inside
    best = min(range(n - k + 1), key=lambda start: abs(start - (leader - k // 2)))
    return [(group[q], q - p) for q in range(best, best + k)]


def loops(qkv, num_heads, kernel, dilation, stride, causal, table, scale, mask=None):
    batch, height, width, _ = qkv.shape
    query, key, value = oracle.heads(qkv, num_heads, 3)
    out = torch.zeros_like(value)
    for y in range(height):
        rows = axis_neighbors(y, height, kernel[0], dilation[0], stride[0], causal[0])
        for x in range(width):
            columns = axis_neighbors(x, width, kernel[1], dilation[1], stride[1], causal[1])
            neighbors = [(j, down, i, right) for j, down in rows for i, right in columns]
            for b in range(batch):
                chosen = [each for each in neighbors if mask is None or mask[b, each[0], each[2]]]
                if not chosen:
                    continue
                for n in range(num_heads):
                    added = [
                        0.0 if table is None else float(table[n, down + kernel[0] - 1, right + kernel[1] - 1])
                        for _, down, _, right in chosen
                    ]
                    keys, values = ([z[b, j, i, n] for j, _, i, _ in chosen] for z in (key, value))
                    out[b, y, x, n] = oracle.attend(query[b, y, x, n], keys, values, added, scale)
    return out.flatten(-2)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case, biased):
    qkv, table, options = make(case)
    table = table if biased else None
    want = loops(qkv, *options.values(), table, 0.7)
    torch.testing.assert_close(neighborhood_attention(qkv, bias_table=table, scale=0.7, **options), want)


@pytest.mark.parametrize("case", CASES)
def test_mask_agrees_with_loops(case):
    qkv, table, options = make(case)
    mask = hide(qkv)
    want = loops(qkv, *options.values(), table, 0.7, mask)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("size", [(4, 6), (24, 20)], ids=["one tile", "many tiles"])
def test_batch_of_no_images_with_a_mask(size):
    mask = torch.ones(0, *size, dtype=torch.bool)
    out = neighborhood_attention(torch.zeros(0, *size, 24), num_heads=2, kernel_size=3, key_mask=mask)
    assert out.shape == (0, *size, 8)


QKV = torch.zeros(1, 6, 5, 12)


def call(**change):
    """A valid call, with some arguments changed."""
    return neighborhood_attention(**{"qkv": QKV, "num_heads": 2, "kernel_size": 3} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
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
    ({"qkv": QKV[:, :, :0]}, ValueError, "qkv of 6 x 0 tokens"),
    ({"kernel_size": True}, TypeError, "kernel_size=True; give an int"),
    ({"kernel_size": -3}, ValueError, "kernel_size=-3; it has to be 1 or more"),
    ({"dilation": 0}, ValueError, "dilation=0; it has to be 1 or more"),
    ({"is_causal": 1}, TypeError, "is_causal=1; give True or False"),
    ({"key_mask": [[True]]}, TypeError, "key_mask of type list"),
]


def random_call(rng):
    tensors, options = random_calls.attention(rng)
    side = rng.choice((1, 2, 3, 3, 5, *random_calls.NUMBERS))
    options["kernel_size"] = side
    for name, usual in (("dilation", 1), ("stride", 1), ("is_causal", False)):
        options[name] = rng.choice((usual, usual, *random_calls.NUMBERS))
    return neighborhood_attention, tensors | random_calls.bias_table(rng, side) | options
