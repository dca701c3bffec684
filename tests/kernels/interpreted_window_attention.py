"""The Triton window attention under Triton's interpreter, against float64. Run by test_triton.py."""

from dataclasses import replace

import pytest
import torch

from zoo.kernels import implementation, triton_common, window_attention
from zoo.kernels.window_attention import op, triton_impl
from zoo.kernels.window_attention.cases import Case, inputs

from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# batch and shapes; windows of up to 64 tokens take one tile, those of up to 32 share one
CASES = {
    "1x1": (2, Case((3, 5), 2, (1, 1), 16)),
    "2x2-mask": (1, Case((6, 14), 2, (2, 2), 32, key_mask=True)),
    "3x3-shared": (2, Case((6, 9), 2, (3, 3), 8, shared_query=True)),
    "4x4-grid-mask": (1, Case((8, 12), 1, (4, 4), 24, layout="grid", key_mask=True)),
    "4x4-wide_head": (1, Case((4, 12), 1, (4, 4), 128)),
    "12-rows": (1, Case((7, 12), 1, (1, 12), 48, bias_sign="key_minus_query")),
    "11x3-no_bias": (1, Case((11, 6), 2, (11, 3), 40, bias=False)),
    "7x7": (2, Case((14, 7), 2, (7, 7), 32)),
    "7x7-grid-mask": (1, Case((14, 21), 1, (7, 7), 32, "grid", bias_sign="key_minus_query", key_mask=True)),
    "7x7-shared": (2, Case((14, 7), 1, (7, 7), 48, shared_query=True)),
    "56-columns-no_bias": (1, Case((14, 4), 1, (14, 4), 1, bias=False, key_mask=True)),
    "9x7": (1, Case((9, 14), 1, (9, 7), 64)),
    "8x8-shared-mask": (1, Case((8, 16), 2, (8, 8), 16, shared_query=True, key_mask=True)),
    "5x13": (1, Case((10, 13), 1, (5, 13), 24, bias_sign="key_minus_query", key_mask=True)),
    "14x7-no_bias": (1, Case((14, 7), 2, (14, 7), 32, bias=False)),
    "13x5-shared-grid": (2, Case((13, 10), 1, (13, 5), 16, "grid", shared_query=True, key_mask=True)),
    "12x12": (1, Case((12, 12), 2, (12, 12), 8)),
    "14x14": (1, Case((14, 14), 1, (14, 14), 32, bias_sign="key_minus_query")),
    # the last block is a quarter, half, almost all of a block, and a block
    "11x13-grid": (1, Case((22, 13), 1, (11, 13), 16, "grid", bias_sign="key_minus_query")),
    "8x11-mask": (2, Case((8, 11), 1, (8, 11), 16, key_mask=True)),
    "14x9-shared": (2, Case((14, 9), 1, (14, 9), 16, shared_query=True)),
    "16x8": (1, Case((16, 8), 2, (16, 8), 16)),
    "2x3-regions": (2, Case((6, 9), 2, (2, 3), 16, regions=True)),
    "7x7-regions": (2, Case((14, 21), 2, (7, 7), 32, regions=True)),
    "7x7-regions-grid-mask": (1, Case((14, 7), 1, (7, 7), 16, "grid", bias=False, key_mask=True, regions=True)),
    "3x3-regions-shared": (2, Case((6, 6), 1, (3, 3), 16, shared_query=True, regions=True)),
    "5x13-regions": (2, Case((10, 13), 1, (5, 13), 16, regions=True)),
    "8x11-regions-mask": (1, Case((8, 22), 1, (8, 11), 16, key_mask=True, regions=True)),
    "14x9-regions-shared": (1, Case((14, 9), 1, (14, 9), 16, shared_query=True, regions=True)),
    "1x5-decay": (2, Case((3, 10), 2, (1, 5), 16, bias=False, line_decay=True)),
    "40x1-decay-mask": (1, Case((40, 2), 1, (40, 1), 16, key_mask=True, line_decay=True)),
    "3x1-decay-shared-grid": (2, Case((6, 5), 2, (3, 1), 8, "grid", shared_query=True, line_decay=True)),
    "1x70-decay": (1, Case((2, 70), 2, (1, 70), 16, bias=False, line_decay=True)),
    "130x1-decay-mask": (1, Case((130, 2), 1, (130, 1), 16, key_mask=True, line_decay=True)),
    "70x1-decay-shared": (1, Case((70, 2), 1, (70, 1), 16, shared_query=True, line_decay=True)),
    "6x11-wide_head": (1, Case((6, 11), 1, (6, 11), 128, key_mask=True)),
}


def make(case, batch, dtype):
    """Arguments that require gradients, with a mask that hides the first window, and the gradient of the output."""
    (qkv,), options = inputs(case, batch=batch, dtype=dtype, device="cpu", requires_grad=True)
    if case.key_mask:
        (height, width), (wh, ww) = case.size, case.window_size
        mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) < 0.6
        down, right = (height // wh, width // ww) if case.layout == "grid" else (1, 1)
        mask[0, : wh * down : down, : ww * right : right] = False
        options["key_mask"] = mask
    if case.regions:
        labels = torch.randint(-1, 2, (batch, *case.size), generator=torch.Generator().manual_seed(3))
        options["regions"] = labels if case.key_mask else labels[:1]
    if case.line_decay:  # some of the sums are equal
        sums = torch.randn(options["line_decay"].shape, generator=torch.Generator().manual_seed(4))
        options["line_decay"] = (2 * sums).round().requires_grad_()
    grad = torch.randn(*qkv.shape[:3], case.num_heads * case.head_dim, generator=torch.Generator().manual_seed(2))
    return {"qkv": qkv, **options}, grad.to(dtype)


def differentiate(arguments, grad, choice="triton"):
    """The output, and the gradients of the inputs that require them."""
    with implementation(choice):
        out = window_attention(**arguments)
    wanted = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return out, *torch.autograd.grad(out, wanted, grad)


def in_float64(arguments):
    return {
        name: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def assert_right(arguments, grad, dtype):
    want = differentiate(in_float64(arguments), grad.double(), "reference")
    for one, other in zip(differentiate(arguments, grad), want, strict=True):
        assert_within_budget(one, other, dtype)


@pytest.fixture
def few_processors(monkeypatch):
    """Programs take several tiles, as on maps that are large for the GPU."""
    monkeypatch.setattr(triton_common, "_assumed", replace(triton_common.SM_90, num_processors=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_reference(name, dtype):
    batch, case = CASES[name]
    assert_right(*make(case, batch, dtype), dtype)


@pytest.mark.parametrize("name", ["3x3-shared", "5x13"])
def test_bfloat16_agrees_with_reference(name):
    batch, case = CASES[name]
    assert_right(*make(case, batch, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize(
    ("batch", "case"),
    [
        pytest.param(2, Case((14, 14), 2, (7, 7), 16, "grid", key_mask=True), id="7x7"),
        pytest.param(2, Case((12, 24), 2, (2, 3), 16), id="2x3"),
        pytest.param(2, Case((12, 24), 1, (2, 3), 16, shared_query=True), id="2x3-shared"),
        pytest.param(2, Case((14, 14), 1, (7, 7), 16, shared_query=True), id="7x7-shared-parts-of-images"),
        pytest.param(5, Case((7, 7), 1, (7, 7), 16, shared_query=True), id="7x7-shared-several-images"),
        pytest.param(1, Case((15, 13), 1, (5, 13), 16, shared_query=True), id="5x13-shared"),
    ],
)
def test_programs_with_several_tiles(batch, case, few_processors):
    assert_right(*make(case, batch, torch.float32), torch.float32)


def test_table_gradient_in_several_passes(monkeypatch):
    monkeypatch.setattr(triton_impl, "MAX_PARTIAL_BYTES", 4 * 65**2)
    assert_right(*make(Case((5, 13), 2, (5, 13), 16), 1, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window_size", [(7, 7), (6, 12)], ids=str)
def test_float32_table_beside_half(window_size, dtype):
    wh, ww = window_size
    arguments, grad = make(Case(window_size, 2, window_size, 16), 1, dtype)
    arguments["bias_table"] = (4 * torch.randn(2, 2 * wh - 1, 2 * ww - 1)).requires_grad_()
    assert_right(arguments, grad, dtype)
    assert differentiate(arguments, grad)[2].dtype == torch.float32


def test_float32_table_beyond_float16():
    """Half precision reads the bias of large windows in float16, where -1e6 becomes the smallest number."""
    arguments, grad = make(Case((6, 12), 1, (6, 12), 16), 1, torch.bfloat16)
    table = torch.zeros(1, 11, 23)
    table[:, :, :12] = -1e6
    arguments["bias_table"] = table.requires_grad_()
    assert_right(arguments, grad, torch.bfloat16)


@pytest.mark.parametrize("window_size", [(3, 3), (7, 7), (6, 12)], ids=str)
def test_large_biases(window_size):
    """The weights of the unused rows of a tile would be infinite in float16."""
    arguments, grad = make(Case((2 * window_size[0], window_size[1]), 1, window_size, 16), 1, torch.float16)
    arguments["bias_table"] = (50 + arguments["bias_table"].detach()).requires_grad_()
    assert_right(arguments, grad, torch.float16)


@pytest.mark.parametrize("window_size", [(7, 7), (5, 14)], ids=str)
def test_views(window_size):
    """A slice of the output of a Linear is read in place; other views are copied."""
    case = Case((window_size[0], 14), 2, window_size, 16, shared_query=True)
    arguments, grad = make(case, 2, torch.float32)
    whole = torch.randn(2, *case.size, 128)
    table, q = arguments["bias_table"], arguments["q"]
    arguments |= {
        "qkv": whole[..., 64:].requires_grad_(),
        "bias_table": table.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        "q": q.detach()[:1].expand_as(q).requires_grad_(),
        "key_mask": torch.rand(2, 14, case.size[0]).transpose(1, 2) < 0.7,
    }
    assert triton_impl._readable(arguments["qkv"], 16) is arguments["qkv"]
    assert_right(arguments, grad[:, :, :, :1].expand_as(grad), torch.float32)
    arguments["qkv"] = torch.randn(14, 2, case.size[0], 64).permute(1, 2, 0, 3).requires_grad_()
    assert_right(arguments, grad, torch.float32)
    arguments["qkv"] = whole.detach()[..., 1:65].requires_grad_()
    copied = triton_impl._readable(arguments["qkv"], 16)
    assert copied.data_ptr() % 16 == 0
    assert torch.equal(copied, arguments["qkv"])
    assert_right(arguments, grad, torch.float32)


def test_no_gradient_for_the_table():
    arguments, grad = make(Case((7, 7), 1, (7, 7), 16), 1, torch.float32)
    arguments["bias_table"].requires_grad_(False)
    want = differentiate(arguments, grad, "reference")
    torch.testing.assert_close(differentiate(arguments, grad), want)


@pytest.mark.parametrize("window_size", [(4, 4), (9, 8)], ids=str)
def test_masked_window_is_zero(window_size):
    arguments, grad = make(Case(window_size, 1, window_size, 16), 1, torch.float32)
    arguments["key_mask"] = torch.zeros(1, *window_size, dtype=torch.bool)
    for value in differentiate(arguments, grad):
        assert (value == 0).all()


@pytest.mark.parametrize("name", ["7x7-shared", "5x13-regions", "1x70-decay"])
def test_repeats_bit_by_bit(name):
    batch, case = CASES[name]
    arguments, grad = make(case, batch, torch.float32)
    for first, second in zip(differentiate(arguments, grad), differentiate(arguments, grad), strict=True):
        assert torch.equal(first, second)


def test_empty_batch():
    arguments, grad = make(Case((7, 7), 1, (7, 7), 16), 0, torch.float32)
    out, qkv_grad, table_grad = differentiate(arguments, grad)
    assert out.shape[0] == qkv_grad.shape[0] == 0
    assert (table_grad == 0).all()


@pytest.mark.parametrize("name", ["3x3-shared", "2x3-regions", "1x5-decay"])
def test_double_backward(name):
    arguments, grad = make(CASES[name][1], 1, torch.float32)
    found = []
    for choice, inputs_ in (("triton", arguments), ("reference", in_float64(arguments))):
        with implementation(choice):
            out = window_attention(**inputs_)
        wanted = [x for x in inputs_.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        first = torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), wanted))
    for one, other in zip(*found, strict=True):
        assert_within_budget(one, other, torch.float32)


def test_no_gradient_for_the_sums():
    arguments, grad = make(CASES["1x70-decay"][1], 1, torch.float32)
    want = differentiate(arguments, grad)[:-1]
    arguments["line_decay"].requires_grad_(False)
    for one, other in zip(differentiate(arguments, grad), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(2, 9), (2, 66)], ids=str)
def test_sums_of_half_precision_and_views(size):
    arguments, grad = make(Case(size, 2, (1, size[1]), 16, bias=False, line_decay=True), 1, torch.float16)
    sums = arguments["line_decay"].detach().half().transpose(1, 3).contiguous().transpose(1, 3)
    arguments["line_decay"] = sums.requires_grad_()
    assert_right(arguments, grad, torch.float16)
    assert differentiate(arguments, grad)[-1].dtype == torch.float16


def test_labels_of_other_types():
    arguments, grad = make(CASES["7x7-regions"][1], 2, torch.float32)
    want = differentiate(arguments, grad)
    arguments["regions"] = (arguments["regions"] + 1).to(torch.uint8).expand(2, -1, -1).mT.contiguous().mT
    for one, other in zip(differentiate(arguments, grad), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_opcheck(shared, fake_tensors_launch_nothing):
    case = Case((4, 6), 2, (4, 1), 8, shared_query=shared, key_mask=True, regions=True, line_decay=True)
    arguments, grad = make(case, 1, torch.float32)
    names = "qkv", "q", "bias_table", "key_mask", "regions", "line_decay"
    given = tuple(arguments[name] for name in names)
    options = (2, 4, 1, False, True, 0.4)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.forward, (*given, *options), test_utils=tests)
    with torch.no_grad():
        out, lse = op.forward(*given, *options)
    given = tuple(x if x is None else x.detach() for x in given)
    torch.library.opcheck(op.backward, (grad, *given, out, lse, *options, True, True), test_utils=tests)
