"""Routed attention against loops over single tokens, gradcheck, and rejected arguments. Some seconds."""

import pytest
import torch

from zoo.kernels import implementation, routed_attention

from . import oracle, random_calls

pytestmark = pytest.mark.usefixtures("each_implementation")

# map of q, map of k and v, regions, topk
CASES = {
    "plain": ((4, 6), (4, 6), 2, 3),
    "one-region": ((3, 2), (3, 2), 1, 1),
    "single-tokens": ((3, 3), (3, 3), 3, 4),
    "all-regions": ((6, 3), (6, 3), 3, 9),
    # the fast path gathers the keys of these, and masks keys for the others
    "pooled-keys": ((6, 6), (3, 3), 3, 2),
    "few-of-many": ((4, 8), (4, 8), 4, 2),
}


def make(case, batch=2, num_heads=2, head_dim=3):
    size, key_size, regions, topk = CASES[case]
    g = torch.Generator().manual_seed(0)
    sizes = (size, key_size, key_size)
    tensors = [torch.randn(batch, *s, num_heads * head_dim, generator=g, dtype=torch.float64) for s in sizes]
    routes = torch.rand(batch, regions**2, regions**2, generator=g).topk(topk).indices
    return *tensors, routes, {"num_heads": num_heads, "regions": regions}


def loops(q, k, v, routes, num_heads, regions, scale):
    query, key, value = (oracle.heads(z, num_heads, 1)[0] for z in (q, k, v))
    out = torch.zeros_like(query)

    def tokens(region, z):
        height, width = z.shape[1] // regions, z.shape[2] // regions
        top, left = region // regions * height, region % regions * width
        return [(y, x) for y in range(top, top + height) for x in range(left, left + width)]

    for b in range(q.shape[0]):
        for region in range(regions**2):
            chosen = [j for target in routes[b, region].tolist() for j in tokens(target, k)]
            for y, x in tokens(region, q):
                for n in range(num_heads):
                    keys, values = ([z[b, j[0], j[1], n] for j in chosen] for z in (key, value))
                    out[b, y, x, n] = oracle.attend(query[b, y, x, n], keys, values, [0.0] * len(chosen), scale)
    return out.flatten(-2)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case):
    q, k, v, routes, options = make(case)
    want = loops(q, k, v, routes, *options.values(), 0.7)
    torch.testing.assert_close(routed_attention(q, k, v, routes, scale=0.7, **options), want)


@pytest.mark.parametrize("case", ["plain", "few-of-many"])
def test_region_named_twice_counts_twice(case):
    q, k, v, routes, options = make(case)
    routes = torch.tensor([0, 1, 1])[-routes.shape[2] :].expand_as(routes)
    want = loops(q, k, v, routes, *options.values(), 3**-0.5)
    torch.testing.assert_close(routed_attention(q, k, v, routes, **options), want)


@pytest.mark.parametrize("case", ["single-tokens", "pooled-keys"])
def test_gradients(case):
    q, k, v, routes, options = make(case, batch=1, num_heads=1, head_dim=2)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: routed_attention(*x, routes, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    q, k, v, routes, options = make("plain")
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with implementation("reference"):
        out = routed_attention(q, k, v, routes, **options)
    want = routed_attention(q.double(), k.double(), v.double(), routes, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


X, ROUTES = torch.zeros(1, 4, 4, 6), torch.zeros(1, 4, 2, dtype=torch.int64)


def call(**change):
    """A valid call, with some arguments changed."""
    return routed_attention(**{"q": X, "k": X, "v": X, "routes": ROUTES, "num_heads": 2, "regions": 2} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"regions": 3}, ValueError, "q of 4 x 4 tokens for 3 x 3 regions.*multiples of 3"),
    ({"regions": 0}, ValueError, "regions=0; it has to be 1 or more"),
    ({"num_heads": 4}, ValueError, "6 channels in q for num_heads=4"),
    ({"routes": ROUTES.int()}, TypeError, "routes of torch.int32; they have to be int64"),
    ({"routes": ROUTES[:, :3]}, ValueError, r"routes of shape \(1, 3, 2\).*\(1, 4, any\)"),
    ({"routes": ROUTES[:, :, :0]}, ValueError, "routes to no region"),
    ({"k": X[..., :3], "v": X[..., :3]}, ValueError, r"k of shape \(1, 4, 4, 3\)"),
    ({"v": X[:, :2]}, ValueError, r"v of shape \(1, 2, 4, 6\); expected the shape of k"),
    ({"k": X[:, :3], "v": X[:, :3]}, ValueError, "k and v of 3 x 4 tokens for 2 x 2 regions"),
    ({"q": X.long()}, TypeError, "q of torch.int64"),
    ({"v": X.double()}, TypeError, "v of torch.float64 with q of torch.float32"),
    ({"regions": 2.0}, TypeError, "regions=2.0; give an int"),
    ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ValueError, "q of 0 x 4 tokens"),
    ({"k": X[:, :0], "v": X[:, :0]}, ValueError, "k and v of 0 x 4 tokens"),
    ({"routes": ROUTES.to("meta")}, ValueError, "routes on meta with q on cpu"),
    ({"routes": ROUTES.tolist()}, TypeError, "routes of type list"),
    ({"routes": ROUTES - 1}, ValueError, "routes from -1 to -1 for 2 x 2 regions.*from 0 to 3"),
    ({"routes": ROUTES + 4}, ValueError, "routes from 4 to 4 for 2 x 2 regions.*from 0 to 3"),
    ({"routes": ROUTES + 10**12}, ValueError, f"routes from {10**12} to {10**12} for 2 x 2 regions.*from 0 to 3"),
]


def random_call(rng):
    batch, height, width = random_calls.size(rng)
    regions = rng.choice((1, 2, 2, 3, 0, 1.0))
    count = regions**2 if isinstance(regions, int) else 1
    low, high = rng.choice(((0, count), (0, count), (0, count), (-1, count), (0, count + 2)))
    routes = torch.randint(low, max(high, low + 1), (batch, count, rng.choice((1, 2, 3, 0))))
    tensors = {name: random_calls.tensor(rng, batch, height, width, 4) for name in "qkv"}
    options = {"num_heads": rng.choice(random_calls.HEADS), "scale": rng.choice(random_calls.SCALES)}
    return routed_attention, tensors | {"routes": routes, "regions": regions} | options
