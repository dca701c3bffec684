"""zoo-export of detectors and segmentors: what the files return, and what is refused. Seconds, long ones 2 min."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import tasks
from zoo.tools import export as command

export = tasks.load("segment", "export")
evaluate = tasks.load("detect", "evaluate")
models = tasks.load("detect", "model")

from mmseg.models import EncoderDecoder  # noqa: E402

from zoo.recipes.dense.pipelines import pipelines  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "onnx_boxes.py"


@pytest.fixture
def exported(fit_dense, tmp_path, capsys):
    """Train for two updates and export in this process; returns what the command says, the run and the file."""

    def call(task, method, *options, form="onnx"):
        run, file = tmp_path / "run", tmp_path / f"model.{form}"
        fit_dense(run, f"dense.method={method}", "model=test_van", task=task)
        capsys.readouterr()
        command.main([str(run), "-o", str(file), "--json", *options])
        return json.loads(capsys.readouterr().out), run, file

    return call


@pytest.fixture
def opened(digit_scenes, compose):
    """A photo and the prediction of a run's model for it: as zoo-predict makes it, or by mmseg, with its logits."""

    def call(run, **test):
        model, cfg, _, _ = evaluate.from_run(compose(f"run={run}", name="eval"))
        if test:
            model.bbox_head.test_cfg.update(test)
        photo = next((digit_scenes / "images" / "val").glob("*.png"))
        image = np.asarray(Image.open(photo).convert("RGB"))
        size = image.shape[:2]
        data = {"img": image[..., ::-1], "img_path": str(photo), "img_id": 0, "ori_shape": size, "img_shape": size}
        steps = [step for step in pipelines(cfg, False)[1] if not step["type"].startswith("Load")]
        batch = pseudo_collate([Compose(steps)(data)])
        with torch.no_grad():
            if isinstance(model.eval(), EncoderDecoder):
                return photo, EncoderDecoder.predict(model, **model.data_preprocessor(batch, False))[0]
            return photo, model.test_step(batch)[0]

    return call


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.long
def test_boxes_of_the_example_are_the_detectors(exported, opened, tmp_path, monkeypatch):
    said, run, file = exported("detect", "retinanet")
    assert [check["shape"] for check in said["checks"]] == [[1, 3, 128, 128], [3, 3, 160, 224]]
    assert said["input"]["shape"] == ["batch", 3, "height", "width"]
    assert said["fixed"] == []
    assert (said["outside"], said["classes"]) == ("NMS", list("0123456789"))
    scores, boxes = session(file).run(None, {"images": np.zeros((2, 3, 96, 160), np.float32)})
    assert (scores.shape[0], scores.shape[2], boxes.shape) == (2, 10, (*scores.shape[:2], 4))
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert boxes.max() <= 160

    photo, found = opened(run, score_thr=0.0, max_per_img=20)
    least = found.pred_instances.scores.min().item() - 1e-6
    monkeypatch.setattr(sys, "argv", ["onnx_boxes", str(file), str(photo), str(tmp_path / "found.png")])
    variables = {"__name__": "__main__"}
    exec(EXAMPLE.read_text().replace("LEAST = 0.5", f"LEAST = {least}"), variables)
    want = found.pred_instances
    got = variables["found"][: len(want)]
    assert len(got) == 20
    assert [name for name, _, _ in got] == [said["classes"][label] for label in want.labels]
    np.testing.assert_allclose([score for _, score, _ in got], want.scores, atol=1e-4)
    np.testing.assert_allclose([box for _, _, box in got], want.bboxes, atol=2e-2)
    assert np.asarray(Image.open(tmp_path / "found.png")).std() > 5


@pytest.mark.long
@pytest.mark.parametrize(("method", "form"), [("upernet", "onnx"), ("semantic_fpn", "pt2")])
def test_segmentor_labels_pixels_as_in_mmseg(exported, opened, method, form):
    said, run, file = exported("segment", method, "--size", "96", "160", form=form)
    assert said["fixed"] == []
    assert said["outputs"] == [{"name": "logits", "shape": ["batch", 11, 96, 160]}]
    assert (said["ignore_index"], said["classes"][0], said["size_divisor"]) == (255, "background", 32)
    photo, found = opened(run)
    mean, std = (said["preprocessing"][name] for name in ("mean", "std"))
    pixels = (np.asarray(Image.open(photo).convert("RGB")) / 255 - mean) / std
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    if form == "onnx":
        (logits,) = session(file).run(None, {"images": images})
    else:
        logits = torch.export.load(file).module()(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(logits[0], found.seg_logits.data, atol=1e-4)
    assert (logits[0].argmax(0) == found.pred_sem_seg.data[0].numpy()).mean() > 0.999


@pytest.mark.long
def test_two_stages_end_with_the_proposals(exported, compose):
    said, run, file = exported("detect", "mask_rcnn", "--static", form="pt2")
    names = ["objectness", "proposals", *(f"features_{i}" for i in range(4))]
    assert [output["name"] for output in said["outputs"]] == names
    assert (said["outside"], said["feature_strides"]) == ("NMS and the RoI heads", [4, 8, 16, 32])
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    objectness, proposals, *features = torch.export.load(file).module()(images)
    assert [x.shape[2] for x in features] == [32, 16, 8, 4]
    assert proposals.shape == (*objectness.shape, 4)
    model = evaluate.from_run(compose(f"run={run}", name="eval"))[0].eval()
    with torch.no_grad():
        sample = DetDataSample(metainfo={"img_shape": (128, 128)})
        [kept] = model.rpn_head.predict(model.extract_feat(images), [sample])
    assert len(kept) > 10
    distance, index = torch.cdist(kept.bboxes, proposals[0], p=1).min(1)
    assert distance.max() < 2e-2
    torch.testing.assert_close(objectness[0, index], kept.scores, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"), [("detect", "dino"), ("detect", "mask2former"), ("segment", "mask2former")]
)
def test_refuses_what_the_exporters_can_not_follow(compose, task, method):
    tasks.load(task, "model")
    cfg = compose(f"task={task}", f"dense.method={method}", "model=test_van")
    model = models.build_model(cfg, ["a", "b"], torch.device("cpu"), pretrained=False)
    with pytest.raises(
        UserError, match=rf"runs/x is a run of {method}, whose deformable attention .* retinanet can be"
    ):
        export._exportable(model, cfg, Path("runs/x"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features"], "--features"),
        (["--num-classes", "3"], "the number of classes"),
        (["--pretrained"], "the pretrained weights"),
    ],
)
def test_refuses_options_of_classifiers(tmp_path, capsys, options, words):
    (tmp_path / "config.yaml").write_text("task: segment\nmodel: test_van\n")
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), "-o", str(tmp_path / "model.onnx"), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"is the run folder of a detector or segmentor, which is exported as it is: leave out {words}." in error
    assert not (tmp_path / "model.onnx").exists()
