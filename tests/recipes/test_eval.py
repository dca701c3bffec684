"""zoo-eval: runs, models with weights, folders. 15 s; the slow ones 40 s."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import report
from zoo.recipes.classify import evaluate as module
from zoo.recipes.classify.accuracy import Evaluation, plot_confusion
from zoo.recipes.logs import log


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to write into."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def evaluate(compose):
    """Evaluate in this process like `zoo-eval` with these words."""

    def call(*words):
        keys = [word.partition("=")[0].lstrip("+") for word in words]
        return module.evaluate(compose(*words, name="eval"), keys, report.write_or_warn)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top1", "top5", "loss"])
def test_run_gives_the_figures_of_its_summary(evaluate, run, summary, name):
    assert evaluate(f"run={run}")["metrics"][name] == summary(run)["metrics"][name]


@pytest.mark.slow
def test_best_checkpoint_gives_the_best_figure(evaluate, run, summary):
    assert evaluate(f"run={run}", "checkpoint=best")["metrics"]["top1"] == summary(run)["best"]["top1"]


@pytest.mark.slow
def test_best_checkpoint_is_another_file(evaluate, run):
    assert evaluate(f"run={run}", "checkpoint=best")["weights"].endswith("best.safetensors")


@pytest.mark.slow
def test_unfinished_run_is_read_from_its_checkpoint(evaluate, run, summary):
    (run / "model.safetensors").unlink()
    result = evaluate(f"run={run}")
    assert result["weights"].endswith("last.pt")
    assert result["metrics"]["top1"] == summary(run)["metrics"]["top1"]


@pytest.mark.slow
def test_averaged_weights_are_read_from_a_checkpoint(evaluate, fit, images, tmp_path, summary):
    fit(tmp_path / "run", images, "trainer.ema_decay=0.9", "trainer.epochs=2")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert evaluate(f"run={tmp_path / 'run'}")["metrics"] == {**summary(tmp_path / "run")["metrics"], "images": 15}


@pytest.mark.slow
def test_run_that_went_on_after_its_export_is_read_from_its_checkpoint(evaluate, fit, images, run, spoiled_epoch):
    with pytest.raises(KeyboardInterrupt):
        fit(run, images, "trainer.epochs=6", "optim.lr=3e-3", "trainer.save_minutes=0")
    assert evaluate(f"run={run}")["weights"].endswith("last.pt")


@pytest.fixture
def spoiled_epoch(monkeypatch):
    """Stop a run in its second epoch from now."""
    from zoo.recipes.classify.train import ClassifyRun

    original, count = ClassifyRun._update, {"updates": 0}

    def update(self, batches):
        count["updates"] += 1
        if count["updates"] == 5:
            raise KeyboardInterrupt
        original(self, batches)

    monkeypatch.setattr(ClassifyRun, "_update", update)


@pytest.mark.slow
def test_files_that_are_written(evaluate, run):
    evaluate(f"run={run}")
    names = {"eval.json", "classes.json", "confusion.png", "reliability.png", "report.html"}
    assert {path.name for path in (run / "eval").iterdir()} == names


@pytest.mark.slow
def test_file_holds_what_was_returned(evaluate, run):
    result = evaluate(f"run={run}")
    assert json.loads((run / "eval" / "eval.json").read_text()) == result


@pytest.mark.slow
def test_output_folder(evaluate, run, tmp_path):
    evaluate(f"run={run}", f"out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "eval.json").exists()
    assert not (run / "eval").exists()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_said_where_it_tells_something(tmp_path, caplog, monkeypatch, classes):
    monkeypatch.setattr(log, "propagate", True)  # the run of another test has changed it
    names = [str(i) for i in range(classes)]
    figures = {"top1": 25.0, "top5": 100.0, "balanced_accuracy": 25.0, "loss": 1.0, "images": 4}
    result = Evaluation(figures, np.arange(4), np.zeros(4, int), [])
    with caplog.at_level("INFO"):
        summary = {"model": "m", "weights": "w", "metrics": result.metrics, "top1_interval": [4.56, 69.94]}
        module._report(tmp_path, summary, result, names, False)
    said = "top-1 25.00 % (95 % interval: 4.56 to 69.94 %)" + (", top-5 100.00 %" if classes == 6 else "")
    assert f"m (w): {said}, balanced accuracy 25.00 %, loss 1.0000 on 4 images" in caplog.text


@pytest.mark.slow
def test_confusion_is_a_picture(evaluate, run):
    evaluate(f"run={run}")
    with Image.open(run / "eval" / "confusion.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


@pytest.mark.slow
def test_other_images(evaluate, run, images):
    result = evaluate(f"run={run}", "data=imagefolder", f"data.root={images / 'train'}", "data.num_workers=0")
    assert result["metrics"]["images"] == 24


@pytest.mark.slow
def test_other_root_with_splits_means_its_validation_split(evaluate, run, images):
    assert evaluate(f"run={run}", f"data.root={images}")["metrics"]["images"] == 15


@pytest.mark.slow
def test_other_images_lacking_a_class(evaluate, run, make_folder, tmp_path):
    make_folder(tmp_path / "other", classes=("cherry", "banana"), per_class=3, seed=2)
    result = evaluate(f"run={run}", f"data.root={tmp_path / 'other'}")
    assert result["per_class"]["apple"] is None
    assert result["per_class"]["cherry"] == 100


@pytest.mark.slow
def test_other_images_with_an_unknown_class(evaluate, run, make_folder, tmp_path):
    make_folder(tmp_path / "other", classes=("apple", "plum"), per_class=3)
    with pytest.raises(UserError, match="training does not have, 'plum'"):
        evaluate(f"run={run}", f"data.root={tmp_path / 'other'}")


@pytest.mark.slow
def test_held_out_images_are_evaluated_again(evaluate, fit, make_folder, tmp_path, summary):
    root = make_folder(tmp_path / "all", per_class=20)
    fit(tmp_path / "run", root, "data.val_fraction=0.3", "seed=3")
    result = evaluate(f"run={tmp_path / 'run'}")
    assert result["metrics"] == {**summary(tmp_path / "run")["metrics"], "images": 18}


@pytest.mark.slow
def test_per_class_accuracies_average_to_the_whole(evaluate, run):
    result = evaluate(f"run={run}")
    assert np.mean(list(result["per_class"].values())) == pytest.approx(result["metrics"]["top1"])


@pytest.mark.slow
def test_per_class_is_printed(evaluate, run, capsys):
    evaluate(f"run={run}", "per_class=true")
    assert re.search(r"cherry +│ +5 +│ +\d+\.\d\d %", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "folder"])
def test_model_with_weights_on_a_folder(evaluate, finished, images, summary, tmp_path, what):
    path = finished / "model.safetensors" if what == "file" else finished
    words = ("model=test_vit", "data=imagefolder", f"data.root={images}", "data.img_size=32", f"out={tmp_path / 'out'}")
    result = evaluate(f"pretrained={path}", *words, "data.num_workers=0")
    assert result["metrics"]["top1"] == summary(finished)["metrics"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_does_not_matter(evaluate, run, summary, size):
    assert evaluate(f"run={run}", f"trainer.batch_size={size}")["metrics"]["top1"] == summary(run)["metrics"]["top1"]


@pytest.mark.slow
def test_corrupt_image_does_not_count_and_is_named(evaluate, run, make_folder, tmp_path):
    root = make_folder(tmp_path / "other", per_class=3)
    path = next(iter(sorted(root.rglob("*.jpg"))))
    path.write_bytes(path.read_bytes()[:200])
    result = evaluate(f"run={run}", f"data.root={root}")
    assert result["metrics"]["images"] == 8
    assert result["corrupt_images"][0].startswith(str(path))


@pytest.mark.slow
def test_run_with_keywords_of_its_model(command, fit, images, tmp_path, summary):
    fit(tmp_path / "run", images, "+model_kwargs.drop_path_rate=0.1")
    code, output = command("eval", tmp_path / "run")
    assert code == 0, output
    assert f"top-1 {summary(tmp_path / 'run')['metrics']['top1']:.2f} %" in output


# Errors.


@pytest.mark.slow
def test_nothing_to_evaluate(evaluate):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate()


@pytest.mark.slow
def test_missing_run(evaluate, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        evaluate(f"run={tmp_path / 'none'}")


@pytest.mark.slow
def test_folder_that_is_no_run(evaluate, images):
    with pytest.raises(UserError, match="is not the folder of a run"):
        evaluate(f"run={images}")


@pytest.mark.slow
def test_run_without_weights(evaluate, run):
    for name in ("model.safetensors", "last.pt", "previous.pt", "best.safetensors"):
        (run / name).unlink()
    with pytest.raises(UserError, match="there is no checkpoint"):
        evaluate(f"run={run}")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"x" * 100], ids=["empty", "garbage"])
def test_damaged_weights(evaluate, run, content):
    (run / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors can't be read"):
        evaluate(f"run={run}")


@pytest.mark.slow
def test_unknown_checkpoint(evaluate, run):
    with pytest.raises(UserError, match="it has to be last or best"):
        evaluate(f"run={run}", "checkpoint=first")


@pytest.mark.slow
def test_wrong_number_of_classes(evaluate, finished, make_folder, tmp_path):
    make_folder(tmp_path / "two", classes=("day", "night"))
    words = ("model=test_vit", "data=imagefolder", f"data.root={tmp_path / 'two'}", "data.img_size=32")
    with pytest.raises(UserError, match="has 3 classes, but the data has 2"):
        evaluate(f"pretrained={finished}", *words)


@pytest.mark.slow
def test_weights_of_another_model(evaluate, run):
    with pytest.raises(UserError, match="do not fit test_vit2"):
        evaluate(f"run={run}", "model=test_vit2")


@pytest.mark.slow
@pytest.mark.parametrize("root", ["pipe:touch {canary};", "", None], ids=["root", "shards", "no root"])
def test_shards_that_are_commands_are_not_run(command, run, tmp_path, root):
    content = OmegaConf.load(run / "config.yaml")
    split = "{0..1}.tar|15" if root else f"pipe:touch {tmp_path / 'canary'};.tar|15"
    content.data.update(name="wds/x", root=root and root.format(canary=tmp_path / "canary"), val_split=split)
    OmegaConf.save(content, run / "config.yaml")
    code, output = command("eval", run)
    assert not (tmp_path / "canary").exists()
    assert code == 1
    assert "zoo-eval: error: " in output
    assert "Traceback" not in output


# Figures are printed even if files can't be written.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "file"),
    [
        *(("classify", file) for file in ("eval", "eval/eval.json", "eval/classes.json")),
        *(("detect", "eval"), ("segment", "eval/eval.json")),
        *(
            pytest.param(*rest, marks=pytest.mark.long)
            for rest in (("detect", "eval/eval.json"), ("detect", "eval/classes.json"), ("segment", "eval"))
        ),
        pytest.param("segment", "eval/classes.json", marks=pytest.mark.long),
    ],
)
def test_figures_are_printed_where_nothing_can_be_written(command, run, finished_dense, tmp_path, task, file):
    folder = run
    if task != "classify":
        folder = tmp_path / task
        shutil.copytree(finished_dense[task], folder)
    blocked = folder / file
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("") if file == "eval" else (blocked / "in the way").mkdir(parents=True)
    code, output = command("eval", folder)
    assert code == 1
    *figures, error = output.strip().splitlines()
    assert re.search(
        {"classify": r"top-1 [\d.]+ %", "detect": "box AP [\\d.]+", "segment": "mIoU [\\d.]+"}[task],
        "\n".join(figures[-2:]),
    )
    assert re.match(r"zoo-eval: error: .*eval", error)
    assert "Traceback" not in output


# The command.


@pytest.mark.slow
def test_command(run_cli, run, tmp_path, summary):
    code, output = run_cli(str(run), cwd=tmp_path, module="eval")
    assert code == 0, output
    assert f"top-1 {summary(run)['metrics']['top1']:.2f} %" in output
    assert "on 15 images" in output


@pytest.mark.slow
def test_command_with_a_key(command, run, summary):
    code, output = command("eval", f"run={run}")
    assert code == 0, output
    assert f"top-1 {summary(run)['metrics']['top1']:.2f} %" in output
    assert "on 15 images" in output


@pytest.mark.slow
@pytest.mark.parametrize("word", ["none", "run=none"], ids=["short", "long"])
def test_command_with_a_wrong_folder(command, tmp_path, word):
    code, output = command("eval", word)
    assert code == 1
    assert "zoo-eval: error: there is no run folder none: " in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


# The figures of an evaluation.


def _evaluation():
    return Evaluation({}, np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]), [])


def test_confusion_counts():
    assert _evaluation().confusion(3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_accuracy_per_class():
    assert _evaluation().per_class(3) == [50, pytest.approx(200 / 3), None]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 40, 100])
def test_confusion_of_many_classes_is_limited(tmp_path, classes):
    plot_confusion(tmp_path / "c.png", np.eye(classes, dtype=int), [f"class {i}" for i in range(classes)], "title")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 2200


@pytest.mark.slow
def test_torch_is_left_alone(evaluate, run):
    state = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
    evaluate(f"run={run}")
    assert (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()) == state


@pytest.mark.slow
def test_names_of_classes_are_no_formulas(tmp_path):
    plot_confusion(tmp_path / "c.png", np.eye(2, dtype=int), ["$\\frac$", "5$-10$"], r"a$\nothing$")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.slow
def test_names_of_classes_are_no_markup(evaluate, fit, make_folder, tmp_path, capsys):
    root = make_folder(tmp_path / "data", classes=("[red]a", "[b"), per_class=4)
    fit(tmp_path / "run", root, "trainer.batch_size=4")
    evaluate(f"run={tmp_path / 'run'}", "per_class=true")
    assert re.search(r"│ \[red\]a +│", capsys.readouterr().out)
