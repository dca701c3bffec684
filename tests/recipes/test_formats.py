"""Cityscapes, Pascal VOC, YOLO and LVIS: small folders of each, converted, refused, trained on. Slow ones 1 min."""

import json
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import early, tasks
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.formats import cityscapes, converted, find, look

tasks.load("detect", "data")

from zoo.recipes.dense.detection_data import open_detection  # noqa: E402
from zoo.recipes.dense.segmentation_data import open_segmentation, read_pairs  # noqa: E402

WIDTH, HEIGHT = 64, 48


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zoo" / "data"


def _save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)


def _photo(path, seed):
    _save(path, np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _halves(left, right):
    """Labels: one on the left half, another on the right."""
    return np.repeat(np.array([[left, right]], np.uint8), WIDTH // 2, axis=1).repeat(HEIGHT, axis=0)


@pytest.fixture
def streets(tmp_path):
    """Cityscapes: two training images with labelIds, one validation image with labelTrainIds too."""
    root = tmp_path / "cityscapes"
    for number, (split, city) in enumerate((("train", "aachen"), ("train", "bonn"), ("val", "ulm"))):
        name = f"{split}/{city}/{city}_{number:06}_000019"
        _photo(root / "leftImg8bit" / f"{name}_leftImg8bit.png", number)
        _save(root / "gtFine" / f"{name}_gtFine_labelIds.png", _halves(7, 26 if number else 1))
        _save(root / "gtFine" / f"{name}_gtFine_color.png", np.zeros((HEIGHT, WIDTH, 4), np.uint8))
    _save(root / "gtFine" / "val/ulm/ulm_000002_000019_gtFine_labelTrainIds.png", _halves(0, 13))
    return root


OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


@pytest.fixture
def voc(tmp_path):
    """Pascal VOC: images 0 to 4; 0 and 1 are in train, 2 and 3 in val, and 4 is in no list."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for number in range(5):
        _photo(root / "JPEGImages" / f"{number}.jpg", number)
        objects = OBJECT.format("dog", 0, 1, 1, WIDTH, HEIGHT) + OBJECT.format("cat", int(number == 1), 11, 21, 40, 40)
        _write(root / "Annotations" / f"{number}.xml", f"<annotation>{SIZE}{objects}</annotation>")
        labels = _halves(0, 12)
        labels[:, WIDTH // 2] = 255
        picture = Image.fromarray(labels, mode="P")
        picture.putpalette([*range(256)] * 3)
        _save(root / "SegmentationClass" / f"{number}.png", picture)
    for kind in ("Main", "Segmentation"):
        _write(root / "ImageSets" / kind / "train.txt", "0\n1\n")
        _write(root / "ImageSets" / kind / "val.txt", "2\n3\n")
    _write(root / "ImageSets" / "Main" / "dog_train.txt", "0  1\n1 -1\n")
    return root


YAML = "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"


@pytest.fixture
def yolo(tmp_path):
    """YOLO: three training images, of which one is background, and two validation images, with boxes and polygons."""
    root = tmp_path / "yolo"
    for number in range(5):
        split = "train" if number < 3 else "val"
        _photo(root / "images" / split / f"{number}.jpg", number)
        if number != 2:
            lines = "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.75 0.25 0.75 0.75\n1 0.5 0.5 0.25 0.5\n"
            _write(root / "labels" / split / f"{number}.txt", lines)
    _write(root / "data.yaml", YAML)
    return root


@pytest.fixture
def lvis(tmp_path):
    """LVIS: an image for training and three for validation, which are labelled for some of the two categories."""
    root = tmp_path / "lvis"
    known = {1: ([1, 5], [], []), 2: ([1], [5], []), 3: ([1, 5], [], [1]), 4: ([], [], [])}  # there, absent, partly
    for split, numbers in (("train", [1]), ("val", [2, 3, 4])):
        images, annotations = [], []
        for number in numbers:
            folder = "val2017" if number == 4 else "train2017"
            there, absent, partial = known[number]
            _photo(root / folder / f"{number}.jpg", number)
            images.append(
                {
                    **{"id": number, "width": WIDTH, "height": HEIGHT, "coco_url": f"http://a.b/{folder}/{number}.jpg"},
                    **{"neg_category_ids": absent, "not_exhaustive_category_ids": partial},
                }
            )
            for category in there:
                x = 10 * category
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": number, "category_id": category, "area": 100},
                        **{"bbox": [x, 10, 10, 10], "segmentation": [[x, 10, x + 10, 10, x + 10, 20, x, 20]]},
                    }
                )
        categories = [{"id": 5, "name": "yak", "frequency": "r"}, {"id": 1, "name": "cat", "frequency": "f"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write(root / "annotations" / f"lvis_v1_{split}.json", json.dumps(content))
    return root


def _detect(root, training=True, masks=False, **options):
    return open_detection(DataConfig(**{"name": "coco", "root": str(root), **options}), training, None, masks)


def _segment(root, training=True, **options):
    return open_segmentation(DataConfig(**{"name": "masks", "root": str(root), **options}), training)


def _refuse(message, call):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((".", "?"))


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Cityscapes.


def test_cityscapes(streets, cache):
    before = _files(streets)
    data = _segment(streets)
    assert data.classes == list(cityscapes.IDS)
    assert data.summary()[0] == "data: Cityscapes"
    half = WIDTH * HEIGHT // 2
    assert (data.train.num_images, data.train.pixels[0], data.train.pixels[13]) == (2, 2 * half, half)
    assert [label for label, count in enumerate(data.val.pixels) if count] == [0, 13]
    made = [label.is_relative_to(cache) for split in (data.train, data.val) for _, label in read_pairs(split.labels)]
    assert made == [True, True, False]  # the validation image has labelTrainIds
    assert _files(streets) == before
    assert _segment(streets, training=False).val.labels == data.val.labels  # converted once for both


def test_train_ids_of_cityscapes():
    expected = [*[255] * 7, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    expected += [255, 255, 16, 17, 18]
    assert cityscapes.train_ids(np.arange(34, dtype=np.uint8)).tolist() == expected
    assert cityscapes.train_ids(np.array([255], np.uint8)).tolist() == [255]


def test_cityscapes_without_labels_of_an_image(streets):
    next((streets / "gtFine" / "train" / "bonn").glob("*_labelIds.png")).unlink()
    _refuse("1 of the 2 images in .*leftImg8bit/train have no .*; the first is bonn_", lambda: _segment(streets))


def test_cityscapes_has_its_own_settings(streets):
    _refuse(
        "data.reduce_zero_label=True can't be used with Cityscapes", lambda: _segment(streets, reduce_zero_label=True)
    )


def test_unknown_split_of_cityscapes(streets):
    _refuse("has no split 'vall', but train, val", lambda: _segment(streets, val_split="vall"))


# Pascal VOC.


@pytest.mark.parametrize("given", ["VOC2012", "VOCdevkit"])
def test_boxes_of_voc(voc, given):
    data = _detect(voc if given == "VOC2012" else voc.parent, train_split="train2017", val_split="val2017")
    assert (len(data.classes), data.train.num_images, data.val.num_boxes) == (20, 2, 4)
    assert data.summary()[0] == "data: Pascal VOC (ImageSets/Main/train.txt, ImageSets/Main/val.txt)"
    content = json.loads(data.train.annotations.read_text())
    assert [item["bbox"] for item in content["annotations"][:2]] == [[0, 0, WIDTH, HEIGHT], [10, 20, 30, 20]]
    assert [item["iscrowd"] for item in content["annotations"]] == [0, 0, 0, 1]  # the last one is difficult
    assert data.train.boxes[data.classes.index("cat")] == 1


def test_classes_of_ones_own_in_the_format_of_voc(voc):
    path = voc / "Annotations" / "4.xml"
    path.write_text(path.read_text().replace("dog", "yak"))
    _write(voc / "ImageSets" / "Main" / "test.txt", "4")
    assert _detect(voc).classes == ["cat", "dog", "yak"]
    assert _detect(voc, training=False).classes == ["cat", "dog", "yak"]


def test_labels_of_voc(voc):
    data = _segment(voc)
    assert (data.classes[0], data.classes[12], len(data.classes)) == ("background", "dog", 21)
    assert [image.name for image, _ in read_pairs(data.val.labels)] == ["2.jpg", "3.jpg"]
    assert (data.train.pixels[0], data.train.pixels[12]) == (WIDTH * HEIGHT, WIDTH * HEIGHT - 2 * HEIGHT)


def test_folders_of_voc_for_both_splits_are_refused(voc):
    same = {f"{split}_{kind}": str(voc / folder) for split in ("train", "val")
            for kind, folder in (("images", "JPEGImages"), ("labels", "SegmentationClass"))}  # fmt: skip
    _refuse("5 of the 5 validation images are training images too", lambda: _segment(voc, num_classes=21, **same))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "JPEGImages" / "1.jpg").unlink(),
            "1 of the 4 images in the lists have no image in .*; the",
        ),
        (lambda root: (root / "Annotations" / "1.xml").unlink(), "1 of the 4 images in the lists have no XML in"),
        (lambda root: _write(root / "Annotations" / "1.xml", "<annotation>"), r"1\.xml is not XML \("),
        (
            lambda root: _write(root / "Annotations" / "1.xml", OBJECT.format("cat", 0, "a", 1, 2, 3)),
            r"1\.xml has bndbox/xmin='a': it has to be a number of pixels",
        ),
        (lambda root: _write(root / "ImageSets" / "Main" / "val.txt", "\n"), r"val\.txt names no images"),
        (lambda root: (root / "ImageSets" / "Main" / "val.txt").unlink(), "has no split 'val', but train: set"),
        (
            lambda root: _photo(root.parent / "VOC2007" / "JPEGImages" / "1.jpg", 0),
            r"several data sets \(VOC2007, VOC2",
        ),
    ],
    ids=["image", "no-xml", "bad-xml", "number", "empty-list", "no-list", "several"],
)
def test_faults_of_voc(voc, change, message):
    change(voc)
    _refuse(message, lambda: _detect(voc.parent))


def test_boxes_of_voc_are_no_masks(voc):
    _refuse(
        "Pascal VOC .* has boxes without masks: find boxes alone with dense.masks=false",
        lambda: _detect(voc, masks=True),
    )


# YOLO.


def test_objects_of_yolo(yolo):
    data = _detect(yolo, train_split="train2017", val_split="val2017")
    assert (data.classes, data.train.boxes, data.train.num_images, data.train.num_empty) == (
        ["cat", "dog"],
        [2, 2],
        2,
        1,
    )
    assert data.summary()[0] == "data: YOLO (data.yaml)"
    box, polygon = json.loads(data.val.annotations.read_text())["annotations"][:2]
    assert (box["bbox"], box["category_id"]) == ([24, 12, 16, 24], 2)
    assert (polygon["bbox"], polygon["segmentation"], polygon["area"]) == (
        [16, 12, 32, 24],
        [[16, 12, 48, 12, 48, 36]],
        32 * 24 / 2,
    )


def test_masks_of_yolo(yolo):
    _refuse("YOLO .* has boxes without masks", lambda: _detect(yolo, masks=True))
    for path in (yolo / "labels").rglob("*.txt"):
        path.write_text("0 0.25 0.25 0.75 0.25 0.75 0.75\n")
    assert _detect(yolo, masks=True).has_masks


def _roboflow(root):
    for split, name in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (root / name).mkdir(exist_ok=True)
            (root / kind / split).rename(root / name / kind)
    _write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")


def _lists(root):
    _write(root / "train.txt", "./images/train/0.jpg\n./images/train/1.jpg\n./images/train/2.jpg\n")
    _write(root / "data.yaml", f"train: [train.txt]\nval: {root}/images/val\nnames: [cat, dog]\n")


def _absolute(root):
    (root / "data.yaml").unlink()
    _write(root / "mine.yaml", YAML.replace("path: .", f"path: {root}"))


@pytest.mark.parametrize("layout", [_roboflow, _lists, _absolute], ids=lambda layout: layout.__name__)
def test_layouts_of_yolo(yolo, layout):
    layout(yolo)
    data = _detect(yolo)
    assert (data.classes, data.train.boxes, data.val.num_images) == (["cat", "dog"], [2, 2], 2)


def test_yaml_file_as_root(yolo):
    assert _detect(yolo / "data.yaml").classes == ["cat", "dog"]


def test_nothing_in_the_yaml_file_is_called(yolo, tmp_path):
    _write(yolo / "data.yaml", f"{YAML}download: !!python/object/apply:os.system ['touch {tmp_path}/called']\n")
    _refuse("is not YAML of plain values", lambda: _detect(yolo))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (YAML.replace("images/val", "images/vall"), r"val: images/vall, but .*images/vall does not exist"),
        (YAML.replace("0: cat, 1: dog", "0: cat, 2: dog"), "numbers its names 0, 2: they have to be 0, 1, 2"),
        (
            "train: images/train\nval: images/val\nnames: [yes, no]\n",
            "the name of class 0 is True in YAML: write it in",
        ),
        (YAML.replace("dog", "cat"), "names the class 'cat' twice"),
        (YAML + "nc: 3\n", "has nc: 3, but 2 names"),
        (YAML + "kpt_shape: [17, 3]\n", "is of a data set of poses"),
        (YAML.replace("val:", "test:"), r"has no split 'val', but test, train"),
        ("a: [", "is not YAML"),
    ],
    ids=["folder", "numbers", "booleans", "twice", "nc", "poses", "split", "syntax"],
)
def test_faults_of_the_yaml_file(yolo, yaml, message):
    _write(yolo / "data.yaml", yaml)
    _refuse(message, lambda: _detect(yolo))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"0\.txt has the class 2, but there are 2 names"),
        ("0 32 24 10 10", "positions are shares of the image's width and height, 0 to 1, not pixels"),
        ("0 0.5 0.5 0.1", "has the line '0 0.5 0.5 0.1': a class and the four numbers of a box"),
        ("cat 0.5 0.5 0.1 0.1", "a class and the four numbers"),
        ("0 0.5 0.5 nan 0.1", "a class and the four numbers"),
    ],
    ids=["class", "pixels", "short", "name", "nan"],
)
def test_faults_of_labels_of_yolo(yolo, line, message):
    _write(yolo / "labels" / "train" / "0.txt", line)
    _refuse(message, lambda: _detect(yolo))


def test_images_of_yolo_that_cannot_be_read_are_named_every_time(yolo, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("zoo"), "propagate", True)
    (yolo / "images" / "train" / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    for _ in range(2):
        caplog.clear()
        assert _detect(yolo).train.num_images == 1
        assert f"1 images of {yolo / 'data.yaml'} can't be read; the first is {yolo}/images/train/0.jpg" in caplog.text


def test_yolo_without_labels(yolo):
    (yolo / "labels" / "train").rename(yolo / "labels" / "other")
    _refuse(
        "none of the 3 images of 'train' in .* has labels; those of .* would be in .*labels/train/0.txt",
        lambda: _detect(yolo),
    )


# LVIS.


def test_annotations_of_lvis(lvis):
    data = _detect(lvis, masks=True, train_split="train2017", val_split="val2017")
    assert (data.classes, data.train.boxes, data.val.num_images) == (["cat", "yak"], [1, 1], 3)
    assert data.summary()[0] == "data: LVIS"
    assert {data.train.images, data.val.images} == {lvis}


def test_detections_count_where_images_are_labelled(lvis):
    from zoo.recipes.dense.coco import NamedCoco

    truth = NamedCoco(str(lvis / "annotations" / "lvis_v1_val.json"), ["yak", "cat"])
    [yak], [cat] = (truth.get_cat_ids(cat_names=[name]) for name in ("yak", "cat"))
    right = {yak: [50, 10, 10, 10], cat: [10, 10, 10, 10]}
    wrong = [0, 30, 10, 10]
    found = [
        {"image_id": image, "category_id": category, "bbox": box or right[category], "score": score}
        for image, category, box, score in (
            *((2, cat, None, 0.5), (3, cat, None, 0.6), (3, yak, None, 0.5)),
            (3, cat, wrong, 0.9),  # not all cats are labelled there
            (4, yak, wrong, 0.95),  # not labelled for yaks
            (2, yak, wrong, 0.9),  # wrong: known to have none
        )
    ]
    evaluation = truth.evaluated(found, "bbox", [2, 3, 4])
    assert evaluation.by_category() == pytest.approx([0.5, 1])
    assert evaluation.scores() == pytest.approx({"mAP": 0.75, "mAP_50": 0.75, "mAP_r": 0.5, "mAP_c": -1, "mAP_f": 1})
    many = [{**found[0], "score": 1 - number / 1000} for number in range(301)]
    assert truth.evaluated([*many, {**found[0], "image_id": 3}], "bbox", [2, 3]).cocoDt.getAnnIds(imgIds=[2])[-1] == 300


def test_lists_of_lvis_are_checked(lvis):
    path = lvis / "annotations" / "lvis_v1_val.json"
    path.write_text(path.read_text().replace('"neg_category_ids": [5]', '"neg_category_ids": 5'))
    _refuse("image 2 has neg_category_ids=5: LVIS has a list of numbers there", lambda: _detect(lvis))


# Looking and converting.


@pytest.mark.parametrize(
    ("files", "task", "message"),
    [
        (["annotations/panoptic_train2017.json"], "detect", "is COCO's panoptic annotations .*: use task=panoptic"),
        (["images/ADE/training/a.jpg"], "segment", "is ADE20K in full: .*ADEChallengeData2016"),
        (
            ["Annotations/1.xml", "JPEGImages/1.jpg"],
            "detect",
            "is a data set with .* without lists of its splits: write ImageSets/Main/train.txt",
        ),
        (["images/train/1.jpg", "labels/train/1.txt"], "detect", "is a YOLO data set without data.yaml: write one"),
        (["leftImg8bit/a", "gtFine/a"], "detect", "is Cityscapes, whose label maps are for task=segment"),
        (["annotations/instances_train2017.json"], "segment", "is COCO's instances: use task=detect"),
        (["images/train/1.jpg", "labels/train/1.png"], "detect", "is data for task=segment: use that"),
    ],
    ids=["panoptic", "ade", "voc", "yolo", "cityscapes", "coco", "masks"],
)
def test_what_is_not_read_is_named(tmp_path, files, task, message):
    for file in files:
        _write(tmp_path / "data" / file, "")
    _refuse(rf"data\.root=.*data {message}", lambda: look.refuse(task, tmp_path / "data"))


def test_data_of_a_known_kind_choose_their_option(streets, voc, yolo, tmp_path):
    def added(*words):
        return look.with_option(words)[len(words) :]

    assert added("task=segment", f"data.root={streets}") == ["data=cityscapes"]
    assert added("task=segment", f"data.root={voc}") == ["data=masks"]
    assert added("task=detect", f"data.root={voc}") == ["data=coco"]
    assert added("task=detect", f"data.root={yolo}") == ["data=coco"]
    assert added("task=detect", "data.train_ann=a.json", "data.val_ann=b.json") == ["data=coco"]
    assert added("task=detect", f"data.root={tmp_path / 'new'}") == []
    assert added(f"data.root={voc}") == []
    assert added("task=segment", "data=masks", f"data.root={streets}") == []
    assert added("recipe=ade20k/upernet_van_b0", "task=segment", f"data.root={streets}") == []


@pytest.mark.parametrize("change", ["labels", "image"])
def test_converted_once_until_something_changes(yolo, cache, monkeypatch, change):
    first = _detect(yolo).train.annotations
    monkeypatch.setattr(converted.cache, "publish", None)
    assert _detect(yolo).train.annotations == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    if change == "labels":
        _write(yolo / "labels" / "train" / "2.txt", "0 0.5 0.5 0.5 0.5\n")
    else:
        Image.new("RGB", (2 * WIDTH, HEIGHT)).save(yolo / "images" / "train" / "0.jpg")
    assert _detect(yolo).train.annotations != first


def _die(root):
    converted.cache.os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    _detect(root)


def test_killed_conversion_leaves_nothing_that_counts(yolo, cache):
    process = multiprocessing.get_context("fork").Process(target=_die, args=(yolo,))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in cache.iterdir())
    assert _detect(yolo).train.num_images == 2


def test_cache_that_cannot_be_written(yolo, cache):
    _write(cache, "")
    _refuse("can't be converted in the cache, .*: set XDG_CACHE_HOME to a folder with room", lambda: _detect(yolo))


def test_files_need_no_root(lvis, compose, monkeypatch):
    monkeypatch.chdir(lvis)
    files = {f"{split}_ann": f"annotations/lvis_v1_{split}.json" for split in ("train", "val")}
    words = [f"data.{key}={value}" for key, value in files.items()]
    early.check(compose("task=detect", "data=coco", *words, "data.train_images=.", "data.val_images=."))
    cfg = DataConfig(name="coco", train_images=".", val_images=".", **files)
    assert open_detection(cfg).train.images.samefile(lvis)


def test_images_of_yolo_are_those_that_it_names(yolo):
    _refuse(
        r"data\.val_images=val can't be used with YOLO \(data\.yaml\), which names",
        lambda: _detect(yolo, val_images="val"),
    )


def test_files_that_are_given_go_first(yolo):
    assert find.detection(DataConfig(name="coco", root=str(yolo), val_ann="a.json"), False, False) is None


# From the command line.

SHORT = (
    *("dense.small=true", "dense.scales=[64]", "dense.max_size=64", "dense.ratio_range=null", "dense.crop=null"),
    *("model=test_van", "trainer.max_updates=1", "trainer.batch_size=2", "trainer.effective_batch_size=2"),
    *("trainer.device=cpu", "log.wandb=disabled", "data.num_workers=0"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "words", "source"),
    [
        ("streets", "segment", (), "Cityscapes"),
        # Its labels and boxes become the files that those of Cityscapes and YOLO become.
        pytest.param("voc", "segment", (), "Pascal VOC", marks=pytest.mark.long),
        pytest.param("voc", "detect", ("dense.masks=false",), "Pascal VOC", marks=pytest.mark.long),
        ("yolo", "detect", ("dense.masks=false",), "YOLO"),
        ("lvis", "detect", ("++mm.model.test_cfg.rcnn.score_thr=0.0",), "LVIS"),
    ],
    ids=["cityscapes", "voc-segment", "voc-detect", "yolo", "lvis"],
)
def test_from_a_folder_to_a_report(command, request, tmp_path, kind, task, words, source):
    root, run = request.getfixturevalue(kind), tmp_path / "run"
    code, output = command("train", f"task={task}", f"data.root={root}", f"run={run}", *SHORT, *words)
    assert code == 0, output
    assert f"data: {source}" in output
    assert source in (run / "report.html").read_text()
    code, output = command("eval", run)
    assert code == 0, output
    assert json.loads((run / "eval" / "eval.json").read_text())["data"]["format"].startswith(source)
    photo = next(iter(sorted(root.rglob("*.jpg")) or sorted(root.rglob("*_leftImg8bit.png"))))
    code, output = command("predict", f"run={run}", photo, tmp_path / "out")
    assert code == 0, output
    assert (tmp_path / "out" / f"{photo.stem}.png").exists()
