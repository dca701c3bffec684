"""Panoptic segmentation: the score, the format of the data, and a run from training to prediction. 5 s, slow 30 s."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import panoptic_scenes, segment_ids, tasks
from zoo.recipes.commands import predict
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.annotations import load_annotations
from zoo.recipes.dense.panoptic_annotations import load_panoptic
from zoo.recipes.dense.panoptic_data import open_panoptic, read_ids
from zoo.recipes.dense.panoptic_quality import Segment, class_quality, count_matches, found_segments, mean_quality
from zoo.recipes.inputs import Inputs

A, B, C = range(3)


def _rows(*rows):
    """An array of ids from rows of digits."""
    return np.array([[int(c) for c in row] for row in rows])


# The score, with values computed by hand.


def test_quality_of_a_match_a_wrong_and_a_missed_segment():
    true = _rows("1112", "1112", "3333")
    found = _rows("1122", "1112", "3344")
    there = {1: Segment(A), 2: Segment(B), 3: Segment(C)}
    seen = {1: Segment(A), 2: Segment(A), 3: Segment(C), 4: Segment(B)}
    counts = count_matches(true, found, there, seen, 3)
    # A: 5 of 6 pixels match, and a second segment is wrong. B is missed, and what was found is elsewhere.
    # C: half of it is found, which is not more than half.
    np.testing.assert_allclose(counts, [[5 / 6, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]])
    scores = class_quality(counts)
    assert scores["SQ"] == pytest.approx([100 * 5 / 6, 0, 0])
    assert scores["RQ"] == pytest.approx([100 / 1.5, 0, 0])
    assert scores["PQ"] == pytest.approx([100 * 5 / 6 / 1.5, 0, 0])


def test_void_does_not_count_in_a_union_and_excuses_segments_that_are_mostly_in_it():
    true = _rows("1100", "1100", "0000")
    found = _rows("1112", "1112", "3333")
    there, seen = {1: Segment(A)}, {1: Segment(A), 2: Segment(A), 3: Segment(B)}
    np.testing.assert_allclose(count_matches(true, found, there, seen, 2), [[1, 0], [1, 0], [0, 0], [0, 0]])


def test_crowds_are_not_missed_and_excuse_segments_of_their_class_alone():
    true = _rows("1111", "1111")
    found = _rows("2233", "2233")
    there, seen = {1: Segment(A, crowd=True)}, {2: Segment(A), 3: Segment(B)}
    np.testing.assert_allclose(count_matches(true, found, there, seen, 2), [[0, 0], [0, 0], [0, 1], [0, 0]])


def test_means_are_over_the_classes_that_occur():
    counts = np.array([[0.8, 0, 0.9, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 2]])
    means = mean_quality(counts, things=2)  # the second thing does not occur
    assert means["PQ_things"] == pytest.approx(80)
    assert means["PQ_stuff"] == pytest.approx((100 * 0.9 / 1.5 + 0) / 2)
    assert means["PQ"] == pytest.approx((80 + 60 + 0) / 3)
    assert "PQ_stuff" not in mean_quality(counts[:, :2], things=2)


def test_ids_of_mmdet():
    from mmdet.structures import INSTANCE_OFFSET

    numbers = np.array([[2, 2, INSTANCE_OFFSET, 2 * INSTANCE_OFFSET + 1, 3]])
    ids, segments = found_segments(numbers, classes=3)
    assert ids.tolist() == [[1, 1, 2, 3, 0]]
    assert {key: segment.label for key, segment in segments.items()} == {1: 2, 2: 0, 3: 1}


def test_colours_hold_all_ids():
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    np.testing.assert_array_equal(segment_ids.from_rgb(segment_ids.to_rgb(ids)), ids)
    assert segment_ids.to_rgb(np.array([[65536 * 3 + 256 * 2 + 1]])).tolist() == [[[1, 2, 3]]]


# The digit scenes.


def test_every_pixel_of_a_scene_belongs_to_a_segment_of_the_json(panoptic_digit_scenes):
    content = load_panoptic(panoptic_digit_scenes / "annotations" / "panoptic_train.json")
    assert (content.things, content.stuff) == ([*"0123456789"], [*panoptic_scenes.PATTERNS])
    assert len(content.pictures) == 16
    for picture in content.pictures:
        label = panoptic_digit_scenes / "annotations" / "panoptic_train" / picture.labels
        ids = read_ids(label, picture.image, (128, 128))
        assert set(np.unique(ids).tolist()) == {number for number, _, _ in picture.segments}
        stuff = [name for _, name, _ in picture.segments if name in panoptic_scenes.PATTERNS]
        assert len(stuff) == len(set(stuff)) >= 1


def test_scenes_are_the_same_every_time():
    image, digits, masks, ground = panoptic_scenes.draw("val", 3)
    again = panoptic_scenes.draw("val", 3)
    np.testing.assert_array_equal(image, again[0])
    assert len(digits) == len(masks)
    assert ground.shape == (128, 128)
    assert not np.array_equal(image, panoptic_scenes.draw("train", 3)[0])


# The data.

SEGMENTS = [
    {"id": 7, "category_id": 1, "iscrowd": 0},
    {"id": 300, "category_id": 1, "iscrowd": 1},
    {"id": 70000, "category_id": 5, "iscrowd": 0},
]
CATEGORIES = [{"id": 5, "name": "sky", "isthing": 0}, {"id": 1, "name": "cat", "isthing": 1}]


class Folder:
    """A small data set in one of the layouts."""

    def __init__(self, root, json_name="annotations/panoptic_{}.json", image="{split}/{id}.jpg", names="{id}.jpg"):
        self.root, self.json_name = root, json_name
        for split in ("train", "val"):
            file = root / json_name.format(split)
            (file.with_suffix("")).mkdir(parents=True)
            images, annotations = [], []
            for number in (f"{split}_1", f"{split}_2"):
                path = root / image.format(split=split, id=number)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 6)).save(path)
                ids = np.full((6, 8), 70000)
                ids[:2, :2], ids[:2, 2:4], ids[5] = 7, 300, 0
                Image.fromarray(segment_ids.to_rgb(ids)).save(file.with_suffix("") / f"{number}.png")
                images.append({"id": number, "file_name": names.format(id=number), "width": 8, "height": 6})
                annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": SEGMENTS})
            content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
            file.write_text(json.dumps(content))

    def change(self, change, split="train"):
        """Change the content of a JSON."""
        file = self.root / self.json_name.format(split)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def open(self, **options):
        training = options.pop("training", True)
        return open_panoptic(DataConfig(name="coco_panoptic", root=str(self.root), **options), training)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_things_come_before_stuff_and_crowds_are_not_counted(folder):
    data = folder.open()
    assert (data.classes, data.num_things) == (["cat", "sky"], 1)
    assert data.train.segments == [2, 2]
    assert data.summary()[0].startswith("training: 2 images with 2 things and 2 segments of stuff: ")


@pytest.mark.parametrize(
    "layout",
    [
        {"json_name": "ade20k_panoptic_{}.json", "image": "images/{split}/{id}.jpg"},
        {
            "json_name": "gtFine/cityscapes_panoptic_{}.json",
            "image": "leftImg8bit/{split}/{split}/{id}_leftImg8bit.png",
            "names": "{id}_gtFine_leftImg8bit.png",
        },
    ],
    ids=["ade20k", "cityscapes"],
)
def test_layout_is_found(tmp_path, layout):
    data = Folder(tmp_path, **layout).open()
    assert data.train.num_images == data.val.num_images == 2
    item = load_panoptic(data.train.annotations).pictures[0]
    assert (data.train.images / item.image).is_file()


def test_files_of_any_place_are_named(folder):
    root = folder.root
    (root / "annotations").rename(root / "json")
    (root / "json" / "panoptic_train").rename(root / "pngs")
    data = folder.open(train_ann="json/panoptic_train.json", val_ann="json/panoptic_val.json", train_labels="pngs")
    assert data.train.labels == root / "pngs"


def _items(content):
    return content["annotations"][0]["segments_info"]


FAULTS = {  # change of the training JSON -> message
    "no segments_info": (
        lambda c: c["annotations"][0].update(segments_info=None),
        "number 0 of its annotations has segments_info=None: it has to be a list",
    ),
    "instances": (
        lambda c: c.update(annotations=[{"image_id": "train_1", "category_id": 1, "bbox": [0, 0, 1, 1]}]),
        "has COCO's instances, without segments_info: task=detect uses them",
    ),
    "no isthing": (
        lambda c: c["categories"][0].pop("isthing"),
        "number 0 of its categories has isthing=None: it has to be 1 for things or 0 for stuff",
    ),
    "no thing": (lambda c: c["categories"][1].update(isthing=0), r"has no things \(isthing=1\): task=segment is for"),
    "name twice": (lambda c: c["categories"][0].update(name="cat"), "has several categories with name=cat"),
    "id too large": (
        lambda c: _items(c)[0].update(id=2**24),
        r"image 'train_1' has a segment with id=16777216: ids are whole numbers, 1 to 16777215\.",
    ),
    "id twice": (lambda c: _items(c)[0].update(id=300), "image 'train_1' has several segments with id=300"),
    "unknown category": (
        lambda c: _items(c)[0].update(category_id=9),
        r"has a segment with category_id=9, which is not among the categories: the ids are 5, 1\.",
    ),
    "unknown image": (
        lambda c: c["annotations"][0].update(image_id="other"),
        "an annotation has image_id='other', which is not among its images",
    ),
    "image twice": (
        lambda c: c["annotations"].append(c["annotations"][0]),
        "has several annotations of image 'train_1': an image has one",
    ),
    "no annotation": (
        lambda c: c["annotations"].pop(),
        r"has no annotation of 1 of its 2 images; the first is 'train_2'",
    ),
    "unlisted segment": (
        lambda c: _items(c).pop(0),
        r"train_1\.png has pixels of the segment 7 \(1 of its 3 segments are unknown\), which .* does not list",
    ),
    "no PNG": (
        lambda c: c["annotations"][0].update(file_name="absent.png"),
        r"1 of the 2 PNGs of .* do not exist; the first is .*absent\.png",
    ),
    "no image": (
        lambda c: c["images"][1].update(file_name="absent.jpg"),
        r"1 of the 2 images of .* do not exist; the first is .*absent\.jpg",
    ),
    "size": (lambda c: c["images"][0].update(width=9), r"train_1\.jpg is 8x6 pixels .* gives 9x6"),
    "other class": (
        lambda c: c["categories"][0].update(name="air"),
        "panoptic_val.json has other classes than the 2 training classes: 1 missing, 'air'; 1 unknown, 'sky'",
    ),
    "thing and stuff": (
        lambda c: c["categories"][0].update(isthing=1),
        "panoptic_val.json says that 'sky' is stuff .*, but for the model it is a thing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_json_is_named(folder, fault):
    change, message = FAULTS[fault]
    folder.change(change)
    with pytest.raises(UserError, match=message) as raised:
        folder.open()
    assert "\n" not in str(raised.value)


def test_png_of_labels_is_refused(folder):
    Image.new("L", (8, 6)).save(folder.root / "annotations" / "panoptic_train" / "train_1.png")
    with pytest.raises(UserError, match=r"train_1\.png has the mode L, but a panoptic PNG is RGB.*task=segment"):
        folder.open()


def test_png_of_another_size_is_refused(folder):
    Image.new("RGB", (8, 7)).save(folder.root / "annotations" / "panoptic_train" / "train_1.png")
    with pytest.raises(UserError, match=r"train_1\.png is 8x7 pixels, but .*train_1\.jpg is 8x6"):
        folder.open()


def test_missing_folder_of_pngs_is_named(folder):
    (folder.root / "annotations" / "panoptic_train").rename(folder.root / "elsewhere")
    with pytest.raises(
        UserError, match=r"the PNGs of .*panoptic_train\.json are not in .*: .*data.train_labels=<folder>"
    ):
        folder.open()


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("annotations/instances_val.json", "it has COCO's instances, which task=detect uses"),
        ("gtFine/val/a.png", "createPanopticImgs` makes those of Cityscapes"),
        ("annotations/val/a.png", "it has label PNGs, which task=segment uses"),
    ],
)
def test_data_of_another_task_is_recognised(tmp_path, file, hint):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"has no panoptic annotations of the split 'val'.*{re.escape(hint)}"):
        open_panoptic(DataConfig(name="coco_panoptic", root=str(tmp_path)), training=False)


def test_panoptic_json_is_refused_by_detection(folder):
    with pytest.raises(UserError, match=r"has COCO's panoptic annotations .*: use task=panoptic"):
        load_annotations(folder.root / "annotations" / "panoptic_train.json")


# The model.


def test_panoptic_fpn_uses_objects_of_high_scores_and_labels_every_pixel():
    tasks.load("panoptic", "model")
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    from zoo.recipes.dense.panoptic import FusionByScore

    settings = ConfigDict(mask_overlap=0.5, stuff_area_limit=2, score_thr=0.5)
    head = FusionByScore(num_things_classes=2, num_stuff_classes=2, test_cfg=settings)
    masks = torch.from_numpy(np.stack([_rows("1100", "1100"), _rows("0011", "0000"), _rows("0111", "0000")]) > 0)
    scores = torch.tensor([0.9, 0.4, 0.8])
    found = InstanceData(bboxes=torch.zeros(3, 4), labels=torch.tensor([1, 0, 0]), scores=scores, masks=masks)
    # The outputs of the semantic head: stuff of the labels 2 and 3, and all things.
    likely = torch.from_numpy(np.stack([_rows("0000", "0021"), _rows("0000", "0010"), _rows("9999", "0000")]))
    (segments,) = head.predict([found], [likely.float()])
    numbers = segments.sem_seg[0].numpy()
    ids, described = found_segments(numbers, classes=4)
    # The second object's score is too low; the third has what the first one leaves of it.
    assert [[described[i].label if i else None for i in row] for row in ids.tolist()] == [[1, 1, 0, 0], [1, 1, 2, 2]]
    assert segments.semantic.tolist() == [[[1, 1, 0, 0], [1, 1, 2, 2]]]
    settings.stuff_area_limit = 3  # the two pixels of stuff have no segment, but a class
    (segments,) = head.predict([found], [likely.float()])
    assert found_segments(segments.sem_seg[0].numpy(), classes=4)[0].tolist()[1][2:] == [0, 0]
    assert segments.semantic.tolist() == [[[1, 1, 0, 0], [1, 1, 2, 2]]]


# A run.


@pytest.fixture(scope="module")
def finished(fit_dense, panoptic_digit_scenes, tmp_path_factory):
    """The folder of a finished run of three updates and two evaluations; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = (
        "trainer.eval_every=1",
        "trainer.max_updates=3",
        "trainer.batch_size=8",
        "optim.lr=1e-5",
        "++mm.model.test_cfg.rcnn.score_thr=0.0",
        "++mm.model.test_cfg.panoptic.score_thr=0.0",
    )
    fit_dense(folder, f"data.root={panoptic_digit_scenes}", *words, task="panoptic", pictures=True)
    return folder


@pytest.mark.slow
def test_run_writes_its_scores_and_pictures(finished):
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {f"{name}{part}" for part in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")}
    assert summary["metrics"].keys() == wanted | {"mask_AP", "mask_AP50", "bbox_AP", "bbox_AP50", "mIoU"}
    assert summary["classes"] == [*"0123456789", *panoptic_scenes.PATTERNS]
    for name in ("best.safetensors", "predictions.png", "curves.png", "report.html"):
        assert (finished / name).stat().st_size > 0
    table = json.loads((finished / "classes.json").read_text())
    assert table["unit"] == "segments"
    assert [*table["scores"]] == ["PQ", "SQ", "RQ", "IoU", "mask_AP"]
    assert "panoptic segmentation" in (finished / "report.html").read_text()
    records = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    assert sum("val_PQ" in record and "val_mask_AP" in record for record in records) == 2


@pytest.mark.slow
def test_evaluation_of_a_run_finds_its_scores_again(finished, compose, tmp_path):
    cfg = compose(f"run={finished}", f"out={tmp_path}", "per_class=true", name="eval")
    tasks.load("panoptic", "evaluate").evaluate(cfg, ["run", "out", "per_class"])
    found = json.loads((tmp_path / "eval.json").read_text())
    trained = json.loads((finished / "summary.json").read_text())
    assert found["metrics"] == pytest.approx(trained["metrics"])
    known = [values["PQ"] for values in found["per_class"].values() if values["PQ"] is not None]
    assert found["metrics"]["PQ"] == pytest.approx(sum(known) / len(known))
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.slow
def test_predictions_are_in_coco_format(finished, panoptic_digit_scenes, tmp_path):
    settings, paths, out = predict.parse(
        [f"run={finished}", str(panoptic_digit_scenes / "images" / "val"), str(tmp_path)]
    )
    tasks.load("panoptic", "predict").predict(settings, Inputs(paths, out), out)
    content = load_panoptic(out / "predictions.json")
    assert (content.things, content.stuff) == ([*"0123456789"], [*panoptic_scenes.PATTERNS])
    assert len(content.pictures) == 4
    for picture in content.pictures:
        ids = read_ids(out / "labels" / picture.labels, picture.image, (128, 128))
        assert set(np.unique(ids).tolist()) - {0} == {number for number, _, _ in picture.segments}
        assert (out / picture.image).exists()


@pytest.mark.slow
def test_outputs_of_things_and_of_stuff_follow_the_names_of_classes(finished, compose, weights):
    cfg = compose("task=panoptic")
    cfg.dense.num_things = 2
    theirs = weights(finished)
    model, (note,) = tasks.load("panoptic", "pretrained").build_pretrained(
        cfg, ["3", "cat", "dots", "sky", "plain"], torch.device("cpu"), str(finished)
    )
    ours = model.state_dict()
    head, stuff = "roi_head.bbox_head.fc_cls.weight", "semantic_head.conv_logits.weight"
    assert torch.equal(ours[head][[0, 2]], theirs[head][[3, 10]])
    places = [panoptic_scenes.PATTERNS.index(name) for name in ("dots", "plain")]
    assert torch.equal(ours[stuff][[0, 2, 3]], theirs[stuff][[*places, 4]])
    assert len(ours[head]) == 3
    assert len(ours[stuff]) == 4
    assert "new: the outputs for 2 of 5 classes (cat, sky; the file has 0, 1, 2, ...)" in note
