"""zoo-bench models: its command line, and what it measures on small models. Some ten seconds."""

import json
import os
from functools import partial

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo import families
from zoo.kernels import dispatch
from zoo.tools import benchmark, benchmark_models, benchmark_timing

QUICK = ("--against", "test_resnet", "--size", "64", "--batch-size", "2", "--seconds", "0.01", "--rounds", "2")
MEASURE = {"batch": 2, "size": (32, 32), "dtype": torch.float32, "device": "cpu", "seconds": 0.01, "rounds": 2}


class Tiny(nn.Module):
    """A classifier that keeps what `zoo.kernels` was told and the mode it ran in."""

    num_classes = 10

    def __init__(self, factor=1.0):
        super().__init__()
        self.head = nn.Linear(3, 10)
        self.factor, self.calls = factor, []

    def forward(self, x):
        self.calls.append((dispatch.current(), self.training, torch.is_grad_enabled()))
        return self.head(x.mean((2, 3))) * self.factor


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


def contender(model, name="test_van", choice=None):
    return benchmark_models.Contender(name, model, model, compiled=False, choice=choice)


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
    ("test_van --picture a.png", 2, "got --picture, but none of the models has a published accuracy: leave it out"),
    ("test_van --picture a.jpg", 2, "got --picture a.jpg: its name has to end in .png, .svg, .pdf"),
    ("test_van --dtype int8", 2, "invalid choice: 'int8'"),
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
    options = benchmark.parser().parse_args(["models", "van_b0.in1k", "--dtype", "bf16", "--size", "96x64"])
    assert options.models == ["van_b0"]
    assert options.dtype == "bfloat16"
    assert options.size == (96, 64)


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

    def figure(ratios, peers):
        made = [benchmark_models.Contender(name, None, None, False, peer=peers.get(name)) for name in ratios]
        for one in made:
            one.shown = one.name not in peers.values()
        rows = {name: benchmark_models.Row(name, ratios=[ratio]) for name, ratio in ratios.items()}
        return benchmark_models.picture(made, {"inference": rows}, "a machine")

    return figure


CLOSE = {
    **{"swin_tiny_patch4_window7_224": 1.0, "van_b2": 0.49, "dinat_mini": 0.5, "nat_mini": 0.51},
    **{"gc_vit_tiny": 0.88, "gcvit_tiny": 1.2, "gc_vit_xxtiny": 0.48, "biformer_tiny": 0.52},
}


@pytest.mark.slow
def test_labels_of_the_picture_touch_nothing(figure):
    axes = figure(CLOSE, {"gc_vit_tiny": "gcvit_tiny"}).axes[0]
    axes.figure.draw_without_rendering()
    labels = [text.get_window_extent() for text in axes.texts if text.get_text() != "better"]
    dots = [axes.transData.transform(line.get_xydata())[0] for line in axes.lines if line.get_marker() == "o"]
    assert (len(labels), len(dots)) == (8, 8)
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    assert not any(label.contains(*dot) for label in labels for dot in dots)


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
    assert axes.get_title() == "Speed and published accuracy\na machine"
    assert "better" in at


@pytest.mark.slow
def test_table_json_and_picture(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_models, "timm_name", {"test_van": "test_vit"}.get)
    monkeypatch.setattr(benchmark_models, "top1", {"test_van": 75.0}.get)
    files = ("--json", str(tmp_path / "sub" / "out.json"), "--picture", str(tmp_path / "out.png"))
    assert run("test_van", "test_cswin", *QUICK, "--kernels", "torch,reference", *files) == 0
    printed = capsys.readouterr()
    assert "reference" in printed.out
    assert "inference and training: time in units of test_resnet's; timm's: its own model" in printed.out
    assert "[2/2] training, 6 contenders" in printed.err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    content = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert content["machine"]["timm"] == timm.__version__
    assert content["settings"]["batch_size"] == 2
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
    assert van["training"]["peak_bytes"] > van["inference"]["peak_bytes"] > 0


@pytest.mark.slow
def test_inference_alone_has_no_training(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert run("test_van", *QUICK, "--no-training", "--json", str(file), "--dtype", "bfloat16") == 0
    assert "training" not in json.loads(file.read_text())["models"][1]
    assert "inference: time in units of test_resnet's; a / b: inference." in capsys.readouterr().out


def test_contenders_stand_once_and_the_unit_first():
    names = ["test_van", "test_resnet", "test_van"]
    made = benchmark_models.contenders(names, "test_resnet", size=(64, 64), device="cpu", compiled=True)
    assert [c.label for c in made] == ["test_resnet", "test_resnet, compiled", "test_van", "test_van, compiled"]


def test_fixed_models_are_made_for_the_size():
    [vit] = benchmark_models.contenders([], "test_vit", size=(64, 96), device="cpu")
    assert vit.model(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)


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


@pytest.mark.slow
def test_another_that_fails_is_named_and_the_rest_goes_on(capsys, replaced):
    replaced(test_vit=Tiny(factor=float("inf")))
    assert run("test_van", "test_vit", *QUICK, "--no-training") == 0
    assert "not timed: test_vit, inference: FloatingPointError" in capsys.readouterr().out


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
    assert "compiled in s" in capsys.readouterr().out
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
    assert run("test_van", *QUICK, "--compile", "--no-training", "--json", str(file)) == 0
    assert all(entry["inference"]["status"] == "timed" for entry in json.loads(file.read_text())["models"])


def test_choices_are_those_of_the_operators():
    assert set(benchmark.PATHS) == set(dispatch.CHOICES) - {"auto"}
