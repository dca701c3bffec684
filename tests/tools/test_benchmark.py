"""zoo-bench: its command line, what it measures on a small case, and its simulator. Some ten seconds."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch

from zoo import kernels
from zoo.kernels import cost_model
from zoo.kernels.neighborhood_attention import cases as neighborhood_cases
from zoo.kernels.peers import Contender
from zoo.kernels.window_attention import cases as window_cases
from zoo.tools import benchmark, benchmark_kernels, benchmark_timing
from zoo.tools.benchmark_kernels import OPERATORS

QUICK = ("--seconds", "0.01", "--batch", "1")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "MIN_ROUNDS", 2)


@pytest.fixture
def tiny(monkeypatch):
    """A case of a moment for windows and for neighborhoods."""
    for name, cases in (("window", window_cases), ("neighborhood", neighborhood_cases)):
        case = cases.Case((14, 14), 1, (7, 7))
        monkeypatch.setitem(OPERATORS[name].cases, "tiny", partial(cases.inputs, case))


def run(*arguments):
    """The exit code of a command line."""
    try:
        benchmark.main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


def contend(monkeypatch, operator, *peers):
    """Replace an operator's peers."""
    monkeypatch.setitem(OPERATORS, operator, dataclasses.replace(OPERATORS[operator], peers=peers))


@pytest.mark.slow
def test_help_needs_no_torch():
    code = "import zoo.tools.benchmark as b, sys; b.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("command", "example"),
    [("kernels", "--cases '56x56"), ("models", "cswin_tiny --kernels"), ("simulate", "--size 256x256")],
)
def test_help_has_examples(capsys, command, example):
    assert run(command, "--help") == 0
    assert example in capsys.readouterr().out


BAD = [
    ("kernels --cases target-65x56x64", 2, "which matches no case: did you mean target-56x56x64, "),
    ("kernels --cases window/targt-56x56x64", 2, "did you mean window/target-56x56x64, "),
    ("kernels --operators routed --cases target-*", 2, "which matches no case of routed: "),
    ("kernels --cases a --all", 2, "got --cases and --all: give one of them"),
    ("kernels --operators windows", 2, "invalid choice: 'windows'"),
    ("kernels --without felx", 2, "got --without 'felx': there are 'torch', 'reference'"),
    ("kernels --batch 0", 2, "--batch: got '0'; give a whole number of 1 or more"),
    ("kernels --seconds nan", 2, "--seconds: got 'nan'; give a number above 0"),
    ("kernels --picture times.jpg", 2, "got --picture times.jpg: its name has to end in .png, .svg, .pdf"),
    ("simulate --size 56by56 --kernel 7", 2, "--size: got '56by56'; give rows x columns such as 56x40"),
    ("simulate --size 56x0 --kernel 7", 2, "--size: got '56x0'"),
    ("simulate --size 8 --kernel 7 --dilation 2", 2, "their product has to be from 1 to the map's side"),
    ("simulate --size 8 --kernel 7 --gpu H1000", 2, "got --gpu 'H1000': there are A100, H100"),
    ("simulate --kernel 7", 2, "required: --size"),
]


@pytest.mark.parametrize(("line", "code", "message"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_option(capsys, line, code, message):
    assert run(*line.split()) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"zoo-bench {line.split()[0]}: error: ")
    assert error.count("\n") == 1


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("kernels", "--device", "cuda") == 1
    assert "PyTorch finds no GPU: use --device cpu" in capsys.readouterr().err


def test_default_cases_are_the_targets():
    options = benchmark.parser().parse_args(["kernels"])
    known = {name: list(operator.cases) for name, operator in OPERATORS.items()}
    assert benchmark._chosen_cases(options, known) == [
        (operator, case) for operator in ("neighborhood", "window") for case in ("target-56x56x64", "target-14x14x256")
    ]


def test_all_cases():
    options = benchmark.parser().parse_args(["kernels", "--all"])
    known = {name: list(operator.cases) for name, operator in OPERATORS.items()}
    assert len(benchmark._chosen_cases(options, known)) == sum(map(len, known.values()))


@pytest.mark.long
@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_table_json_and_picture(capsys, tmp_path):
    files = ("--json", str(tmp_path / "sub" / "out.json"), "--picture", str(tmp_path / "out.png"))
    limits = ("--bandwidth", "100", "--peak", "1")
    assert run("kernels", "--cases", "*/tiny", "--backward", *QUICK, *limits, *files) == 0
    printed = capsys.readouterr()
    for kind in ("forward", "backward", "forward and backward"):
        assert f"window/tiny, fp32, {kind}: at least" in printed.out
    assert "not run: triton: the tensors are on cpu" in printed.out
    assert "[2/4] neighborhood/tiny, fp32, backward" in printed.err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    content = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == torch.get_num_threads()
    passes = ("forward", "backward", "forward and backward")
    assert [(r["operator"], r["pass"]) for r in content["results"]] == [
        (operator, kind) for operator in ("neighborhood", "window") for kind in passes
    ]
    forward, backward, both = content["results"][3:]
    tokens, channels = 14 * 14, 32
    assert forward["min_bytes"] == 4 * (4 * tokens * channels + 13 * 13)
    assert forward["flops"] == 4 * tokens * channels * 49
    assert backward["min_bytes"] == 4 * (8 * tokens * channels + 2 * 13 * 13)
    assert backward["flops"] == 2.5 * forward["flops"]
    for figure in ("min_bytes", "flops"):
        assert both[figure] == forward[figure] + backward[figure]
    rows = {row["name"]: row for row in forward["contenders"]}
    assert forward["ours"] == "torch"
    timed = {name for name, row in rows.items() if row["status"] == "timed"}
    assert timed == {"torch", "reference", "sdpa", "softmax", "flex"}
    ours = rows["torch"]
    assert ours["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert len(ours["times_s"]) >= benchmark_kernels.MIN_ROUNDS
    assert ours["low_s"] <= ours["median_s"] <= ours["high_s"]
    assert ours["peak_bytes"] >= 4 * tokens * channels
    least = max(forward["min_bytes"] / 100e9, forward["flops"] / 1e12)
    assert ours["roofline_fraction"] == pytest.approx(least / ours["median_s"])


@pytest.mark.usefixtures("tiny")
def test_wrong_and_failing_contenders_are_named(capsys, monkeypatch, tmp_path):
    def forgets_the_bias(**given):
        return OPERATORS["window"].function(**given | {"bias_table": None})

    def has_no_memory(**given):
        raise RuntimeError("out of memory\nand more")

    contend(monkeypatch, "window", Contender("hasty", forgets_the_bias), Contender("greedy", has_no_memory))
    file = tmp_path / "out.json"
    assert run("kernels", "--cases", "window/tiny", *QUICK, "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert re.search(r"not timed: hasty wrong: relative error \S+ against float64, 1e-04 allowed", out)
    assert "not timed: greedy failed: RuntimeError: out of memory\n" in out
    rows = {row["name"]: row for row in json.loads(file.read_text())["results"][0]["contenders"]}
    assert rows["hasty"]["status"] == "wrong"
    assert "times_s" not in rows["hasty"]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_wrong_gradient_is_found(monkeypatch):
    def stops_the_bias_gradient(**given):
        table = given["bias_table"]
        return OPERATORS["window"].function(**given | {"bias_table": (table.detach() + 0 * table)})

    contend(monkeypatch, "window", Contender("hasty", stops_the_bias_gradient))
    options = {"batch": 3, "dtype": "fp32", "device": "cpu", "seconds": 0.01}
    for backward, status in ((False, "timed"), (True, "wrong")):
        for result in benchmark_kernels.measure("window", "tiny", backward=backward, **options):
            assert {row.name: row.status for row in result.rows}["hasty"] == status


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_our_mistake_is_an_error(capsys, monkeypatch):
    call_ours = benchmark_kernels.call_ours

    def doubled(function, choice, **given):
        return call_ours(function, choice, **given) * (2 if choice == "torch" else 1)

    monkeypatch.setattr(benchmark_kernels, "call_ours", doubled)
    assert run("kernels", "--cases", "window/tiny", *QUICK, "--without", "flex") == 1  # which compiles for seconds
    assert "zoo's torch wrong in window/tiny, fp32, forward: relative error" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_nothing_timed_is_an_error(capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(benchmark_kernels.Operator, "contenders", (Contender("greedy", fails),))
    assert run("kernels", "--cases", "window/tiny", *QUICK) == 1
    assert "nothing could be timed" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_contenders_can_be_left_out(capsys):
    assert run("kernels", "--cases", "window/tiny", *QUICK, "--without", "flex", "sdpa") == 0
    out = capsys.readouterr().out
    assert "softmax" in out
    assert "sdpa" not in out
    assert "flex" not in out


def small_cases():
    """Of each kind, those that take no more than a second on a CPU."""
    for name in kernels.OPERATORS:
        cases = import_module(f"zoo.kernels.{name}.cases")
        yield from ((name.partition("_")[0], kind) for kind in cases.KINDS if max(cases.CASES[kind].size) <= 24)


SMALL = list(small_cases())


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "case"), SMALL, ids=["/".join(pair) for pair in SMALL])
def test_all_contenders_are_right(operator, case):
    """Whoever can run on a CPU, forward and backward."""
    options = {"batch": 1, "dtype": "fp32", "device": "cpu", "backward": True, "seconds": 0.01}
    result, _ = benchmark_kernels.measure(operator, case, **options)
    assert not [(row.name, row.reason) for row in result.rows if row.status in ("wrong", "failed")]
    assert [row.name for row in result.rows if row.status == "timed"]


def test_peak_memory_counts_what_is_held_at_once():
    def allocates():
        kept = torch.zeros(1 << 20)
        torch.zeros(1 << 20)  # freed before the next
        return kept, torch.zeros(1 << 20)

    assert benchmark_timing.peak_bytes(allocates, "cpu") == pytest.approx(2 * 4 << 20, rel=0.01)


@pytest.mark.long
@pytest.mark.slow
def test_neighborhoods_take_a_fifth_of_unfolds_memory():
    options = {"batch": 1, "dtype": "fp32", "device": "cpu", "backward": False, "seconds": 0.01}
    (result,) = benchmark_kernels.measure("neighborhood", "target-56x56x64", leave_out=("reference",), **options)
    peak = {row.name: row.peak_bytes for row in result.rows}
    assert peak["torch"] < peak["unfold"] / 5


SIMULATED = {
    "plain": ("--size 56x56 --kernel 7", {}),
    "dilated": ("--size 56x40 --kernel 7x5 --dilation 8", {"dilation": (8, 8)}),
    "strided": ("--size 33 --kernel 6 --stride 2x3 --causal", {"stride": (2, 3), "is_causal": (True, True)}),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_simulate_prints_what_the_cost_model_counts(capsys, tmp_path, case):
    line, expected = SIMULATED[case]
    file = tmp_path / "out.json"
    copies = {"num_heads": 2, "head_dim": 16, "batch": 3}
    options = f"{line} --heads 2 --head-dim 16 --batch 3 --gpu H100 --json {file}"
    assert run("simulate", *options.split()) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert len(content["tiles"]) == len(benchmark.TILES)
    for row in content["tiles"]:
        tiles = {name: tuple(row[name]) for name in ("query_tile", "key_tile")}
        settings = (tuple(content["settings"]["size"]), tuple(content["settings"]["kernel"]))
        counted = cost_model.simulate(*settings, **expected, **tiles, **copies)
        assert row["key_tiles"] == counted.key_tiles
        assert row["speedup_bound"] == counted.speedup_bound
        assert row["bytes_minimum"] == counted.bytes_minimum
        assert row["seconds"] == {"H100": cost_model.roofline_time(counted, "H100")}
        assert f" {counted.key_tiles:,} │" in out
        assert f" {counted.speedup_bound:.2f} │" in out
