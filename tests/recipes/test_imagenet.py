"""zoo-eval robustness=imagenet, with a model that knows classes by their colours. 5 s; the slow ones 20 s."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from zoo.messages import UserError
from zoo.recipes import config, report
from zoo.recipes.classify import evaluate, imagenet

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
COLOURS = np.array([(28 * (i % 10), 28 * (i // 10 % 10), 28 * (i // 100)) for i in range(1000)])
OUTPUTS = {synset: i for i, synset in enumerate(SYNSETS)}


class ByColour(nn.Module):
    """Recognises an image of the class i by COLOURS[i]."""

    num_classes = 1000
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.register_buffer("colours", torch.tensor(COLOURS / 255, dtype=torch.float32))

    def forward(self, images):
        return -torch.cdist(images.mean((2, 3)), self.colours)


def _paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), COLOURS[colour], np.uint8)).save(path, format="png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small copies of the data sets, complete in their classes."""
    root = tmp_path_factory.mktemp("imagenet")
    for i, synset in enumerate(SYNSETS):
        _paint(root / "val" / synset / "a.JPEG", i)
        _paint(root / "v2" / str(i) / "a.JPEG", i if i % 4 else (i + 1) % 1000)  # one of four is wrong
    subset = (imagenet.files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()
    inside = [OUTPUTS[synset] for synset in subset]
    # An image has the colour of a class outside of the 200 to which its own class is clearly nearest, if there is one.
    distances = np.linalg.norm(COLOURS[:, None] - COLOURS[None, inside], axis=2)
    nearest, margin = distances.argmin(1), np.diff(np.sort(distances, axis=1)[:, :2], axis=1)[:, 0]
    outside = [[c for c in range(1000) if nearest[c] == k and margin[c] > 5 and c not in inside] for k in range(200)]
    assert sum(map(bool, outside)) > 50
    for k, (synset, i) in enumerate(zip(subset, inside, strict=True)):
        _paint(root / "a" / synset / "a.JPEG", next(iter(outside[k]), i))
    for group, name in (("noise", "shot_noise"), ("weather", "fog")):
        for severity in "12345":
            (root / "c" / group / name).mkdir(parents=True, exist_ok=True)
            source = "val" if severity in "123" else "v2"
            (root / "c" / group / name / severity).symlink_to(root / source, target_is_directory=True)
    return root


@pytest.fixture
def two_corruptions(monkeypatch):
    """ImageNet-C with two corruptions: 75 folders of 1,000 classes take long."""
    monkeypatch.setattr(imagenet, "ALEXNET", {"shot_noise": 50.0, "fog": 20.0})


@pytest.fixture
def by_colour(monkeypatch):
    monkeypatch.setattr(evaluate, "build_model", lambda cfg, number: ByColour())


EVAL = ("model=test_vit", "pretrained=true", "data.num_workers=0", "trainer.batch_size=256", "out=out")


@pytest.mark.slow
def test_journey(command, by_colour, two_corruptions, folders, tmp_path):
    given = [f"imagenet.{key}={folders / key}" for key in ("val", "v2", "a", "c")]
    code, output = command("eval", *EVAL, "robustness=imagenet", *given)
    assert code == 0, output
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    found = written["imagenet"]
    assert [found[key]["top1"] for key in ("val", "v2", "a")] == [100, 75, 100]
    assert (found["v2"]["images"], found["a"]["images"]) == (1000, 200)
    assert written["metrics"] == {"top1": 100, "images": 1000}
    assert found["c"]["errors"]["fog"] == [0, 0, 0, 25, 25]
    assert found["c"]["ce"] == {"shot_noise": 20, "fog": 50}  # a mean error of 10 by AlexNet's 50 and 20
    assert found["c"]["mce"] == 35
    assert "the figure is not that of the whole set" in output
    assert "ImageNet-V2" in output
    assert "mCE 35.00 %" in output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ImageNet-V2" in page
    assert "mCE" in page
    assert not (tmp_path / "out" / "imagenet.part.json").exists()
    comparison = report.comparison([report.read(tmp_path / "out")] * 2)
    assert "<th>ImageNet-V2</th>" in comparison


@pytest.mark.slow
def test_other_classes_do_not_count_on_imagenet_a(folders, by_colour):
    """Without the restriction to its 200 classes, the same images are wrong."""
    images = torch.tensor(COLOURS / 255, dtype=torch.float32)[:, :, None, None]
    synset = imagenet._classes("a", OUTPUTS)
    inside = [OUTPUTS[name] for name in synset]
    answers = imagenet._Among(ByColour(), inside, 1000)(images).argmax(1)
    assert set(answers.tolist()) <= set(inside)
    assert ByColour()(images).argmax(1).tolist() == list(range(1000))


def test_folders_named_by_numbers_are_not_sorted_as_text(folders):
    reader = imagenet._open("v2", folders / "v2", OUTPUTS).reader
    assert {int(path.split("/")[-2]): label for path, label in reader.samples} == {i: i for i in range(1000)}


def test_labels_follow_the_order_of_the_models_classes(folders):
    turned = dict(zip(SYNSETS, reversed(range(1000)), strict=True))
    for key in ("val", "v2"):
        reader = imagenet._open(key, folders / key, turned).reader
        for path, label in reader.samples:
            name = path.split("/")[-2]
            assert label == 999 - (int(name) if key == "v2" else OUTPUTS[name])


@pytest.mark.parametrize(("key", "number"), [("a", 200), ("r", 200), ("sketch", 1000)])
def test_classes_of_a_set(key, number):
    classes = imagenet._classes(key, OUTPUTS)
    assert len(set(classes)) == number
    assert set(classes) <= set(SYNSETS)


@pytest.mark.slow
def test_real_labels(command, by_colour, tmp_path):
    labels = imagenet._real_labels()
    assert (len(labels), sum(map(bool, labels))) == (50_000, 46_837)  # as in the paper
    several = [i for i in range(50_000) if len(labels[i]) > 1]
    none = [i for i in range(50_000) if not labels[i]]
    _paint(tmp_path / "real" / f"ILSVRC2012_val_{several[0] + 1:08d}.JPEG", labels[several[0]][1])
    _paint(tmp_path / "real" / "n01440764" / f"ILSVRC2012_val_{several[1] + 1:08d}.JPEG", labels[several[1]][0])
    wrong = next(i for i in range(1000) if i not in labels[several[2]])
    _paint(tmp_path / "real" / f"ILSVRC2012_val_{several[2] + 1:08d}.JPEG", wrong)
    _paint(tmp_path / "real" / f"ILSVRC2012_val_{none[0] + 1:08d}.JPEG", 0)
    code, output = command("eval", *EVAL, "robustness=imagenet", "imagenet.real=real")
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["imagenet"]["real"]
    assert (found["images"], found["top1"]) == (3, pytest.approx(200 / 3))
    assert "1 of 4 images have no ReaL label and do not count" in output


@pytest.mark.slow
def test_interrupted_evaluation_goes_on(command, by_colour, folders, tmp_path, monkeypatch):
    original, calls = imagenet.predictions, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(imagenet, "predictions", interrupted)
    words = (*EVAL, "robustness=imagenet", f"imagenet.v2={folders / 'v2'}", f"imagenet.a={folders / 'a'}")
    assert command("eval", *words)[0] == 130
    code, output = command("eval", *words)
    assert code == 0, output
    assert "Continues: 1 of 2 parts are done." in output
    assert len(calls) == 3
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["imagenet"]["v2"]["top1"] == 75


def test_mce_of_alexnet_is_100():
    rows = {f"c/{name}/{s}": [1000 - 10 * error, 1000] for name, error in imagenet.ALEXNET.items() for s in "12345"}
    found = imagenet._figures({"c": None}, rows)["c"]
    assert len(found["ce"]) == 15
    assert found["mce"] == pytest.approx(100)


# Messages.


def _remove(root, name):
    shutil.rmtree(root / name)


def _rename(root, name, new):
    (root / name).rename(root / new)


def _nest(root):
    inner = root / "imagenet-a"
    inner.mkdir()
    for path in list(root.iterdir()):
        if path != inner:
            path.rename(inner / path.name)


def _empty(root):
    for path in root.iterdir():
        shutil.rmtree(path)


WRONG = {
    "half": (
        "a",
        partial(_remove, name="n01498041"),
        "is incomplete: it lacks 1 of the 200 classes of .*-A, such as n014",
    ),
    "half, numbered": ("v2", partial(_remove, name="10"), r"lacks 1 of the 1,000 classes of ImageNet-V2, such as 10\."),
    "a number too many": ("v2", partial(_rename, name="10", new="1000"), "has the folder '1000', which is none of the"),
    "another name": (
        "a",
        partial(_rename, name="n01498041", new="ray"),
        r"'ray', which is none of the 200 .* n01498041\.",
    ),
    "one level up": ("a", _nest, r"has the folder 'imagenet-a', .*did you mean imagenet.a=.*/imagenet-a\?"),
    "empty": ("a", _empty, "has no class folders: it has to have the 200 of"),
    "empty class": ("a", lambda root: (root / "n01498041" / "a.JPEG").unlink(), "folder .*/n01498041 has no images"),
}


def _use(key, root):
    imagenet._find(key, root, OUTPUTS)
    imagenet._open(key, root, OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_wrong_folder(folders, tmp_path, case):
    key, change, message = WRONG[case]
    names = imagenet._classes(key, OUTPUTS) if key == "a" else [str(i) for i in range(1000)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.JPEG").touch()
    change(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        _use(key, tmp_path / "data")


def test_another_set_is_recognised(folders):
    with pytest.raises(UserError, match=r"has the folder 'n0.*', which is none of the 200 classes of ImageNet-A"):
        imagenet._find("a", folders / "val", OUTPUTS)


def test_incomplete_imagenet_c(folders, two_corruptions, tmp_path, monkeypatch):
    shutil.copytree(folders / "c", tmp_path / "c", symlinks=True)
    assert list(imagenet._find("c", tmp_path / "c", OUTPUTS)) == [
        f"{name}/{severity}" for name in ("shot_noise", "fog") for severity in "12345"
    ]
    (tmp_path / "c" / "weather" / "fog" / "5").unlink()
    with pytest.raises(UserError, match=r"is incomplete: it has no folder .*/fog/5\."):
        imagenet._find("c", tmp_path / "c", OUTPUTS)
    monkeypatch.undo()
    with pytest.raises(UserError, match="lacks 13 of the 15 corruptions of ImageNet-C, gaussian_noise, impulse_noise"):
        imagenet._find("c", tmp_path / "c", OUTPUTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "imagenet.real=.*none does not exist"),
        ("a.txt", "is a file: give a folder"),
        ("", "has no files named as"),
    ],
)
def test_wrong_place_of_real_labels(tmp_path, name, message):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=message):
        _use("real", tmp_path / name)


def test_model_for_other_classes():
    with pytest.raises(UserError, match="test_van has 10 classes, but robustness=imagenet needs the 1,000 classes"):
        imagenet._outputs("test_van", type("Model", (), {"num_classes": 10}), None)
    with pytest.raises(UserError, match="are not ImageNet's synsets, such as n01440764: it has 'tench'"):
        imagenet._outputs("x", ByColour(), ["tench", *SYNSETS[1:]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagenet.a=a"], "imagenet.a=a needs robustness=imagenet: add it"),
        (
            ["robustness=imagenet"],
            "robustness=imagenet needs a folder or several: set any of imagenet.val, imagenet.real",
        ),
        (["robustness=imagenet", "imagenet.a=a", "severities=[1]"], "needs robustness=corruptions"),
    ],
    ids=["no robustness", "no folder", "severities"],
)
def test_message_of_the_configuration(compose, words, message):
    with pytest.raises(UserError, match=message):
        config.check(compose(*words, name="eval"))


@pytest.mark.slow
def test_data_root_has_no_effect(command, by_colour, folders, tmp_path):
    words = ("data=imagefolder", f"data.root={folders / 'val'}")
    code, output = command("eval", *EVAL, "robustness=imagenet", f"imagenet.a={folders / 'a'}", *words)
    assert code == 1
    assert "data has no effect with robustness=imagenet: name the folders, for example imagenet.val=<folder>" in output
