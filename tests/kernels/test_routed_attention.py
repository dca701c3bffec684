"""Routed attention against loops over single tokens, by gradcheck, and its messages, for each
implementation. Some seconds.
"""

import pytest
import torch

from zoo.kernels import implementation, routed_attention

from . import oracle

pytestmark = pytest.mark.usefixtures("each_implementation")

# map of q, map of k and v, regions, topk
CASES = {
    "plain": ((4, 6), (4, 6), 2, 3),
    "one-region": ((3, 2), (3, 2), 1, 1),
    "single-tokens": ((3, 3), (3, 3), 3, 4),
    "all-regions": ((6, 3), (6, 3), 3, 9),
    # the fast path gathers these, and masks the others
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


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case):
    q, k, v, routes, options = make(case)
    want = oracle.routed_attention(q, k, v, routes, *options.values(), 0.7)
    torch.testing.assert_close(routed_attention(q, k, v, routes, scale=0.7, **options), want)


@pytest.mark.parametrize("case", ["plain", "few-of-many"])
def test_region_named_twice_counts_twice(case):
    q, k, v, routes, options = make(case)
    routes = torch.tensor([0, 1, 1])[-routes.shape[2] :].expand_as(routes)
    want = oracle.routed_attention(q, k, v, routes, *options.values(), 3**-0.5)
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
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        routed_attention(**{"q": X, "k": X, "v": X, "routes": ROUTES, "num_heads": 2, "regions": 2} | change)
