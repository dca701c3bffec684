"""`zoo-bench kernels --static`: compiled kernels and their instructions. Slow ones some seconds."""

import json
import re

import pytest

from zoo.kernels import dispatch
from zoo.tools import benchmark

BAD = [
    ("--target sm_70", 2, "argument --target: invalid choice: 'sm_70' (choose from"),
    ("--device cuda", 2, "got --device with --static, which measures nothing: leave it out"),
    ("--without flex", 2, "got --without with --static"),
    ("--backward", 2, "got --backward with --static"),
    ("--threads 2", 2, "got --threads with --static"),
    ("--seconds 1", 2, "got --seconds with --static"),
    ("--bandwidth 100", 2, "got --bandwidth with --static"),
    ("--peak 1", 2, "got --peak with --static"),
    ("--picture x.png", 2, "got --picture with --static"),
    ("--operators depthwise", 2, "got only cases of depthwise, which has no Triton kernels: choose others"),
    ("--cases targt-56x56x64", 2, "which matches no case: did you mean target-56x56x64"),
    ("--cases a --all", 2, "got --cases and --all: give one of them"),
]


def run(*arguments, command="kernels"):
    """The exit code of a command of `zoo-bench` with these arguments."""
    try:
        benchmark.main([command, *arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(("line", "code", "message"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_option(capsys, line, code, message):
    assert run("--static", *line.split()) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("zoo-bench kernels: error: ")
    assert error.count("\n") == 1


def test_target_alone(capsys):
    assert run("--target", "sm_90") == 2
    assert "got --target without --static: add it." in capsys.readouterr().err


def test_without_triton(capsys, monkeypatch):
    found = benchmark.find_spec
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None if name == "triton" else found(name))
    assert run("--static") == 1
    assert "triton, which compiles the kernels, is not installed: install it." in capsys.readouterr().err


def test_in_the_interpreter(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreting", True)
    assert run("--static") == 1
    assert (
        "got --static with TRITON_INTERPRET set, so that Triton compiles nothing: unset it." in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("window", "7x7x512-block7x7-key_minus_query"),
        ("neighborhood", "14x14x256-7x7"),
        ("routed", "14x14x256-regions7-top16"),
        ("gated", "196x192-heads12"),
    ],
)
def test_each_operator(capsys, tmp_path, operator, case):
    file = tmp_path / "out.json"
    assert run("--static", "--operators", operator, "--cases", case, "--batch", "16", "--json", str(file)) == 0
    printed = capsys.readouterr()
    for kind in ("forward", "backward"):
        assert re.search(rf"{operator}/{case}, fp16, sm_90, {kind}: [\d.]+ us modelled, roofline [\d.]+", printed.out)
    assert "batch 16; nothing is run" in printed.out
    assert f"[1/1] sm_90, {operator}/{case}, fp16" in printed.err
    assert "~" not in printed.out
    content = json.loads(file.read_text())
    forward, backward = content["passes"]
    assert (forward["kind"], backward["kind"]) == ("forward", "backward")
    assert backward["least_us"] == pytest.approx(2 * forward["least_us"], rel=0.1)
    for kernel in forward["kernels"] + backward["kernels"]:
        assert kernel["exact"]
        assert kernel["stack"] <= 64
        assert 16 <= kernel["registers"] <= 255
        assert 1 <= kernel["programs_per_processor"] <= 32
        assert kernel["warp_instructions"] >= kernel["programs"] * kernel["num_warps"] * 50
        assert kernel["step"] <= kernel["size"]
        assert kernel["modelled_us"] == max(kernel["issue_us"], kernel["shared_us"], kernel["memory_us"])
    (main,) = [kernel for kernel in forward["kernels"] if kernel["tensor_core"]]
    assert max(map(int, main["accesses"]["STG"])) >= 64
    assert main["name"] in printed.out


@pytest.mark.slow
def test_targets_dtypes_and_batch(tmp_path):
    """Twice the images are more instructions, up to twice as many; AMD's are only counted in the text."""
    file = tmp_path / "out.json"
    case = ("--static", "--cases", "window/14x14x64-block2x2-unbiased", "--json", str(file))
    assert run(*case, "--target", "sm_90", "gfx942", "--dtype", "fp16", "bf16") == 0
    passes = json.loads(file.read_text())["passes"]
    assert [(p["target"], p["dtype"], p["kind"]) for p in passes] == [
        (target, dtype, kind)
        for target in ("sm_90", "gfx942")
        for dtype in ("fp16", "bf16")
        for kind in ("forward", "backward")
    ]
    amd = passes[4]["kernels"][0]
    assert amd["warp_instructions"] is None
    assert passes[4]["modelled_us"] is None
    assert amd["size"] > amd["step"] > 50
    assert any(name.startswith("v_mfma") for name in amd["tensor_core"])
    before = passes[0]["kernels"][0]["warp_instructions"]
    assert run(*case, "--batch", "256") == 0
    after = json.loads(file.read_text())["passes"][0]["kernels"][0]["warp_instructions"]
    assert 1.3 * before < after < 2.1 * before


@pytest.mark.slow
def test_operators_without_kernels_are_left_out(capsys, monkeypatch):
    from zoo.tools import benchmark_static

    monkeypatch.setattr(benchmark_static, "passes", lambda name, case, **_: [])
    assert run("--static", "--operators", "window", "depthwise") == 0
    assert "left out: depthwise, which has no Triton kernels" in capsys.readouterr().out


@pytest.mark.slow
def test_default_cases(monkeypatch):
    """Those that an H100 ran; each is a case of its operator."""
    from zoo.tools import benchmark_kernels, benchmark_static

    seen = []
    monkeypatch.setattr(benchmark_static, "passes", lambda name, case, **_: seen.append((name, case)) or [])
    assert run("--static") == 0
    assert seen == [(name, case) for name, cases in benchmark_static.CASES.items() for case in cases]
    assert all(case in benchmark_kernels.OPERATORS[name].cases for name, case in seen)


SIMULATED = ("--size", "14x14", "--kernel", "7", "--heads", "8", "--batch", "16")


def simulate(*arguments):
    return run(*SIMULATED, "--static", *arguments, command="simulate")


@pytest.mark.slow
def test_the_simulation_models_our_kernel(capsys, tmp_path):
    """The figures of `zoo-bench kernels --static`."""
    file = tmp_path / "out.json"
    assert simulate("--gpu", "H100", "MI300X", "--json", str(file)) == 0
    out = capsys.readouterr().out
    ours = json.loads(file.read_text())["kernel"]
    assert ours.keys() == {"H100"}
    assert run("--static", "--cases", "14x14x256-7x7", "--batch", "16", "--json", str(file)) == 0
    forward = json.loads(file.read_text())["passes"][0]
    assert ours["H100"] == {
        "warp_instructions": sum(kernel["warp_instructions"] for kernel in forward["kernels"]),
        "step": next(kernel["step"] for kernel in forward["kernels"] if kernel["tensor_core"]),
        "modelled_us": forward["modelled_us"],
    }
    instructions = ours["H100"]["warp_instructions"] / 1e6
    assert f"zoo's forward pass on H100: {instructions:.1f} M instructions, {ours['H100']['step']} a step" in out
    assert f"modelled, not measured: {ours['H100']['modelled_us']:.4g} us" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpu MI300X", "got --static with --gpu MI300X: times are modelled for A100, H100, H200, B200."),
        ("--head-dim 256", "got --static with --head-dim 256: zoo's kernel has tiles for heads of up to 128 channels."),
    ],
)
def test_kernels_that_the_simulation_does_not_model(capsys, line, message):
    assert simulate(*line.split()) == 2
    assert message in capsys.readouterr().err


def test_simulation_without_triton(capsys, monkeypatch):
    found = benchmark.find_spec
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None if name == "triton" else found(name))
    assert simulate() == 1
    assert "triton, which compiles the kernels, is not installed" in capsys.readouterr().err


def test_least_bytes_need_no_loop_over_tokens():
    """The reference of the scan took minutes to tell the shape of its output."""
    from zoo.tools.benchmark_kernels import least_bytes

    tokens = 16 * 128 * 128
    numbers = tokens * (64 + 4 * 64 + 2 * 4 + 64) + 3 * 4 * 64  # x, delta, B and C, the output; A, D and the bias
    assert least_bytes("selective", "128x128x64-state1", 16, "fp16", "forward") == 2 * numbers
