"""Triton's neighborhood attention, interpreted, against float64 of the reference; run by test_triton.py."""

from dataclasses import replace

import pytest
import torch

from zoo.kernels import dispatch, triton_common
from zoo.kernels.neighborhood_attention import neighborhood_attention, op, reference
from zoo.kernels.windows import neighborhood_layout

from .comparison import assert_within_budget

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# map, kernel, dilation, stride, causal, images, heads, head dim, bias; with a mask where the name says so
ONE, NO = (1, 1), (False, False)
CASES = {
    "7x7-kernel3": ((7, 7), (3, 3), ONE, ONE, NO, 1, 2, 16, True),
    "8x8-kernel5-stride2": ((8, 8), (5, 5), ONE, (2, 2), NO, 1, 1, 24, True),
    "9x9-kernel7": ((9, 9), (7, 7), ONE, ONE, NO, 1, 1, 32, True),
    "15x17-kernel5x3-dilated": ((15, 17), (5, 3), (2, 3), ONE, NO, 1, 1, 8, True),
    "9x14-kernel6x4-blocks": ((9, 14), (6, 4), ONE, (6, 4), NO, 1, 1, 16, True),
    "23x19-kernel9": ((23, 19), (9, 9), ONE, ONE, NO, 1, 1, 16, False),
    "13x12-kernel11": ((13, 12), (11, 11), ONE, ONE, NO, 1, 1, 64, False),
    "5x19-kernel2x15": ((5, 19), (2, 15), ONE, (1, 2), NO, 1, 1, 16, True),
    "13x21-kernel11": ((13, 21), (11, 11), ONE, ONE, NO, 1, 1, 16, True),
    "17x25-kernel7": ((17, 25), (7, 7), ONE, ONE, NO, 1, 1, 16, True),
    "17x14-kernel13-stride4x5": ((17, 14), (13, 13), ONE, (4, 5), NO, 1, 1, 16, True),
    "22x25-kernel21x3-stride2": ((22, 25), (21, 3), ONE, (2, 1), NO, 1, 1, 16, True),
    "22x12-kernel21x11": ((22, 12), (21, 11), ONE, ONE, NO, 1, 1, 16, False),
    "causal-unbiased": ((12, 11), (5, 5), (1, 2), (2, 1), (True, True), 1, 1, 16, False),
    "causal-rows-stride3": ((10, 9), (4, 3), ONE, (3, 1), (True, False), 1, 2, 16, True),
    "causal-dilated-stride2": ((9, 17), (3, 5), (2, 1), (1, 2), (True, True), 1, 1, 40, False),
    "9x9-kernel7-masked": ((9, 9), (7, 7), ONE, ONE, NO, 2, 2, 16, True),
    "6x7-kernel5x3-11-images": ((6, 7), (5, 3), ONE, ONE, NO, 11, 2, 16, True),
    "6x7-kernel3-dilated-9-images-masked": ((6, 7), (3, 3), (1, 2), ONE, NO, 9, 1, 16, True),
    "15x17-kernel5x3-dilated-masked": ((15, 17), (5, 3), (2, 3), ONE, NO, 1, 1, 8, True),
    "8x8-kernel5-stride2-masked": ((8, 8), (5, 5), ONE, (2, 2), NO, 1, 1, 24, False),
    "causal-dilated-stride2-masked": ((9, 17), (3, 5), (2, 1), (1, 2), (True, True), 1, 1, 40, True),
    "1-wide": ((20, 1), (9, 1), ONE, ONE, NO, 1, 1, 128, True),
    "1-high": ((1, 9), (1, 3), (1, 2), ONE, NO, 2, 1, 16, True),
    "kernel1": ((3, 5), ONE, ONE, ONE, NO, 1, 1, 16, False),
}


@pytest.fixture(autouse=True)
def _few_processors(monkeypatch):
    """A program takes several images and tiles, as on a GPU with larger maps."""
    monkeypatch.setattr(triton_common, "_assumed", replace(triton_common.SM_90, num_processors=1))


def make(case, dtype, table_dtype=None):
    (height, width), kernel, dilation, stride, causal, batch, heads, head_dim, bias = CASES[case]
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * heads * head_dim, generator=g).to(dtype).requires_grad_()
    table = None
    if bias:
        table = torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, generator=g).to(table_dtype or dtype)
        table.requires_grad_()
    grad = torch.randn(batch, height, width, heads * head_dim, generator=g).to(dtype)
    mask = None
    if case.endswith("masked"):
        mask = torch.rand(batch, height, width, generator=g) < 0.6
        mask[:, : height // 2 + 1, : width // 2 + 1] = False  # hides all neighbours of the first queries
    return qkv, table, mask, grad, (heads, kernel, dilation, stride, causal, head_dim**-0.5)


def gradients(out, qkv, table, grad):
    return torch.autograd.grad(out, [x for x in (qkv, table) if x is not None], grad)


def wanted(qkv, table, mask, grad, options):
    qkv, table = (None if x is None else x.detach().double().requires_grad_() for x in (qkv, table))
    names = ("num_heads", "kernel_size", "dilation", "stride", "is_causal", "scale")
    options = dict(zip(names, options, strict=True))
    out = reference.neighborhood_attention(qkv, bias_table=table, key_mask=mask, **options)
    return out, *gradients(out, qkv, table, grad.double())


def check(case, dtype, table_dtype=None):
    qkv, table, mask, grad, options = make(case, dtype, table_dtype)
    out = op.forward(qkv, table, mask, *options)[0]
    found = out, *gradients(out, qkv, table, grad)
    for got, want in zip(found, wanted(qkv, table, mask, grad, options), strict=True):
        assert_within_budget(got, want, dtype)


HALF = ("8x8-kernel5-stride2", "15x17-kernel5x3-dilated-masked", "causal-dilated-stride2", "1-wide")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.float16) for case in HALF)],
    ids=str,
)
def test_agrees_with_reference(case, dtype):
    check(case, dtype)


def test_bfloat16():
    check("8x8-kernel5-stride2", torch.bfloat16)


def test_float32_bias_beside_half_precision():
    check("8x8-kernel5-stride2", torch.float16, torch.float32)


def test_programs_that_start_within_a_tile_sum_the_gradient_of_the_bias(monkeypatch):
    monkeypatch.setattr(triton_common, "_assumed", replace(triton_common.SM_90, num_processors=4))
    check("6x7-kernel3-dilated-9-images-masked", torch.float32)


def test_unaligned_input_and_gradient():
    qkv, table, mask, grad, options = make("1-high", torch.float16)

    def unaligned(x):
        return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view_as(x)

    moved = unaligned(qkv).requires_grad_()
    found = gradients(op.forward(moved, table, mask, *options)[0], moved, table, unaligned(grad))
    for got, want in zip(found, wanted(qkv, table, mask, grad, options)[1:], strict=True):
        assert_within_budget(got, want, torch.float16)


def test_strided_input_and_gradient():
    qkv, table, mask, grad, options = make("7x7-kernel3", torch.float32)
    view = qkv.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_()
    grad = grad[..., :1].expand_as(grad)
    out = op.forward(view, table, mask, *options)[0]
    found = out, *gradients(out, view, table, grad)
    for got, want in zip(found, wanted(qkv, table, mask, grad, options), strict=True):
        assert_within_budget(got, want, torch.float32)


def test_gradients_repeat_bit_for_bit():
    qkv, table, mask, grad, options = make("1-high", torch.float16)
    first, second = (gradients(op.forward(qkv, table, mask, *options)[0], qkv, table, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted_input", [0, 1], ids=["qkv", "bias"])
def test_gradient_of_one_input(wanted_input):
    qkv, table, mask, grad, options = make("1-high", torch.float32)
    inputs = [x.detach() for x in (qkv, table)]
    inputs[wanted_input].requires_grad_()
    (got,) = torch.autograd.grad(op.forward(*inputs, mask, *options)[0], inputs[wanted_input], grad)
    assert_within_budget(got, wanted(qkv, table, mask, grad, options)[1 + wanted_input], torch.float32)


def test_double_backward():
    qkv, table, mask, grad, options = make("1-high", torch.float32)

    def second(qkv, table, out):
        first = torch.autograd.grad(out, (qkv, table), grad.to(out.dtype), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (qkv, table))

    found = second(qkv, table, op.forward(qkv, table, mask, *options)[0])
    exact = [x.detach().double().requires_grad_() for x in (qkv, table)]
    heads, kernel, dilation, stride, *_ = options
    with dispatch.implementation("reference"):
        out = neighborhood_attention(
            exact[0], num_heads=heads, kernel_size=kernel, dilation=dilation, stride=stride, bias_table=exact[1]
        )
    for got, want in zip(found, second(*exact, out), strict=True):
        assert_within_budget(got, want, torch.float32)


def test_the_public_function_launches_it(monkeypatch):
    names = []
    monkeypatch.setattr(triton_common, "launch", lambda kernel, grid, **_: names.append(kernel.fn.__name__))
    qkv, table, _, _, (heads, kernel, *_) = make("7x7-kernel3", torch.float32)
    with dispatch.implementation("triton"):
        neighborhood_attention(qkv, num_heads=heads, kernel_size=kernel, bias_table=table)
    assert names == ["_table_kernel", "_fwd_kernel"]


# map, kernel, dilation, stride
WINDOWS = {
    "one-window": ((4, 3), (4, 3), ONE, ONE),
    "grid": ((4, 6), (2, 3), (2, 2), (1, 2)),
    "blocks": ((4, 6), (2, 3), ONE, (2, 3)),
    "stripes": ((4, 6), (4, 3), ONE, (1, 3)),
}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_left_to_window_attention(case, masked):
    size, kernel, dilation, stride = WINDOWS[case]
    assert neighborhood_layout(size, kernel, dilation, stride, NO) is not None
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, *size, 48, generator=g).requires_grad_()
    table = torch.randn(1, 2 * kernel[0] - 1, 2 * kernel[1] - 1, generator=g).requires_grad_()
    grad, options = torch.randn(1, *size, 16, generator=g), (1, kernel, dilation, stride, NO, 0.25)
    mask = torch.rand(1, *size, generator=g) < 0.6 if masked else None
    given = {"num_heads": 1, "kernel_size": kernel, "dilation": dilation, "stride": stride}
    with dispatch.implementation("triton"):
        out = neighborhood_attention(qkv, bias_table=table, key_mask=mask, **given)
    found = out, *gradients(out, qkv, table, grad)
    for got, want in zip(found, wanted(qkv, table, mask, grad, options), strict=True):
        assert_within_budget(got, want, torch.float32)


NO_WINDOWS = {
    "neighbours": ((4, 6), (3, 3), ONE, ONE, NO),
    "last-block-shifted": ((5, 6), (2, 3), ONE, (2, 3), NO),
    "dilated-blocks": ((8, 6), (2, 3), (2, 1), (2, 3), NO),
    "grid-and-blocks": ((4, 6), (2, 3), (2, 1), (2, 3), NO),
    "causal": ((4, 3), (4, 3), ONE, ONE, (False, True)),
}


@pytest.mark.parametrize("case", NO_WINDOWS)
def test_other_calls_are_not(case):
    assert neighborhood_layout(*NO_WINDOWS[case]) is None


def test_mask_that_images_share():
    qkv, table, mask, grad, options = make("9x9-kernel7-masked", torch.float32)
    shared = mask[:1].expand(len(qkv), -1, -1)
    out = op.forward(qkv, table, shared, *options)[0]
    found = out, *gradients(out, qkv, table, grad)
    for got, want in zip(found, wanted(qkv, table, shared, grad, options), strict=True):
        assert_within_budget(got, want, torch.float32)


def test_masked_map_is_zero():
    qkv, table, mask, grad, options = make("9x9-kernel7-masked", torch.float32)
    out = op.forward(qkv, table, torch.zeros_like(mask), *options)[0]
    for zeros in (out, *gradients(out, qkv, table, grad)):
        assert (zeros == 0).all()


def test_batch_of_no_images():
    qkv, table, _, _, (heads, kernel, *_) = make("7x7-kernel3", torch.float32)
    with dispatch.implementation("triton"):
        out = neighborhood_attention(qkv[:0], num_heads=heads, kernel_size=kernel, bias_table=table)
    assert out.shape == (0, 7, 7, 32)
    assert (torch.autograd.grad(out.sum(), table)[0] == 0).all()


@pytest.mark.parametrize("case", ["1-high", "9x9-kernel7-masked"])
def test_opcheck(case, fake_tensors_launch_nothing):
    qkv, table, mask, grad, options = make(case, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.forward, (qkv, table, mask, *options), test_utils=tests)
    out, lse = (x.detach() for x in op.forward(qkv, table, mask, *options))
    plain = (grad, qkv.detach(), table.detach(), mask, out, lse, *options, True)
    torch.library.opcheck(op.backward, plain, test_utils=tests)
