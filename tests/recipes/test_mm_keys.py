"""`mm`: what is refused, tuples, wrapped data sets, and batches of one orientation. 10 s, slow ones half a minute."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import tasks

mm_keys = tasks.load("detect", "mm_keys")
tasks.load("segment", "mm_keys")

from mmengine.config import Config as MMConfig  # noqa: E402  after mmcv's operators are there
from mmengine.dataset import InfiniteSampler  # noqa: E402
from mmengine.registry import DATASETS, TRANSFORMS  # noqa: E402

from zoo.recipes.dense import runner  # noqa: E402
from zoo.recipes.dense.samplers import OrientedBatchSampler, SeededBatchSampler  # noqa: E402
from zoo.recipes.dense.scores import scores  # noqa: E402
from zoo.recipes.dense.transforms import MixesImages, SkipsCorrupt  # noqa: E402

REFUSED = [
    (
        {"typo": {"foo": 1}},
        r"mm.typo has no effect, because MMEngine's Runner has no such argument: it has to be one",
    ),
    ({"custom_hook": []}, r"mm.custom_hook has no effect, .*: did you mean mm.custom_hooks\?"),
    ({"optim_wraper": {}}, r"did you mean mm.optim_wrapper\?"),
    ({"tta_model": {"type": "SegTTAModel"}}, r"mm.tta_model can't be set: use eval.tta="),
    ({"load_from": "a.pth"}, r"mm.load_from can't be set: use pretrained=<checkpoint or run folder> instead"),
    ({"resume": True}, r"mm.resume can't be set: use run=<folder>"),
    ({"train_cfg": {"max_iters": 5}}, r"mm.train_cfg.max_iters can't be set: use trainer.max_updates=<updates>"),
    ({"train_dataloader": {"batch_size": 5}}, r"mm.train_dataloader.batch_size can't be set: use trainer.batch_size="),
    (
        {"val_evaluator": {"metric": "proposal"}},
        r"mm.val_evaluator.metric=proposal gives none of the scores of task",
    ),
    ({"val_evaluator": {"metric": ["proposal_fast"]}}, r"it has to include bbox or segm"),
]
ACCEPTED = [
    {},
    {"model": {"rpn_head": {"feat_channels": 128}}},
    {"train_dataloader": {"num_workers": 2, "batch_sampler": None}},
    {"train_cfg": {"val_begin": 5}},
    {"val_evaluator": {"classwise": False}},
    {"val_evaluator": {"metric": "bbox"}},
    {"val_evaluator": {"metric": ["bbox", "proposal"]}},
    {"custom_hooks": [{"type": "SyncBuffersHook"}], "default_hooks": {"timer": None}},
]


@pytest.mark.parametrize(("mm", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_key_without_effect_is_refused(mm, message):
    with pytest.raises(UserError, match=message):
        mm_keys.check(mm, "detect")


@pytest.mark.parametrize("mm", ACCEPTED, ids=str)
def test_key_with_an_effect_is_accepted(mm):
    mm_keys.check(mm, "detect")


@pytest.mark.slow
def test_run_refuses_before_it_starts(fit_dense, tmp_path):
    with pytest.raises(UserError, match=r"mm.train_cfg.max_iters can't be set"):
        fit_dense(tmp_path / "run", "++mm.train_cfg.max_iters=5")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metrics", [{}, {"coco/AR@100": 0.1}], ids=str)
def test_evaluation_without_a_score_is_an_error(metrics):
    with pytest.raises(UserError, match=r"gives .*, which is none of the scores .*: correct mm.val_evaluator"):
        scores(metrics)


def test_nothing_to_find_is_no_error():
    assert scores({"coco/bbox_mAP": -1.0}) == {}
    assert scores(None) == {}


def test_misspelt_name_of_the_models_settings_is_pointed_out(monkeypatch):
    lines = []
    monkeypatch.setattr(mm_keys.log, "warning", lambda text, *values: lines.append(text % values))
    settings = {"test_cfg": {"rcnn": {"score_thr": 0.05, "nms": {"iou_threshold": 0.5}}}}
    mm_keys.warn_misspelt(settings, {"test_cfg": {"rcnn": {"score_thr": 0.1, "nms": {"class_agnostic": True}}}})
    assert lines == []
    mm_keys.warn_misspelt(settings, {"test_cfg": {"rcnn": {"score_threshold": 0.1}}})
    assert lines == ["mm.model.test_cfg.rcnn.score_threshold is not in the configuration: did you mean score_thr?"]


def test_evaluation_leaves_out_what_only_training_has():
    settings = MMConfig({"val_evaluator": {"type": "CocoMetric"}})
    changes = {"train_cfg": {"val_begin": 2}, "optim_wrapper": {"clip_grad": None}, "model": {}}
    mm_keys.override_runner(settings, changes, "mmdet", masks=False)
    assert settings.to_dict() == {"val_evaluator": {"type": "CocoMetric"}}


# Tuples. Each step asserts that what it is given is one, or takes lists only.

STEPS = [
    ("mmdet", {"type": "Resize", "scale": [64, 48], "keep_ratio": True}, "scale", (64, 48)),
    ("mmdet", {"type": "Resize", "scale_factor": [0.5, 0.5]}, "scale_factor", (0.5, 0.5)),
    ("mmdet", {"type": "RandomCrop", "crop_size": [32, 32]}, "crop_size", (32, 32)),
    ("mmdet", {"type": "RandomResize", "scale": [[64, 48], [96, 64]]}, "scale", [(64, 48), (96, 64)]),
    ("mmdet", {"type": "RandomChoiceResize", "scales": [[64, 48], [96, 64]]}, "scales", [(64, 48), (96, 64)]),
    ("mmdet", {"type": "RandomChoiceResize", "scales": [48, 64], "keep_ratio": True}, "scales", [48, 64]),
    ("mmdet", {"type": "CutOut", "n_holes": 1, "cutout_shape": [8, 8]}, "cutout_shape", (8, 8)),
    ("mmdet", {"type": "Mosaic", "img_scale": [64, 48]}, "img_scale", (64, 48)),
    ("mmdet", {"type": "RandomFlip", "prob": [0.5], "direction": ["horizontal"]}, "prob", [0.5]),
    ("mmdet", {"type": "mmdet.PackDetInputs", "meta_keys": ["img_id"]}, "meta_keys", ("img_id",)),
    ("mmseg", {"type": "RandomCrop", "crop_size": [32, 32]}, "crop_size", (32, 32)),
    ("mmseg", {"type": "RandomMosaic", "prob": 1, "img_scale": [64, 48]}, "img_scale", (64, 48)),
    ("mmseg", {"type": "CLAHE", "tile_grid_size": [8, 8]}, "tile_grid_size", (8, 8)),
]


@pytest.mark.parametrize(("scope", "step", "name", "want"), STEPS, ids=[f"{row[0]}-{row[1]}" for row in STEPS])
def test_lists_become_tuples_where_a_step_wants_them(scope, step, name, want):
    settings = {"dataset": {"dataset": {"pipeline": [{"type": "RandomApply", "transforms": [step]}]}}}
    mm_keys.set_tuples(settings, scope)
    assert step[name] == want
    with TRANSFORMS.switch_scope_and_registry(scope) as registry:
        registry.build(dict(step))


# Wrapped data sets.

STEPS_OF_OURS = ("LoadImage", "LoadAnnotations", "Resize", "PackDetInputs")
OURS = {"type": "mmdet.NamedCocoDataset", "pipeline": [{"type": name} for name in STEPS_OF_OURS]}


def _types(steps):
    return [step["type"] for step in steps]


def test_wrapper_gets_the_data_set():
    found = mm_keys.wrap(OURS, {"type": "ClassBalancedDataset", "oversample_thr": 0.1}, masks=True)
    assert found == {"type": "ClassBalancedDataset", "oversample_thr": 0.1, "dataset": OURS}


def test_mixing_comes_after_loading():
    change = {"type": "MultiImageMixDataset", "pipeline": [{"type": "Mosaic"}], "dataset": {"type": "RepeatDataset"}}
    found = mm_keys.wrap(OURS, change, masks=False)
    assert (found["type"], found["dataset"]["type"]) == ("mmdet.MixedDataset", "RepeatDataset")
    assert _types(found["dataset"]["dataset"]["pipeline"]) == ["LoadImage", "LoadAnnotations"]
    assert _types(found["pipeline"]) == ["Mosaic", "Resize", "PackDetInputs"]


def test_pipelines_that_are_given_stay():
    change = {
        "type": "MultiImageMixDataset",
        "pipeline": [{"type": "Mosaic"}, {"type": "PackDetInputs"}],
        "dataset": {"pipeline": [{"type": "LoadImage"}]},
    }
    found = mm_keys.wrap(OURS, change, masks=False)
    assert _types(found["pipeline"]) == ["Mosaic", "PackDetInputs"]
    assert _types(found["dataset"]["pipeline"]) == ["LoadImage"]


def test_mosaic_does_not_mix_masks():
    with pytest.raises(UserError, match=r"Mosaic can't be used with masks.*: set dense.masks=false"):
        mm_keys.wrap(OURS, {"type": "MultiImageMixDataset", "pipeline": [{"type": "Mosaic"}]}, masks=True)


MOSAIC = "++mm.train_dataloader.dataset={type: MultiImageMixDataset, dataset: {type: ClassBalancedDataset, " + (
    "oversample_thr: 0.5}, pipeline: [{type: STEP, img_scale: [128, 128], prob: 1.0}]}"
)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "step"), [("detect", "Mosaic"), ("segment", "RandomMosaic")])
def test_mosaic_of_balanced_classes_trains(fit_dense, tmp_path, monkeypatch, task, step):
    seen = []

    def make_runner(settings, model):
        seen.append(runner.make_runner(settings, model))
        return seen[0]

    monkeypatch.setattr(tasks.load(task, "train"), "make_runner", make_runner)
    masks = ["dense.masks=false"] if task == "detect" else []
    summary = fit_dense(tmp_path / "run", *masks, "trainer.max_updates=1", MOSAIC.replace("STEP", step), task=task)
    assert summary["updates"] == 1
    mixed = seen[0].train_dataloader.dataset
    assert len(mixed) > summary["train_images"]  # images of rare classes are repeated
    assert type(mixed.pipeline[0]).__name__ == step
    assert seen[0].val_dataloader.dataset.pipeline.transforms[0].__class__.__name__ == "LoadImage"


class _Base:
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, idx):
        self.dataset.prepare_data(idx)
        return {"data_samples": SimpleNamespace(set_metainfo=self.__dict__.update)}


def test_mixed_image_names_the_corrupt_ones():
    from zoo.recipes.corrupt import CorruptFile

    class Items:
        test_mode = False

        def prepare_data(self, idx):
            if idx == 1:
                raise CorruptFile("1.jpg", "it is empty")
            return {"img": idx}

        def __len__(self):
            return 3

    mixed = type("Mixed", (MixesImages, _Base), {})(type("Dataset", (SkipsCorrupt, Items), {})())
    mixed[0]
    assert not hasattr(mixed, "corrupt")
    mixed[1]
    assert len(mixed.corrupt) == 1
    assert "1.jpg" in mixed.corrupt[0]
    mixed.corrupt = None
    mixed[2]
    assert mixed.corrupt is None


@pytest.mark.slow
def test_labels_of_an_image_are_known(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    label = Image.new("L", (4, 4), 255)
    label.putpixel((0, 0), 2)
    label.save(tmp_path / "labels" / "a.png")
    prefix = {"img_path": str(tmp_path / "images"), "seg_map_path": str(tmp_path / "labels")}
    found = DATASETS.build(
        {"type": "mmseg.PairedDataset", "data_prefix": prefix, "metainfo": {"classes": ("a", "b", "c")}, "pipeline": []}
    )
    assert found.get_cat_ids(0) == [2]


# Batches.


class Pictures(list):
    """A data set of sizes."""

    def get_data_info(self, idx):
        return dict(zip(("width", "height"), self[idx], strict=True))


def _seeded(sampler, accumulate=1):
    return SeededBatchSampler(sampler, 2, 5, accumulate, {"type": "mmdet.OrientedBatchSampler"})


def _batches(sizes, count, skip=0):
    batches = _seeded(InfiniteSampler(Pictures(sizes), seed=3))
    batches.skip(skip)
    found = list(itertools.islice(batches, count))
    assert [batch.seeds for batch in found] == [(5, skip + number, 0, 0) for number in range(count)]
    return [batch.indices for batch in found]


def test_batches_have_one_orientation():
    sizes = [(4, 3), (3, 4), (4, 4), (3, 5), (6, 3)]
    batches = _batches(sizes, 50)
    assert {index for batch in batches for index in batch} == set(range(5))
    assert all(len({sizes[index][0] < sizes[index][1] for index in batch}) == 1 for batch in batches)


def test_batches_of_one_orientation_are_those_of_the_sampler():
    indices = list(itertools.islice(InfiniteSampler(Pictures([(4, 4)] * 5), seed=3), 20))
    assert _batches([(4, 4)] * 5, 10) == [indices[i : i + 2] for i in range(0, 20, 2)]


def test_skipped_batches_are_left_out():
    sizes = [(4, 3), (3, 4), (4, 4), (3, 5), (6, 3)]
    assert _batches(sizes, 10, skip=7) == _batches(sizes, 17)[7:]


def test_sampler_that_ends_leaves_smaller_batches():
    sampler = torch.utils.data.SequentialSampler(Pictures([(4, 3), (3, 4), (4, 3), (4, 3)]))
    sampler.dataset = sampler.data_source
    assert list(OrientedBatchSampler(sampler, 2)) == [[0, 2], [1], [3]]
    assert list(OrientedBatchSampler(sampler, 2, drop_last=True)) == [[0, 2]]
    batches = _seeded(sampler, accumulate=2)
    seeds = [batch.seeds for _ in range(2) for batch in batches]
    assert seeds == [(5, update, 0, part) for update in range(3) for part in range(2)]


@pytest.mark.slow
def test_square_images_train_as_in_mixed_batches(fit_dense, tmp_path, weights, same):
    words = ("trainer.max_updates=2", "dense.masks=false")
    fit_dense(tmp_path / "oriented", *words)
    fit_dense(tmp_path / "mixed", *words, "++mm.train_dataloader.batch_sampler=null")
    assert "OrientedBatchSampler" in (tmp_path / "oriented" / "mmengine.py").read_text()
    assert "OrientedBatchSampler" not in (tmp_path / "mixed" / "mmengine.py").read_text()
    assert same(weights(tmp_path / "oriented"), weights(tmp_path / "mixed"))
