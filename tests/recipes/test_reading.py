"""Run folders from other people: plain values are read, and anything else is refused in one sentence. A few seconds."""

import json
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from zoo.messages import UserError
from zoo.recipes import config, reading

HEAD = "task: classify\nmodel: test_vit\n"
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(10 * [f'*{old}'])}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
CONFIGS = {
    "empty": "",
    "a list": "[1, 2]",
    "a word": "model",
    "no model": "task: classify",
    "empty model": "model: ''",
    "task a list": "task: [1]\nmodel: x",
    "unknown task": "task: fly\nmodel: x",
    "model a mapping": "task: classify\nmodel: {a: 1}",
    "section a number": HEAD + "data: 3",
    "section null": HEAD + "trainer: null",
    "number as text": HEAD + "seed: twelve",
    "number as interpolation": HEAD + "seed: ${oc.env:HOME}",
    "list for a number": HEAD + "data: {img_size: [1]}",
    "keywords a list": HEAD + "model_kwargs: [1]",
    "huge number": HEAD + f"seed: {'1' * 5000}",
    "aliases": HEAD + ALIASES,
    "one alias": HEAD + "log: &a {every: 3}\nmm: *a",
    "tag": "model: !!python/object/apply:os.system ['touch canary']",
    "binary": HEAD + "mm: {a: !!binary aGVsbG8=}",
    "deep mappings": HEAD + "mm: " + "{a: " * 60 + "1" + "}" * 60,
    "deep lists": HEAD + "mm: {a: " + "[" * 50000,
    "large": HEAD + "mm: {a: '" + "x" * 300_000 + "'}",
    "no YAML": "model: [",
    "tabs": "\tmodel: x",
    "twice": HEAD + "model: b",
    "key a list": "? [a]\n: b",
    "not UTF-8": b"model: \xff\xfe",
    "cut UTF-16": b"\xff\xfem\x00o",
    "NUL": "model: a\0b",
}


@pytest.fixture
def folder(tmp_path):
    """A run folder with these files, given as text, bytes or JSON."""

    def make(config=HEAD, **files):
        path = tmp_path / "run"
        path.mkdir()
        for name, content in {"config.yaml": config, **files}.items():
            content = content if isinstance(content, str | bytes) else json.dumps(content)
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def _is_a_sentence(result):
    code, output = result
    assert code == 1, output
    assert output.count("\n") == 1, output
    assert ": error: " in output
    assert len(output) < 1000  # long names are named


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS.keys())
def test_strange_configuration(folder, content):
    with pytest.raises(UserError, match=r"config\.yaml .*\.$"):
        reading.load_config(folder(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "eval", "predict", "train"])
def test_strange_configuration_on_the_command_line(command, folder, name):
    path = folder(CONFIGS["task a list"])
    words = {"report": [path], "eval": [path], "predict": [f"run={path}", path, "out"], "train": [f"run={path}"]}
    _is_a_sentence(command(name, *words[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "eval", "predict"])
@pytest.mark.parametrize("kind", ["a file", "nothing", "a long name", "a folder as config.yaml"])
def test_no_folder_of_a_run(command, tmp_path, name, kind):
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "config.yaml").mkdir(parents=True)
    path = {"a file": "file", "nothing": "none", "a long name": "x" * 300, "a folder as config.yaml": "odd"}[kind]
    _is_a_sentence(command(name, *{"predict": [f"run={path}", "a.png", "out"]}.get(name, [path])))


# Interpolations.

TEXTS = ["${oc.env:SECRET}", r"\${oc.env:SECRET}", r"\\${oc.env:SECRET}\\", "a ${b} ${", "${", "$", "${oc.env:SECRET"]


@pytest.mark.parametrize("text", TEXTS)
def test_interpolation_is_text(folder, text, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    read = reading.load_config(
        folder(HEAD + f"data: {{root: '{text}', interpolation: '{text}'}}\nmm: {{a: ['{text}']}}")
    )
    cfg = config.of_run(OmegaConf.structured(config.EvalConfig), read, [])
    found = OmegaConf.to_container(cfg, resolve=True)
    assert (found["data"]["root"], found["data"]["interpolation"], found["mm"]["a"]) == (text, text, [text])


@pytest.mark.slow
def test_no_variable_of_the_environment_in_a_report(command, folder, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    path = folder(HEAD + "data: {root: '${oc.env:SECRET}'}\nmm: {a: '${oc.env:SECRET}'}")
    code, output = command("report", path)
    assert code == 0, output
    assert "${oc.env:SECRET}" in (path / "report.html").read_text()
    assert "s3cr3t" not in (path / "report.html").read_text()


@pytest.mark.slow
def test_no_variable_of_the_environment_in_an_evaluation(command, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    shutil.copytree(finished, tmp_path / "run")
    content = OmegaConf.load(tmp_path / "run" / "config.yaml")
    for key in ("data.class_map", "data.train_split", "log.project", "mm.a"):
        OmegaConf.update(content, key, "${oc.env:SECRET}", force_add=True)
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(content))
    _, output = command("eval", tmp_path / "run")
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "${oc.env:SECRET}" in output
    assert not [text for text in [output.encode(), *written] if b"s3cr3t" in text]


# JSON.

EPOCH = {"epoch": 1, "update": 4, "train_loss": 1.0, "val_top1": 50.0}
CLASSES = {"classes": ["a", "b"], "scores": {"top1": [1.0, None]}, "counts": [3, 4], "unit": "images"}
CLASSES |= {"confusion": [[0, 1, 3], [1, 1, 4]]}
JSONS = {
    "metrics: a list": ("metrics.jsonl", "[1]"),
    "metrics: no epoch": ("metrics.jsonl", {"train_loss": 1.0}),
    "metrics: a text": ("metrics.jsonl", EPOCH | {"val_top1": "x"}),
    "metrics: epoch a text": ("metrics.jsonl", EPOCH | {"epoch": "1"}),
    "metrics: epoch NaN": ("metrics.jsonl", '{"epoch": NaN, "update": 1}'),
    "metrics: epoch true": ("metrics.jsonl", EPOCH | {"epoch": True}),
    "metrics: half a line": ("metrics.jsonl", '{"epoch": 1, "upd'),
    "metrics: not UTF-8": ("metrics.jsonl", b"\xff"),
    "metrics: steps a list": ("metrics.jsonl", EPOCH | {"step_seconds": [1]}),
    "metrics: deep": ("metrics.jsonl", "[" * 100_000),
    "summary: empty": ("summary.json", ""),
    "summary: null": ("summary.json", "null"),
    "summary: no metrics": ("summary.json", {}),
    "summary: metrics a list": ("summary.json", {"metrics": [1]}),
    "summary: a metric a text": ("summary.json", {"metrics": {"top1": "NaN"}}),
    "summary: params a text": ("summary.json", {"metrics": {}, "params": "many"}),
    "summary: versions a list": ("summary.json", {"metrics": {}, "versions": ["zoo"]}),
    "summary: corrupt a number": ("summary.json", {"metrics": {}, "corrupt_images": 3}),
    "start: recipe a text": ("start.json", {"recipe": "x"}),
    "start: recipe without settings": ("start.json", {"recipe": {"chosen": "x"}}),
    "start: data a number": ("start.json", {"data": 3}),
    "start: processes a text": ("start.json", {"processes": "2"}),
    "classes: no names": ("classes.json", {}),
    "classes: names numbers": ("classes.json", CLASSES | {"classes": [1, 2]}),
    "classes: too few scores": ("classes.json", CLASSES | {"scores": {"top1": [1.0]}}),
    "classes: too few counts": ("classes.json", CLASSES | {"counts": [1]}),
    "classes: a score a text": ("classes.json", CLASSES | {"scores": {"top1": ["x", 1.0]}}),
    "classes: confusion of others": ("classes.json", CLASSES | {"confusion": [[0, 2, 1]]}),
    "classes: confusion of none": ("classes.json", CLASSES | {"confusion": [[0, 1, 0]]}),
    "classes: confusion of pairs": ("classes.json", CLASSES | {"confusion": [[0, 1]]}),
}


@pytest.mark.parametrize(("name", "content"), JSONS.values(), ids=JSONS.keys())
def test_strange_json(command, folder, name, content):
    _is_a_sentence(command("report", folder(**{name: content})))


@pytest.mark.parametrize(
    "content",
    [[], {"model": "x"}, {"metrics": {}}, {"model": 1, "metrics": {}}, {"model": "x", "metrics": {}, "task": ["x"]},
     {"model": "x", "metrics": {}, "task": "fly"}, {"model": "x", "metrics": {}, "data": []},
     {"model": "x", "metrics": {"top1": "x"}}],
    ids=str,
)  # fmt: skip
def test_strange_evaluation(command, folder, content):
    path = folder(**{"eval.json": content})
    (path / "config.yaml").unlink()
    _is_a_sentence(command("report", path))


FINE = {
    "numbers without end": (
        "metrics.jsonl",
        '{"epoch": 1, "update": 2, "train_loss": NaN, "lr": 1e300}',
    ),
    "no time": ("metrics.jsonl", EPOCH | {"step_seconds": {"updates": 3, "forward": 0.0}}),
    "no images": ("classes.json", {"classes": [], "scores": {}, "counts": [], "unit": "images", "confusion": []}),
    "unknown scores": ("classes.json", CLASSES | {"scores": {"other": [1, 2]}}),
    "deep settings": ("start.json", '{"recipe": {"chosen": "x", "settings": {"a": ' + "[" * 90 + "]" * 90 + "}}}"),
    "markup": ("summary.json", {"metrics": {}, "command": "<script>alert(1)</script>"}),
}


@pytest.mark.parametrize(("name", "content"), FINE.values(), ids=FINE.keys())
def test_odd_json_that_is_reported(command, folder, name, content):
    path = folder(**{name: content})
    code, output = command("report", path)
    assert code == 0, output
    assert "<script" not in (path / "report.html").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "classes.json", "start.json", "config.yaml"])
def test_pipe_in_place_of_a_file(command, folder, name):
    path = folder()
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    _is_a_sentence(command("report", path))


# Checkpoints.

STATES = {
    "no identity": lambda state: state.pop("identity"),
    "identity a list": lambda state: state.update(identity=[1]),
    "no classes": lambda state: state["identity"].pop("classes"),
    "classes numbers": lambda state: state["identity"].update(classes=[1, 2, 3]),
    "config a text": lambda state: state.update(config="x"),
    "history a mapping": lambda state: state.update(history={}),
    "progress a number": lambda state: state.update(progress=1),
    "update a text": lambda state: state["progress"].update(update="1"),
    "no training": lambda state: state.update(training=None),
    "weights a list": lambda state: state["training"].update(model=[]),
    "weights numbers": lambda state: state["training"].update(model={"a": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", STATES.values(), ids=STATES.keys())
def test_strange_checkpoint(command, finished, tmp_path, change):
    path = tmp_path / "run"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("*.safetensors", "*.png", "eval", "previous.pt"))
    state = torch.load(path / "last.pt", weights_only=True)
    change(state)
    torch.save(state, path / "last.pt")
    _is_a_sentence(command("eval", path))
