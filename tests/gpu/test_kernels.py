"""The Triton kernels of the operators on a GPU, against the reference in float64. Some minutes; skipped without a GPU.

`pytest -m gpu tests/gpu`, or `make gpu`, which measures too.
"""

import functools
import inspect
import os
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from zoo.kernels import OPERATORS, checks, implementation

pytestmark = pytest.mark.gpu

# "cpu" with TRITON_INTERPRET=1 runs the tests in Triton's interpreter, on a machine without a GPU.
DEVICE = os.environ.get("ZOO_GPU_TESTS_DEVICE", "cuda")
BATCH = 2
WITH_TRITON = {
    name: import_module(f"zoo.kernels.{name}.cases")
    for name in OPERATORS
    if find_spec(f"zoo.kernels.{name}.triton_impl")
}
CASES = [(name, case) for name, module in WITH_TRITON.items() for case in module.CASES]
IDS = ["/".join(pair) for pair in CASES]
# One case of each kind, for results that do not depend on the shapes.
FEW = [(name, case) for name, module in WITH_TRITON.items() for case in module.KINDS]
FEW_IDS = ["/".join(pair) for pair in FEW]
# Relative root mean square against float64; in half precision, P and dS are rounded too.
BUDGET = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU here")
    torch.set_float32_matmul_precision("highest")
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(plain):
    """A kernel that does not write all of its output cannot pass."""

    @functools.wraps(plain)
    def filled(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return filled


def arguments_of(name, case, dtype, batch, device=DEVICE):
    """The arguments of the public function, by name."""
    module = WITH_TRITON[name]
    args, kwargs = module.inputs(module.CASES[case], batch=batch, dtype=dtype, device=device, requires_grad=True)
    return dict(inspect.signature(module.FUNCTION).bind(*args, **kwargs).arguments)


def make(name, case, dtype, batch=BATCH):
    """The public function, its arguments by name, and the names of those that require gradients."""
    arguments = arguments_of(name, case, dtype, batch)
    wanted = [key for key, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    return WITH_TRITON[name].FUNCTION, arguments, wanted


def run(function, arguments, wanted, choice="triton"):
    """The output and the gradients, for the same gradient of the output each time."""
    with implementation(choice):
        out = function(**arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, [arguments[key] for key in wanted], grad)


def exact(function, arguments, wanted):
    """The results that `run` should give, computed from the same numbers in float64."""
    double = {
        key: x.detach().double().requires_grad_(key in wanted)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for key, x in arguments.items()
    }
    # In the dtype of the arguments, so that the gradient of the output is rounded as in `run`.
    dtype = arguments[wanted[0]].dtype
    with implementation("reference"):
        out = function(**double)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out)
    return out.detach(), *torch.autograd.grad(out, [double[key] for key in wanted], grad)


def assert_right(got, want, names, dtype):
    for name, have, right in zip(names, got, want, strict=True):
        assert have.shape == right.shape
        assert torch.isfinite(have).all(), f"{name} is not finite"
        difference = (have.double() - right).square().mean() / right.square().mean().clamp(min=1e-30)
        assert difference.sqrt() <= BUDGET[dtype], f"{name}: relative RMS {difference.sqrt():.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_agrees_with_float64(name, case, dtype):
    function, arguments, wanted = make(
        name, case, dtype, batch=1 if case in getattr(WITH_TRITON[name], "LARGE", ()) else BATCH
    )
    want = exact(function, arguments, wanted)
    assert_right(run(function, arguments, wanted), want, ("out", *wanted), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_three_runs_are_identical(name, case, dtype):
    function, arguments, wanted = make(name, case, dtype, batch=16 if DEVICE == "cuda" else 1)
    first, *others = (run(function, arguments, wanted) for _ in range(3))
    for other in others:
        for key, a, b in zip(("out", *wanted), first, other, strict=True):
            assert torch.equal(a, b), f"{key} differs from run to run"


@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_compiles_as_one_graph(name, case):
    if DEVICE == "cpu":
        pytest.skip("the interpreter takes no fake tensors")
    torch.compiler.reset()
    function, arguments, wanted = make(name, case, torch.float16)
    compiled = torch.compile(function, fullgraph=True)
    got, want = run(compiled, arguments, wanted), run(function, arguments, wanted)
    for key, a, b in zip(("out", *wanted), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_cuda_graph(name, case):
    """Replaying a captured call after new inputs are copied gives their results."""
    if DEVICE == "cpu":
        pytest.skip("graphs are captured on GPUs")
    function, arguments, wanted = make(name, case, torch.float16)
    with torch.no_grad(), implementation("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels before the capture
            function(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(**arguments)
        for key in wanted:
            arguments[key].copy_(torch.randn_like(arguments[key]))
        graph.replay()
        torch.testing.assert_close(out, function(**arguments), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_autocast(name, case, dtype):
    """Float32 inputs are converted to the dtype of autocast; their gradients are float32."""
    if DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("autocast of CPUs is tried with bfloat16")
    function, arguments, wanted = make(name, case, torch.float32)
    with torch.autocast(DEVICE, dtype), implementation("triton"):
        out = function(**arguments)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), [arguments[key] for key in wanted])
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)
    with implementation("reference"):
        want = function(**{key: x.detach().double() if key in wanted else x for key, x in arguments.items()})
    assert_right((out.detach(),), (want,), ("out",), dtype)


@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_auto_chooses_triton(name, case):
    function, arguments, _ = make(name, case, torch.float16, batch=1)
    if DEVICE == "cpu":
        pytest.skip("on a CPU 'auto' is PyTorch")
    with torch.no_grad():
        with implementation("auto"):
            got = function(**arguments)
        with implementation("triton"):
            want = function(**arguments)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "case"), FEW, ids=FEW_IDS)
def test_runs_on_the_device_of_the_tensors(name, case):
    """The results on the second GPU equal those on the first, which is the current one."""
    if DEVICE == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, arguments, wanted = make(name, case, torch.float16)
    there = {
        key: x.detach().to("cuda:1").requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for key, x in arguments.items()
    }
    for a, b in zip(run(function, arguments, wanted), run(function, there, wanted), strict=True):
        assert b.device.index == 1
        assert torch.equal(a, b.to(a.device))


def test_routes_are_checked_on_request(monkeypatch):
    function, arguments, _ = make("routed_attention", "14x14x256-regions7-top16", torch.float16, batch=1)
    monkeypatch.setattr(checks, "DEBUG", True)
    function(**arguments)
    arguments["routes"][0, 3, 1] = 49
    with pytest.raises(ValueError, match="routes from 0 to 49 for 7 x 7 regions; they have to be from 0 to 48"):
        function(**arguments)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_large_offsets(name):
    """With more than 2**31 elements, the last image is as correct as the first."""
    if DEVICE == "cpu":
        pytest.skip("needs 10 GB of GPU memory")
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU with 40 GB of memory")
    case = WITH_TRITON[name].KINDS[0]
    function, arguments, _ = make(name, case, torch.float16, batch=1)
    one, two = (arguments_of(name, case, torch.float16, batch, device="meta") for batch in (1, 2))
    images = [key for key, x in one.items() if isinstance(x, torch.Tensor) and x.shape != two[key].shape]
    copies = 2**31 // arguments[images[0]].numel() + 2
    many = {
        key: x.detach().expand(copies, *x.shape[1:]).contiguous() if key in images else x
        for key, x in arguments.items()
    }
    with torch.no_grad(), implementation("triton"):
        out = function(**many)
        want = function(**arguments)
    assert torch.equal(out[-1:], want)
    assert torch.equal(out[copies // 2], want[0])
