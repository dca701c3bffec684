"""zoo-export: every family in both formats, what is left open, and every refusal. 20 s, slow ones six minutes."""

import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import zoo
from zoo import manifest
from zoo.opening import open_model
from zoo.tools import export

FAMILIES = [name for family in zoo.FAMILIES for name in timm.list_models("test_*", module=family)]
SMALL = "test_resnet"  # of timm, and exported in a second


def run(*arguments):
    """The exit code of a command line; random weights are those of seed 0."""
    torch.manual_seed(0)
    try:
        export.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def record(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def load(path):
    """The file as a function from images to a list of outputs."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda x: [outputs] if isinstance(outputs := module(x), torch.Tensor) else list(outputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {"images": x.numpy()})]


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) == ("test_van", "pt2") else pytest.mark.slow)
        for name in FAMILIES
        for form in ("pt2", "onnx")
    ],
)
def test_family_agrees_at_any_size(capsys, tmp_path, name, form):
    path = tmp_path / f"model.{form}"
    said = record(capsys, name, "--size", 224, 224, "-o", path)
    assert [check["shape"] for check in said["checks"]] == [[1, 3, 224, 224], [3, 3, 256, 320]]
    assert max(check["difference"] for check in said["checks"]) <= 1e-4
    assert said["input"]["shape"] == ["batch", 3, "height", "width"]
    assert said["fixed"] == []
    if form == "onnx":  # a .pt2 takes seconds to load, and the command has loaded this one
        model, least = build(name), said["input"]["least"]
        assert 32 <= min(least) <= max(least) <= 64
        for x in (images(2, 3, 90, 75), images(1, 3, *least)):
            torch.testing.assert_close(load(path)(x), [model(x)], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", [manifest.examples(family)[-1] for family in zoo.FAMILIES])
def test_published_architecture_in_onnx(capsys, tmp_path, name):
    said = record(capsys, name, "-o", tmp_path / "model.onnx")
    assert [check["shape"][2:] for check in said["checks"]] == [[224, 224], [256, 320]]
    assert max(check["difference"] for check in said["checks"]) <= 1e-4


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_features(capsys, tmp_path, form):
    said = record(capsys, "test_van", "--features", "--format", form, "-o", tmp_path)
    path = tmp_path / f"test_van_features.{form}"
    assert [output["name"] for output in said["outputs"]] == [f"features_{i}" for i in range(4)]
    assert [output["shape"][2] for output in said["outputs"]] == [16, 8, 4, 2]
    x = images(2, 3, 70, 64)
    torch.testing.assert_close(load(path)(x), build("test_van", features_only=True)(x), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_static(capsys, tmp_path):
    path = tmp_path / "model.onnx"
    said = record(capsys, SMALL, "--size", 64, 64, "--static", "-o", path)
    assert said["input"]["shape"] == [1, 3, 64, 64]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 64, 64]
    assert session.get_outputs()[0].name == "logits"


@pytest.mark.slow
def test_model_that_takes_one_size(capsys, tmp_path):
    """Of timm, and made for the size that is asked for."""
    assert run("vit_tiny_patch16_224", "--size", 32, 32, "-o", tmp_path / "model.pt2") == 0
    said = capsys.readouterr().out
    assert "images (batch, 3, 32, 32)" in said
    assert "height and width are fixed: the model takes no other size" in said
    assert "at 1x3x32x32" in said
    assert "at 3x3x32x32" in said


@pytest.mark.slow
def test_size_that_the_exporter_fixes(capsys, tmp_path):
    """A map of a single token is a case of its own."""
    said = record(capsys, "test_van", "--size", 32, 32, "-o", tmp_path / "model.pt2")
    assert said["input"]["shape"] == ["batch", 3, 32, 32]
    assert "the exporter can't make this dynamic (it takes heights from" in said["fixed"][0]


@pytest.mark.slow
def test_report_and_silence(capsys, tmp_path):
    path = tmp_path / "new" / "model"
    assert run("test_van", "-o", path) == 0
    said, progress = capsys.readouterr()
    assert said.startswith(f"written: {path}.pt2 (")
    assert "images (batch, 3, height, width), float32, from 33x33 pixels" in said
    assert "minus (0.5, 0.5, 0.5), divided by (0.5, 0.5, 0.5)" in said
    assert "output: logits (batch, 1000)" in said
    assert "at 1x3x64x64" in said
    assert all(line.startswith("zoo-export: ") for line in progress.splitlines())


@pytest.fixture
def folder(tmp_path):
    """As zoo-train leaves one behind."""
    model = build(SMALL, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    data = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3)}
    names = {"label_names": ["apple", "banana", "cherry"]}
    save_for_hf(model, tmp_path / "run", model_config=names, data_config=data, safe_serialization=True)
    return tmp_path / "run", model


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_run_folder(capsys, tmp_path, monkeypatch, folder, form):
    monkeypatch.chdir(tmp_path)
    said = record(capsys, folder[0], "--format", form)
    x, path = images(1, 3, 48, 48), tmp_path / f"run.{form}"
    torch.testing.assert_close(load(path)(x), [folder[1](x)], rtol=0, atol=1e-4)
    assert said["size"] == [48, 48]
    if form == "onnx":
        written = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["zoo"]
    else:
        torch.export.load(path, extra_files=(extra := {"zoo.json": ""}))
        written = extra["zoo.json"]
    facts = json.loads(written)
    assert facts["classes"] == ["apple", "banana", "cherry"]
    assert facts["preprocessing"]["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.slow
@torch.no_grad()
def test_best_weights_of_a_run_folder(folder):
    path, model = folder
    best = {name: value * 0.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file(best, path / "best.safetensors")
    for checkpoint, want in (("last", model.state_dict()), ("best", best)):
        loaded = open_model(str(path), checkpoint=checkpoint)
        assert loaded.weights == f"its {checkpoint} weights"
        assert all(torch.equal(value, want[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.long
def test_run_of_zoo_train(capsys, tmp_path):
    settings = ("model=test_van", "trainer.max_updates=2", "trainer.device=cpu", "log.wandb=disabled", "run=digits")
    command = [sys.executable, "-m", "zoo.recipes.train", *settings]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    said = record(capsys, tmp_path / "digits", "-o", tmp_path)
    assert said["classes"] == [str(digit) for digit in range(10)]
    assert (tmp_path / "digits.pt2").is_file()


@pytest.mark.slow
@torch.no_grad()
def test_own_weights_and_classes(tmp_path, folder):
    """As many classes as the file has, or as are asked for."""
    path, weights = tmp_path / "model.pt2", folder[0] / "model.safetensors"
    x = images(1, 3, 64, 64)
    static = ("--size", 64, 64, "--static", "-o", path)
    assert run(SMALL, "--pretrained", weights, *static) == 0
    torch.testing.assert_close(load(path)(x), [folder[1](x)])
    assert run(SMALL, "--pretrained", weights, "--num-classes", 0, *static, "--force") == 0
    torch.testing.assert_close(load(path)(x), [folder[1].forward_head(folder[1].forward_features(x), pre_logits=True)])


@pytest.mark.long
def test_program_needs_no_zoo(tmp_path):
    assert run("test_dinat", "--static", "-o", tmp_path / "model.pt2") == 0
    code = (
        "import sys, torch; program = torch.export.load('model.pt2').module()\n"
        "print(tuple(program(torch.zeros(1, 3, 64, 64)).shape), 'zoo' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "(1, 1000) False False\n"


@pytest.mark.parametrize(
    ("got", "want", "difference"),
    [
        ([[1.0, 2.0], [0.5]], [[1.0, 2.0], [0.25]], 0.25),
        ([[100.0, 2.0]], [[100.0, 3.0]], 0.01),
        ([[float("nan")]], [[1.0]], float("nan")),
    ],
    ids=["absolute", "of the largest", "not a number"],
)
def test_difference(got, want, difference):
    found = export._difference(list(map(torch.tensor, got)), list(map(torch.tensor, want)))
    assert found == pytest.approx(difference, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("differences", [[0.0, 2e-4], [float("nan"), 0.0]], ids=["large", "not a number"])
def test_program_that_differs_is_not_kept(capsys, tmp_path, monkeypatch, differences):
    left = iter(differences)
    monkeypatch.setattr(export, "_difference", lambda got, want: next(left))
    assert run(SMALL, "-o", tmp_path / "model.pt2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the program differs from the model by" in error
    assert "more than 1e-04" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_command_ends_when_the_file_is_written(tmp_path):
    """What Python does at its end, such as to run `atexit`, is left out; the file and what is said are there."""
    code = (
        "import atexit, sys\n"
        "from zoo.tools import export\n"
        f"sys.argv = ['zoo-export', '{SMALL}', '--static', '-o', 'model.pt2']\n"
        "atexit.register(print, 'taken apart')\n"
        "export.command()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "model.pt2").is_file()) == (0, True), done.stderr
    assert done.stdout.startswith("written: model.pt2 (")
    assert done.stdout.rstrip().endswith("(limit 1e-04)")


def test_export_that_fails(capsys, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such operator\nat all.")

    monkeypatch.setattr(torch.export, "export", refuse)
    assert run("test_van", "-o", tmp_path / "model.onnx") == 1
    assert capsys.readouterr().err.endswith("error: test_van can't become ONNX: no such operator at all.\n")
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("test_vann", 1, "there is no model 'test_vann': did you mean test_van?"),
    ("xyzzyqq", 1, "there is no model 'xyzzyqq': zoo-models lists the models of zoo, timm.list_models() lists all."),
    ("van_b0.imagenet", 1, "van_b0 has no weights 'imagenet': it has "),
    ("runs/none", 1, "there is no folder runs/none: "),
    ("empty", 1, "empty has no config.json and model.safetensors: give the folder of a classifier's finished run."),
    ("run --pretrained", 2, "run is a run folder, with its own weights and classes: leave out the pretrained weights."),
    ("run --checkpoint best", 1, "run has no best.safetensors: its last weights are its only ones."),
    (
        "test_van --checkpoint best",
        2,
        "test_van is not a run folder, so it has no best weights: leave out the checkpoint.",
    ),
    (
        "run --num-classes 3",
        2,
        "run is a run folder, with its own weights and classes: leave out the number of classes.",
    ),
    ("test_van --pretrained none.pth", 1, "there is no checkpoint none.pth: "),
    ("test_van --pretrained text.pth", 1, "text.pth can't be read as a checkpoint: "),
    ("test_dinat --pretrained run/model.safetensors", 1, "test_dinat can't be created with run/model.safetensors: "),
    ("hf-hub:me/x --pretrained a.pth", 2, "hf-hub:me/x has its own weights: leave out a.pth."),
    ("test_van --size 16 16", 1, "test_van can't run on images of 16x16 pixels: Got images of 16 x 16 pixels"),
    ("test_van --size 64", 2, "--size: expected 2 arguments"),
    ("test_van --size 64 0", 2, "--size: got '0'; give a whole number of 1 or more"),
    ("test_van --num-classes -1", 2, "--num-classes: got '-1'; give a whole number of 0 or more"),
    ("test_van --num-classes x", 2, "--num-classes: got 'x'; give a whole number of 0 or more"),
    ("test_van --format tflite", 2, "invalid choice: 'tflite'"),
    ("test_van -o model.pth", 2, "got -o model.pth: its name has to end in .pt2 or .onnx."),
    ("test_van -o model.pt2 --format onnx", 2, "got -o model.pt2: --format onnx writes .onnx files."),
    ("test_van -o there.onnx", 1, "there.onnx exists; --force replaces it."),
    ("test_van -o text.pth/model.pt2", 1, "text.pth is not a folder that you may write to; give another with -o."),
    ("", 2, "required: MODEL"),
]


@pytest.mark.parametrize(("line", "code", "message"), BAD, ids=[line for line, _, _ in BAD])
def test_refusal(capsys, tmp_path, monkeypatch, folder, line, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "there.onnx").touch()
    before = sorted(tmp_path.rglob("*"))
    assert run(*line.split()) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zoo-export: error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_that_may_not_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export.os, "access", lambda path, mode: False)
    assert run("test_van", "-o", tmp_path / "new" / "model.pt2") == 1
    assert f"{tmp_path} is not a folder that you may write to" in capsys.readouterr().err


@pytest.mark.slow
def test_disk_full(capsys, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "model.pt2"))

    monkeypatch.setattr(export, "_write", full)
    assert run(SMALL, "-o", tmp_path / "model.pt2") == 1
    assert capsys.readouterr().err.endswith("model.pt2: No space left on device.\n")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run("test_van", "-o", tmp_path / "model.onnx") == 1
    assert "--format onnx needs onnxscript: run pip install 'backbone-zoo[onnx]'." in capsys.readouterr().err


def test_interrupt(capsys, tmp_path, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_load", interrupt)
    assert run("test_van", "-o", tmp_path / "model.pt2") == 130
    assert capsys.readouterr().err.endswith("zoo-export: interrupted\n")


@pytest.mark.slow
def test_help_needs_no_torch():
    code = "import zoo.tools.export as e, sys; e.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_help_has_examples(capsys):
    assert run("--help") == 0
    assert "zoo-export dinat_mini --pretrained" in capsys.readouterr().out
