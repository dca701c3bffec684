"""Small data sets: incomplete batches, single images, figures on few images. A few seconds."""

import re
from types import SimpleNamespace

import pytest

from zoo.messages import UserError
from zoo.recipes import batchnorm, distributed
from zoo.recipes.base_run import of_few
from zoo.recipes.logs import log


def _log(folder):
    return (folder / "train.log").read_text()


# Batch, images per update, processes, training images -> batch and images per update that are used.
LOWERED = {
    "batch": ((64, None, 1, 44), (44, None)),
    "one image": ((64, None, 1, 1), (1, None)),
    "accumulated passes": ((16, 64, 1, 44), (16, 32)),
    "batch and passes": ((16, 64, 1, 10), (10, 10)),
    "processes": ((16, None, 4, 45), (11, None)),
    "processes, accumulated": ((2, 16, 4, 10), (2, 8)),
    "enough": ((16, 64, 1, 64), (16, 64)),
    "just enough": ((16, None, 4, 64), (16, None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
@pytest.mark.parametrize(("asked", "used"), LOWERED.values(), ids=LOWERED)
def test_batch_is_lowered_to_the_images(compose, monkeypatch, task, asked, used):
    batch, effective, processes, images = asked
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    words = (f"trainer.batch_size={batch}", f"trainer.effective_batch_size={effective or 'null'}")
    cfg, _ = distributed.fit_batch_size(compose(f"task={task}", *words), images)
    assert (cfg.trainer.batch_size, cfg.trainer.effective_batch_size) == used


def test_batch_of_mixed_images_stays_even(compose):
    cfg, _ = distributed.fit_batch_size(compose("augment.mixup=0.8", "trainer.batch_size=64"), 45)
    assert cfg.trainer.batch_size == 44


@pytest.mark.parametrize(
    ("words", "processes", "images", "need"),
    [((), 4, 3, "one for each of 4"), (("augment.cutmix=1",), 2, 3, "two for each of 2")],
    ids=["processes", "mixed"],
)
def test_fewer_images_than_processes_need(compose, monkeypatch, words, processes, images, need):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    with pytest.raises(UserError, match=rf"too few training images \({images}\): give at least {need}"):
        distributed.fit_batch_size(compose(*words), images)


@pytest.mark.slow
def test_lowered_batch_is_said(fit, images, tmp_path):
    fit(tmp_path, images, "trainer.batch_size=64")
    expected = "24 training images, fewer than the 64 of an update: lowered trainer.batch_size from 64 to 24"
    assert expected in _log(tmp_path)


@pytest.mark.slow
def test_run_with_a_lowered_batch_continues(fit, images, tmp_path):
    fit(tmp_path, images, "trainer.batch_size=64")
    assert fit(tmp_path, images, "trainer.batch_size=64", "trainer.epochs=2")["updates"] == 2


@pytest.mark.slow
def test_detector_of_fewer_images_than_a_batch_trains(fit_dense, tmp_path):
    assert fit_dense(tmp_path, "trainer.batch_size=20", "trainer.max_updates=1")["updates"] == 1
    assert "lowered trainer.batch_size from 20 to 16" in _log(tmp_path)


@pytest.mark.slow
def test_images_that_are_left_out_are_said(fit, images, tmp_path):
    fit(tmp_path, images, "trainer.batch_size=10")
    assert "4 training images are left out in every epoch, different ones each time" in _log(tmp_path)


@pytest.mark.slow
def test_nothing_is_said_where_none_is_left_out(fit, images, tmp_path):
    fit(tmp_path, images, "trainer.batch_size=8")
    assert "left out" not in _log(tmp_path)


# Batches of one image.


@pytest.mark.slow
def test_one_image_a_pass_with_batchnorm_over_one_pixel(fit, images, tmp_path):
    with pytest.raises(UserError, match=r"BatchNorm gets a single value .* Use trainer.batch_size=2 .* data.img_size"):
        fit(tmp_path / "run", images, "model=test_van", "trainer.batch_size=1")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_image_a_pass_with_batchnorm_over_more_pixels(fit, images, tmp_path):
    words = ("model=test_van", "data.img_size=64", "trainer.batch_size=1", "trainer.max_updates=1")
    assert fit(tmp_path, images, *words)["updates"] == 1


@pytest.mark.slow
def test_one_image_a_pass_without_batchnorm(fit, images, tmp_path):
    assert fit(tmp_path, images, "trainer.batch_size=1", "trainer.max_updates=1")["updates"] == 1


@pytest.mark.slow
def test_segmentor_of_one_image_a_pass_that_pools_to_one_pixel(fit_dense, tmp_path):
    words = ("dense.method=upernet", "trainer.batch_size=1")
    with pytest.raises(UserError, match=r"BatchNorm gets a single value .* a larger dense\.(crop|scales)"):
        fit_dense(tmp_path / "run", *words, task="segment")
    assert not (tmp_path / "run").exists()


def test_looking_at_batchnorm_changes_nothing(same):
    from torch import manual_seed, nn, rand, zeros

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manual_seed(0)
    batchnorm.check_batchnorm(model, lambda: model(zeros(1, 3, 8, 8)), "key")
    drawn = rand(2)
    manual_seed(0)
    assert same(drawn, rand(2))
    assert same(dict(model.state_dict()), before)
    assert not model.training


# Figures on few images.


@pytest.mark.parametrize(("images", "text"), [(1, " of 1 image"), (4, " of 4 images"), (100, ""), (50_000, "")])
def test_figure_of_a_handful_names_it(images, text):
    assert of_few(images) == text


@pytest.mark.slow
def test_epoch_names_the_handful(fit, images, tmp_path):
    fit(tmp_path, images)
    assert re.search(r"validation loss .* top-1 \d+\.\d\d % of 15 images", _log(tmp_path))


# The end of a run.


@pytest.mark.slow
def test_end_says_what_to_do_next(fit, images, tmp_path):
    folder = tmp_path / "a run"
    fit(folder, images, "trainer.max_updates=1")
    words = (f"zoo-eval '{folder}'", f"zoo-predict 'run={folder}' photos/ out/", f"zoo-export '{folder}'")
    assert [line for line in words if f"  {line}\n" in _log(folder)] == list(words)


@pytest.mark.slow
def test_end_says_which_weights_are_where(fit, images, tmp_path, monkeypatch):
    scores = iter((50.0, 25.0))
    from zoo.recipes.classify import train

    measure = train.measure

    def scored(*args):
        result = measure(*args)
        result.metrics["top1"] = next(scores)
        return result

    monkeypatch.setattr(train, "measure", scored)
    fit(tmp_path, images, "trainer.epochs=2")
    text = _log(tmp_path)
    assert "model.safetensors: the last epoch; the best was epoch 1 (top-1 50.00 %): checkpoint=best." in text


@pytest.mark.slow
def test_lines_say_how_long_the_run_will_take(fit, images, tmp_path):
    fit(tmp_path, images, "log.every=1", "trainer.epochs=2")
    lines = [line for line in _log(tmp_path).splitlines() if ", update " in line]
    assert "left" not in lines[0]
    assert all(re.search(r"\d:\d\d:\d\d left, lr", line) for line in lines[1:])


def test_remaining_time_is_that_of_the_whole_run(monkeypatch, capsys):
    from zoo.recipes import logs, progress

    clock = iter((0.0, 10.0, 20.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    logs.start_log(None, primary=True)
    bar = progress.Progress(True, epochs=100, updates=10, every=1, done=500)
    bar.start_epoch(50, 0)
    for _ in range(3):
        bar.advance("", 0.1, 1)
    assert "update 3/10:   1:22:50 left" in capsys.readouterr().out
    for handler in log.handlers[:]:
        log.removeHandler(handler)


def test_bar_of_a_notebook_is_text_that_disappears(monkeypatch, capsys):
    from IPython import display

    from zoo.recipes import logs, progress

    shown = []
    place = SimpleNamespace(display=lambda data, raw: shown.append(data), update=lambda data, raw: shown.append(data))
    monkeypatch.setattr(display, "DisplayHandle", lambda: place)
    monkeypatch.setattr(logs.console, "is_jupyter", True)
    monkeypatch.setattr(progress, "_LEAST", 0)
    with progress.Progress(True, epochs=2, updates=4) as bar:
        bar.start_epoch(0, 0)
        bar.advance("loss 0.5", 0.1, 1)
        print("mine")
        bar.advance("loss 0.4", 0.1, 1)
    texts = [data["text/plain"] for data in shown]
    assert texts[0] == texts[-1] == ""
    assert re.fullmatch(r"epoch 1/2 ━+ +2/4 loss 0.4  0:00:0\d left", texts[-2])
    assert capsys.readouterr().out == "mine\n"  # rich's own bars would show it


# Images that are too small for the model.


@pytest.mark.slow
def test_images_smaller_than_the_model_takes(fit, images, tmp_path):
    message = r"data.img_size=16 can't be used with this model: Got images of 16 x 16 pixels; enlarge or pad them"
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", images, "model=test_van", "data.img_size=16")
    assert not (tmp_path / "run").exists()
