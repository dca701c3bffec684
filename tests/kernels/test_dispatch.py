"""The choice of implementation, autocast, torch.func, and kernels without Triton. Half a minute."""

import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo  # noqa: F401
from zoo.kernels import (
    depthwise_conv2d_nhwc,
    dispatch,
    implementation,
    neighborhood_attention,
    routed_attention,
    set_implementation,
    use,
    window_attention,
)

from .calls import ATTENTION, CALLS, make
from .test_depthwise_conv import BAD as BAD_DEPTHWISE
from .test_neighborhood_attention import BAD as BAD_NEIGHBORHOOD
from .test_neighborhood_attention import QKV as QKV_NEIGHBORHOOD
from .test_routed_attention import BAD as BAD_ROUTED
from .test_routed_attention import ROUTES, X
from .test_window_attention import BAD as BAD_WINDOW
from .test_window_attention import QKV as QKV_WINDOW

pytestmark = pytest.mark.slow

IMPLEMENTATIONS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
    monkeypatch.setattr(dispatch, "_choice", "auto")
    monkeypatch.setattr(dispatch, "_warned", set())
    torch._dynamo.reset()


@pytest.fixture
def gpu():
    """Tensors of device "cuda" without contents."""
    with FakeTensorMode():
        yield torch.device("cuda")


def chosen(tensor, head_dim=32):
    return dispatch.choose("an_operator", tensor, head_dim)


CPU = torch.zeros(1)


def test_set_implementation_holds_until_the_next_call():
    set_implementation("reference")
    assert chosen(CPU) == "reference"
    set_implementation("torch")
    assert chosen(CPU) == "torch"


def test_implementation_holds_until_the_end_of_the_block():
    set_implementation("torch")
    with implementation("reference"):
        with implementation("torch"):
            assert chosen(CPU) == "torch"
        assert chosen(CPU) == "reference"
        set_implementation("torch")
    assert dispatch.current() == "torch"
    with implementation("reference"):
        set_implementation("auto")
    assert dispatch.current() == "torch"


def test_implementation_changes_nothing_before_the_block():
    block = implementation("reference")
    assert dispatch.current() == "auto"
    with block:
        assert dispatch.current() == "reference"


def test_choice_is_restored_after_an_exception():
    with pytest.raises(KeyError), implementation("reference"):
        raise KeyError
    assert dispatch.current() == "auto"


def test_use_is_the_former_name_of_both():
    use("reference")
    assert dispatch.current() == "reference"
    with use("torch"):
        assert dispatch.current() == "torch"
    assert dispatch.current() == "reference"


def enter(choice):
    with implementation(choice):
        pass


@pytest.mark.parametrize("choose", [set_implementation, enter, use], ids=lambda function: function.__name__)
@pytest.mark.parametrize("choice", ["cuda", "", None, True])
def test_unknown_choice(choice, choose):
    with pytest.raises(ValueError, match=rf"choice={choice!r}; it has to be one of auto, reference, torch, triton"):
        choose(choice)
    assert dispatch.current() == "auto"


def fresh_process(code, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ZOO_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables)


def test_environment_sets_the_start():
    done = fresh_process("from zoo.kernels import dispatch; print(dispatch._choice)", ZOO_KERNELS="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_environment_with_an_unknown_choice():
    done = fresh_process("import zoo.kernels", ZOO_KERNELS="fast")
    assert done.stderr.strip().endswith(
        "ValueError: Got ZOO_KERNELS='fast'; it has to be one of auto, reference, torch, triton."
    )
    assert "During handling" not in done.stderr


def test_auto_on_a_cpu_is_torch():
    assert chosen(CPU) == "torch"


def test_auto_on_a_gpu_is_triton(gpu):
    assert chosen(torch.empty(1, device=gpu)) == "triton"


@pytest.mark.parametrize("choice", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types_for_triton(gpu, choice, dtype):
    with implementation(choice):
        assert chosen(torch.empty(1, device=gpu, dtype=dtype)) == "triton"


def call(name, **options):
    return CALLS[name].function(*make(name, **options))


@pytest.mark.parametrize("name", ATTENTION)
def test_triton_by_name_needs_a_gpu(name):
    message = (
        f"{name} cannot run in Triton here: the tensors are on cpu, and Triton needs a GPU .*implementation.'auto'"
    )
    with implementation("triton"), pytest.raises(RuntimeError, match=message):
        call(name)


@pytest.mark.parametrize("name", ATTENTION)
def test_triton_by_name_needs_one_of_its_types(name):
    with (
        implementation("triton"),
        pytest.raises(RuntimeError, match=r"float16, bfloat16 and float32, not in torch.float64"),
    ):
        call(name, dtype=torch.float64)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_triton_by_name_cannot_be_transformed(name, transform):
    tensors = make(name)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda *t: f(*t).sum())(*tensors),
        "vmap": lambda f: torch.vmap(f)(*(t[None] for t in tensors)),
        "jvp": lambda f: torch.func.jvp(f, tensors, tensors),
    }
    with (
        implementation("triton"),
        pytest.raises(RuntimeError, match=r"torch.func and forward-mode differentiation need"),
    ):
        transforms[transform](CALLS[name].function)


def wide(name, device):
    """A call with a head of 129 channels."""
    qkv, x = torch.empty(1, 4, 4, 3 * 129, device=device), torch.empty(1, 4, 4, 129, device=device)
    routes = torch.zeros(1, 4, 1, dtype=torch.int64, device=device)
    return {
        "window_attention": lambda: window_attention(qkv, num_heads=1, window_size=2),
        "neighborhood_attention": lambda: neighborhood_attention(qkv, num_heads=1, kernel_size=3),
        "routed_attention": lambda: routed_attention(x, x, x, routes, num_heads=1, regions=2),
    }[name]()


@pytest.mark.parametrize("name", ATTENTION)
def test_triton_by_name_has_a_largest_head(gpu, name):
    with implementation("triton"), pytest.raises(RuntimeError, match=f"{name} .* heads of up to 128 channels, not 129"):
        wide(name, gpu)


@pytest.mark.parametrize("name", ATTENTION)
def test_auto_falls_back_and_says_so_once(gpu, name):
    with pytest.warns(UserWarning, match=f"{name} runs in PyTorch instead of Triton: .* not 129"):
        out = wide(name, gpu)
    assert out.shape == (1, 4, 4, 129)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide(name, gpu)


def test_auto_says_so_for_each_reason(gpu):
    tensor = torch.empty(1, device=gpu)
    for head_dim in (129, 256):
        with pytest.warns(UserWarning, match=f"an_operator runs in PyTorch instead of Triton: .* not {head_dim}."):
            assert chosen(tensor, head_dim) == "torch"


def test_auto_on_a_cpu_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(CPU.double(), head_dim=129) == "torch"


def test_timm_decides_about_fused_attention():
    assert dispatch._fused_allowed is timm.layers.use_fused_attn


@pytest.mark.parametrize("allowed", [False, True])
def test_follow(allowed, monkeypatch):
    monkeypatch.setattr(dispatch, "_fused_allowed", None)
    dispatch.follow(lambda: allowed)
    assert dispatch.fused_allowed() is allowed


def test_set_fused_attn_is_respected(gpu):
    tensor = torch.empty(1, device=gpu)
    try:
        timm.layers.set_fused_attn(False)
        assert chosen(tensor) == "torch"
        with implementation("triton"):
            assert chosen(tensor) == "triton"
    finally:
        timm.layers.set_fused_attn(True)
    assert chosen(tensor) == "triton"


def test_set_exportable_is_respected(gpu):
    tensor = torch.empty(1, device=gpu)
    with timm.layers.set_exportable(True):
        assert chosen(tensor) == "torch"
    assert chosen(tensor) == "triton"


@pytest.mark.parametrize("name", CALLS)
def test_choice_is_traced_and_traced_again(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name].function, fullgraph=True, backend=counter)
    tensors = make(name)
    want = CALLS[name].function(*tensors)
    for choice, graphs in (("reference", 1), ("torch", 2), ("reference", 2), ("torch", 2)):
        with implementation(choice):
            torch.testing.assert_close(compiled(*tensors), want)
        assert counter.frame_count == graphs
    timm.layers.set_fused_attn(False)
    try:
        torch.testing.assert_close(compiled(*tensors), want)
    finally:
        timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("choice", ["reference", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_autocast_is_a_cast_by_hand(name, choice):
    tensors = make(name, requires_grad=True)
    with implementation(choice), torch.autocast("cpu", torch.bfloat16):
        out = CALLS[name].function(*tensors)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)

    # The table of biases stays as it is.
    tables = "bias_table" in CALLS[name].function.__code__.co_varnames
    by_hand = [x if tables and i else x.bfloat16() for i, x in enumerate(tensors)]
    with implementation(choice):
        want = CALLS[name].function(*by_hand)
        assert torch.equal(out, want)
        for got, grad in zip(grads, torch.autograd.grad(want.sum(), tensors), strict=True):
            assert torch.equal(got, grad)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_leaves_float64(name):
    with torch.autocast("cpu", torch.bfloat16):
        out = call(name, dtype=torch.float64)
    torch.testing.assert_close(out, call(name, dtype=torch.float64))


@pytest.mark.parametrize("name", CALLS)
def test_devices_without_autocast(name):
    tensors = [x.to("meta") for x in make(name)]
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[name].function(*tensors).dtype == torch.float32


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from zoo.kernels import depthwise_conv2d_nhwc, implementation
from zoo.kernels import neighborhood_attention, routed_attention, window_attention
x = torch.randn(1, 4, 4, 12, requires_grad=True)
window_attention(x, num_heads=2, window_size=2).sum().backward()
neighborhood_attention(x, num_heads=2, kernel_size=3).sum().backward()
routed_attention(x, x, x, torch.zeros(1, 4, 1, dtype=torch.int64), num_heads=2, regions=2).sum().backward()
depthwise_conv2d_nhwc(x, torch.ones(12, 1, 3, 3), None).sum().backward()
assert x.grad.isfinite().all()
try:
    with implementation("triton"):
        window_attention(x.detach(), num_heads=2, window_size=2)
except RuntimeError as error:
    print(error)
"""


def test_works_without_triton():
    done = fresh_process(f"import warnings; warnings.simplefilter('error', UserWarning)\n{WITHOUT_TRITON}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("window_attention cannot run in Triton here"), done.stdout


def test_kernels_are_not_imported_before_they_run():
    done = fresh_process(
        "import sys, zoo.kernels; print([name for name in sys.modules if name.startswith('zoo') and 'triton' in name])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def scalar(name):
    """The operator, weighted and summed."""

    def function(*tensors):
        out = CALLS[name].function(*tensors)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()

    return function


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_agrees_with_autograd(name):
    tensors = make(name, torch.float64, requires_grad=True)
    want = torch.autograd.grad(scalar(name)(*tensors), tensors)
    got = torch.func.grad(scalar(name), argnums=tuple(range(len(tensors))))(*(x.detach() for x in tensors))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_agrees_with_autograd(name):
    tensors = make(name, torch.float64, requires_grad=True)
    directions = [x.detach().flip(0).cos() for x in tensors]
    grads = torch.autograd.grad(scalar(name)(*tensors), tensors)
    want = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
    plain = tuple(x.detach() for x in tensors)
    torch.testing.assert_close(torch.func.jvp(scalar(name), plain, tuple(directions))[1], want)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(plain, directions, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(scalar(name)(*duals)).tangent
    torch.testing.assert_close(tangent, want)


@pytest.mark.parametrize("name", CALLS)
def test_vmap_agrees_with_single_calls(name):
    tensors = make(name, torch.float64)
    stacked = [torch.stack((x, x.flip(0), -x)) for x in tensors]
    want = torch.stack([CALLS[name].function(*each) for each in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(CALLS[name].function)(*stacked), want)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_for_each_sample(name):
    tensors = make(name, torch.float64)
    stacked = [torch.stack((x, -x)) for x in tensors]
    function = torch.func.grad(scalar(name))
    want = torch.stack([function(*each) for each in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), want)


def window(**change):
    return window_attention(**{"qkv": QKV_WINDOW, "num_heads": 2, "window_size": 2} | change)


def neighborhood(**change):
    return neighborhood_attention(**{"qkv": QKV_NEIGHBORHOOD, "num_heads": 2, "kernel_size": 3} | change)


def routed(**change):
    return routed_attention(**{"q": X, "k": X, "v": X, "routes": ROUTES, "num_heads": 2, "regions": 2} | change)


def depthwise(tensors, dilation):
    return depthwise_conv2d_nhwc(*tensors, dilation=dilation)


BAD = [
    *((window, *row) for row in BAD_WINDOW),
    *((neighborhood, *row) for row in BAD_NEIGHBORHOOD),
    *((routed, *row) for row in BAD_ROUTED),
    *((depthwise, {"tensors": row[0], "dilation": row[1]}, *row[2:]) for row in BAD_DEPTHWISE),
]


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("function", "change", "error", "message"), BAD, ids=[f"{row[0].__name__}-{row[3][:30]}" for row in BAD]
)
def test_bad_input_is_refused_alike(choice, function, change, error, message):
    with implementation(choice), pytest.raises(error, match=message):
        function(**change)
