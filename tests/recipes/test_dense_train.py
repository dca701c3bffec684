"""Runs of detection and segmentation: their files, resuming, crashes. 10 s, slow 1 min."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import zoo
from zoo.messages import UserError
from zoo.recipes import tasks

train = tasks.load("detect", "train")

TASKS = ("detect", "segment")


def _state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _log(folder):
    return (folder / "train.log").read_text()


@pytest.fixture
def copied(finished_dense, tmp_path):
    """A copy of the finished detection run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_dense["detect"].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


AGAIN = ("trainer.max_updates=3", "optim.lr=1e-5")


# Files of a run.

FILES = (
    *("config.yaml", "train.log", "last.pt", "best.safetensors", "metrics.jsonl", "curves.png", "predictions.png"),
    *("model.safetensors", "summary.json", "mmengine.py", "start.json", "classes.json", "report.html"),
)
SCORES = {"detect": ["mask_AP", "mask_AP50", "bbox_AP", "bbox_AP50"], "segment": ["mIoU", "mAcc", "aAcc"]}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_run_leaves_its_files(finished_dense, task):
    assert {path.name for path in finished_dense[task].iterdir()} >= set(FILES)
    assert not list(finished_dense[task].rglob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_summary_has_the_figures(finished_dense, summary, task):
    found = summary(finished_dense[task])
    assert list(found["metrics"]) == SCORES[task]
    assert all(0 <= value <= 100 for value in found["metrics"].values())
    assert (found["task"], found["model"], found["updates"], found["train_images"]) == (task, "test_dinat", 3, 16)
    assert (found["val_images"], found["processes"], found["skipped_updates"]) == (4, 1, 0)
    assert len(found["classes"]) == {"detect": 10, "segment": 11}[task]
    assert found["best"]["update"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_metrics_have_a_line_per_evaluation(finished_dense, task):
    (line,) = _lines(finished_dense[task])
    assert (line["update"], line["epoch"]) == (3, 0.375)
    assert line["train_loss"] > 0
    assert line["images_per_second"] > 0
    assert {f"val_{name}" for name in SCORES[task]} <= line.keys()


@pytest.mark.slow
def test_training_loss_has_a_line_per_epoch(fit_dense, tmp_path):
    fit_dense(tmp_path, "trainer.batch_size=8", "trainer.eval_every=9", "trainer.max_updates=5", task="segment")
    lines = _lines(tmp_path)
    assert [(line["update"], line["epoch"], "val_mIoU" in line) for line in lines] == [
        (2, 1, False),
        (4, 2, False),
        (5, 2.5, True),
    ]
    assert all(line["train_loss"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "line"), [("detect", "training: 44 boxes"), ("segment", "training: 16 images")])
def test_log_says_what_the_data_are(finished_dense, task, line):
    assert line in _log(finished_dense[task])


@pytest.mark.slow
def test_best_weights_are_those_of_the_best_evaluation(finished_dense, same):
    folder = finished_dense["detect"]
    assert same(load_file(folder / "best.safetensors"), load_file(folder / "model.safetensors"))
    assert same(load_file(folder / "model.safetensors"), dict(_state(folder)["model"]))


@pytest.mark.slow
def test_pictures_show_images_that_were_found_and_true(finished_dense):
    with Image.open(finished_dense["detect"] / "predictions.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_mmengine_configuration_can_be_read_again(finished_dense):
    # In a separate process: the commands of zoo never run a configuration.
    code = "import sys; from mmengine.config import Config; print(Config.fromfile(sys.argv[1]).train_cfg.max_iters)"
    command = [sys.executable, "-c", code, str(finished_dense["segment"] / "mmengine.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "3"


def test_scores_are_percentages_and_leave_out_what_does_not_exist():
    found = train.scores({"coco/bbox_mAP": 0.25, "coco/bbox_mAP_50": -1.0, "mIoU": 40.5, "other": 1.0})
    assert found == {"bbox_AP": 25.0, "mIoU": 40.5}


# Resuming.

RANDOM = ("+model_kwargs.drop_path_rate=0.3", "dense.warmup_updates=3", "optim.lr=1e-3")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", pytest.param("segment", marks=pytest.mark.long)])
def test_continued_run_equals_an_undisturbed_one(fit_dense, tmp_path, task, same):
    """Also if other processes load its images."""
    words = (*RANDOM, "augment.hflip=0.5", "dense.photometric=true", "trainer.effective_batch_size=4")
    fit_dense(tmp_path / "whole", *words, "trainer.max_updates=4", task=task)
    fit_dense(tmp_path / "parts", *words, "trainer.max_updates=2", "data.num_workers=1", task=task)
    fit_dense(tmp_path / "parts", *words, "trainer.max_updates=4", "data.num_workers=2", task=task)
    one, two = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert same(one["model"], two["model"])
    assert same(one["optimizer"], two["optimizer"])
    assert "Continues after update 2." in _log(tmp_path / "parts")
    assert "trainer.max_updates=4 (was 2)" in _log(tmp_path / "parts")


@pytest.mark.long
@pytest.mark.slow
def test_evaluation_in_between_changes_nothing(fit_dense, tmp_path, same):
    args = (*RANDOM, "trainer.max_updates=4", "trainer.batch_size=8")
    fit_dense(tmp_path / "often", *args, "trainer.eval_every=1")
    fit_dense(tmp_path / "once", *args, "trainer.eval_every=2")
    assert [line["update"] for line in _lines(tmp_path / "often")] == [2, 4]
    assert same(_state(tmp_path / "often")["model"], _state(tmp_path / "once")["model"])


@pytest.mark.long
def test_longer_training_follows_its_own_schedule(fit_dense, tmp_path, same):
    """The schedule is that of the new configuration, not that of the checkpoint."""
    args = ("trainer.max_updates=4", "optim.lr=1e-3")
    fit_dense(tmp_path / "run", *args, "dense.updates=3")
    fit_dense(tmp_path / "run", *args, "dense.updates=4")
    # 1e-3 * (1 + cos(2/3 pi)) / 2 and 1e-3 * (1 + cos(3/4 pi)) / 2: the last steps of either
    assert [line["lr"] for line in _lines(tmp_path / "run")] == pytest.approx([2.5e-4, 1.464466e-4])
    assert _state(tmp_path / "run")["progress"]["update"] == 4
    fit_dense(tmp_path / "run", "dense.updates=8", "optim.lr=2e-3", "trainer.max_updates=5")
    # Five of eight updates along a half cosine: 2e-3 * (1 + cos(5/8 pi)) / 2
    assert _lines(tmp_path / "run")[-1]["lr"] == pytest.approx(6.173166e-4, rel=1e-4)


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing(fit_dense, copied, summary):
    before = {name: (copied / name).read_bytes() for name in ("last.pt", "model.safetensors", "summary.json")}
    assert fit_dense(copied, *AGAIN) == summary(copied)
    assert "This run is finished" in _log(copied)
    assert {name: (copied / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_finished_run_refuses_other_settings(fit_dense, copied):
    with pytest.raises(UserError, match=r"holds a finished run that was not trained with seed=1 \(was 0\)"):
        fit_dense(copied, *AGAIN, "seed=1")


@pytest.mark.slow
def test_finished_run_without_its_export_writes_it_again(fit_dense, copied, weights, finished_dense, same):
    for name in ("model.safetensors", "summary.json"):
        (copied / name).unlink()
    fit_dense(copied, *AGAIN)
    assert same(weights(copied), weights(finished_dense["detect"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model=test_van", "model 'test_dinat', not 'test_van'"),
        ("dense=retinanet", "method 'mask_rcnn', not 'retinanet'"),
        ("trainer.batch_size=4", "images per update 2, not 4"),
    ],
)
def test_other_settings_refuse_the_folder(fit_dense, copied, override, key):
    with pytest.raises(UserError, match=rf"holds a run with {key}: choose another run=<folder>"):
        fit_dense(copied, *AGAIN, override)


@pytest.mark.slow
def test_other_task_refuses_the_folder(fit_dense, copied):
    with pytest.raises(UserError, match="holds a run with classes"):
        fit_dense(copied, *AGAIN, task="segment")


@pytest.mark.slow
def test_other_classes_refuse_the_folder(fit_dense, copied, digit_scenes, tmp_path):
    for split in ("train", "val"):
        content = json.loads((digit_scenes / "annotations" / f"instances_{split}.json").read_text())
        content["categories"][0]["name"] = "nought"
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    words = [f"data.{split}_ann={tmp_path / split}.json" for split in ("train", "val")]
    with pytest.raises(UserError, match=r"holds a run with classes \['0', .*not \['nought'"):
        fit_dense(copied, *AGAIN, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override", [pytest.param("dense.small=false", marks=pytest.mark.long), "+model_kwargs.depths=[1,1,1,2]"]
)
def test_checkpoint_of_another_shape_is_refused(fit_dense, copied, override):
    with pytest.raises(UserError, match=r"the checkpoint in .* does not fit these settings .*: choose another run="):
        fit_dense(copied, override, "trainer.max_updates=4")


@pytest.mark.slow
def test_never_refuses_an_existing_run(fit_dense, copied):
    with pytest.raises(UserError, match="already holds a run"):
        fit_dense(copied, *AGAIN, "resume=never")


@pytest.mark.slow
def test_must_refuses_a_new_run(fit_dense, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        fit_dense(tmp_path / "run", "resume=must")


@pytest.mark.slow
def test_must_continues(fit_dense, copied):
    assert fit_dense(copied, "trainer.max_updates=4", "optim.lr=1e-5", "resume=must")["updates"] == 4


def _killed(*_, **__):
    raise SystemError


@pytest.mark.long
def test_killed_between_the_last_update_and_its_evaluation(fit_dense, tmp_path, monkeypatch, weights, same):
    args = ("trainer.save_minutes=0", "optim.lr=1e-3")
    fit_dense(tmp_path / "whole", *args)
    with monkeypatch.context() as patch:
        patch.setattr(train.DenseRun, "close_epoch", _killed)
        with pytest.raises(SystemError):
            fit_dense(tmp_path / "parts", *args)
    assert _state(tmp_path / "parts")["progress"] | {"seconds": 0} == {
        **{"update": 2, "nonfinite": 0, "seconds": 0, "finished": False},
    }
    summary = fit_dense(tmp_path / "parts", *args)
    assert list(summary["metrics"]) == SCORES["detect"]
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.long
@pytest.mark.slow
def test_run_ahead_of_a_lower_limit_is_evaluated_and_ends(fit_dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.DenseRun, "close_epoch", _killed)
        with pytest.raises(SystemError):
            fit_dense(tmp_path / "run", "trainer.save_minutes=0")
    summary = fit_dense(tmp_path / "run", "trainer.max_updates=1")
    assert summary["updates"] == 2
    assert list(summary["metrics"]) == SCORES["detect"]


# Gradient accumulation.


@pytest.mark.slow
def test_accumulated_batches_train_alike(fit_dense, tmp_path, monkeypatch):
    """The same number of updates, learning rates and images."""
    rates, seen = [], []
    before = train._ProgressHook.before_train_iter

    def note(self, runner, batch_idx, data_batch):
        seen.extend(sample.img_path for sample in data_batch["data_samples"])
        before(self, runner, batch_idx, data_batch)

    monkeypatch.setattr(train._ProgressHook, "before_train_iter", note)
    monkeypatch.setattr(train.Progress, "advance", lambda self, note, lr, images: rates.append((lr, images)))
    args = ("trainer.effective_batch_size=4", "dense.warmup_updates=3", "trainer.max_updates=3", "dense.updates=5")
    for batch in (4, 2):
        fit_dense(tmp_path / str(batch), f"trainer.batch_size={batch}", *args, task="segment")
    assert rates[:3] == rates[3:] == [(pytest.approx(lr), 4) for lr in (2e-6, 1.001e-3, 2e-3)]
    assert seen[:12] == seen[12:]
    assert len(seen) == 24
    four, two = (_state(tmp_path / str(batch)) for batch in (4, 2))
    assert four["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    steps = [{float(value["step"]) for value in state["optimizer"]["state"].values()} for state in (four, two)]
    assert steps == [{3.0}, {3.0}]
    assert four["progress"]["update"] == two["progress"]["update"] == 3


@pytest.mark.long
def test_accumulated_run_continues(fit_dense, tmp_path, same):
    args = (*RANDOM, "trainer.effective_batch_size=4")
    fit_dense(tmp_path / "whole", *args, "trainer.max_updates=3")
    fit_dense(tmp_path / "parts", *args, "trainer.max_updates=1")
    fit_dense(tmp_path / "parts", *args, "trainer.max_updates=3")
    assert same(_state(tmp_path / "whole")["model"], _state(tmp_path / "parts")["model"])


# Averaged weights, early stopping, compilation.


@pytest.mark.slow
def test_averaged_weights_are_evaluated_saved_and_resumed(fit_dense, tmp_path, command, weights, summary, same):
    args = (*RANDOM, "optim.lr=1e-2", "trainer.ema_decay=0.5")
    for folder, updates in (("whole", 3), ("parts", 1), ("parts", 3)):
        fit_dense(tmp_path / folder, *args, f"trainer.max_updates={updates}", task="segment")
    one, two = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert same(one["model"], two["model"])
    assert same(one["ema"], two["ema"])
    assert not same(one["ema"], one["model"])
    assert same(weights(tmp_path / "whole"), dict(one["ema"]))
    assert same(load_file(tmp_path / "whole" / "best.safetensors"), dict(one["ema"]))
    code, output = command("eval", str(tmp_path / "whole"), "trainer.device=cpu")
    assert code == 0, output
    scored = json.loads((tmp_path / "whole" / "eval" / "eval.json").read_text())["metrics"]
    assert scored == summary(tmp_path / "whole")["metrics"]


@pytest.mark.slow
def test_hooks_of_which_a_run_does_not_know_are_refused(fit_dense, tmp_path):
    for hook, key in (("EMAHook", "trainer.ema_decay"), ("mmengine.EarlyStoppingHook", "trainer.patience")):
        words = f"+mm.custom_hooks=[{{type: {hook}, monitor: mIoU}}]"
        with pytest.raises(UserError, match=rf"mm.custom_hooks has {hook}, .*: use {key}\."):
            fit_dense(tmp_path / "run", words, task="segment")


@pytest.mark.slow
def test_early_stopping(fit_dense, tmp_path, command, summary):
    """Weights that hardly change have no better evaluation than the first."""
    args = ("trainer.batch_size=16", "trainer.epochs=9", "trainer.eval_every=1", "trainer.max_updates=null")
    args += ("optim.lr=1e-12", "dense.masks=false")
    patient = (*args, "trainer.patience=1")
    found = fit_dense(tmp_path, *patient)
    assert found["updates"] == 2
    assert found["stopped_early"] == (
        "Stopped early, after update 2: no better evaluation since epoch 1 (trainer.patience=1)."
    )
    assert found["stopped_early"] in _log(tmp_path)
    assert found["stopped_early"] in (tmp_path / "report.html").read_text()
    assert fit_dense(tmp_path, *patient) == found
    assert "This run is finished: raise trainer.patience to continue it" in _log(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert fit_dense(tmp_path, *patient)["updates"] == 2
    code, output = command("eval", str(tmp_path), "trainer.device=cpu")
    assert code == 0, output
    assert fit_dense(tmp_path, *args, "trainer.patience=2")["updates"] == 3
    assert len(_lines(tmp_path)) == 3


@pytest.mark.slow
def test_channels_last_trains_alike(fit_dense, tmp_path, weights, finished_dense):
    """Both start from the same weights: new ones are drawn in the order in which they are stored."""
    words = (f"pretrained={finished_dense['segment']}", "trainer.max_updates=1", "optim.lr=1e-4")
    fit_dense(tmp_path / "plain", *words, task="segment")
    fit_dense(tmp_path / "last", *words, "trainer.channels_last=true", task="segment")
    (one,), (two,) = (_lines(tmp_path / name) for name in ("plain", "last"))
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
    one, two = (weights(tmp_path / name) for name in ("plain", "last"))
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=3e-4) for key in one)
    weight = _state(tmp_path / "last")["model"]["neck.fpn_convs.0.conv.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.long
@pytest.mark.slow
def test_compiled_backbone_trains_and_saves_plain_names(fit_dense, tmp_path, weights, finished_dense):
    fit_dense(tmp_path, "trainer.compile=true", "trainer.max_updates=2", "trainer.ema_decay=0.5", task="segment")
    assert "The backbone is compiled in training; the neck and the heads are not." in _log(tmp_path)
    assert weights(tmp_path).keys() == weights(finished_dense["segment"]).keys()


# Losses that are not finite.


@pytest.fixture
def spoil(monkeypatch):
    """Make the losses of some passes, counted from 0, not finite; returns the weights before each pass."""
    from mmdet.models.detectors import MaskRCNN

    def call(*passes, value=float("nan")):
        original, before = MaskRCNN.parse_losses, []

        def parse_losses(self, losses):
            loss, values = original(self, losses)
            if len(before) in passes:
                loss = loss * value
            before.append({key: tensor.clone() for key, tensor in self.named_parameters()})
            return loss, values

        monkeypatch.setattr(MaskRCNN, "parse_losses", parse_losses)
        return before

    return call


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)])
def test_bad_loss_skips_the_update(fit_dense, tmp_path, spoil, same, value):
    before = spoil(1, value=value)
    summary = fit_dense(tmp_path / "run", "trainer.max_updates=4", "trainer.batch_size=8")
    assert not same(before[0], before[1])
    assert same(before[1], before[2])
    assert not same(before[2], before[3])
    assert (summary["updates"], summary["skipped_updates"]) == (4, 1)
    assert "Skipped update 2: its loss is not finite (1 in a row)." in _log(tmp_path / "run")


@pytest.mark.long
@pytest.mark.slow
def test_skipped_updates_are_counted_once(fit_dense, tmp_path, spoil):
    spoil(0, 3)
    args = ("trainer.batch_size=8", "trainer.eval_every=1", "trainer.max_updates=6")
    assert fit_dense(tmp_path / "run", *args)["skipped_updates"] == 2
    assert [line["skipped_updates"] for line in _lines(tmp_path / "run")] == [1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [2, pytest.param(3, marks=pytest.mark.long)], ids=["first pass", "second pass"])
def test_bad_pass_spoils_its_accumulated_update_only(fit_dense, tmp_path, spoil, same, bad):
    before = spoil(bad)
    summary = fit_dense(tmp_path / "run", "trainer.effective_batch_size=4", "trainer.max_updates=3")
    assert same(before[2], before[3])
    assert same(before[3], before[4])
    assert not same(before[1], before[2])
    assert (summary["updates"], summary["skipped_updates"]) == (3, 1)
    assert len(before) == 6


@pytest.mark.slow
def test_too_many_bad_losses_stop_the_run(fit_dense, tmp_path, spoil):
    spoil(1, 2, 3)
    with pytest.raises(UserError, match=r"not finite in 3 updates in a row \(trainer.max_nonfinite=2\): lower optim.l"):
        fit_dense(tmp_path / "run", "trainer.max_updates=9", "trainer.max_nonfinite=2")


@pytest.mark.slow
def test_good_losses_in_between_start_the_count_anew(fit_dense, tmp_path, spoil):
    spoil(0, 1, 3, 4)
    summary = fit_dense(tmp_path / "run", "trainer.max_updates=5", "trainer.max_nonfinite=2")
    assert summary["skipped_updates"] == 4


# Processes that are killed and stopped.

CHILD = (
    *("dense.digits_first=false", "data.num_workers=0", "trainer.batch_size=2", "trainer.save_minutes=0"),
    *("trainer.max_updates=400", "trainer.device=cpu", "log.wandb=disabled", "run=run"),
)


def _wait_for_update(process, folder, update):
    while not (folder / "last.pt").exists() or _state(folder)["progress"]["update"] < update:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


@pytest.mark.long
def test_killed_process_continues(start_cli, run_cli, digit_scenes, tmp_path):
    words = ("task=detect", f"data.root={digit_scenes}", *CHILD)
    process = start_cli(*words, cwd=tmp_path)
    try:
        _wait_for_update(process, tmp_path / "run", 2)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    update = _state(tmp_path / "run")["progress"]["update"]
    code, output = run_cli(*words, f"trainer.max_updates={update + 1}", cwd=tmp_path)
    assert code == 0, output
    assert f"Continues after update {update}." in output
    assert re.search(r"box AP50 \d", output)


@pytest.mark.long
def test_stopped_process_saves_and_says_how_to_continue(start_cli, digit_scenes, tmp_path):
    process = start_cli("task=segment", f"data.root={digit_scenes}", *CHILD, cwd=tmp_path)
    try:
        _wait_for_update(process, tmp_path / "run", 1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 143, output
    update = _state(tmp_path / "run")["progress"]["update"]
    assert f"Stopped by SIGTERM after update {update}, and saved." in output
    assert re.search(r"Continue with: python -m zoo.recipes.train task=segment .*run=run", output)
    assert "Traceback" not in output


# Pretrained weights.


@pytest.mark.slow
def test_classifier_gives_the_backbone_its_weights(fit_dense, finished, tmp_path, weights, monkeypatch, fit, images):
    fit(tmp_path / "classifier", images, "model=test_dinat", "data.img_size=64")
    start = {}

    def keep(self, runner):
        self.runner = runner
        start.update(self.model.backbone.state_dict())
        raise SystemError

    monkeypatch.setattr(train.DenseRun, "restore", keep)
    with pytest.raises(SystemError):
        fit_dense(tmp_path / "run", f"pretrained={tmp_path / 'classifier'}")
    learnt = {
        key: value for key, value in weights(tmp_path / "classifier").items() if not key.startswith(("norm.", "head"))
    }
    found = {key.removeprefix("body.").removeprefix("model."): value for key, value in start.items()}
    assert learnt
    assert [key for key, value in learnt.items() if not torch.equal(found[key], value)] == []


@pytest.mark.slow
def test_run_that_goes_on_needs_no_pretrained_weights(fit_dense, copied, tmp_path):
    """The weights may no longer exist then."""
    state = _state(copied)
    state["config"]["pretrained"] = str(tmp_path / "gone")
    torch.save(state, copied / "last.pt")
    words = ("trainer.max_updates=4", "optim.lr=1e-5", f"pretrained={tmp_path / 'gone'}")
    assert fit_dense(copied, *words)["updates"] == 4


@pytest.mark.slow
def test_digits_come_first_and_once(fit_dense, tmp_path, monkeypatch):
    words = ("dense.digits_first=true", "trainer.max_updates=1")
    fit_dense(tmp_path / "run", *words)
    assert "single digits" not in _log(tmp_path / "run")  # its log begins later
    backbone = tmp_path / "run" / "backbone"
    assert json.loads((backbone / "summary.json").read_text())["updates"] == 1
    monkeypatch.setattr(train, "classify", _killed)
    assert fit_dense(tmp_path / "run", *words)["updates"] == 1
    assert fit_dense(tmp_path / "run", "dense.digits_first=true", "trainer.max_updates=2")["updates"] == 2


@pytest.mark.slow
def test_digits_come_first_with_the_models_settings(fit_dense, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "classify", lambda cfg, write_report, resume_command: asked.append(cfg) or _killed())
    with pytest.raises(SystemError):
        fit_dense(tmp_path / "run", "dense.digits_first=true", "seed=3", "+model_kwargs.drop_path_rate=0.1")
    (cfg,) = asked
    assert (cfg.task, cfg.data.name, cfg.model, cfg.seed) == ("classify", "digit_crops", "test_dinat", 3)
    assert dict(cfg.model_kwargs) == {"drop_path_rate": 0.1}
    assert cfg.log.wandb == "disabled"
    assert cfg.run == str(tmp_path / "run" / "backbone")


@pytest.mark.slow
def test_digits_do_not_come_before_pretrained_weights(fit_dense, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "classify", _killed)
    with pytest.raises(UserError, match="none"):
        fit_dense(tmp_path / "run", "dense.digits_first=true", f"pretrained={tmp_path / 'none'}")


# Every family, briefly.

MODELS = (
    *(timm.list_models("test_*", module=family)[0] for family in zoo.FAMILIES),
    *("convnext_atto", "davit_tiny"),
)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_family_trains_and_evaluates(fit_dense, tmp_path, task, model):
    # At this learning rate they still predict some objects, right or wrong.
    summary = fit_dense(tmp_path / "run", f"model={model}", "trainer.max_updates=1", "optim.lr=1e-5", task=task)
    assert list(summary["metrics"]) == SCORES[task]
    assert summary["skipped_updates"] == 0


# Two processes.

KEEP_WEIGHTS = """
import torch
from zoo.recipes import distributed, tasks
from zoo.recipes.train import main

train = tasks.load("detect", "train")
finish = train.DenseRun.finish


def keep(run):
    torch.save(run.runner.model.module.state_dict(), f"rank{distributed.rank()}.pt")
    return finish(run)


train.DenseRun.finish = keep
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_train_one_model(digit_scenes, tmp_path, task, same, summary):
    (tmp_path / "keep.py").write_text(KEEP_WEIGHTS)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "keep.py")
    words = (f"task={task}", f"data.root={digit_scenes}", "dense.digits_first=false", "run=run", "optim.lr=1e-3")
    small = ("trainer.max_updates=2", "trainer.batch_size=2", "trainer.device=cpu", "log.wandb=disabled")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words, *small], cwd=tmp_path, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same(dict(one), dict(two))
    assert output.count("on 4 validation images") == 1
    assert "4 images per update = 2 images x 2 processes" in output
    found = summary(tmp_path / "run")
    assert (found["updates"], found["processes"], list(found["metrics"])) == (2, 2, SCORES[task])


@pytest.mark.long
@pytest.mark.parametrize("reduce", [False, True], ids=["from-zero", "from-one"])
def test_more_classes_than_a_byte_holds(fit_dense, tmp_path, reduce):
    """Stripes of the labels 299, 256 and 2, and of ignored pixels. `make test` has the whole journey of such data."""
    stripes = np.tile(np.repeat(np.array([299, 256, 2, 65535], np.uint16), 16), (64, 1))
    for split in ("train", "val"):
        for number in range(2):
            for kind in ("images", "annotations"):
                (tmp_path / "data" / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray((stripes >> 1).astype(np.uint8)).save(tmp_path / f"data/images/{split}/{number}.png")
            Image.fromarray(stripes).save(tmp_path / f"data/annotations/{split}/{number}.png")
    words = ("data=masks", f"data.root={tmp_path / 'data'}", "data.num_classes=300", "data.ignore_index=65535")
    small = ("dense.small=true", "dense.scales=[64]", "dense.max_size=64", "dense.crop=[64,64]")
    reduced = f"data.reduce_zero_label={str(reduce).lower()}"
    result = fit_dense(tmp_path / "run", *words, *small, reduced, "trainer.effective_batch_size=2", task="segment")
    assert result["updates"] == 2
    classes = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [label for label, count in enumerate(classes["counts"]) if count] == [n - reduce for n in (2, 256, 299)]
