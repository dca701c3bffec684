"""Batches of no images, numbers out of range, what is no tensor, and torch.jit.trace: the same in all implementations.

Random calls, quick; thousands of them are slow, two minutes.
"""

import random

import pytest
import torch

from zoo.kernels import (
    depthwise_conv2d_nhwc,
    implementation,
    large_kernel_attention,
    neighborhood_attention,
    routed_attention,
    window_attention,
)

from .calls import CALLS, make

IMPLEMENTATIONS = ("auto", "torch", "reference")


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_batch_of_no_images(name, choice):
    first, *others = make(name, requires_grad=True)
    if name == "routed_attention":
        others = [x[:0] for x in others]
    with implementation(choice):
        out = CALLS[name].function(first[:0], *others)
    assert out.shape == (0, *first.shape[1:3], 8)
    for grad in torch.autograd.grad(out.sum(), (first, *others), allow_unused=True, materialize_grads=True):
        assert (grad == 0).all()


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_batch_of_no_images_with_mask_and_shared_query(choice):
    mask, q = torch.ones(0, 4, 6, dtype=torch.bool), torch.zeros(0, 6, 8)
    with implementation(choice):
        out = window_attention(torch.zeros(0, 4, 6, 16), num_heads=2, window_size=(2, 3), key_mask=mask, q=q)
    assert out.shape == (0, 4, 6, 8)


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [(4, 6), (24, 20)], ids=["one tile", "many tiles"])
def test_batch_of_no_images_with_masked_neighborhoods(choice, size):
    mask = torch.ones(0, *size, dtype=torch.bool)
    with implementation(choice):
        out = neighborhood_attention(torch.zeros(0, *size, 24), num_heads=2, kernel_size=3, key_mask=mask)
    assert out.shape == (0, *size, 8)


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("route", [-1, 4, 10**12], ids=str)
def test_route_out_of_range(choice, route):
    x = torch.zeros(1, 4, 4, 8)
    routes = torch.tensor([[[0], [1], [route], [2]]])
    with (
        implementation(choice),
        pytest.raises(ValueError, match=f"routes from .*{route}.* for 2 x 2 regions.*from 0 to 3"),
    ):
        routed_attention(x, x, x, routes, num_heads=2, regions=2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("name", CALLS)
def test_traced_operator_takes_any_batch(name):
    tensors = make(name)
    traced = torch.jit.trace(CALLS[name].function, tensors)
    first, *others = tensors
    again = [x[:1].contiguous() for x in tensors] if name == "routed_attention" else [first[:1].contiguous(), *others]
    torch.testing.assert_close(traced(*again), CALLS[name].function(*again))


X, QKV = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 24)
ROUTES = torch.zeros(1, 4, 1, dtype=torch.int64)
WEIGHT, BIAS = torch.zeros(8, 1, 3, 3), torch.zeros(8)


def window(**change):
    return window_attention(**{"qkv": QKV, "num_heads": 2, "window_size": 2} | change)


def neighborhood(**change):
    return neighborhood_attention(**{"qkv": QKV, "num_heads": 2, "kernel_size": 3} | change)


def routed(**change):
    return routed_attention(**{"q": X, "k": X, "v": X, "routes": ROUTES, "num_heads": 2, "regions": 2} | change)


def depthwise(**change):
    return depthwise_conv2d_nhwc(**{"x": X, "weight": WEIGHT, "bias": BIAS} | change)


def large_kernel(**change):
    given = {"x": X, "depthwise_weight": WEIGHT, "depthwise_bias": BIAS, "dilated_weight": WEIGHT, "dilated_bias": BIAS}
    return large_kernel_attention(**given | {"pointwise_weight": torch.zeros(8, 8), "pointwise_bias": BIAS} | change)


REFUSED = [
    (window, {"qkv": QKV.numpy()}, TypeError, "qkv of type ndarray; it has to be a torch.Tensor"),
    (window, {"qkv": None}, TypeError, "qkv of type NoneType"),
    (window, {"qkv": QKV.to_sparse()}, TypeError, "qkv of layout torch.sparse_coo"),
    (window, {"qkv": QKV.to(torch.complex64)}, TypeError, "qkv of torch.complex64; it has to be floating point"),
    (window, {"qkv": QKV.to(torch.float8_e4m3fn)}, TypeError, "qkv of torch.float8_e4m3fn"),
    (window, {"qkv": QKV[..., :0]}, ValueError, "0 channels in qkv"),
    (window, {"qkv": QKV[:, :0]}, ValueError, "qkv of 0 x 4 tokens; a map has one or more"),
    (window, {"key_mask": torch.ones(1, 4, 4, dtype=torch.bool, device="meta")}, ValueError, "key_mask on meta with"),
    (window, {"num_heads": 2.0}, TypeError, "num_heads=2.0; give an int"),
    (window, {"num_heads": True}, TypeError, "num_heads=True; give an int"),
    (window, {"num_heads": -2}, ValueError, "num_heads=-2; it has to be 1 or more"),
    (window, {"window_size": 0}, ValueError, "window_size=0; it has to be 1 or more"),
    (window, {"scale": float("nan")}, ValueError, "scale=nan; it has to be finite"),
    (window, {"scale": float("inf")}, ValueError, "scale=inf; it has to be finite"),
    (window, {"scale": "1"}, TypeError, "scale='1'; give a number"),
    (neighborhood, {"qkv": QKV[:, :, :0]}, ValueError, "qkv of 4 x 0 tokens"),
    (neighborhood, {"kernel_size": True}, TypeError, "kernel_size=True; give an int"),
    (neighborhood, {"kernel_size": -3}, ValueError, "kernel_size=-3; it has to be 1 or more"),
    (neighborhood, {"dilation": 0}, ValueError, "dilation=0; it has to be 1 or more"),
    (neighborhood, {"is_causal": 1}, TypeError, "is_causal=1; give True or False"),
    (neighborhood, {"key_mask": [[True]]}, TypeError, "key_mask of type list"),
    (routed, {"regions": 2.0}, TypeError, "regions=2.0; give an int"),
    (routed, {"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ValueError, "q of 0 x 4 tokens"),
    (routed, {"k": X[:, :0], "v": X[:, :0]}, ValueError, "k and v of 0 x 4 tokens"),
    (routed, {"routes": ROUTES.to("meta")}, ValueError, "routes on meta with q on cpu"),
    (routed, {"routes": ROUTES.tolist()}, TypeError, "routes of type list"),
    (depthwise, {"x": X[..., :0], "weight": WEIGHT[:0], "bias": None}, ValueError, "channels=0; it has to be 1 or"),
    (depthwise, {"x": X[:, :0]}, ValueError, "x of 0 x 4 tokens"),
    (depthwise, {"weight": WEIGHT[..., :0]}, ValueError, "kernel of 3 x 0; both sides have to be odd"),
    (depthwise, {"weight": None}, TypeError, "weight of type NoneType"),
    (depthwise, {"dilation": 0}, ValueError, "dilation=0; it has to be 1 or more"),
    (large_kernel, {"pointwise_weight": None}, TypeError, "pointwise_weight of type NoneType"),
    (large_kernel, {"x": X[:, :0]}, ValueError, "x of 0 x 4 tokens"),
]


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("function", "change", "error", "message"), REFUSED, ids=[f"{row[0].__name__}-{row[3][:30]}" for row in REFUSED]
)
def test_refused(choice, function, change, error, message):
    with implementation(choice), pytest.raises(error, match=message):
        function(**change)


# What a random call takes; most are right, or a call would seldom be.
NUMBERS = (1, 1, 2, 2, 3, 4, 0, -1, True, 1.5, None, (1, 2), (2,), "2")
HEADS = (1, 2, 2, 2, 3, 0, -1, 1.0)
SCALES = (None, None, 0.3, 0, -1.0, 1e4, float("nan"), float("inf"), "1")
SIDES = (1, 2, 4, 4, 6, 6, 12, 17, 0)
TYPES = (torch.float64,) * 6 + (torch.float32, torch.int64)


def tensor(rng, *sizes):
    """Normal numbers, seldom of a wrong shape or type, or with one that is not finite; seldom none."""
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    if rng.random() < 0.05:
        sizes = sizes[: rng.randrange(len(sizes) + 1)]
    if rng.random() < 0.05 and sizes:
        sizes = (*sizes[:-1], rng.choice((0, 1, 5)))
    return None if rng.random() < 0.02 else torch.randn(sizes, generator=g, dtype=torch.float64).to(rng.choice(TYPES))


def mask(rng, *sizes):
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    return rng.choice((None, torch.rand(sizes, generator=g) < rng.choice((0.0, 0.5, 1.0))))


def random_call(rng):
    """A function and its arguments."""
    batch, height, width = rng.choice((0, 1, 2)), rng.choice(SIDES), rng.choice(SIDES)
    options = {"num_heads": rng.choice(HEADS), "scale": rng.choice(SCALES)}
    kind = rng.choice(("window", "neighborhood", "routed", "depthwise"))
    if kind == "depthwise":
        sides = rng.choice((1, 3, 3, 5, 2, 0)), rng.choice((1, 3, 3, 2))
        tensors = {"x": tensor(rng, batch, height, width, 4), "weight": tensor(rng, 4, 1, *sides)}
        return depthwise_conv2d_nhwc, tensors | {"bias": tensor(rng, 4), "dilation": rng.choice(NUMBERS)}
    if kind == "routed":
        regions = rng.choice((1, 2, 2, 3, 0, 1.0))
        count = regions**2 if isinstance(regions, int) else 1
        low, high = rng.choice(((0, count), (0, count), (0, count), (-1, count), (0, count + 2)))
        routes = torch.randint(low, max(high, low + 1), (batch, count, rng.choice((1, 2, 3, 0))))
        tensors = {name: tensor(rng, batch, height, width, 4) for name in "qkv"}
        return routed_attention, tensors | {"routes": routes, "regions": regions} | options
    options["qkv"] = tensor(rng, batch, height, width, rng.choice((12, 12, 12, 24, 8, 0)))
    options["key_mask"] = mask(rng, batch, height, width)
    if kind == "window":
        side = rng.choice(NUMBERS)
        if rng.random() < 0.5 and isinstance(side, int):
            options["bias_table"] = tensor(rng, 2, *(max(0, 2 * side - 1),) * 2)
        return window_attention, options | {"window_size": side, "layout": rng.choice(("block", "grid", "rows"))}
    side = rng.choice((1, 2, 3, 3, 5, *NUMBERS))
    if rng.random() < 0.5 and isinstance(side, int):
        options["bias_table"] = tensor(rng, 2, *(max(0, 2 * side - 1),) * 2)
    for name, usual in (("dilation", 1), ("stride", 1), ("is_causal", False)):
        options[name] = rng.choice((usual, usual, *NUMBERS))
    return neighborhood_attention, options | {"kernel_size": side}


def outcome(choice, function, options):
    """What it returns and the gradients of it, or the type of its error."""
    given = {
        name: x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    try:
        with implementation(choice):
            out = function(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    inputs = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def check_random_calls(seed, number):
    rng = random.Random(seed)
    for _ in range(number):
        function, options = random_call(rng)
        want = outcome("reference", function, options)
        for choice in ("auto", "torch"):
            found = outcome(choice, function, options)
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5) if isinstance(want, list) else None
            assert isinstance(want, list) or found == want, (function.__name__, options)


def test_random_calls():
    check_random_calls(seed=0, number=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_random_calls(seed):
    check_random_calls(seed, number=700)
