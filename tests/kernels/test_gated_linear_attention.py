"""Gated linear attention against sums over pairs of tokens, gradcheck, and rejected arguments. Some seconds."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import gated_linear_attention, implementation

from . import random_calls

pytestmark = pytest.mark.usefixtures("each_implementation")

# tokens, whether both directions; a chunk of the fast path has 16 tokens
CASES = {
    "one-token": (1, True),
    "forward": (5, False),
    "both": (5, True),
    "one-less-than-a-chunk": (15, True),
    "one-chunk": (16, False),
    "one-more-than-a-chunk": (17, True),
    "three-chunks": (40, True),
    "six-chunks-forward": (91, False),
}


def make(case, batch=2, num_heads=2, key_dim=3, value_dim=4, factor=1.0):
    """The tensors of a call, by name."""
    tokens, both = CASES[case] if isinstance(case, str) else case
    g = torch.Generator().manual_seed(0)
    shape = (batch, tokens, num_heads)
    given = {
        name: torch.randn(*shape, dim, generator=g, dtype=torch.float64)
        for name, dim in (("q", key_dim), ("k", key_dim), ("v", value_dim))
    }
    for name in ("log_gates", "reverse_log_gates")[: 1 + both]:
        given[name] = factor * F.logsigmoid(torch.randn(*shape, key_dim, generator=g, dtype=torch.float64))
    return given


def pairs(q, k, v, log_gates, reverse_log_gates=None, *, scale=None):
    """The definition without a state: each token's sum over the others, with the gates between them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        after = F.pad(log_gates[:, 1 : t + 1], (0, 0, 0, 0, 0, 1))  # those of the tokens after each one up to t
        decays = after.flip(1).cumsum(1).flip(1).exp()
        weights = scale * (q[:, t, None] * decays * k[:, : t + 1]).sum(-1, keepdim=True)
        out[:, t] = (weights * v[:, : t + 1]).sum(1)
    if reverse_log_gates is not None:
        turned = (x.flip(1) for x in (q, k, v, reverse_log_gates))
        out += pairs(*turned, scale=scale).flip(1)
    return out


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_sums_over_pairs(case):
    given = make(case)
    torch.testing.assert_close(gated_linear_attention(**given), pairs(**given))


def test_scale():
    given = make("both")
    torch.testing.assert_close(gated_linear_attention(**given, scale=-2), pairs(**given, scale=-2.0))


def test_gates_of_one_are_linear_attention_without_denominator():
    given = make("forward")
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    want = ((q @ k.mT).tril() @ v).transpose(1, 2)
    given["log_gates"] = torch.zeros_like(given["q"])
    torch.testing.assert_close(gated_linear_attention(**given, scale=1), want)


def test_gates_of_zero_leave_the_token_itself():
    given = make("one-more-than-a-chunk")
    given |= {name: torch.full_like(given["q"], -math.inf) for name in ("log_gates", "reverse_log_gates")}
    given = {name: x.requires_grad_() for name, x in given.items()}
    out = gated_linear_attention(**given, scale=1)
    torch.testing.assert_close(out, 2 * (given["q"] * given["k"]).sum(-1, keepdim=True) * given["v"])
    grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[3] == 0).all()


@pytest.mark.parametrize("gate", [-10.0, -100.0, -1e4, -1e30, -math.inf], ids=str)
def test_small_gates(gate):
    """Some tokens forget nearly all, and tokens around them keep nearly all: no quotient of decays may be formed."""
    given = make("three-chunks", factor=1 / 16)
    g = torch.Generator().manual_seed(1)
    for name in ("log_gates", "reverse_log_gates"):
        small = torch.rand(given[name].shape, generator=g) < 0.2
        given[name] = torch.where(small, gate, given[name])
    want = pairs(**given)
    torch.testing.assert_close(gated_linear_attention(**given), want)
    single = {name: x.float().requires_grad_() for name, x in given.items()}
    out = gated_linear_attention(**single)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    given = {name: x.requires_grad_() for name, x in given.items()}
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    found = torch.autograd.grad((out * weights).sum(), list(single.values()))
    with implementation("reference"):
        exact = torch.autograd.grad((gated_linear_attention(**given) * weights).sum(), list(given.values()))
    for got, grad in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["one-token", "forward", "both"])
def test_gradients(case):
    given = make(case, batch=1, num_heads=1, key_dim=2, value_dim=2)
    inputs = tuple(x.requires_grad_() for x in given.values())
    assert torch.autograd.gradcheck(
        lambda *x: gated_linear_attention(**dict(zip(given, x, strict=True))), inputs, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    given = {name: x.to(dtype) for name, x in make("one-more-than-a-chunk").items()}
    out = gated_linear_attention(**given)
    want = gated_linear_attention(**{name: x.double() for name, x in given.items()})
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_states_may_exceed_float16():
    ones = torch.ones(1, 40, 1, 2)
    given = {"q": ones / 256, "k": 256 * ones, "v": 256 * ones, "log_gates": 0 * ones}
    out = gated_linear_attention(**{name: x.half() for name, x in given.items()}, scale=0.5)
    torch.testing.assert_close(out, (256 * torch.arange(1.0, 41)).half()[None, :, None, None].expand(-1, -1, 1, 2))


def test_float32_gates_with_half_precision():
    """Gates near 1 need more digits than half precision has."""
    given = make("one-more-than-a-chunk", factor=1e-3)
    mixed = {name: x.float() if "gates" in name else x.bfloat16() for name, x in given.items()}
    out = gated_linear_attention(**mixed)
    assert out.dtype == torch.bfloat16
    want = gated_linear_attention(**{name: x.float() for name, x in mixed.items()})
    torch.testing.assert_close(out, want.bfloat16())


X = torch.zeros(1, 6, 2, 4)


def call(**change):
    """A valid call, with some arguments changed."""
    return gated_linear_attention(**{"q": X, "k": X, "v": X, "log_gates": X, "reverse_log_gates": X} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"q": X[0]}, ValueError, r"q of shape \(6, 2, 4\)"),
    ({"q": X[:, :0]}, ValueError, "q with 0 tokens; it has to have 1 or more"),
    ({"q": X[:, :, :0]}, ValueError, "q with 0 heads"),
    ({"q": X[..., :0]}, ValueError, "q with 0 channels of a head"),
    ({"k": X[:, :2]}, ValueError, r"k of shape \(1, 2, 2, 4\); expected the shape of q"),
    ({"v": X[:, :, :1]}, ValueError, r"v of shape \(1, 6, 1, 4\); expected \(B, T, N, d_v\) = \(1, 6, 2, any\)"),
    ({"v": X[..., :0]}, ValueError, "v with 0 channels of a head"),
    ({"log_gates": X[..., :1]}, ValueError, r"log_gates of shape \(1, 6, 2, 1\); expected the shape of q"),
    ({"reverse_log_gates": X[:, :1]}, ValueError, r"reverse_log_gates of shape \(1, 1, 2, 4\); expected the shape"),
    ({"q": X.long()}, TypeError, "q of torch.int64"),
    ({"k": X.half()}, TypeError, "k of torch.float16 with q of torch.float32"),
    ({"log_gates": X.double()}, TypeError, "log_gates of torch.float64 with q of torch.float32"),
    ({"log_gates": None}, TypeError, "log_gates of type NoneType"),
    ({"reverse_log_gates": 0.0}, TypeError, "reverse_log_gates of type float"),
    ({"v": X.to("meta")}, ValueError, "v on meta with q on cpu"),
    ({"scale": math.inf}, ValueError, "scale=inf; it has to be finite"),
    ({"scale": "1"}, TypeError, "scale='1'; give a number"),
]


def random_call(rng):
    batch, tokens, heads = rng.choice((0, 1, 2)), rng.choice((1, 2, 5, 16, 17, 33, 50, 0)), rng.choice((1, 2, 3))
    tensors = {name: random_calls.tensor(rng, batch, tokens, heads, 4) for name in ("q", "k", "v")}
    gates = {name: random_calls.tensor(rng, batch, tokens, heads, 4) for name in ("log_gates", "reverse_log_gates")}
    gates = {name: x if x is None else -rng.choice((0, 0.1, 1, 30)) * x.abs() for name, x in gates.items()}
    if rng.random() < 0.3:
        del gates["reverse_log_gates"]
    return gated_linear_attention, tensors | gates | {"scale": rng.choice(random_calls.SCALES)}
