"""zoo-models: what it counts and knows of each model, its filters and its command line. 15 s, slow ones 20 s."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import families, manifest
from zoo.kernels import implementation
from zoo.tools import models as tool


def run(capsys, *arguments):
    """Exit code, output and errors of a command line."""
    code = 0
    try:
        tool.main(list(arguments))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def rows(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def names(capsys, *arguments):
    return [row["name"] for row in rows(capsys, *arguments)]


# ---- figures


def count(name):
    model = timm.create_model(name, device="meta").eval()
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad(), implementation("reference"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops() // 2


_counted: dict[tuple, tuple[int, tuple[int, ...]]] = {}


def multiply_adds(model: torch.nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of a model on the meta device for one image of `input_size` (C, H, W), as PyTorch counts them.

    Matrix products and convolutions count, and nothing else. A block that was seen before, with the same settings and
    sizes, is not run again, and most blocks were: counting all models takes seconds, not a minute.
    """
    counter, repeated = FlopCounterMode(display=False), 0

    def once(block: torch.nn.Module) -> None:
        forward, settings = block.forward, _settings(block)

        def count(x: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
            nonlocal repeated
            key = (settings, *(tuple(tensor.shape) for tensor in (x, *context)))
            if key in _counted:
                flops, shape = _counted[key]
                repeated += flops
                return x.new_empty(shape)
            before = counter.get_total_flops()
            out = forward(x, *context)
            _counted[key] = counter.get_total_flops() - before, tuple(out.shape)
            return out

        block.forward = count

    blocks = [block for stage in model.stages for block in stage.blocks]
    for block in blocks:
        once(block)
    try:
        with torch.no_grad(), implementation("reference"), counter:
            model(torch.empty(1, *input_size, device="meta"))
    finally:
        for block in blocks:
            del block.forward
    return (counter.get_total_flops() + repeated) // 2


def _settings(block: torch.nn.Module) -> tuple:
    """All that decides what a block computes: types, plain attributes, shapes of parameters."""
    plain = (bool, int, float, str, tuple)
    return tuple(
        (
            type(module),
            tuple((name, value) for name, value in vars(module).items() if isinstance(value, plain)),
            tuple(tuple(parameter.shape) for parameter in module.parameters(recurse=False)),
        )
        for module in block.modules()
    )


def _extremes():
    """The smallest and the largest model of each family and of each kind of its variants, by the settings they have."""
    kinds = {}
    for name, count in manifest.counts().items():
        model = name.partition(".")[0]
        if not model.startswith("test_") and not families.tag_kwargs(name):
            settings = families.family_of(model).VARIANTS[model]
            kind = (count["family"], settings.get("layout"), frozenset(settings))
            kinds.setdefault(kind, []).append((count["parameters"], model))
    return sorted({model for found in kinds.values() for _, model in (min(found), max(found))})


COUNTED = _extremes()


@pytest.mark.long
@pytest.mark.parametrize("name", [*COUNTED[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in COUNTED[2:])])
def test_multiply_adds_are_those_of_the_whole_model(name):
    model = timm.create_model(name, device="meta").eval()
    assert multiply_adds(model, model.pretrained_cfg["input_size"]) == count(name)


def counted(name):
    """What counts.json has of a model."""
    model = timm.create_model(name, device="meta", num_classes=1000).eval()
    size = model.pretrained_cfg["input_size"]
    return {
        "family": timm.model_entrypoint(name.partition(".")[0]).__module__.removeprefix("zoo."),
        "input_size": list(size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": multiply_adds(model, size),
    }


COUNTS = Path(__file__).parents[2] / "checkpoints" / "counts.json"
TAGGED = [name for name in manifest.counts() if families.tag_kwargs(name)]
SOME = ["van_b0.in1k", *TAGGED[:1], "test_dinat", "test_biformer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_some_counts_are_right(name):
    assert manifest.counts()[name] == counted(name)


@pytest.mark.long
def test_all_counts_are_right():
    """`make tables` writes them."""
    names = [entry["name"] for entry in tool._entries() if entry["tag"]]
    names += [name for family in zoo.FAMILIES for name in timm.list_models("test_*", module=family)]
    found = {name: counted(name) for name in sorted(names)}
    if os.environ.get("ZOO_SNAPSHOT"):
        lines = (f"{json.dumps(name)}: {json.dumps(count)}" for name, count in found.items())
        COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert json.loads(COUNTS.read_text()) == found


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["dinat*", "--json"], ["--dense", "van*"], ["nothing*"]])
def test_lists_need_no_torch(arguments):
    code = (
        "import sys, contextlib, zoo.tools.models as m\n"
        f"with contextlib.suppress(SystemExit): m.main({arguments})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.slow
def test_counting_leaves_the_model_as_it_was():
    model = timm.create_model("test_van").eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    multiply_adds(model.to("meta"), (3, 64, 64))
    assert not any("forward" in vars(module) for module in model.modules())
    assert before.shape == model(image.to("meta")).shape


def test_row_has_the_manifests_facts(capsys):
    (row,) = rows(capsys, "van_b0.in1k*", "--min-top1", "1")
    assert row["name"] == "van_b0.in1k"
    assert round(row["parameters"] / 1e6, 2) == 4.11
    assert row["input_size"] == [224, 224]
    assert (row["top1"], row["top1_source"]) == (75.4, "README of the origin")
    assert row["licence"] == "apache-2.0"
    assert row["url"].endswith("van_tiny_754.pth.tar")


def test_weights_of_other_sizes_and_settings_are_counted_as_they_are(capsys):
    found = {row["name"]: row for row in rows(capsys)}
    assert found["dinat_large_384_11x11.in22k"]["input_size"] == [224, 224]
    assert found["dinat_large_384_11x11.in22k_ft_in1k_384"]["input_size"] == [384, 384]
    assert len({found[name]["parameters"] for name in TAGGED}) > 1


def test_every_recipe_has_figures_and_a_model():
    found = tool.recipes()
    assert len(found) > 150
    known = {entry["model"] for entry in tool._entries()}
    for recipe in found:
        assert recipe["model"].partition(".")[0] in known
        assert recipe.keys() & {"box_ap", "mask_ap", "miou", "miou_multi_scale", "top1"}
        assert all(20 < value < 100 for value in recipe.values() if isinstance(value, float))


def test_figures_of_a_recipe():
    (recipe,) = (recipe for recipe in tool.recipes() if recipe["recipe"] == "coco/mask_rcnn_cswin_tiny")
    assert recipe == {
        "recipe": "coco/mask_rcnn_cswin_tiny",
        "task": "coco",
        "model": "cswin_tiny",
        "expected": "49.0 box AP, 43.6 mask AP, the README's figures",
        "source": "README",
        "box_ap": 49.0,
        "mask_ap": 43.6,
    }


def test_dense_figures_are_with_the_weights_they_start_from(capsys):
    found = {row["name"]: row["dense"] for row in rows(capsys, "van_b[04]*")}
    assert {recipe["recipe"] for recipe in found["van_b0.in1k"]} == {
        "ade20k/semantic_fpn_van_b0",
        "ade20k/upernet_van_b0",
    }
    assert found["van_b0.in1k_mmseg"] == []
    assert [recipe["recipe"] for recipe in found["van_b4.in22k_mmseg"]] == ["ade20k/upernet_van_b4_in22k"]


# ---- choosing


def test_filters(capsys):
    assert names(capsys, "van*", "--max-params", "5M") == ["van_b0.in1k", "van_b0.in1k_mmseg"]
    assert names(capsys, "van_b?", "--max-macs", "0.9G", "--min-top1", "70") == ["van_b0.in1k"]
    assert names(capsys, "*_tiny", "--family", "gc_vit", "van") == ["gc_vit_tiny.in1k"]
    assert names(capsys, "*tiny", "--licence", "cc-by-nc-sa-4.0", "--max-params", "15000000") == ["gc_vit_xxtiny.in1k"]


def test_sorting(capsys):
    found = rows(capsys, "van_b[0-2]*", "--sort", "top1")
    assert [row["top1"] for row in found] == [82.8, 81.1, 75.4, None, None, None]
    found = [row["parameters"] for row in rows(capsys, "van_b[0-2]*", "--sort", "params")]
    assert found == sorted(found)


def test_models_for_tests_are_listed_on_demand(capsys):
    assert names(capsys, "test_va*") == ["test_van"]
    assert not any(name.startswith("test") for name in names(capsys, "*van*", "--max-params", "5M"))


@pytest.mark.slow
def test_all_models_and_tags_are_listed(capsys):
    found = names(capsys)
    assert found == sorted(found)
    published = {n for family in zoo.FAMILIES for n in timm.list_models(module=family, pretrained=True)}
    entries = (entry for family in zoo.FAMILIES for entry in manifest.manifest(family))
    assert set(found) == published | {f"{entry['model']}.{entry['tag']}" for entry in entries if "url" not in entry}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dinat_mni"], "there is no model 'dinat_mni': did you mean dinat_mini, "),
        (["van_b0.in22k"], "there is no model 'van_b0.in22k': did you mean van_b0.in1k"),
        (["qqqq*"], f"there is no model 'qqqq*': families are {', '.join(zoo.FAMILIES)}."),
        (["--family", "vans"], "there is no family 'vans': there are agent, biformer, casvit, cswin, "),
        (
            ["van*", "--max-params", "1K"],
            "no model passes all of these filters; licences among those named are apache-2.0.",
        ),
        (
            ["van*", "--licence", "mit"],
            "no model passes all of these filters; licences among those named are apache-2.0.",
        ),
    ],
)
def test_mistakes(arguments, message, capsys):
    code, out, errors = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert errors.startswith(f"zoo-models: error: {message}")
    assert errors.count("\n") == 1


def test_bad_number(capsys):
    code, _, errors = run(capsys, "--max-params", "many")
    assert code == 2
    assert "--max-params: got 'many'; give a number such as 30M or 4.5G; --help lists" in errors


# ---- recipes with the costs of the whole model


def test_recipes_of_a_task_have_costs_and_scores(capsys):
    found = rows(capsys, "nat_mini", "--task", "detect")
    assert [row["recipe"] for row in found] == ["coco/cascade_mask_rcnn_nat_mini", "coco/mask_rcnn_nat_mini"]
    assert [row["method"] for row in found] == ["cascade_mask_rcnn", "mask_rcnn"]
    assert [round(row["multiply_adds"] / 1e9) for row in found] == [703, 225]
    assert [round(row["parameters"] / 1e6) for row in found] == [77, 40]
    assert {tuple(row["size"]) for row in found} == {(800, 1280)}
    assert all(row["score"] == row["box_ap"] > 40 for row in found)
    assert rows(capsys, "nat_mini", "--task", "detect", "--max-macs", "300G") == found[1:]


def test_recipes_are_sorted_by_their_scores(capsys):
    found = [row["score"] for row in rows(capsys, "--family", "van", "--task", "segment", "--sort", "score")]
    assert len(found) > 5
    assert found == sorted(found, reverse=True)


def test_every_dense_recipe_is_of_one_task(capsys):
    named = [row["recipe"] for task in tool.FIGURES for row in rows(capsys, "--task", task)]
    assert len(named) == len(set(named))
    assert set(named) == {recipe["recipe"] for recipe in tool.recipes() if recipe["task"] != "imagenet"}


def test_table_of_recipes(capsys):
    code, out, _ = run(capsys, "nat_mini", "--task", "detect")
    assert code == 0
    assert re.search(r"coco/mask_rcnn_nat_mini +nat_mini.in1k +39.6 +225 +800x1280 +\d\d.\d +\d\d.\d +README", out)
    assert "of the whole model for an image of this height and width" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sort", "top1"], 2, "got --sort top1: with --task detect, the rows can be sorted by name, params, macs, "),
        (["test_van"], 1, "no recipe for task=detect is for one of these models and passes all filters: "),
        (["--dense"], 2, "argument --dense: not allowed with argument --task"),
    ],
)
def test_mistakes_with_a_task(arguments, code, message, capsys):
    found, out, errors = run(capsys, "--task", "detect", *arguments)
    assert (found, out) == (code, "")
    assert message in errors


# ---- what is printed


def test_table(capsys):
    code, out, _ = run(capsys, "van_b0", "van_b4*", "--dense")
    assert code == 0
    assert re.search(r"van_b0.in1k +4.1 +0.86 +224x224 +75.4 a +huggingface.co +apache-2.0", out)
    assert re.search(r"van_b0.in1k_mmseg .* download.openmmlab.com f \*", out)
    assert "a  README of the origin\n" in out
    assert "b  paper's figure from memory" in out
    assert "*  read its note first" in out
    assert re.search(r"van_b0.in1k +ade20k/semantic_fpn_van_b0 +38.5 +README", out)


@pytest.mark.parametrize("name", ["van_b0", "van_b4", "dinat_large.in22k", "test_gc_vit"])
def test_everything_about_one(name, capsys):
    model = name.partition(".")[0]
    code, out, _ = run(capsys, name)
    assert code == 0
    assert out.startswith(f"{model}: ")
    for label in ("family", "parameters", "mult-adds", "features", "images", "python", "commands"):
        assert label in out
    report = rows(capsys, name)
    assert report["model"] == model
    assert [weights["model"] for weights in report["weights"]] == [model] * len(report["weights"])
    for recipe in report["recipes"]:
        assert f"zoo-train recipe={recipe['recipe']} " in out
    assert ("no classifier" in out) == name.startswith("van")


def test_tag_is_used_in_the_lines(capsys):
    assert '"dinat_large.in22k", pretrained=True' in run(capsys, "dinat_large.in22k")[1]
    assert '"dinat_large.in22k_ft_in1k", pretrained=True' in run(capsys, "dinat_large")[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_van", "test_dinat"])
def test_printed_python_runs(name, capsys):
    exec("\n".join(rows(capsys, name)["python"]), {})


@pytest.mark.slow
def test_help_needs_no_torch():
    code = "import zoo.tools.models as m, sys; m.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_help_has_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "zoo-models 'dinat*' --max-params 30M --sort top1" in out


# ---- layers


@pytest.mark.slow
def test_layers_of_a_model_of_the_zoo(capsys):
    found = rows(capsys, "test_van", "--layers", "--freeze", "2")
    assert [layer["name"] for layer in found["layers"]] == ["stem", *(f"stages.{i}" for i in range(4)), "head"]
    model = timm.create_model("test_van", num_classes=1000)
    parts = [model.stem, *model.stages, model.head]
    parameters = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert [layer["parameters"] for layer in found["layers"]] == parameters
    assert [layer["trained"] for layer in found["layers"]] == [0, 0, 0, *parameters[3:]]
    with torch.no_grad():
        features = model.forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
    assert [layer["output"] for layer in found["layers"][1:5]] == [list(feature.shape[1:]) for feature in features]
    assert (found["parameters"], found["multiply_adds"]) == (sum(parameters), count("test_van"))
    assert found["layers"][-1]["multiply_adds"] == model.head.weight.numel()


def test_layers_of_a_model_of_timm_are_printed(capsys):
    """The multiply-adds of ResNet-18 are 1.8 G in its paper (arXiv 1512.03385, table 1)."""
    code, out, _ = run(capsys, "resnet18", "--layers")
    assert code == 0
    lines = [line.split() for line in out.splitlines() if line.strip()]
    [total] = [line for line in lines if line[0] == "all"]
    assert total == ["all", "11,689,512", "100.0", "%", "1,814.1", "100.0", "%"]
    assert [line[2] for line in lines if line[0].startswith("layer") and line[0] != "layer"] == [
        *("64x56x56", "128x28x28", "256x14x14", "512x7x7")
    ]


def test_layers_without_stages_that_are_listed(capsys):
    """The tokens of a class and of positions belong to no module; frozen parts and other sizes are counted."""
    found = rows(capsys, "test_vit", "--layers", "--size", "96", "96", "--freeze", "backbone")
    assert found["input_size"] == [3, 96, 96]
    others = found["layers"][-1]
    assert (others["name"], others["trained"], others["parameters"] > 64) == ("", 0, True)
    assert {layer["trained"] for layer in found["layers"] if layer["name"] == "head"} == {65000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers"], "--layers needs the name of one model"),
        (["van_b0", "van_b1", "--layers"], "--layers needs the name of one model"),
        (["van_b0", "--size", "64", "64"], "--size needs --layers: zoo-models van_b0 --layers --size"),
        (["van_b0", "--freeze", "2"], "--freeze needs --layers"),
        (["van_b0", "--layers", "--freeze", "head"], "got --freeze head: give a number of stages, or backbone"),
        (["test_van", "--layers", "--freeze", "7"], "--freeze 7: test_van has 4 stages, so it has to be from 0"),
        (["resnet1800", "--layers"], "did you mean"),
        (["test_vit", "--layers", "--size", "5", "5"], "the layers of test_vit can't be counted for images of 5x5"),
    ],
)
def test_layers_that_can_not_be_listed(arguments, message, capsys):
    code, _, err = run(capsys, *arguments)
    assert code in (1, 2)
    assert message in err
