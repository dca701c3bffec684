"""`log.csv` and `log.tensorboard`: each epoch once, also after a run is resumed. Half a minute."""

import csv
import json

import pytest

from zoo import extras
from zoo.recipes import early
from zoo.recipes.records import TensorBoard
from zoo.recipes.run_folder import write_table

LOGGERS = ("log.csv=true", "log.tensorboard=true")


def scalars(folder):
    """By tag, [step, value] of each point that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_resumed_run_goes_on_in_both(fit, images, tmp_path):
    """The second part turns on the evaluation of every second epoch, so that a row lacks its scores."""
    folder = tmp_path / "run"
    fit(folder, images, *LOGGERS, "trainer.epochs=2")
    assert len(table(folder)) == 2
    fit(folder, images, *LOGGERS, "trainer.epochs=4", "trainer.eval_every=2")
    history, rows, points = records(folder), table(folder), scalars(folder)
    assert [int(row["update"]) for row in rows] == [record["update"] for record in history] == [3, 6, 9, 12]
    assert [row["val_top1"] == "" for row in rows] == [False, False, True, False]
    assert [float(row["train_loss"]) for row in rows] == [record["train_loss"] for record in history]
    assert float(rows[0]["step_seconds.forward"]) == history[0]["step_seconds"]["forward"]
    assert points["train/loss"] == [(r["update"], pytest.approx(r["train_loss"])) for r in history]
    assert [step for step, _ in points["val/top1"]] == [3, 6, 12]
    assert points["run/lr"] == [(r["update"], pytest.approx(r["lr"])) for r in history]


@pytest.mark.slow
def test_segmentor_has_them_too(fit_dense, tmp_path):
    folder = tmp_path / "run"
    fit_dense(folder, *LOGGERS, task="segment")
    [record], [row] = records(folder), table(folder)
    assert float(row["val_mIoU"]) == record["val_mIoU"]
    assert scalars(folder)["val/mIoU"] == [(2, pytest.approx(record["val_mIoU"]))]


def test_what_was_logged_but_not_saved_is_replaced_and_the_reverse_is_added(tmp_path):
    first = {"epoch": 1, "update": 3, "train_loss": 3.0, "val_top1": None}
    log = TensorBoard(tmp_path, [])
    log.log({**first, "update": 5, "train_loss": 9.0})
    log.close()
    log = TensorBoard(tmp_path, [first])
    log.log({**first, "update": 5, "train_loss": 2.0})
    log.log({**first, "update": 5, "train_loss": 2.0, "val_top1": 50.0})  # the evaluation of the same update
    log.close()
    points = scalars(tmp_path)
    assert points["train/loss"] == [(3, 3.0), (5, 2.0)]
    assert points["val/top1"] == [(5, 50.0)]
    assert points["run/epoch"] == [(3, 1.0), (5, 1.0)]


def test_table_of_records_with_other_names(tmp_path):
    write_table(tmp_path, [{"epoch": 1, "a": None, "b": {"c": 2}}, {"epoch": 2, "d": float("nan"), "e": "x,y"}])
    assert (tmp_path / "metrics.csv").read_text() == 'epoch,a,b.c,d,e\n1,,2,,\n2,,,,"x,y"\n'


def test_package_that_is_missing_is_said_before_training(compose, monkeypatch):
    monkeypatch.setitem(extras.MODULES, "tensorboard", ("tensorboard_that_is_missing",))
    with pytest.raises(extras.MissingExtra, match=r"^log.tensorboard=true needs .*: run pip install .*\[tensorboard\]"):
        early.check(compose("log.tensorboard=true"))
    early.check(compose("log.csv=true"))
