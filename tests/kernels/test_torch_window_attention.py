"""Window attention's torch_impl against its reference. Some seconds."""

import pytest
import torch

from zoo.kernels import dispatch, implementation, window_attention
from zoo.kernels.window_attention import torch_impl

from .comparison import BUDGET, assert_agree, assert_precise, assert_within_budget, run
from .test_window_attention import CASES, LINES, labels_of, make, sums_of

pytestmark = pytest.mark.slow

# options added to every case
FLAGS = {
    "plain": {},
    "bias": {"bias": True},
    "grid": {"bias": True, "layout": "grid", "bias_sign": "key_minus_query"},
    "mask": {"bias": True, "mask": True},
    "only-mask": {"mask": True, "layout": "grid"},
    "shared": {"bias": True, "shared": True},
    "shared-mask": {"mask": True, "shared": True},
    "regions": {"bias": True, "regions": "one"},
    "regions-grid": {"regions": "each", "layout": "grid"},
    "regions-mask": {"bias": True, "mask": True, "regions": "one"},
    "regions-shared-mask": {"mask": True, "shared": True, "regions": "each"},
}
DECAYED = {
    "decay": {"decay": True},
    "decay-mask": {"bias": True, "mask": True, "decay": True},
    "decay-shared-grid": {"bias": True, "shared": True, "layout": "grid", "decay": True},
    "decay-regions": {"regions": "each", "decay": True},
}
CALLS = [*((case, flags) for case in CASES for flags in FLAGS), *((case, flags) for case in LINES for flags in DECAYED)]


def call(case, flags):
    """The differentiable tensors of a call, and a function of them."""
    flags = dict((FLAGS | DECAYED)[flags])
    qkv, table, mask, shared, options = make(case, parts=2 if flags.get("shared") else 3)
    mask[:, 0] = False  # if windows have one row, whole windows without a key
    given = {"qkv": qkv}
    if flags.pop("bias", False):
        given["bias_table"] = table
    if flags.pop("shared", False):
        given["q"] = shared
    if flags.pop("decay", False):
        given["line_decay"] = sums_of(case)
    options |= {"key_mask": mask} if flags.pop("mask", False) else {}
    options |= {"regions": labels_of(case, flags.pop("regions"))} if "regions" in flags else {}
    return given, lambda **tensors: window_attention(**tensors, **options, **flags)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("case", "flags"), CALLS)
def test_forward(case, flags, fused, monkeypatch):
    monkeypatch.setattr(dispatch, "fused_allowed", lambda: fused)
    given, function = call(case, flags)
    assert_agree(function, given)


@pytest.mark.parametrize("limit", [1, 2000])
@pytest.mark.parametrize("flags", ["bias", "grid", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_large_windows(case, flags, limit, monkeypatch):
    """Their bias would take too much memory, so few rows of queries are taken at a time; here, of all windows."""
    monkeypatch.setattr(torch_impl, "MAX_BIAS", limit)
    given, function = call(case, flags)
    assert_agree(function, given)


@pytest.mark.parametrize(("case", "flags"), CALLS)
def test_gradients(case, flags):
    given, function = call(case, flags)
    given = {name: x.requires_grad_() for name, x in given.items()}
    assert_agree(function, given)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("flags", ["bias", "mask", "shared", "regions-mask", "decay"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_precision(dtype, flags, differentiated):
    given, function = call("rows" if flags == "decay" else "square", flags)
    assert_precise(function, given, dtype, differentiated)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_logits_keep_their_precision(dtype, differentiated):
    given, function = call("square", "plain")
    assert_precise(function, {"qkv": 4 * given["qkv"]}, dtype, differentiated)


def test_table_of_float32_beside_half_precision():
    given, function = call("square", "bias")
    given = {"qkv": given["qkv"].bfloat16(), "bias_table": 3 * given["bias_table"].float()}
    (got,) = run("torch", function, given)
    (want,) = run("reference", function, {name: x.double() for name, x in given.items()})
    assert_within_budget(got, want, torch.bfloat16)


def test_query_without_keys_gives_zeros_and_finite_gradients():
    qkv, table, mask, _, options = make("square")
    qkv.requires_grad_(), table.requires_grad_()
    with implementation("torch"):
        out = window_attention(qkv, bias_table=table, key_mask=torch.zeros_like(mask), **options)
    assert not out.any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (qkv, table)))


def test_inputs_stay_as_they_are():
    given, function = call("square", "mask")
    before = {name: x.clone() for name, x in given.items()}
    run("torch", function, given)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_strided_input():
    given, function = call("rectangle", "bias")
    view = given["qkv"].movedim(-1, 1).contiguous().movedim(1, -1)
    torch.testing.assert_close(run("torch", function, given | {"qkv": view}), run("torch", function, given))


@pytest.mark.parametrize(
    ("case", "flags"), [("columns", "mask"), ("columns", "regions-mask"), ("columns-of-one", "decay-mask")]
)
def test_double_backward(case, flags):
    given, function = call(case, flags)
    if "line_decay" in given:
        given["line_decay"] = torch.randn_like(given["line_decay"])  # not differentiable where sums are equal
    inputs = tuple(x.requires_grad_() for x in given.values())
    with implementation("torch"):
        assert torch.autograd.gradgradcheck(lambda *x: function(**dict(zip(given, x, strict=True))), inputs)


def test_functional_transforms():
    given, function = call("square", "bias")

    def loss(qkv):
        return function(qkv=qkv, bias_table=given["bias_table"]).square().sum()

    direction = torch.ones_like(given["qkv"])
    with implementation("reference"):
        want = torch.func.grad(loss)(given["qkv"])
    with implementation("torch"):
        torch.testing.assert_close(torch.func.grad(loss)(given["qkv"]), want)
        slope = torch.func.jvp(loss, (given["qkv"],), (direction,))[1]
    torch.testing.assert_close(slope, (want * direction).sum())


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(("case", "flags"), [("square", "mask"), ("square", "regions-mask"), ("rows", "decay-mask")])
def test_compiles_as_one_graph(case, flags, differentiated):
    given, function = call(case, flags)
    given = {name: x.requires_grad_(differentiated) for name, x in given.items()}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("torch", compiled, given), run("torch", function, given))


class Module(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(2, 5, 7))
        self.layout = layout

    def forward(self, qkv, mask, regions):
        options = {"num_heads": 2, "window_size": (3, 4), "layout": self.layout, "regions": regions}
        return window_attention(qkv, bias_table=self.table, key_mask=mask, **options)


@pytest.mark.parametrize("regions", ["none", "one", "each"])
@pytest.mark.parametrize("layout", ["block", "grid"])
def test_exports_with_open_sizes(layout, regions):
    module = Module(layout)
    batch, rows, columns = (torch.export.Dim(name, min=2, max=20) for name in ("batch", "rows", "columns"))
    sizes = {0: batch, 1: 3 * rows, 2: 4 * columns}

    def inputs(batch, height, width):
        labels = torch.randint(3, (1 if regions == "one" else batch, height, width))
        mask = torch.rand(batch, height, width) < 0.7
        return torch.randn(batch, height, width, 12), mask, None if regions == "none" else labels

    of_labels = {"none": None, "one": {1: sizes[1], 2: sizes[2]}, "each": sizes}[regions]
    program = torch.export.export(module, inputs(2, 6, 8), dynamic_shapes=(sizes, sizes, of_labels))
    again = inputs(3, 9, 16)
    torch.testing.assert_close(program.module()(*again), module(*again))


def test_exports_decays_of_whole_rows_and_columns():
    class Cross(torch.nn.Module):
        def forward(self, qkv, sums):
            _, height, width, _ = qkv.shape
            row, column = (
                window_attention(qkv, num_heads=2, window_size=size, line_decay=sums)
                for size in ((1, width), (height, 1))
            )
            return row + column

    sizes = {number: torch.export.Dim(name, min=2, max=20) for number, name in enumerate(("batch", "height", "width"))}
    given, again = ((torch.randn(*size, 12), torch.randn(*size, 2)) for size in ((2, 6, 8), (3, 5, 4)))
    program = torch.export.export(Cross(), given, dynamic_shapes=(sizes, sizes))
    torch.testing.assert_close(program.module()(*again), Cross()(*again))
