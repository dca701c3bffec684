"""Calibration, temperature and interval: figures, messages, zoo-eval and zoo-predict. 3 s; the slow ones 15 s."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from scipy.stats import binomtest

from zoo.recipes.classify import calibration


def _random(count, classes=7, scale=1.0, seed=0):
    """Logits (count, classes), and labels that are drawn with the probabilities of softmax(logits / scale)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(logits, axis=1)])
    return (scale * logits).astype(np.float32), labels


# Scores.


def test_scores_of_a_case_by_hand():
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right) and 0.5 (a tie, which the first class wins: right).
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    found = calibration.scores(np.log(p), np.array([0, 1, 1, 0]), bins=10)
    # Bins (0.8, 0.9]: |1 - 1.8|; (0.5, 0.6]: |1 - 0.6|; (0.4, 0.5]: |1 - 0.5|.
    assert found["ece"] == pytest.approx(100 * (0.8 + 0.4 + 0.5) / 4)
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.5]).mean())
    assert found["brier"] == pytest.approx((0.02 + 1.62 + 0.32 + 0.5) / 4)
    assert [row[0] for row in found["diagram"]] == [0, 0, 0, 0, 1, 1, 0, 0, 2, 0]
    assert found["diagram"][8] == [2, pytest.approx(0.9), 0.5]
    assert found["diagram"][0] == [0, None, None]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_scores_match_an_independent_computation(monkeypatch, temperature):
    monkeypatch.setattr(calibration, "_CHUNK", 37)
    logits, labels = _random(500)
    p = softmax(logits.astype(np.float64) / temperature, axis=1)
    ece = 0.0
    for b in range(calibration.BINS):
        inside = [i for i in range(500) if b / calibration.BINS < p[i].max() <= (b + 1) / calibration.BINS]
        if inside:
            accuracy = sum(p[i].argmax() == labels[i] for i in inside) / len(inside)
            ece += len(inside) / 500 * abs(accuracy - sum(p[i].max() for i in inside) / len(inside))
    found = calibration.scores(logits, labels, temperature)
    assert found["ece"] == pytest.approx(100 * ece)
    assert found["brier"] == pytest.approx(np.mean(((p - np.eye(7)[labels]) ** 2).sum(1)))
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(500), labels]).mean())


def test_certain_and_right_is_perfect():
    found = calibration.scores(1000 * np.eye(3, dtype=np.float32), np.arange(3))
    assert (found["ece"], found["nll"], found["brier"]) == (0, 0, 0)


# Temperature.


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_temperature_recovers_the_scale(scale):
    logits, labels = _random(20_000, scale=scale)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(scale, rel=0.03)


def test_temperature_has_the_lowest_loss():
    logits, labels = _random(300, scale=3.0)
    fitted = calibration.fit_temperature(logits, labels)
    losses = {t: calibration.scores(logits, labels, t)["nll"] for t in (fitted / 1.01, fitted, 1.01 * fitted)}
    assert min(losses, key=losses.get) == fitted


def test_temperature_improves_the_other_half():
    found = calibration.calibrate(*_random(2000, scale=3.0), seed=0)
    assert found["temperature"] == pytest.approx(3, rel=0.1)
    assert found["after"]["ece"] < found["before"]["ece"] / 3
    assert found["after"]["nll"] < found["before"]["nll"]
    assert (found["images"], found["fitted_on"]) == (2000, 1000)


def test_temperature_that_makes_the_loss_higher_is_not_recommended():
    logits = np.full((200, 2), (2.0, 0.0), dtype=np.float32)
    fitted, other = calibration.halves(np.zeros(200, dtype=int), 0)
    logits[fitted[0]], logits[other[:30]] = (0.0, 0.1), (0.0, 2.0)  # one mistake, and thirty
    found = calibration.calibrate(logits, np.zeros(200, dtype=int), seed=0)
    assert found["after"]["nll"] > found["before"]["nll"]
    assert calibration.describe(found).endswith(f" -> {found['after']['nll']:.4f}: do not use it")
    found = calibration.calibrate(*_random(2000, scale=3.0), seed=0)
    assert "do not use it" not in calibration.describe(found)


def test_halves_are_stratified_and_depend_on_the_seed():
    labels = np.repeat(np.arange(5), [1, 2, 7, 40, 51])
    one, two = calibration.halves(labels, 0)
    assert sorted([*one, *two]) == list(range(101))
    assert np.abs(np.bincount(labels[one], minlength=5) - np.bincount(labels[two], minlength=5)).max() <= 1
    assert one.tolist() == calibration.halves(labels, 0)[0].tolist() != calibration.halves(labels, 1)[0].tolist()


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        (np.eye(2)[[0, 1] * 49], np.array([0, 1] * 49), "it takes 100 images or more"),
        (np.eye(2)[[0, 1] * 60], np.array([0, 1] * 60), "the lower it is, the more likely are the labels of the 60"),
        (np.eye(2)[[0, 1] * 60], np.array([1, 0] * 60), "the higher it is, the more likely are the labels of the 60"),
    ],
    ids=["few images", "all right", "all wrong"],
)
def test_temperature_that_is_not_fitted_has_a_reason(logits, labels, reason, tmp_path):
    found = calibration.calibrate(logits, labels, seed=0)
    assert found["temperature"] is found["before"] is found["after"] is None
    assert reason in found["reason"]
    assert re.search(r"ECE [\d.]+ % \(15 bins\), .* No temperature is fitted: ", calibration.describe(found))
    calibration.plot_reliability(tmp_path / "a.png", found)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width < 600  # one panel


# Interval.


@pytest.mark.parametrize(
    ("right", "images"), [(0, 1), (1, 1), (0, 20), (20, 20), (13, 40), (356, 360), (49_999, 50_000)]
)
def test_interval_is_scipys(right, images):
    wanted = binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert calibration.interval(right, images) == (pytest.approx(100 * wanted.low), pytest.approx(100 * wanted.high))


# Commands.


@pytest.fixture(scope="module")
def unsure(fit, make_folder, tmp_path_factory):
    """A run that is evaluated on 102 images, of which it gets some wrong."""
    folder = tmp_path_factory.mktemp("unsure")
    classes = ("day", "night", "dusk")
    make_folder(folder / "data" / "train", classes)
    val = make_folder(folder / "data" / "val", classes, per_class=34, seed=1)
    for name, wrong in zip(classes, ("night", "dusk", "day"), strict=True):
        for path in sorted((val / name).iterdir())[:5]:
            path.rename(val / wrong / f"of {name} {path.name}")
    fit(folder / "run", folder / "data", "trainer.max_updates=2")
    return folder / "run"


@pytest.mark.slow
def test_journey_from_evaluation_to_prediction(command, unsure, tmp_path):
    shutil.copytree(unsure, tmp_path / "run")
    code, output = command("eval", "run", "out=eval", "data.num_workers=0")
    assert code == 0, output
    said = re.search(r"top-1 ([\d.]+) % \(95 % interval: ([\d.]+) to ([\d.]+) %\),", output)
    assert float(said[2]) < float(said[1]) < float(said[3])
    written = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert written["top1_interval"] == [pytest.approx(float(said[i]), abs=0.01) for i in (2, 3)]
    found = written["calibration"]
    assert found["all"]["nll"] == pytest.approx(written["metrics"]["loss"], rel=1e-4)
    line = re.search(r"Calibration: .* Temperature ([\d.]+), fitted on 51 of the images: on the other 51, ECE", output)
    assert float(line[1]) == pytest.approx(found["temperature"], rel=1e-3)
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "Reliability diagram" in page
    assert f"95 % interval: {said[2]} to {said[3]} %" in page
    assert "on 51 images that it is not fitted on" in page
    worse = found["after"]["nll"] > found["before"]["nll"]
    assert worse == (": do not use it" in output) == (": do not use it" in page)
    assert '<img class="picture"' in page  # two diagrams

    photos = unsure.parent / "data" / "val" / "day"
    for name, words in {"plain": (), "scaled": (f"temperature={line[1]}",)}.items():
        code, output = command("predict", "run=run", photos, name, "device=cpu", *words)
        assert code == 0, output
    plain, scaled = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("plain", "scaled"))
    assert (plain["temperature"], scaled["temperature"]) == (1, float(line[1]))
    for one, two in zip(plain["images"], scaled["images"], strict=True):
        before = {entry["class"]: entry["probability"] for entry in one["predictions"]}
        after = {entry["class"]: entry["probability"] for entry in two["predictions"]}
        wanted = softmax(np.log([before[name] for name in after]) / scaled["temperature"])
        assert list(after.values()) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_few_images_have_an_interval_but_no_temperature(command, finished, tmp_path):
    code, output = command("eval", finished, "out=eval")
    assert code == 0, output
    assert "No temperature is fitted: it takes 100 images or more" in output
    assert '<img class="picture small"' in (tmp_path / "eval" / "report.html").read_text()  # it is not enlarged


@pytest.mark.slow
def test_too_many_logits_are_not_kept(command, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "MOST_LOGITS", 44)  # 15 images of 3 classes are 45
    code, output = command("eval", finished, "out=eval")
    assert code == 0, output
    assert "The calibration is not measured: images x classes are more than 44." in output
    assert "calibration" not in json.loads((tmp_path / "eval" / "eval.json").read_text())


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_temperature_that_is_not_allowed(call_predict, value):
    code, output = call_predict("run=x", f"temperature={value}", "a.png", "out")
    assert code == 1
    assert "is not allowed: it has to be above 0" in output


@pytest.mark.slow
def test_temperature_is_for_classifiers(call_predict, finished_dense, digit_scenes, tmp_path):
    photos = digit_scenes / "images" / "val"
    code, output = call_predict(f"run={finished_dense['segment']}", "temperature=2", photos, tmp_path / "out")
    assert code == 1
    assert "temperature=2 is for classifiers, which" in output
