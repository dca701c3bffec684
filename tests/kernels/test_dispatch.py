"""The choice of an implementation, autocast, torch.func, and an installation without Triton. Half a minute."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from inspect import signature

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo  # noqa: F401
from zoo.kernels import OPERATORS, checks, dispatch, implementation, set_implementation, use

from .calls import CASES, WITH_TRITON, call, make

pytestmark = pytest.mark.slow


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


def fresh_process(code, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ZOO_", "TRITON_"))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables)


def test_environment_sets_the_start(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "reference")
    assert runpy.run_path(dispatch.__file__)["_choice"] == "reference"


def test_environment_with_an_unknown_choice(monkeypatch):
    monkeypatch.setenv("ZOO_KERNELS", "fast")
    message = "Got ZOO_KERNELS='fast'; it has to be one of auto, reference, torch, triton."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as error:
        runpy.run_path(dispatch.__file__)
    assert error.value.__context__ is None


def test_auto_on_a_cpu_is_torch():
    assert chosen(CPU) == "torch"


def test_auto_on_a_gpu_is_triton(gpu):
    assert chosen(torch.empty(1, device=gpu)) == "triton"


@pytest.mark.parametrize("choice", ["auto", "torch", "reference", "triton"])
@pytest.mark.parametrize("name", OPERATORS)
def test_chosen_implementation_is_called(name, choice, monkeypatch):
    if choice == "triton" and name in WITH_TRITON:
        pytest.skip("needs a GPU or the interpreter, whose tests hold it")
    called = []
    for implementation_ in ("reference", "torch_impl"):
        module, function = import_module(f"zoo.kernels.{name}.{implementation_}"), CASES[name].FUNCTION.__name__
        compute = getattr(module, function)

        def noted(*args, implementation_=implementation_, compute=compute, **options):
            called.append(implementation_)
            return compute(*args, **options)

        monkeypatch.setattr(module, function, noted)
    with implementation(choice):
        call(name)
    assert called == ["reference" if choice == "reference" else "torch_impl"]


@pytest.mark.parametrize("choice", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types_for_triton(gpu, choice, dtype):
    with implementation(choice):
        assert chosen(torch.empty(1, device=gpu, dtype=dtype)) == "triton"


@pytest.mark.parametrize("name", WITH_TRITON)
def test_triton_by_name_needs_a_gpu(name):
    message = (
        f"{name} cannot run in Triton here: the tensors are on cpu, and Triton needs a GPU .*implementation.'auto'"
    )
    with implementation("triton"), pytest.raises(RuntimeError, match=message):
        call(name)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_triton_by_name_needs_one_of_its_types(name):
    with (
        implementation("triton"),
        pytest.raises(RuntimeError, match=r"float16, bfloat16 and float32, not in torch.float64"),
    ):
        call(name, *make(name, torch.float64))


@pytest.mark.parametrize("name", WITH_TRITON)
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
        transforms[transform](CASES[name].sample)


WITH_HEADS = [name for name in WITH_TRITON if hasattr(next(iter(CASES[name].CASES.values())), "head_dim")]


def wide(name, device):
    """A call with heads of 129 channels."""
    case = replace(next(iter(CASES[name].CASES.values())), head_dim=129)
    args, kwargs = CASES[name].inputs(case, batch=1, dtype=torch.float32, device=device)
    return CASES[name].FUNCTION(*args, **kwargs)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_triton_by_name_has_a_largest_head(gpu, name):
    with implementation("triton"), pytest.raises(RuntimeError, match=f"{name} .* heads of up to 128 channels, not 129"):
        wide(name, gpu)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_auto_falls_back_and_warns_once(gpu, name):
    with pytest.warns(UserWarning, match=f"{name} runs in PyTorch instead of Triton: .* not 129"):
        out = wide(name, gpu)
    assert out.shape[-1] % 129 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide(name, gpu)


def test_auto_warns_for_each_reason(gpu):
    tensor = torch.empty(1, device=gpu)
    for head_dim in (129, 256):
        with pytest.warns(UserWarning, match=f"an_operator runs in PyTorch instead of Triton: .* not {head_dim}."):
            assert chosen(tensor, head_dim) == "torch"


def test_auto_on_a_cpu_does_not_warn():
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


@pytest.mark.parametrize("name", OPERATORS)
def test_choice_is_traced_and_traced_again(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CASES[name].sample, fullgraph=True, backend=counter)
    tensors = make(name)
    want = call(name, *tensors)
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
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_is_a_cast_by_hand(name, choice):
    tensors = make(name, requires_grad=True)
    with implementation(choice), torch.autocast("cpu", torch.bfloat16):
        out = call(name, *tensors)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)

    names = signature(CASES[name].sample).parameters
    by_hand = [x if key in checks.PARAMETERS else x.bfloat16() for key, x in zip(names, tensors, strict=True)]
    with implementation(choice):
        want = call(name, *by_hand)
        assert torch.equal(out, want)
        for got, grad in zip(grads, torch.autograd.grad(want.sum(), tensors), strict=True):
            assert torch.equal(got, grad)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_leaves_float64(name):
    tensors = make(name, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(name, *tensors)
    torch.testing.assert_close(out, call(name, *tensors))


@pytest.mark.parametrize("name", OPERATORS)
def test_devices_without_autocast(name):
    tensors = [x.to("meta") for x in make(name)]
    with torch.autocast("cpu", torch.bfloat16):
        assert call(name, *tensors).dtype == torch.float32


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from importlib import import_module
from zoo.kernels import OPERATORS, implementation
for name in OPERATORS:
    cases = import_module(f"zoo.kernels.{name}.cases")
    tensors = [torch.randn(shape, requires_grad=True) for shape in cases.SAMPLE_SHAPES]
    cases.sample(*tensors).sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)
cases = import_module(f"zoo.kernels.{sys.argv[1]}.cases")
try:
    with implementation("triton"):
        cases.sample(*map(torch.ones, cases.SAMPLE_SHAPES))
except RuntimeError as error:
    print(error)
"""


def test_works_without_triton():
    name = WITH_TRITON[0]
    code = f"import warnings; warnings.simplefilter('error', UserWarning)\n{WITHOUT_TRITON}"
    done = fresh_process(code, name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} cannot run in Triton here"), done.stdout


def test_kernels_are_not_imported_before_they_run():
    done = fresh_process(
        "import sys, zoo.kernels; print([name for name in sys.modules if name.startswith('zoo') and 'triton' in name])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def scalar(name):
    """The weighted sum of the output of the operator."""

    def function(*tensors):
        out = call(name, *tensors)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()

    return function


@pytest.mark.parametrize("name", OPERATORS)
def test_func_grad_agrees_with_autograd(name):
    tensors = make(name, torch.float64, requires_grad=True)
    want = torch.autograd.grad(scalar(name)(*tensors), tensors)
    got = torch.func.grad(scalar(name), argnums=tuple(range(len(tensors))))(*(x.detach() for x in tensors))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPERATORS)
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


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_agrees_with_single_calls(name):
    tensors = make(name, torch.float64)
    stacked = [torch.stack((x, x.flip(0), -x)) for x in tensors]
    want = torch.stack([call(name, *each) for each in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(CASES[name].sample)(*stacked), want)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_for_each_sample(name):
    tensors = make(name, torch.float64)
    stacked = [torch.stack((x, -x)) for x in tensors]
    function = torch.func.grad(scalar(name))
    want = torch.stack([function(*each) for each in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), want)
