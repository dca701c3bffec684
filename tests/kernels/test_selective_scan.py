"""The selective scan against a loop over single numbers, gradcheck, and rejected arguments. Some seconds."""

import math

import pytest
import torch

from zoo.kernels import selective_scan

from . import random_calls
from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("each_implementation")

ALL = ("rows", "columns", "rows_reversed", "columns_reversed")
# map, channels, numbers, options; whether each direction has its own x, and the tensors that are left out
CASES = {
    "plain": ((3, 5), 2, 1, {}),
    "one-token": ((1, 1), 2, 2, {"directions": ALL, "delta_softplus": True}),
    "one-row": ((1, 7), 2, 3, {"directions": ("columns_reversed", "rows"), "delta_softplus": True}),
    "one-column": ((6, 1), 2, 1, {"directions": ("columns", "rows_reversed")}),
    "all-directions": ((3, 4), 2, 1, {"directions": ALL, "delta_softplus": True}),
    "numbers": ((2, 5), 3, 4, {"directions": ("columns", "rows_reversed"), "delta_softplus": True}),
    "own-inputs": ((2, 3), 2, 3, {"directions": ALL, "own": True, "delta_softplus": True}),
    "twice-the-same": ((2, 3), 2, 2, {"directions": ("columns", "columns"), "own": True}),
    "without-bias": ((3, 3), 2, 2, {"directions": ("rows", "columns"), "without": ("delta_bias",)}),
    "without-skip": ((3, 3), 2, 1, {"directions": ("rows", "columns"), "without": ("D",), "delta_softplus": True}),
    "bare": ((4, 3), 2, 2, {"directions": ("rows_reversed",), "own": True, "without": ("D", "delta_bias")}),
}


def make(case, batch=2):
    """The tensors of a call by name, and its other options."""
    size, channels, numbers, options = CASES[case]
    return made(size, channels, numbers, batch=batch, **options)


def made(size, channels, numbers, *, batch=2, directions=("rows",), own=False, without=(), delta_softplus=False):
    g = torch.Generator().manual_seed(0)
    count = len(directions)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    given = {
        "x": normal(batch, *size, count, channels) if own else normal(batch, *size, channels),
        "delta": normal(batch, *size, count, channels),
        "A": -normal(count, channels, numbers).abs(),
        "B": normal(batch, *size, count, numbers),
        "C": normal(batch, *size, count, numbers),
        "D": normal(count, channels),
        "delta_bias": normal(count, channels),
    }
    if not delta_softplus:
        given["delta"], given["delta_bias"] = given["delta"].abs(), given["delta_bias"].abs()
    given = {name: x for name, x in given.items() if name not in without}
    return given, {"directions": directions, "delta_softplus": delta_softplus}


def loops(given, options):
    """The definition, by Python's numbers."""
    x = given["x"]
    b, h, w, *_, c = x.shape
    out = torch.zeros(b, h, w, c, dtype=torch.float64)
    for image in range(b):
        for k, direction in enumerate(options["directions"]):
            for channel in range(c):
                one_channel(out[image, :, :, channel], given, options, image, k, direction, channel)
    return out


def one_channel(out, given, options, image, k, direction, channel):
    height, width = out.shape
    numbers = given["A"].shape[2]
    state = [0.0] * numbers
    for y, x in visits(direction, height, width):
        value = given["x"][(image, y, x, channel) if given["x"].ndim == 4 else (image, y, x, k, channel)].item()
        step = given["delta"][image, y, x, k, channel].item()
        if "delta_bias" in given:
            step += given["delta_bias"][k, channel].item()
        if options["delta_softplus"]:
            step = math.log1p(math.exp(step))
        for n in range(numbers):
            decay = math.exp(step * given["A"][k, channel, n].item())
            assert decay <= 1
            state[n] = decay * state[n] + step * given["B"][image, y, x, k, n].item() * value
            out[y, x] += given["C"][image, y, x, k, n].item() * state[n]
        if "D" in given:
            out[y, x] += given["D"][k, channel].item() * value


def visits(direction, height, width):
    if direction == "rows":
        return [(y, x) for y in range(height) for x in range(width)]
    if direction == "columns":
        return [(y, x) for x in range(width) for y in range(height)]
    if direction == "rows_reversed":
        return [(y, x) for y in reversed(range(height)) for x in reversed(range(width))]
    return [(y, x) for x in reversed(range(width)) for y in reversed(range(height))]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_loops(case):
    given, options = make(case)
    torch.testing.assert_close(selective_scan(**given, **options), loops(given, options))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    given, options = make(case, batch=1)
    inputs = tuple(x.requires_grad_() for x in given.values())
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(**dict(zip(given, x, strict=True)), **options), inputs, fast_mode=True
    )


def test_directions_are_those_of_turned_maps():
    given, _ = make("plain")
    turns = {
        "columns": lambda x: x.transpose(1, 2),
        "rows_reversed": lambda x: x.flip(1, 2),
        "columns_reversed": lambda x: x.flip(1, 2).transpose(1, 2),
    }
    for direction, turn in turns.items():
        turned = {name: turn(x).contiguous() if x.ndim >= 4 else x for name, x in given.items()}
        want = selective_scan(**given, directions=[direction])
        torch.testing.assert_close(turn(want), selective_scan(**turned))


def test_sum_of_decayed_inputs():
    """With decays that are the same everywhere, the output is known."""
    tokens, decay = 200, 0.9
    one = torch.ones(1, 1, tokens, 1, 1, dtype=torch.float64)
    A = torch.full((1, 1, 1), math.log(decay), dtype=torch.float64)
    out = selective_scan(one[..., 0], one, A, one, one)
    want = (1 - decay ** torch.arange(1, tokens + 1, dtype=torch.float64)) / (1 - decay)
    torch.testing.assert_close(out.flatten(), want)


@pytest.mark.parametrize("numbers", [1, 3])
def test_large_steps_forget_everything(numbers):
    """exp(delta A) is 0, and no inverse of it is computed."""
    given, options = made((9, 11), 4, numbers, directions=ALL)
    given = {name: x.float() for name, x in given.items()}
    given["delta"] = 1e4 * (1 + given["delta"])
    given["A"] = given["A"] - 1
    given = {name: x.requires_grad_() for name, x in given.items()}
    out = selective_scan(**given, **options)
    step = given["delta"] + given["delta_bias"]
    product = (given["B"] * given["C"]).sum(-1, keepdim=True)
    assert_within_budget(out, ((step * product + given["D"]) * given["x"][:, :, :, None]).sum(3), torch.float32)
    for grad in torch.autograd.grad(out.sum(), list(given.values())):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["all-directions", "own-inputs"])
def test_low_precision_is_computed_in_float32(case, dtype):
    given, options = make(case)
    given = {name: x.to(dtype) for name, x in given.items()}
    out = selective_scan(**given, **options)
    want = selective_scan(**{name: x.double() for name, x in given.items()}, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=4e-6)


def test_states_may_exceed_float16():
    given, options = made((8, 25), 4, 1, directions=("rows", "columns_reversed"))
    given = {name: (x.abs() if name in "xBC" else x).half() for name, x in given.items()}
    given |= {"x": 2000 * given["x"], "A": 0.01 * given["A"], "C": 1e-3 * given["C"]}
    exact = {name: x.double() for name, x in given.items()}
    largest = selective_scan(**exact | {"C": torch.ones_like(exact["C"])}, **options).max()
    assert largest > torch.finfo(torch.float16).max
    assert_within_budget(selective_scan(**given, **options), selective_scan(**exact, **options), torch.float16)


X = torch.ones(1, 4, 4, 3)
DELTA, STATES, A, D = torch.ones(1, 4, 4, 2, 3), torch.ones(1, 4, 4, 2, 5), -torch.ones(2, 3, 5), torch.ones(2, 3)


def call(**change):
    """A valid call, with some arguments changed."""
    given = {"x": X, "delta": DELTA, "A": A, "B": STATES, "C": STATES, "D": D, "delta_bias": D}
    return selective_scan(**given | {"delta_softplus": True, "directions": ("rows", "columns")} | change)


# changes, error, message; test_unusual_inputs.py runs each with all implementations
BAD = [
    ({"x": X[0]}, ValueError, r"x of shape \(4, 4, 3\); expected \(B, H, W, C\)"),
    ({"x": X[:, :, :, None]}, ValueError, r"x of shape \(1, 4, 4, 1, 3\); expected .* = \(any, any, any, 2, any\)"),
    ({"x": X[:, :0]}, ValueError, "x of 0 x 4 tokens"),
    ({"x": X[..., :0]}, ValueError, "channels=0; it has to be 1 or more"),
    ({"x": X.long()}, TypeError, "x of torch.int64"),
    ({"x": None}, TypeError, "x of type NoneType"),
    ({"x": X.half()}, TypeError, "B of torch.float32 with x of torch.float16"),
    ({"x": X[..., :2]}, ValueError, r"delta of shape \(1, 4, 4, 2, 3\); expected .* = \(1, 4, 4, 2, 2\)"),
    ({"delta": DELTA[:, :, :, 0]}, ValueError, r"delta of shape \(1, 4, 4, 3\); expected \(B, H, W, directions, C\)"),
    ({"delta": DELTA.half()}, TypeError, "delta of torch.float16 with x of torch.float32"),
    ({"delta": DELTA.to("meta")}, ValueError, "delta on meta with x on cpu"),
    ({"A": A[:1]}, ValueError, r"A of shape \(1, 3, 5\); expected \(directions, C, N\) = \(2, 3, any\)"),
    ({"A": A[..., :0]}, ValueError, "d_state=0; it has to be 1 or more"),
    ({"A": 1.0}, TypeError, "A of type float"),
    ({"B": STATES[..., :4]}, ValueError, r"B of shape \(1, 4, 4, 2, 4\); expected .* = \(1, 4, 4, 2, 5\)"),
    ({"C": STATES[:, :2]}, ValueError, r"C of shape \(1, 2, 4, 2, 5\); expected \(B, H, W, directions, N\)"),
    ({"C": STATES.double()}, TypeError, "C of torch.float64 with x of torch.float32"),
    ({"D": D[0]}, ValueError, r"D of shape \(3,\); expected \(directions, C\) = \(2, 3\)"),
    ({"delta_bias": D.mT}, ValueError, r"delta_bias of shape \(3, 2\); expected \(directions, C\) = \(2, 3\)"),
    ({"delta_bias": D.bool()}, TypeError, "delta_bias of torch.bool"),
    ({"delta_softplus": 1}, TypeError, "delta_softplus=1; give True or False"),
    ({"directions": "rows"}, TypeError, "directions='rows'; give a tuple of them"),
    ({"directions": ()}, ValueError, r"directions=\(\); give one or more of rows, columns, rows_reversed, columns_"),
    ({"directions": ("rows", "up")}, ValueError, r"directions=\('rows', 'up'\); give one or more of rows"),
    ({"directions": ("rows", None)}, ValueError, r"directions=\('rows', None\); give one or more of rows"),
    ({"directions": ["rows"]}, ValueError, r"delta of shape \(1, 4, 4, 2, 3\); expected .* = \(1, 4, 4, 1, 3\)"),
]


def random_call(rng):
    sizes = random_calls.size(rng)
    directions = rng.choice((ALL, ["rows"], ("columns", "rows_reversed"), ("rows",), (), "rows", ("left",)))
    count, channels, numbers = len(directions), rng.choice((1, 3, 3, 8)), rng.choice((1, 1, 2, 5, 0))
    own = (count,) if rng.random() < 0.5 else ()
    options = {
        "x": random_calls.tensor(rng, *sizes, *own, channels),
        "delta": random_calls.tensor(rng, *sizes, count, channels),
        "A": random_calls.tensor(rng, count, channels, numbers),
        "B": random_calls.tensor(rng, *sizes, count, numbers),
        "C": random_calls.tensor(rng, *sizes, count, numbers),
        "D": rng.choice((None, random_calls.tensor(rng, count, channels))),
        "delta_bias": rng.choice((None, random_calls.tensor(rng, count, channels))),
        "delta_softplus": rng.choice((True, True, True, None)),
        "directions": directions,
    }
    if isinstance(options["A"], torch.Tensor):
        options["A"] = -options["A"].abs()
    return selective_scan, options
