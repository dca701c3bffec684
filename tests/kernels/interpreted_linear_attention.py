"""Linear attention in Triton, interpreted, against float64. Run by test_triton.py."""

from functools import partial

import pytest
import torch

from zoo.kernels import linear_attention, token_sums
from zoo.kernels.linear_attention import op

from . import comparison
from .comparison import assert_kernels_agree, assert_second_derivatives, assert_within_budget

pytestmark = pytest.mark.usefixtures("unwritten_outputs_are_nan")

# map, heads, head dim
SHAPES = {
    "one-token": ((1, 1), 2, 16),
    "one-less-than-a-tile": ((7, 9), 1, 32),
    "one-more-than-a-tile": ((5, 13), 2, 8),
    "several-parts": ((1, 1100), 1, 16),
    "odd-heads": ((6, 5), 3, 24),
    "wide-heads": ((4, 9), 1, 96),
}
# options of the operator, and whether there is a temperature
FORMS = {
    "ratio": ({"normalization": "ratio"}, False),
    "bounded": ({"feature_map": "relu", "eps": 0.0, "denominator_min": 30.0}, True),
    "softmax-rope": ({"key_weights": "softmax", "rope": True}, True),
    "offset-rope": ({"normalization": "offset", "rope": True}, False),
    "offset-softmax": ({"normalization": "offset", "key_weights": "softmax", "denominator_min": 2.0}, True),
}


def make(shape, form, dtype, batch=2):
    """The tensors of a call by name, the gradient of its output, and its other options."""
    size, num_heads, head_dim = SHAPES[shape]
    options, has_temperature = FORMS[form]
    options = options | {"num_heads": num_heads}
    if options.get("rope"):
        options["rope"] = tuple(10.0 ** (-i / 3) for i in range(head_dim // 4))
    g = torch.Generator().manual_seed(0)
    given = {name: torch.randn(batch, *size, num_heads * head_dim, generator=g).to(dtype) for name in "qkv"}
    grad = torch.randn(batch, *size, num_heads * head_dim, generator=g).to(dtype)
    if has_temperature:
        given["temperature"] = torch.rand(num_heads, generator=g).to(dtype)
    return given, grad, options


gradients = partial(comparison.gradients, linear_attention)


def check(given, grad, options, allowed=1):
    # With a single token, the gradients of q and k are nearly 0.
    floor = 1 / (grad.shape[1] * grad.shape[2])
    assert_kernels_agree(linear_attention, given, grad, options, grad.dtype, floor, allowed)


CASES = [("one-more-than-a-tile", form) for form in FORMS] + [
    ("one-token", "softmax-rope"),
    ("one-token", "offset-rope"),
    ("one-less-than-a-tile", "softmax-rope"),
    ("one-less-than-a-tile", "bounded"),
    ("odd-heads", "softmax-rope"),
    ("odd-heads", "bounded"),
    ("wide-heads", "offset-rope"),
    ("several-parts", "offset-softmax"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "form"), CASES)
def test_agrees_with_the_reference(shape, form, dtype):
    check(*make(shape, form, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    # The form "offset" is a difference: rounded weights of the keys count twice.
    check(*make("one-more-than-a-tile", form, torch.bfloat16), allowed=2 if form == "offset-softmax" else 1)


@pytest.mark.parametrize("form", ["ratio", "softmax-rope"])
def test_sums_may_exceed_float16(form):
    given, grad, options = make("one-more-than-a-tile", form, torch.float16)
    given = {name: 200 * x.abs() if name in "qkv" else x for name, x in given.items()}
    assert (given["k"].float().mT @ given["v"].float()).max() > torch.finfo(torch.float16).max
    out = gradients(given, grad, options, "triton")[0]
    want = gradients({name: x.double() for name, x in given.items()}, grad.double(), options, "reference")[0]
    assert_within_budget(out, want, torch.float16)


def test_float32_temperature_with_half_precision():
    given, grad, options = make("odd-heads", "bounded", torch.bfloat16)
    given["temperature"] = given["temperature"].float()
    *_, temperature_grad = gradients(given, grad, options, "triton")
    assert temperature_grad.dtype == torch.float32


@pytest.mark.parametrize("form", ["softmax-rope", "bounded"])
def test_views(form):
    """Slices of one projection are read in place; a map with another memory format is copied."""
    given, grad, options = make("odd-heads", form, torch.float32)
    k, v = torch.cat((given["k"], given["v"]), -1).chunk(2, -1)
    q = given["q"].movedim(-1, 1).contiguous().movedim(1, -1)
    assert not any(x.is_contiguous() for x in (q, k, v))
    check(given | {"q": q, "k": k, "v": v}, grad[:1].expand(grad.shape), options)


@pytest.mark.parametrize("view", ["expanded", "strided"])
def test_temperatures_that_are_not_adjacent(view):
    given, grad, options = make("odd-heads", "bounded", torch.float32)
    several = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    check(given | {"temperature": several[:1, 0].expand(3) if view == "expanded" else several[:, 1]}, grad, options)


def test_an_image_has_the_same_results_in_any_batch():
    given, grad, options = make("several-parts", "offset-softmax", torch.float16)
    one = {name: x if name == "temperature" else x[1:] for name, x in given.items()}
    many, alone = gradients(given, grad, options, "triton"), gradients(one, grad[1:], options, "triton")
    for a, b in zip(many[:4], alone[:4], strict=True):
        assert torch.equal(a[1:], b)


def test_parts_are_of_whole_tiles():
    for tokens in (1, 63, 64, 65, 1024, 1025, 3136, 67200):
        sizes = token_sums.parts_of(torch.empty(1, 1, tokens, 32, dtype=torch.float16, device="meta"), 1)
        assert (sizes["parts"] - 1) * sizes["per_part"] < tokens <= sizes["parts"] * sizes["per_part"]
        assert sizes["per_part"] % 64 == 0


def test_double_backward():
    given, grad, options = make("odd-heads", "softmax-rope", torch.float32)
    assert_second_derivatives(linear_attention, given, grad, options)


@pytest.mark.parametrize("form", ["softmax-rope", "bounded"])
def test_operators_are_registered_rightly(form, fake_tensors_launch_nothing):
    given, grad, options = make("one-token", form, torch.float32)
    rope = options.get("rope")
    settings = (2, "feature_map" in options, "key_weights" in options, False, rope and list(rope), 0.3, 1e-6, 0.0)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.forward, (*(x.requires_grad_() for x in given.values()), *settings), test_utils=utils)
    plain = [x.detach() for x in given.values()]
    _, *kept = op.forward(*plain, *settings)
    torch.library.opcheck(op.backward, (grad, *plain, *kept, *settings), test_utils=utils)
