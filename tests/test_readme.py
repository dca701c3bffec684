"""Code in the README runs, its commands are known, and its figures are true. Some seconds, slow ones 15 s."""

import copy
import json
import re

import pytest

from zoo.tools import benchmark

from . import pages, tables
from .pages import ROOT

README = ROOT / "README.md"
TEXT = README.read_text()


@pytest.mark.slow
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block.text for block in pages.blocks(README) if block.language == "python")
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("command", pages.commands(pages.blocks(README)), ids=" ".join)
def test_command_composes(command, tmp_path):
    """The training of a command is not run here, but its keys, groups and values have to be right."""
    pages.check_command(command, tmp_path)


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", TEXT)) <= targets


@pytest.mark.parametrize("path", pages.links(README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "figure"), re.findall(r"\| `(\w+)` \| ([\d.]+) M \|", TEXT))
def test_parameter_counts(name, figure):
    import timm
    import torch

    import zoo  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == figure


# ---- the tables of speed


def entry(name, parameters, ratios, *, timm=None, ours=True, top1=None, compiled=False, dtype="float32"):
    """What zoo-bench models writes of a model in one mode; a ratio of None is a failure."""
    made = {"name": name, "dtype": dtype, "cast": False, "compiled": compiled, "ours": ours, "timm": timm}
    made |= {"parameters": parameters, "top1": top1}
    for what, ratio in zip(("inference", "training"), ratios, strict=True):
        figures = {"ratio": {"median": ratio}, "matmul_share": {"median": 0.3}, "times_s": [1.0] * 12}
        made[what] = {"status": "failed"} if ratio is None else {"status": "timed", **figures}
    return made


@pytest.fixture
def results(monkeypatch):
    """Results of a family with one model, which timm has, too."""
    monkeypatch.setattr(tables.zoo, "FAMILIES", ("gc_vit",))
    about = {"names": {"GC ViT": "2206"}, "examples": ["gc_vit_tiny"]}
    monkeypatch.setattr(tables.manifest, "about", lambda family: about)
    monkeypatch.setattr(tables.manifest, "examples", lambda family: tuple(about["examples"]))
    unit = {"name": "swin", "parameters": 28.3e6, "ours": False, "top1": 81.3}
    ours = {"name": "gc_vit_tiny", "parameters": 28.2e6, "timm": "gcvit_tiny", "top1": 83.5}
    other = {"name": "gcvit_tiny", "parameters": 28.2e6, "ours": False}
    fast = {"dtype": "bfloat16", "compiled": True}
    models = [
        *(entry(ratios=(1.0, 1.0), **unit), entry(ratios=(0.4, 0.5), **unit, **fast)),
        *(entry(ratios=(0.88, 0.9), **ours), entry(ratios=(0.312, None), **ours, **fast)),
        *(entry(ratios=(1.19, 1.3), **other), entry(ratios=(0.6, 0.7), **other, **fast)),
    ]
    return {
        "command": "zoo-bench models --threads 2 --json docs/a.json --compile --picture b.png",
        "machine": {"cpu": "AMD EPYC", "threads": 2, "torch": "2.15.0+cpu", "timm": "1.0.31"},
        "settings": {"against": "swin", "size": [224, 224], "compile": True, "batch_size": 4},
        "matmul": {"inference": [{"dtype": "float32", "flops_per_s": 511.4e9, "features": 1024}]},
        "models": models,
    }


def test_table_of_speed(results):
    lines = list(tables.speed(results))
    assert lines[:6] == [
        "| family | model | parameters | top-1 | float32 | bfloat16, compiled |",
        "|---|---|---|---|---|---|",
        "| [GC ViT](https://arxiv.org/abs/2206) | `gc_vit_tiny` | 28.2 M | 83.5 % | 0.88 / 0.90 | 0.31 / failed |",
        "| | timm's `gcvit_tiny` | 28.2 M |  | 1.19 / 1.30 | 0.60 / 0.70 |",
        "| [Swin](https://arxiv.org/abs/2103.14030) | timm's `swin` | 28.3 M | 81.3 % | 1.00 / 1.00 | 0.40 / 0.50 |",
        "",
    ]
    assert max(map(len, lines[6:])) <= 120
    text = " ".join(lines[6:])
    assert text == (
        "Times of inference / training, in units of those of timm's `swin` in float32; lower is faster. They are "
        "medians (turns: 12 for inference, 12 for training) of "
        "`zoo-bench models --threads 2 --compile` for 4 images of 224x224 with 2 threads of an AMD EPYC, torch 2.15.0 "
        "and timm 1.0.31."
    )


def test_table_of_speed_names_what_was_not_measured(results):
    tables.manifest.about("gc_vit")["examples"].append("gc_vit_new")
    lines = list(tables.speed(results))
    assert not any("gc_vit_new" in line for line in lines[:5])
    assert " ".join(lines).endswith("Not measured yet: `gc_vit_new`.")


def test_tables_leave_out_modes_that_a_model_was_not_measured_in(results):
    results["models"] = [one for one in results["models"] if one["name"] != "gc_vit_tiny" or not one["compiled"]]
    assert next(line for line in tables.speed(results) if "gc_vit_tiny" in line).endswith("| 0.88 / 0.90 |  |")
    assert next(line for line in tables.shares(results) if "gc_vit_tiny" in line).endswith("| 30% / 30% |  |")


def test_table_of_shares(results):
    lines = list(tables.shares(results))
    assert lines[:5] == [
        "| model | float32 | bfloat16, compiled |",
        "|---|---|---|",
        "| timm's `swin` | 30% / 30% | 30% / 30% |",
        "| `gc_vit_tiny` | 30% / 30% | 30% / failed |",
        "| timm's `gcvit_tiny` | 30% / 30% | 30% / 30% |",
    ]
    assert "which reached 511 GFLOP/s in float32 with 2 threads of an AMD EPYC." in " ".join(lines[6:])


def test_table_of_compiled_models(results):
    for model in results["models"]:
        for what in ("inference", "training"):
            if model[what]["status"] == "timed":
                model[what]["ratio_to_eager"] = {"median": 0.91}
                if model["name"] == "gc_vit_tiny":
                    model[what]["ratio_to_timm"] = {"median": 0.85}
    inference, training = copy.deepcopy(results), copy.deepcopy(results)
    for one, other in ((inference, "training"), (training, "inference")):
        for model in one["models"]:
            del model[other]
    lines = list(tables.compiled([inference, training]))
    heads = (f"{what}, bfloat16, / eager | {what}, bfloat16, / timm's compiled" for what in ("inference", "training"))
    assert lines[:6] == [
        f"| model | {' | '.join(heads)} |",
        "|---|---|---|---|---|",
        "| timm's `swin` | 0.91 |  | 0.91 |  |",
        "| `gc_vit_tiny` | 0.91 | 0.85 | failed |  |",
        "| timm's `gcvit_tiny` | 0.91 |  | 0.91 |  |",
        "",
    ]
    assert "(turns: 12 for inference, 12 for training) for 4 images of 224x224" in " ".join(lines)


def test_table_of_sizes(results):
    for model in results["models"]:
        model["inference"] |= {"median_s": 0.256, "peak_bytes": 1500 << 20}
    results["models"] = [one for one in results["models"] if not one["compiled"]]
    large = copy.deepcopy(results)
    large["settings"]["size"] = [1024, 1024]
    large["models"][1]["inference"] = {"status": "failed"}
    del large["models"][2]
    lines = list(tables.sizes([results, large]))
    assert lines[:5] == [
        "| model | 224x224 | 1024x1024 |",
        "|---|---|---|",
        "| timm's `swin` | 0.26 s, 1,500 MiB | 0.26 s, 1,500 MiB |",
        "| `gc_vit_tiny` | 0.26 s, 1,500 MiB | failed |",
        "| timm's `gcvit_tiny` | 0.26 s, 1,500 MiB | failed |",
    ]
    assert "`make sizes` measured both with 2 threads of an AMD EPYC, torch 2.15.0 and timm 1.0.31." in " ".join(lines)


def test_results_have_examples_in_float32_and_bfloat16():
    """`make speed` measures them all. The README names those that have joined since."""
    results = json.loads(tables.RESULTS.read_text())
    modes = {(each["name"], each["dtype"]) for each in results["models"] if each["inference"]["status"] == "timed"}
    measured = {name for name, _ in modes}
    assert {(name, dtype) for name in measured for dtype in ("float32", "bfloat16")} == modes
    assert measured & set(benchmark.MODELS)
    assert results["settings"]["against"] == benchmark.AGAINST
    assert results["settings"]["size"] == [224, 224]
