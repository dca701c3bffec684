"""The table of Nsight's counters that tests/gpu/kernel_times.py makes, without a GPU. Seconds."""

import csv
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "kernel_times.py"
RANGE = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
NAMES = {
    "Kernel Name": ("", "_fwd_kernel", "_bwd_kernel"),
    RANGE: ("", '2072 "<default domain>:window_attention/some-case forward:none:none:none:none:none:none"', ""),
    "gpu__time_duration.sum": ("ns", "92,384", "1,000"),
    "sm__inst_executed.sum": ("inst", "43,479,040", "5,000,000"),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("%", "53.38", "24"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "23.66", "12"),
    "dram__bytes.sum": ("byte", "201,516,544", "0"),
    "l1tex__data_pipe_lsu_wavefronts.sum": ("", "5,780,933", "0"),
    "launch__registers_per_thread": ("register/thread", "128", "216"),
    "launch__grid_dim_x": ("", "1,024", "512"),
    "device__attribute_clock_rate": ("", "1", "1"),
}


def test_each_listed_case_is_one_of_its_operator():
    script = runpy.run_path(str(SCRIPT))
    assert len(script["LISTED"]) == sum(map(len, script["CASES"].values()))
    for operator, case in script["LISTED"]:
        assert case in import_module(f"zoo.kernels.{operator}.cases").CASES


def write(path, names):
    """A file as ncu writes it, with what it prints besides."""
    with path.open("w") as file:
        file.write("==PROF== Connected to process 2072 (/usr/bin/python3.12)\n")
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(names)
        rows.writerows(zip(*names.values(), strict=True))
        file.write("==PROF== Disconnected from process 2072\n")


@pytest.fixture
def run(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--counters", *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return call


@pytest.mark.slow
def test_table_and_json(run, capsys, tmp_path):
    write(tmp_path / "counters.csv", NAMES)
    run(tmp_path / "counters.csv", "--json", tmp_path / "counters.json")
    head, case, forward, backward = capsys.readouterr().out.splitlines()
    assert case == "window_attention/some-case"
    assert forward.split() == ["92.4", "43.48", "53%", "24%", "201.5", "5.78", "128", "1024", "_fwd_kernel"]
    assert backward.split()[:2] == ["1.0", "5.00"]
    assert head.index("kernel") == forward.index("_fwd_kernel")
    first, second = json.loads((tmp_path / "counters.json").read_text())
    assert first == {
        "case": "window_attention/some-case", "kernel": "_fwd_kernel", "us": pytest.approx(92.384),
        "warp_instructions": 43_479_040, "issued_percent": 53.38, "warps_percent": 23.66, "dram_bytes": 201_516_544,
        "wavefronts": 5_780_933, "registers": 128, "programs": 1024,
    }  # fmt: skip
    assert (second["case"], second["kernel"]) == (first["case"], "_bwd_kernel")


@pytest.mark.slow
def test_missing_file_and_missing_metric(run, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*none\.csv; ncu writes it with --csv --page raw --log-file\."):
        run(tmp_path / "none.csv")
    write(tmp_path / "few.csv", {name: cells for name, cells in NAMES.items() if name != "dram__bytes.sum"})
    with pytest.raises(SystemExit, match=r"few\.csv has no dram__bytes\.sum; tools/gpu_session\.sh counts them\."):
        run(tmp_path / "few.csv")
