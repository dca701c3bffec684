"""train, evaluate and predict from Python: the same figures and messages as the commands, and a process that is left
as it was. A minute; the tests of detectors and segmentors are in test_api_dense.py.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import hydra
import matplotlib
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from zoo.recipes import Hooks, TrainResult, UserError, config, evaluate, plots, predict, report, train
from zoo.recipes.classify import train as classify_train
from zoo.recipes.given_images import as_image
from zoo.recipes.settings import words as as_words

TINY = {
    "model": "test_vit",
    "data": "imagefolder",
    "data.img_size": 32,
    "data.num_workers": 0,
    "trainer.batch_size": 8,
    "trainer.device": "cpu",
    "log.wandb": "disabled",
}


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch, tmp_path):
    """Pictures take longer than these trainings. Each test has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "plot_curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(classify_train, "plot_predictions", lambda *args, **kwargs: None)
    monkeypatch.setattr(report, "write_or_warn", lambda folder: (folder / "report.html").touch())


@pytest.fixture
def tiny(images):
    """Settings of a training of three updates in one epoch; the arguments change them."""
    return lambda **changed: {**TINY, "data.root": images, "trainer.epochs": 1, "run": "run", **changed}


# Names.


def test_scripts_of_the_same_names_do_not_hide_the_functions():
    import zoo.recipes.predict
    import zoo.recipes.train
    from zoo.recipes.train import main

    assert sys.modules["zoo.recipes.train"].main is main
    assert zoo.recipes.train is train
    assert zoo.recipes.predict is predict


# Settings.


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model", "van_b0", "model=van_b0"),
        ("data.root", Path("/data/my pets, 2"), "data.root=/data/my pets, 2"),
        ("data.img_size", np.int64(64), "data.img_size=64"),
        ("optim.lr", 1e-5, "optim.lr=1e-05"),
        ("optim.lr", np.float32(0.5), "optim.lr=0.5"),
        ("optim.lr", np.array(0.5), "optim.lr=0.5"),
        ("optim.betas", torch.tensor([0.5, 0.25]), "optim.betas=[0.5,0.25]"),
        ("pretrained", np.bool_(True), "pretrained=true"),
        ("pretrained", True, "pretrained=true"),
        ("optim.clip_grad", None, "optim.clip_grad=null"),
        ("optim.betas", (0.9, 0.95), "optim.betas=[0.9,0.95]"),
        ("log.project", "1e3", "log.project='1e3'"),
        ("log.project", "it's, [new]", r"log.project='it\'s, [new]'"),
        ("model_kwargs", {"depths": [1, 2], "act": "a,b"}, "model_kwargs={depths:[1,2],act:'a,b'}"),
    ],
)
def test_settings_are_arguments(key, value, expected):
    assert as_words({key: value}, config.Config) == [expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model=van_b0", r"settings='model=van_b0' is not a mapping: write \{\"model\""),
        ({3: 4}, "3 is not a key: write the keys of the command line"),
        ({"-m": True}, "'-m' is not a key"),
        ({"hydra.run.dir": "x"}, "'hydra.run.dir' is not a key"),
        (
            {"model": torch.nn.Conv2d(3, 2, 1)},
            r"model=Conv2d\(3, 2, kernel_size=\(1, 1\), stride=\(1, 1\)\) is not allowed",
        ),
        (
            {"optim.lr": TrainResult("classify", Path("a"), {}, {}, [], None, {})},
            r"optim.lr=TrainResult\(.{40,60} \.\.\. is",
        ),
        ({"data": {"root": "x"}}, "data can't be a mapping: write its keys with dots, such as 'data.root'"),
        ({"optim.lr": object()}, "optim.lr=<object .*> is not allowed: a setting is None, a truth value, a number"),
    ],
)
def test_what_is_no_setting(settings, message):
    with pytest.raises(UserError, match=message):
        train(settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"modle": "van_b0"},
        {"data": "imagefolderr"},
        {"optim.lr": "abc"},
        {"trainer.epochs": -1},
        {"model": "van_b00"},
        {"data": "imagefolder", "data.root": "no,where"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_messages_are_those_of_the_command(command, settings):
    _, output = command("train", *(f"{key}={value}" for key, value in settings.items()))
    with pytest.raises(UserError) as raised:
        train(settings)
    assert output.strip().rstrip(".") == f"zoo-train: error: {raised.value}".rstrip(".")


@pytest.mark.parametrize(
    "call", [evaluate, lambda *words: predict(words[0], [], *words[1:])], ids=["evaluate", "predict"]
)
def test_run_is_a_folder_that_is_given_once(call):
    with pytest.raises(UserError, match="run=a is given twice"):
        call("b", {"run": "a"})
    with pytest.raises(UserError, match="run is of type TrainResult: give a run folder, such as the `folder` of a Tr"):
        call(TrainResult("classify", Path("a"), {}, {}, [], None, {}))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (print, "hooks=<built-in function print> are no Hooks: write hooks=Hooks\\(after_update=<function>\\), or"),
        (Hooks, "hooks=<class .*> are no Hooks"),
        (Hooks(after_epoch=3), "after_epoch=3 is not a function that takes a TrainingState"),
    ],
)
def test_what_are_no_hooks(hooks, message):
    with pytest.raises(UserError, match=message):
        train(hooks=hooks)


# The same figures as the commands'.


@pytest.mark.slow
def test_training_is_the_commands(command, tiny, images, weights, same, monkeypatch):
    words = [f"{key}={value}" for key, value in tiny(run="typed").items()]
    code, output = command("train", *words)
    assert code == 0, output
    result = train(tiny(run="called"))
    typed = json.loads(Path("typed/summary.json").read_text())
    assert result.metrics == typed["metrics"]
    assert result.best == typed["best"]
    assert same(weights(Path("typed")), weights(result.folder))
    assert [record["val_loss"] for record in result.history] == [typed["metrics"]["loss"]]
    called = json.loads(Path("called/summary.json").read_text())
    assert called["command"] == typed["command"].replace("run=typed", "run=called")
    model = result.model()
    assert not model.training
    assert same(model.state_dict(), weights(result.folder))


@pytest.mark.slow
def test_evaluation_and_predictions_are_the_commands(command, finished, images):
    code, output = command("eval", finished, "out=typed", "trainer.device=cpu", "log.wandb=disabled")
    assert code == 0, output
    typed = json.loads(Path("typed/eval.json").read_text())
    result = evaluate(finished, {"out": "called", "trainer.device": "cpu"})
    assert result.metrics == typed["metrics"]
    assert {name: figures["top1"] for name, figures in result.per_class.items()} == typed["per_class"]
    assert result.folder == Path("called")
    assert result.classes == ["apple", "banana", "cherry"]
    assert result.confusion.sum() == len(result.targets) == len(result.predictions) == 15
    assert 100 * np.mean(result.targets == result.predictions) == pytest.approx(result.metrics["top1"])

    code, output = command("predict", f"run={finished}", images / "val", "predicted", "device=cpu")
    assert code == 0, output
    typed = json.loads(Path("predicted/predictions.json").read_text())["images"]
    called = predict(finished, images / "val", {"device": "cpu"})
    assert [str(item.source) for item in called] == [item["image"] for item in typed]
    for mine, theirs in zip(called, typed, strict=True):
        assert mine.classes == [guess["class"] for guess in theirs["predictions"]]
        assert [round(float(score), 6) for score in mine.scores] == [
            guess["probability"] for guess in theirs["predictions"]
        ]


# The process.


def _state():
    """What a program may notice."""
    log = logging.getLogger("zoo")
    return {
        "random numbers": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
        "log": (log.handlers[:], log.level, log.propagate, logging.getLogger().handlers[:]),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "arguments": sys.argv[:],
        "output": (sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "hydra": (GlobalHydra.instance().hydra, hydra.version.getbase()),
        "matplotlib": dict(matplotlib.rcParams),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.slow
def test_process_is_left_as_it_was(tiny, tmp_path):
    """With a Hydra and a handler of the program's own, and twice."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("mine: 1\n")
    log, mine = logging.getLogger("zoo"), logging.StreamHandler()
    log.addHandler(mine)
    try:
        with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.2"):
            before, models = _state(), []
            for number in range(2):
                hooks = Hooks(after_epoch=lambda state: models.append(weakref.ref(state.model)))
                result = train(tiny(run=f"run{number}", **{"trainer.deterministic": True}), hooks=hooks)
                assert [model() for model in models] == [None] * len(models)  # their memory is free again
                evaluate(result.folder)
                assert _state() == before
            assert hydra.compose("config") == {"mine": 1}
    finally:
        log.removeHandler(mine)


@pytest.mark.slow
def test_first_call_changes_nothing():
    """It imports packages that draw random numbers, and reads settings, for which Hydra chooses a version."""
    program = """
import random
import hydra
from zoo.recipes import UserError, train
before = random.getstate(), hydra.version.getbase()
try:
    train({"model": "none"})
except UserError as error:
    print(error, (random.getstate(), hydra.version.getbase()) == before)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert printed.startswith("there is no model 'none'")
    assert printed.endswith("True\n")


@pytest.mark.slow
def test_in_a_thread_and_one_at_a_time(tiny, weights, same):
    refused = []

    def evaluate_too():
        with pytest.raises(UserError) as raised:
            evaluate("run")
        refused.append(str(raised.value))

    def try_another(state):
        other = threading.Thread(target=evaluate_too)
        other.start()
        other.join()

    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(), hooks=Hooks(after_epoch=try_another))))
    thread.start()
    thread.join()
    assert "another thread of this process is training" in refused[0]
    train(tiny(run="here"))
    assert same(weights(results[0].folder), weights(Path("here")))


@pytest.mark.slow
def test_interrupt_saves_and_returns_control(tiny, weights, same):
    def interrupt(state):
        if state.update == 2:
            signal.raise_signal(signal.SIGINT)

    settings = {key: value for key, value in tiny().items() if key != "run"}
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(
        KeyboardInterrupt, match=r"after update 2, and saved. Continue with: zoo-train .* run="
    ) as raised:
        train({**settings, "data.num_workers": 1}, hooks=Hooks(after_update=interrupt))
    assert multiprocessing.active_children() == []  # while the traceback still exists, as in a notebook
    assert signal.getsignal(signal.SIGCHLD) == before  # torch's would raise errors in the program
    run = str(raised.value).rpartition("run=")[2]
    assert train({**settings, "run": run}).history[-1]["update"] == 3
    assert same(weights(Path(run)), weights(train(tiny(run="whole")).folder))


@pytest.mark.slow
def test_interrupt_at_the_end_is_not_lost(tiny):
    """A program may go on with another training."""

    def interrupt(state):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        KeyboardInterrupt, match=r"^Stopped by SIGINT after the end of run. Its files are all written.$"
    ):
        train(tiny(), hooks=Hooks(after_epoch=interrupt))
    assert train(tiny()).history[-1]["update"] == 3
    assert "This run is finished" in Path("run/train.log").read_text()


def test_folder_of_a_run_that_fails_is_removed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        train({"model": "test_vit", "data": "imagefolder", "data.root": "empty", "trainer.device": "cpu"})
    assert list(Path("runs").iterdir()) == []


# Hooks.


@pytest.mark.slow
def test_hooks_see_the_training_and_do_not_change_it(tiny, weights, same):
    seen = []

    def note(name):
        def hook(state):
            seen.append((name, state.epoch, state.update, state.updates, dict(state.metrics)))
            state.model.eval()
            torch.rand(3), random.random()
            if name == "epoch":
                inner = evaluate(state.folder, {"out": "inner", "trainer.device": "cpu"})
                assert inner.metrics["loss"] == state.metrics["val_loss"]

        return hook

    result = train(tiny(**{"trainer.epochs": 2}), hooks=Hooks(*map(note, ("update", "evaluation", "epoch"))))
    epoch = ["update"] * 3 + ["evaluation", "epoch"]
    assert [entry[0] for entry in seen] == epoch * 2
    assert [entry[2] for entry in seen if entry[0] == "update"] == [1, 2, 3, 4, 5, 6]
    assert [entry[1] for entry in seen if entry[0] == "epoch"] == [1, 2]
    assert {entry[3] for entry in seen} == {6}
    losses = [entry[4]["loss"] for entry in seen if entry[0] == "update"]
    assert np.mean(losses[:3]) == pytest.approx(result.history[0]["train_loss"])
    assert [entry[4]["val_loss"] for entry in seen if entry[0] == "evaluation"] == [
        record["val_loss"] for record in result.history
    ]
    assert same(weights(result.folder), weights(train(tiny(run="plain", **{"trainer.epochs": 2})).folder))


@pytest.mark.slow
def test_hook_stops_the_training(tiny, weights, same):
    settings = tiny(**{"trainer.epochs": 3, "trainer.eval_every": 3})
    stopped = train(settings, hooks=Hooks(after_epoch=lambda state: state.stop() if state.epoch == 2 else None))
    assert stopped.stopped_early == "Stopped by a hook, after update 6."
    assert ["val_top1" in record for record in stopped.history] == [False, True]
    assert stopped.metrics["top1"] == stopped.history[-1]["val_top1"]

    cut = train({**settings, "run": "cut"}, hooks=Hooks(after_update=lambda state: state.stop()))
    assert (cut.history[-1]["update"], cut.history[-1]["epoch"]) == (1, 1)

    whole = train({**settings, "run": "whole"})
    for folder in (stopped.folder, cut.folder):
        result = train({**settings, "run": folder})
        assert result.stopped_early is None
        assert same(weights(folder), weights(whole.folder))


@pytest.mark.slow
def test_error_in_a_hook_is_raised_and_the_run_saved(tiny):
    def fail(state):
        try:
            {}["mine"]
        except KeyError:
            mine = "my disk"
            raise OSError(mine)  # noqa: B904

    with pytest.raises(OSError, match=r"^my disk$") as raised:
        train(tiny(**{"data.num_workers": 1}), hooks=Hooks(after_update=fail))
    assert isinstance(raised.value.__context__, KeyError)  # the program's own, as a traceback shows it
    assert raised.traceback[-1].frame.f_locals["mine"] == "my disk"  # for its debugger
    assert multiprocessing.active_children() == []
    assert train(tiny()).history[-1]["update"] == 3
    assert "Continues in epoch 1 after update 1." in Path("run/train.log").read_text()


# Images.


@pytest.mark.parametrize(
    ("item", "size", "mode"),
    [
        (np.zeros((4, 6), np.uint8), (6, 4), "L"),
        (np.zeros((4, 6, 1), np.uint8), (6, 4), "L"),
        (np.zeros((4, 6, 4), np.float16), (6, 4), "RGBA"),
        (torch.zeros(3, 4, 6), (6, 4), "RGB"),
        (torch.zeros(4, 6, dtype=torch.uint8), (6, 4), "L"),
        (torch.zeros(1, 4, 6, dtype=torch.bfloat16, requires_grad=True), (6, 4), "L"),
    ],
)
def test_arrays_and_tensors(item, size, mode):
    image = as_image(item, "image 0")
    assert (image.size, image.mode) == (size, mode)


def test_floats_are_rounded_to_8_bits():
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(as_image(numbers / np.float32(255), "image 0"), numbers)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            np.zeros((3, 8, 9), np.uint8),
            r"image 2 has the shape \(3, 8, 9\): arrays are \(H, W\) or \(H, W, channels\)",
        ),
        (torch.zeros(8, 9, 3), r"image 2 has the shape \(8, 9, 3\): .* tensors \(H, W\) or \(channels, H, W\)"),
        (torch.zeros(2, 3, 8, 9), "give a batch as a list of images"),
        (np.zeros((0, 3)), r"image 2 has the shape \(0, 3\)"),
        (np.full((2, 2), 255.0), "image 2 has numbers from 255 to 255: they hold uint8 from 0 to 255, or floats"),
        (np.full((2, 2), np.nan), "image 2 has numbers from nan to nan"),
        (np.zeros((2, 2), np.int64), "image 2 is of int64"),
        (7, "image 2 is of type int: it has to be a path, Pillow's image, an array or a tensor"),
    ],
)
def test_what_is_no_image(item, message):
    with pytest.raises(UserError, match=message):
        as_image(item, "image 2")


@pytest.mark.slow
def test_one_image_in_any_form(finished, images):
    file = next((images / "val").rglob("*.jpg"))
    image = Image.open(file)
    pixels = np.array(image)
    forms = [file, str(file), image, pixels, torch.as_tensor(pixels).permute(2, 0, 1)]
    found = predict(finished, forms, {"device": "cpu"})
    assert [item.source for item in found] == [file, file, 2, 3, 4]
    assert {item.size for item in found} == {pixels.shape[:2]}
    [alone] = predict(finished, image, {"device": "cpu"})
    for item in found:
        assert item.scores.dtype == np.float32
        assert item.scores == pytest.approx(alone.scores, abs=1e-6)
        assert item.classes == alone.classes


@pytest.mark.slow
def test_unreadable_images(finished, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    good = np.zeros((9, 9), np.uint8)
    with pytest.raises(UserError, match=r"^a.jpg: it can't be read as an image .* skip_unreadable=True"):
        predict(finished, ["a.jpg", good], {"device": "cpu"})
    [found] = predict(finished, ["a.jpg", good], {"device": "cpu"}, skip_unreadable=True)
    assert found.source == 1
    with pytest.raises(UserError, match=r"b\.jpg does not exist"):
        predict(finished, ["b.jpg"])
