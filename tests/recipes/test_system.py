"""Limits of open files and memory, and dead processes: one sentence each. A second; slow ones 1 min."""

import errno
import multiprocessing
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from zoo.messages import UserError
from zoo.recipes import cli, distributed, logs
from zoo.recipes.classify import train
from zoo.recipes.errors import of_the_system

ERRORS = {
    "files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many files are open"),
    "files in a library": (
        ImportError("libx.so: cannot open shared object file: Too many open files"),
        "too many files",
    ),
    "descriptors from a worker": (RuntimeError("received 0 items of ancdata"), "too many files are open"),
    "memory": (MemoryError(), "too little memory"),
    "memory of a tensor": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "too little memory"),
    "memory for a process": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "too little memory"),
    "threads": (RuntimeError("can't start new thread"), "no more processes or threads"),
    "worker": (
        RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed."),
        "process that loads images died",
    ),
}


@pytest.mark.parametrize(("error", "text"), ERRORS.values(), ids=ERRORS)
def test_command_ends_with_a_sentence(capsys, error, text):
    logs.start_log(None, primary=True)
    with pytest.raises(SystemExit, match="1"), cli.friendly_errors("zoo-eval"):
        raise error
    assert text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("error", "text"), [ERRORS[name] for name in ("files in a library", "memory", "worker")])
def test_training_names_what_is_left(fit, images, tmp_path, monkeypatch, error, text):
    update = train.ClassifyRun._update

    def fail(self, batches):
        if self.progress["update"] == 2:
            raise error
        update(self, batches)

    monkeypatch.setattr(train.ClassifyRun, "_update", fail)
    expected = rf"{text}.* The last good checkpoint is .*last\.pt\. The same command continues"
    with pytest.raises(UserError, match=expected):
        fit(tmp_path, images, "trainer.save_minutes=0")


def test_cause_of_another_error_counts(capsys):
    error = RuntimeError("something else")
    error.__cause__ = OSError(errno.EMFILE, "")
    assert "too many files" in of_the_system(error)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "input/output error"), ImportError("x")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)), cli.friendly_errors("zoo-train"):
        raise error


def test_lost_connection_to_a_worker_is_a_dead_worker():
    ours, theirs = multiprocessing.Pipe()
    ours.send("unread")
    theirs.close()  # with unread data, as of a killed process
    with pytest.raises(ConnectionResetError) as error:
        ours.recv()
    assert "a process that loads images died" in of_the_system(error.value)
    assert of_the_system(ConnectionResetError("of a download")) is None


def test_error_that_is_its_own_cause_ends():
    error = RuntimeError("a bug")
    error.__cause__ = error
    assert of_the_system(error) is None


@pytest.mark.slow
def test_other_errors_of_a_training_stay_as_they_are(fit, images, tmp_path, monkeypatch):
    monkeypatch.setattr(train.ClassifyRun, "_update", _bug)
    with pytest.raises(ValueError, match=r"^a bug$"):
        fit(tmp_path, images)


def _bug(*_):
    raise ValueError("a bug")


def test_sentence_is_said_without_memory_for_a_log(capfd, monkeypatch):
    logs.start_log(None, primary=True)
    monkeypatch.setattr("logging.Logger.log", _no_memory)
    with pytest.raises(SystemExit, match="1"), cli.friendly_errors("zoo-train"):
        raise UserError("mend that")
    assert capfd.readouterr().err == "zoo-train: error: mend that\n"


def _no_memory(*_):
    raise MemoryError


@pytest.fixture
def limits(monkeypatch):
    """Fake limits of open files; returns the limits that are set."""
    done = []

    def pretend(*limits):
        monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, new: done.append(new))
        return done

    return pretend


def test_few_files_for_workers_are_refused(limits):
    limits(32, 32)
    with pytest.raises(UserError, match=r"only 32 files .* 8 processes .* need 136: .* set data.num_workers=0"):
        distributed.check_open_files(8)


def test_few_files_do_without_workers(limits):
    limits(16, 16)
    assert distributed.check_open_files(0) == 0


def test_limit_of_files_is_raised_where_that_is_allowed(limits):
    done = limits(32, 4096)
    assert distributed.check_open_files(2) == 2
    assert done == [(64, 4096)]


def test_enough_files_are_left_as_they_are(limits):
    done = limits(1024, 4096)
    distributed.check_open_files(8)
    assert done == []


def test_cores_are_counted_where_the_system_tells_no_share(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert distributed.cores() == os.cpu_count()


def _kill_a_worker(process):
    """Kill a worker that loads images as soon as one exists."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with suppress(FileNotFoundError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "pt_data_worker":
                    os.kill(int(child), signal.SIGKILL)
                    return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("no worker")


TASKS = {
    "classify": ("model=test_vit", "data=imagefolder", "data.root={images}", "data.img_size=32"),
    "segment": ("task=segment", "data.root={scenes}", "dense.digits_first=false", "trainer.batch_size=2"),
}


@pytest.mark.long
@pytest.mark.parametrize("words", TASKS.values(), ids=TASKS)
def test_training_whose_worker_is_killed_ends_with_a_sentence(start_cli, images, digit_scenes, tmp_path, words):
    words = [word.format(images=images, scenes=digit_scenes) for word in words]
    more = ("trainer.epochs=1000", "data.num_workers=1", "log.wandb=disabled", "trainer.device=cpu", "run=run")
    process = start_cli(*words, *more, cwd=tmp_path)
    try:
        _kill_a_worker(process)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "a process that loads images died" in output
    assert "The same command continues" in output
    assert "Traceback" not in output
