"""Starting from a detector or segmentor, and scoring one from its file. Slow 1 min, long 3 min."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from zoo.messages import UserError
from zoo.recipes import scenes, tasks

sys.path.append(str(Path(__file__).parents[1] / "zoo"))
import golden

sys.path.pop()

train = tasks.load("segment", "train")
pretrained = tasks.load("detect", "pretrained")
model = tasks.load("detect", "model")

DIGITS = [str(digit) for digit in range(10)]
CPU = torch.device("cpu")


def _load(cfg, classes, file):
    """A model with the weights of `file`, as a state dict without counters, and what is said about them."""
    net, notes = pretrained.build_pretrained(cfg, classes, CPU, str(file))
    (note,) = notes
    return {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}, note


def _build(cfg, classes, file):
    return _load(cfg, classes, file)[0]


def _say(cfg, classes, file):
    return _load(cfg, classes, file)[1]


# A run of zoo-train.


@pytest.mark.slow
def test_run_gives_everything_to_a_model_of_the_same_classes(compose, finished_dense, weights, same):
    run = finished_dense["detect"]
    state = _build(compose("task=detect"), DIGITS, run)
    assert same(state, {key: value for key, value in weights(run).items() if key in state})


@pytest.mark.slow
def test_outputs_follow_the_names_of_classes(compose, finished_dense, weights):
    run, cfg = finished_dense["detect"], compose("task=detect")
    theirs, ours = weights(run), _build(cfg, ["3", "seven", "0"], run)
    head = "roi_head.bbox_head"
    for key, rows in ((f"{head}.fc_cls.bias", [3, 0, 10]), ("roi_head.mask_head.conv_logits.weight", [3, 0])):
        kept = [0, 2, 3][: len(rows)]
        assert torch.equal(ours[key][kept], theirs[key][rows])
    sides = ours[f"{head}.fc_reg.weight"].view(3, 4, -1), theirs[f"{head}.fc_reg.weight"].view(10, 4, -1)
    assert torch.equal(sides[0][[0, 2]], sides[1][[3, 0]])
    assert not any(torch.equal(ours[f"{head}.fc_cls.weight"][1], row) for row in theirs[f"{head}.fc_cls.weight"])
    others = [key for key in ours if ours[key].shape == theirs[key].shape]
    assert len(ours) - len(others) == 6
    assert all(torch.equal(ours[key], theirs[key]) for key in others)


@pytest.mark.slow
def test_rows_of_anchors_follow_the_names_of_classes(compose):
    """RetinaNet has its outputs anchor by anchor."""
    key, anchors = "bbox_head.retina_cls.bias", 9
    theirs = torch.arange(anchors * 3.0)
    mine = torch.full((anchors * 2,), -1.0)
    moved = pretrained._move_classes(key, mine, theirs, [(1, 2)], 2, 3)
    assert moved.tolist() == [value for i in range(anchors) for value in (-1, 3 * i + 2)]
    assert pretrained._move_classes("bbox_head.fc_reg.bias", torch.zeros(4), torch.ones(4), [(0, 1)], 2, 3) is None


@pytest.mark.slow
def test_log_says_what_is_new(compose, finished_dense):
    run, cfg = finished_dense["detect"], compose("task=detect")
    assert _say(cfg, DIGITS, run).endswith("tensors are loaded.")
    line = _say(cfg, ["3", "seven"], run)
    assert line.endswith("new: the outputs for 1 of 2 classes (seven; the file has 0, 1, 2, ...).")
    assert _say(cfg, ["3", "0"], run).endswith("loaded; of its 10 classes, 2 are kept.")
    boxes = compose("task=detect", "dense.masks=false")
    assert _say(boxes, DIGITS, run).endswith("left out: mask_head, which this model does not have.")
    alone = compose("task=detect", "dense=cascade_mask_rcnn", "dense.small=true", "dense.pretrained_heads=false")
    assert "left out: neck, roi_head, rpn_head (dense.pretrained_heads=false); new: neck, " in _say(alone, DIGITS, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dense=retinanet",), "looks like mask_rcnn, not retinanet: set dense.method=mask_rcnn, or take its backbone"),
        (("task=segment",), "looks like mask_rcnn, not semantic_fpn: set task=detect dense.method=mask_rcnn, or"),
        (("model=test_van",), "is of a run with model=test_dinat, not test_van: set model=test_dinat"),
        (
            ("dense.small=false",),
            r"of another shape \(neck.* set what its run was trained with, dense.small=True \(not",
        ),
    ],
)
def test_run_that_does_not_fit(compose, finished_dense, words, message):
    cfg = compose("task=detect", *words) if "task=segment" not in words else compose(*words)
    with pytest.raises(UserError, match=message):
        _build(cfg, DIGITS, finished_dense["detect"])


@pytest.mark.slow
def test_fine_tuning_from_a_run(fit_dense, finished_dense, digit_scenes, tmp_path, weights):
    """Three of the ten digits under other names, by the command's own way: nothing but their outputs starts anew."""
    words = _renamed(digit_scenes, tmp_path)
    run = finished_dense["detect"]
    fit_dense(tmp_path / "run", f"pretrained={run}", *words, "optim.lr=1e-9", "trainer.max_updates=1")
    assert (
        "new: the outputs for 3 of 3 classes (four, seven, nine; the file has 0, 1, 2, ...)"
        in (tmp_path / "run" / "train.log").read_text()
    )
    key = "rpn_head.rpn_conv.weight"
    assert torch.allclose(weights(tmp_path / "run")[key], weights(run)[key], atol=1e-7)
    fit_dense(tmp_path / "run", f"pretrained={run}", *words, "optim.lr=1e-9", "trainer.max_updates=2")
    assert "Continues after update 1." in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.long
def test_fine_tuning_needs_a_tenth_of_the_updates(fit_dense, tmp_path, monkeypatch):
    """The boxes of three digits under other names, from a detector of all ten and from nothing."""
    monkeypatch.setattr(scenes, "SCENES", {"train": 320, "val": 40, "test": 1})
    root = scenes.ensure(tmp_path / "scenes")
    words = (f"data.root={root}", "trainer.max_updates=null", "trainer.batch_size=8", "trainer.eval_every=1000")
    words += ("dense.masks=false", "dense.warmup_updates=3")
    fit_dense(tmp_path / "ten", *words, "dense.updates=240")
    words += tuple(_renamed(root, tmp_path))
    fresh = fit_dense(tmp_path / "fresh", *words, "dense.updates=100")
    tuned = fit_dense(tmp_path / "tuned", *words, "dense.updates=10", f"pretrained={tmp_path / 'ten'}")
    assert tuned["metrics"]["bbox_AP50"] > fresh["metrics"]["bbox_AP50"] + 5


def _renamed(root, folder):
    """Overrides for the scenes' annotations with only three digits, under other names."""
    names = {"4": "four", "7": "seven", "9": "nine"}
    words = []
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        content["categories"] = [c for c in content["categories"] if c["name"] in names]
        kept = {category["id"] for category in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
        for category in content["categories"]:
            category["name"] = names[category["name"]]
        (folder / f"{split}.json").write_text(json.dumps(content))
        words.append(f"data.{split}_ann={folder / split}.json")
        words.append(f"data.{split}_images={root / 'images' / split}")
    return words


# Official files.


def _heads(channels, classes):
    """The neck and heads of a Mask R-CNN as MMDetection 2 names them: names and shapes."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for i, width in enumerate(channels):
        layer(f"neck.lateral_convs.{i}.conv", 256, width, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
        layer(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_cls", 3, 256, 1, 1)
    layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    layer("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
    layer("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    layer("roi_head.bbox_head.fc_cls", classes + 1, 1024)
    layer("roi_head.bbox_head.fc_reg", 4 * classes, 1024)
    layer("roi_head.mask_head.upsample", 256, 256, 2, 2)
    layer("roi_head.mask_head.conv_logits", classes, 256, 1, 1)
    return shapes


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of Mask R-CNN on DiNAT-Mini as the authors' code writes it, and its tensors."""
    backbone = golden.official_weights("dinat_mini", golden.read("dinat_mini", "detect"))
    tensors = {f"backbone.{key}": value.float() for key, value in backbone.items() if not key.startswith("head.")}
    generator = torch.Generator().manual_seed(0)
    shapes = _heads((64, 128, 256, 512), 80)
    tensors |= {key: torch.randn(shape, generator=generator) * 0.01 for key, shape in shapes.items()}
    path = tmp_path_factory.mktemp("official") / "mask_rcnn_dinat_mini.pth"
    classes = tuple(_coco_classes())
    torch.save({"meta": {"mmdet_version": "2.19.0", "CLASSES": classes, "epoch": 36}, "state_dict": tensors}, path)
    return path, tensors


def _coco_classes():
    from mmdet.datasets import CocoDataset

    return CocoDataset.METAINFO["classes"]


RECIPE = ("recipe=coco/mask_rcnn_dinat_mini",)


@pytest.mark.slow
def test_official_file_is_scored(command, official, digit_scenes, tmp_path):
    path, tensors = official
    names = _coco_classes()
    content = json.loads((digit_scenes / "annotations" / "instances_val.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == content["images"][0]["id"]]
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    shutil.copytree(digit_scenes / "images" / "val", root / "val2017")
    words = (*RECIPE, "task=detect", f"data.root={root}", "dense.scales=[128]", "data.num_workers=0")
    code, output = command("eval", *words, f"pretrained={path}", "out=scored", "trainer.device=cpu")
    assert code == 0, output
    assert f"{path}: {len(tensors)} tensors are loaded." in " ".join(output.split())
    found = json.loads((tmp_path / "scored" / "eval.json").read_text())
    assert found["weights"] == str(path)
    assert found["metrics"].keys() == {"mask_AP", "mask_AP50", "bbox_AP", "bbox_AP50"}
    assert list(found["per_class"]) == list(names)


@pytest.mark.long
def test_official_file_is_loaded_strictly(compose, official, tmp_path):
    path, tensors = official
    cfg, names = compose(*RECIPE, "data.root=."), list(_coco_classes())
    state = _build(cfg, names, path)
    assert torch.equal(state["roi_head.bbox_head.fc_reg.weight"], tensors["roi_head.bbox_head.fc_reg.weight"])
    table = "backbone.body.model.stages.1.blocks.0.attn.bias_table"
    assert torch.equal(state[table], tensors["backbone.levels.1.blocks.0.attn.rpb"])
    assert torch.equal(state["backbone.body.model.output_norms.2.weight"], tensors["backbone.norm2.weight"])
    # The same classes in another order.
    turned = _build(cfg, names[::-1], path)
    assert torch.equal(
        turned["roi_head.mask_head.conv_logits.bias"], tensors["roi_head.mask_head.conv_logits.bias"].flip(0)
    )
    for change, message in (
        ({"rpn_head.rpn_cls.bias": None}, r"1 missing \(rpn_head.rpn_cls.bias\)"),
        ({"roi_head.mask_head.more.bias": torch.zeros(1)}, r"1 unexpected \(roi_head.mask_head.more.bias\)"),
        ({"backbone.levels.1.blocks.0.attn.rpb": None}, "the backbone of .* can't be used: .* 1 missing"),
        ({f"backbone.norm{i}.{k}": None for i in range(4) for k in ("weight", "bias")}, "set dense.output_norm=false"),
        ({"rpn_head.rpn_cls.bias": torch.full((3,), torch.nan)}, "NaN"),
    ):
        altered = {key: value for key, value in (tensors | change).items() if value is not None}
        torch.save({"state_dict": altered}, tmp_path / "altered.pth")
        with pytest.raises(UserError, match=message):
            _build(cfg, names, tmp_path / "altered.pth")


@pytest.mark.slow
def test_official_file_of_another_model_is_named(compose, official):
    with pytest.raises(UserError, match=r"does not fit dinat_tiny.*looks like .*_mini"):
        _build(compose(*RECIPE, "model=dinat_tiny", "data.root=."), list(_coco_classes()), official[0])


@pytest.mark.slow
def test_file_without_names_of_classes(compose, weights, finished_dense, tmp_path):
    cfg, path = compose("task=detect"), tmp_path / "unnamed.pth"
    torch.save(weights(finished_dense["detect"]), path)
    assert _say(cfg, DIGITS, path).endswith(
        "it does not name its classes, which are taken to be these in the same order."
    )
    assert _say(cfg, DIGITS[:3], path).endswith("3 of 3 classes (0, 1, 2); it does not name its classes.")
    whole = pretrained.open_whole(cfg, str(path))
    net = model.build_model(cfg, DIGITS[:3], CPU, False)
    with pytest.raises(UserError, match="can't be evaluated: it lacks the outputs for 3 of 3 classes"):
        pretrained.load_whole(whole, net, cfg, DIGITS[:3], complete=True)


@pytest.mark.slow
def test_layers_of_mask2former_have_their_names_of_mmdetection_2(compose, tmp_path, same):
    cfg = compose("task=detect", "dense=mask2former", "dense.small=true")
    state = model.build_model(cfg, DIGITS, CPU, False).state_dict()
    old = {}
    for key, value in state.items():
        if ".transformer_decoder.layers." in key:
            key = key.replace(".cross_attn.", ".attentions.0.").replace(".self_attn.", ".attentions.1.")
        elif ".pixel_decoder.encoder.layers." in key:
            key = key.replace(".self_attn.", ".attentions.0.")
        old[key.replace(".ffn.", ".ffns.0.")] = value
    assert sum(key not in state for key in old) == 2 * 4 * 3 + 8 + (3 + 1) * 4
    torch.save({"meta": {"CLASSES": tuple(DIGITS)}, "state_dict": old}, tmp_path / "old.pth")
    found = _build(cfg, DIGITS, tmp_path / "old.pth")
    assert same(found, {key: state[key] for key in found})


@pytest.mark.slow
def test_file_of_detectron_is_named(compose, tmp_path):
    torch.save({"model": {"backbone.x": torch.ones(1), "sem_seg_head.y": torch.ones(1)}}, tmp_path / "d2.pth")
    with pytest.raises(UserError, match="is a file of Detectron2"):
        _build(compose("task=detect"), DIGITS, tmp_path / "d2.pth")


class _Runs:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


@pytest.mark.slow
def test_code_in_a_file_is_not_run(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"backbone.x": torch.ones(1), "rpn_head.y": torch.ones(1)}, "meta": _Runs()}
    torch.save(content, "bad.pth", pickle_module=pickle)
    with pytest.raises(UserError, match=r"bad.pth can't be read as a checkpoint: the file asks for \S*exec"):
        _build(compose("task=detect"), DIGITS, "bad.pth")
    assert not (tmp_path / "executed").exists()
