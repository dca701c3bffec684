"""Locks: one writer at a time for a folder. A few seconds."""

import json
import os
import subprocess
import sys
import time

import pytest

from zoo.messages import UserError
from zoo.recipes import atomic_files, lock, run_folder
from zoo.recipes.lock import Lock


@pytest.fixture
def other(tmp_path):
    """Write the lock file of another owner: its machine, process, and the seconds since its last touch."""

    def write(machine="elsewhere", pid=7, started="1", age=0.0):
        path = tmp_path / lock.NAME
        owner = {"host": "node", "machine": machine, "pid": pid, "started": started, "command": "zoo-train seed=1"}
        path.write_text(json.dumps(owner))
        os.utime(path, (time.time() - age,) * 2)
        return path

    return write


@pytest.fixture
def living():
    """An idle process on this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_folder_is_as_before_when_it_is_given_back(tmp_path):
    held = Lock(tmp_path)
    held.acquire()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_living_owner_is_named(tmp_path, other, living):
    other(Lock(tmp_path).owner["machine"], living.pid, lock._started(living.pid))
    with pytest.raises(UserError, match=rf"in use by process {living.pid} on node \(zoo-train seed=1, last active"):
        Lock(tmp_path).acquire()


@pytest.mark.parametrize("key", ["run", "out"])
def test_refusal_says_how_to_go_on(tmp_path, other, living, key):
    other(Lock(tmp_path).owner["machine"], living.pid, lock._started(living.pid))
    with pytest.raises(UserError, match=rf"choose another folder with {key}=<folder>; if it is dead, delete .*\.lock"):
        Lock(tmp_path, key).acquire()


def test_owner_that_ended_is_followed_at_once(tmp_path, other, living):
    other(Lock(tmp_path).owner["machine"], living.pid, lock._started(living.pid))
    living.kill()
    os.waitid(os.P_PID, living.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    Lock(tmp_path).acquire()


def test_number_of_a_dead_owner_may_be_another_process_now(tmp_path, other, living):
    other(Lock(tmp_path).owner["machine"], living.pid, "1")
    Lock(tmp_path).acquire()


def test_owner_elsewhere_that_gives_signs_of_life_is_named(tmp_path, other, monkeypatch):
    path = other()
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(path, (1, time.time() + 9)))
    with pytest.raises(UserError, match="in use by process 7 on node"):
        Lock(tmp_path).acquire()


def test_silent_owner_elsewhere_is_followed(tmp_path, other, monkeypatch):
    other()
    monkeypatch.setattr(lock, "SILENCE", 0.1)
    Lock(tmp_path).acquire()


def test_owner_elsewhere_that_ends_meanwhile_is_followed(tmp_path, other, monkeypatch):
    path = other()
    monkeypatch.setattr(time, "sleep", lambda _: path.unlink(missing_ok=True))
    Lock(tmp_path).acquire()


def test_owner_elsewhere_of_long_ago_is_followed_at_once(tmp_path, other, monkeypatch):
    other(age=7200)
    monkeypatch.delattr(time, "sleep")
    Lock(tmp_path).acquire()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', "null"])
def test_file_that_names_no_owner_is_followed(tmp_path, text, monkeypatch):
    (tmp_path / lock.NAME).write_text(text)
    monkeypatch.setattr(lock, "_WRITING", 0.1)
    Lock(tmp_path).acquire()


def test_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    Lock(tmp_path).acquire()
    path = tmp_path / lock.NAME
    os.utime(path, (1, 1))
    end = time.monotonic() + 60
    while path.stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1


def test_owner_that_was_followed_writes_no_more(tmp_path, other):
    held = Lock(tmp_path)
    held.acquire()
    other()
    with pytest.raises(UserError, match="has taken over the folder"):
        held.check()


def test_owner_that_was_followed_leaves_the_other_lock(tmp_path, other):
    held = Lock(tmp_path)
    held.acquire()
    path = other()
    held.release()
    assert path.exists()


def test_what_a_dead_process_was_writing_is_removed(tmp_path, living):
    draft = lock.temporary(tmp_path / "last.pt")
    theirs = draft.with_name(draft.name.replace(str(os.getpid()), str(living.pid)))
    theirs.touch()
    living.kill()
    living.wait()
    Lock(tmp_path).acquire()
    assert not theirs.exists()


def test_what_a_living_process_is_writing_stays(tmp_path, living):
    draft = lock.temporary(tmp_path / "report.html")
    theirs = draft.with_name(draft.name.replace(str(os.getpid()), str(living.pid)))
    theirs.touch()
    Lock(tmp_path).acquire()
    assert theirs.exists()


def test_what_a_dead_owner_elsewhere_was_writing_is_removed(tmp_path, other, monkeypatch):
    other()
    monkeypatch.setattr(lock, "SILENCE", 0.1)
    (tmp_path / f".last.pt.{lock._short('elsewhere')}-7.tmp").touch()
    Lock(tmp_path).acquire()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_writers_of_one_file_have_drafts_of_their_own(tmp_path, monkeypatch):
    first = lock.temporary(tmp_path / "last.pt")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert lock.temporary(tmp_path / "last.pt") != first


@pytest.mark.parametrize("name", ["x" * 250, "字" * 80])
def test_draft_of_a_long_name_can_be_written(tmp_path, name):
    atomic_files.write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"


# A run's folder.


def test_new_folder_that_nothing_was_written_to_goes_again(tmp_path):
    with run_folder.locked_folder(tmp_path / "run") as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_folder_that_was_there_stays(tmp_path):
    with run_folder.locked_folder(tmp_path):
        pass
    assert tmp_path.is_dir()


@pytest.mark.slow
def test_training_refuses_a_folder_in_use(fit, images, tmp_path, other, living):
    other(Lock(tmp_path).owner["machine"], living.pid, lock._started(living.pid))
    with pytest.raises(UserError, match="is in use by process"):
        fit(tmp_path, images)


@pytest.mark.slow
def test_training_ends_when_another_process_took_its_folder_over(fit, images, tmp_path, other, monkeypatch):
    monkeypatch.setattr(run_folder, "save_config", lambda *_: other())
    with pytest.raises(UserError, match="has taken over the folder"):
        fit(tmp_path, images)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.long
def test_training_that_was_killed_is_continued_at_once(start_cli, run_cli, images, tmp_path):
    words = ("model=test_vit", "data=imagefolder", f"data.root={images}", "data.img_size=32", "data.num_workers=2")
    words += ("trainer.batch_size=8", "log.wandb=disabled", "trainer.device=cpu", "run=run")
    process = start_cli(*words, "trainer.epochs=1000", cwd=tmp_path)
    try:
        while not (tmp_path / "run" / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        code, output = run_cli(*words, cwd=tmp_path)
        assert code == 1
        assert f"run is in use by process {process.pid} on" in output
        assert "Traceback" not in output
    finally:
        process.kill()
        process.wait()
    code, output = run_cli(*words, "trainer.epochs=1", "resume=must", cwd=tmp_path)
    assert code == 0, output
    assert not list((tmp_path / "run").glob(".*"))
