"""Digit scenes: the content of the files, which appear whole or not at all. 10 s; the slow one 20 s."""

import hashlib
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from zoo.messages import UserError
from zoo.recipes import scenes
from zoo.recipes.digits import Digits

FEW = {"train": 12, "val": 5, "test": 5}
SPLITS = tuple(FEW)


@pytest.fixture(autouse=True)
def few(monkeypatch, request):
    if request.node.name != "test_all_scenes":
        monkeypatch.setattr(scenes, "SCENES", FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of few scenes; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", FEW)
        return scenes.ensure(tmp_path_factory.mktemp("scenes") / "digits")


@pytest.fixture
def coco(folder):
    return lambda split: COCO(folder / "annotations" / f"instances_{split}.json")


def _decode(coco, annotation):
    return coco.annToMask(annotation).astype(bool)


def _hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _load(folder, kind, split, image):
    return np.asarray(Image.open(folder / kind / split / image["file_name"]))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_coco_file_lists_every_scene(coco, folder, split):
    images = coco(split).dataset["images"]
    assert [image["file_name"] for image in images] == sorted(os.listdir(folder / "images" / split))
    assert len(images) == FEW[split]


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_rgb_of_the_size_given(coco, folder, split):
    shapes = {_load(folder, "images", split, image).shape for image in coco(split).dataset["images"]}
    assert shapes == {(scenes.SIZE, scenes.SIZE, 3)}


@pytest.mark.parametrize("split", SPLITS)
def test_categories_are_the_digits(coco, split):
    categories = coco(split).dataset["categories"]
    assert [(c["id"], c["name"]) for c in categories] == [(digit + 1, str(digit)) for digit in range(10)]


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_are_those_of_the_masks(coco, split):
    data = coco(split)
    for annotation in data.dataset["annotations"]:
        rows, columns = np.nonzero(_decode(data, annotation))
        x, y, width, height = annotation["bbox"]
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + width, y + height)


@pytest.mark.parametrize("split", SPLITS)
def test_areas_are_those_of_the_masks(coco, split):
    data = coco(split)
    assert all(a["area"] == _decode(data, a).sum() > 0 and a["iscrowd"] == 0 for a in data.dataset["annotations"])


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_masks(coco, folder, split):
    data = coco(split)
    for image in data.dataset["images"]:
        painted, times = np.zeros((2, scenes.SIZE, scenes.SIZE), np.uint8)
        for annotation in data.imgToAnns[image["id"]]:
            painted[_decode(data, annotation)] = annotation["category_id"]
            times += _decode(data, annotation)
        assert times.max() == 1
        np.testing.assert_array_equal(_load(folder, "labels", split, image), painted)


def test_digits_stand_out_in_the_picture(coco, folder):
    data = coco("train")
    for image in data.dataset["images"]:
        light = _load(folder, "images", "train", image) @ (0.299, 0.587, 0.114)
        background = np.median(light[_load(folder, "labels", "train", image) == 0])
        for annotation in data.imgToAnns[image["id"]]:
            assert abs(np.median(light[_decode(data, annotation)]) - background) > 40


def test_polygons_and_rle_are_both_there(coco):
    assert {type(a["segmentation"]) for a in coco("train").dataset["annotations"]} == {list, dict}


def test_boxes_overlap_little(coco):
    data = coco("train")
    for image in data.dataset["images"]:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in data.imgToAnns[image["id"]])]
        assert all(scenes._overlap(a, b) < 0.3 for i, a in enumerate(boxes) for b in boxes[:i])  # of the visible parts


def test_classes_file(folder):
    assert (folder / "classes.txt").read_text().split() == list(scenes.CLASSES)


def test_polygon_of_a_corner():
    mask = np.array([[1, 0], [1, 1]], bool)
    assert scenes.outlines(mask) == [[0, 0, 1, 0, 1, 1, 2, 1, 2, 2, 0, 2]]


def test_pixels_that_touch_at_a_corner_are_two_polygons():
    assert scenes.outlines(np.eye(2, dtype=bool)) == [[0, 0, 1, 0, 1, 1, 0, 1], [1, 1, 2, 1, 2, 2, 1, 2]]


def test_hole_is_an_outline_too():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert [len(polygon) for polygon in scenes.outlines(ring)] == [8, 8]


def test_ring_becomes_rle():
    ring = np.ones((9, 9), bool)
    ring[3:6, 3:6] = False
    described = scenes.describe(ring)
    np.testing.assert_array_equal(coco_mask.decode(described["segmentation"]), ring)


def test_test_digits_are_no_training_digits():
    pools = {split: {image.tobytes() for image, _ in pool} for split, pool in scenes.pools().items()}
    assert not pools["train"] & (pools["val"] | pools["test"])
    assert not pools["val"] & pools["test"]


def test_digits_are_those_of_classification():
    assert len(scenes.pools()["train"]) == len(Digits(True))
    held_out = [*scenes.pools()["val"], *scenes.pools()["test"]]
    assert {image.tobytes() for image, _ in held_out} == {image.tobytes() for image in Digits(False).images}


@pytest.mark.parametrize("split", SPLITS)
def test_every_digit_is_in_every_pool(split):
    assert {label for _, label in scenes.pools()[split]} == set(range(10))


def test_scene_does_not_depend_on_what_was_drawn():
    image = scenes.draw("val", 3)[0]
    scenes.draw("val", 2)
    np.testing.assert_array_equal(scenes.draw("val", 3)[0], image)


def test_scenes_differ():
    assert not np.array_equal(scenes.draw("val", 3)[0], scenes.draw("test", 3)[0])


@pytest.mark.slow
def test_same_bytes_every_time(folder, tmp_path):
    assert _hashes(scenes.ensure(tmp_path / "again")) == _hashes(folder)


@pytest.mark.slow
def test_written_once(tmp_path, monkeypatch):
    root = scenes.ensure(tmp_path / "digits")
    monkeypatch.setattr(scenes, "_write", None)
    assert scenes.ensure(root) == root


@pytest.mark.slow
def test_empty_folder_is_used(tmp_path):
    assert (scenes.ensure(tmp_path) / "VERSION").exists()


@pytest.mark.slow
def test_cache_is_used_without_a_root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scenes.ensure(None) == tmp_path / "zoo" / "digit_scenes-1"


def test_cache_is_below_home_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scenes.cache_folder() == tmp_path / ".cache" / "zoo" / "digit_scenes-1"


def test_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        UserError, match=r"has other content \(thesis\.tex\) than these digit scenes: give a new or empty"
    ):
        scenes.ensure(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_another_version_is_refused(tmp_path):
    (tmp_path / "VERSION").write_text("digit scenes 0\n")
    with pytest.raises(UserError, match="has other content"):
        scenes.ensure(tmp_path)


def test_file_as_root_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file can't be used for the digit scenes"):
        scenes.ensure(tmp_path / "file")


def test_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(folder):
        (folder / "images").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "_write", full)
    with pytest.raises(UserError, match=r"can't be written to .*digits \(No space left on device\): choose another"):
        scenes.ensure(tmp_path / "digits")
    assert os.listdir(tmp_path) == []


def _fork(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def _die_in_the_middle(root):
    draw = scenes.draw

    def deadly(split, number):
        if (split, number) == ("val", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(split, number)

    scenes.draw = deadly
    scenes.ensure(root)


@pytest.mark.slow
def test_killed_writer_leaves_nothing_that_counts(folder, tmp_path):
    process = _fork(_die_in_the_middle, tmp_path / "digits")
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "digits").exists()
    assert _hashes(scenes.ensure(tmp_path / "digits")) == _hashes(folder)


@pytest.mark.slow
def test_several_writers_at_once(folder, tmp_path):
    scenes.pools()
    processes = [_fork(scenes.ensure, tmp_path / "digits") for _ in range(3)]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["digits"]
    assert _hashes(tmp_path / "digits") == _hashes(folder)


@pytest.mark.slow
def test_old_leftovers_are_removed_and_new_ones_kept(tmp_path):
    old, new = (tmp_path / f".digits-{name * 8}.tmp" for name in "ab")
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    scenes.ensure(tmp_path / "digits")
    assert (old.exists(), new.exists()) == (False, True)


def test_track_yields_everything():
    assert list(scenes.track(iter("abc"), 3, "letters")) == ["a", "b", "c"]


@pytest.mark.long
def test_all_scenes(tmp_path):
    root = scenes.ensure(tmp_path / "digits")
    for split, count in {"train": 600, "val": 150, "test": 150}.items():
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        per_image = np.bincount([a["image_id"] for a in content["annotations"]])[1:]
        assert (len(content["images"]), per_image.min(), per_image.max()) == (count, 1, 5)
        assert {a["category_id"] for a in content["annotations"]} == set(range(1, 11))
