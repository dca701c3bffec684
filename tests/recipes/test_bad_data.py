"""Bad images, bad numbers, bad files, full disks, dead processes. 20 s; the slow ones 2 min."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes.classify import train
from zoo.recipes.classify.data import Samples, build_transform, open_data
from zoo.recipes.classify.model import build_model
from zoo.recipes.classify.train_state import TrainState

ARGS = (
    "model=test_vit",
    "data=imagefolder",
    "data.img_size=32",
    "trainer.device=cpu",
    "trainer.batch_size=8",
    "log.wandb=disabled",
)


@pytest.fixture
def folder(make_folder, tmp_path):
    """A folder with train/ (24 images) and val/ (15) for one test, which may change it."""
    make_folder(tmp_path / "data" / "train")
    make_folder(tmp_path / "data" / "val", per_class=5, seed=1)
    return tmp_path / "data"


def _corrupt(path, how="truncated"):
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 3], "random": random.Random(0).randbytes(500), "empty": b""}[how]
    )
    return path


def _nth(folder, split, number):
    return sorted((folder / split).rglob("*.jpg"))[number]


# Corrupt images.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "random", "empty"])
def test_corrupt_image_is_skipped_and_counted(fit, folder, tmp_path, how):
    path = _corrupt(_nth(folder, "train", 3), how)
    result = fit(tmp_path / "run", folder)
    assert [entry.split(" (")[0] for entry in result["corrupt_images"]] == [str(path)]
    assert result["updates"] == 3


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_corrupt_image_is_named_in_the_log(fit, folder, tmp_path, workers):
    path = _corrupt(_nth(folder, "train", 3))
    fit(tmp_path / "run", folder, f"data.num_workers={workers}")
    assert f"Skipped a corrupt image: {path} (" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_corrupt_image_is_named_once_over_epochs(fit, folder, tmp_path):
    _corrupt(_nth(folder, "train", 3))
    result = fit(tmp_path / "run", folder, "trainer.epochs=3")
    assert len(result["corrupt_images"]) == 1
    assert (tmp_path / "run" / "train.log").read_text().count("Skipped a corrupt image") == 1


@pytest.mark.slow
def test_corrupt_image_is_counted_in_the_metrics(fit, folder, tmp_path):
    _corrupt(_nth(folder, "train", 3))
    fit(tmp_path / "run", folder)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["corrupt_images"] == 1


@pytest.mark.slow
def test_corrupt_images_are_remembered_after_a_resume(fit, folder, tmp_path):
    _corrupt(_nth(folder, "train", 3))
    fit(tmp_path / "run", folder, "trainer.epochs=2", "trainer.max_updates=3")
    assert len(fit(tmp_path / "run", folder, "trainer.epochs=2")["corrupt_images"]) == 1


@pytest.mark.slow
def test_corrupt_validation_image_does_not_count(fit, folder, tmp_path):
    _corrupt(_nth(folder, "val", 0))
    top1 = fit(tmp_path / "run", folder)["metrics"]["top1"]
    assert top1 * 14 / 100 == pytest.approx(round(top1 * 14 / 100))


@pytest.mark.slow
def test_corrupt_validation_image_is_named(fit, folder, tmp_path):
    path = _corrupt(_nth(folder, "val", 0))
    assert fit(tmp_path / "run", folder)["corrupt_images"][0].startswith(str(path))


@pytest.mark.slow
def test_validation_images_all_corrupt(fit, folder, tmp_path):
    for number in range(15):
        _corrupt(_nth(folder, "val", number))
    with pytest.raises(UserError, match="no image could be read for evaluation: the first of 15 corrupt ones is"):
        fit(tmp_path / "run", folder, pictures=True)


@pytest.mark.slow
def test_too_many_corrupt_images_stop_the_run_with_the_list(fit, folder, tmp_path):
    paths = [str(_corrupt(_nth(folder, "train", number))) for number in (1, 5, 9, 13)]
    with pytest.raises(UserError, match=r"more than data\.max_corrupt=2"):
        fit(tmp_path / "run", folder, "data.max_corrupt=2")
    listed = [line.split(" (")[0] for line in (tmp_path / "run" / "corrupt.txt").read_text().splitlines()]
    assert len(listed) > 2
    assert set(listed) <= set(paths)


@pytest.mark.slow
def test_as_many_corrupt_images_as_allowed(fit, folder, tmp_path):
    for number in (1, 5):
        _corrupt(_nth(folder, "train", number))
    assert len(fit(tmp_path / "run", folder, "data.max_corrupt=2")["corrupt_images"]) == 2


@pytest.mark.slow
def test_too_many_corrupt_images_on_the_command_line(command, folder):
    for number in (1, 5):
        _corrupt(_nth(folder, "train", number))
    code, output = command("train", *ARGS, f"data.root={folder}", "data.max_corrupt=0", "run=run")
    assert code == 1
    assert "zoo-train: error:" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_images_all_corrupt(fit, folder, tmp_path, workers):
    for number in range(24):
        _corrupt(_nth(folder, "train", number))
    with pytest.raises(UserError, match="corrupt") as error:
        fit(tmp_path / "run", folder, f"data.num_workers={workers}")
    assert "Traceback" not in str(error.value)
    assert "24 " in str(error.value)


@pytest.mark.slow
def test_a_held_out_image_never_takes_the_place_of_a_corrupt_one(compose, make_folder, tmp_path):
    root = make_folder(tmp_path / "all", per_class=20)
    cfg = compose(
        "data=imagefolder", f"data.root={root}", "data.val_fraction=0.4", "trainer.batch_size=4", "model=test_vit"
    )
    data = open_data(cfg.data, 0)
    before = next(i for i in data.train_indices if i + 1 in data.val_indices)
    _corrupt(root / data.train.reader.samples[before][0])
    run = train.ClassifyRun(cfg, data, torch.device("cpu"), tmp_path / "run")
    read = []
    reader = type(data.train.reader)
    original = reader.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "__getitem__", lambda self, i: read.append(i) or original(self, i))
        run.loader.dataset[0, before]
    assert len(read) == 2
    assert set(read) <= set(data.train_indices)


@pytest.mark.slow
def test_a_corrupt_image_is_replaced_by_the_same_one_every_time(compose, folder, same):
    cfg = compose("data=imagefolder", f"data.root={folder}")
    _corrupt(_nth(folder, "train", 3))
    data = open_data(cfg.data, 0)
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    samples = Samples(data.train, build_transform(cfg.augment, config), 0, True, (3, 32, 32))
    assert same(samples[0, 3][0], samples[0, 3][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_images_of_other_kinds_are_fine(fit, folder, tmp_path, mode):
    path = _nth(folder, "train", 3)
    image = Image.new(mode, (40, 40))
    image.save(path.with_suffix(".tif" if mode == "CMYK" else ".png"))
    path.unlink()
    assert fit(tmp_path / "run", folder, "data.input_key='.jpg;.png;.tif'")["corrupt_images"] == []


# Refused before training.


def _refused(fit, tmp_path, root, match, *overrides):
    with pytest.raises(UserError, match=match):
        fit(tmp_path / "run", root, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("text", ["<html>404</html>", "Grüße, 世界\n" * 50], ids=["html", "utf-8"])
def test_text_named_like_an_image(fit, folder, tmp_path, split, text):
    path = _nth(folder, split, 0)
    path.write_text(text, encoding="utf-8")
    _refused(fit, tmp_path, folder, re.escape(f"{path} is text, not an image"))


@pytest.mark.slow
def test_several_text_files_are_counted(fit, folder, tmp_path):
    for number in range(3):
        _nth(folder, "train", number).write_text("not found")
    _refused(fit, tmp_path, folder, "and 2 more of the 24 files looked at are text")


@pytest.mark.slow
def test_text_is_a_corrupt_image_where_files_are_not_checked(fit, folder, tmp_path):
    _nth(folder, "train", 0).write_text("not found")
    assert len(fit(tmp_path / "run", folder, "data.check_files=0")["corrupt_images"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class(fit, folder, tmp_path, split):
    (folder / split / "plum").mkdir()
    _refused(fit, tmp_path, folder, re.escape(f"the class folder {folder / split / 'plum'} has no images"))


@pytest.mark.slow
def test_no_class_folders(fit, tmp_path):
    (tmp_path / "data").mkdir()
    _refused(fit, tmp_path, tmp_path / "data", re.escape(f"{tmp_path / 'data'} has no class folders"))


@pytest.mark.slow
def test_images_without_class_folders(fit, folder, tmp_path):
    _refused(fit, tmp_path, folder / "train" / "apple", "has no class folders")


@pytest.mark.slow
def test_single_class(fit, make_folder, tmp_path):
    make_folder(tmp_path / "data", classes=("apple",))
    _refused(fit, tmp_path, tmp_path / "data", "has a single class, 'apple'")


@pytest.mark.slow
def test_validation_without_training_split(fit, make_folder, tmp_path):
    make_folder(tmp_path / "data" / "val")
    _refused(fit, tmp_path, tmp_path / "data", "has val but no train: name it")


@pytest.mark.slow
def test_wrong_root_names_the_nearest_folder(fit, folder, tmp_path):
    _refused(fit, tmp_path, tmp_path / "dat", re.escape(f"does not exist: did you mean {tmp_path / 'data'}?"))


@pytest.mark.slow
def test_wrong_root_names_the_first_missing_part(fit, folder, tmp_path):
    _refused(fit, tmp_path, tmp_path / "dta" / "x" / "y", re.escape(f"did you mean {tmp_path / 'data'}?"))


@pytest.mark.slow
def test_no_root(fit, tmp_path):
    _refused(fit, tmp_path, None, "data.root is not set", "data=imagefolder")


@pytest.mark.slow
def test_root_is_a_file(fit, tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    _refused(fit, tmp_path, tmp_path / "data.zip", re.escape(str(tmp_path / "data.zip")))


@pytest.mark.slow
def test_too_few_images_to_hold_any_out(fit, make_folder, tmp_path):
    make_folder(tmp_path / "data", per_class=1)
    _refused(fit, tmp_path, tmp_path / "data", "has too few images to hold out")


@pytest.mark.slow
def test_number_of_classes_that_the_data_contradicts(fit, folder, tmp_path):
    _refused(fit, tmp_path, folder, "data.num_classes=5, but the data has 3 classes", "data.num_classes=5")


@pytest.mark.slow
def test_missing_class_map(fit, folder, tmp_path):
    _refused(fit, tmp_path, folder, r"class_map=.*none.txt does not exist", f"data.class_map={tmp_path / 'none.txt'}")


@pytest.mark.slow
def test_run_below_a_file(fit, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run can't be written to \(.*choose another with run=<folder>"):
        fit(tmp_path / "file" / "run", folder)


@pytest.mark.slow
def test_run_is_a_file(fit, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written to"):
        fit(tmp_path / "file", folder)


@pytest.mark.slow
def test_missing_device(fit, folder, tmp_path):
    here = torch.accelerator.current_accelerator(check_available=True)
    other = "mps" if here and here.type == "cuda" else "cuda"
    found = f"cpu or {here.type}" if here else "cpu only"
    _refused(fit, tmp_path, folder, f"trainer.device={other}: torch .* finds {found}", f"trainer.device={other}")


# Bad numbers.


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of chosen updates (from 1) not finite; everything computed before that is kept."""

    def install(updates, value=float("nan")):
        calls = {"number": 0}
        original = TrainState.forward

        def forward(self, images, labels):
            calls["number"] += 1
            if calls["number"] in updates:
                images = images * value
            return original(self, images, labels)

        monkeypatch.setattr(TrainState, "forward", forward)

    return install


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_update_that_is_not_finite_is_skipped_and_counted(fit, images, tmp_path, spoil, value):
    spoil({2}, value)
    result = fit(tmp_path / "run", images)
    assert (result["skipped_updates"], result["updates"]) == (1, 3)


@pytest.mark.slow
def test_skipped_update_is_in_the_log(fit, images, tmp_path, spoil):
    spoil({2})
    fit(tmp_path / "run", images)
    assert "Skipped update 2: its loss is not finite" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_van"])
def test_skipped_update_leaves_weights_and_buffers(fit, images, tmp_path, spoil, weights, same, model):
    """Updates 3 and 4 of six are skipped, so after four the weights are those after two."""
    schedule = (f"model={model}", "schedule=constant", "trainer.epochs=2")
    fit(tmp_path / "two", images, *schedule, "trainer.max_updates=2")
    spoil({3, 4})
    fit(tmp_path / "four", images, *schedule, "trainer.max_updates=4")
    assert same(weights(tmp_path / "four"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_skipped_update_leaves_the_average(fit, images, tmp_path, spoil, weights, same):
    schedule = ("schedule=constant", "trainer.ema_decay=0.9")
    fit(tmp_path / "two", images, *schedule, "trainer.max_updates=2")
    spoil({3})
    fit(tmp_path / "three", images, *schedule, "trainer.max_updates=3")
    assert same(weights(tmp_path / "three"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_bad_pass_of_an_accumulated_update_leaves_no_gradient(fit, images, tmp_path, spoil, weights, same):
    schedule = ("schedule=constant", "trainer.batch_size=4", "trainer.effective_batch_size=8")
    fit(tmp_path / "two", images, *schedule, "trainer.max_updates=2")
    spoil({6})  # the second pass of update 3
    fit(tmp_path / "three", images, *schedule, "trainer.max_updates=3")
    assert same(weights(tmp_path / "three"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(fit, images, tmp_path, spoil):
    spoil(range(4, 100))
    with pytest.raises(UserError, match=r"not finite in 3 updates in a row.*The last good checkpoint is .*last.pt"):
        fit(tmp_path / "run", images, "trainer.epochs=9", "trainer.max_nonfinite=2")


@pytest.mark.slow
def test_last_checkpoint_before_bad_numbers_is_finite(fit, images, tmp_path, spoil):
    spoil(range(5, 100))
    with pytest.raises(UserError):
        fit(tmp_path / "run", images, "trainer.epochs=9", "trainer.max_nonfinite=2", "trainer.save_minutes=0")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["training"]["model"].values())


@pytest.mark.slow
def test_scattered_bad_updates_do_not_stop_the_run(fit, images, tmp_path, spoil):
    spoil({2, 4, 6, 8})
    assert fit(tmp_path / "run", images, "trainer.epochs=3", "trainer.max_nonfinite=1")["skipped_updates"] == 4


@pytest.mark.slow
def test_absurd_learning_rate_stops(fit, images, tmp_path):
    absurd = ("optim=sgd", "optim.lr=1e4", "trainer.epochs=9", "trainer.max_nonfinite=3", "model=test_convnext")
    with pytest.raises(UserError, match=r"lower optim\.lr"):
        fit(tmp_path / "run", images, *absurd)


# Hostile files.


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _hostile(path, marker, kind):
    if kind == "torch":
        torch.save({"progress": _Hostile(marker), "state_dict": {"w": _Hostile(marker)}}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": _Hostile(marker)}, protocol=2))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_hostile_checkpoint_runs_nothing(fit, images, tmp_path, kind):
    (tmp_path / "run").mkdir()
    _hostile(tmp_path / "run" / "last.pt", tmp_path / "marker", kind)
    with pytest.raises(UserError, match="can't be read"):
        fit(tmp_path / "run", images)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.ckpt"])
def test_hostile_weights_run_nothing(compose, tmp_path, kind, name):
    path = _hostile(tmp_path / name, tmp_path / "marker", kind)
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        build_model(compose(f"pretrained={path}"), 2)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html></html>", bytes(200)], ids=["empty", "html", "zeros"])
def test_weights_that_are_none(compose, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        build_model(compose(f"pretrained={tmp_path / name}"), 2)


# Full disks and dead processes, in a process of their own.

LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""


@pytest.mark.long
def test_full_disk_keeps_the_last_checkpoint(run_cli, images, tmp_path):
    args = (*ARGS, f"data.root={images}", "data.num_workers=0", "run=run")
    assert run_cli(*args, "trainer.epochs=1", cwd=tmp_path)[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    code, output = run_cli(*args, "trainer.epochs=2", cwd=tmp_path, program=LIMIT)
    assert code == 1
    assert re.search(r"zoo-train: error: could not write .*Free some space", output)
    assert "Traceback" not in output
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.slow
def test_disk_that_is_full_from_the_start(run_cli, images, tmp_path):
    args = (*ARGS, f"data.root={images}", "data.num_workers=0", "run=run", "trainer.epochs=1")
    code, output = run_cli(*args, cwd=tmp_path, program=LIMIT)
    assert code == 1
    assert output.count("zoo-train: error:") == 1
    assert "Traceback" not in output


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_dead_worker_is_one_error_and_keeps_the_checkpoint(start_cli, run_cli, images, tmp_path):
    args = (*ARGS, f"data.root={images}", "data.num_workers=1", "run=run", "trainer.save_minutes=0")
    process = start_cli(*args, "trainer.epochs=500", cwd=tmp_path)
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert "zoo-train: error: a process that loads images died" in output
    assert "Traceback" not in output
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["update"] >= 1


LINGERING = """
import itertools
import torch
from zoo.recipes.classify.data import EpochSampler, Samples, build_loader
from zoo.recipes.digits import Digits
from zoo.recipes.config import DataConfig

samples = Samples(Digits(True), lambda image: torch.zeros(3, 4, 4), 0, True, (3, 4, 4))
sampler = EpochSampler(range(64), 8, 0, 0, 1)
loader = build_loader(samples, sampler, 8, DataConfig(num_workers=1), torch.device("cpu"), training=True)
batches = iter(loader)
next(batches)
print("the worker still has batches")
"""


@pytest.mark.slow
def test_process_ends_with_workers_in_use():
    """They ignore SIGTERM, by which multiprocessing ends its children before it waits for them."""
    done = subprocess.run([sys.executable, "-c", LINGERING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "still has batches" in done.stdout
