"""Detection and segmentation data: what is found, what is refused, and the messages. 20 s, most of it imports."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import scenes
from zoo.recipes.config import DataConfig
from zoo.recipes.dense import prepare
from zoo.recipes.dense.annotations import normalise
from zoo.recipes.dense.detection_data import open_detection
from zoo.recipes.dense.segmentation_data import open_segmentation, pair_files, read_labels

for task in ("detect", "segment"):
    prepare(task)

WIDTH, HEIGHT = 40, 30


@pytest.fixture(autouse=True)
def propagate(monkeypatch):
    monkeypatch.setattr(logging.getLogger("zoo"), "propagate", True)  # a run may have turned it off
    logging.getLogger("zoo").setLevel(logging.INFO)


def _image(path, size=(WIDTH, HEIGHT), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)


def _annotation(number, image, category, box=(5, 6, 10, 8), **more):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [polygon],
        **more,
    }


def _content():
    """Three images, the last without a box; category ids have gaps and are not sorted."""
    images = [{"id": 10 * i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, 4)]
    return {
        "images": images,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [_annotation(0, 10, 7), _annotation(1, 10, 3, (20, 3, 12, 12)), _annotation(2, 20, 7)],
    }


class Folder:
    """A data set in the layout of COCO, which tests change before they open it."""

    def __init__(self, root):
        self.root, self.contents = root, {"train": _content(), "val": _content()}
        for split in self.contents:
            for number in (1, 2, 3):
                _image(root / split / f"{number}.jpg")
        (root / "annotations").mkdir()

    def path(self, split):
        return self.root / "annotations" / f"instances_{split}.json"

    def write(self):
        for split, content in self.contents.items():
            if not self.path(split).exists():
                self.path(split).write_text(json.dumps(content))

    def open(self, training=True, classes=None, masks=False, **options):
        self.write()
        cfg = DataConfig(**{"name": "coco", "root": str(self.root), **options})
        return open_detection(cfg, training, classes, masks)


@pytest.fixture
def coco(tmp_path):
    return Folder(tmp_path / "coco")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A few digit scenes; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 12, "val": 5, "test": 5})
        return scenes.ensure(tmp_path_factory.mktemp("scenes") / "digits")


# Detection: what is found.


def test_classes_are_in_the_order_of_category_ids(coco):
    assert coco.open().classes == ["dog", "cat"]


def test_boxes_are_counted_by_class(coco):
    data = coco.open()
    assert (data.train.boxes, data.train.num_boxes) == ([1, 2], 3)


def test_training_counts_images_with_boxes(coco):
    data = coco.open()
    assert (data.train.num_images, data.train.num_empty) == (2, 1)


def test_evaluation_counts_all_images(coco):
    data = coco.open()
    assert (data.val.num_images, data.val.num_empty) == (3, 1)


def test_evaluation_alone_needs_no_training_files(coco):
    coco.write()
    coco.path("train").unlink()
    shutil.rmtree(coco.root / "train")
    del coco.contents["train"]
    data = coco.open(training=False)
    assert (data.train, data.val.num_boxes) == (None, 3)


def test_splits_follow_the_names_given(coco):
    shutil.move(coco.root / "val", coco.root / "val2017")
    coco.write()
    coco.path("val").rename(coco.path("val2017"))
    del coco.contents["val"]
    assert coco.open(val_split="val2017").val.images == coco.root / "val2017"


def test_layout_of_images_below_images(coco):
    for split in ("train", "val"):
        (coco.root / "images").mkdir(exist_ok=True)
        shutil.move(coco.root / split, coco.root / "images" / split)
    assert coco.open().train.images == coco.root / "images" / "train"


def test_layout_with_json_beside_the_images(coco):
    coco.write()
    shutil.move(coco.root / "val", coco.root / "valid")
    for split, folder in (("train", "train"), ("val", "valid")):
        shutil.move(coco.path(split), coco.root / folder / "_annotations.coco.json")
    coco.contents = {}
    data = coco.open()
    assert data.val.images == coco.root / "valid"


def test_files_and_folders_named_explicitly(coco, tmp_path):
    coco.write()
    shutil.move(coco.path("train"), tmp_path / "mine.json")
    shutil.move(coco.root / "train", coco.root / "photos")
    del coco.contents["train"]
    data = coco.open(train_ann=str(tmp_path / "mine.json"), train_images="photos")
    assert (data.train.annotations, data.train.images) == (tmp_path / "mine.json", coco.root / "photos")


def test_image_folder_is_found_for_a_json_of_ones_own(coco):
    coco.write()
    shutil.move(coco.path("train"), coco.root / "mine.json")
    shutil.move(coco.root / "train", coco.root / "images")
    del coco.contents["train"]
    assert coco.open(train_ann="mine.json").train.images == coco.root / "images"


USUAL = {"train_split": "train2017", "val_split": "val2017"}  # data=coco


@pytest.mark.parametrize("below", ["", "images"], ids=["root", "images"])
def test_images_of_a_json_of_ones_own_are_in_the_folder_of_its_split(coco, below):
    coco.write()
    for split in ("train", "val"):
        (coco.root / below).mkdir(exist_ok=True)
        if below:
            shutil.move(coco.root / split, coco.root / below / split)
        coco.path(split).rename(coco.root / f"{split}.json")
    coco.contents = {}
    data = coco.open(train_ann="train.json", val_ann="val.json", **USUAL)
    assert (data.train.images, data.val.images) == (coco.root / below / "train", coco.root / below / "val")


def test_images_of_a_test_set_are_in_the_folder_of_its_name(coco):
    coco.write()
    shutil.copytree(coco.root / "val", coco.root / "test")
    coco.path("val").rename(coco.root / "test.json")
    del coco.contents["val"]
    assert coco.open(training=False, val_ann="test.json", **USUAL).val.images == coco.root / "test"


def test_images_beside_a_json_of_ones_own_without_a_root(coco):
    coco.write()
    coco.path("val").rename(coco.root / "mine.json")
    coco.contents = {}
    data = coco.open(training=False, root=None, val_ann=str(coco.root / "mine.json"), **USUAL)
    assert data.val.images == coco.root / "val"


def test_validation_on_training_images_is_refused_unless_asked_for(coco, caplog):
    (coco.root / "link").symlink_to(coco.root / "train")
    del coco.contents["train"]["images"][2]
    _refuse(
        r"2 of the 3 validation images are training images too; the first is .*link/1\.jpg: give each split its own "
        r"images, or allow this with data\.same_images=true",
        lambda: coco.open(val_images="link"),
    )
    coco.open(val_images="link", same_images=True)
    assert "the first is" in caplog.text


def test_links_to_training_images_are_training_images(coco):
    for number in (1, 3):
        (coco.root / "val" / f"{number}.jpg").unlink()
    (coco.root / "val" / "1.jpg").symlink_to(coco.root / "train" / "1.jpg")
    (coco.root / "val" / "3.jpg").hardlink_to(coco.root / "train" / "3.jpg")
    _refuse(r"2 of the 3 validation images are training images too; the first is .*val/1\.jpg", coco.open)


@pytest.mark.slow
def test_digit_scenes(digits):
    data = open_detection(DataConfig(name="digit_scenes", root=str(digits)), masks=True)
    assert (data.classes, data.train.num_images, data.has_masks) == (list("0123456789"), 12, True)


def test_test_split_of_digit_scenes(digits):
    data = open_detection(DataConfig(name="digit_scenes", root=str(digits), val_split="test"), training=False)
    assert data.val.annotations.name == "instances_test.json"


def test_class_map_gives_the_order(coco, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    data = coco.open(class_map=str(tmp_path / "names.txt"))
    assert (data.classes, data.train.boxes) == (["cat", "dog"], [2, 1])


def test_class_map_of_another_editor(coco, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\r\ndog\r\n")
    assert coco.open(class_map=str(tmp_path / "names.txt")).classes == ["cat", "dog"]


def test_classes_of_a_checkpoint_give_the_order(coco):
    data = coco.open(classes=["cat", "dog"])
    assert (data.classes, data.val.boxes) == (["cat", "dog"], [2, 1])


def test_images_turned_by_exif_fit(coco):
    exif = Image.Exif()
    exif[0x0112] = 6
    _image(coco.root / "train" / "1.jpg", size=(HEIGHT, WIDTH), exif=exif)
    assert coco.open().train.num_images == 2


def test_crowds_are_no_boxes(coco, caplog):
    coco.contents["train"]["annotations"][0]["iscrowd"] = 1
    assert coco.open().train.boxes == [1, 1]
    assert "1 crowds (iscrowd)" in caplog.text


def test_summary_of_detection(coco):
    assert coco.open().summary() == [
        "training: 3 boxes in 2 images, 1 more without a box are left out: cat 66.7 %, dog 33.3 %",
        "validation: 3 boxes in 3 images, 1 of them without a box: cat 66.7 %, dog 33.3 %",
    ]


# Detection: warnings.


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [5, 6, 0, 8]},
        {"bbox": [5, 6, 10, -8]},
        {"bbox": [5, 6, 0.5, 8]},
        {"bbox": [WIDTH, 6, 10, 8]},
        {"bbox": [-20, 6, 10, 8]},
        {"area": 0},
    ],
    ids=["no-width", "negative", "half-a-pixel", "right-of-image", "left-of-image", "no-area"],
)
def test_boxes_without_area_are_counted_and_left_out(coco, caplog, change):
    coco.contents["train"]["annotations"][2].update(change)
    data = coco.open()
    assert (data.train.boxes, data.train.num_images) == ([1, 1], 1)
    assert "has 1 boxes of less than a pixel within their image or marked `ignore`; the first is annotation 2" in (
        caplog.text
    )


@pytest.mark.parametrize("box", [[-3, 6, 10, 8], [35, 6, 10, 8]], ids=["left", "right"])
def test_boxes_that_reach_outside_are_counted(coco, caplog, box):
    coco.contents["train"]["annotations"][2]["bbox"] = box
    assert coco.open().train.num_boxes == 3
    assert "has 1 boxes that reach outside their image; the first is annotation 2: they are clipped" in caplog.text


def test_rounding_is_not_outside(coco, caplog):
    coco.contents["train"]["annotations"][2]["bbox"] = [30, 6, 10.6, 8]
    coco.open()
    assert "reach outside" not in caplog.text


def test_class_without_boxes_is_named(coco, caplog):
    del coco.contents["train"]["annotations"][1]
    coco.open()
    assert "instances_train.json has no box of 1 of the 2 classes: 'dog'" in caplog.text


# Detection: errors.


def _refuse(message, call):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((".", "?"))


def test_no_root():
    _refuse(r"data\.root is not set: give the folder", lambda: open_detection(DataConfig(name="coco")))


def test_missing_root_with_its_nearest_name(coco):
    _refuse(r"data\.root=.*cocoo does not exist: did you mean .*coco\?", lambda: coco.open(root=f"{coco.root}o"))


def test_root_is_a_file(coco):
    coco.write()
    _refuse("is a file, not a folder", lambda: coco.open(root=str(coco.path("val"))))


def test_missing_annotations(coco):
    _refuse(r"has no annotations of the split 'vall' \(.*instances_vall\.json or ", lambda: coco.open(val_split="vall"))


def test_missing_annotation_file(coco):
    _refuse(r"data\.val_ann=.*mine\.json does not exist", lambda: coco.open(val_ann="mine.json"))


def test_annotation_file_is_a_folder(coco):
    _refuse(
        r"data\.train_ann=.*annotations is a folder: give the file in it, for example .*/instances_train\.json",
        lambda: coco.open(train_ann="annotations"),
    )


@pytest.mark.parametrize("name", ["data.yaml", "1.txt", "1.xml", "labels"])
def test_annotations_of_another_format(coco, name):
    _ = (coco.root / name).mkdir() if name == "labels" else (coco.root / name).write_text("names: [cat, dog]")
    _refuse(
        f"{name} is .*: give .*, or, for data of YOLO or Pascal VOC, only data.root=<folder>",
        lambda: coco.open(train_ann=name),
    )


def test_missing_image_folder(coco):
    _refuse(r"data\.val_images=.*photos does not exist", lambda: coco.open(val_images="photos"))


def test_image_folder_is_a_file(coco):
    coco.write()
    _refuse("is a file, not a folder", lambda: coco.open(val_images="annotations/instances_val.json"))


def test_images_nowhere(coco):
    shutil.rmtree(coco.root / "val")
    _refuse(
        r"the images of .*instances_val\.json, for example 1\.jpg, are in none of .*: give data\.val_images=",
        lambda: coco.open(training=False),
    )


def test_missing_images(coco):
    (coco.root / "train" / "2.jpg").unlink()
    (coco.root / "train" / "3.jpg").unlink()
    _refuse(r"2 of the 3 images of .*instances_train\.json do not exist; the first is .*train/2\.jpg", coco.open)


def test_missing_folder_below_the_images(coco):
    coco.contents["train"]["images"][1]["file_name"] = "more/2.jpg"
    _refuse(r"1 of the 3 images of .* do not exist; the first is .*more/2\.jpg", coco.open)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "is not JSON: "),
        (b"", "is not JSON: "),
        (b"\x89PNG", "is not text"),
        (b"\xff\xfe{", "is not text"),
    ],
    ids=["text", "empty", "image", "half-a-letter"],
)
def test_not_json(coco, content, message):
    coco.write()
    coco.path("train").write_bytes(content)
    _refuse(rf"instances_train\.json {message}", coco.open)


@pytest.mark.parametrize("content", [[], {}, {"images": {}, "annotations": [], "categories": []}])
def test_not_coco(coco, content):
    coco.contents["train"] = content
    _refuse("has no list of images.*: COCO annotations have images, annotations, categories", coco.open)


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_lacking_list(coco, kind):
    del coco.contents["train"][kind]
    _refuse(f"has no list of {kind}: COCO", coco.open)


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [
        ("images", "id", [1], "a whole number or a string"),
        ("images", "file_name", None, "a string"),
        ("images", "height", "30", "a whole number of pixels, 1 to 100000"),
        ("annotations", "bbox", None, "a list"),
        ("annotations", "image_id", None, "a whole number or a string"),
        ("categories", "id", "7", "a whole number"),
        ("categories", "name", None, "a string or a whole number"),
    ],
)
def test_field_of_the_wrong_type(coco, kind, field, value, allowed):
    coco.contents["train"][kind][1][field] = value
    _refuse(f"number 1 of its {kind} has {field}=.*: it has to be {allowed}", coco.open)


def test_entry_of_the_wrong_type(coco):
    coco.contents["train"]["images"][1] = "2.jpg"
    _refuse("number 1 of its images has id=None", coco.open)


def test_image_id_twice(coco):
    coco.contents["train"]["images"][1]["id"] = 10
    _refuse("uses 1 image ids more than once; the first is 10", coco.open)


def test_no_images(coco):
    coco.contents["train"]["images"] = []
    _refuse("has no images: there is nothing to do", coco.open)


def test_no_categories(coco):
    coco.contents["train"]["categories"] = []
    _refuse("has no categories: it needs one for every class", coco.open)


def test_category_id_twice(coco):
    coco.contents["train"]["categories"][1]["id"] = 7
    _refuse("uses the category id 7 more than once", coco.open)


def test_category_name_twice(coco):
    coco.contents["train"]["categories"][1]["name"] = "cat"
    _refuse(r"has 2 categories named 'cat' \(ids 7, 3\): remove those that no box has, or rename", coco.open)


def test_annotation_of_a_missing_image(coco):
    coco.contents["train"]["annotations"][1]["image_id"] = 99
    _refuse(
        "1 annotations name an image that is not among its images; the first is annotation 1 with image_id 99",
        coco.open,
    )


def test_annotation_of_a_missing_category(coco):
    coco.contents["train"]["annotations"][1]["category_id"] = 4
    _refuse(
        "1 annotations have a category that is not among its categories; the first is annotation 1 with "
        "category_id 4: the ids are 3, 7",
        coco.open,
    )


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")]], ids=["three", "text", "nan"])
def test_box_that_is_none(coco, box):
    coco.contents["train"]["annotations"][1]["bbox"] = box
    _refuse(r"annotation 1 has bbox=\[.*\]: four numbers x, y, width, height are needed", coco.open)


def test_area_that_is_none(coco):
    coco.contents["train"]["annotations"][1]["area"] = "80"
    _refuse(r"annotation 1 has area='80': a number of pixels is needed", coco.open)


@pytest.mark.parametrize(("split", "purpose"), [("train", "learn from"), ("val", "score predictions by")])
def test_no_boxes(coco, split, purpose):
    coco.contents[split]["annotations"] = []
    _refuse(f"instances_{split}.json has no boxes to {purpose}", coco.open)


def test_crowds_alone(coco):
    for annotation in coco.contents["train"]["annotations"]:
        annotation["iscrowd"] = 1
    _refuse("has no boxes to learn from", coco.open)


@pytest.mark.parametrize(
    "segmentation",
    [None, [], [[1, 2, 3, 4]], {"size": [1, 1], "counts": "01"}, {"size": [HEIGHT, WIDTH]}],
    ids=["none", "empty", "two-points", "rle-of-another-size", "rle-without-counts"],
)
def test_missing_mask(coco, segmentation):
    coco.contents["train"]["annotations"][1]["segmentation"] = segmentation
    _refuse(
        r"1 objects have no mask .*; the first is annotation 1 \(.*\): .* dense\.masks=false",
        lambda: coco.open(masks=True),
    )


def test_missing_mask_matters_to_masks_only(coco):
    coco.contents["train"]["annotations"][1].pop("segmentation")
    data = coco.open()
    assert (data.has_masks, data.val.has_masks) == (False, True)


def test_rle_is_a_mask(coco):
    coco.contents["train"]["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [100, 50, 1050]}
    assert coco.open(masks=True).has_masks


def test_other_classes_in_validation(coco):
    coco.contents["val"]["categories"][0]["name"] = "cats"
    _refuse(
        r"instances_val\.json has other classes than the 2 training classes: 1 missing, 'cat'; 1 unknown, 'cats' "
        r"\(did you mean 'cat'\?\): its names have to be the same",
        coco.open,
    )


@pytest.mark.parametrize(
    ("classes", "difference"),
    [(["dog", "cat", "owl"], "1 missing, 'owl':"), (["dog"], "1 unknown, 'cat':"), (["a", "b"], "2 missing")],
)
def test_other_classes_than_a_checkpoint(coco, classes, difference):
    _refuse(difference, lambda: coco.open(training=False, classes=classes))


def test_other_number_of_classes_detection(coco):
    _refuse(r"data\.num_classes=3, but .* has 2 classes: leave it out", lambda: coco.open(num_classes=3))


def test_image_of_another_size(coco):
    _image(coco.root / "train" / "2.jpg", size=(HEIGHT, WIDTH))
    _refuse(r"train/2\.jpg is 30x40 pixels .*, but .*instances_train\.json gives 40x30", coco.open)


def test_text_saved_as_an_image(coco):
    (coco.root / "train" / "2.jpg").write_text("<html>not found</html>")
    _refuse(r"train/2\.jpg is text, not an image: remove or replace it", coco.open)


@pytest.mark.parametrize("content", [b"", bytes(range(256))], ids=["empty", "random"])
def test_image_that_is_none_is_skipped(coco, caplog, content):
    (coco.root / "train" / "2.jpg").write_bytes(content)
    assert coco.open().train.num_images == 2
    assert "1 of 3 images of instances_train.json can't be read; the first is" in caplog.text


def test_no_image_can_be_read(coco):
    for number in (1, 2, 3):
        (coco.root / "train" / f"{number}.jpg").write_bytes(b"")
    _refuse(r"none of the 3 images of instances_train\.json can be read; the first is .*1\.jpg", coco.open)


def test_image_of_more_pixels_than_the_limit(coco, caplog):
    _image(coco.root / "train" / "2.jpg", size=(WIDTH + 1, HEIGHT))
    coco.open(max_pixels=WIDTH * HEIGHT)
    assert "more than data.max_pixels=1200 pixels): they are skipped" in caplog.text


def test_unchecked_files_are_not_opened(coco):
    (coco.root / "train" / "2.jpg").write_text("<html>not found</html>")
    assert coco.open(check_files=0).train.num_images == 2


# Detection: what mmdet reads.


def _dataset(split, training=True):
    from mmdet.registry import DATASETS

    return DATASETS.build(split.dataset([], training))


def test_normalise_leaves_ordered_ids_alone():
    content = normalise(_content(), ["dog", "cat"])
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(3, "dog"), (7, "cat")]
    assert [a["category_id"] for a in content["annotations"]] == [7, 3, 7]


def test_normalise_makes_ids_rise_with_labels():
    content = normalise(_content(), ["cat", "dog"])
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(3, "cat"), (7, "dog")]
    assert [a["category_id"] for a in content["annotations"]] == [3, 7, 3]


def test_normalise_fills_in_what_may_be_absent():
    content = _content()
    content["annotations"] = [{"image_id": 10, "category_id": 7, "bbox": [5, 6, 10, 8]}]
    assert normalise(content, ["dog", "cat"])["annotations"] == [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [5, 6, 10, 8], "iscrowd": 0, "ignore": 0, "area": 80}
        | {"segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]]}
    ]


def test_normalise_drops_polygons_of_two_points():
    content = _content()
    content["annotations"][0]["segmentation"].insert(0, [1, 2, 3, 4])
    assert normalise(content, ["dog", "cat"])["annotations"][0]["segmentation"] == [[5, 6, 15, 6, 15, 14, 5, 14]]


@pytest.mark.slow
def test_mmdet_labels_follow_the_names(coco):
    items = list(_dataset(coco.open().train))
    assert [[i["bbox_label"] for i in item["instances"]] for item in items] == [[1, 0], [1]]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_text_of_other_editors(coco, encoding):
    """mmdet's reader and COCO's metric accept what the checks accept."""
    for split in coco.contents:
        text = json.dumps(coco.contents[split], indent=1, ensure_ascii=False).replace("\n", "\r\n")
        mark = "\ufeff" if encoding == "utf-16-le" else ""
        coco.path(split).write_bytes((mark + text).encode(encoding))
    data = coco.open()
    assert len(_dataset(data.train)) == 2
    assert _score(data, data.classes, masks=True, content=_content())["coco/segm_mAP"] == 1


@pytest.mark.slow
def test_mmdet_drops_what_is_not_counted(coco):
    annotations = coco.contents["train"]["annotations"]
    annotations[2]["bbox"][2] = 0
    annotations.append(_annotation(3, 30, 7, iscrowd=1))
    split = coco.open().train
    assert len(_dataset(split)) == split.num_images == 1


@pytest.mark.slow
def test_mmdet_keeps_empty_images_in_evaluation(coco):
    split = coco.open().val
    assert len(_dataset(split, training=False)) == split.num_images == 3


def _score(data, classes, masks=False, content=None, **options):
    """COCO's scores of predictions that equal the annotations, with labels in the order of `classes`."""
    from mmdet.registry import METRICS
    from pycocotools import mask as coco_mask

    content = content or json.loads(data.val.annotations.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    metric = METRICS.build({**data.val.metrics(masks), **options})
    metric.dataset_meta = {"classes": tuple(classes)}
    for image in content["images"]:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        prediction = {
            "bboxes": boxes,
            "scores": torch.ones(len(found)),
            "labels": torch.tensor([classes.index(names[a["category_id"]]) for a in found], dtype=torch.int64),
        }
        if masks:
            prediction["masks"] = [
                coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], HEIGHT, WIDTH)) for a in found
            ]
        sample = {"img_id": image["id"], "ori_shape": (HEIGHT, WIDTH), "pred_instances": prediction}
        metric.process({}, [sample])
    return metric.evaluate(len(content["images"]))


def test_perfect_predictions_score_one(coco):
    data = coco.open()
    scores = _score(data, data.classes, masks=True)
    assert (scores["coco/bbox_mAP"], scores["coco/segm_mAP"]) == (1, 1)


@pytest.mark.parametrize("ids", [(7, 3), (3, 7), (0, 1)], ids=["as-in-training", "other-ids", "from-zero"])
@pytest.mark.parametrize("listed", [1, -1], ids=["as-listed", "reversed"])
def test_scores_go_by_name(coco, ids, listed):
    """mmdetection#9611: a validation file that numbers or lists the categories differently."""
    val = coco.contents["val"]
    for category, new in zip(val["categories"], ids, strict=True):
        for annotation in val["annotations"]:
            if annotation["category_id"] == category["id"]:
                annotation["new"] = new
        category["id"] = new
    for annotation in val["annotations"]:
        annotation["category_id"] = annotation.pop("new")
    val["categories"] = val["categories"][::listed]
    data = coco.open()
    assert _score(data, data.classes)["coco/bbox_mAP"] == 1


def test_objects_in_corrupt_images_do_not_score(coco):
    from mmdet.registry import METRICS

    metric = METRICS.build(coco.open().val.metrics(masks=False))
    metric.dataset_meta = {"classes": ("dog", "cat")}
    found = {"bboxes": torch.tensor([[5.0, 6, 15, 14]]), "scores": torch.ones(1), "labels": torch.tensor([1])}
    samples = [{"img_id": image, "ori_shape": (HEIGHT, WIDTH), "pred_instances": found} for image in (10, 20)]
    samples[0]["corrupt"] = ["1.jpg (cut)"]
    metric.process({}, samples)
    scores = metric.evaluate(2)
    assert (scores["coco/bbox_mAP"], math.isnan(scores["coco/dog_precision"])) == (1, True)


def test_wrong_labels_score_less(coco):
    data = coco.open()
    assert _score(data, data.classes[::-1])["coco/bbox_mAP"] < 0.5


def test_scores_of_single_classes_go_by_name(coco):
    """No objects of one class are found: the score of the other class must not get its name."""
    data = coco.open(classes=["cat", "dog"])
    from mmdet.registry import METRICS

    metric = METRICS.build({**data.val.metrics(False), "classwise": True})
    metric.dataset_meta = {"classes": ("cat", "dog")}
    dog = {"bboxes": torch.tensor([[20.0, 3, 32, 15]]), "scores": torch.ones(1), "labels": torch.tensor([1])}
    none = {"bboxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    for image, prediction in ((10, dog), (20, none), (30, none)):
        metric.process({}, [{"img_id": image, "ori_shape": (HEIGHT, WIDTH), "pred_instances": prediction}])
    scores = metric.evaluate(3)
    assert (scores["coco/cat_precision"], scores["coco/dog_precision"]) == (0, 1)


# Segmentation.


class Masks:
    """Images and labels of three classes, two per split, which tests change before they open them."""

    def __init__(self, root):
        self.root = root
        for split in ("train", "val"):
            for name in ("a", "b"):
                _image(root / "images" / split / f"{name}.jpg")
                self.label(split, name, self.pixels())
        (root / "classes.txt").write_text("road\ncar\nsky\n")

    @staticmethod
    def pixels():
        """0, 1, 2 and 255 in bands, 12 columns of each of the first two, 8 of the others."""
        return np.tile(np.repeat([0, 1, 2, 255], [12, 12, 8, 8]).astype(np.uint8), (HEIGHT, 1))

    def label(self, split, name, pixels, mode=None, palette=False):
        path = self.root / "annotations" / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        if palette:
            image.putpalette(bytes(range(256)) * 3)
        (image.convert(mode) if mode else image).save(path)

    def every(self, change):
        for split in ("train", "val"):
            for name in ("a", "b"):
                self.label(split, name, change(self.pixels()))

    def open(self, training=True, classes=None, **options):
        return open_segmentation(DataConfig(**{"name": "masks", "root": str(self.root), **options}), training, classes)


@pytest.fixture
def masks(tmp_path):
    return Masks(tmp_path / "masks")


def test_pixels_are_counted_by_class(masks):
    data = masks.open()
    assert data.train.pixels == [2 * HEIGHT * n for n in (12, 12, 8)]


def test_classes_file_of_the_root(masks):
    data = masks.open()
    assert (data.classes, data.train.num_images, data.reduce_zero_label) == (["road", "car", "sky"], 2, False)


def test_class_map_goes_first(masks, tmp_path):
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    assert masks.open(class_map=str(tmp_path / "names.txt")).classes == ["x", "y", "z"]


def test_number_of_classes(masks):
    (masks.root / "classes.txt").unlink()
    assert masks.open(num_classes=3).classes == ["0", "1", "2"]


def test_names_of_ade20k(masks):
    (masks.root / "classes.txt").unlink()
    classes = masks.open(num_classes=150, reduce_zero_label=True).classes
    assert (len(classes), classes[0], classes[7], classes[149]) == (150, "wall", "bed", "flag")


def test_layout_of_ade20k(masks):
    for kind in ("images", "annotations"):
        shutil.move(masks.root / kind / "train", masks.root / kind / "training")
        shutil.move(masks.root / kind / "val", masks.root / kind / "validation")
    data = masks.open(train_split="training", val_split="validation")
    assert data.val.labels == masks.root / "annotations" / "validation"


def test_labels_folder_of_another_name(masks):
    shutil.move(masks.root / "annotations", masks.root / "labels")
    assert masks.open().train.labels == masks.root / "labels" / "train"


def test_folders_named_explicitly(masks, tmp_path):
    shutil.move(masks.root / "images" / "train", tmp_path / "photos")
    shutil.move(masks.root / "annotations" / "train", masks.root / "drawn")
    data = masks.open(train_images=str(tmp_path / "photos"), train_labels="drawn")
    assert (data.train.images, data.train.labels) == (tmp_path / "photos", masks.root / "drawn")


def test_evaluation_alone(masks):
    shutil.rmtree(masks.root / "images" / "train")
    assert masks.open(training=False).train is None


@pytest.mark.slow
def test_digit_scenes_have_labels_too(digits):
    data = open_segmentation(DataConfig(name="digit_scenes", root=str(digits)))
    assert (data.classes, data.val.num_images, data.reduce_zero_label) == (list(scenes.CLASSES), 5, False)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "JPEG"])
def test_images_of_other_formats(masks, ending):
    for path in (masks.root / "images" / "train").iterdir():
        Image.open(path).save(path.with_suffix(f".{ending}"))
        path.unlink()
    assert masks.open().train.num_images == 2


def test_folders_below_the_split(masks):
    for kind in ("images", "annotations"):
        folder = masks.root / kind / "train"
        (folder / "city").mkdir()
        for path in list(folder.glob("a.*")):
            shutil.move(path, folder / "city" / path.name)
    data = masks.open()
    assert [image.name for image, _ in pair_files(data.train.images, data.train.labels)] == ["b.jpg", "a.jpg"]


def test_hidden_folders_and_files_are_no_data(masks):
    _image(masks.root / "images" / "train" / ".thumbnails" / "a.jpg")
    _image(masks.root / "images" / "train" / "._a.jpg")
    assert masks.open().train.num_images == 2


def test_palette_indices_are_labels(masks):
    masks.label("train", "a", masks.pixels(), palette=True)
    assert Image.open(masks.root / "annotations" / "train" / "a.png").mode == "P"
    assert masks.open().train.pixels == [2 * HEIGHT * n for n in (12, 12, 8)]


def test_sixteen_bits_are_labels_too(masks):
    masks.label("train", "a", masks.pixels().astype(np.uint16))
    assert masks.open().train.pixels == [2 * HEIGHT * n for n in (12, 12, 8)]


def test_another_ignore_index(masks):
    masks.every(lambda pixels: np.where(pixels == 255, 9, pixels).astype(np.uint8))
    assert masks.open(ignore_index=9).train.pixels == [2 * HEIGHT * n for n in (12, 12, 8)]


def test_reduced_labels_count_from_one(masks):
    (masks.root / "classes.txt").write_text("car\nsky\n")
    data = masks.open(reduce_zero_label=True)
    assert (data.train.pixels, data.reduce_zero_label) == ([2 * HEIGHT * 12, 2 * HEIGHT * 8], True)


def test_summary_of_segmentation(masks):
    line = "2 images, pixels of 2: road 37.5 %, car 37.5 %, sky 25.0 %"
    assert masks.open().summary() == [f"training: {line}", f"validation: {line}"]


def test_sample_of_the_labels(masks):
    split = masks.open(check_files=1).train
    assert (split.num_checked, split.num_images, sum(split.pixels)) == (1, 2, HEIGHT * 32)


def test_label_without_an_image_is_counted(masks, caplog):
    masks.label("train", "c", masks.pixels())
    assert masks.open().train.num_images == 2
    assert "has 1 labels without an image; the first is c.png" in caplog.text


def test_class_without_pixels_is_named(masks, caplog):
    masks.every(lambda pixels: np.minimum(pixels, 1))
    masks.open()
    assert "have no pixel of 1 of the 3 classes: 'sky'." in caplog.text


def test_labels_without_zero_are_pointed_out(masks, caplog):
    masks.every(lambda pixels: np.maximum(pixels, 1))
    masks.open()
    assert "'road'; where they count from 1, set data.reduce_zero_label=true." in caplog.text


# Segmentation: errors.


def test_labels_one_too_high(masks):
    (masks.root / "classes.txt").write_text("car\nsky\n")
    _refuse(
        r"the labels in .* go up to 2, but 2 classes have 0 to 1: set data\.reduce_zero_label=true if 0 is not a class",
        masks.open,
    )


def test_labels_one_too_high_without_zero(masks):
    masks.every(lambda pixels: np.where(pixels == 255, 255, pixels + 1).astype(np.uint8))
    _refuse(r"set data\.reduce_zero_label=true", masks.open)


def test_labels_one_too_high_and_not_reduced(masks):
    (masks.root / "classes.txt").write_text("car\nsky\n")
    _refuse(
        r"a\.png has the label 2 \(2 of 2 files have such labels\), but 2 classes have 0 to 1, and 255 do not count: .*"
        r"data\.ignore_index=<label> .* data\.num_classes, or data\.reduce_zero_label=true",
        lambda: masks.open(reduce_zero_label=False),
    )


def test_label_out_of_range(masks):
    masks.label("train", "b", np.where(masks.pixels() == 1, 77, masks.pixels()).astype(np.uint8))
    _refuse(r"train/b\.png has the label 77, but 3 classes have 0 to 2, and 255 do not count", masks.open)


def test_label_out_of_range_in_validation(masks):
    masks.label("val", "b", np.where(masks.pixels() == 1, 77, masks.pixels()).astype(np.uint8))
    _refuse(r"val/b\.png has the label 77", masks.open)


def test_reduced_label_out_of_range(masks):
    (masks.root / "classes.txt").write_text("car\nsky\n")
    masks.label("train", "b", np.where(masks.pixels() == 2, 3, masks.pixels()).astype(np.uint8))
    _refuse(
        r"b\.png has the label 3, but 2 classes have 1 to 2, and 0 and 255 do not count",
        lambda: masks.open(reduce_zero_label=True),
    )


def test_label_beyond_a_byte(masks):
    """mmseg would read 256 as 0."""
    masks.label("train", "a", np.where(masks.pixels() == 1, np.uint16(256), masks.pixels()))
    _refuse(r"a\.png has the label 256", masks.open)


def test_reduced_labels_with_an_ignore_index(masks):
    _refuse(
        r"data\.ignore_index=3 can't be used with data\.reduce_zero_label=true, where 0 is not a class and 1 to 3 are",
        lambda: masks.open(reduce_zero_label=True, ignore_index=3),
    )


@pytest.mark.parametrize("index", [-100, 65536])
def test_ignore_index_that_no_label_has(masks, index):
    _refuse(
        rf"data\.ignore_index={index} is not allowed: labels are 0 to 65535", lambda: masks.open(ignore_index=index)
    )


def test_ignore_index_of_a_class(masks):
    (masks.root / "classes.txt").unlink()
    _refuse(r"data\.ignore_index=255 is one of the 300 classes: set it", lambda: masks.open(num_classes=300))


def test_more_classes_than_labels(masks):
    (masks.root / "classes.txt").unlink()
    _refuse("the data has 70000 classes, but a PNG holds at most 65536 labels", lambda: masks.open(num_classes=70000))


def test_nothing_counts(masks):
    masks.every(lambda pixels: np.full_like(pixels, 255))
    _refuse("no pixel in .* counts, because all labels are 255", masks.open)


def test_masks_of_0_and_255(masks):
    (masks.root / "classes.txt").write_text("road\ncar\n")
    masks.every(lambda pixels: np.where(pixels == 0, 0, 255).astype(np.uint8))
    _refuse(
        r"are of one class, 'road' \(255 does not count\).* masks of 0 and 255 have to be written as 0 and 1",
        masks.open,
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_coloured_labels(masks, mode):
    masks.label("train", "a", masks.pixels(), mode=mode)
    _refuse(rf"a\.png has the mode {mode}, but a label has one channel of numbers, or a palette", masks.open)


def test_label_of_another_size(masks):
    masks.label("train", "a", masks.pixels().T.copy())
    _refuse(
        r"train/a\.png is 30x40 pixels, but .*train/a\.jpg is 40x30 .*: they have to be of the same size", masks.open
    )


def test_image_without_a_label(masks):
    _image(masks.root / "images" / "train" / "c.jpg")
    _refuse(
        r"1 of the 3 images in .* have no label in .*; the first is c\.jpg, which needs c\.png: add labels or remove",
        masks.open,
    )


def test_images_that_differ_in_their_endings(masks):
    _image(masks.root / "images" / "train" / "a.png")
    _refuse("differ only in their extensions: remove one of them", masks.open)


def test_labels_of_another_format(masks):
    for path in (masks.root / "annotations" / "train").iterdir():
        path.rename(path.with_suffix(".jpg"))
    _refuse(r"has no files that end in \.png: it has 'a\.jpg', 'b\.jpg'", masks.open)


def test_folder_without_images(masks):
    shutil.rmtree(masks.root / "images" / "train")
    (masks.root / "images" / "train").mkdir()
    _refuse(r"has no files that end in \.bmp, .*: it has nothing", masks.open)


def test_missing_split(masks):
    _refuse(
        r"there are no images of the split 'vall' in .*images/vall: name the split with data\.val_split=<name>, or the "
        r"folder with data\.val_images=<folder>",
        lambda: masks.open(val_split="vall"),
    )


def test_segmentation_of_training_images_is_refused_unless_asked_for(masks, caplog):
    same = {"val_images": "images/train", "val_labels": "annotations/train"}
    _refuse(r"2 of the 2 validation images are training images too; the first is", lambda: masks.open(**same))
    masks.open(**same, same_images=True)
    assert "2 of the 2 validation images are training images too; the first is" in caplog.text


def test_missing_labels(masks):
    shutil.rmtree(masks.root / "annotations" / "train")
    _refuse(r"there are no labels of the split 'train' in .*annotations/train or .*labels/train", masks.open)


def test_missing_explicit_labels(masks):
    _refuse(r"data\.train_labels=.*drawn does not exist", lambda: masks.open(train_labels="drawn"))


def test_missing_segmentation_root(tmp_path):
    cfg = DataConfig(name="masks", root=str(tmp_path / "none"))
    _refuse(r"data\.root=.*none does not exist", lambda: open_segmentation(cfg))


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_text_saved_as_an_image_or_label(masks, kind):
    path = next((masks.root / kind / "train").iterdir())
    path.write_text("<html>not found</html>")
    _refuse(f"{path.name} is text, not an image: remove or replace it", masks.open)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_truncated_image_or_label_is_skipped(masks, kind, caplog):
    [path] = (masks.root / kind / "train").glob("a.*")
    path.write_bytes(path.read_bytes()[:60])
    split = masks.open().train
    assert (split.num_checked, split.num_images, split.pixels) == (1, 2, [HEIGHT * n for n in (12, 12, 8)])
    assert f"1 of 2 labels in {split.labels} can't be read; the first is {path} (" in caplog.text


def test_no_classes_named(masks):
    (masks.root / "classes.txt").unlink()
    _refuse(r"does not name its classes: write .*classes\.txt .* data\.num_classes=<number>", masks.open)


def test_single_class(masks):
    (masks.root / "classes.txt").write_text("road\n")
    _refuse("the data has 1 class, 'road': segmentation needs two or more", masks.open)


def test_other_number_of_classes_segmentation(masks):
    _refuse(r"data\.num_classes=4, but .*classes\.txt has 3 classes: leave it out", lambda: masks.open(num_classes=4))


def test_missing_class_map(masks):
    _refuse(r"data\.class_map=none\.txt does not exist", lambda: masks.open(class_map="none.txt"))


def test_unreadable_class_file(masks):
    (masks.root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    _refuse(r"classes\.txt is not text in UTF-8 or UTF-16", masks.open)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old-mac"])
def test_class_file_of_other_editors(masks, encoding, end):
    (masks.root / "classes.txt").write_bytes(end.join(["road", "straße ", "sky", "", ""]).encode(encoding))
    assert masks.open().classes == ["road", "straße", "sky"]


@pytest.mark.parametrize(("text", "where"), [("", "it is empty"), ("road\n\nsky\n", "line 2 is empty")])
def test_gap_in_the_class_file(masks, text, where):
    (masks.root / "classes.txt").write_text(text)
    _refuse(f"has to name one class per line, but {where}", masks.open)


def test_class_named_twice(masks):
    (masks.root / "classes.txt").write_text("road\ncar\nroad\n")
    _refuse(r"classes\.txt names the class 'road' twice: make the names unique", masks.open)


def test_other_class_names_than_a_checkpoint(masks):
    _refuse(
        r"classes\.txt has other classes than the training, label 1 is 'car' and was 'sky' \(2 differ\)",
        lambda: masks.open(training=False, classes=["road", "sky", "car"]),
    )


def test_another_number_of_classes_than_a_checkpoint(masks):
    _refuse(
        r"classes\.txt says 3 classes, but the training had 2",
        lambda: masks.open(training=False, classes=["road", "car"]),
    )


def test_checkpoint_names_what_has_no_names(masks):
    (masks.root / "classes.txt").unlink()
    assert masks.open(training=False, classes=["road", "car", "sky"]).classes == ["road", "car", "sky"]


# Segmentation: what mmseg reads.

LOADING = [{"type": "LoadImage"}, {"type": "LoadLabels"}]


def _segments(split, training=True):
    from mmseg.registry import DATASETS

    return DATASETS.build(split.dataset(LOADING, training))


@pytest.mark.slow
def test_mmseg_reads_the_pairs(masks):
    image = masks.root / "images" / "train" / "a.jpg"
    Image.open(image).save(image.with_suffix(".png"))
    image.unlink()
    items = list(_segments(masks.open().train))
    assert [item["img_path"].rpartition("/")[2] for item in items] == ["a.png", "b.jpg"]
    np.testing.assert_array_equal(items[0]["gt_seg_map"], masks.pixels())


@pytest.mark.slow
def test_mmseg_reduces_labels(masks):
    (masks.root / "classes.txt").write_text("car\nsky\n")
    item = _segments(masks.open(reduce_zero_label=True).val)[0]
    assert item["gt_seg_map"].dtype == np.uint8
    assert np.bincount(item["gt_seg_map"].ravel())[[0, 1, 255]].tolist() == [HEIGHT * n for n in (12, 8, 20)]


@pytest.mark.slow
def test_mmseg_reads_palettes(masks):
    masks.label("train", "a", masks.pixels(), palette=True)
    np.testing.assert_array_equal(_segments(masks.open().train)[0]["gt_seg_map"], masks.pixels())


@pytest.fixture
def many(masks):
    """300 classes: 299, 256, 2 and, for ignored pixels, 65535, in bands."""
    (masks.root / "classes.txt").unlink()
    deep = np.array([299, 256, 2, *[0] * 252, 65535])
    masks.every(lambda pixels: deep[pixels].astype(np.uint16))
    return lambda **options: masks.open(num_classes=300, ignore_index=65535, **options).train


@pytest.mark.slow
def test_more_classes_than_a_byte_holds(many):
    split = many()
    labels = _segments(split)[0]["gt_seg_map"]
    assert [labels[0, column] for column in (0, 12, 24, 32)] == [299, 256, 2, 65535]
    assert [split.pixels[label] for label in (299, 256, 2, 0)] == [2 * HEIGHT * n for n in (12, 12, 8, 0)]


@pytest.mark.slow
def test_more_reduced_classes_than_a_byte_holds(many):
    labels = _segments(many(reduce_zero_label=True))[0]["gt_seg_map"]
    assert [labels[0, column] for column in (0, 12, 24, 32)] == [298, 255, 1, 65535]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["RandomFlip", "Resize"])
def test_more_classes_than_a_byte_holds_survive_what_is_done_to_images(many, step):
    from mmseg.registry import DATASETS

    changes = {"RandomFlip": {"prob": 1.0}, "Resize": {"scale": (2 * WIDTH, 2 * HEIGHT)}}
    pipeline = [*LOADING, {"type": step, **changes[step]}, {"type": "mmseg.PackSegInputs"}]
    item = DATASETS.build(many().dataset(pipeline, training=True))[0]
    assert item["data_samples"].gt_sem_seg.data.unique().tolist() == [2, 256, 299, 65535]


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [False, True])
def test_unchecked_label_that_is_no_class_ends_in_a_sentence(masks, reduce):
    masks.label("train", "a", np.where(masks.pixels() == 1, 77, masks.pixels()).astype(np.uint8))
    split = masks.open(check_files=0, reduce_zero_label=reduce).train
    _refuse(r"a\.png has the label 77, but there are 3 classes: correct it", lambda: _segments(split)[0])


@pytest.mark.slow
def test_unchecked_label_of_another_size_ends_in_a_sentence(masks):
    masks.label("train", "a", masks.pixels().T.copy())
    split = masks.open(check_files=0).train
    _refuse(r"a\.png is 30x40 pixels, but .*a\.jpg is 40x30", lambda: _segments(split)[0])


# Images as mmdet and mmseg read them.


def _pixels(coco):
    """The first training image as mmdet reads it, in RGB."""
    from mmdet.registry import DATASETS

    return DATASETS.build(coco.open().train.dataset([{"type": "LoadImage"}], training=True))[0]["img"][..., ::-1]


@pytest.mark.slow
def test_pixels_are_those_of_the_file(coco):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    coco.contents["train"]["images"][0]["file_name"] = "1.png"
    Image.fromarray(pixels).save(coco.root / "train" / "1.png")
    np.testing.assert_array_equal(_pixels(coco), pixels)


@pytest.mark.slow
def test_deep_pixels_are_scaled(coco):
    pixels = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
    coco.contents["train"]["images"][0]["file_name"] = "1.png"
    Image.fromarray(pixels).save(coco.root / "train" / "1.png")
    np.testing.assert_array_equal(_pixels(coco), np.repeat((pixels >> 8)[..., None], 3, axis=2))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_upright_in_every_format(coco, ending):
    """A red band on the left of the stored image is at the top of the rotated one, to which the JSON refers."""
    stored = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    stored[:, :8] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = 6
    coco.contents["train"]["images"][0]["file_name"] = f"1.{ending}"
    Image.fromarray(stored).save(coco.root / "train" / f"1.{ending}", exif=exif)
    pixels = _pixels(coco)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels[2, 20, 0] > 200 > 100 > pixels[20, 2, 0]


@pytest.mark.slow
def test_unchecked_image_of_another_size_ends_in_a_sentence(coco):
    from mmdet.registry import DATASETS

    _image(coco.root / "train" / "1.jpg", size=(HEIGHT, WIDTH))
    split = coco.open(check_files=0).train
    dataset = DATASETS.build(split.dataset([{"type": "LoadImage"}], training=True))
    _refuse(r"1\.jpg is 30x40 pixels .*, but the annotation file gives 40x30: the boxes would lie", lambda: dataset[0])


def test_labels_may_have_as_many_pixels_as_their_images(tmp_path, monkeypatch):
    """data.max_pixels, which images of more than Pillow's limit need, is for their labels, too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (30, 20), 7).save(tmp_path / "label.png")
    labels = read_labels(tmp_path / "label.png", tmp_path / "image.png", (30, 20))
    assert labels.shape == (20, 30)
    assert (labels == 7).all()
