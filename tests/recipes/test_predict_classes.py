"""zoo-predict for classifiers. 15 s."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes.classify import predict
from zoo.recipes.classify.evaluate import evaluate
from zoo.recipes.commands import predict as command
from zoo.recipes.inputs import Inputs

CLASSES = ["apple", "banana", "cherry"]


@pytest.fixture(scope="module")
def predicted(finished, images, tmp_path_factory):
    """The output folder for the validation images."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict.predict(settings(finished), Inputs([images / "val"], out), out)
    return out


def settings(run, **keys):
    return command.PredictConfig(run=str(run), device="cpu", **keys)


def rows(out):
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(out):
    return json.loads((out / "predictions.json").read_text())


def test_files_that_are_written(predicted):
    assert sorted(path.name for path in predicted.iterdir()) == list(predict.NAMES)


@pytest.mark.slow
def test_table_has_a_row_for_each_image(predicted, images):
    assert [row["image"] for row in rows(predicted)] == [str(path) for path in sorted((images / "val").rglob("*.jpg"))]


def test_table_has_as_many_classes_as_there_are(predicted):
    assert list(rows(predicted)[0]) == ["image", *(f"{x}_{i}" for i in (1, 2, 3) for x in ("class", "probability"))]
    assert all(sorted(row[f"class_{i}"] for i in (1, 2, 3)) == CLASSES for row in rows(predicted))


def test_probabilities_fall_and_sum_to_one(predicted):
    for item in content(predicted)["images"]:
        found = [guess["probability"] for guess in item["predictions"]]
        assert found == sorted(found, reverse=True)
        assert sum(found) == pytest.approx(1, abs=1e-5)


def test_json_says_the_same_as_the_table(predicted):
    for row, item in zip(rows(predicted), content(predicted)["images"], strict=True):
        assert item["image"] == row["image"]
        assert [guess["class"] for guess in item["predictions"]] == [row[f"class_{i}"] for i in (1, 2, 3)]
        assert [guess["probability"] for guess in item["predictions"]] == [
            float(row[f"probability_{i}"]) for i in (1, 2, 3)
        ]


@pytest.mark.slow
def test_accuracy_is_that_of_the_evaluation(predicted, compose, finished, tmp_path):
    evaluated = evaluate(compose(f"run={finished}", f"out={tmp_path}", name="eval"), ["run", "out"])
    right = [row["class_1"] == row["image"].split("/")[-2] for row in rows(predicted)]
    assert 100 * np.mean(right) == pytest.approx(evaluated["metrics"]["top1"])


def test_sheet_is_a_picture(predicted):
    with Image.open(predicted / "predictions.png") as picture:
        assert picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.slow
def test_command_prints_a_table(call_predict, finished, images, tmp_path):
    code, output = call_predict(f"run={finished}", "device=cpu", images / "val" / "apple", tmp_path / "out")
    assert code == 0, output
    assert "0_00.jpg" in output
    assert "5 images: " in output


@pytest.mark.slow
def test_command_abridges_a_long_table(call_predict, finished, images, tmp_path):
    code, output = call_predict(f"run={finished}", "device=cpu", images / "train", tmp_path / "out")
    assert code == 0, output
    assert output.count(".jpg") == 20
    assert "and 4 more, all in predictions.csv" in output
    assert len(rows(tmp_path / "out")) == 24


@pytest.mark.slow
def test_best_weights(call_predict, finished, images, tmp_path):
    call_predict(f"run={finished}", "device=cpu", "checkpoint=best", images / "val", tmp_path / "out")
    assert content(tmp_path / "out")["weights"].endswith("best.safetensors")


def test_score_is_for_detectors(call_predict, finished, images, tmp_path):
    code, output = call_predict(f"run={finished}", "score=0.3", images / "val", tmp_path / "out")
    assert code == 1
    assert "score=0.3 is for detectors" in output
    assert not (tmp_path / "out").exists()


ODD_NAMES = ["a,b.jpg", 'a"b.jpg', "a\nb.jpg", "a\rb.jpg", "=1+1.jpg", "$a_b$.jpg", "[red]a.jpg", "Фото 写真.jpg"]


@pytest.mark.slow
def test_names_of_all_kinds(finished, images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ODD_NAMES:
        (tmp_path / "in" / name).write_bytes((images / "val" / "apple" / "0_00.jpg").read_bytes())
    predict.predict(settings(finished), Inputs([tmp_path / "in"], tmp_path / "out"), tmp_path / "out")
    assert sorted(row["image"] for row in rows(tmp_path / "out")) == sorted(str(tmp_path / "in" / n) for n in ODD_NAMES)
    assert r"a\nb.jpg" in capsys.readouterr().out


@pytest.mark.slow
def test_name_that_is_no_unicode(finished, images, tmp_path, call_predict):
    (tmp_path / "in").mkdir()
    source = (images / "val" / "apple" / "0_00.jpg").read_bytes()
    with open(bytes(tmp_path / "in") + b"/\xff.jpg", "wb") as file:
        file.write(source)
    code, output = call_predict(f"run={finished}", "device=cpu", tmp_path / "in", tmp_path / "out")
    assert code == 0, output
    assert rows(tmp_path / "out")[0]["image"].endswith(r"/\udcff.jpg")


@pytest.mark.slow
def test_odd_images_do_not_end_a_folder(finished, images, tmp_path, call_predict):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "in" / "text.jpg").write_text("no image")
    Image.new("L", (60000, 1)).save(tmp_path / "in" / "wide.png")
    Image.new("CMYK", (30, 40)).save(tmp_path / "in" / "z.jpg")
    code, output = call_predict(f"run={finished}", "device=cpu", tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert "zoo-predict: error: 3 of 4 files can't be read as images, beginning with" in output
    assert [row["image"] for row in rows(tmp_path / "out")] == [str(tmp_path / "in" / "z.jpg")]
    assert len(content(tmp_path / "out")["left_out"]) == 3


@pytest.mark.slow
def test_image_that_the_model_can_not_take(finished, images, tmp_path, monkeypatch, capsys):
    original = predict.Normalize.__call__

    def normalize(self, batch):
        if batch.float().mean() < 1 or len(batch) > 1:  # black, or too large for the memory
            raise torch.OutOfMemoryError("no memory")
        return original(self, batch)

    monkeypatch.setattr(predict.Normalize, "__call__", normalize)
    Image.new("RGB", (30, 40)).save(tmp_path / "black.png")
    inputs = Inputs([tmp_path / "black.png", images / "val" / "apple"], tmp_path / "out")
    with pytest.raises(
        UserError, match=r"^1 of 6 files are images that the model can't take, beginning with .*black.png"
    ):
        predict.predict(settings(finished), inputs, tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 5
    assert "black.png is left out: the model can't take it (no memory)" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_all_is_written_when_it_is_interrupted(finished, images, tmp_path, monkeypatch):
    calls = []

    def transform(*_):
        calls.append(1)
        if len(calls) > 9:  # after a batch of eight
            raise KeyboardInterrupt
        return torch.zeros(3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(predict, "build_transform", lambda *_: transform)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(settings(finished), Inputs([images / "val"], tmp_path / "out"), tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 8


@pytest.mark.parametrize("name", predict.NAMES[2:])
def test_image_is_not_written_over(finished, images, tmp_path, name):
    (tmp_path / name).write_bytes((images / "val" / "apple" / "0_00.jpg").read_bytes())
    with pytest.raises(UserError, match=r"predictions.png would be overwritten"):
        predict.predict(settings(finished), Inputs([tmp_path], tmp_path), tmp_path)


def test_output_folder_that_is_a_file(call_predict, finished, images, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, output = call_predict(f"run={finished}", images / "val", tmp_path / "out")
    assert code == 1
    assert "out is a file, and can't be the output folder" in output
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["lr=0.1", "a,b", "a [1] {2}", "it's", "Фото", "$HOME", "007"])
def test_run_folder_with_any_name(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    cfg, _, _ = command.parse([f"run=runs/{name}", "a.png", "out"])
    assert cfg.run == f"runs/{name}"


@pytest.mark.parametrize("name", ["./lr=0.1", "out =", "new/lr=0.1", "Фото 1=2"])
def test_output_folder_with_an_equals_sign(name):
    _, _, out = command.parse(["run=x", "a.png", name])
    assert str(out) == name.removeprefix("./")


def test_dashes_are_refused(call_predict):
    code, output = call_predict("run=x", "--score", "0.3", "a.png", "out")
    assert code == 1
    assert "write score=0.3 for --score" in output


@pytest.mark.slow
def test_all_is_written_whatever_reads_the_output(finished, images, tmp_path):
    command = f"{sys.executable} -m zoo.recipes.predict run={finished} device=cpu {images / 'val'} out | true"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr == ""
    assert len(rows(tmp_path / "out")) == 15
    assert (tmp_path / "out" / "predictions.png").exists()
