"""Images and labels that can't be read, in training and evaluation of detectors and segmentors. 5 s, slow 30 s."""

import json
import re
import shutil

import pytest

from zoo.messages import UserError
from zoo.recipes import tasks

evaluate = tasks.load("segment", "evaluate").evaluate


@pytest.fixture
def damaged(digit_scenes, tmp_path):
    """A copy of the digit scenes with damaged files: `damage(split, number, ...)` gives their paths and the root."""

    def damage(*numbers, split="train", kind="images", how="cut"):
        root = tmp_path / "scenes"
        if not root.exists():
            shutil.copytree(digit_scenes, root)
        files = sorted((root / kind / split).iterdir())
        for number in numbers:
            data = files[number].read_bytes()
            files[number].write_bytes({"cut": data[: len(data) // 2], "empty": b""}[how])
        return root, [str(files[number]) for number in numbers]

    return damage


def _names(summary):
    return {entry.split(" (")[0] for entry in summary["corrupt_images"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "how"),
    [
        pytest.param("detect", "images", "cut", marks=pytest.mark.slow),
        ("segment", "images", "empty"),
        pytest.param("segment", "labels", "cut", marks=pytest.mark.slow),
    ],
)
def test_corrupt_files_are_skipped_counted_and_named(fit_dense, damaged, tmp_path, task, kind, how):
    root, files = damaged(*range(12), kind=kind, how=how)
    result = fit_dense(tmp_path / "run", f"data.root={root}", task=task)
    assert result["updates"] == 2
    assert _names(result)
    assert _names(result) <= set(files)
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(f"Skipped a corrupt image: {name} (" in log for name in _names(result))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["corrupt_images"] == len(result["corrupt_images"])


@pytest.mark.slow
def test_too_many_corrupt_images_stop_the_run_with_the_list(fit_dense, damaged, tmp_path):
    root, files = damaged(*range(12))
    with pytest.raises(UserError, match=r"images are corrupt, more than data\.max_corrupt=1; .*corrupt\.txt lists"):
        fit_dense(tmp_path / "run", f"data.root={root}", "data.max_corrupt=1", task="segment")
    listed = {line.split(" (")[0] for line in (tmp_path / "run" / "corrupt.txt").read_text().splitlines()}
    assert len(listed) > 1
    assert listed <= set(files)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_all_corrupt(fit_dense, damaged, tmp_path, workers):
    root, _ = damaged(*range(16))
    words = (f"data.root={root}", "data.check_files=0", f"data.num_workers={workers}")
    with pytest.raises(UserError, match=r"^\d+ corrupt images in a row; the first is .*: check the data\.$"):
        fit_dense(tmp_path / "run", *words, task="segment")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", pytest.param("segment", marks=pytest.mark.long)])
def test_corrupt_validation_image_does_not_count(fit_dense, damaged, tmp_path, task):
    root, files = damaged(1, split="val")
    result = fit_dense(tmp_path / "run", f"data.root={root}", task=task, pictures=True)
    assert (result["val_images"], _names(result)) == (3, set(files))
    assert "on 3 validation images" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_corrupt_validation_label_counts_no_pixels(fit_dense, damaged, tmp_path):
    root, files = damaged(1, split="val", kind="labels")
    result = fit_dense(tmp_path / "run", f"data.root={root}", task="segment")
    assert (result["val_images"], _names(result)) == (3, set(files))
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert sum(classes["counts"]) == 3 * 128 * 128


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param("detect", marks=pytest.mark.long), "segment"])
def test_zoo_eval_leaves_corrupt_images_out_and_says_so(compose, finished_dense, damaged, tmp_path, task):
    root, files = damaged(1, split="val")
    words = [f"run={finished_dense[task]}", f"data.root={root}", f"out={tmp_path / 'out'}"]
    result = evaluate(compose(*words, name="eval"), [word.partition("=")[0] for word in words])
    assert (result["data"]["images"], _names(result)) == (3, set(files))
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["corrupt_images"] == result["corrupt_images"]


@pytest.mark.long
@pytest.mark.slow
def test_a_run_over_corrupt_images_goes_on_as_if_never_ended(fit_dense, damaged, tmp_path, weights, same):
    root, _ = damaged(*range(12))
    words = (f"data.root={root}", "schedule=constant")
    whole = fit_dense(tmp_path / "whole", *words, "trainer.max_updates=2")
    fit_dense(tmp_path / "parts", *words, "trainer.max_updates=1")
    parts = fit_dense(tmp_path / "parts", *words, "trainer.max_updates=2")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [re.sub("^.*/", "", name) for name in parts["corrupt_images"]] == [
        re.sub("^.*/", "", name) for name in whole["corrupt_images"]
    ]
