"""`zoo-look batch`: training images as the network gets them, with their labels. Half a minute."""

import json
import re

import pytest
import torch

from zoo.recipes import sheet
from zoo.recipes.classify import distillation
from zoo.recipes.classify.data import open_data
from zoo.recipes.classify.preview import caption
from zoo.recipes.classify.train import ClassifyRun
from zoo.recipes.classify.train_state import TrainState

SMALL = ("model=test_vit", "data.img_size=32", "data.num_workers=0", "trainer.batch_size=8")
MIXED = ("augment.mixup=0.8", "augment.smoothing=0.1", "augment.re_prob=0.5", "augment.repeats=2")


@pytest.mark.slow
def test_sheet_of_mixed_images_of_a_folder(command, images, tmp_path):
    data = ("data=imagefolder", f"data.root={images}")
    code, output = command("look", "batch", *SMALL, "--images", 12, *data, *MIXED, "pretrained=true", "--json")
    assert code == 0, output
    facts = json.loads(output[output.index("{") :])
    drawn = sheet.read(tmp_path / "batch.png")
    assert drawn.title == "12 of 24 training images, as test_vit gets them: 32x32 pixels."
    tiles = [tile for group in drawn.groups for tile in group]
    assert [tile.caption for tile in tiles] == facts["labels"]
    assert (facts["images"], facts["size"], len(tiles)) == (12, [32, 32], 12)
    shares = [[int(share) for share in re.findall(r": (\d+) %", text)] for text in facts["labels"]]
    assert all(sum(parts) in (99, 100, 101) for parts in shares if parts)
    assert any(len(parts) == 2 for parts in shares)
    code, output = command("look", "batch", *SMALL, *data)
    assert (code, output) == (1, "zoo-look: error: batch.png exists; --force replaces it.\n")


@pytest.mark.slow
def test_without_arguments(command, tmp_path):
    code, output = command("look", "batch")
    assert (code, output.splitlines()[-1]) == (0, "written: batch.png"), output
    assert sheet.read(tmp_path / "batch.png").title.startswith("32 of 1437 training images, as test_van gets them")


@pytest.mark.slow
def test_images_are_those_that_a_training_uses(fit, images, compose, tmp_path, monkeypatch):
    words = ("data=imagefolder", f"data.root={images}", *SMALL, *MIXED)
    run = ClassifyRun(cfg := compose(*words), open_data(cfg.data, 0), torch.device("cpu"), tmp_path / "none")
    drawn = [(pixels, labels) for pixels, labels, _ in run.preview()]
    used, mix = [], TrainState.mix
    monkeypatch.setattr(TrainState, "mix", lambda *args: used.append(mix(*args)) or used[-1])
    fit(tmp_path / "run", images, *MIXED, "trainer.max_updates=3")
    assert len(drawn) == len(used) == 3
    for one, other in zip(drawn, used, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data"), [("detect", "digit_scenes"), ("segment", "digit_scenes"), ("panoptic", None)]
)
def test_annotations_are_drawn(command, request, tmp_path, task, data):
    root = request.getfixturevalue("digit_scenes" if data else "panoptic_digit_scenes")
    words = (f"data.root={root}", "trainer.batch_size=2", "dense.digits_first=false")
    code, output = command("look", "batch", f"task={task}", *words, "-o", f"{tmp_path}/", "--images", 3)
    assert code == 0, output
    assert f"written: {tmp_path / 'batch.png'}" in output.splitlines()
    drawn = sheet.read(tmp_path / "batch.png")
    assert drawn.title.startswith("3 of 16 training images, as ")
    assert bool(drawn.legend) == (task != "detect")
    for [tile] in drawn.groups:  # the scenes are grey; annotations have colours
        red, green, blue = (torch.tensor(list(band.getdata())) for band in tile.picture.split())
        assert int(((red - blue).abs() + (red - green).abs() > 60).sum()) > 100
        assert tile.caption.endswith(".png")


@pytest.mark.parametrize(
    ("label", "smoothing", "several", "expected"),
    [
        (torch.tensor(1), 0.1, False, "dog"),
        (torch.tensor([0.0, 1.0, 0.0]), 0.0, False, "dog"),
        (torch.tensor([0.7, 0.3, 0.0]), 0.0, False, "cat: 70 %, dog: 30 %"),
        (torch.tensor([1.0, 0.0, 1.0]), 0.0, True, "cat, ant"),
        (torch.tensor([0.0, 0.0, 0.0]), 0.0, True, "no label"),
        (torch.tensor([0.95, 0.05, 0.95]), 0.1, True, "cat, ant"),
        (torch.tensor([0.95, 0.05, 0.725]), 0.1, True, "cat: 100 %, ant: 75 %"),
        (torch.tensor([0.9 * 0.75 + 0.1 / 3, 0.9 * 0.25 + 0.1 / 3, 0.1 / 3]), 0.1, False, "cat: 75 %, dog: 25 %"),
    ],
)
def test_captions(label, smoothing, several, expected):
    assert caption(label, ["cat", "dog", "ant"], smoothing, several) == expected


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0, 0.8])
def test_sheet_of_several_labels(command, images, tmp_path, monkeypatch, mixup):
    """Label smoothing is not in the captions, and a teacher is not opened."""
    monkeypatch.setattr(distillation, "open_teacher", lambda *_: pytest.fail("the teacher was opened"))
    files = sorted(images.rglob("*.jpg"))
    rows = [f"{path},{path.parent.name}{'|' + 'red' * (i % 2) if i % 3 else ''}" for i, path in enumerate(files)]
    (tmp_path / "some.csv").write_text("\n".join(["file,labels", *rows]))
    words = ("data=csv", "data.csv=some.csv", "augment.smoothing=0.1", f"augment.mixup={mixup}")
    code, output = command(
        "look", "batch", *SMALL, *words, "distill.teacher=test_vit", "distill.match=features", "--json"
    )
    assert code == 0, output
    shares = [
        [int(share) for share in re.findall(r": (\d+) %", text)]
        for text in json.loads(output[output.index("{") :])["labels"]
    ]
    assert all(1 <= share <= 100 for parts in shares for share in parts)
    assert any(shares) == (mixup > 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.epoch=1"], "zoo-look batch: error: there is no key 'trainer.epoch': did you mean trainer.epochs?"),
        (["--augment.mixup=0.5"], "keys are written without dashes: write augment.mixup=0.5 for --augment.mixup=0.5"),
        (["data=imagefolder", "data.root=nowhere"], "zoo-look batch: error: data.root=nowhere does not exist"),
        (["-m", "seed=1,2"], "zoo-look: error: zoo-look batch draws the images of one training: leave out -m"),
        (["augment.mixup=2000"], "augment.mixup=2000.0 is not allowed"),
        (["-o", "batch.jpg"], "its name has to end in .png"),
    ],
)
def test_mistakes(command, words, message):
    code, output = command("look", "batch", *words)
    assert code in (1, 2)
    assert message in output
    assert "Traceback" not in output


def test_other_commands_refuse_loose_words(command):
    code, output = command("look", "patterns", "--imgs=3")
    assert (code, "unrecognized arguments: --imgs=3" in output) == (2, True)


def test_configuration_is_printed(command, tmp_path):
    code, output = command("look", "batch", "--cfg", "job", "seed=5")
    assert code == 0
    assert "seed: 5" in output
    assert not (tmp_path / "batch.png").exists()
