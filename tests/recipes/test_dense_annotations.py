"""COCO JSON with bad numbers and masks: what is refused, what is counted, what COCO's tools get. A few seconds."""

import json
import logging
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from zoo.messages import UserError
from zoo.recipes.dense.annotations import _decode_runs, category_names, count_boxes, load_annotations, normalise

WIDTH, HEIGHT = 40, 30
CLASSES = ["dog", "cat"]
HUGE = 10**400
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def propagate(monkeypatch):
    monkeypatch.setattr(logging.getLogger("zoo"), "propagate", True)  # a run may have turned it off
    logging.getLogger("zoo").setLevel(logging.INFO)


def _content():
    box = [5, 6, 10, 8]
    polygon = [5, 6, 15, 6, 15, 14, 5, 14]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 3, "bbox": box, "area": 80, "iscrowd": 0, "segmentation": [polygon]}
            for i in (1, 2)
        ],
    }


@pytest.fixture
def count(tmp_path):
    """Write a JSON of two images with a box each, of which the second is changed, and count its boxes."""

    def run(masks=True, content=None, **change):
        path = tmp_path / "boxes.json"
        content = content or _content()
        content["annotations"][1].update(change)
        path.write_text(json.dumps(content))
        loaded = load_annotations(path)
        return count_boxes(path, loaded, category_names(path, loaded), CLASSES, True, masks)

    return run


def _refuse(match, call):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


# Numbers.


@pytest.mark.parametrize(
    "box",
    [[], [5, 6, 10], [5, 6, 10, 8, 1], [5, 6, 10, "8"], [5, 6, 10, None], [5, 6, 10, True], [5, 6, 10, [8]]],
    ids=["empty", "three", "five", "text", "null", "bool", "list"],
)
def test_box_that_is_not_four_numbers(count, box):
    _refuse(r"boxes\.json: annotation 2 has bbox=\[.*\]: four numbers", lambda: count(bbox=box))


@pytest.mark.parametrize("place", range(4))
def test_box_with_nan(count, place):
    box = [5, 6, 10, 8]
    box[place] = NAN
    _refuse(r"annotation 2 has bbox=\[.*nan.*\]: four numbers", lambda: count(bbox=box))


@pytest.mark.parametrize("value", [INF, -INF, 1e300, 1e9, HUGE, -HUGE, 401], ids=str)
@pytest.mark.parametrize("place", range(4))
def test_box_far_away(count, value, place):
    box = [5, 6, 10, 8]
    box[place] = value
    _refuse(r"annotation 2 has bbox=\[.*\], far from its image of 40x30 pixels", lambda: count(bbox=box))


def test_box_somewhat_outside_is_left_out(count, caplog):
    assert count(bbox=[300, 6, 10, 8]).by_class == [1, 0]
    assert "has 1 boxes of less than a pixel within their image" in caplog.text


@pytest.mark.parametrize("area", [NAN, INF, 1e300, HUGE, "80", True, [80]], ids=str)
def test_area_that_is_none(count, area):
    _refuse(r"annotation 2 has area=.*: a number of pixels is needed", lambda: count(area=area))


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
@pytest.mark.parametrize("value", [2, -1, 0.5, NAN, "0", "yes", [], [0], {}], ids=str)
def test_flag_that_is_none(count, flag, value):
    _refuse(f"annotation 2 has {flag}=.*: 0 or 1 is needed", lambda: count(**{flag: value}))


@pytest.mark.parametrize("value", [1, True, 1.0])
def test_crowds_by_any_spelling_of_one(count, value):
    assert count(iscrowd=value).by_class == [1, 0]


@pytest.mark.parametrize("field", ["image_id", "category_id"])
@pytest.mark.parametrize("value", [None, True, 1.0, 2**63, -(2**63) - 1, [1], NAN], ids=str)
def test_number_that_names_nothing(count, field, value):
    _refuse(f"number 1 of its annotations has {field}=.*: it has to be a whole number", lambda: count(**{field: value}))


@pytest.mark.parametrize("value", [None, 0, -5, True, 1.5, "a", 2**70, [1], NAN], ids=str)
def test_annotations_are_told_apart_whatever_their_ids_are(count, value):
    assert count(id=value).by_class == [2, 0]


def test_annotation_ids_twice_are_counted(count, caplog):
    assert count(id=1).by_class == [2, 0]
    assert "uses 1 annotation ids more than once; the first is 1: all of them count" in caplog.text


def test_annotation_without_an_id_is_named_by_its_place(count):
    _refuse("annotation number 1 has bbox=", lambda: count(id=[1], bbox=[1]))


def _changed(kind, **change):
    content = _content()
    content[kind][1].update(change)
    return content


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value", [0, -30, 29.5, 1e9, 100_001, True, "30", None, NAN, INF, HUGE, [30]], ids=str)
def test_side_of_an_image_that_is_none(count, side, value):
    content = _changed("images", **{side: value})
    _refuse(
        f"number 1 of its images has {side}=.*: it has to be a whole number of pixels, 1 to 100000",
        lambda: count(content=content),
    )


def test_more_pixels_than_the_tools_count(count):
    content = _changed("images", width=100_000, height=100_000)
    _refuse("image 2 has 100000x100000 pixels", lambda: count(content=content))


def test_whole_sides_may_be_floats(count):
    content = _changed("images", width=40.0, height=30.0)
    count(content=content)
    image = normalise(content, CLASSES)["images"][1]
    assert [type(image[side]) for side in ("width", "height")] == [int, int]


@pytest.mark.parametrize("value", [True, 1.0, 2**63, None, "", "a\0b", "\ud800", [1], {}], ids=ascii)
def test_image_id_that_is_none(count, value):
    content = _changed("images", id=value)
    _refuse("number 1 of its images has id=.*: it has to be a whole number or a string", lambda: count(content=content))


def test_image_ids_of_both_kinds(count):
    """pycocotools would convert the numbers to strings, and find no boxes for them."""
    content = _changed("images", id="b")
    _refuse(
        "has image ids of both kinds, numbers and strings such as 'b'", lambda: count(content=content, image_id="b")
    )


@pytest.mark.parametrize("value", [None, 5, "", "a\0.png", "\udcff.png", ["a.png"], True], ids=ascii)
def test_file_name_that_is_none(count, value):
    content = _changed("images", file_name=value)
    _refuse("number 1 of its images has file_name=.*: it has to be a string", lambda: count(content=content))


@pytest.mark.parametrize("value", [True, 7.0, "7", None, 2**63, [7]], ids=str)
def test_category_id_that_is_none(count, value):
    content = _changed("categories", id=value)
    _refuse("number 1 of its categories has id=.*: it has to be a whole number", lambda: count(content=content))


@pytest.mark.parametrize("value", [True, 1.5, None, "", "\ud800", ["cat"]], ids=ascii)
def test_category_name_that_is_none(count, value):
    content = _changed("categories", name=value)
    _refuse("number 1 of its categories has name=.*: it has to be a string", lambda: count(content=content))


@pytest.mark.slow
@pytest.mark.parametrize("field", ["bbox", "area", "iscrowd"])
def test_messages_of_long_values_are_short(count, field):
    _refuse(f"annotation 2 has {field}=", lambda: count(**{field: [[1.5] * 1000] * 1000}))


def test_deeply_nested_json(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}")
    _refuse("is not usable JSON: its lists are nested too deeply", lambda: load_annotations(path))


def test_panoptic_annotations_are_named(count):
    content = _content()
    content["annotations"][0] = {"segments_info": []}
    _refuse("has COCO's panoptic annotations .*: use task=panoptic, or give COCO's", lambda: count(content=content))


# Masks.

_FAR = "far from its image of 40x30 pixels"
MASKS = {
    "none": (None, "segmentation=None"),
    "text": ("5 6 15 6", "segmentation='5 6 15 6'"),
    "number": (5, "segmentation=5"),
    "true": (True, "segmentation=True"),
    "empty": ([], r"segmentation=\[\]"),
    "empty-polygon": ([[]], r"segmentation=\[\[\]\]: a polygon has three points or more"),
    "two-points": ([[1, 2, 3, 4]], "a polygon has three points or more"),
    "odd": ([[5, 6, 15, 6, 15, 14, 5]], "a polygon has three points or more"),
    "flat": ([5, 6, 15, 6, 15, 14], "is not a list of polygons"),
    "points": ([[[5, 6], [15, 6], [15, 14]]], r"a polygon has \[5, 6\] in place of a number"),
    "runs-in-a-list": ([{"size": [HEIGHT, WIDTH], "counts": [1200]}], "is not a list of polygons"),
    "null": ([[None, 6, 15, 6, 15, 14]], "a polygon has None in place of a number"),
    "bool": ([[True, 6, 15, 6, 15, 14]], "a polygon has True in place of a number"),
    "word": ([[5, 6, 15, 6, 15, "14"]], "a polygon has '14' in place of a number"),
    "nan-first": ([[NAN, 6, 15, 6, 15, 14]], f"a polygon has nan, {_FAR}"),
    "nan-last": ([[5, 6, 15, 6, 15, NAN]], f"a polygon has nan, {_FAR}"),
    "infinite": ([[5, 6, 15, 6, -INF, 14]], f"a polygon has -inf, {_FAR}"),
    "1e300": ([[5, 6, 15, 6, 1e300, 14]], rf"a polygon has 1e\+300, {_FAR}"),
    "huge": ([[5.5, 6, 15, 6, HUGE, NAN]], f"a polygon has 100.*, {_FAR}"),
    "far": ([[5, 6, 15, 6, 1e9, 14]], f"a polygon has 1000000000.0, {_FAR}"),
    "second-far": ([[5, 6, 15, 6, 15, 14], [5, 6, 15, 6, 1e9, 14]], _FAR),
    "no-size": ({"counts": [1200]}, "its RLE has size=None, but the image has height 30 and width 40"),
    "turned": ({"size": [WIDTH, HEIGHT], "counts": [1200]}, r"its RLE has size=\[40, 30\]"),
    "floating-size": ({"size": [30.0, 40.0], "counts": [1200]}, r"its RLE has size=\[30.0, 40.0\]"),
    "no-counts": ({"size": [HEIGHT, WIDTH]}, "its RLE has counts=None: whole numbers or"),
    "no-runs": ({"size": [HEIGHT, WIDTH], "counts": []}, r"its RLE has counts=\[\]"),
    "number-of-runs": ({"size": [HEIGHT, WIDTH], "counts": 1200}, "its RLE has counts=1200"),
    "half-a-run": ({"size": [HEIGHT, WIDTH], "counts": [599.5, 600.5]}, "its RLE has counts="),
    "bool-run": ({"size": [HEIGHT, WIDTH], "counts": [True, 1199]}, "its RLE has counts="),
    "null-run": ({"size": [HEIGHT, WIDTH], "counts": [None, 1199]}, "its RLE has counts="),
    "negative-run": ({"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}, "its RLE has a run of -5 pixels"),
    "short": (
        {"size": [HEIGHT, WIDTH], "counts": [5, 5]},
        "the runs of its RLE have 10 pixels, but the image has 1200",
    ),
    "long": ({"size": [HEIGHT, WIDTH], "counts": [5, 5000]}, "the runs of its RLE have 5005 pixels"),
    "huge-run": ({"size": [HEIGHT, WIDTH], "counts": [HUGE]}, "the runs of its RLE have 100.* pixels"),
    "wraps": ({"size": [HEIGHT, WIDTH], "counts": [2**32, 1200]}, "the runs of its RLE have"),
    "words": ({"size": [HEIGHT, WIDTH], "counts": "hello world"}, "the string of its RLE can't be decoded"),
    "no-text": ({"size": [HEIGHT, WIDTH], "counts": ""}, "the string of its RLE can't be decoded, counts=''"),
    "other-script": ({"size": [HEIGHT, WIDTH], "counts": "éö"}, "the string of its RLE can't be decoded"),
    "surrogate": ({"size": [HEIGHT, WIDTH], "counts": "\ud800"}, "the string of its RLE can't be decoded"),
    "cut": ({"size": [HEIGHT, WIDTH], "counts": "P"}, "the string of its RLE can't be decoded"),
    "endless-number": ({"size": [HEIGHT, WIDTH], "counts": "o" * 40 + "0"}, "the string of its RLE can't be decoded"),
    "short-text": ({"size": [HEIGHT, WIDTH], "counts": "51"}, "the runs of its RLE have 6 pixels"),
    "negative-text": ({"size": [HEIGHT, WIDTH], "counts": "O51"}, "its RLE has a run of -1 pixels"),
}


@pytest.mark.parametrize(("segmentation", "reason"), MASKS.values(), ids=MASKS)
def test_mask_that_is_none(count, segmentation, reason):
    _refuse(
        rf"boxes\.json: 1 objects have no mask \(.*\); the first is annotation 2 \(.*{reason}.*\): correct "
        r"segmentation, or find boxes alone with dense\.masks=false",
        lambda: count(segmentation=segmentation),
    )


@pytest.mark.parametrize("segmentation", [mask for mask, _ in MASKS.values()], ids=MASKS)
def test_mask_that_is_none_becomes_the_box_where_nobody_looks_at_masks(count, segmentation):
    assert count(masks=False, segmentation=segmentation).by_class == [2, 0]
    content = normalise(_changed("annotations", segmentation=segmentation), CLASSES)
    assert content["annotations"][1]["segmentation"] == [[5, 6, 15, 6, 15, 14, 5, 14]]


def test_bad_mask_of_a_box_that_is_left_out(count):
    """Training omits it, but COCO's metric rasterizes it."""
    assert count(bbox=[5, 6, 0, 8], segmentation=[[None] * 6]).by_class == [1, 0]
    content = normalise(_changed("annotations", bbox=[5, 6, 0, 8], segmentation=[[None] * 6]), CLASSES)
    assert content["annotations"][1]["segmentation"] == [[5, 6, 5, 6, 5, 14, 5, 14]]


def test_polygons_without_area_beside_others_are_counted(count, caplog):
    polygon = [5, 6, 15, 6, 15, 14]
    assert count(segmentation=[[1, 2], polygon, [*polygon, 3]]).has_masks
    assert "has 1 masks with polygons of fewer than three points or half a point; the first is annotation 2" in (
        caplog.text
    )


@pytest.mark.parametrize("kind", ["polygon", "runs", "text"])
def test_mask_that_is_one(count, kind):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[6:14, 5:15] = 1
    text = coco_mask.encode(mask)["counts"].decode()
    runs = {"size": [HEIGHT, WIDTH], "counts": _decode_runs(text).tolist()}
    text = {"size": [HEIGHT, WIDTH], "counts": text}
    segmentation = {"polygon": [[5, 6, 15, 6, 15, 14, 5, 14]], "runs": runs, "text": text}[kind]
    assert count(segmentation=segmentation).has_masks
    assert normalise(_changed("annotations", segmentation=segmentation), CLASSES)["annotations"][1]["segmentation"] == (
        segmentation
    )


@pytest.mark.parametrize("density", [0, 0.001, 0.02, 0.5, 0.98, 1])
def test_compressed_runs_are_those_of_pycocotools(density):
    mask = np.random.default_rng(0).random((301, 417)) < density
    runs = _decode_runs(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode())
    decoded = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape, order="F")
    np.testing.assert_array_equal(decoded, mask)


def test_nothing_but_three_lists_is_handed_on(count):
    content = _content() | {"info": json.loads("[" * 900 + "]" * 900), "licenses": math.nan}
    content["categories"][0]["skeleton"] = [[1, 2]]
    count(content=content)
    assert set(normalise(content, CLASSES)) == {"images", "annotations", "categories"}
