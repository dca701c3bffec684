"""A run that dies at any file operation is resumed to the same files as an undisturbed run. 5 s, slow 1 min."""

import builtins
import io
import json
import os
import random
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.recipes import lock, report, run_folder
from zoo.recipes.classify import train

ARGS = ("trainer.epochs=2", "optim.lr=3e-3")
CLOCK = ("seconds", "images_per_second", "step_seconds")
SAME = ("config.json", "classes.json", "curves.png", "predictions.png")


class _Killed(BaseException):
    """Nothing in a run catches it."""


def _left(folder):
    """The files of a run, without values that depend on the clock; of a report, only that it exists."""
    names = sorted(path.name for path in folder.iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    figures = {key: summary[key] for key in ("metrics", "best", "updates", "epochs", "classes", "skipped_updates")}
    weights = {
        f"{name}, {key}": value.tolist()
        for name in ("best.safetensors", "model.safetensors")
        for key, value in load_file(folder / name).items()
    }
    files = {name: (folder / name).read_bytes() for name in SAME if name in names}
    return {"names": names, "metrics": metrics, "summary": figures, **weights, **files}


@pytest.fixture(scope="module")
def undisturbed(fit, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(folder, images, *ARGS, pictures=True)
    return _left(folder)


# After the last checkpoint. (Without pictures, which the undisturbed run has.)
AFTER = {
    "curves": (train.ClassifyRun, "write_history"),
    "metrics": (run_folder, "write_metrics"),
    "weights": (train.ClassifyRun, "finish"),
    "description": (train.ClassifyRun, "_describe"),
    "summary": (train.ClassifyRun, "write_summary"),
    "report": (report, "write_or_warn"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name"), AFTER.values(), ids=AFTER)
def test_killed_after_the_last_checkpoint(fit, images, tmp_path, monkeypatch, undisturbed, owner, name):
    original, folder = getattr(owner, name), tmp_path / "run"

    def killed(*args, **kwargs):
        if torch.load(folder / "last.pt", weights_only=True)["progress"]["finished"]:
            raise _Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(_Killed):
            fit(folder, images, *ARGS)
    fit(folder, images, *ARGS)
    drawn = ("curves.png", "predictions.png")
    expected = {key: value for key, value in undisturbed.items() if key not in drawn}
    assert _left(folder) == expected | {"names": [name for name in undisturbed["names"] if name not in drawn]}


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"updates": 6, "metrics": 1}'])
@pytest.mark.parametrize("name", ["summary.json"])
def test_damaged_summary_is_written_again(fit, images, finished, tmp_path, copy, summary, name, content):
    folder = copy(finished, tmp_path / "run")
    (folder / name).write_text(content)
    fit(folder, images, "trainer.epochs=3", "optim.lr=3e-3")
    assert summary(folder)["metrics"] == summary(finished)["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "start.json", "metrics.jsonl", "model.safetensors", "report.html"])
def test_missing_file_is_written_again(fit, images, finished, tmp_path, copy, name):
    folder = copy(finished, tmp_path / "run")
    (folder / name).unlink()
    fit(folder, images, "trainer.epochs=3", "optim.lr=3e-3")
    assert (folder / name).exists()


@pytest.mark.slow
def test_longer_run_killed_after_its_last_checkpoint_has_not_the_shorter_one_s_summary(
    fit, images, finished, tmp_path, copy, monkeypatch
):
    folder = copy(finished, tmp_path / "run")
    args = ("trainer.epochs=4", "optim.lr=3e-3")
    with monkeypatch.context() as patch:
        patch.setattr(train.ClassifyRun, "finish", _raise)
        with pytest.raises(_Killed):
            fit(folder, images, *args)
    assert fit(folder, images, *args)["epochs"] == 4


def _raise(*_):
    raise _Killed


@pytest.fixture
def copy():
    def copied(source: Path, target: Path) -> Path:
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copied


# At any file operation, in a process of its own that ends there.

AT_ANY = "test_killed_at_any_file_operation"


def _count_operations(folder, die_at=0):
    """Count operations on files in `folder`, and end this process at number `die_at`; returns the count in a list."""
    done = [0]

    def counted(function):
        def call(path, *args, **kwargs):
            mode = args[0] if args else kwargs.get("mode", "r")
            reads = function in (open, io.open) and not set(str(mode)) & set("wax+")
            if str(path).startswith(str(folder)) and not reads:
                done[0] += 1
                if done[0] == die_at:
                    os._exit(9)
            return function(path, *args, **kwargs)

        return call

    for owner in (builtins, io):
        owner.open = counted(owner.open)
    for name in ("open", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "utime"):
        setattr(os, name, counted(getattr(os, name)))
    return done


def _in_a_fork(call):
    """Call a function in a process of its own; returns the exit code."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not forked
            os._exit(call() or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _train(fit, images, folder, die_at=0):
    done = _count_operations(folder, die_at)
    fit(folder, images, *ARGS, pictures=True)
    (folder.parent / "operations").write_text(str(done[0]))


@pytest.mark.long
def test_killed_at_any_file_operation(fit, images, tmp_path, monkeypatch):
    if "ZOO_ALONE" not in os.environ:  # autograd does not run in a fork of a process that compiled a model
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::{AT_ANY}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, capture_output=True, text=True, env={**environment, "ZOO_ALONE": "1"})
        assert done.returncode == 0, done.stdout
        return
    monkeypatch.setattr(lock, "_WRITING", 0.1)
    folder = tmp_path / "whole" / "run"
    folder.parent.mkdir()
    assert _in_a_fork(lambda: _train(fit, images, folder)) == 0
    undisturbed = _left(folder)
    operations = range(1, 1 + int((folder.parent / "operations").read_text()))
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    share = int(os.environ.get("ZOO_KILLS", "12"))
    wrong = {}
    for number in random.Random(seed).sample(operations, min(share, len(operations))):
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        assert _in_a_fork(lambda folder=folder, number=number: _train(fit, images, folder, number)) == 9
        assert _in_a_fork(lambda folder=folder: _train(fit, images, folder)) == 0
        left = _left(folder)
        wrong[number] = [name for name in left.keys() | undisturbed.keys() if left.get(name) != undisturbed.get(name)]
    assert {number: names for number, names in wrong.items() if names} == {}
