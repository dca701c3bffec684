"""Routed attention in Triton, interpreted, against float64. Run by test_triton.py."""

import pytest
import torch

from zoo.kernels import implementation, routed_attention
from zoo.kernels.routed_attention import op, reference, triton_impl

from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# map of q, map of k and v, regions, topk, heads, head dim
LISTS = {
    "one-region": ((3, 5), (3, 5), 1, 1, 1, 8),
    "one-route": ((8, 8), (8, 8), 2, 1, 1, 16),
    "odd-regions": ((15, 9), (15, 9), 3, 2, 2, 32),
    "pooled-keys": ((9, 12), (3, 6), 3, 2, 2, 16),
    "more-keys-than-queries": ((2, 4), (8, 12), 2, 2, 1, 64),
    "one-less-than-a-tile": ((7, 9), (7, 9), 1, 1, 1, 16),
    "one-more-than-a-tile": ((10, 26), (10, 26), 2, 2, 1, 40),
    "seventeen-tokens": ((1, 17), (1, 17), 1, 1, 2, 32),
    "wide-heads": ((6, 6), (6, 6), 1, 1, 1, 128),
}
# Small regions and many routes: all keys are gone through.
ALL_KEYS = {
    "plain": ((4, 6), (4, 6), 2, 3, 2, 32),
    "single-tokens": ((3, 3), (3, 3), 3, 4, 2, 16),
    "seven-of-one-token": ((7, 7), (7, 7), 7, 16, 1, 16),
    "seven-of-four-tokens": ((14, 14), (14, 14), 7, 16, 1, 32),
    "more-regions-than-a-tile": ((9, 9), (9, 9), 9, 11, 1, 16),
    "all-regions": ((6, 9), (6, 9), 3, 9, 1, 24),
    "one-key-per-region": ((6, 6), (3, 3), 3, 2, 1, 64),
    "one-query-per-region": ((3, 3), (9, 6), 3, 3, 1, 16),
    "wide-heads-of-small-regions": ((4, 6), (4, 6), 2, 3, 1, 128),
}
CASES = LISTS | ALL_KEYS
ROUTES = ("distinct", "repeated", "one-for-all")


def make(case, dtype, routes="distinct", batch=2):
    size, key_size, regions, topk, num_heads, head_dim = CASES[case]
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, *s, num_heads * head_dim, generator=g).to(dtype) for s in (size, key_size, key_size, size)
    )
    chosen = torch.rand(batch, regions**2, regions**2, generator=g).topk(topk).indices
    if routes == "repeated":
        chosen = torch.randint(regions**2, chosen.shape, generator=g)
    elif routes == "one-for-all":  # no gradient for the other regions
        chosen = torch.full_like(chosen, regions**2 - 1)
    return (q, k, v), chosen, grad, {"num_heads": num_heads, "regions": regions, "scale": 0.3}


def gradients(function, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


def check(tensors, routes, grad, options):
    dtype = tensors[0].dtype
    with implementation("triton"):
        found = gradients(lambda *x: routed_attention(*x, routes, **options), tensors, grad)
    exact = [x.double() for x in tensors]
    wanted = gradients(lambda *x: reference.routed_attention(*x, routes, **options), exact, grad.double())
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, want, dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, dtype):
    check(*make(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routes", ROUTES[1:])
@pytest.mark.parametrize("case", ["plain", "one-query-per-region", "pooled-keys"])
def test_routes_that_repeat_and_leave_out(case, routes, dtype):
    check(*make(case, dtype, routes))


@pytest.mark.parametrize("case", ["pooled-keys", "plain"])
def test_bfloat16(case):
    check(*make(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_regions_with_many_routes_take_all_keys(case, dtype):
    (q, k, _), routes, _, options = make(case, dtype)
    bias = triton_impl._region_bias(q, k, routes, options["num_heads"], options["regions"])
    assert (bias is not None) == (case in ALL_KEYS)


@pytest.mark.parametrize(("regions", "topk"), [(1, 1), (3, 1), (3, 5), (16, 3)])
def test_inverse_routes(regions, topk):
    routes = torch.randint(regions**2, (2, regions**2, topk), generator=torch.Generator().manual_seed(0))
    order, starts = triton_impl._inverse(routes, regions)
    for image, listed in enumerate(routes):
        for region in range(regions**2):
            begin, end = starts[image, region : region + 2].tolist()
            want = [source for source, row in enumerate(listed.tolist()) for target in row if target == region]
            assert order[image].flatten()[begin:end].tolist() == want


def test_bias_counts_routes():
    (q, k, _), routes, _, _ = make("plain", torch.float32, "repeated")
    routes[0, 0] = torch.tensor([2, 2, 1])
    bias = triton_impl._region_bias(q, k, routes, 2, 2)
    counts = torch.zeros(2, 4, bias.shape[2]).scatter_add(2, routes, torch.ones(routes.shape))
    assert counts[0, 0, 2] == 2
    torch.testing.assert_close(bias, counts.log2())


@pytest.mark.parametrize("case", ["plain", "one-route"])
def test_keys_of_regions_that_nobody_routes_to_have_no_gradient(case):
    _, _, k_grad, v_grad = check(*make(case, torch.float32, "one-for-all"))
    half = k_grad.shape[1] // 2
    assert not k_grad[:, :half].any()
    assert not v_grad[:, :half].any()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("case", ["plain", "pooled-keys"])
def test_sums_of_exponentials_that_underflow(case):
    """They are below 2^-128: keys that do not exist, with scores of 0, must not be added to them."""
    (q, k, v), routes, grad, options = make(case, torch.float32)
    tensors = q * 0.1 + 1, k * 0.1 - 20, v
    with implementation("triton"):
        found = gradients(lambda *x: routed_attention(*x, routes, **options), tensors, grad)
    wanted = gradients(lambda *x: reference.routed_attention(*x, routes, **options), tensors, grad)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["plain", "pooled-keys"])
def test_views(case):
    """Slices of one projection are read in place; a map with another memory format is copied."""
    (q, k, v), routes, grad, options = make(case, torch.float32)
    kv = torch.cat((k, v), -1).chunk(2, -1)
    other = q.movedim(-1, 1).contiguous().movedim(1, -1)
    assert not any(x.is_contiguous() for x in (*kv, other))
    expanded = routes[:1].expand(routes.shape)
    check((other, *kv), expanded, grad[:1].expand(grad.shape), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["plain", "one-route"])
def test_slices_that_start_between_multiples_of_16_bytes(case, dtype):
    tensors, routes, grad, options = make(case, dtype)
    wide = (torch.cat((x[..., :1], x, x[..., :15]), -1)[..., 1:-15] for x in (*tensors, grad))
    *odd, odd_grad = wide
    assert all(x.data_ptr() % 16 for x in (*odd, odd_grad))
    check(odd, routes, odd_grad, options)


def test_gradients_are_the_same_each_time():
    case = make("pooled-keys", torch.float32, "repeated")
    for first, second in zip(check(*case), check(*case), strict=True):
        assert torch.equal(first, second)


def test_double_backward():
    tensors, routes, grad, options = make("plain", torch.float32)

    def second(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        firsts = torch.autograd.grad(function(*leaves), leaves, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in firsts), leaves)

    with implementation("triton"):
        found = second(lambda *x: routed_attention(*x, routes, **options), torch.float32)
    wanted = second(lambda *x: reference.routed_attention(*x, routes, **options), torch.float64)
    for got, want in zip(found, wanted, strict=True):
        assert_within_budget(got, want, torch.float32)


def test_operators_are_registered_rightly(fake_tensors_launch_nothing):
    tensors, routes, grad, options = make("single-tokens", torch.float32, batch=1)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*(x.requires_grad_() for x in tensors), routes, *options.values())
    torch.library.opcheck(op.forward, arguments, test_utils=utils)
    plain = [x.detach() for x in tensors]
    out, lse = op.forward(*plain, routes, *options.values())
    torch.library.opcheck(op.backward, (grad, *plain, routes, out, lse, *options.values()), test_utils=utils)
