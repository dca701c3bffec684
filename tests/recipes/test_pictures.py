"""The pictures of detectors and segmentors, on grey images that are large enough not to be resized. A few seconds."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.recipes.dense import prepare

prepare("detect")

from mmengine.structures import InstanceData, PixelData  # noqa: E402  after mmcv's operators are there

from zoo.recipes.dense import pictures  # noqa: E402

GREY = np.full((400, 500, 3), 127, np.uint8)


def _changed(picture):
    assert picture.size == (500, 400)
    return (np.asarray(picture) != GREY).any(-1)


@pytest.fixture
def grey():
    return Image.fromarray(GREY)


@pytest.fixture
def instances():
    """An object with a high score on the left, one with a low score on the right; masks fill the boxes."""
    masks = torch.zeros(2, 400, 500, dtype=torch.bool)
    masks[0, 100:200, 50:150] = masks[1, 100:200, 300:400] = True
    boxes = torch.tensor([[50.0, 100, 150, 200], [300, 100, 400, 200]])
    return InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), scores=torch.tensor([0.9, 0.3]), masks=masks)


def test_objects_are_drawn_where_they_are(grey, instances):
    changed = _changed(pictures.draw_sample(grey, _Sample(instances), ["a", "b"], score=0.2))
    assert changed[100:200, 50:150].all()
    assert changed[100:200, 300:400].all()
    assert not changed[210:].any()
    assert not changed[:, 450:].any()


@pytest.mark.parametrize(("limit", "drawn"), [(0.3, 2), (0.31, 1), (0.95, 0)])
def test_objects_below_the_score_are_not_drawn(grey, instances, limit, drawn):
    instances.scores = torch.tensor([0.9, 0.3], dtype=torch.float64)
    changed = _changed(pictures.draw_sample(grey, _Sample(instances), ["a", "b"], score=limit))
    assert [bool(changed[150, 100]), bool(changed[150, 350])] == [drawn > 0, drawn > 1]


def test_boxes_alone_are_outlines(grey):
    changed = _changed(pictures.draw_objects(grey, torch.tensor([[50.0, 100, 150, 200]]), torch.tensor([0]), ["a"]))
    assert changed[150, 50]
    assert not changed[160:195, 60:140].any()


def test_classes_have_colours_of_their_own(grey, instances):
    picture = np.asarray(pictures.draw_sample(grey, _Sample(instances), ["a", "b"], score=0.2))
    assert (picture[190, 100] != picture[190, 350]).any()
    assert len(set(pictures.colors(150))) == 150


def test_labels_are_drawn_but_for_what_is_no_class(grey):
    labels = torch.full((400, 500), 255)
    labels[:100], labels[100:200] = 0, 1
    picture = pictures.draw_labels(grey, labels, ["a", "b"])
    changed = _changed(picture)
    assert changed[:200].all()
    assert not changed[200:].any()
    assert (np.asarray(picture)[50, 50] != np.asarray(picture)[150, 50]).any()


def test_background_is_not_drawn(grey):
    labels = torch.zeros(400, 500, dtype=torch.long)
    labels[:100] = 1
    changed = _changed(pictures.draw_labels(grey, labels, ["background", "b"]))
    assert changed[:100].all()
    assert not changed[100:].any()


def test_labels_without_a_class_change_nothing(grey):
    assert not _changed(pictures.draw_labels(grey, torch.full((400, 500), 255), ["a", "b"])).any()


def _rows(picture, box):
    """The rows below the top of a picture in which something is drawn beside a box, in its columns."""
    changed = (np.asarray(picture) != 127).any(-1)
    left, top, right, bottom = box
    changed[top : bottom + 1, left : right + 1] = False
    return np.flatnonzero(changed[:, left:right].any(1))


@pytest.mark.parametrize(
    ("box", "above"),
    [([200, 200, 220, 215], True), ([200, 2, 220, 20], False), ([480, 380, 499, 399], True), ([0, 100, 9, 109], True)],
    ids=["inside", "at the top", "in the corner", "at the left"],
)
def test_labels_do_not_cover_small_objects(grey, box, above):
    picture = pictures.draw_objects(grey, torch.tensor([box]).float(), torch.tensor([0]), ["a long name"])
    pixels = np.asarray(picture)[box[1] + 3 : box[3] - 2, box[0] + 3 : box[2] - 2]
    assert (pixels == 127).all()
    rows = _rows(picture, box)
    assert len(rows) > 10
    assert (rows < box[1]).all() if above else (rows > box[3] - 3).all()


def test_label_of_what_fills_the_picture_is_inside(grey):
    picture = pictures.draw_objects(grey, torch.tensor([[0.0, 0, 500, 400]]), torch.tensor([0]), ["a"])
    assert (np.asarray(picture)[4:15, 4:10] != 127).any()


@pytest.mark.parametrize(
    ("colour", "text"),
    [
        *[((255, 38, 38), "white"), ((28, 74, 191), "white"), ((80, 40, 255), "white"), ((0, 0, 0), "white")],
        *[((255, 255, 38), "black"), ((38, 255, 217), "black"), ((255, 255, 255), "black")],
    ],
)
def test_labels_can_be_read(colour, text):
    assert pictures._readable_on(colour) == text


def test_lines_are_wider_in_large_images():
    picture = pictures.draw_objects(
        Image.new("RGB", (3000, 2000)), torch.tensor([[500.0, 500, 2500, 1500]]), torch.tensor([0]), ["a"]
    )
    assert (np.asarray(picture)[1000, 490:520] > 0).any(-1).sum() == 8


def test_a_box_that_ends_before_it_begins_is_drawn(grey):
    pictures.draw_objects(grey, torch.tensor([[100.0, 100, 99, 98]]), torch.tensor([0]), ["a"])


def test_pictures_are_drawn_in_the_width_that_is_wanted(grey):
    boxes, masks = torch.tensor([[100.0, 100, 200, 200]]), torch.zeros(1, 400, 500, dtype=torch.bool)
    picture = pictures.draw_objects(grey, boxes, torch.tensor([0]), ["a"], None, masks, width=250)
    assert picture.size == (250, 200)
    assert (np.asarray(picture)[75, 50] != 127).any()
    assert pictures.draw_labels(grey, torch.zeros(400, 500, dtype=torch.long), ["a"], width=250).size == (250, 200)


def test_small_images_are_enlarged(instances):
    small = Image.fromarray(GREY[:64, :128])
    boxes, masks = torch.tensor([[10.0, 10, 30, 30]]), torch.zeros(1, 64, 128, dtype=torch.bool)
    masks[0, 10:30, 10:30] = True
    picture = pictures.draw_objects(small, boxes, torch.tensor([0]), ["a"], torch.tensor([0.5]), masks)
    assert picture.size == (768, 384)
    assert (np.asarray(picture)[120, 120] != 127).any()
    assert (np.asarray(picture)[300, 600] == 127).all()


def test_found_labels_are_drawn(grey):
    sample = _Sample(pred_sem_seg=PixelData(data=torch.zeros(1, 400, 500, dtype=torch.long)))
    assert _changed(pictures.draw_sample(grey, sample, ["a", "b"])).all()


class _Sample(dict):
    """A sample of mmdet or mmseg, with only what the drawing functions read."""

    def __init__(self, instances=None, **parts):
        super().__init__(parts if instances is None else {"pred_instances": instances, **parts})
        self.__dict__.update(self)
