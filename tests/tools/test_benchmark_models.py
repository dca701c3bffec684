"""zoo-bench models: its command line, and what it measures on small models. Some ten seconds."""

import io
import json
import os
import re
import statistics
from functools import partial

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import zoo
from zoo import families, manifest
from zoo.kernels import dispatch
from zoo.tools import benchmark, benchmark_models, benchmark_timing

from ..tables import RESULTS

QUICK = ("--against", "test_resnet", "--size", "64", "--batch-size", "2", "--seconds", "0.01", "--rounds", "2")
MEASURE = {"batch": 2, "size": (32, 32), "device": "cpu", "seconds": 0.01, "rounds": 2}


class Tiny(nn.Module):
    """A classifier that keeps what `zoo.kernels` was told, the mode it ran in, and the dtypes of images and logits."""

    num_classes = 10

    def __init__(self, factor=1.0):
        super().__init__()
        self.head = nn.Linear(3, 10)
        self.factor, self.calls, self.dtypes = factor, [], []

    def forward(self, x):
        self.calls.append((dispatch.current(), self.training, torch.is_grad_enabled()))
        out = self.head(x.mean((2, 3))) * self.factor
        self.dtypes.append((x.dtype, out.dtype))
        return out


class Plain(nn.Sequential):
    num_classes = 10

    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def run(*arguments):
    """The exit code of a command line."""
    try:
        benchmark.main(["models", *arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def contender(model=None, name="test_van", **settings):
    return benchmark_models.Contender(name, model, model, **settings)


@pytest.fixture
def replaced(monkeypatch):
    """Put modules in place of models, by name."""

    def replace(**models):
        create = benchmark_models._create
        monkeypatch.setattr(
            benchmark_models, "_create", lambda name, size: models[name] if name in models else create(name, size)
        )

    return replace


BAD = [
    ("maxvit_tny", 2, "there is no model 'maxvit_tny': did you mean maxvit_tiny"),
    ("test_van --against 12345", 2, "there is no model '12345': zoo-models lists"),
    (
        "test_van --kernels fast,torch",
        2,
        "got --kernels with 'fast': it takes reference, torch, triton, separated by commas",
    ),
    ("resnet18 --kernels torch", 2, "got --kernels, but no model of zoo, and no other model uses them: add one"),
    ("test_van --kernels triton", 1, "got --kernels with 'triton', which can't run here: the tensors are on cpu"),
    ("test_van --compile van_b0", 2, "got --compile with 'van_b0', which is none of the models: test_van."),
    ("test_van --picture a.png", 2, "got --picture, but none of the models has a published accuracy: leave it out"),
    ("test_van --picture a.jpg", 2, "got --picture a.jpg: its name has to end in .png, .svg, .pdf"),
    ("test_van --dtype int8", 2, "invalid choice: 'int8'"),
    ("test_van --dtype bfloat16 int8", 2, "invalid choice: 'int8'"),
    (
        "test_van --cast",
        2,
        "got --cast, but only float32, which nothing is cast to: add --dtype bfloat16 or float16",
    ),
    ("test_van --size 64x", 2, "--size: got '64x'; give rows x columns"),
    ("test_van --batch-size 0", 2, "--batch-size: got '0'; give a whole number of 1 or more"),
    ("test_van --rounds 1.5", 2, "--rounds: got '1.5'; give a whole number of 1 or more"),
]


@pytest.mark.parametrize(("line", "code", "message"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_option(capsys, line, code, message):
    assert run(*line.split()) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("zoo-bench models: error: ")
    assert error.count("\n") == 1


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("--device", "cuda") == 1
    assert "PyTorch finds no GPU: use --device cpu" in capsys.readouterr().err


def test_options():
    options = benchmark.parser().parse_args(["models", "van_b0.in1k", "--dtype", "fp32", "bf16", "--size", "96x64"])
    assert options.models == ["van_b0"]
    assert options.dtype == ["float32", "bfloat16"]
    assert options.size == (96, 64)


def test_defaults():
    options = benchmark.parser().parse_args(["models"])
    assert (options.dtype, options.cast, options.compile, options.training) == (["float32"], False, (), True)


def test_default_models_are_ours_and_known():
    assert all(map(benchmark_models.is_ours, benchmark.MODELS))
    assert not benchmark_models.is_ours(benchmark.AGAINST)


IN_TIMM = {
    name: other
    for family in zoo.FAMILIES
    for name in timm.list_models(module=family)
    if (other := families.timm_name(name))
}


@pytest.mark.parametrize("ours", IN_TIMM)
def test_timms_model_exists(ours):
    other = IN_TIMM[ours]
    assert benchmark_models.is_ours(ours)
    assert not benchmark_models.is_ours(other)
    assert timm.get_pretrained_cfg(other).input_size == timm.get_pretrained_cfg(ours).input_size


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["maxvit_tiny", "maxvit_tiny_384", "gc_vit_tiny"])
def test_timms_model_is_the_same(ours):
    with torch.device("meta"):
        models = [timm.create_model(name) for name in (ours, IN_TIMM[ours])]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[0] == pytest.approx(counts[1], rel=0.005)


@pytest.mark.parametrize(("name", "value"), [("maxvit_tiny", 83.62), ("dinat_mini", 81.8), ("test_van", None)])
def test_accuracy_is_the_manifests(name, value):
    assert benchmark_models.top1(name) == value


@pytest.fixture
def figure():
    """The picture of models with times in units of the first."""

    def figure(ratios, peers, modes=(("float32", False),)):
        made, rows = [], {}
        for name, ratio in ratios.items():
            for number, (dtype, compiled) in enumerate(modes):
                one = contender(name=name, peer=peers.get(name), dtype=dtype, compiled=compiled)
                made.append(one)
                rows[one.label] = benchmark_models.Row(one.label, ratios=[ratio / (1 + 0.2 * number)])
        return benchmark_models.picture(made, {"inference": rows}, "a machine")

    return figure


CLOSE = {
    **{"swin_tiny_patch4_window7_224": 1.0, "van_b2": 0.49, "dinat_mini": 0.5, "nat_mini": 0.51},
    **{"gc_vit_tiny": 0.88, "gcvit_tiny": 1.2, "gc_vit_xxtiny": 0.48, "biformer_tiny": 0.52},
}


ALL_MODES = (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))


@pytest.mark.slow
@pytest.mark.parametrize("modes", [ALL_MODES[:1], ALL_MODES], ids=["one mode", "all modes"])
def test_labels_of_the_picture_touch_nothing(figure, modes):
    made = figure(CLOSE, {"gc_vit_tiny": "gcvit_tiny"}, modes)
    made.draw_without_rendering()
    assert len(made.axes) == max(1, len(modes) // 2)
    for axes in made.axes:
        labels = [text.get_window_extent() for text in axes.texts if text.get_text() not in ("better", "")]
        dots = [
            axes.transData.transform(line.get_xydata())[0] for line in axes.lines if line.get_marker() in ("o", "D")
        ]
        assert len(labels) == 8
        assert len(dots) == 8 * (1 if len(modes) == 1 else 2)
        assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
        assert not any(label.contains(*dot) for label in labels for dot in dots)


@pytest.mark.slow
def test_labels_of_the_readmes_picture_touch_nothing(figure):
    measured = json.loads(RESULTS.read_text())["models"]
    ratios = {one["name"]: one["inference"]["ratio"]["median"] for one in measured if one["dtype"] == "float32"}
    made = figure(ratios, {one["name"]: one["timm"] for one in measured})
    made.draw_without_rendering()
    (axes,) = made.axes
    labels = [text.get_window_extent() for text in axes.texts if text.get_text() not in ("better", "")]
    assert len(labels) > 20
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])


def test_picture_has_a_panel_for_each_dtype_and_diamonds_for_compiled_models(figure):
    made = figure({"swin_tiny_patch4_window7_224": 1.0, "van_b2": 0.5}, {}, ALL_MODES)
    assert [axes.get_title("left") for axes in made.axes] == [
        "float32, diamonds: compiled",
        "bfloat16, diamonds: compiled",
    ]
    points = {line.get_marker(): line.get_xdata()[0] for line in made.axes[1].lines[2:]}
    assert points == {"o": pytest.approx(1.4 / 0.5), "D": pytest.approx(1.6 / 0.5)}
    assert made.axes[1].get_xlabel() == "inference, images per second, in units of swin_tiny_patch4_window7_224's"


def test_picture_has_the_unit_at_its_accuracy_and_a_colour_for_each_family(figure):
    axes = figure(CLOSE, {"gc_vit_tiny": "gcvit_tiny"}).axes[0]
    at = {text.get_text(): text.xy for text in axes.texts}
    assert at["swin_tiny_patch4_window7_224"] == (1, 81.3)
    assert at["gc_vit_tiny"] == (1 / 0.88, 83.5)
    colours = {tuple(line.get_xydata()[0]): line.get_color() for line in axes.lines if line.get_fillstyle() == "full"}
    found = {name: colours[at[name]] for name in at if at[name] in colours and name != "timm's"}
    assert found["gc_vit_tiny"] == found["gc_vit_xxtiny"]
    assert found["nat_mini"] == found["dinat_mini"]
    assert len(set(found.values())) == 5
    assert axes.figure.get_suptitle() == "Speed and published accuracy\na machine"
    assert "better" in at


@pytest.mark.slow
def test_table_json_and_picture(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_models, "timm_name", {"test_van": "test_vit"}.get)
    monkeypatch.setattr(benchmark_models, "top1", {"test_van": 75.0}.get)
    files = ("--json", str(tmp_path / "sub" / "out.json"), "--picture", str(tmp_path / "out.png"))
    assert run("test_van", "test_cswin", *QUICK, "--kernels", "torch,reference", *files) == 0
    printed = capsys.readouterr()
    assert "reference" in printed.out
    for what in ("inference", "training"):
        assert f"{what}: time in units of test_resnet's\n" in printed.out
    assert "/ timm's: time divided by that of timm's model of the family" in printed.out
    assert "/ float32" not in printed.out
    assert "[2/2] training, 6 contenders" in printed.err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    content = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert content["command"].startswith("zoo-bench models test_van test_cswin --against test_resnet ")
    assert content["machine"]["timm"] == timm.__version__
    assert content["settings"]["batch_size"] == 2
    assert content["settings"]["dtype"] == ["float32"]
    assert [(entry["name"], entry["kernels"], entry["ours"]) for entry in content["models"]] == [
        ("test_resnet", None, False),
        ("test_van", "torch", True),
        ("test_van", "reference", True),
        ("test_vit", None, False),
        ("test_cswin", "torch", True),
        ("test_cswin", "reference", True),
    ]
    unit, van = content["models"][:2]
    assert (van["timm"], van["top1"]) == ("test_vit", 75.0)
    assert van["parameters"] == sum(p.numel() for p in timm.create_model("test_van").parameters())
    for what in ("inference", "training"):
        assert unit[what]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert len(van[what]["times_s"]) >= 2
        assert van[what]["images_per_s"] == pytest.approx(2 / van[what]["median_s"])
        assert van[what]["compile_s"] is None
        assert van[what]["ratio_to_timm"]["low"] > 0
    assert van["training"]["peak_bytes"] > van["inference"]["peak_bytes"] > 0


@pytest.mark.slow
def test_all_modes_stand_in_one_table(capsys, monkeypatch, replaced, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its own takes a minute
    replaced(test_van=Plain(), test_resnet=Plain())
    file = tmp_path / "out.json"
    assert run("test_van", *QUICK, "--dtype", "fp32", "bf16", "--cast", "--compile", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    modes = ["float32", "float32, compiled", "bfloat16", "bfloat16, compiled", "bfloat16 cast"]
    modes.append("bfloat16 cast, compiled")
    for table in printed.split("weights ")[1:]:
        lines = [line.strip().split("  ")[0] for line in table.splitlines()]
        assert lines[2 : 2 + 14] == ["test_resnet", *modes, "test_van", *modes]
    assert "inference: time in units of test_resnet's in float32\n" in printed
    assert "/ float32: time divided by that of the same model in float32\n" in printed
    assert "/ eager: time divided by that of the same model without compilation\n" in printed
    assert re.search(r"of a linear layer of 1024, [\d,]+ in float32 by [\w. ]+, [\d,]+ in bfloat16 by ", printed)

    content = json.loads(file.read_text())
    assert content["settings"]["dtype"] == ["float32", "bfloat16"]
    assert content["settings"]["cast"] is True
    assert content["settings"]["compile"] == ["test_van"]
    for what in ("inference", "training"):
        assert [(p["dtype"], p["features"]) for p in content["matmul"][what]] == [("float32", 1024), ("bfloat16", 1024)]
    entries = {(e["name"], e["dtype"], e["cast"], e["compiled"]): e["inference"] for e in content["models"]}
    assert len(entries) == 12
    plain, fast = entries["test_van", "float32", False, False], entries["test_van", "bfloat16", True, True]
    same = entries["test_van", "float32", False, True]
    assert not {"ratio_to_timm", "ratio_to_float32", "ratio_to_eager"} & set(plain)
    ratios = [a / b for a, b in zip(fast["times_s"], same["times_s"], strict=True)]
    assert fast["ratio_to_float32"]["median"] == pytest.approx(statistics.median(ratios))
    assert "ratio_to_timm" not in fast
    assert fast["matmul_share"]["median"] > 0


@pytest.mark.slow
def test_inference_alone_has_no_training(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert run("test_van", *QUICK, "--no-training", "--json", str(file), "--dtype", "bfloat16") == 0
    content = json.loads(file.read_text())
    assert "training" not in content["models"][1]
    assert list(content["matmul"]) == ["inference"]
    printed = capsys.readouterr().out
    assert "inference: time in units of test_resnet's\n" in printed
    assert "training" not in printed


@pytest.mark.slow
def test_training_alone_has_no_inference(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert run("test_van", *QUICK, "--no-inference", "--json", str(file)) == 0
    content = json.loads(file.read_text())
    assert "inference" not in content["models"][1]
    assert list(content["matmul"]) == ["training"]
    printed = capsys.readouterr().out
    assert "training: time in units of test_resnet's\n" in printed
    assert "inference" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-inference", "--no-training"], "got --no-inference and --no-training, which leaves nothing to time"),
        (["--no-inference", "--picture", "x.png"], "got --picture and --no-inference, but it shows that of inference"),
    ],
)
def test_passes_that_leave_nothing_to_show(capsys, arguments, message):
    assert run("test_van", *QUICK, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["inference", "training"])
def test_table_of_all_modes_has_120_columns(what):
    made, rows = [], {}
    for name in (benchmark.AGAINST, *benchmark.MODELS):
        for dtype, compiled in ALL_MODES:
            one = contender(nn.Linear(9, 9), name, dtype=dtype, compiled=compiled, peer=families.timm_name(name))
            made.append(one)
            rows[one.label] = benchmark_models.Row(one.label, times=[12.345], ratios=[1.234], peak_bytes=12345 << 20)
            row = rows[one.label]
            row.against = {key: [1.234] for key in benchmark_models.BASELINES}
            row.shares, row.compile_seconds = [0.123], 123.4
    table = benchmark_models.table(made, rows, 4, what)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert all(line.count("12345") == 2 for line in text.splitlines() if "float" in line and "/" not in line)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120


@pytest.mark.slow
def test_contenders_stand_once_and_the_unit_first():
    names = ["test_van", "test_resnet", "test_van"]
    made = benchmark_models.contenders(names, "test_resnet", size=(64, 64), device="cpu", compiled=names)
    assert [c.label for c in made] == ["test_resnet", "test_resnet, compiled", "test_van", "test_van, compiled"]


@pytest.mark.slow
def test_only_named_contenders_are_compiled():
    names = ["test_van", "test_maxvit", "test_vit"]
    made = benchmark_models.contenders(names, "test_resnet", size=(64, 64), device="cpu", compiled=["test_maxvit"])
    compiled = {contender.name for contender in made if contender.compiled}
    assert compiled == {"test_resnet", "test_maxvit", *filter(None, [families.timm_name("test_maxvit")])}


@pytest.mark.slow
def test_contenders_of_several_dtypes():
    settings = {"dtypes": ("float32", "bfloat16"), "cast": True, "choices": ("torch",)}
    made = benchmark_models.contenders(["test_van"], "test_resnet", size=(64, 64), device="cpu", **settings)
    assert [c.label for c in made[3:]] == [
        "test_van, torch kernels",
        "test_van, bfloat16, torch kernels",
        "test_van, bfloat16 cast, torch kernels",
    ]
    assert [next(c.model.parameters()).dtype for c in made[3:]] == [torch.float32, torch.float32, torch.bfloat16]
    assert made[5].baselines() == {"float32": "test_van, torch kernels"}
    assert len({c.flops for c in made[3:]}) == 1


def test_fixed_models_are_made_for_the_size():
    [vit] = benchmark_models.contenders([], "test_vit", size=(64, 96), device="cpu")
    assert vit.model(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in manifest.counts() if name.startswith("test_")])
def test_operations_are_those_of_zoo_models(name):
    model, count = timm.create_model(name), manifest.counts()[name]
    assert benchmark_models.count_flops(model, tuple(count["input_size"][1:])) == 2 * count["multiply_adds"]


def test_operations_of_fused_attention_count():
    """A vision transformer by hand: patches, then per block QKV, scores, values, projection and MLP, then the head."""
    model = timm.create_model("test_vit", img_size=(64, 96))
    dim, tokens = model.embed_dim, 4 * 6 + 1
    block = tokens * dim * dim * (3 + 1 + 2 * model.blocks[0].mlp.fc1.out_features / dim) + 2 * tokens**2 * dim
    expected = (tokens - 1) * 3 * 16 * 16 * dim + len(model.blocks) * block + dim * 1000
    assert benchmark_models.count_flops(model, (64, 96)) == 2 * expected


def test_operations_of_a_model_that_fails_are_unknown():
    assert benchmark_models.count_flops(nn.Sequential(nn.Linear(7, 7)), (32, 32)) is None


@pytest.mark.slow
@pytest.mark.parametrize("fastest", ["nn.Linear", "1x1 convolution"])
def test_product_is_by_the_fastest_way(monkeypatch, fastest):
    def alternately(ways, *_, **__):
        assert set(ways) == {"nn.Linear", "1x1 convolution"}
        outs = [
            ways[way]().reshape(1, 1024, 1, 4096) if "conv" in way else ways[way]().T[None, :, None] for way in ways
        ]
        torch.testing.assert_close(*outs)
        return {way: [1.0 if way == fastest else 2.0] for way in ways}

    monkeypatch.setattr(benchmark_timing, "alternately", alternately)
    product = benchmark_models.product("float32", "cpu")
    assert (product.way, product.flops) == (fastest, 2 * 4096 * 1024 * 1024)
    assert product.run().numel() == 4096 * 1024


@pytest.mark.parametrize(
    ("settings", "images", "logits"),
    [
        ({}, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"dtype": "bfloat16", "cast": True}, torch.bfloat16, torch.bfloat16),
    ],
    ids=["float32", "autocast", "cast"],
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_dtype_is_that_of_autocast_or_of_the_model(settings, images, logits, training):
    model = Tiny().to(images)
    [row] = benchmark_models.measure([contender(model, **settings)], training, **MEASURE).values()
    assert row.status == "timed"
    assert set(model.dtypes) == {(images, logits)}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_pass_runs_as_said(training):
    model = Tiny()
    rows = benchmark_models.measure([contender(model, choice="reference")], training, **MEASURE)
    assert rows["test_van, reference kernels"].status == "timed"
    assert set(model.calls) == {("reference", training, training)}
    assert dispatch.current() == "auto"
    assert model.head.weight.grad is None  # or the memory of a step would be another at its start


def test_training_steps_memory_holds_the_gradients():
    model = Tiny()
    model.wide = nn.Linear(1000, 1000, bias=False)
    model.forward = lambda x: model.head(x.mean((2, 3))) + model.wide.weight.sum()
    rows = {
        training: benchmark_models.measure([contender(model)], training, **MEASURE)["test_van"]
        for training in (False, True)
    }
    assert rows[False].peak_bytes < 4_000_000 <= rows[True].peak_bytes


def test_ratios_are_of_the_same_turn(monkeypatch):
    times = {"test_resnet": [1.0, 10.0, 2.0], "test_van": [2.0, 20.0, 8.0]}
    monkeypatch.setattr(benchmark_timing, "alternately", lambda *_: times)
    pair = [contender(Tiny(), "test_resnet"), contender(Tiny())]
    assert benchmark_models.measure(pair, False, **MEASURE)["test_van"].ratios == [2.0, 2.0, 4.0]


def test_times_are_compared_with_those_of_the_same_turn(monkeypatch):
    times = {
        "test_resnet": [1.0, 1.0, 1.0],
        "test_van": [4.0, 40.0, 8.0],
        "test_van, compiled": [2.0, 40.0, 2.0],
        "test_van, bfloat16": [1.0, 10.0, 2.0],
        "test_van, bfloat16, compiled": [1.0, 4.0, 2.0],
        "test_vit": [8.0, 40.0, 8.0],
        "test_vit, bfloat16, compiled": [4.0, 4.0, 4.0],
        "matrix product, float32": [1.0, 4.0, 1.0],
        "matrix product, bfloat16": [0.5, 1.0, 1.0],
    }
    monkeypatch.setattr(benchmark_timing, "alternately", lambda *_: times)
    modes = [{}, {"compiled": True}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "compiled": True}]
    made = [contender(Tiny(), "test_resnet"), *(contender(Tiny(), peer="test_vit", flops=10, **mode) for mode in modes)]
    made += [contender(Tiny(), "test_vit", **mode) for mode in (modes[0], modes[3])]
    products = tuple(
        benchmark_models.Product(dtype, "nn.Linear", 2, 5, lambda: None) for dtype in ("float32", "bfloat16")
    )  # 40 operations
    rows = benchmark_models.measure(made, False, **MEASURE, products=products)
    assert rows["test_van"].against == {"timm": [0.5, 1.0, 1.0]}
    assert rows["test_van, compiled"].against == {"eager": [0.5, 1.0, 0.25]}
    assert rows["test_van, bfloat16"].against == {"float32": [0.25, 0.25, 0.25]}
    assert rows["test_van, bfloat16, compiled"].against == {
        "timm": [0.25, 1.0, 0.5],
        "float32": [0.5, 0.1, 1.0],
        "eager": [1.0, 0.4, 1.0],
    }
    assert rows["test_van"].shares == [20 / 40 / ratio for ratio in (4.0, 10.0, 8.0)]
    assert rows["test_van, bfloat16"].shares == [20 / 40 / ratio for ratio in (2.0, 10.0, 2.0)]
    assert rows["test_vit"].shares == []
    training = benchmark_models.measure(made, True, **MEASURE, products=products)
    assert training["test_van"].shares == pytest.approx([3 * share for share in rows["test_van"].shares])


def test_summary_has_the_median_and_the_largest_ratio():
    ratios = {"test_van": (0.5, 0.9), "test_cswin": (0.7, 0.8), "test_dinat": (0.6, 1.2), "test_resnet": (9.0, 9.0)}
    made, rows = [], {}
    for name, (half, eager) in ratios.items():
        for compiled in (False, True):
            one = contender(name=name, dtype="bfloat16", compiled=compiled)
            made.append(one)
            rows[one.label] = benchmark_models.Row(one.label, against={"float32": [half] * 3})
        rows[one.label].against = {"eager": [eager] * 3, "float32": [half + 0.1] * 3}
    assert benchmark_models.summary(made, rows) == [
        "median of zoo's models (largest): bfloat16 / float32 0.60 (0.70 for test_cswin); "
        "bfloat16, compiled / float32 0.70 (0.80 for test_cswin); "
        "bfloat16, compiled / eager 0.90 (1.20 for test_dinat)"
    ]
    assert benchmark_models.summary(made[:2], rows) == []


def test_turns_begin_with_another_each_time():
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    times = benchmark_timing.alternately(runs, "cpu", 1e-9, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.slow
def test_our_result_that_is_not_finite_is_an_error(capsys, replaced):
    replaced(test_van=Tiny(factor=float("nan")))
    assert run("test_van", "test_cswin", *QUICK, "--no-training") == 1
    printed = capsys.readouterr()
    assert "not timed: test_van, inference: FloatingPointError: the output is not finite" in printed.out
    assert "zoo's test_van failed in inference: FloatingPointError: the output is not finite." in printed.err
    assert "test_cswin" in printed.out


def test_gradient_that_is_not_finite_is_found():
    model = Tiny()
    model.head.weight.register_hook(lambda grad: grad / 0)
    row = benchmark_models.measure([contender(model)], True, **MEASURE)["test_van"]
    assert (row.status, row.reason) == ("failed", "FloatingPointError: the gradient of head.weight is not finite")


@pytest.fixture
def compiler(monkeypatch):
    """Replace the compiler by one that fails for some models, as torch's does."""

    def compiler(*broken):
        def compile(model, **_):
            def fail(x):
                raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No C++ compiler\n\nSet a variable")

            return fail if model in broken else model

        monkeypatch.setattr(torch, "compile", compile)

    return compiler


@pytest.mark.slow
def test_compiled_model_that_fails_is_named_with_the_reason_and_the_rest_goes_on(capsys, replaced, compiler):
    models = {"test_van": Plain(), "test_resnet": Plain()}
    replaced(**models)
    compiler(models["test_van"])
    assert run("test_van", *QUICK, "--dtype", "fp32", "bf16", "--no-training", "--compile") == 1
    printed = capsys.readouterr()
    assert (
        "not timed: test_van, compiled; test_van, bfloat16, compiled, inference: "
        "RuntimeError: backend='inductor' raised: InvalidCxxCompiler: No C++ compiler\n"
    ) in printed.out
    assert "zoo's test_van, compiled failed in inference: RuntimeError: backend='inductor' raised: " in printed.err
    lines = [line.split() for line in printed.out.splitlines() if line.startswith("  float32")]
    assert [len(line) > 5 for line in lines] == [True, True, True, False]


@pytest.mark.slow
def test_compiled_model_of_timm_that_fails_is_no_error(capsys, replaced, compiler):
    models = {"test_vit": Plain(), "test_resnet": Plain()}
    replaced(**models)
    compiler(models["test_vit"])
    assert run("test_vit", *QUICK, "--no-training", "--compile") == 0
    assert "not timed: test_vit, compiled, inference: RuntimeError" in capsys.readouterr().out


@pytest.mark.slow
def test_another_that_fails_is_named_and_the_rest_goes_on(capsys, replaced):
    replaced(test_vit=Tiny(factor=float("inf")))
    assert run("test_van", "test_vit", *QUICK, "--no-training") == 0
    assert "not timed: test_vit, inference: FloatingPointError" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_unit_there_is_an_error(capsys, replaced):
    replaced(test_resnet=Tiny(factor=float("nan")))
    assert run("test_van", *QUICK, "--no-training") == 1
    error = capsys.readouterr().err
    assert "test_resnet, the unit, failed in inference (FloatingPointError: " in error
    assert error.endswith("choose another with --against.\n")


@pytest.mark.slow
def test_compiled_models_have_a_line_and_a_compile_time(capsys, monkeypatch, replaced, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # its own takes a minute
    replaced(test_van=Plain(), test_resnet=Plain())
    file = tmp_path / "out.json"
    assert run("test_van", *QUICK, "--compile", "--json", str(file)) == 0
    assert re.search(r"compiled *\n.* MiB +in s", capsys.readouterr().out)
    entries = {(e["name"], e["compiled"]): e for e in json.loads(file.read_text())["models"]}
    assert entries["test_van", True]["training"]["compile_s"] > 0
    assert entries["test_van", False]["training"]["compile_s"] is None


def test_compiler_is_fresh_for_a_while(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    with benchmark_models.fresh_compiler("cpu", 40):
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert os.listdir(folder) == []
        assert torch._dynamo.config.recompile_limit == 40
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert not os.path.exists(folder)


@pytest.mark.long
@pytest.mark.slow
def test_compiled_in_earnest(tmp_path):
    file = tmp_path / "out.json"
    modes = ("--dtype", "fp32", "bf16", "--compile")
    assert run("test_van", *QUICK, *modes, "--no-training", "--json", str(file)) == 0
    assert all(entry["inference"]["status"] == "timed" for entry in json.loads(file.read_text())["models"])


def test_choices_are_those_of_the_operators():
    assert set(benchmark.PATHS) == set(dispatch.CHOICES) - {"auto"}
