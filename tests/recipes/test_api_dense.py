"""train, evaluate and predict from Python for detectors and segmentors: the commands' figures, and hooks. 40 s."""

import json
import weakref

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from zoo.recipes import Hooks, evaluate, plots, predict, report, tasks, train

SETTINGS = {  # those of conftest.py
    "dense.digits_first": False,
    "dense.warmup_updates": 0,
    "data.num_workers": 0,
    "trainer.batch_size": 2,
    "trainer.device": "cpu",
    "log.wandb": "disabled",
}


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than these trainings."""
    monkeypatch.setattr(plots, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(report, "write_or_warn", lambda folder: (folder / "report.html").touch())
    train_module = tasks.load("detect", "train")
    monkeypatch.setattr(train_module.pictures, "draw_samples", lambda *args, **kwargs: None)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_training_is_the_commands(finished_dense, digit_scenes, weights, same, summary, no_pictures, tmp_path, task):
    seen, models = [], []

    def note(name):
        return lambda state: seen.append((name, state.update, dict(state.metrics)))

    def stop(state):
        note("update")(state)
        models.append(weakref.ref(state.model))
        if state.update == 3:
            state.stop()

    settings = {"task": task, "data.root": digit_scenes, "optim.lr": 1e-5, "trainer.max_updates": 100, **SETTINGS}
    hooks = Hooks(stop, note("evaluation"), note("epoch"))
    result = train({**settings, "run": tmp_path / "run"}, hooks=hooks)
    assert [model() for model in models] == [None] * 3  # its memory is free again
    assert result.stopped_early == "Stopped by a hook, after update 3."
    theirs = summary(finished_dense[task])  # which ended after three updates by trainer.max_updates
    assert result.metrics == theirs["metrics"]
    assert same(weights(result.folder), weights(finished_dense[task]))
    assert [entry[:2] for entry in seen] == [
        *(("update", number) for number in (1, 2, 3)),
        *((name, 3) for name in ("evaluation", "epoch")),
    ]
    losses = [metrics["loss"] for name, _, metrics in seen if name == "update"]
    assert np.mean(losses) == pytest.approx(result.history[-1]["train_loss"])
    assert same(result.model().state_dict(), weights(result.folder))


@pytest.mark.slow
def test_objects_are_the_commands(finished_dense, digit_scenes, call_predict, no_pictures, tmp_path):
    run, file = finished_dense["detect"], next((digit_scenes / "images" / "val").glob("*.png"))
    code, output = call_predict(f"run={run}", file, tmp_path / "out", "score=0.05", "device=cpu")
    assert code == 0, output
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    typed = sorted(content["annotations"], key=lambda item: -item["score"])
    [found] = predict(run, np.asarray(Image.open(file).convert("RGB")), {"score": 0.05, "device": "cpu"})
    assert len(typed) == len(found.classes) > 0
    assert found.classes == [names[item["category_id"]] for item in typed]
    assert found.scores.tolist() == [np.float32(item["score"]) for item in typed]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in typed)]
    assert found.boxes == pytest.approx(np.array(corners), abs=1e-4)
    assert np.array_equal(found.masks, [coco_mask.decode(item["segmentation"]) for item in typed])
    assert (found.boxes.dtype, found.masks.dtype, found.masks.shape[1:]) == (np.float32, bool, found.size)

    result = evaluate(run, {"out": tmp_path / "eval", "trainer.device": "cpu"})
    written = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert (result.metrics, result.per_class) == (written["metrics"], written["per_class"])
    assert (result.confusion, result.targets, result.predictions) == (None, None, None)


@pytest.mark.slow
def test_labels_are_the_commands(finished_dense, digit_scenes, call_predict, no_pictures, tmp_path):
    run, file = finished_dense["segment"], next((digit_scenes / "images" / "val").glob("*.png"))
    code, output = call_predict(f"run={run}", file, tmp_path / "out", "device=cpu")
    assert code == 0, output
    [found] = predict(run, file, {"device": "cpu"})
    assert found.labels.dtype == np.int64
    assert np.array_equal(found.labels, Image.open(tmp_path / "out" / "labels" / file.name))
    assert found.classes == (tmp_path / "out" / "classes.txt").read_text().split()
    result = evaluate(run, {"out": tmp_path / "eval", "trainer.device": "cpu"})
    assert result.confusion.shape == (len(found.classes),) * 2


@pytest.mark.slow
def test_panoptic(panoptic_digit_scenes, call_predict, no_pictures, tmp_path):
    settings = {"task": "panoptic", "data.root": panoptic_digit_scenes, **SETTINGS, "trainer.max_updates": 1}
    updates = []
    result = train({**settings, "run": tmp_path / "run"}, hooks=Hooks(after_update=lambda state: updates.append(state)))
    assert [state.update for state in updates] == [1]
    assert "PQ" in result.metrics
    files = sorted((panoptic_digit_scenes / "images" / "val").glob("*.png"))[:2]
    code, output = call_predict(f"run={result.folder}", *files, tmp_path / "out", "device=cpu")
    assert code == 0, output
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    for found, typed in zip(predict(result.folder, files, {"device": "cpu"}), content["annotations"], strict=True):
        assert found.classes == [names[item["category_id"]] for item in typed["segments_info"]]
        pixels = np.asarray(Image.open(tmp_path / "out" / "labels" / typed["file_name"])).astype(np.int64)
        ids = pixels @ [1, 256, 256**2]
        known = np.array([-1, *(item["id"] for item in typed["segments_info"])])
        assert np.array_equal(np.where(found.labels < 0, 0, known[found.labels + 1]), ids)
        assert found.boxes.shape == (len(found.classes), 4)
