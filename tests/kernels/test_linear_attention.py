"""Linear attention against loops over single tokens, gradcheck, and rejected arguments. Some seconds."""

import cmath
import math

import pytest
import torch

from zoo.kernels import linear_attention, rotate_2d

from . import oracle, random_calls
from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("each_implementation")

# map, options
CASES = {
    "plain": ((3, 5), {}),
    "one-token": ((1, 1), {"rope": (0.7,)}),
    "one-row": ((1, 6), {"rope": (0.7,), "key_weights": "softmax"}),
    "softmax": ((4, 3), {"key_weights": "softmax"}),
    "softmax-rope": ((4, 3), {"key_weights": "softmax", "rope": (0.7,), "scale": 1.3}),
    "offset": ((4, 3), {"normalization": "offset", "eps": 0.1}),
    "offset-rope": ((2, 5), {"normalization": "offset", "rope": (0.7,), "scale": 0.3}),
    "offset-softmax": ((2, 5), {"normalization": "offset", "key_weights": "softmax", "rope": (2.0,)}),
    "bounded": ((3, 4), {"feature_map": "relu", "eps": 0.0, "denominator_min": 14.0, "temperature": True}),
    "bounded-offset": ((3, 4), {"normalization": "offset", "denominator_min": 30.0, "temperature": True}),
}
DEFAULTS = {
    "feature_map": "elu_plus_one", "key_weights": "uniform", "normalization": "ratio", "rope": None, "scale": None,
    "eps": 1e-6, "denominator_min": 0.0, "temperature": None,
}  # fmt: skip


def make(case, batch=2, num_heads=2, head_dim=4):
    """The tensors of a call by name, and its other options."""
    size, options = CASES[case]
    g = torch.Generator().manual_seed(0)
    shape = (batch, *size, num_heads * head_dim)
    given = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name in "qkv"}
    options = options | {"num_heads": num_heads}
    if options.pop("temperature", False):
        given["temperature"] = torch.rand(num_heads, generator=g, dtype=torch.float64)
    return given, options


def turn(x, place, rope):
    """The vector x (D,) of the token at `place`, rotated."""
    if rope is None:
        return x
    angles = [coordinate * frequency for coordinate in place for frequency in rope]
    pairs = torch.view_as_complex(x.unflatten(0, (-1, 2)))
    turned = [complex(pair) * cmath.exp(1j * angle) for pair, angle in zip(pairs, angles, strict=True)]
    return torch.view_as_real(torch.tensor(turned, dtype=torch.complex128)).flatten()


def feature(x, kind):
    return torch.where(x > 0, x, 0) if kind == "relu" else torch.where(x > 0, x + 1, x.exp())


def loops(given, options):
    given, options = dict(given), DEFAULTS | options
    temperature = given.pop("temperature", None)
    num_heads = options["num_heads"]
    query, key, value = (oracle.heads(given[name], num_heads, 1)[0] for name in "qkv")
    query, key = feature(query, options["feature_map"]), feature(key, options["feature_map"])
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for n in range(num_heads):
            out[b, :, :, n] = one_head(query[b, :, :, n], key[b, :, :, n], value[b, :, :, n], options)
    return (out if temperature is None else out * temperature[:, None]).flatten(-2)


def one_head(query, key, value, options):
    height, width, head_dim = query.shape
    rope, eps, tokens = options["rope"], options["eps"], height * width
    scale = head_dim**-0.5 if options["scale"] is None else options["scale"]
    places = [(y, x) for y in range(height) for x in range(width)]
    weights = [1.0] * tokens
    if options["key_weights"] == "softmax":
        mean_query = sum(query[i] for i in places) / tokens
        exponentials = [math.exp(scale * float(mean_query @ key[j])) for j in places]
        weights = [tokens * e / sum(exponentials) for e in exponentials]
    out = torch.zeros_like(query)
    for i in places:
        z, y, mean_value = 0.0, torch.zeros_like(query[0, 0]), torch.zeros_like(query[0, 0])
        for j, w in zip(places, weights, strict=True):
            z += w * float(query[i] @ key[j]) / tokens
            y += w * float(turn(query[i], i, rope) @ turn(key[j], j, rope)) * value[j] / tokens
            mean_value += w * value[j] / tokens
        if options["normalization"] == "offset":
            denominator = max(scale * z + eps, options["denominator_min"] / tokens)
            out[i] = scale * ((1 + 1 / denominator) * y - z * mean_value)
        else:
            out[i] = y / max(z + eps, options["denominator_min"] / tokens)
    return out


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case):
    given, options = make(case)
    torch.testing.assert_close(linear_attention(**given, **options), loops(given, options))


def test_the_bounds_of_the_cases_act_on_some_tokens():
    for case in ("bounded", "bounded-offset"):
        given, options = make(case)
        free = linear_attention(**given, **options | {"denominator_min": 0.0})
        same = torch.isclose(linear_attention(**given, **options), free).unflatten(-1, (2, -1)).all(-1)
        assert 0 < same.sum() < same.numel()


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    given, options = make(case, batch=1, num_heads=1)
    inputs = tuple(x.requires_grad_() for x in given.values())
    assert torch.autograd.gradcheck(
        lambda *x: linear_attention(**dict(zip(given, x, strict=True)), **options), inputs, fast_mode=True
    )


def test_a_list_of_tokens_is_a_map_of_one_row():
    given, options = make("softmax")
    want = linear_attention(**given, **options).flatten(1, 2)
    given = {name: x.flatten(1, 2)[:, None] for name, x in given.items()}
    torch.testing.assert_close(linear_attention(**given, **options)[:, 0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["softmax-rope", "offset-rope", "bounded"])
def test_low_precision_is_computed_in_float32(case, dtype):
    given, options = make(case)
    given = {name: x.to(dtype) for name, x in given.items()}
    out = linear_attention(**given, **options)
    want = linear_attention(**{name: x.double() for name, x in given.items()}, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"key_weights": "softmax"}, {"normalization": "offset"}], ids=str)
def test_sums_may_exceed_float16(options):
    g = torch.Generator().manual_seed(0)
    q, k, v = (100 * torch.rand(1, 40, 40, 8, generator=g) for _ in range(3))
    assert torch.einsum("bhwc,bhwd->bcd", k, v).min() > torch.finfo(torch.float16).max
    halves = [x.half() for x in (q, k, v)]
    got, want = (
        linear_attention(*tensors, num_heads=1, rope=(0.01, 0.001), **options)
        for tensors in (halves, [x.double() for x in halves])
    )
    assert got.dtype == torch.float16
    assert_within_budget(got, want, torch.float16)


def test_features_of_very_negative_inputs_keep_their_digits():
    given, options = make("plain")
    given = {name: x if name == "v" else x - 20 for name, x in given.items()}
    want = linear_attention(**given, **options, eps=0.0)
    out = linear_attention(**{name: x.float() for name, x in given.items()}, **options, eps=0.0)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_rotate_2d(dtype):
    g = torch.Generator().manual_seed(0)
    rope = (1.0, 0.1)
    x = torch.randn(2, 3, 4, 2 * 8, generator=g, dtype=torch.float64).to(dtype)
    out = rotate_2d(x, rope, num_heads=2).unflatten(-1, (2, -1))
    assert out.dtype == dtype
    heads = x.double().unflatten(-1, (2, -1))
    for b, y, z, n in torch.cartesian_prod(*map(torch.arange, heads.shape[:4])).tolist():
        want = turn(heads[b, y, z, n], (y, z), rope)
        torch.testing.assert_close(out[b, y, z, n], want.to(dtype))


@pytest.mark.parametrize("width", [20, 21])
@pytest.mark.parametrize("start", [2, 3])
def test_rotate_2d_takes_slices(start, width):
    """Whether or not pairs of channels are where complex numbers could be."""
    x = torch.randn(2, 3, 4, width, generator=torch.Generator().manual_seed(0))[..., start : start + 16]
    torch.testing.assert_close(*(rotate_2d(part, (1.0, 0.1), num_heads=2) for part in (x, x.clone())))


def test_angles_far_away_keep_their_digits():
    x = torch.tensor([1.0, 0, 1, 0]).expand(1, 1, 40000, 4)
    out = rotate_2d(x, (1.0,), num_heads=1)[0, 0, -1]
    torch.testing.assert_close(out, torch.tensor([1, 0, math.cos(39999), math.sin(39999)], dtype=torch.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 4, 8)}, ValueError, r"x of shape \(4, 4, 8\)"),
        ({"x": torch.zeros(1, 4, 4, 8, dtype=torch.int64)}, TypeError, "x of torch.int64"),
        ({"x": torch.zeros(1, 0, 4, 8)}, ValueError, "x of 0 x 4 tokens"),
        ({"x": None}, TypeError, "x of type NoneType"),
        ({"num_heads": 3}, ValueError, "8 channels in x for num_heads=3"),
        ({"rope": (1.0, 0.1)}, ValueError, "2 frequencies in rope for heads of 4 channels; give 1"),
    ],
)
def test_rotate_2d_rejects(change, error, message):
    with pytest.raises(error, match=message):
        rotate_2d(**{"x": torch.zeros(1, 4, 4, 8), "rope": (1.0,), "num_heads": 2} | change)


X, T = torch.zeros(1, 4, 4, 8), torch.ones(2)


def call(**change):
    """A valid call, with some arguments changed."""
    return linear_attention(**{"q": X, "k": X, "v": X, "num_heads": 2, "rope": (1.0,), "temperature": T} | change)


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
    ({"feature_map": "elu"}, ValueError, "feature_map='elu'; it has to be 'elu_plus_one' or 'relu'"),
    ({"key_weights": None}, ValueError, "key_weights=None; it has to be 'uniform' or 'softmax'"),
    ({"normalization": "none"}, ValueError, "normalization='none'; it has to be 'ratio' or 'offset'"),
    ({"rope": (1.0, 2.0)}, ValueError, "2 frequencies in rope for heads of 4 channels; give 1"),
    ({"rope": (math.inf,)}, ValueError, r"rope=\(inf,\); all frequencies have to be finite"),
    ({"rope": 1.0}, TypeError, "rope=1.0; give the frequencies as a tuple of numbers"),
    ({"rope": ("1",)}, TypeError, r"rope=\('1',\); give the frequencies"),
    ({"num_heads": 4}, ValueError, "heads of 2 channels with rope; their number has to be a multiple of 4"),
    ({"scale": math.nan}, ValueError, "scale=nan; it has to be finite"),
    ({"scale": "1"}, TypeError, "scale='1'; give a number"),
    ({"eps": -1e-6}, ValueError, "eps=-1e-06; it has to be 0 or more, and finite"),
    ({"eps": None}, TypeError, "eps=None; give a number"),
    ({"denominator_min": math.inf}, ValueError, "denominator_min=inf; it has to be 0 or more, and finite"),
    ({"denominator_min": True}, TypeError, "denominator_min=True; give a number"),
    ({"temperature": T[:1]}, ValueError, r"temperature of shape \(1,\); expected \(N,\) = \(2\)"),
    ({"temperature": T.half()}, TypeError, "temperature of torch.float16 with q of torch.float32"),
    ({"temperature": 1.0}, TypeError, "temperature of type float"),
]


def random_call(rng):
    sizes = random_calls.size(rng)
    tensors = {name: random_calls.tensor(rng, *sizes, 8) for name in "qkv"}
    options = {
        "num_heads": rng.choice(random_calls.HEADS),
        "feature_map": rng.choice(("relu", "elu_plus_one", "elu_plus_one")),
        "key_weights": rng.choice(("uniform", "softmax")),
        "normalization": rng.choice(("ratio", "offset")),
        "rope": rng.choice((None, None, (0.5,), (0.5, 2), [1.0], (math.nan,), "r")),
        "scale": rng.choice(random_calls.SCALES),
        "eps": rng.choice((1e-6, 1e-6, 0.5, -1, None)),
        "denominator_min": rng.choice((0.0, 0, 20, -1.0, "1")),
        "temperature": rng.choice((None, random_calls.tensor(rng, 2))),
    }
    return linear_attention, tensors | options
