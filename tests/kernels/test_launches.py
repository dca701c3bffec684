"""Launches of Triton kernels: their device, what the autotuner times, precision, alignment. Some seconds."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from zoo.kernels import checks, constants, dispatch, implementation, launches, routed_attention, triton_common
from zoo.kernels.gated_linear_attention import cases as gated_cases
from zoo.kernels.routed_attention import op
from zoo.kernels.window_attention import cases, triton_impl

from . import compilation
from .calls import CASES, WITH_TRITON


class Device:
    """Stands in for torch.cuda.device."""

    current = None

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.before, Device.current = Device.current, self.device

    def __exit__(self, *_):
        Device.current = self.before


class Kernel:
    """Stands in for a kernel: notes its launches, and the device that is current at each."""

    arg_names = ("x_ptr", "size", "batch")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((Device.current, grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in, launched as by an operator that runs."""
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(triton_common, "wrap_triton", lambda kernel: kernel)
    return Kernel()


def test_launch_is_on_the_device_of_the_tensors(kernel):
    with compilation.fake_cuda():
        x = torch.empty(2, device="cuda:1")
        triton_common.launch(kernel, (3,), size=2, x_ptr=x, batch=1, num_warps=4, maxnreg=96)
    arguments = {"size": 2, "x_ptr": x, "batch": 1, "num_warps": 4, "maxnreg": 96, "enable_fp_fusion": True}
    assert kernel.launches == [(torch.device("cuda:1"), (3,), arguments)]
    assert Device.current is None


def test_traced_launch_leaves_the_device_to_the_compiler(kernel, monkeypatch):
    monkeypatch.setattr(triton_common, "wrap_triton", lambda _: kernel)
    with compilation.fake_cuda():
        triton_common.launch(Kernel(), (3,), x_ptr=torch.empty(2, device="cuda:1"), maxnreg=96)
    ((device, _, arguments),) = kernel.launches
    assert device is None
    assert "maxnreg" not in arguments


@pytest.mark.slow
@pytest.mark.parametrize(("traced", "limit", "each"), [(False, 168, 3), (True, None, 2)])
def test_programs_fit_on_a_processor_with_the_registers_that_they_have(traced, limit, each):
    case, gpu = cases.TARGETS["target-56x56x64"], triton_common.SM_90
    calls = launches.record_case(cases, case, batch=128, dtype=torch.float16, gpu=gpu, traced=traced)["backward"]
    (call,) = (call for call in calls if call.launch.name == "_bwd_kernel")
    assert dict(call.launch.options).get("maxnreg") == limit
    assert each - 1 < call.programs / gpu.num_processors <= each


@pytest.fixture
def tuned(kernel, monkeypatch):
    """A stand-in for the autotuner of `kernel`."""
    tuned = Kernel()
    monkeypatch.setattr(triton_common, "AUTOTUNE", True)
    monkeypatch.setattr(triton_common, "_tuned", set())
    monkeypatch.setattr(triton_common, "_autotuned", lambda _: tuned)
    return tuned


@pytest.mark.parametrize("before", [False, True], ids=["first", "tuned-before"])
def test_nothing_is_tuned_while_a_graph_is_captured(before, kernel, tuned, monkeypatch):
    def launch(size, batch):
        with compilation.fake_cuda():
            triton_common.launch(kernel, (3,), size=size, x_ptr=torch.empty(2, device="cuda"), batch=batch, num_warps=4)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    if before:
        launch(2, batch=1)
    tuned.launches.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch(2, batch=8)
    launch(3, batch=8)  # not tuned
    assert [arguments["size"] for _, _, arguments in tuned.launches] == [2] * before
    assert [arguments["num_warps"] for _, _, arguments in kernel.launches] == [4] * (2 - before)


@pytest.mark.parametrize("autotune", [False, True])
def test_launch_leaves_warps_and_stages_to_the_autotuner(autotune, monkeypatch):
    launched = []

    class Traced:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: launched.append((self.kernel, arguments))

    monkeypatch.setattr(triton_common, "AUTOTUNE", autotune)
    monkeypatch.setattr(triton_common, "wrap_triton", Traced)
    with compilation.fake_cuda():
        qkv = torch.empty(1, 14, 14, 96, device="cuda", dtype=torch.float16)
        options = {"num_heads": 1, "wh": 7, "ww": 7, "grid": False, "key_minus_query": False, "scale": 1.0}
        triton_impl.forward(qkv, None, None, None, None, None, **options)
    ((kernel, arguments),) = launched
    assert ("num_warps" in arguments) is not autotune
    if autotune:
        assert {config.num_warps for config in kernel.configs} == {1, 2, 4, 8}
        assert "num_heads" in kernel.keys
        assert "qkv_ptr" not in kernel.keys
        assert triton_common._autotuned(kernel.fn) is kernel


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in WITH_TRITON for case in CASES[name].KINDS])
def test_batches_are_tuned_together(name, case, monkeypatch):
    launched = []
    monkeypatch.setattr(
        triton_common,
        "launch",
        lambda kernel, grid, **arguments: launched.append(
            (kernel, {size: arguments[size] for size in triton_common._sizes(kernel)})
        ),
    )
    # The backward pass of fake tensors of device "cuda" needs a GPU.
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda _: None)
    module = CASES[name]
    found = []
    for batch in (1, 64):
        launched.clear()
        with FakeTensorMode(), implementation("triton"):
            args, kwargs = module.inputs(
                module.CASES[case], batch=batch, dtype=torch.float16, device="cpu", requires_grad=True
            )
            out = module.FUNCTION(*args, **kwargs)
            out.backward(torch.empty_like(out))
        found.append(list(launched))
    assert len(found[0]) > 1
    assert found[0] == found[1]


# What a user may write, and whether TF32 is allowed then.
SETTINGS = {
    "pass": False,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.allow_tf32 = False": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'ieee'": False,
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}


@pytest.mark.slow
def test_precision_follows_each_way_to_allow_tf32():
    """In a new process, which forks for each: once set, the two interfaces of torch can no longer be mixed."""
    program = """
import os, sys, torch
from zoo.kernels.triton_common import GFX942, SM_90, precision
for setting in sys.argv[1:]:
    if os.fork() == 0:
        exec(setting)
        print(precision(torch.float32, SM_90), precision(torch.float32, SM_90, memory_bound=True),
              precision(torch.float32, GFX942), precision(torch.float16, SM_90), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *SETTINGS], capture_output=True, text=True, env=os.environ, check=False
    )
    found = dict(zip(SETTINGS, done.stdout.splitlines(), strict=True))
    allowed = {True: "tf32 tf32x3 ieee ieee", False: "ieee ieee ieee ieee"}
    assert found == {setting: allowed[allow] for setting, allow in SETTINGS.items()}, done.stderr


def test_only_an_address_is_worth_a_copy():
    buffer = torch.arange(2 * 3 * 4 * 24 + 24, dtype=torch.float16)
    whole = buffer[:576].view(2, 3, 4, 24)
    assert triton_common.aligned(whole) is whole
    assert triton_common.aligned(whole[..., 8:16]).data_ptr() == whole.data_ptr() + 16
    odd = whole[..., 1:9]
    copy = triton_common.aligned(odd)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, odd)
    contiguous = buffer[8 + 4 : 576 + 8 + 4].view(2, 3, 4, 24)
    assert triton_common.aligned(contiguous).data_ptr() % 16 == 0
    narrow = buffer[2:542].view(2, 3, 9, 10)  # no row but the first would be aligned
    assert triton_common.aligned(narrow) is narrow
    with compilation.fake_cuda():
        fake = torch.empty(2, 3, 4, 24, device="cuda")[..., 1:9]
        assert triton_common.aligned(fake) is fake


@pytest.mark.parametrize("name", WITH_TRITON)
def test_strides_are_known_to_be_multiples_of_16(name):
    """Else Triton reads a row that they lead to number by number."""
    module = import_module(f"zoo.kernels.{name}.triton_impl")
    kernels = [value for value in vars(module).values() if hasattr(value, "params")]
    assert kernels
    for kernel in kernels:
        for parameter in kernel.params:
            assert not (parameter.name.endswith("_stride") and parameter.do_not_specialize), (kernel, parameter.name)


@pytest.mark.parametrize(("gpu", "precision", "of_states"), [("sm_90", "tf32", "tf32x3"), ("gfx942", "ieee", "ieee")])
def test_gradients_of_gates_are_sums_of_exact_products(gpu, precision, of_states):
    """They are differences of sums over all tokens: for 3136, the rounding of TF32 grew to 0.4 % of them."""
    machine, _ = launches.TARGETS[gpu]
    case = gated_cases.CASES[gated_cases.KINDS[0]]
    found = launches.record_case(gated_cases, case, batch=2, dtype=torch.float16, gpu=machine)
    assert {call.arguments["PRECISION"] for call in found["forward"] + found["backward"]} == {precision}
    assert {call.arguments["STATE_PRECISION"] for call in found["backward"]} == {of_states}


@pytest.mark.parametrize("debug", [False, True])
def test_routes_on_a_gpu_are_checked_on_request(debug, monkeypatch):
    class Routes:
        """Stands in for a tensor on a GPU."""

        device = torch.device("cuda")

        def numel(self):
            return 2

        def aminmax(self):
            return torch.tensor(0), torch.tensor(4)

    monkeypatch.setattr(checks, "DEBUG", debug)
    monkeypatch.setattr(constants, "only_traced", lambda _: False)
    if debug:
        with pytest.raises(ValueError, match="routes from 0 to 4 for 2 x 2 regions; they have to be from 0 to 3"):
            op._check_routes(Routes(), 2)
    else:
        op._check_routes(Routes(), 2)


@pytest.mark.parametrize("debug", [False, True])
def test_routes_without_values_are_never_checked(debug, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", debug)
    with compilation.fake_cuda(), implementation("triton"):
        x, routes = torch.empty(1, 4, 4, 16, device="cuda"), torch.empty(1, 4, 2, dtype=torch.int64, device="cuda")
        assert routed_attention(x, x, x, routes, num_heads=1, regions=2).shape == x.shape
