"""Window attention against loops over single tokens, gradcheck, and rejected arguments. Some seconds."""

import pytest
import torch

from zoo.kernels import implementation, window_attention

from . import oracle, random_calls

pytestmark = pytest.mark.usefixtures("each_implementation")

# batch, map, heads, head dim, window: sizes of 1, odd ones, stripes, the whole map, rectangles
CASES = {
    "square": (2, (6, 6), 2, 4, (3, 3)),
    "rectangle": (1, (6, 8), 3, 2, (3, 4)),
    "single-token": (2, (3, 2), 1, 3, (1, 1)),
    "rows": (1, (3, 4), 2, 2, (1, 4)),
    "columns": (1, (3, 4), 2, 2, (3, 2)),
    "columns-of-one": (2, (6, 2), 2, 2, (3, 1)),
    "whole-map": (2, (5, 3), 2, 4, (5, 3)),
    "one-pixel-map": (1, (1, 1), 2, 1, (1, 1)),
}


def make(case, parts=3):
    batch, (height, width), num_heads, head_dim, (wh, ww) = CASES[case]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, parts * num_heads * head_dim, generator=g, dtype=torch.float64)
    table = torch.randn(num_heads, 2 * wh - 1, 2 * ww - 1, generator=g, dtype=torch.float64)
    mask = torch.rand(batch, height, width, generator=g) < 0.6
    shared = torch.randn(batch, wh * ww, num_heads * head_dim, generator=g, dtype=torch.float64)
    return qkv, table, mask, shared, {"num_heads": num_heads, "window_size": (wh, ww)}


def labels_of(case, images):
    """Three labels per window, at random; of one image for all or of each image."""
    batch, size, *_ = CASES[case]
    g = torch.Generator().manual_seed(1)
    return torch.randint(-1, 2, (1 if images == "one" else batch, *size), generator=g)


# windows of one row or one column
LINES = ("single-token", "rows", "columns-of-one", "one-pixel-map")


def sums_of(case):
    """Sums of decays; some are equal."""
    batch, size, num_heads, *_ = CASES[case]
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, *size, num_heads, generator=g, dtype=torch.float64).round(decimals=0)


def loops(qkv, num_heads, window_size, layout, table, sign, scale, mask=None, shared=None, regions=None, sums=None):
    batch, height, width, _ = qkv.shape
    wh, ww = window_size
    parts = oracle.heads(qkv, num_heads, 3 if shared is None else 2)
    key, value = parts[-2:]
    out = torch.zeros_like(value)

    def place(y, x):
        if layout == "block":
            return (y // wh, x // ww), (y % wh, x % ww)
        return (y % (height // wh), x % (width // ww)), (y // (height // wh), x // (width // ww))

    tokens = [(y, x) for y in range(height) for x in range(width)]
    for b in range(batch):
        for n in range(num_heads):
            for i in tokens:
                window, t = place(*i)
                if shared is None:
                    query = parts[0][b, i[0], i[1], n]
                else:
                    query = shared[b, t[0] * ww + t[1]].reshape(num_heads, -1)[n]
                chosen = [j for j in tokens if place(*j)[0] == window and (mask is None or mask[b, j[0], j[1]])]
                if regions is not None:
                    labels = regions[b % len(regions)]
                    chosen = [j for j in chosen if labels[j] == labels[i]]
                if not chosen:
                    continue
                added = []
                for j in chosen:
                    u = place(*j)[1]
                    down, right = (
                        (t[0] - u[0], t[1] - u[1]) if sign == "query_minus_key" else (u[0] - t[0], u[1] - t[1])
                    )
                    added.append(0.0 if table is None else float(table[n, down + wh - 1, right + ww - 1]))
                    if sums is not None:
                        added[-1] -= abs(float(sums[b, *i, n] - sums[b, *j, n]))
                keys, values = ([x[b, j[0], j[1], n] for j in chosen] for x in (key, value))
                out[b, i[0], i[1], n] = oracle.attend(query, keys, values, added, scale)
    return out.flatten(-2)


@pytest.mark.parametrize("sign", ["query_minus_key", "key_minus_query"])
@pytest.mark.parametrize("layout", ["block", "grid"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case, layout, sign):
    qkv, table, _, _, options = make(case)
    out = window_attention(qkv, **options, layout=layout, bias_table=table, bias_sign=sign, scale=0.3)
    want = loops(qkv, *options.values(), layout, table, sign, 0.3)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("layout", ["block", "grid"])
@pytest.mark.parametrize("case", CASES)
def test_mask_agrees_with_loops(case, layout):
    qkv, table, mask, _, options = make(case)
    out = window_attention(qkv, **options, layout=layout, bias_table=table, key_mask=mask)
    scale = (qkv.shape[-1] // 3 // options["num_heads"]) ** -0.5
    want = loops(qkv, *options.values(), layout, table, "query_minus_key", scale, mask)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("layout", ["block", "grid"])
@pytest.mark.parametrize("case", CASES)
def test_shared_query_agrees_with_loops(case, layout):
    kv, table, _, shared, options = make(case, parts=2)
    out = window_attention(kv, q=shared, **options, layout=layout, bias_table=table, scale=1.5)
    want = loops(kv, *options.values(), layout, table, "query_minus_key", 1.5, shared=shared)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("options", ["plain", "masked", "shared"])
@pytest.mark.parametrize("images", ["one", "each"])
@pytest.mark.parametrize("case", CASES)
def test_regions_agree_with_loops(case, images, options):
    qkv, table, mask, shared, sizes = make(case, parts=2 if options == "shared" else 3)
    mask, shared = mask if options == "masked" else None, shared if options == "shared" else None
    labels = labels_of(case, images)
    layout = "block" if images == "one" else "grid"
    out = window_attention(
        qkv, **sizes, layout=layout, bias_table=table, scale=0.7, key_mask=mask, regions=labels, q=shared
    )
    want = loops(qkv, *sizes.values(), layout, table, "query_minus_key", 0.7, mask, shared, labels)
    torch.testing.assert_close(out, want)


def test_regions_are_shifted_windows():
    """Windows that are cut by the borders of the map, as Swin's figure 4 shows them."""
    qkv, table, _, _, options = make("square")
    bands = torch.tensor([0, 0, 0, 1, 1, 2])  # of a map of 6 tokens that was rolled by 1
    rolled = window_attention(
        qkv.roll((-1, -1), (1, 2)), **options, bias_table=table, regions=(3 * bands[:, None] + bands)[None]
    )
    out = rolled.roll((1, 1), (1, 2))
    # The same windows of a map with two more rows and columns of hidden tokens above and on the left.
    padded = torch.nn.functional.pad(qkv, (0, 0, 2, 1, 2, 1))
    mask = torch.nn.functional.pad(torch.ones(2, 6, 6, dtype=torch.bool), (2, 1, 2, 1))
    want = window_attention(padded, **options, bias_table=table, key_mask=mask)[:, 2:-1, 2:-1]
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_any_integers_are_labels(dtype):
    qkv, _, _, _, options = make("rectangle")
    labels = labels_of("rectangle", "one")
    top = torch.iinfo(dtype).max if dtype.itemsize < 4 else 2**30 - 1
    got = window_attention(qkv, **options, regions=(top - labels).to(dtype))
    torch.testing.assert_close(got, window_attention(qkv, **options, regions=labels))


@pytest.mark.parametrize("options", ["plain", "masked", "shared", "regions"])
@pytest.mark.parametrize("layout", ["block", "grid"])
@pytest.mark.parametrize("case", LINES)
def test_decays_agree_with_loops(case, layout, options):
    qkv, table, mask, shared, sizes = make(case, parts=2 if options == "shared" else 3)
    mask, shared = mask if options == "masked" else None, shared if options == "shared" else None
    table, labels = None if options == "plain" else table, labels_of(case, "each") if options == "regions" else None
    given = {"bias_table": table, "key_mask": mask, "regions": labels, "q": shared}
    out = window_attention(qkv, **sizes, layout=layout, scale=0.7, line_decay=sums_of(case), **given)
    want = loops(qkv, *sizes.values(), layout, table, "query_minus_key", 0.7, mask, shared, labels, sums=sums_of(case))
    torch.testing.assert_close(out, want)


def test_scale_of_zero_is_kept():
    qkv, _, _, _, options = make("whole-map")
    value = qkv.unflatten(-1, (3, -1))[..., 2, :]
    out = window_attention(qkv, **options, scale=0.0)
    torch.testing.assert_close(out, value.mean((1, 2), keepdim=True).expand_as(out))


def test_query_without_keys_gives_zeros():
    qkv, _, _, _, options = make("square")
    out = window_attention(qkv, **options, key_mask=torch.zeros(2, 6, 6, dtype=torch.bool))
    assert not out.any()


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradients(masked):
    qkv, table, mask, _, options = make("columns")
    inputs = (qkv.requires_grad_(), table.requires_grad_())
    mask[:, :, 0] = False  # whole windows without a key
    key_mask = mask if masked else None
    assert torch.autograd.gradcheck(
        lambda x, t: window_attention(x, bias_table=t, key_mask=key_mask, **options), inputs
    )


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradients_within_regions(masked):
    qkv, table, mask, _, options = make("columns")
    inputs = (qkv.requires_grad_(), table.requires_grad_())
    given = {"key_mask": mask if masked else None, "regions": labels_of("columns", "each")}
    assert torch.autograd.gradcheck(lambda x, t: window_attention(x, bias_table=t, **given, **options), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "columns-of-one"])
def test_gradients_of_decays(case):
    qkv, table, mask, _, options = make(case)
    sums = torch.randn(sums_of(case).shape, dtype=torch.float64)  # not differentiable where they are equal
    inputs = (qkv.requires_grad_(), sums.requires_grad_(), table.requires_grad_())
    given = options | {"key_mask": mask}
    assert torch.autograd.gradcheck(lambda x, s, t: window_attention(x, line_decay=s, bias_table=t, **given), inputs)


def test_equal_sums_have_no_gradient():
    qkv, _, _, _, options = make("rows")
    sums = torch.ones(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(window_attention(qkv, line_decay=sums, **options).square().sum(), sums)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_stay_in_float32(dtype):
    """Differences of large sums would have no digits in half precision, also under autocast."""
    qkv, _, _, _, options = make("rows")
    sums = 5000 + sums_of("rows")
    want = window_attention(qkv.to(dtype).double(), line_decay=sums.float().double(), **options)
    out = window_attention(qkv.to(dtype), line_decay=sums.float(), **options)
    torch.testing.assert_close(out.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(window_attention(qkv.float(), line_decay=sums.float(), **options), out)


@pytest.mark.slow
def test_gradients_of_a_shared_query():
    kv, table, _, shared, options = make("rows", parts=2)
    inputs = (kv.requires_grad_(), shared.requires_grad_(), table.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, q, t: window_attention(x, q=q, bias_table=t, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    qkv, table, _, _, options = make("square")
    qkv, table = qkv.to(dtype), table.to(dtype)
    with implementation("reference"):
        out = window_attention(qkv, bias_table=table, **options)
    want = window_attention(qkv.double(), bias_table=table.double(), **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_within_regions(dtype):
    qkv, table, _, _, options = make("square")
    qkv, table = 3 * qkv.to(dtype), table.to(dtype)
    labels = labels_of("square", "one")
    out = window_attention(qkv, bias_table=table, regions=labels, **options)
    want = window_attention(qkv.double(), bias_table=table.double(), regions=labels, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_strided_input():
    qkv, table, _, _, options = make("rectangle")
    view = qkv.movedim(-1, 1).contiguous().movedim(1, -1)
    assert not view.is_contiguous()
    got, want = (window_attention(x, bias_table=table, **options) for x in (view, qkv))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("images", [0, 1])
def test_batch_of_no_images_with_all_options(images):
    mask, regions = torch.ones(0, 4, 6, dtype=torch.bool), torch.zeros(images, 4, 6, dtype=torch.int64)
    given = {"key_mask": mask, "regions": regions, "line_decay": torch.zeros(0, 4, 6, 2), "q": torch.zeros(0, 3, 8)}
    out = window_attention(torch.zeros(0, 4, 6, 16), num_heads=2, window_size=(1, 3), **given)
    assert out.shape == (0, 4, 6, 8)


QKV = torch.zeros(1, 4, 4, 12)


def call(**change):
    """A valid call, with some arguments changed."""
    return window_attention(**{"qkv": QKV, "num_heads": 2, "window_size": 2} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"window_size": (3, 2)}, ValueError, "map of 4 x 4 for windows of 3 x 2.*multiples"),
    ({"window_size": 0}, ValueError, "window_size=0; it has to be 1 or more"),
    ({"window_size": (2, 2, 2)}, TypeError, "window_size=.*give an int, or two"),
    ({"num_heads": 3}, ValueError, "12 channels in qkv for num_heads=3.*multiple of 3 x 3 = 9"),
    ({"num_heads": 0}, ValueError, "num_heads=0; it has to be 1 or more"),
    ({"layout": "stripe"}, ValueError, "layout='stripe'; it has to be 'block' or 'grid'"),
    ({"bias_sign": "minus"}, ValueError, "bias_sign='minus'; it has to be"),
    ({"bias_table": torch.zeros(2, 3, 2)}, ValueError, r"bias_table of shape \(2, 3, 2\).*\(2, 3, 3\)"),
    ({"bias_table": torch.zeros(2, 3, 3).double()}, TypeError, "bias_table of torch.float64 with qkv of torch.float32"),
    ({"key_mask": torch.ones(1, 4, 3, dtype=torch.bool)}, ValueError, r"key_mask of shape .*\(1, 4, 4\)"),
    ({"key_mask": torch.ones(1, 4, 4)}, TypeError, "key_mask of torch.float32; it has to be bool"),
    ({"regions": torch.ones(2, 4, 4).int()}, ValueError, r"regions of shape \(2, .*\(B or 1, H, W\) = \(1, 4, 4\)"),
    ({"regions": torch.ones(1, 4, 3).int()}, ValueError, r"regions of shape .*\(1, 4, 4\)"),
    ({"regions": torch.ones(4, 4).int()}, ValueError, r"regions of shape \(4, 4\)"),
    ({"regions": torch.ones(1, 4, 4)}, TypeError, "regions of torch.float32; it has to be a signed integer or uint8"),
    ({"regions": torch.ones(1, 4, 4).bool()}, TypeError, "regions of torch.bool; it has to be a signed integer"),
    ({"regions": 1}, TypeError, "regions of type int; it has to be a torch.Tensor"),
    ({"regions": torch.ones(1, 4, 4, device="meta").int()}, ValueError, "regions on meta with qkv on cpu"),
    ({"line_decay": torch.zeros(1, 4, 4, 2)}, ValueError, "line_decay for windows of 2 x 2; .* one row or one column"),
    (
        {"line_decay": torch.zeros(1, 4, 4, 1), "window_size": (1, 4)},
        ValueError,
        r"line_decay of shape .*\(1, 4, 4, 2\)",
    ),
    ({"line_decay": torch.zeros(1, 4, 4, 2).double(), "window_size": (4, 1)}, TypeError, "line_decay of torch.float64"),
    ({"line_decay": torch.zeros(1, 4, 4, 2).half(), "window_size": (4, 1)}, TypeError, "line_decay of torch.float16"),
    (
        {"line_decay": torch.zeros(1, 4, 4, 2).int()},
        TypeError,
        "line_decay of torch.int32; it has to be floating",
    ),
    ({"line_decay": 1.0}, TypeError, "line_decay of type float; it has to be a torch.Tensor"),
    ({"line_decay": torch.zeros(1, 4, 4, 2, device="meta")}, ValueError, "line_decay on meta with qkv on cpu"),
    ({"q": torch.zeros(1, 4, 4)}, ValueError, "q of shape"),
    ({"qkv": QKV.int()}, TypeError, "qkv of torch.int32; it has to be floating point"),
    ({"qkv": QKV[0]}, ValueError, r"qkv of shape \(4, 4, 12\); expected \(B, H, W, channels\)"),
    ({"qkv": QKV.numpy()}, TypeError, "qkv of type ndarray; it has to be a torch.Tensor"),
    ({"qkv": None}, TypeError, "qkv of type NoneType"),
    ({"qkv": QKV.to_sparse()}, TypeError, "qkv of layout torch.sparse_coo"),
    ({"qkv": QKV.to(torch.complex64)}, TypeError, "qkv of torch.complex64; it has to be floating point"),
    ({"qkv": QKV.to(torch.float8_e4m3fn)}, TypeError, "qkv of torch.float8_e4m3fn"),
    ({"qkv": QKV[..., :0]}, ValueError, "0 channels in qkv"),
    ({"qkv": QKV[:, :0]}, ValueError, "qkv of 0 x 4 tokens; a map has one or more"),
    ({"key_mask": torch.ones(1, 4, 4, dtype=torch.bool, device="meta")}, ValueError, "key_mask on meta with"),
    ({"num_heads": 2.0}, TypeError, "num_heads=2.0; give an int"),
    ({"num_heads": True}, TypeError, "num_heads=True; give an int"),
    ({"num_heads": -2}, ValueError, "num_heads=-2; it has to be 1 or more"),
    ({"scale": float("nan")}, ValueError, "scale=nan; it has to be finite"),
    ({"scale": float("inf")}, ValueError, "scale=inf; it has to be finite"),
    ({"scale": "1"}, TypeError, "scale='1'; give a number"),
]


def random_call(rng):
    tensors, options = random_calls.attention(rng)
    side = rng.choice(random_calls.NUMBERS)
    options |= {"window_size": side, "layout": rng.choice(("block", "grid", "rows"))}
    if rng.random() < 0.3 and isinstance(tensors["qkv"], torch.Tensor) and tensors["qkv"].ndim == 4:
        sizes = (rng.choice((1, *tensors["qkv"].shape[:1])), *tensors["qkv"].shape[1:3])
        dtype = rng.choice((torch.int64, torch.int32, torch.uint8, torch.bool))
        options["regions"] = torch.randint(0, 2, sizes, generator=torch.Generator().manual_seed(3)).to(dtype)
    if rng.random() < 0.3 and isinstance(tensors["qkv"], torch.Tensor) and tensors["qkv"].ndim == 4:
        options["window_size"] = rng.choice(((1, side), (side, 1), side))
        sizes = (*tensors["qkv"].shape[:3], rng.choice((1, 2, 3)))
        options["line_decay"] = torch.randn(sizes, generator=torch.Generator().manual_seed(4))
    return window_attention, tensors | random_calls.bias_table(rng, side) | options
