"""Flow attention against loops over single tokens, gradcheck, and rejected arguments. Seconds."""

import math

import pytest
import torch

from zoo.kernels import flow_attention

from . import oracle, random_calls
from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("each_implementation")

# map, options
CASES = {
    "map": ((3, 4), {}),
    "one-token": ((1, 1), {}),
    "one-row": ((1, 6), {"eps": 0.1}),  # large enough that each of its three places matters
    "no-eps": ((4, 2), {"eps": 0.0}),
}


def make(case, batch=2, num_heads=2, head_dim=4):
    """The tensors of a call by name, and its other options."""
    size, options = CASES[case]
    g = torch.Generator().manual_seed(0)
    shape = (batch, *size, num_heads * head_dim)
    given = {name: 3 * torch.randn(shape, generator=g, dtype=torch.float64) for name in "qkv"}
    return given, options | {"num_heads": num_heads}


def sigmoid(x):
    return torch.tensor([1 / (1 + math.exp(-float(value))) for value in x], dtype=torch.float64)


def flow(a, b, eps):
    return sum((float(x) + eps) * (float(y) + eps) for x, y in zip(a, b, strict=True)) + eps


def loops(given, options):
    query, key, value = (oracle.heads(given[name], options["num_heads"], 1)[0] for name in "qkv")
    out = torch.zeros_like(value)
    for b in range(out.shape[0]):
        for n in range(out.shape[3]):
            tokens = (x[b, :, :, n].flatten(0, 1) for x in (query, key, value))
            out[b, :, :, n] = one_head(*tokens, options.get("eps", 1e-6)).view_as(out[b, :, :, n])
    return out.flatten(-2)


def one_head(query, key, value, eps):
    sinks, sources = [sigmoid(x) for x in query], [sigmoid(x) for x in key]
    into = [flow(sink, sum(sources), eps) for sink in sinks]
    out_of = [flow(source, sum(sinks), eps) for source in sources]
    received = [flow(sink, sum(s / f for s, f in zip(sources, out_of, strict=True)), eps) for sink in sinks]
    sent = [flow(source, sum(s / f for s, f in zip(sinks, into, strict=True)), eps) for source in sources]
    exponentials = [math.exp(min(max(x, -1), 1)) for x in sent]
    weights = [len(sent) * e / sum(exponentials) for e in exponentials]
    rows = []
    for sink, flowed, wanted in zip(sinks, into, received, strict=True):
        row = sum(w * float(sink @ source) * v for source, w, v in zip(sources, weights, value, strict=True))
        rows.append(row / flowed / (1 + math.exp(-wanted)))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case):
    given, options = make(case)
    torch.testing.assert_close(flow_attention(**given, **options), loops(given, options))


@pytest.mark.parametrize("case", ["map", "one-row"])
def test_gradients(case):
    given, options = make(case, batch=1)
    inputs = tuple(x.requires_grad_() for x in given.values())
    assert torch.autograd.gradcheck(lambda *x: flow_attention(*x, **options), inputs, fast_mode=True)


def test_a_list_of_tokens_is_a_map_of_one_row():
    given, options = make("map")
    want = flow_attention(**given, **options).flatten(1, 2)
    given = {name: x.flatten(1, 2)[:, None] for name, x in given.items()}
    torch.testing.assert_close(flow_attention(**given, **options)[:, 0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    given, options = make("map")
    given = {name: x.to(dtype) for name, x in given.items()}
    out = flow_attention(**given, **options)
    want = flow_attention(**{name: x.double() for name, x in given.items()}, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_sums_may_exceed_float16():
    """The flows of a map of 14,400 tokens are beyond 65,504."""
    g = torch.Generator().manual_seed(0)
    halves = [(4 * torch.rand(1, 120, 120, 16, generator=g)).half() for _ in range(3)]
    assert halves[0].double().sigmoid().sum() / 16 * 8 > torch.finfo(torch.float16).max
    got, want = (flow_attention(*tensors, num_heads=1) for tensors in (halves, [x.double() for x in halves]))
    assert_within_budget(got, want, torch.float16)


@pytest.mark.parametrize("level", [-200.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoids_of_zero_and_of_one(level, dtype):
    x = torch.full((1, 2, 3, 8), level, dtype=dtype, requires_grad=True)
    out = flow_attention(x, x, x, num_heads=2)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


X = torch.zeros(1, 4, 4, 8)


def call(**change):
    """A valid call, with some arguments changed."""
    return flow_attention(**{"q": X, "k": X, "v": X, "num_heads": 2} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"q": X[0]}, ValueError, r"q of shape \(4, 4, 8\)"),
    ({"k": X[:, :2]}, ValueError, r"k of shape \(1, 2, 4, 8\); expected the shape of q"),
    ({"v": X[..., :4]}, ValueError, r"v of shape \(1, 4, 4, 4\); expected the shape of q"),
    ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, ValueError, "q of 0 x 4 tokens"),
    ({"q": X.long()}, TypeError, "q of torch.int64"),
    ({"k": X.half()}, TypeError, "k of torch.float16 with q of torch.float32"),
    ({"v": None}, TypeError, "v of type NoneType"),
    ({"v": X.to("meta")}, ValueError, "v on meta with q on cpu"),
    ({"num_heads": 3}, ValueError, "8 channels in q for num_heads=3"),
    ({"num_heads": 2.0}, TypeError, "num_heads=2.0; give an int"),
    ({"eps": -1e-6}, ValueError, "eps=-1e-06; it has to be 0 or more, and finite"),
    ({"eps": math.inf}, ValueError, "eps=inf; it has to be 0 or more, and finite"),
    ({"eps": None}, TypeError, "eps=None; give a number"),
]


def random_call(rng):
    sizes = random_calls.size(rng)
    tensors = {name: random_calls.tensor(rng, *sizes, 8) for name in "qkv"}
    options = {"num_heads": rng.choice(random_calls.HEADS), "eps": rng.choice((1e-6, 1e-6, 0.5, -1, None))}
    return flow_attention, tensors | options
