"""zoo-eval and zoo-predict for detectors and segmentors. All slow, 1 min."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file

from zoo.messages import UserError
from zoo.recipes import report, tasks
from zoo.recipes.commands import predict as command
from zoo.recipes.inputs import Inputs
from zoo.recipes.run_weights import save_weights

evaluation = tasks.load("detect", "evaluate")
predict = tasks.load("detect", "predict")

from zoo.recipes.dense.confusion import Confusion  # noqa: E402

pytestmark = pytest.mark.slow

TASKS = ("detect", "segment")


# zoo-eval.


@pytest.fixture(scope="module")
def evaluate(compose):
    """Evaluate a run folder in this process; returns the figures."""

    def run(folder, out, *overrides):
        cfg = compose(f"run={folder}", f"out={out}", *overrides, name="eval")
        keys = [override.partition("=")[0].lstrip("+") for override in overrides]
        return evaluation.evaluate(cfg, ["run", "out", *keys], report.write_or_warn)

    return run


@pytest.fixture(scope="module")
def evaluated(evaluate, finished_dense, tmp_path_factory):
    """The output folders of evaluations of the finished runs, by task."""
    folders = {task: tmp_path_factory.mktemp("evaluated") for task in TASKS}
    for task, folder in folders.items():
        evaluate(finished_dense[task], folder, "per_class=true")
    return folders


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_repeats_the_runs_own(evaluated, finished_dense, summary, task):
    found = json.loads((evaluated[task] / "eval.json").read_text())
    assert found["metrics"] == summary(finished_dense[task])["metrics"]
    assert found["weights"] == str(finished_dense[task] / "model.safetensors")
    assert found["data"]["images"] == 4


@pytest.mark.parametrize(("task", "name"), [("detect", "precision_recall.png"), ("segment", "confusion.png")])
def test_evaluation_draws(evaluated, task, name):
    for path in (evaluated[task] / name, evaluated[task] / "predictions.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_evaluation_has_every_class_of_a_detector(evaluated):
    found = json.loads((evaluated["detect"] / "eval.json").read_text())["per_class"]
    assert list(found) == list("0123456789")
    assert {tuple(values) for values in found.values()} == {("bbox_AP", "bbox_AP50", "mask_AP", "mask_AP50")}
    # The four scenes lack some digits.
    missing = [name for name, values in found.items() if values["bbox_AP"] is None]
    assert 0 < len(missing) < 10


def test_classes_of_a_detector_average_to_its_figures(evaluated):
    found = json.loads((evaluated["detect"] / "eval.json").read_text())
    for name in ("bbox_AP", "bbox_AP50", "mask_AP", "mask_AP50"):
        values = [row[name] for row in found["per_class"].values() if row[name] is not None]
        assert np.mean(values) == pytest.approx(found["metrics"][name], abs=0.06)  # mmdet rounds


def test_classes_of_a_segmentor_average_to_its_figures(evaluated):
    found = json.loads((evaluated["segment"] / "eval.json").read_text())
    assert list(found["per_class"]) == ["background", *"0123456789"]
    values = [row["IoU"] for row in found["per_class"].values() if row["IoU"] is not None]
    assert np.mean(values) == pytest.approx(found["metrics"]["mIoU"], abs=0.02)  # mmseg rounds


def test_confusion_counts_pixels():
    metric = Confusion(classes=3, ignore_index=255)
    true, found = torch.tensor([[0, 1, 2], [2, 255, 1]]), torch.tensor([[0, 2, 2], [1, 1, 1]])
    sample = {"pred_sem_seg": {"data": found}, "gt_sem_seg": {"data": true}}
    metric.process(None, [sample, sample])
    total = metric.compute_metrics(metric.results)["confusion"]
    assert total.tolist() == [[2, 0, 0], [0, 2, 2], [0, 2, 2]]


def test_evaluation_of_the_best_weights_on_another_split(evaluate, finished_dense, tmp_path, capsys):
    found = evaluate(finished_dense["detect"], tmp_path, "checkpoint=best", "data.val_split=test")
    assert found["weights"] == str(finished_dense["detect"] / "best.safetensors")
    images = {item["image_id"] for item in json.loads((tmp_path / "results.bbox.json").read_text())}
    assert images <= {1, 2, 3, 4}
    assert "test_dinat (" in capsys.readouterr().out


def test_evaluation_prints_classes_on_request(evaluate, finished_dense, tmp_path, capsys):
    evaluate(finished_dense["segment"], tmp_path, "per_class=true")
    assert "accuracy" in capsys.readouterr().out


def test_evaluation_of_a_detector_with_other_classes_is_refused(evaluate, finished_dense, digit_scenes, tmp_path):
    content = json.loads((digit_scenes / "annotations" / "instances_val.json").read_text())
    content["categories"][3]["name"] = "drei"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"other.json has other classes than the 10.*1 missing, '3'; 1 unknown, 'drei'"):
        evaluate(finished_dense["detect"], tmp_path, f"data.val_ann={tmp_path / 'other.json'}")


def test_evaluation_of_a_segmentor_with_other_classes_is_refused(evaluate, finished_dense, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(["background", *"012345678", "nine"]))
    with pytest.raises(UserError, match=r"has other classes than the training, label 10 is 'nine' and was '9'"):
        evaluate(finished_dense["segment"], tmp_path, f"data.class_map={tmp_path / 'names.txt'}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint=third", "checkpoint=third is not allowed: it has to be last or best"),
        ("dense.small=false", r"the weights in .*model.safetensors do not fit test_dinat: .*size mismatch"),
    ],
)
def test_evaluation_refuses(evaluate, finished_dense, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        evaluate(finished_dense["detect"], tmp_path, override)


def test_evaluation_needs_a_run(compose):
    with pytest.raises(UserError, match="nothing to evaluate: give run=<folder> of a run with task=detect"):
        evaluation.evaluate(compose("task=detect", name="eval"), [])


@pytest.fixture
def blind(finished_dense, tmp_path):
    """A run whose detector finds nothing."""
    folder = tmp_path / "blind"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((finished_dense["detect"] / "config.yaml").read_bytes())
    weights = load_file(finished_dense["detect"] / "model.safetensors")
    weights["roi_head.bbox_head.fc_cls.bias"][-1] = 100.0  # background
    save_weights(folder / "model.safetensors", weights, "test_dinat", list("0123456789"))
    return folder


def test_evaluation_of_a_detector_that_finds_nothing(evaluate, blind, tmp_path):
    found = evaluate(blind, tmp_path / "out", "per_class=true")
    assert {value for row in found["per_class"].values() for value in row.values()} == {0.0, None}
    assert (tmp_path / "out" / "precision_recall.png").exists()


# zoo-predict.


@pytest.fixture(scope="module")
def photos(digit_scenes, tmp_path_factory):
    """Two folders of images of the same names, one below the other; and one name with two endings."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    scenes = sorted((digit_scenes / "images" / "val").iterdir())
    for path, name in zip(scenes, ("a.png", "b.png", "more/a.png", "a.bmp"), strict=True):
        Image.open(path).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def run_predict(finished_dense):
    """Predict with a finished run in this process."""

    def run(task, inputs, out, **settings):
        cfg = command.PredictConfig(run=str(finished_dense[task]), device="cpu", **settings)
        predict.predict(cfg, Inputs(inputs, out), out)
        return out

    return run


@pytest.fixture(scope="module")
def predicted(run_predict, photos, tmp_path_factory):
    """The output folders for `photos`, by task."""
    return {task: run_predict(task, [photos], tmp_path_factory.mktemp("out") / task, score=0.06) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_every_image_has_a_picture(predicted, task):
    found = {str(path.relative_to(predicted[task])) for path in predicted[task].rglob("*.png")}
    pictures = {"a.png", "a_png.png", "b.png", "more/a.png"}
    assert found == pictures | ({f"labels/{name}" for name in pictures} if task == "segment" else set())


def test_objects_are_coco(predicted, photos):
    truth = COCO(str(predicted["detect"] / "predictions.json"))
    assert sorted(image["file_name"] for image in truth.imgs.values()) == ["a.bmp", "a_png.png", "b.png", "more/a.png"]
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list("0123456789")
    assert truth.anns
    for item in truth.anns.values():
        assert 0.06 <= item["score"] <= 1
        assert truth.annToMask(item).shape == (128, 128)
        assert item["area"] == truth.annToMask(item).sum()
        left, top, width, height = item["bbox"]
        assert 0 <= left <= left + width <= 128
        assert 0 <= top <= top + height <= 128


def test_objects_are_those_of_the_evaluation(run_predict, evaluated, digit_scenes, tmp_path):
    out = run_predict("detect", [digit_scenes / "images" / "val"], tmp_path / "out", score=0.0)
    written = json.loads((out / "predictions.json").read_text())["annotations"]
    scored = json.loads((evaluated["detect"] / "results.segm.json").read_text())
    assert len(written) == len(scored) > 0
    for one, two in zip(written, scored, strict=True):
        assert (one["image_id"] + 1, one["category_id"], one["score"]) == (
            two["image_id"],
            two["category_id"],
            pytest.approx(two["score"]),
        )
        assert coco_mask.iou([one["segmentation"]], [two["segmentation"]], [0]).item() == 1 or one["area"] == 0


def test_fewer_objects_at_a_higher_score(run_predict, photos, tmp_path):
    out = run_predict("detect", [photos / "a.png"], tmp_path / "out", score=1.0)
    content = json.loads((out / "predictions.json").read_text())
    assert content["annotations"] == []
    assert len(content["images"]) == 1


def test_labels_are_classes(predicted):
    assert (predicted["segment"] / "classes.txt").read_text().split() == ["background", *"0123456789"]
    with Image.open(predicted["segment"] / "labels" / "more" / "a.png") as labels:
        assert (labels.mode, labels.size) == ("L", (128, 128))
        assert np.asarray(labels).max() < 11


@pytest.fixture
def odd(digit_scenes, tmp_path):
    """Images of several kinds, 90x60: rotated by its EXIF data, grey, with transparency, a palette."""
    folder = tmp_path / "odd"
    folder.mkdir()
    image = Image.open(digit_scenes / "images" / "val" / "0000.png").resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(folder / "turned.jpg", exif=exif)
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(folder / f"{mode}.png")
    return folder


def test_labels_have_the_size_of_images_of_every_kind(run_predict, odd, tmp_path):
    out = run_predict("segment", [odd], tmp_path / "out")
    sizes = {path.stem: Image.open(path).size for path in (out / "labels").iterdir()}
    assert sizes == {"turned": (60, 90), "L": (90, 60), "RGBA": (90, 60), "P": (90, 60)}
    assert {path.stem: Image.open(path).size for path in out.glob("*.png")}["turned"] == (384, 576)


def test_objects_have_the_size_of_images_of_every_kind(run_predict, odd, tmp_path):
    out = run_predict("detect", [odd], tmp_path / "out", score=0.0)
    content = json.loads((out / "predictions.json").read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    assert sorted(sizes.values()) == [[60, 90]] * 3 + [[90, 60]]
    assert content["annotations"]
    assert all(item["segmentation"]["size"] == sizes[item["image_id"]] for item in content["annotations"])


def test_corrupt_image_is_named_and_the_others_written(run_predict, photos, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    (tmp_path / "in" / "text.jpg").write_text("quota exceeded")
    (tmp_path / "in" / "whole.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"2 of 3 files can't be read as images, beginning with .*broken.png"):
        run_predict("detect", [tmp_path / "in"], tmp_path / "out", score=0.0)
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["whole.png"]
    assert {item["image_id"] for item in content["annotations"]} <= {0}
    assert (tmp_path / "out" / "whole.png").exists()


@pytest.mark.parametrize("task", TASKS)
def test_odd_images_do_not_end_a_folder(run_predict, photos, tmp_path, task):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    for name, size in (("high", (1, 60000)), ("one", (1, 1)), ("wide", (60000, 1)), ("long", (190, 1))):
        Image.new("L", size).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "whole.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"^3 of 6 files can't be read as images, beginning with .*high.png"):
        run_predict(task, [tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out" / {"detect": "predictions.json", "segment": "classes.txt"}[task]).exists()
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"long.png", "one.png", "whole.png"}


def test_image_that_the_model_can_not_take(run_predict, photos, tmp_path, monkeypatch):
    original = predict.pseudo_collate

    def collate(batch):
        if "b.png" in batch[0]["data_samples"].img_path:
            raise torch.OutOfMemoryError("no memory")
        return original(batch)

    monkeypatch.setattr(predict, "pseudo_collate", collate)
    with pytest.raises(UserError, match=r"^1 of 4 files are images that the model can't take, beginning with .*b.png"):
        run_predict("detect", [photos], tmp_path / "out")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.bmp", "a_png.png", "more/a.png"]


@pytest.mark.parametrize(("classes", "mode"), [(256, "L"), (257, "I;16"), (1000, "I;16")])
def test_labels_of_many_classes(tmp_path, classes, mode):
    found = SegDataSample(pred_sem_seg=PixelData(data=torch.tensor([[[0, classes - 1]]])))
    written = predict._Written(OmegaConf.create({"task": "segment"}), tmp_path, [str(i) for i in range(classes)], 0.5)
    written.add(Path("a.jpg"), Image.new("RGB", (2, 1)), found, Image.new("RGB", (2, 1)))
    with Image.open(tmp_path / "labels" / "a.png") as labels:
        assert labels.mode == mode
        assert np.asarray(labels).tolist() == [[0, classes - 1]]


def test_input_that_does_not_exist(run_predict, tmp_path):
    with pytest.raises(UserError, match=r"none.jpg does not exist: .* Give images or folders, and the output"):
        run_predict("detect", [tmp_path / "none.jpg"], tmp_path / "out")


def test_folder_without_images(run_predict, tmp_path):
    with pytest.raises(UserError, match=r"the folder .* has no images \(.*\.jpg"):
        run_predict("detect", [tmp_path], tmp_path / "out")


@pytest.mark.parametrize("inputs", [["."], ["a.jpg", "labels"]], ids=["by pictures", "by labels"])
def test_images_are_not_written_over(run_predict, photos, tmp_path, inputs):
    (tmp_path / "labels").mkdir()
    for name in ("a.jpg", "b.png", "labels/a.png"):
        (tmp_path / name).write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"the image .*png would be overwritten: give another output folder"):
        run_predict("segment", [tmp_path / name for name in inputs], tmp_path / "labels" / "..")
    assert {path.read_bytes() for path in tmp_path.rglob("*.*")} == {(photos / "a.png").read_bytes()}


def test_pictures_of_an_earlier_call_are_not_images(run_predict, photos, tmp_path):
    (tmp_path / "a.png").write_bytes((photos / "a.png").read_bytes())
    for _ in range(2):
        run_predict("segment", [tmp_path], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["a.png"] * 3


def test_output_folder_that_can_not_be_made(run_predict, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the folder .*file/out can't be written to"):
        run_predict("detect", [photos / "a.png"], tmp_path / "file" / "out")


# The command line.


def test_command_writes(call_predict, finished_dense, photos, tmp_path):
    run = finished_dense["segment"]
    code, output = call_predict(f"run={run}", "device=cpu", photos / "a.png", photos / "b.png", tmp_path / "out")
    assert code == 0, output
    assert "2 images: labels of all pixels. Written to" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "b.png", "labels", "classes.txt"}


def test_command_reads_the_best_weights(call_predict, finished_dense, photos, tmp_path):
    run = finished_dense["detect"]
    code, output = call_predict(
        f"run={run}", "checkpoint=best", "device=cpu", "score=0", photos / "a.png", tmp_path / "out"
    )
    assert code == 0, output
    assert "1 images: " in output


def test_command_fails_with_a_corrupt_image(call_predict, finished_dense, tmp_path):
    (tmp_path / "a.png").write_text("")
    code, output = call_predict(f"run={finished_dense['detect']}", "device=cpu", tmp_path / "a.png", tmp_path / "out")
    assert code == 1
    assert "a.png can't be read as an image" in output
    assert "zoo-predict: error: 1 of 1 files can't be read" in output


def test_file_with_an_equals_sign_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.png").write_text("")
    cfg, inputs, out = command.parse(["run=here", "a=b.png", "out"])
    assert ([path.name for path in inputs], out.name, cfg.run) == (["a=b.png"], "out", "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.png", "out"), "run is not set: give the folder of a run"),
        (("run=x", "out"), "give the images (files or folders) and then the output folder"),
        (("run=x", "scor=1", "a.png", "out"), "there is no key 'scor': did you mean score? There are run, checkpoint"),
        (
            ("run=x", "zzzz=1", "a.png", "out"),
            "there is no key 'zzzz'. There are run, checkpoint, score, temperature, device",
        ),
        (("run=x", "score=2", "a.png", "out"), "score=2.0 is not allowed: it has to be between 0 and 1"),
        (("run=x", "score=-1", "a.png", "out"), "score=-1.0 is not allowed"),
        (("run=x", "score=nan", "a.png", "out"), "score=nan is not allowed"),
        (("run=x", "score=high", "a.png", "out"), "score=high: "),
        (("run=x", "a.png", "out"), "there is no run folder x: "),
        (("run=.", "a.png", "out"), ". is not the folder of a run: it has no config.yaml"),
    ],
    ids=range(10),
)
def test_command_refuses(call_predict, words, message):
    code, output = call_predict(*words)
    assert code == 1
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_command_refuses_another_checkpoint(call_predict, finished_dense, photos, tmp_path):
    code, output = call_predict(f"run={finished_dense['detect']}", "checkpoint=x", photos / "a.png", tmp_path / "out")
    assert code == 1
    assert "checkpoint=x is not allowed: it has to be last or best" in output


def test_command_refuses_a_device_that_is_not_there(call_predict, finished_dense, photos, tmp_path):
    run = finished_dense["detect"]
    code, output = call_predict(f"run={run}", "device=mps", photos / "a.png", tmp_path / "out")
    assert code == 1
    assert "device=mps: torch" in output


@pytest.mark.parametrize(("words", "expected"), [((), 2), (("--help",), 0), (("-h",), 0)])
def test_command_explains_itself(call_predict, words, expected):
    code, output = call_predict(*words)
    assert code == expected
    assert "zoo-predict run=runs/<folder> photos/ out/" in output
    assert "score=" in output
