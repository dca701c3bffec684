"""The selective scan's torch_impl against its reference: by blocks, and in plain operations. Some seconds."""

import pytest
import torch

from zoo.kernels import implementation, selective_scan
from zoo.kernels.selective_scan import blocks, common, torch_impl

from .comparison import BUDGET, assert_agree, assert_precise, assert_within_budget, run
from .test_selective_scan import ALL, CASES, made, make


@pytest.fixture(params=["blocks", "small-blocks", "plain"])
def form(request, monkeypatch):
    """The ways in which torch_impl computes a call; with small blocks, also small maps have several."""
    if request.param == "small-blocks":
        monkeypatch.setattr(blocks, "BLOCK", 128)
    if request.param == "plain":
        monkeypatch.setattr(torch_impl, "_in_blocks", lambda x: False)


def scan(options):
    return lambda **tensors: selective_scan(**tensors, **options)


def call(case, **sizes):
    """The differentiable tensors of a call, and a function of them."""
    given, options = make(case, **sizes)
    return given, scan(options)


def differentiable(given):
    return {name: x.detach().requires_grad_() for name, x in given.items()}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", [case for case in CASES if case != "one-token"])
def test_gradients(case):
    given, function = call(case)
    assert_agree(function, differentiable(given))


# map, channels, numbers, options. A chunk along rows has 16 tokens here.
SIZES = {
    "one-token": ((1, 1), 3, 2, {}),
    "odd-row": ((1, 13), 3, 2, {}),
    "chunk-1": ((1, 15), 3, 2, {}),
    "chunk": ((1, 16), 3, 1, {}),
    "chunk+1": ((1, 17), 3, 1, {}),
    "chunks-1": ((1, 63), 2, 3, {}),
    "chunks+1": ((1, 65), 2, 1, {}),
    "two-levels": ((1, 257), 2, 1, {}),
    "map": ((9, 11), 3, 1, {}),
    "tall-map": ((19, 4), 3, 2, {"own": True}),
    "many-channels": ((5, 7), 300, 16, {}),
}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    tokens, channels, numbers, options = SIZES[size]
    given, options = made(tokens, channels, numbers, directions=ALL, delta_softplus=True, **options)
    with implementation("torch"):
        got = selective_scan(**given, **options)
    with implementation("reference"):
        torch.testing.assert_close(got, selective_scan(**given, **options))


@pytest.mark.parametrize("numbers", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 31), (1, 63), (1, 65), (7, 9)], ids=str)
def test_gradients_of_sizes(size, numbers):
    """Against autograd of the reference in float64."""
    given, options = made(size, 3, numbers, directions=ALL, delta_softplus=True)
    assert_agree(scan(options), differentiable(given))


@pytest.mark.slow
@pytest.mark.parametrize("wide", [blocks.WIDE, 4], ids=["side-by-side", "one-by-one"])
@pytest.mark.parametrize("size", [(64, 64), (1, 4096)], ids=str)
def test_gradients_of_4096_tokens(size, wide, monkeypatch):
    """In float32, against autograd of the reference in float64."""
    monkeypatch.setattr(blocks, "WIDE", wide)
    directions = ("rows", "columns_reversed") if size[0] > 1 else ("rows_reversed",)
    given, options = made(size, 2, 1 if wide > 4 else 2, batch=1, directions=directions, delta_softplus=True)
    assert_precise(scan(options), given, torch.float32, differentiated=True)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_groups_of_images(images, monkeypatch):
    given, options = made((6, 7), 4, 1, batch=5, directions=ALL, delta_softplus=True)
    want = run("torch", scan(options), differentiable(given))
    monkeypatch.setattr(blocks, "BLOCK", images * 6 * 7 * 4)
    assert len(blocks._groups(5, 6 * 7 * 4)) == -(-5 // images)
    torch.testing.assert_close(run("torch", scan(options), differentiable(given)), want)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("case", ["all-directions", "numbers", "own-inputs"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.usefixtures("form")
def test_precision(dtype, case, differentiated):
    given, function = call(case)
    assert_precise(function, given, dtype, differentiated)


@pytest.mark.usefixtures("form")
def test_long_sequences_stay_exact():
    """Slow decays: each state is a sum over hundreds of tokens."""
    given, options = made((1, 1100), 4, 1, batch=1, directions=("rows", "rows_reversed"), delta_softplus=True)
    given |= {"delta_bias": given["delta_bias"] - 5}
    exact = run("torch", scan(options), given)[0]
    with implementation("reference"):
        torch.testing.assert_close(exact, selective_scan(**given, **options))
    single = {name: x.float() for name, x in given.items()}
    assert_within_budget(run("torch", scan(options), single)[0], exact, torch.float32)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("own", [False, True])
def test_slices_of_one_tensor(differentiated, own):
    given, options = made((5, 6), 4, 3, directions=ALL, own=own, delta_softplus=True)
    maps = {name: x for name, x in given.items() if x.ndim > 3}
    joined = torch.cat([x.flatten(3) for x in maps.values()], -1)[:, :4]  # its rows are evenly spaced no longer
    parts = joined.split([x[0, 0, 0].numel() for x in maps.values()], -1)
    views = {
        name: part.view(*part.shape[:3], *x.shape[3:]) for (name, x), part in zip(maps.items(), parts, strict=True)
    }
    given, views = (
        {name: x.detach().requires_grad_(differentiated) for name, x in tensors.items()}
        for tensors in (given | {name: x[:, :4].contiguous() for name, x in maps.items()}, given | views)
    )
    torch.testing.assert_close(run("torch", scan(options), views), run("torch", scan(options), given))


def test_float32_steps_and_parameters_with_half_precision():
    given, function = call("all-directions")
    given = {name: x.bfloat16() if name in "xBC" else x.float() for name, x in given.items()}
    given = differentiable(given)
    out, *grads = run("torch", function, given)
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [x.dtype for x in given.values()]


def test_states_of_all_tokens_are_not_kept():
    given, options = made((32, 32), 4, 16, batch=1, directions=("rows",), delta_softplus=True)
    given = differentiable(given)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        with implementation("torch"):
            selective_scan(**given, **options)
    assert max(sizes) == 32 * 32 * 16  # B and C
    kept = sum(sizes) - sum(x.numel() for x in given.values())
    assert kept == 32 * 32 * 4 * 16 // 32  # of each chunk of 32 tokens


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all-directions", "own-inputs"])
def test_double_backward(case):
    given, function = call(case, batch=1)
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x: function(**dict(zip(given, x, strict=True))), inputs, fast_mode=True
        )


def test_functional_transforms():
    given, function = call("all-directions")

    def loss(delta):
        return function(**given | {"delta": delta}).square().sum()

    direction = torch.ones_like(given["delta"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["delta"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["delta"]), want)
        slope = torch.func.jvp(loss, (given["delta"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.parametrize("case", ["all-directions", "bare"])
def test_operators_are_registered_rightly(case):
    given, options = make(case, batch=1)
    tensors = [given.get(name) for name in ("x", "delta", "A", "B", "C", "D", "delta_bias")]
    settings = options["delta_softplus"], common.numbers(options["directions"])
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(torch_impl._forward, (*leaves, *settings), test_utils=utils)
    out, kept = torch_impl._forward(*tensors, *settings)
    torch.library.opcheck(torch_impl._backward, (out, *tensors, kept, *settings), test_utils=utils)


@pytest.mark.parametrize("case", ["all-directions", "bare"])
def test_results_are_contiguous_whatever_is_given(case):
    """Inductor relies on the strides that the operators announce."""
    given, options = make(case, batch=2)
    tensors = [given.get(name) for name in ("x", "delta", "A", "B", "C", "D", "delta_bias")]
    tensors = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    settings = options["delta_softplus"], common.numbers(options["directions"])
    out, kept = torch_impl._forward(*tensors, *settings)
    grad = out.movedim(-1, 0).contiguous().movedim(0, -1)
    results = out, kept, *torch_impl._backward(grad, *tensors, kept, *settings)
    assert [x.is_contiguous() for x in results] == [True] * 9


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_compiles_as_one_graph(differentiated, dynamic):
    torch._dynamo.reset()
    given, options = made((5, 7), 3, 2, directions=ALL, delta_softplus=True)
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(scan(options), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(run("torch", compiled, given), run("torch", scan(options), given))


class Module(torch.nn.Module):
    def __init__(self, directions, numbers):
        super().__init__()
        count = len(directions)
        self.directions, self.numbers = directions, numbers
        self.A = torch.nn.Parameter(-torch.rand(count, 4, numbers))
        self.project = torch.nn.Linear(4, count * (4 + 2 * numbers))

    def forward(self, x):
        delta, B, C = (
            self.project(x).unflatten(-1, (len(self.directions), -1)).split([4, self.numbers, self.numbers], -1)
        )
        return selective_scan(x, delta, self.A, B, C, delta_softplus=True, directions=self.directions)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [1, 3])
def test_exports_with_open_sizes(numbers):
    module = Module(ALL, numbers).double()  # in float32, sums of 2400 tokens differ more between CPUs than the bounds
    dims = {axis: torch.export.Dim(name, max=99) for axis, name in enumerate(("batch", "rows", "columns"))}
    program = torch.export.export(module, (torch.randn(2, 8, 11, 4).double(),), dynamic_shapes=(dims,)).module()
    for size in ((3, 16, 9), (1, 1, 1), (1, 40, 60)):
        again = torch.randn(*size, 4).double()
        torch.testing.assert_close(program(again), module(again))


@pytest.mark.slow
def test_exports_a_sequence_with_open_length():
    module = Module(("rows", "rows_reversed"), 2).double()
    dims = {2: torch.export.Dim("tokens", min=2, max=9999)}
    program = torch.export.export(module, (torch.randn(1, 1, 50, 4).double(),), dynamic_shapes=(dims,)).module()
    for tokens in (2, 16, 17, 300, 1500):
        again = torch.randn(1, 1, tokens, 4).double()
        torch.testing.assert_close(program(again), module(again))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
def test_traces_for_any_batch():
    module = Module(ALL, 2)
    traced = torch.jit.trace(module, torch.randn(1, 5, 8, 4))
    again = torch.randn(3, 5, 8, 4)
    torch.testing.assert_close(traced(again), module(again))
