"""Training a classifier in this process: data, options, determinism, files of a run. About 40 s; slow ones 3 min."""

import json
import math
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.distributed_sampler import RepeatAugSampler

from zoo.messages import UserError
from zoo.recipes.classify.data import EpochSampler, EvalSampler, Samples, build_transform, open_data
from zoo.recipes.classify.model import build_model
from zoo.recipes.classify.train import ClassifyRun, train
from zoo.recipes.classify.train_state import TrainState
from zoo.recipes.digits import Digits
from zoo.recipes.logs import log

SGD = ("optim=sgd", "optim.lr=0.01")


@pytest.fixture
def options(compose):
    """The data section of a configuration of an image folder."""
    return lambda root, *overrides: compose("data=imagefolder", f"data.root={root}", *overrides).data


# Files of a run.

FILES = {
    "config.yaml",
    "start.json",
    "train.log",
    "last.pt",
    "previous.pt",
    "best.safetensors",
    "metrics.jsonl",
    "curves.png",
    "classes.json",
    "predictions.png",
    "model.safetensors",
    "config.json",
    "summary.json",
    "report.html",
}


def test_run_leaves_the_documented_files_and_no_others(finished):
    assert {path.name for path in finished.iterdir()} == FILES


@pytest.mark.slow
def test_summary(finished, summary):
    found = summary(finished)
    assert {"metrics", "model", "params", "seconds", "command"} <= found.keys()
    assert found["model"] == "test_vit"
    assert found["params"] == sum(
        p.numel() for p in timm.create_model("test_vit", num_classes=3, img_size=32).parameters()
    )
    assert (found["train_images"], found["val_images"], found["classes"], found["epochs"]) == (24, 15, 3, 3)


@pytest.mark.slow
def test_summary_says_what_was_returned(fit, images, tmp_path, summary):
    assert fit(tmp_path / "run", images) == summary(tmp_path / "run")


def test_accuracies_are_percentages_of_the_images(finished, summary):
    metrics = summary(finished)["metrics"]
    assert metrics["top1"] > 60  # colours are easy
    assert metrics["top1"] * 15 / 100 == pytest.approx(round(metrics["top1"] * 15 / 100))
    assert metrics["top5"] == 100


def test_metrics_have_a_line_for_every_epoch(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["update"]) for line in lines] == [(1, 3), (2, 6), (3, 9)]


@pytest.mark.parametrize("name", ["curves.png", "predictions.png"])
def test_picture_has_a_sensible_size_and_content(finished, name):
    with Image.open(finished / name) as picture:
        assert picture.format == "PNG"
        assert 400 <= picture.width <= 3000
        assert 300 <= picture.height <= 3000
        assert np.asarray(picture.convert("L")).std() > 5


def test_log_names_data_and_result(finished):
    text = (finished / "train.log").read_text()
    assert "24 training and 15 validation images" in text
    assert "Top-1 " in text


def _logits(model, images):
    """The logits of the validation images, transformed by the configuration of the model."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    files = sorted((images / "val").rglob("*.jpg"))
    batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([sorted(p.name for p in (images / "val").iterdir()).index(f.parent.name) for f in files])
    with torch.no_grad():
        return model.eval()(batch), labels


def test_timm_loads_the_run_folder_with_the_same_accuracy(finished, images, summary):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    logits, labels = _logits(model, images)
    assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(
        summary(finished)["metrics"]["top1"]
    )


def test_timm_loads_the_run_folder_with_the_same_loss(finished, images, summary):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    logits, labels = _logits(model, images)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(summary(finished)["metrics"]["loss"], rel=1e-4)


def test_timm_loads_the_run_folder_with_the_same_weights(finished, weights, same):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    assert same(dict(model.state_dict()), weights(finished))


def test_loaded_model_knows_its_labels_and_input(finished):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["apple", "banana", "cherry"]
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)


def test_final_weights_are_those_of_the_last_checkpoint(finished, weights, same):
    state = torch.load(finished / "last.pt", weights_only=True)
    assert same(dict(state["training"]["model"]), weights(finished))


def test_best_weights_carry_classes_and_model(finished):
    from safetensors import safe_open

    with safe_open(finished / "best.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["apple", "banana", "cherry"]
        assert file.metadata()["model"] == "test_vit"


# Digits.


@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_digits_have_every_class(training):
    assert set(np.unique(Digits(training).targets)) == set(range(10))


@pytest.mark.slow
def test_digits_splits_share_no_image():
    pixels = [{image.tobytes() for image in Digits(training).images} for training in (True, False)]
    assert len(Digits(True)) + len(Digits(False)) == 1797
    assert not pixels[0] & pixels[1]


@pytest.mark.slow
def test_digits_in_a_few_updates(fit, tmp_path):
    result = fit(tmp_path / "run", None, "data=digits", "trainer.max_updates=2", pictures=True)
    assert (result["train_images"], result["val_images"], result["classes"]) == (1437, 360, 10)
    # The only checkpoint is that of the cut epoch.
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES - {"previous.pt"}


@pytest.mark.long
def test_default_run_reads_digits(compose, tmp_path):
    result = train(compose(f"run={tmp_path / 'run'}"))
    assert result["metrics"]["top1"] >= 97.0


# Image folders.


@pytest.mark.slow
def test_split_folders(options, images):
    data = open_data(options(images), seed=0)
    assert (len(data.train), len(data.val), data.classes) == (24, 15, ["apple", "banana", "cherry"])


@pytest.mark.slow
@pytest.mark.parametrize("names", [("training", "validation"), ("train", "valid"), ("train", "eval")])
def test_split_folders_have_other_names(make_folder, options, tmp_path, names):
    for name in names:
        make_folder(tmp_path / name, per_class=2)
    data = open_data(options(tmp_path), seed=0)
    assert data.train.reader.root != data.val.reader.root


@pytest.mark.slow
def test_split_folders_are_named(make_folder, options, tmp_path):
    for name, count in (("a", 2), ("b", 3), ("val", 1)):
        make_folder(tmp_path / name, per_class=count)
    data = open_data(options(tmp_path, "data.train_split=a", "data.val_split=b"), seed=0)
    assert (len(data.train), len(data.val)) == (6, 9)


@pytest.fixture
def unsplit(make_folder, options, tmp_path):
    """Open a folder without a validation split: 3 classes of 20 images."""
    root = make_folder(tmp_path / "all", per_class=20)
    return lambda seed=0, *overrides: open_data(options(root, *overrides), seed=seed)


@pytest.mark.slow
def test_held_out_images_are_disjoint_and_nothing_is_lost(unsplit):
    data = unsplit()
    assert sorted(data.train_indices + data.val_indices) == list(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_held_out_share_of_every_class(unsplit, fraction):
    data = unsplit(0, f"data.val_fraction={fraction}")
    labels = [data.val.reader.samples[i][1] for i in data.val_indices]
    assert np.bincount(labels).tolist() == [round(20 * fraction)] * 3


@pytest.mark.slow
def test_held_out_images_are_the_same_every_time(unsplit):
    assert unsplit().val_indices == unsplit().val_indices


@pytest.mark.slow
def test_held_out_images_depend_on_the_seed(unsplit):
    assert unsplit(0).val_indices != unsplit(1).val_indices


@pytest.mark.slow
def test_a_class_of_two_images_has_one_on_either_side(make_folder, options, tmp_path):
    root = make_folder(tmp_path / "all", per_class=2)
    data = open_data(options(root), seed=0)
    labels = [data.train.reader.samples[i][1] for i in data.train_indices]
    assert labels == [0, 1, 2]


@pytest.mark.slow
def test_folder_without_validation_split_trains(fit, make_folder, tmp_path, summary):
    root = make_folder(tmp_path / "all", per_class=10)
    fit(tmp_path / "run", root)
    found = summary(tmp_path / "run")
    assert (found["train_images"], found["val_images"]) == (27, 3)


@pytest.mark.slow
def test_validation_labels_follow_the_training_classes(make_folder, options, tmp_path):
    make_folder(tmp_path / "train", per_class=2)
    make_folder(tmp_path / "val", classes=("cherry",), per_class=2)
    data = open_data(options(tmp_path), seed=0)
    assert [target for _, target in data.val.reader.samples] == [2, 2]


@pytest.mark.slow
def test_validation_class_that_training_lacks(make_folder, options, tmp_path):
    make_folder(tmp_path / "train", per_class=2)
    make_folder(tmp_path / "val", classes=("apple", "chery"), per_class=2)
    with pytest.raises(UserError, match=r"'chery' \(did you mean 'cherry'\?\)"):
        open_data(options(tmp_path), seed=0)


@pytest.mark.slow
def test_class_map_orders_the_classes(make_folder, options, tmp_path):
    make_folder(tmp_path / "all", per_class=4)
    (tmp_path / "classes.txt").write_text("cherry\nbanana\napple\n")
    data = open_data(options(tmp_path / "all", f"data.class_map={tmp_path / 'classes.txt'}"), seed=0)
    assert data.classes == ["cherry", "banana", "apple"]


@pytest.mark.slow
def test_class_map_that_leaves_classes_out_is_noted(make_folder, options, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)  # the run of another test has changed it
    make_folder(tmp_path / "all", per_class=4)
    (tmp_path / "classes.txt").write_text("cherry\napple\n")
    with caplog.at_level("WARNING"):
        data = open_data(options(tmp_path / "all", f"data.class_map={tmp_path / 'classes.txt'}"), seed=0)
    assert data.classes == ["cherry", "apple"]
    assert "classes.txt leaves out 1 of the 3 classes in" in caplog.text
    assert "all: banana." in caplog.text


# Other data sets of timm.


def _tar(root, file):
    with tarfile.open(file, "w") as archive:
        for path in sorted(root.rglob("*.jpg")):
            archive.add(path, path.relative_to(root))


@pytest.mark.slow
def test_tar_file_trains(fit, images, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "tars").mkdir(exist_ok=True)
        _tar(images / split, tmp_path / "tars" / f"{split}.tar")
    tars = ("data.train_split=train.tar", "data.val_split=val.tar", "data.name=tar", f"data.root={tmp_path / 'tars'}")
    result = fit(tmp_path / "run", None, "data=timm", "data.num_workers=0", *tars)
    assert (result["train_images"], result["val_images"], result["classes"]) == (24, 15, 3)


@pytest.mark.slow
def test_torchvision_folder_trains(fit, images, tmp_path):
    names = ("data.name=torch/image_folder", f"data.root={images}", "data.num_workers=0")
    result = fit(tmp_path / "run", None, "data=timm", *names)
    assert (result["train_images"], result["val_images"], result["classes"]) == (24, 15, 3)


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    """The images as webdataset shards."""
    webdataset = pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    classes = ["apple", "banana", "cherry"]
    for split in ("train", "val"):
        with webdataset.TarWriter(str(root / f"{split}-0000.tar")) as writer:
            for number, path in enumerate(sorted((images / split).rglob("*.jpg"))):
                label = classes.index(path.parent.name)
                writer.write({"__key__": f"{number:04d}", "jpg": path.read_bytes(), "cls": label})
    return root


STREAM = ("data=timm", "data.train_split=train-0000.tar", "data.val_split=val-0000.tar", "data.num_classes=3")
COUNTS = ("data.num_samples=24", "data.val_num_samples=15")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_trains(fit, shards, tmp_path, workers):
    where = ("data.name=wds/shards", f"data.root={shards}", f"data.num_workers={workers}")
    result = fit(tmp_path / "run", None, *STREAM, *COUNTS, *where, "trainer.epochs=2")
    assert (result["train_images"], result["val_images"], result["updates"]) == (24, 15, 6)


@pytest.mark.slow
def test_stream_can_not_be_repeated(fit, shards, tmp_path):
    where = ("data.name=wds/shards", f"data.root={shards}")
    with pytest.raises(UserError, match=r"augment.repeats=3 can't be used with data.name=wds/shards, which is read in"):
        fit(tmp_path / "run", None, *STREAM, *COUNTS, *where, "augment.repeats=3")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_resumes_bit_identically(fit, shards, tmp_path, weights, same, workers):
    where = ("data.name=wds/shards", f"data.root={shards}", f"data.num_workers={workers}", "trainer.epochs=3")
    fit(tmp_path / "whole", None, *STREAM, *COUNTS, *where)
    fit(tmp_path / "parts", None, *STREAM, *COUNTS, *where, "trainer.max_updates=4")
    fit(tmp_path / "parts", None, *STREAM, *COUNTS, *where)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_unknown_kind_of_data(fit, tmp_path):
    with pytest.raises(UserError, match="can't be opened"):
        fit(tmp_path / "run", None, "data=timm", "data.name=torch/no_such_set", f"data.root={tmp_path}")


# Starting from weights.


@pytest.fixture(scope="module")
def two_classes(make_folder, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("two") / "all", classes=("day", "night"), per_class=6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run folder", "safetensors", "pth"])
def test_backbone_is_taken_over_and_the_classifier_is_new(compose, finished, weights, tmp_path, what):
    path = {"run folder": finished, "safetensors": finished / "best.safetensors"}.get(what, tmp_path / "weights.pth")
    if what == "pth":
        torch.save(weights(finished), path)
    source = load_file(finished / "best.safetensors") if what == "safetensors" else weights(finished)
    cfg = compose("model=test_vit", "data.img_size=32", f"pretrained={path}")
    state = build_model(cfg, num_classes=2).state_dict()
    assert state["head.weight"].shape[0] == 2
    assert [
        name for name in source if not name.startswith("head.") and not torch.equal(state[name], source[name])
    ] == []


@pytest.mark.slow
def test_classifier_is_kept_for_as_many_classes(compose, finished, weights, same):
    cfg = compose("model=test_vit", "data.img_size=32", f"pretrained={finished}")
    assert same(dict(build_model(cfg, num_classes=3).state_dict()), weights(finished))


@pytest.mark.slow
def test_fine_tuning_from_a_run(fit, finished, two_classes, tmp_path):
    result = fit(tmp_path / "run", two_classes, f"pretrained={finished}")
    assert result["classes"] == 2


@pytest.mark.slow
def test_fine_tuned_run_loads_in_timm(fit, finished, two_classes, tmp_path):
    fit(tmp_path / "run", two_classes, f"pretrained={finished}")
    assert timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).num_classes == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "lr"),
    [((), 1e-3), (("pretrained=true",), 2e-4), (("pretrained=true", "optim.lr=0.5"), 0.5), (("optim.lr=0.5",), 0.5)],
    ids=["scratch", "weights", "weights and lr", "lr"],
)
def test_learning_rate_default(compose, overrides, lr):
    cfg = compose("schedule=constant", *overrides)
    training = TrainState(cfg, timm.create_model("test_vit", num_classes=2), 2, 4, torch.device("cpu"))
    assert {group["lr"] for group in training.optimizer.param_groups} == {lr}


@pytest.mark.slow
def test_pretrained_that_does_not_exist(compose, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        build_model(compose(f"pretrained={tmp_path / 'none.pth'}"), 2)


@pytest.mark.slow
def test_pretrained_of_another_model(compose, finished):
    with pytest.raises(UserError, match="test_van can't be created with"):
        build_model(compose("model=test_van", f"pretrained={finished}"), 2)


def test_wrong_model_keyword(compose):
    with pytest.raises(UserError, match="colour='red'"):
        build_model(compose("+model_kwargs.colour=red"), 2)


# Options of the training loop.


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("augment=strong",),
        ("augment.mixup=0.5",),
        ("augment.cutmix=1", "augment.mixup_mode=elem"),
        ("augment.mixup=0.5", "augment.mixup_mode=pair", "augment.smoothing=0.1"),
        ("augment.re_prob=1", "augment.re_count=3"),
        ("augment.re_prob=1", "augment.re_mode=const"),
        ("trainer.channels_last=true", "model=test_van"),
        ("trainer.grad_checkpointing=true",),
        ("trainer.amp=bf16",),
        ("trainer.amp=true",),
        ("trainer.amp=fp16",),
        ("trainer.deterministic=true",),
        ("optim.clip_grad=1",),
        ("optim.clip_grad=0.01", "optim.clip_mode=agc"),
        ("optim.clip_grad=0.1", "optim.clip_mode=value"),
        ("optim.opt=lamb", "optim.betas=[0.9,0.99]", "optim.eps=1e-6"),
        ("schedule.sched=step", "schedule.decay_epochs=1"),
        ("schedule.sched=multistep", "schedule.decay_milestones=[1]"),
        ("schedule.sched=none",),
        ("schedule.cooldown_epochs=1",),
        ("augment.auto_augment=rand-m9-mstd0.5-inc1",),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_option_trains(fit, images, tmp_path, overrides):
    result = fit(tmp_path / "run", images, *overrides)
    assert math.isfinite(result["metrics"]["loss"])
    assert result["skipped_updates"] == 0


@pytest.mark.long
@pytest.mark.slow
def test_compiled_model_trains_and_exports_plain_names(fit, images, tmp_path, weights):
    """Its first stage is frozen, which is wrapped with the others."""
    words = ("model=test_convnext", "trainer.freeze=1", "optim=sgd", "optim.lr=0.05", "trainer.max_updates=2")
    fit(tmp_path / "plain", images, *words)
    fit(tmp_path / "compiled", images, *words, "trainer.compile=true")
    plain, compiled = (weights(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled.keys() == timm.create_model("test_convnext", num_classes=3).state_dict().keys()
    frozen = [name for name in plain if name.startswith(("stem.", "stages.0."))]
    assert [name for name in frozen if not torch.equal(plain[name], compiled[name])] == []
    # Fused loops sum in another order than eager mode.
    assert [name for name in plain if not torch.allclose(plain[name], compiled[name], rtol=1e-4, atol=1e-5)] == []


@pytest.mark.slow
def test_mixed_images_have_no_training_accuracy(fit, images, tmp_path):
    fit(tmp_path / "run", images, "augment.mixup=0.5")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["train_top1"] is None


@pytest.mark.slow
def test_cooldown_follows_the_epochs(fit, images, tmp_path):
    assert fit(tmp_path / "run", images, "schedule.cooldown_epochs=2")["epochs"] == 3


@pytest.mark.slow
def test_evaluation_every_other_epoch_and_at_the_end(fit, images, tmp_path):
    fit(tmp_path / "run", images, "trainer.epochs=3", "trainer.eval_every=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["val_top1" in line for line in lines] == [False, True, True]


@pytest.mark.slow
def test_one_channel(fit, images, tmp_path, weights):
    fit(tmp_path / "run", images, "+model_kwargs.in_chans=1")
    assert weights(tmp_path / "run")["patch_embed.proj.weight"].shape[1] == 1


@pytest.mark.slow
def test_one_channel_loads_in_timm(fit, images, tmp_path):
    fit(tmp_path / "run", images, "+model_kwargs.in_chans=1")
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_bf16_changes_the_weights_a_little(fit, images, tmp_path, weights):
    fit(tmp_path / "a", images, *SGD)
    fit(tmp_path / "b", images, *SGD, "trainer.amp=bf16")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    largest = max((a[name] - b[name]).abs().max() for name in a)
    assert 0 < largest < 0.05


@pytest.mark.slow
def test_exported_weights_are_the_averaged_ones(fit, images, tmp_path, weights, same):
    fit(tmp_path / "run", images, "trainer.ema_decay=0.9")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["training"]
    assert same(dict(state["ema"]), weights(tmp_path / "run"))
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


@pytest.mark.slow
def test_early_stopping(fit, images, tmp_path, summary):
    """Weights that hardly change have no better evaluation than the first."""
    args = ("trainer.epochs=9", "optim.lr=1e-12")
    found = fit(tmp_path, images, *args, "trainer.patience=2")
    assert found["epochs"] == 3
    assert found["stopped_early"] == (
        "Stopped early, after update 9: no better evaluation since epoch 1 (trainer.patience=2)."
    )
    assert found["stopped_early"] in (tmp_path / "report.html").read_text()
    assert fit(tmp_path, images, *args, "trainer.patience=2") == found == summary(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert fit(tmp_path, images, *args, "trainer.patience=2")["epochs"] == 3
    whole = fit(tmp_path, images, *args, "trainer.patience=9")
    assert (whole["epochs"], whole["stopped_early"]) == (9, None)


@pytest.mark.slow
def test_averaged_weights_follow_their_formula(fit, images, tmp_path):
    """timm's first average equals the weights, so the second one is the first that has two terms."""
    states = []
    for updates in (1, 2):
        fit(tmp_path / "run", images, "trainer.ema_decay=0.75", f"trainer.max_updates={updates}")
        states.append(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["training"])
    name = "blocks.0.attn.qkv.weight"
    expected = 0.75 * states[0]["model"][name] + 0.25 * states[1]["model"][name]
    assert torch.allclose(states[1]["ema"][name], expected, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_accumulated_gradients_are_those_of_the_whole_batch(fit, images, tmp_path, weights, model):
    common = (f"model={model}", *SGD, "trainer.max_updates=4", "trainer.epochs=2")
    fit(tmp_path / "whole", images, *common, "trainer.batch_size=8")
    fit(tmp_path / "parts", images, *common, "trainer.batch_size=4", "trainer.effective_batch_size=8")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    # Sums in another order change each gradient by a few units in the last place, over a few small steps.
    assert [name for name in whole if not torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-6)] == []


@pytest.mark.slow
def test_accumulation_is_said(fit, images, tmp_path):
    fit(tmp_path / "run", images, "trainer.batch_size=4", "trainer.effective_batch_size=8")
    assert "8 images per update = 4 images x 2 passes, accumulated" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 12])
def test_effective_batch_has_to_be_a_multiple(fit, images, tmp_path, size):
    with pytest.raises(UserError, match=rf"effective_batch_size={size} is not a multiple of 8"):
        fit(tmp_path / "run", images, f"trainer.effective_batch_size={size}")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_van", "test_vit", "test_convnext"])
def test_layer_decay_grows_towards_the_head(compose, model):
    cfg = compose("optim.layer_decay=0.5")
    training = TrainState(cfg, timm.create_model(model, num_classes=2), 2, 4, torch.device("cpu"))
    scales = [group["lr_scale"] for group in training.optimizer.param_groups]
    assert scales == sorted(scales)
    assert scales[0] < scales[-1] == 1.0


def _rates(training, model):
    """The learning rate of every parameter by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in training.optimizer.param_groups for p in group["params"]}


def test_learning_rate_factors_by_name(compose):
    """LITv2 as its authors train it: the weights of offsets have a constant rate, the cosine's last one."""
    model = timm.create_model("test_litv2", num_classes=2)
    words = ("optim.lr=1e-3", "++optim.lr_factors={offset.weight:0.01,offset:0.5}", "schedule.warmup_epochs=0")
    training = TrainState(compose(*words, "schedule.min_lr=1e-5"), model, 2, 10, torch.device("cpu"))
    decays = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    for update in (0, 150, 299):
        training.set_schedule(update)
        rates = _rates(training, model)
        assert rates.keys() == dict(model.named_parameters()).keys()
        weights = {name for name in rates if name.endswith("offset.weight")}
        assert len(weights) == 3
        assert [rates[name] for name in weights] == pytest.approx([1e-5] * 3)
        other = rates["head.weight"]
        biases = [rate for name, rate in rates.items() if name.endswith("offset.bias")]
        assert biases == pytest.approx([1e-5 + (other - 1e-5) * (0.5e-3 - 1e-5) / (1e-3 - 1e-5)] * 3)
    assert other < 2e-5 < _rates(TrainState(compose(*words), model, 2, 10, torch.device("cpu")), model)["head.weight"]
    assert {decays[id(p)] for name, p in model.named_parameters() if name in weights} == {0.05}


@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_learning_rate_factors_and_layer_decay_multiply(compose, schedule):
    model = timm.create_model("test_vit", num_classes=2)
    words = ("optim.lr=0.1", "optim.layer_decay=0.5", f"schedule.sched={schedule}", "schedule.warmup_epochs=0")
    states = [
        TrainState(compose(*words, *more), model, 2, 4, torch.device("cpu"))
        for more in ((), ("++optim.lr_factors={qkv:0.2}",))
    ]
    plain, scaled = (_rates(state, model) for state in states)
    assert len(set(plain.values())) > 4
    for name, rate in plain.items():
        assert scaled[name] == pytest.approx(rate * (0.2 if "qkv" in name else 1)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["++optim.lr_factors={dconv.offset:0.1}"],
            r"has 'dconv.offset', but no trained parameter has that in its name: did you mean .*downsample",
        ),
        (
            ["++optim.lr_factors={zzz:0.1}"],
            r"has 'zzz', but .*: names are stem.proj.weight, stem.proj.bias",
        ),
        (
            ["++optim.lr_factors={head:0.001}", "optim.lr=1e-3", "schedule.min_lr=1e-5"],
            r"0.001 for 'head' makes a learning rate of 1e-06, but the schedule ends at schedule.min_lr=1e-05",
        ),
    ],
)
def test_learning_rate_factors_that_can_not_be_used(compose, words, message):
    with pytest.raises(UserError, match=message):
        TrainState(compose(*words), timm.create_model("test_litv2", num_classes=2), 2, 4, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "asked", "used"), [(10, 2, 2), (3, 2, 1.5), (1, 5, 0.5)])
def test_warmup_is_at_most_half_of_the_training(compose, epochs, asked, used):
    cfg = compose(f"trainer.epochs={epochs}", f"schedule.warmup_epochs={asked}")
    training = TrainState(cfg, timm.create_model("test_vit", num_classes=2), 2, 10, torch.device("cpu"))
    rates = []
    for number in range(10 * epochs):
        training.set_schedule(number)
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == 10 * used - 1  # after the warm-up, timm's cosine continues at its own position


@pytest.mark.slow
def test_vectors_are_not_decayed(compose):
    training = TrainState(compose(), timm.create_model("test_vit", num_classes=2), 2, 4, torch.device("cpu"))
    decayed = [p for group in training.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]]
    assert min(p.ndim for p in decayed) > 1


def test_further_loss_of_a_model_is_added(compose):
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    model.auxiliary_loss = lambda: 0.5 + model.head.weight.sum()
    training = TrainState(compose(), model, 2, 4, torch.device("cpu"))
    labels = torch.tensor([0, 1])
    result = training.forward(torch.randn(2, 3, 32, 32), labels)
    task = training.task.criterion(result["output"], labels)
    torch.testing.assert_close(result["loss"], task + 0.5 + model.head.weight.sum())
    (grad,) = torch.autograd.grad(result["loss"] - task, model.head.weight)
    torch.testing.assert_close(grad, torch.ones_like(grad))


def test_model_is_told_how_far_training_has_come(compose):
    """In epochs, after each update; a resumed run says it first."""
    model, told = timm.create_model("test_vit", num_classes=2), []
    model.set_epoch = told.append
    training = TrainState(compose(), model, 2, 4, torch.device("cpu"))
    training.set_schedule(6)
    training.end_update(7, stepped=True)
    assert told == [1.5, 1.75]


# Determinism.

RANDOM = ("augment=strong", "+model_kwargs.drop_path_rate=0.2", "trainer.ema_decay=0.9", "trainer.epochs=2")


@pytest.fixture(scope="module")
def drawn(fit, images, tmp_path_factory):
    """The folder of a run with RANDOM; read only."""
    folder = tmp_path_factory.mktemp("drawn") / "run"
    fit(folder, images, *RANDOM)
    return folder


@pytest.mark.slow
def test_another_seed_gives_other_weights(fit, images, drawn, tmp_path, weights, same):
    fit(tmp_path, images, *RANDOM, "seed=1")
    assert not same(weights(drawn), weights(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_number_of_workers_does_not_matter(fit, images, drawn, tmp_path, weights, same, workers):
    fit(tmp_path, images, *RANDOM, f"data.num_workers={workers}")
    assert same(weights(drawn), weights(tmp_path))


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_whatever_ran_before(fit, images, drawn, tmp_path, weights, same):
    torch.rand(3), np.random.default_rng().random(3)
    fit(tmp_path / "other", images, "seed=5")
    fit(tmp_path / "again", images, *RANDOM)
    assert same(weights(drawn), weights(tmp_path / "again"))


# Samplers.


def _shares(count, batch, world, epoch=0, start=0, repeats=1):
    samplers = [EpochSampler(range(count), batch, 0, rank, world, repeats) for rank in range(world)]
    for sampler in samplers:
        sampler.epoch, sampler.start = epoch, start
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [16, 23, 31])
def test_epoch_takes_no_image_twice(count, world):
    taken = [index for share in _shares(count, 8, world) for _, index in share]
    assert len(taken) == len(set(taken)) == count // 8 * 8


@pytest.mark.parametrize("world", [2, 4])
def test_update_has_the_same_images_whatever_the_processes(world):
    (alone,) = _shares(23, 8, 1)
    together = _shares(23, 8, world)
    first = {pair for share in together for pair in share[: 8 // world]}
    assert first == set(alone[:8])


def test_epochs_have_other_orders():
    assert [i for _, i in _shares(24, 8, 1)[0]] != [i for _, i in _shares(24, 8, 1, epoch=1)[0]]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_epoch_continues_in_the_middle(world, repeats):
    whole, rest = _shares(24, 8, world, repeats=repeats), _shares(24, 8, world, start=8, repeats=repeats)
    assert [share[8 // world :] for share in whole] == rest


@pytest.mark.parametrize("world", [1, 2, 4])
def test_images_are_repeated_in_timms_order(world):
    order = [index for _, index in _shares(24, 8, 1)[0]]
    for rank, share in enumerate(_shares(24, 8, world, repeats=3)):
        timms = RepeatAugSampler(range(24), world, rank, shuffle=False, num_repeats=3, selected_round=0)
        assert [index for _, index, _ in share] == [order[number] for number in timms]
    forms = [(index, form) for share in _shares(24, 8, world, repeats=3) for _, index, form in share]
    assert sorted(forms) == sorted((index, form) for index in order[:8] for form in range(3))


def test_repeated_images_have_other_forms(compose):
    transform = build_transform(compose("augment=strong").augment, {"input_size": (1, 8, 8)})
    samples = Samples(Digits(True), transform, 0, True, (1, 8, 8))
    first, second, again = (samples[0, 5, form][0] for form in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_repeats_and_factors_continue_within_an_epoch(fit, images, tmp_path, weights, same):
    words = (*RANDOM, "augment.repeats=3", "++optim.lr_factors={qkv:0.1}")
    fit(tmp_path / "whole", images, *words)
    fit(tmp_path / "parts", images, *words, "trainer.max_updates=2")
    fit(tmp_path / "parts", images, *words)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    log = (tmp_path / "parts" / "train.log").read_text()
    assert "An epoch uses 8 of the training images, each 3 times (augment.repeats)." in log
    with pytest.raises(UserError, match=r"a run with parameters in optim.lr_factors \['qkv'\], not \['mlp'\]"):
        fit(tmp_path / "parts", images, *RANDOM, "++optim.lr_factors={mlp:0.1}")


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (1, 2), (8, 3)])
def test_evaluation_counts_every_image_once(count, world):
    samplers = [EvalSampler(range(count), rank, world) for rank in range(world)]
    counted = [index for s in samplers for _, index in list(s)[: s.num_valid_samples]]
    assert sorted(counted) == list(range(count))


# Values that make training fail.


@pytest.mark.slow
def test_run_whose_weights_are_not_finite_ends_in_an_error(fit, images, tmp_path, monkeypatch):
    monkeypatch.setattr(ClassifyRun, "_write_weights", lambda self, name: {"weight": torch.tensor([1.0, torch.nan])})
    monkeypatch.setattr(ClassifyRun, "_describe", lambda self, weights: None)
    with pytest.raises(UserError, match=r"the final weights in .* are not finite: lower optim\.lr"):
        fit(tmp_path / "run", images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "augment.auto_augment=nonsense",
            r"augment.auto_augment=nonsense is not a policy of timm .*: give one such as",
        ),
        ("augment.auto_augment=rand-n-5", r"augment.auto_augment=rand-n-5 is not a policy of timm"),
        ("optim.opt=nonsense", r"the optimizer can't be created from .*: Optimizer nonsense not found"),
        ("optim.opt=os.system", r"the optimizer can't be created from .*: Optimizer os.system not found"),
    ],
)
def test_value_that_timm_refuses(fit, images, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", images, override)
