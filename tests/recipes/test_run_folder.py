"""Run folders: logs, names, curves, metrics, wandb. A few seconds; wandb 30 s."""

import json
import logging

import pytest
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import composition, logs, plots, reading, records, run_folder


@pytest.fixture(autouse=True)
def _close_logs():
    yield
    for handler in logs.log.handlers[:]:
        logs.log.removeHandler(handler)
        handler.close()


def _record(epoch, **more):
    return {"epoch": epoch, "train_loss": 1 / epoch, "train_top1": 10.0 * epoch, "lr": 1e-3, **more}


def test_log_is_printed_and_written(tmp_path, capsys):
    logs.start_log(tmp_path, primary=True)
    logs.log.info("50 %% of [red] and %s", "x" * 200)
    expected = "50 % of [red] and " + "x" * 200
    assert capsys.readouterr().out == expected + "\n"
    assert (tmp_path / "train.log").read_text().endswith(expected + "\n")


def test_log_started_twice_prints_once(tmp_path, capsys):
    logs.start_log(None, primary=True)
    logs.start_log(tmp_path, primary=True)
    logs.log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_log_of_a_continued_run_is_appended(tmp_path):
    for word in ("first", "second"):
        logs.start_log(tmp_path, primary=True)
        logs.log.info(word)
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, False), (logging.WARNING, True)])
def test_other_processes_print_warnings_only(capsys, level, shown):
    logs.start_log(None, primary=False)
    logs.log.log(level, "text")
    assert ("text" in capsys.readouterr().out) == shown


def test_errors_go_to_stderr(capsys):
    logs.start_log(None, primary=True)
    logs.log.error("text")
    assert capsys.readouterr() == ("", "text\n")


@pytest.mark.parametrize("name", ["van_b0", "local-dir:/tmp/x", "hf-hub:timm/vit.in1k", "../../etc", "a b"])
def test_default_folder_is_one_folder_below_runs(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    folder = run_folder.default_folder("", name)
    assert folder.parent.name == "runs"
    assert folder.name.startswith("20")


def test_default_folder_is_new(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    first, second = (run_folder.default_folder("", "van_b0") for _ in range(2))
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_make_folder_leaves_it_empty(tmp_path):
    run_folder.make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_make_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"choose another with out=<folder>"):
        run_folder.make_folder(tmp_path / "file" / "b", "out")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/x/bin/zoo-train", "seed=1"], "zoo-train seed=1"),
        (["/x/recipes/train.py", "run=a b"], "python -m zoo.recipes.train 'run=a b'"),
        (["/x/recipes/eval.py", "runs/a"], "python -m zoo.recipes.eval runs/a"),
        (["zoo-train", "model_kwargs={a: 1}"], "zoo-train 'model_kwargs={a: 1}'"),
    ],
)
def test_command_can_be_typed(monkeypatch, argv, expected):
    monkeypatch.setattr("sys.argv", argv)
    assert composition.command_line() == expected


def test_metrics_are_written_anew(tmp_path):
    run_folder.write_metrics(tmp_path, [_record(1), _record(2)])
    run_folder.write_metrics(tmp_path, [_record(1)])
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "history",
    [
        [_record(1)],
        [_record(1, val_loss=1.0, val_top1=50.0), _record(2), _record(3, val_loss=0.5, val_top1=60.0)],
        [{**_record(1), "train_top1": None}],
        [_record(1, val_loss=float("nan"), val_top1=0.0)],
        [_record(epoch, val_loss=1.0, val_top1=50.0) for epoch in range(1, 301)],
    ],
    ids=["one epoch", "some evaluated", "mixed", "nan", "300 epochs"],
)
def test_curves(tmp_path, history):
    plots.plot_curves(tmp_path / "curves.png", history, "title", {"top1": "top-1"})
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1440, 456)


def test_config_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        reading.load_config(tmp_path)


@pytest.mark.slow
def test_config_survives_a_round_trip(compose, tmp_path):
    cfg = compose("optim.lr=3e-4", "augment=strong")
    run_folder.save_config(tmp_path, cfg)
    assert reading.load_config(tmp_path) == cfg


@pytest.mark.slow
def test_wandb_disabled_is_none(compose, tmp_path):
    assert records.start_wandb(tmp_path, compose(), None) is None


@pytest.fixture(scope="module")
def recorded(fit, images, tmp_path_factory):
    """A run that wandb records offline, stopped and continued: folder, and its id after each part."""
    import torch

    folder, ids = tmp_path_factory.mktemp("recorded") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        for updates in ("3", "null"):
            words = ("log.wandb=offline", "trainer.epochs=2", f"trainer.max_updates={updates}")
            fit(folder, images, *words, pictures=True)
            ids.append(torch.load(folder / "last.pt", weights_only=True)["wandb"])
    return folder, ids


@pytest.mark.slow
def test_wandb_writes_into_the_run_folder(recorded):
    folder, ids = recorded
    assert list((folder / "wandb").glob(f"offline-run-*-{ids[0]}"))


@pytest.mark.slow
def test_wandb_id_is_kept(recorded):
    _, ids = recorded
    assert ids[0] is not None
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_wandb_keeps_the_predictions(recorded):
    folder, _ = recorded
    assert list((folder / "wandb").rglob("media/images/predictions*.png"))
