"""Corruptions of images, and zoo-eval on them. 3 s; the slow ones 20 s."""

import gc
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import dataloader

from zoo.messages import UserError
from zoo.recipes import config, report
from zoo.recipes.classify import robustness
from zoo.recipes.classify.corruptions import NAMES, SEVERITIES, corrupt


def _photo(height=64, width=64, channels=3):
    """Smooth colours with edges, uint8 (height, width, channels)."""
    rng = np.random.default_rng(0)
    field = gaussian_filter(rng.random((height, width, channels)), (3, 3, 0), mode="wrap")
    field = (field - field.min()) / np.ptp(field)
    field[height // 4 : height // 2, width // 4 : width // 2] *= 0.3
    return np.rint(255 * field).astype(np.uint8)


def _distance(one, two):
    return np.abs(one.astype(float) - two).mean()


@pytest.mark.parametrize("name", NAMES)
def test_corruption_is_worse_with_each_severity(name):
    photo = _photo()
    distances = [0.0, *(_distance(corrupt(photo, name, severity), photo) for severity in SEVERITIES)]
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("name", NAMES)
def test_corruption_depends_on_the_image_and_the_seed_alone(name):
    photo = _photo()
    before = photo.copy()
    first = corrupt(photo, name, 3)
    np.random.seed(7)  # noqa: NPY002
    assert (corrupt(photo, name, 3) == first).all()
    assert (photo == before).all()
    random = name in ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog", "darkness", "elastic")
    assert (corrupt(photo, name, 3, seed=1) != first).any() == random


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32, 3), (33, 47, 3), (47, 33, 1), (5, 90, 4), (1, 1, 3)], ids=str)
def test_any_size_and_number_of_channels(name, shape):
    photo = _photo(*shape) if min(shape[:2]) > 1 else np.full(shape, 100, np.uint8)
    for severity in SEVERITIES:
        found = corrupt(photo, name, severity)
        assert (found.shape, found.dtype) == (photo.shape, np.uint8)
        assert (found[..., 3:] == photo[..., 3:]).all()  # alpha


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "contrast", "saturation", "elastic", "pixelate"]
)
def test_plain_image_stays_as_it_is(name):
    plain = np.full((40, 30, 3), 90, np.uint8)
    assert np.abs(corrupt(plain, name, 5).astype(int) - plain).max() <= 1


def test_grey_stays_grey_without_saturation():
    grey = np.repeat(_photo(channels=1), 3, axis=2)
    assert _distance(corrupt(grey, "saturation", 5), grey) < 0.01


def test_blur_keeps_the_light():
    photo = _photo(128, 128)
    for name in ("defocus_blur", "motion_blur"):
        assert abs(corrupt(photo, name, 5).mean() - photo.mean()) < 2


# zoo-eval robustness=corruptions.


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to write into."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


FEW = ("robustness=corruptions", "corruptions=[darkness,fog]", "severities=[5,1]")


@pytest.mark.slow
def test_journey_of_two_models(command, run, tmp_path):
    code, output = command("eval", "run", *FEW)
    assert code == 0, output
    written = json.loads((run / "eval" / "eval.json").read_text())
    found = written["corruptions"]
    assert (found["severities"], list(found["top1"]), found["images"]) == ([1, 5], ["fog", "darkness"], 15)
    assert found["clean"] == written["metrics"]["top1"]
    assert found["mean"] == pytest.approx(np.mean(list(found["top1"].values())))
    assert found["relative"] == pytest.approx(100 * found["mean"] / found["clean"])
    for name, row in found["top1"].items():
        assert re.search(rf"{name} +│ +{row[0]:.1f} +│ +{row[1]:.1f} +│ +{np.mean(row):.1f}", output)
    assert f"Corrupted: top-1 {found['mean']:.2f} % on average, {found['relative']:.1f} % of" in output
    assert not (run / "eval" / "corruptions.part.json").exists()
    with Image.open(run / "eval" / "corruptions.png") as picture:
        assert picture.width > 600
    page = (run / "eval" / "report.html").read_text()
    assert "Corrupted images" in page
    assert "darkness 5</figcaption>" in page

    code, output = command("eval", "run", *FEW, "checkpoint=best", "out=best")
    assert code == 0, output
    comparison = report.comparison([report.read(run / "eval"), report.read(tmp_path / "best")])
    assert re.search(
        r"<th>darkness</th><td class=\"n\">[\d.]+</td><td class=\"n\">[\d.]+ \([+-][\d.]+\)</td>", comparison
    )
    assert "validated on different data" not in comparison
    code, output = command("eval", "run")  # without corruptions, into the same folder
    assert code == 0, output
    page = (run / "eval" / "report.html").read_text()
    assert "Reliability diagram" in page
    assert "darkness 5</figcaption>" not in page


@pytest.mark.slow
def test_corruption_gives_the_accuracy_on_corrupted_files(command, run, images, tmp_path):
    """Images of the model's size that are corrupted and saved give what zoo-eval computes."""
    for path in sorted((images / "val").rglob("*.jpg")):
        with Image.open(path) as opened:
            clean = np.asarray(opened.convert("RGB").resize((32, 32)))
        for folder, pixels in (("clean", clean), ("dark", corrupt(clean, "darkness", 5))):
            target = tmp_path / folder / path.parent.name / f"{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    words = ("robustness=corruptions", "corruptions=[darkness]", "severities=[5]", "data.crop_pct=1")
    code, output = command("eval", "run", "data.root=clean", "out=a", *words)
    assert code == 0, output
    code, output = command("eval", "run", "data.root=dark", "out=b", "data.crop_pct=1")
    assert code == 0, output
    one, two = (json.loads((tmp_path / name / "eval.json").read_text()) for name in "ab")
    assert one["corruptions"]["top1"]["darkness"] == [pytest.approx(two["metrics"]["top1"])]
    assert one["corruptions"]["clean"] != two["metrics"]["top1"]


@pytest.mark.slow
def test_interrupted_evaluation_goes_on(command, run, monkeypatch):
    original, calls = robustness.predictions, []

    def predictions(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(robustness, "predictions", predictions)
    code, output = command("eval", "run", *FEW)
    assert code == 130
    assert "1 of 2 corruptions are done; the same command goes on from there." in output
    assert (run / "eval" / "eval.json").exists()  # the figures without corruption
    code, output = command("eval", "run", *FEW)
    assert code == 0, output
    assert "Continues: 1 of 2 corruptions are done." in output
    assert len(calls) == 3
    code, output = command("eval", "run", *FEW)  # a finished evaluation is made anew
    assert len(calls) == 5
    assert "Continues" not in output


@pytest.mark.slow
def test_parts_of_another_evaluation_are_not_used(command, run):
    (run / "eval").mkdir()
    (run / "eval" / "corruptions.part.json").write_text(json.dumps({"identity": "x", "rows": {"fog": [0.0, 0.0]}}))
    code, output = command("eval", "run", *FEW)
    assert code == 0, output
    assert "Continues" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["robustness=corruption"], "robustness=corruption is not allowed: it has to be none, corruptions or imagenet"),
        (["corruptions=[fog]"], "corruptions=['fog'] needs robustness=corruptions: add it"),
        (["severities=[1]"], "severities=[1] needs robustness=corruptions"),
        (["robustness=corruptions", "severities=[6]"], "severities=[6] is not allowed"),
        (["robustness=corruptions", "severities=[]"], "severities=[] is not allowed"),
        (
            ["robustness=corruptions", "corruptions=[frog]"],
            "there is no 'frog': did you mean fog? There are gaussian_noise",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_message(command, words, message):
    code, output = command("eval", *words)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_robustness_is_for_classifiers(compose):
    with pytest.raises(
        UserError, match="robustness=corruptions is for task=classify, not for task=detect: leave it out"
    ):
        config.check(compose("task=detect", "robustness=corruptions", name="eval"))


@pytest.mark.slow
def test_no_interrupt_is_lost_between_corruptions(command, finished, monkeypatch):
    """Python ignores Ctrl-C while an iterator is deleted, so its workers have ended before."""
    iterator, ended = dataloader._MultiProcessingDataLoaderIter, []
    delete = iterator.__del__
    monkeypatch.setattr(iterator, "__del__", lambda self: (ended.append(self._shutdown), delete(self)))
    words = ("robustness=corruptions", "corruptions=[jpeg,fog]", "severities=[1]", "data.num_workers=1", "out=eval")
    code, output = command("eval", finished, *words)
    gc.collect()
    assert code == 0, output
    assert ended == [True, True, True]
