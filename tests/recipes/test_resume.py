"""Killed, stopped and resumed runs end like undisturbed ones: nothing is lost. 15 s; the slow ones 1 min."""

import errno
import json
import os
import random
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from zoo.messages import UserError
from zoo.recipes import atomic_files, run_checkpoints
from zoo.recipes.classify import train
from zoo.recipes.run_weights import load_weights

# All random parts at once, with a checkpoint at every update.
ARGS = (
    "model=test_vit",
    "+model_kwargs.drop_path_rate=0.2",
    "data=imagefolder",
    "data.img_size=32",
    "data.num_workers=1",
    "augment=strong",
    "augment.repeats=2",
    "optim.lr_factors={patch_embed:0.1}",
    "schedule.warmup_epochs=1",
    "trainer.device=cpu",
    "trainer.epochs=8",
    "trainer.batch_size=4",
    "trainer.effective_batch_size=8",
    "trainer.save_minutes=0",
    "trainer.ema_decay=0.9",
    "log.wandb=disabled",
)
UPDATES = 24


@pytest.fixture(scope="module")
def start(start_cli, images):
    """Start the command in a folder; the run is below it."""
    return lambda cwd: start_cli(*ARGS, f"data.root={images}", "run=run", cwd=cwd)


@pytest.fixture(scope="module")
def finish(train_here, images):
    """Run the command to its end in this process, in a folder."""
    return lambda cwd: train_here(cwd, *ARGS, f"data.root={images}", "run=run")


@pytest.fixture(scope="module")
def undisturbed(finish, tmp_path_factory):
    """The folder of an undisturbed run; read only."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    finish(cwd)
    return cwd / "run"


def _update(folder):
    """The update of last.pt; 0 if there is none."""
    path = folder / "last.pt"
    return torch.load(path, weights_only=True)["progress"]["update"] if path.exists() else 0


def _interrupt(process, folder, number, update):
    """Send a signal once last.pt has reached `update`; returns the output."""
    try:
        while _update(folder) < update:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    return output


def _state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def _trained(folder):
    """Model, average, optimizer and scaler of last.pt."""
    return _state(folder)["training"]


def _lines(folder):
    """The metrics without values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "step_seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.fixture(scope="module")
def killed(start, finish, tmp_path_factory):
    """The run folder of a run that was killed at two random moments and started again."""
    cwd = tmp_path_factory.mktemp("killed")
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    rng = random.Random(seed)
    for low, high in ((1, 8), (10, 19)):
        process = start(cwd)
        _interrupt(process, cwd / "run", signal.SIGKILL, rng.randint(low, high))
        assert process.returncode == -signal.SIGKILL
    assert _update(cwd / "run") < UPDATES
    finish(cwd)
    return cwd / "run"


@pytest.mark.long
def test_killed_run_ends_with_the_same_exported_weights(killed, undisturbed, weights, same):
    assert same(weights(killed), weights(undisturbed))


@pytest.mark.long
def test_killed_run_ends_with_the_same_state(killed, undisturbed, same):
    assert same(_trained(killed), _trained(undisturbed))


@pytest.mark.long
def test_killed_run_has_the_same_metrics(killed, undisturbed):
    assert _lines(killed) == _lines(undisturbed)


@pytest.mark.long
def test_killed_run_has_the_same_best_weights(killed, undisturbed, same):
    assert same(*(load_file(folder / "best.safetensors") for folder in (killed, undisturbed)))


@pytest.mark.long
def test_killed_run_says_where_it_continued(killed):
    assert len(re.findall(r"Continues in epoch \d+ after update \d+", (killed / "train.log").read_text())) == 2


@pytest.fixture(
    scope="module",
    params=[signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=lambda number: number.name,
)
def stopped(request, start, tmp_path_factory):
    """A run that was stopped by a signal and not started again: signal, exit code, output, folder."""
    cwd = tmp_path_factory.mktemp("stopped")
    process = start(cwd)
    output = _interrupt(process, cwd / "run", request.param, 5)
    return request.param, process.returncode, output, cwd / "run"


@pytest.mark.slow
def test_signal_gives_the_exit_code_of_the_signal(stopped):
    number, code, output, _ = stopped
    assert code == 128 + number, output


@pytest.mark.slow
def test_signal_is_answered_without_a_traceback(stopped):
    number, _, output, folder = stopped
    assert f"Stopped by {number.name} after update {_update(folder)}, and saved." in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_signal_says_how_to_continue(stopped):
    _, _, output, _ = stopped
    assert re.search(r"Continue with: python -m zoo.recipes.train .*run=run", output)


@pytest.mark.slow
def test_stopped_run_continues_to_the_same_state(stopped, finish, undisturbed, same):
    folder = stopped[-1]
    finish(folder.parent)
    assert same(_trained(folder), _trained(undisturbed))


# Resuming in this process.


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


LONGER = ("trainer.epochs=4", "optim.lr=3e-3")
AGAIN = ("trainer.epochs=3", "optim.lr=3e-3")


@pytest.mark.slow
def test_never_refuses_an_existing_run(fit, images, copied):
    with pytest.raises(UserError, match="already holds a run"):
        fit(copied, images, *AGAIN, "resume=never")


@pytest.mark.slow
def test_must_refuses_a_new_run(fit, images, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        fit(tmp_path / "run", images, "resume=must")


@pytest.mark.slow
def test_must_continues(fit, images, copied):
    assert fit(copied, images, *LONGER, "resume=must")["epochs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "model=test_vit2",
        "model=test_van",
        "trainer.batch_size=4",
        "trainer.ema_decay=0.9",
        "+model_kwargs.depth=3",
    ],
)
def test_other_settings_refuse_the_folder(fit, images, copied, override):
    with pytest.raises(UserError, match=r"holds a run with .* choose another run=<folder>"):
        fit(copied, images, *AGAIN, override)


@pytest.mark.slow
def test_other_classes_refuse_the_folder(fit, make_folder, copied, tmp_path):
    root = make_folder(tmp_path / "other", classes=("day", "night", "dusk"), per_class=9)
    with pytest.raises(UserError, match="holds a run with classes"):
        fit(copied, root, *AGAIN)


@pytest.mark.slow
def test_other_number_of_images_refuses_the_folder(fit, make_folder, copied, tmp_path):
    root = make_folder(tmp_path / "other", per_class=12)
    with pytest.raises(UserError, match="holds a run with training images"):
        fit(copied, root, *AGAIN)


@pytest.mark.slow
def test_refusing_leaves_the_folder_as_it_is(fit, images, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(UserError):
        fit(copied, images, *AGAIN, "model=test_vit2")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.slow
def test_folder_of_a_run_without_checkpoint_refuses_another_model(fit, images, copied):
    for name in ("last.pt", "previous.pt"):
        (copied / name).unlink()
    with pytest.raises(UserError, match="holds a run of test_vit"):
        fit(copied, images, *AGAIN, "model=test_vit2")


@pytest.mark.slow
def test_folder_of_a_run_without_checkpoint_begins_again(fit, images, copied, weights, finished, same):
    for name in ("last.pt", "previous.pt", "model.safetensors", "summary.json"):
        (copied / name).unlink()
    fit(copied, images, *AGAIN)
    assert same(weights(copied), weights(finished))


@pytest.mark.slow
def test_finished_run_returns_its_summary(fit, images, copied, summary):
    before, log = summary(copied), (copied / "train.log").read_text()
    assert fit(copied, images, *AGAIN) == before
    said = (copied / "train.log").read_text().removeprefix(log)
    assert "This run is finished: raise trainer.epochs to continue it, or choose another run=<folder>." in said
    assert "Continues" not in said


@pytest.mark.slow
def test_finished_run_changes_no_weights(fit, images, copied, finished):
    fit(copied, images, *AGAIN)
    assert all(
        (copied / name).read_bytes() == (finished / name).read_bytes() for name in ("last.pt", "model.safetensors")
    )


@pytest.mark.slow
def test_finished_run_without_its_export_writes_it_again(fit, images, copied, weights, finished, same):
    """Killed after the last checkpoint, before the summary."""
    for name in ("model.safetensors", "summary.json", "config.json"):
        (copied / name).unlink()
    fit(copied, images, *AGAIN)
    assert same(weights(copied), weights(finished))
    assert re.search(r"All \d+ updates are done: the last files are written\.\n", (copied / "train.log").read_text())


@pytest.mark.slow
def test_more_epochs_continue_a_finished_run(fit, images, copied):
    result = fit(copied, images, *LONGER)
    assert (result["epochs"], result["updates"]) == (4, 12)


@pytest.mark.slow
def test_more_epochs_have_one_line_each(fit, images, copied):
    fit(copied, images, *LONGER)
    assert [line["epoch"] for line in _lines(copied)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_changed_settings_are_said(fit, images, copied):
    fit(copied, images, *LONGER)
    assert "trainer.epochs=4 (was 3)" in (copied / "train.log").read_text()


@pytest.mark.slow
def test_a_run_from_before_published_figures_were_settings_continues(fit, images, copied):
    state = torch.load(copied / "last.pt", weights_only=True)
    del state["config"]["published"]
    torch.save(state, copied / "last.pt")
    lines = (copied / "config.yaml").read_text().split("published:")
    (copied / "config.yaml").write_text(lines[0])
    result = fit(copied, images, *LONGER)
    assert result["epochs"] == 4
    assert "published" not in (copied / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 3, 4], ids=lambda n: f"{n} of 6 updates")
def test_longer_run_equals_an_undisturbed_one(fit, images, tmp_path, updates, same):
    args = ("trainer.epochs=2", "augment=strong", "trainer.ema_decay=0.9")
    fit(tmp_path / "whole", images, *args)
    fit(tmp_path / "parts", images, *args, f"trainer.max_updates={updates}")
    fit(tmp_path / "parts", images, *args)
    assert same(_trained(tmp_path / "parts"), _trained(tmp_path / "whole"))
    assert _lines(tmp_path / "parts") == _lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_between_the_last_update_of_an_epoch_and_its_end(fit, images, tmp_path, monkeypatch, same, workers):
    args = ("trainer.epochs=3", "trainer.save_minutes=0", f"data.num_workers={workers}")
    fit(tmp_path / "whole", images, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train.ClassifyRun, "_close_epoch", _killed)
        with pytest.raises(SystemError):
            fit(tmp_path / "parts", images, *args)
    fit(tmp_path / "parts", images, *args)
    assert same(_trained(tmp_path / "parts"), _trained(tmp_path / "whole"))


def _killed(*_):
    raise SystemError


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 3], ids=["within an epoch", "at its end"])
def test_short_run_again_gives_the_same_summary(fit, images, tmp_path, updates):
    first, second = (
        fit(tmp_path / "run", images, "trainer.epochs=2", f"trainer.max_updates={updates}") for _ in range(2)
    )
    assert first["metrics"] == second["metrics"]


@pytest.mark.slow
def test_new_learning_rate_is_taken_over(fit, images, tmp_path):
    schedule = ("trainer.epochs=2", "schedule=constant")
    fit(tmp_path / "run", images, *schedule, "optim.lr=1e-3", "trainer.max_updates=3")
    fit(tmp_path / "run", images, *schedule, "optim.lr=5e-4")
    assert [line["lr"] for line in _lines(tmp_path / "run")] == [1e-3, 5e-4]


# Damaged checkpoints.


def _truncated(data):
    return data[: len(data) // 2]


def _without_end(data):
    return data[:-100]


def _empty(data):
    return b""


def _random(data):
    return random.Random(0).randbytes(len(data))


def _zeros(data):
    return bytes(len(data))


def _text(data):
    return b"<html>quota exceeded</html>"


DAMAGES = [_truncated, _without_end, _empty, _random, _zeros, _text]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.strip("_"))
def test_damaged_checkpoint_falls_back_to_the_one_before(fit, images, copied, weights, finished, same, damage):
    (copied / "last.pt").write_bytes(damage((copied / "last.pt").read_bytes()))
    fit(copied, images, *AGAIN)
    assert re.search(r"last\.pt .*previous\.pt, the checkpoint before it, is used", (copied / "train.log").read_text())
    assert same(weights(copied), weights(finished))


@pytest.mark.slow
def test_damaged_checkpoint_may_be_a_folder(fit, images, copied, weights, finished, same):
    (copied / "last.pt").unlink()
    (copied / "last.pt").mkdir()
    fit(copied, images, *AGAIN)
    assert same(weights(copied), weights(finished))


@pytest.mark.slow
def test_checkpoint_before_a_damaged_one_is_kept_until_the_next_is_whole(fit, images, copied, monkeypatch):
    (copied / "last.pt").write_bytes(b"")
    before = (copied / "previous.pt").read_bytes()
    monkeypatch.setattr(torch, "save", _killed)
    with pytest.raises(SystemError):
        fit(copied, images, *AGAIN)
    assert (copied / "previous.pt").read_bytes() == before


@pytest.mark.slow
def test_missing_checkpoint_falls_back_to_the_one_before(fit, images, copied):
    """Without hard links, a killed run may leave only previous.pt."""
    (copied / "last.pt").unlink()
    assert fit(copied, images, *AGAIN)["updates"] == 9


def test_zoo_eval_reads_the_checkpoint_before_a_damaged_one(copied, same):
    (copied / "model.safetensors").unlink()
    (copied / "last.pt").write_bytes(b"")
    weights, _, path = load_weights(copied, "last")
    assert path == copied / "previous.pt"
    assert same(weights, torch.load(path, weights_only=True)["training"]["model"])


def test_checkpoint_before_the_last_is_there_from_the_second_on(tmp_path):
    for update in (1, 2, 3):
        run_checkpoints.save_checkpoint(tmp_path / "last.pt", _checkpoint(update))
    names = ("previous.pt", "last.pt")
    assert [run_checkpoints.load_checkpoint(tmp_path / name)["progress"]["update"] for name in names] == [2, 3]


def test_checkpoints_are_kept_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refused)
    test_checkpoint_before_the_last_is_there_from_the_second_on(tmp_path)


def _refused(*_):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _checkpoint(update, **more):
    return {"progress": {"update": update}, "history": [], "best": {}, "identity": {}, "config": {}, **more}


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9], ids=lambda place: f"at {place:.0%}")
def test_one_flipped_bit_of_a_tensor_is_noticed(tmp_path, place):
    path = tmp_path / "last.pt"
    run_checkpoints.save_checkpoint(path, _checkpoint(1, weight=torch.zeros(50_000)))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="can't be read"):
        run_checkpoints.load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.strip("_"))
def test_damaged_checkpoints_are_named_and_nothing_overwritten(fit, images, copied, damage):
    for name in ("last.pt", "previous.pt"):
        (copied / name).write_bytes(damage((copied / name).read_bytes()))
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(UserError, match=re.escape(str(copied / "last.pt"))):
        fit(copied, images, *AGAIN)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


OTHERS = {"dict": {"weights": torch.zeros(1)}, "part": {"progress": {}}, "list": [1, 2], "tensor": torch.zeros(2)}


@pytest.mark.slow
@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_something_else(fit, images, copied, content):
    for name in ("last.pt", "previous.pt"):
        torch.save(content, copied / name)
    with pytest.raises(UserError, match="is not a checkpoint of zoo-train"):
        fit(copied, images, *AGAIN)


# Files.


def test_atomic_replaces(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_files.atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_atomic_shows_nothing_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_files.atomic(path) as file:
        file.write(b"new" * 10000)
        file.flush()
        assert path.read_bytes() == b"old"


def _write_half(path, error, cause=None):
    with atomic_files.atomic(path) as file:
        file.write(b"half")
        raise error from cause


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_keeps_the_old_content_on_an_exception(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error):
        _write_half(path, error)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_atomic_says_what_the_system_said(tmp_path):
    with pytest.raises(UserError, match=r"could not write .*none/file: No such file or directory"):
        atomic_files.write_text(tmp_path / "none" / "file", "text")


def test_atomic_recognises_a_full_disk_behind_another_error(tmp_path):
    cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        _write_half(tmp_path / "file", RuntimeError("unexpected pos 64 vs 0"), cause)


def test_checkpoint_survives_a_round_trip(tmp_path, same):
    state = _checkpoint(3, tensor=torch.arange(5), nested=[{"a": 1.5}, "text", None])
    run_checkpoints.save_checkpoint(tmp_path / "last.pt", state)
    assert same(run_checkpoints.load_checkpoint(tmp_path / "last.pt"), state)
