"""zoo-convert: official files of every family, wrapping and prefix; what it refuses; its command line. A minute."""

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

import zoo
from zoo import checkpoints, families
from zoo.messages import UserError
from zoo.tools import convert as tool

ZOO = Path(__file__).parents[1] / "zoo"
_spec = importlib.util.spec_from_file_location("golden", ZOO / "golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
OFFICIAL = golden.official()


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def detector(weights):
    heads = {"neck.fpn_convs.0.conv.weight": torch.zeros(4, 4), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    return {"meta": {"epoch": 12}, "state_dict": prefixed("backbone.", weights) | heads, "optimizer": {"state": {}}}


WRAPPINGS = {
    "plain": lambda sd: sd,
    "ordered": lambda sd: collections.OrderedDict(sd),
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 300, "args": argparse.Namespace(lr=1e-3)},
    "model": lambda sd: {"model": sd, "max_accuracy": np.float64(81.8), "optimizer": {}},
    "state_dict_ema": lambda sd: {"state_dict_ema": sd, "state_dict": {}},
    "model_ema": lambda sd: {"model": {}, "model_ema": sd},
    "ddp": lambda sd: {"state_dict": prefixed("module.", sd)},
    "detector": detector,
    "ddp-detector": lambda sd: {"state_dict": prefixed("module.", detector(sd)["state_dict"])},
}


def word(state_dict, model):
    """The option that says what the file is, if the weights alone can't tell."""
    names, _ = checkpoints.closest_models(checkpoints.unwrap(state_dict))
    return ["--model", model] if len(names) > 1 else []


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return timm.create_model("test_van").state_dict()


def save(content, name="file.pth"):
    torch.save(content, name)
    return name


def run(capsys, *arguments):
    """Exit code, output and errors of a command line."""
    code = 0
    try:
        tool.main(list(arguments))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    """The one line that a command ends with; nothing is written."""
    before = sorted(Path().rglob("*"))
    code, out, errors = run(capsys, *arguments)
    assert code == 1
    assert not out
    assert errors.startswith("zoo-convert: error: ")
    assert errors.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return errors.removeprefix("zoo-convert: error: ").strip()


def evaluate(report, line, **kwargs):
    """The model of one of the lines that the command prints, with more arguments."""
    call = report["python"][line].removesuffix(")") + ", **kwargs)"
    return eval(call, {"timm": timm, "kwargs": kwargs}).eval()


# ---- every family


# test_parity.py has the same goldens without the command.
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.long] * (i % 5 > 0)) for i, name in enumerate(golden.classifiers())]
)
def test_official_classifier_gives_the_golden(model, capsys):
    record = golden.read(model)
    weights = golden.official_weights(model, record)
    save({"model": weights})
    code, out, _ = run(capsys, "file.pth", "--json", "-o", "out", *word(weights, model))
    assert code == 0
    report = json.loads(out)
    assert report["model"] == model
    assert report["num_classes"] == 1000
    image = golden.image(**record["input"])
    for line in (0, 1):
        assert golden.difference(evaluate(report, line, dtype=torch.float64)(image), record["logits"]) < 1e-6


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "task"),
    [*golden.backbones()[:2], *(pytest.param(*rest, marks=pytest.mark.long) for rest in golden.backbones()[2:])],
)
def test_official_dense_backbone_gives_the_golden(model, task, capsys):
    record = golden.read(model, task)
    weights = {k: v for k, v in golden.official_weights(model, record).items() if not k.startswith("head.")}
    save(detector(weights))
    _, out, _ = run(capsys, "file.pth", "--json", "-o", "out", *word(weights, model))
    report = json.loads(out)
    assert report["left_out"] == {"neck": 1, "rpn_head": 1}
    assert report["num_classes"] == 0
    assert report["output_norms"] == any(key.startswith("norm0.") for key in weights)
    for line in (0, 1):
        backbone = evaluate(report, line, dtype=torch.float64, **families.dense_kwargs(model, task))
        for got, want in zip(backbone(golden.image(**record["input"])), record["outputs"], strict=True):
            assert golden.difference(got, want) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in golden.classifiers() else pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL]
)
def test_official_names_and_shapes_are_recognised(name):
    weights = {key: torch.empty(shape, device="meta") for key, shape in OFFICIAL[name]["keys"].items()}
    names, share = checkpoints.closest_models(checkpoints.unwrap(detector(weights)))
    assert share == 1
    assert (name if families.tag_kwargs(name) else name.partition(".")[0]) in names
    assert len({model.removeprefix("di").removesuffix("_384").removesuffix("_nchw") for model in names}) == 1


SMALL = [name for family in zoo.FAMILIES for name in timm.list_models("test_*", module=family)]


def cases():
    """Every wrapping of every family; the quick ones are those of VAN, and one of each other family."""
    for model in SMALL:
        for wrapping in WRAPPINGS:
            quick = model == "test_van" or wrapping == "ddp-detector"
            yield pytest.param(model, wrapping, marks=() if quick else pytest.mark.slow, id=f"{model}-{wrapping}")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "wrapping"), cases())
def test_every_wrapping_of_every_family_converts(model, wrapping, capsys):
    torch.manual_seed(0)
    weights = timm.create_model(model).state_dict()
    save(WRAPPINGS[wrapping](weights))
    code, out, errors = run(capsys, "file.pth", "-o", "out", "--json", *word(weights, model))
    assert (code, errors) == (0, "")
    report = json.loads(out)
    assert report["model"] == model
    assert report["left_out"] == ({"neck": 1, "rpn_head": 1} if "detector" in wrapping else {})
    for line in (0, 1):
        loaded = evaluate(report, line).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())


@pytest.mark.slow
def test_counts_of_operations_are_left_out(state_dict, capsys):
    """thop leaves them in the modules, and Flowformer's trainer, for one, drops them when it reads a checkpoint."""
    places = ("", "module.stem.", "module.stages.0.blocks.0.mlp.")
    counts = {f"{place}total_{what}": torch.zeros(1) for place in places for what in ("ops", "params")}
    save({"model": prefixed("module.", state_dict) | counts})
    code, out, errors = run(capsys, "file.pth", "--json")
    assert (code, errors) == (0, "")
    report = json.loads(out)
    assert (report["model"], report["left_out"]) == ("test_van", {})
    loaded = evaluate(report, 0).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state_dict.items())


@pytest.mark.slow
def test_legacy_file_and_safetensors_convert(state_dict, capsys):
    from safetensors.torch import save_file

    torch.save({"state_dict": state_dict}, "old.pth", _use_new_zipfile_serialization=False)
    save_file(state_dict, "new.bin")  # it is the content that counts, not the name
    for name in ("old.pth", "new.bin"):
        assert run(capsys, name, "-o", name.partition(".")[0])[0] == 0


# ---- what is written


@pytest.mark.slow
def test_written_file_says_where_it_comes_from(state_dict, capsys):
    save({"state_dict": state_dict})
    code, out, _ = run(capsys, "file.pth")
    assert code == 0
    sha256 = hashlib.sha256(Path("file.pth").read_bytes()).hexdigest()
    with safe_open("test_van/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["source"], metadata["source_sha256"]) == ("test_van", "file.pth", sha256)
    assert metadata["licence"] == "unknown"
    assert json.loads(metadata["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert sorted(path.name for path in Path("test_van").iterdir()) == ["config.json", "model.safetensors"]
    assert "test_van, 0.6 M parameters in 262 tensors" in out
    assert "licence    unknown" in out
    assert "(the model's default)" in out


@pytest.fixture
def published(monkeypatch, state_dict):
    """A manifest with one file, that of `state_dict`, and a function that gives it a hash."""
    entry = dict(checkpoints.manifest("gc_vit")[0], model="test_van", tag="", url="https://x.org/van-12345678.pth")
    monkeypatch.setattr(tool, "_manifest", lambda: [entry])
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, get=timm.get_pretrained_cfg: get(name.rstrip(".")))
    save({"state_dict": state_dict}, "van-12345678.pth")
    return entry


def test_wrong_hash_is_refused(published, capsys):
    published["sha256_prefix"] = "12345678"
    message = refused(capsys, "van-12345678.pth")
    sha256 = hashlib.sha256(Path("van-12345678.pth").read_bytes()).hexdigest()
    assert message.startswith("van-12345678.pth is not the file that https://x.org/van-12345678.pth published: its")
    assert f"sha256 is {sha256[:8]}..., not 12345678...; download it again, or rename it" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["van_b0.in1k", "gc_vit_xxtiny.in1k"])
def test_published_file_is_known_by_its_name(name, capsys):
    entry = next(e for e in tool._manifest() if f"{e['model']}.{e['tag']}" == name)
    weights = {key: value.float() for key, value in golden.official_weights(entry["model"]).items()}
    file = save({"state_dict": weights}, entry["url"].rpartition("/")[2])
    code, out, _ = run(capsys, file)
    assert code == 0
    assert f"model      {name}, " in out
    assert f"licence    {entry['licence']} {entry['licence_note']}" in out
    with safe_open(f"{name}/model.safetensors", "pt") as written:
        assert written.metadata()["licence"] == entry["licence"]
    config = json.loads(Path(name, "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == entry["licence"]


@pytest.mark.slow
def test_word_for_the_model_gives_its_facts(capsys):
    save({"state_dict": {key: value.float() for key, value in golden.official_weights("van_b0").items()}})
    assert json.loads(run(capsys, "file.pth", "--json", "-o", "a")[1])["licence"] is None
    report = json.loads(run(capsys, "file.pth", "--json", "-o", "b", "--model", "van_b0.in1k")[1])
    assert (report["tag"], report["licence"]) == ("in1k", "apache-2.0")


@pytest.mark.slow
def test_trainers_name_of_the_model_decides(capsys):
    weights = timm.create_model("test_dinat").state_dict()
    for name, content in (("a", {"arch": "test_dinat"}), ("b", {"args": argparse.Namespace(model="test_nat")})):
        save({"state_dict": weights, **content})
        report = json.loads(run(capsys, "file.pth", "-o", name, "--json")[1])
        assert report["model"] == {"a": "test_dinat", "b": "test_nat"}[name]


@pytest.mark.slow
@torch.no_grad()
def test_other_classes_and_channels_convert(capsys):
    model = timm.create_model("test_van", num_classes=7, in_chans=1).eval()
    save(model.state_dict())
    report = json.loads(run(capsys, "file.pth", "--json")[1])
    image = torch.randn(1, 1, 64, 64)
    assert all(torch.equal(evaluate(report, line)(image), model(image)) for line in (0, 1))


@pytest.mark.slow
@torch.no_grad()
def test_backbone_without_classifier_converts(state_dict, capsys):
    save({key: value for key, value in state_dict.items() if not key.startswith("head.")})
    _, out, _ = run(capsys, "file.pth", "-o", "out")
    assert "classifier none: for features" in out
    for line in out.splitlines()[-2:]:
        model = eval(line, {"timm": timm}).eval()
        assert len(model(torch.zeros(1, 3, 64, 64))) == 4


# For each family that has any, published weights whose tag changes the model.
TAGGED = {
    family: name
    for family in zoo.FAMILIES
    for name in timm.list_models(module=family, pretrained=True)
    if families.tag_kwargs(name)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAGGED.values())
def test_keywords_of_a_tag_are_kept(name, capsys):
    model = timm.create_model(name)
    save({"model": model.state_dict()})
    report = json.loads(run(capsys, "file.pth", "--json")[1])
    assert (f"{report['model']}.{report['tag']}", report["licence"]) == (name, None)
    for line in (0, 1):
        loaded = evaluate(report, line).state_dict()
        assert {key: value.shape for key, value in loaded.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


@pytest.mark.slow
def test_nothing_is_overwritten_unasked(state_dict, capsys):
    save(state_dict)
    assert run(capsys, "file.pth")[0] == 0
    before = Path("test_van/model.safetensors").read_bytes()
    save({key: value + 1 for key, value in state_dict.items()})
    assert refused(capsys, "file.pth") == (
        "test_van already holds model.safetensors and config.json: give another folder with -o, or replace them with "
        "--force."
    )
    assert Path("test_van/model.safetensors").read_bytes() == before
    assert run(capsys, "file.pth", "--force")[0] == 0
    assert Path("test_van/model.safetensors").read_bytes() != before


@pytest.mark.slow
def test_failed_write_leaves_nothing(state_dict, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save(state_dict)
    monkeypatch.setattr("timm.models._hub.save_config_for_hf", full)
    message = refused(capsys, "file.pth", "-o", "new")
    assert message == "could not write to new (No space left on device): correct that, or give another folder with -o."


# ---- what it refuses


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_runs_nothing(zipped, state_dict, capsys):
    torch.save({"state_dict": state_dict, "args": Hostile()}, "bad.pth", _use_new_zipfile_serialization=zipped)
    message = refused(capsys, "bad.pth")
    assert message == (
        "bad.pth: the file asks for posix.mkdir, which could run any code and is not needed for weights: "
        "nothing was run; get the weights as safetensors or plain tensors."
    )
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page, not a checkpoint"),
        ("<html>café</html>".encode(), "a web page, not a checkpoint"),
        (b"Not Found\n", "a text file, not a checkpoint (it begins with 'Not Found')"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a text file, not a checkpoint (it begins with 'version"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "damaged, incomplete or not a checkpoint"),
    ],
    ids=["empty", "html", "html-utf8", "text", "lfs", "png"],
)
def test_other_files_are_refused(content, message, capsys):
    Path("file.pth").write_bytes(content)
    assert message in refused(capsys, "file.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_truncated_file_is_refused(kind, part, state_dict, capsys):
    from safetensors.torch import save_file

    if kind == "safetensors":
        save_file(state_dict, "file.pth")
    else:
        torch.save(state_dict, "file.pth", _use_new_zipfile_serialization=kind == "zip")
    content = Path("file.pth").read_bytes()
    Path("file.pth").write_bytes(content[: int(part * len(content))])
    message = refused(capsys, "file.pth")
    assert re.fullmatch(
        r"file.pth: the file is damaged, incomplete or not a checkpoint \(.+\): download it again.", message
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "file.pth: The checkpoint holds no tensors, only epoch"),
        ([torch.zeros(2)], "file.pth: the file holds a list, not a state dict"),
        ({"conv1.weight": torch.zeros(2)}, "does not look like a model of zoo (its tensors are called conv1.weight)"),
    ],
    ids=["empty", "list", "other"],
)
def test_other_contents_are_refused(content, message, capsys):
    save(content)
    assert message in refused(capsys, "file.pth")


@pytest.mark.slow
def test_faults_are_grouped_and_short(state_dict, capsys):
    kept = dict(list(state_dict.items())[20:])
    kept["stages.3.norm.weight"] = torch.zeros(5)
    kept["stages.3.extra"] = torch.zeros(5)
    save(kept)
    message = refused(capsys, "file.pth")
    assert message.startswith("file.pth: The checkpoint does not fit test_van: ")
    assert re.search(r"\d+ missing \(\S+, \S+, \S+, \.\.\.\); 1 unexpected \(stages.3.extra\); 1 of another", message)
    assert message.endswith("% of it is test_van: the file is incomplete or altered.")


@pytest.mark.slow
def test_other_model_than_said_is_refused(state_dict, capsys):
    save(state_dict)
    message = refused(capsys, "file.pth", "--model", "van_b0")
    assert "does not fit van_b0" in message
    assert "It looks like test_van" in message


@pytest.mark.slow
def test_ambiguous_weights_are_refused(capsys):
    save(timm.create_model("test_dinat").state_dict())
    assert refused(capsys, "file.pth") == (
        "file.pth fits test_dinat and test_nat equally, because their tensors have the same shapes: add --model "
        "test_dinat or --model test_nat."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fil.pth"], "there is no file fil.pth: did you mean HERE/file.pth?"),
        (["elsewhere/x.pth"], "there is no file elsewhere/x.pth: HERE has no 'elsewhere'."),
        (["."], ".: this is a folder, not a checkpoint file"),
        (["file.pth", "--model", "van_b9"], "there is no model 'van_b9' in zoo: did you mean van_b"),
        (["file.pth", "--model", "van_b0.in22k"], "there is no model 'van_b0.in22k' in zoo: did you mean van_b0.in1k?"),
        (["file.pth", "--model", "qqq"], "there is no model 'qqq' in zoo: zoo-models lists its models."),
        (["file.pth", "-o", "file.pth"], "file.pth is a file: give a folder for "),
    ],
)
def test_mistakes_in_the_command_line(arguments, message, state_dict, capsys):
    save(state_dict)
    assert refused(capsys, *arguments).startswith(message.replace("HERE", os.getcwd()))


# ---- the command line


@pytest.mark.slow
def test_help_needs_no_torch():
    code = "import zoo.tools.convert as c, sys; c.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_help_has_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "zoo-convert van_tiny_754.pth.tar" in out
    assert "--model NAME" in out


def test_unknown_option_is_an_error_of_one_line(capsys):
    code, _, errors = run(capsys, "file.pth", "--mode", "x", "--nope")
    assert code == 2
    assert errors.count("\n") == 1
    assert "--help lists the options" in errors


def test_errors_are_raised_for_callers():
    with pytest.raises(UserError, match="there is no file"):
        tool.convert(Path("nothing.pth"))
