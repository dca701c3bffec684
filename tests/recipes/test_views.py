"""Test-time augmentation, windows and large images: against mmseg's and mmdet's own, and by the commands. 1 min."""

import json

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from omegaconf import OmegaConf
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import tasks
from zoo.recipes.run_weights import save_weights

tasks.load("segment", "predict")
tasks.load("detect", "predict")

from mmengine.registry import init_default_scope  # noqa: E402  after mmcv's operators are there
from mmengine.structures import InstanceData  # noqa: E402
from mmseg.models import EncoderDecoder, SegTTAModel  # noqa: E402
from mmseg.registry import MODELS, TRANSFORMS  # noqa: E402

from zoo.recipes.dense import detectors, segmentor, views  # noqa: E402
from zoo.recipes.dense.model import build_model, model_config  # noqa: E402
from zoo.recipes.dense.pipelines import pipelines  # noqa: E402
from zoo.recipes.dense.settings import check  # noqa: E402

CPU = torch.device("cpu")
CLASSES = [f"class {i}" for i in range(7)]
WINDOW = ("eval.window=[64,96]", "eval.stride=[40,50]")


@pytest.fixture(scope="module")
def configure(compose):
    """The configuration of a small segmentor or detector, and the model with fixed weights."""

    def run(*overrides, task="segment", classes=CLASSES):
        cfg = compose(f"task={task}", "model=test_van", "dense.scales=[96]", "dense.max_size=200", *overrides)
        check(cfg)
        torch.manual_seed(0)
        model = build_model(cfg, classes, CPU, pretrained=False).eval()
        for name, value in model.named_parameters():  # as initialised, all scores would be nearly equal
            if "conv_seg.weight" in name:
                torch.nn.init.normal_(value, std=0.2)
        return cfg, model

    return run


@pytest.fixture
def batch():
    """Load and collate a noisy image of `size` (height, width) as `cfg` says; `Views` holds the scope of its task."""

    def load(cfg, size=(75, 131)):
        init_default_scope("mmseg" if cfg.task == "segment" else "mmdet")
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
        data = {"img": pixels, "img_path": "x.png", "img_id": 0, "ori_shape": size, "img_shape": size}
        for step in views.without_loading(pipelines(cfg, False)[1]):
            data = TRANSFORMS.build(step)(data)
        return pseudo_collate([data])

    return load


def _mmseg(cfg, model):
    """mmseg's own segmentor with the weights of `model`."""
    settings = model_config(cfg, CLASSES, CPU, False)
    settings.type = "EncoderDecoder"
    init_default_scope("mmseg")
    theirs = MODELS.build(settings).eval()
    theirs.load_state_dict(model.state_dict())
    assert type(theirs) is EncoderDecoder
    return theirs


@torch.no_grad()
def _labels(model, data):
    [found] = model.test_step(data)
    return found.pred_sem_seg.data[0]


@pytest.mark.parametrize("window", [(), pytest.param(WINDOW, marks=pytest.mark.slow)], ids=["whole", "windows"])
@pytest.mark.parametrize("at_once", [1, 2**25], ids=["a class at a time", "all classes"])
def test_labels_are_those_of_mmseg(configure, batch, monkeypatch, window, at_once):
    monkeypatch.setattr(segmentor, "_AT_ONCE", at_once)
    cfg, model = configure("dense.method=semantic_fpn", *window)
    ours, theirs = (_labels(one, batch(cfg)) for one in (model, _mmseg(cfg, model)))
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 2
    assert ours.shape == (75, 131)


@pytest.mark.slow
@torch.no_grad()
def test_scores_of_mask2former_are_those_of_mmseg(configure, batch, monkeypatch):
    monkeypatch.setattr(segmentor, "_AT_ONCE", 1)
    cfg, model = configure("dense.method=mask2former", "dense.small=true")
    theirs = _mmseg(cfg, model).test_step(batch(cfg))[0].seg_logits.data
    found = []
    monkeypatch.setattr(segmentor.Segmentor, "_labels", lambda self, several: found.extend(several) or theirs[:1])
    model.test_step(batch(cfg))
    ours = torch.cat([found[0].scores(slice(i, i + 1)) for i in range(len(CLASSES))])
    torch.testing.assert_close(ours, theirs)  # sums over the queries, which torch adds in another order


@pytest.mark.slow
def test_average_is_that_of_mmseg(configure, batch, monkeypatch):
    monkeypatch.setattr(segmentor, "_AT_ONCE", 3 * 75 * 131)
    cfg, model = configure("eval.tta=multi_scale", "eval.scales=[0.75,1,1.5]")
    data = batch(cfg)
    assert [tuple(view[0].shape[1:]) for view in data["inputs"]] == [(72, 126)] * 2 + [(96, 168)] * 2 + [(144, 252)] * 2
    with torch.no_grad():
        [theirs] = SegTTAModel(module=_mmseg(cfg, model)).test_step(batch(cfg))
    ours = _labels(model, data)
    assert (ours == theirs.pred_sem_seg.data).float().mean() > 0.9999
    assert (ours != _labels(model, batch(configure()[0]))).any()


@pytest.mark.slow
@torch.no_grad()
def test_flip_averages_two_passes(configure, batch):
    cfg, model = configure("eval.tta=flip")
    data, theirs = batch(cfg), _mmseg(cfg, model)
    plain, mirrored = (theirs.test_step(one)[0].seg_logits.data for one in views.batches(batch(cfg)))
    by_hand = theirs.test_step(batch(configure()[0]))[0].seg_logits.data
    assert torch.equal(plain, by_hand)
    assert not torch.equal(plain, mirrored)
    average = (plain.softmax(0) + mirrored.softmax(0)) / 2
    assert (_labels(model, data) == average.argmax(0)).float().mean() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_one_view_is_the_plain_prediction(configure, batch, task):
    one = ("eval.tta=multi_scale", "eval.scales=[1]", "eval.flip=false")
    plain, model = configure("dense.small=true", task=task)
    cfg, _ = configure("dense.small=true", *one, task=task)
    with torch.no_grad():
        [ours], [theirs] = (model.test_step(batch(each)) for each in (cfg, plain))
    if task == "segment":
        assert torch.equal(ours.pred_sem_seg.data, theirs.pred_sem_seg.data)
    else:
        assert len(theirs.pred_instances)
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)
        assert torch.equal(ours.pred_instances.masks, theirs.pred_instances.masks)


def test_windows_cover_an_image():
    seen = np.zeros((75, 131), int)
    for top, left, bottom, right in views.boxes((75, 131), (64, 96), (40, 50)):
        assert (bottom - top, right - left) == (64, 96)
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1
    assert list(views.boxes((20, 131), (64, 131), (40, 50))) == [(0, 0, 20, 131)]


# Detection.


@pytest.fixture
def objects():
    """mmdet's result for one object with a mask that fills its box."""

    def make(*boxes, size, scores=None, labels=None):
        masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = True
        return InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor(scores or [0.9] * len(boxes)),
            labels=torch.tensor(labels or [0] * len(boxes)),
            masks=masks,
        )

    return make


class _Finds:
    """A detector that finds what `found` says for each input, in the order of the calls."""

    def __init__(self, found, **test_cfg):
        self.found, self.inputs, self.test_cfg = iter(found), [], test_cfg

    def test_step(self, data):
        self.inputs += data["inputs"]
        for sample in data["data_samples"]:
            sample.pred_instances = next(self.found)
        return data["data_samples"]


class _Detector(detectors.OfViews, _Finds):
    pass


def _sample(**meta):
    from mmdet.structures import DetDataSample

    return DetDataSample(metainfo={"ori_shape": (100, 200), "scale_factor": (1.0, 1.0), "flip": False, **meta})


def _result(model, *views_):
    images, samples = [[image] for image, _ in views_], [[sample] for _, sample in views_]
    single = len(views_) == 1
    data = {"inputs": images[0], "data_samples": samples[0]} if single else {"inputs": images, "data_samples": samples}
    [found] = model.test_step(data)
    return found.pred_instances


def test_objects_of_the_mirror_image_are_mirrored_back(objects):
    plain, mirrored = objects((10, 20, 50, 60), size=(100, 200)), objects((150, 20, 190, 60), size=(100, 200))
    mirrored.scores = torch.tensor([0.95])
    image, flipped = torch.zeros(3, 100, 200), _sample(flip=True, flip_direction="horizontal")
    found = _result(_Detector([plain, mirrored]), (image, _sample()), (image, flipped))
    assert found.bboxes.tolist() == [[10, 20, 50, 60]]
    assert found.scores.tolist() == pytest.approx([0.95])
    assert torch.equal(detectors_mask(found, 0), plain.masks[0])


def detectors_mask(found, number):
    from zoo.recipes.dense.pictures import as_mask

    return as_mask(found.masks[number])


def test_objects_of_windows_are_merged(objects):
    # An object in the overlap of two windows of 100 x 120 at 0 and 80, and one that the first window cuts off.
    left = objects((85, 10, 115, 40), (100, 50, 120, 90), size=(100, 120), scores=[0.9, 0.8])
    right = objects((5, 10, 35, 40), (20, 50, 100, 90), size=(100, 120), scores=[0.7, 0.6])
    model = _Detector([left, right], window=(100, 120), stride=(60, 80))
    found = _result(model, (torch.zeros(3, 100, 200), _sample()))
    assert [tuple(part.shape) for part in model.inputs] == [(3, 100, 120)] * 2
    assert found.bboxes.tolist() == [[85, 10, 115, 40], [100, 50, 180, 90]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert detectors_mask(found, 1).nonzero().amin(0).tolist() == [50, 100]
    assert detectors_mask(found, 1).sum() == 40 * 80


def test_objects_of_windows_are_scaled_to_the_image(objects):
    # The input has half the size of the image.
    parts = [objects((10, 20, 30, 40), size=(50, 60)), objects(size=(50, 60))]
    model = _Detector(parts, window=(50, 60), stride=(50, 40))
    found = _result(model, (torch.zeros(3, 50, 100), _sample(scale_factor=(0.5, 0.5))))
    assert found.bboxes.tolist() == [[20, 40, 60, 80]]
    assert detectors_mask(found, 0).shape == (100, 200)
    assert detectors_mask(found, 0).sum() == pytest.approx(1600, rel=0.02)


def test_image_without_objects(objects):
    nothing = [objects(size=(100, 120)), objects(size=(100, 120))]
    found = _result(_Detector(nothing, window=(100, 120), stride=(60, 80)), (torch.zeros(3, 100, 200), _sample()))
    assert len(found) == 0
    assert found.masks == []


# The commands.


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_evaluation_and_prediction(command, finished_dense, digit_scenes, tmp_path, task):
    run, name = finished_dense[task], {"segment": "mIoU", "detect": "mask_AP"}[task]
    few = ("mm.model.test_cfg.rcnn.max_per_img=20",) if task == "detect" else ()  # it finds 100 in each view
    several = ("eval.tta=multi_scale", "eval.scales=[1,1.5]")
    code, output = command("eval", f"run={run}", "trainer.device=cpu", f"out={tmp_path / 'tta'}", *several, *few)
    assert code == 0, output
    merged = {"segment": "averages", "detect": "merges"}[task]
    assert (
        f"eval.tta=multi_scale {merged} 4 predictions of each image: at 1, 1.5 times its size and mirrored." in output
    )
    found = json.loads((tmp_path / "tta" / "eval.json").read_text())
    assert found["eval"]["scales"] == [1, 1.5]
    assert name in found["metrics"]
    assert (tmp_path / "tta" / "predictions.png").exists()

    photo = digit_scenes / "images" / "val" / sorted(p.name for p in (digit_scenes / "images" / "val").iterdir())[0]
    with Image.open(photo) as image:
        image.resize((300, 250)).save(tmp_path / "photo.png")
    windows = ("eval.resize=false", "eval.window=[128,128]", "data.max_pixels=75000", "score=0")
    code, output = command("predict", f"run={run}", "device=cpu", *windows, tmp_path / "photo.png", tmp_path / "out")
    assert code == 0, output
    assert "eval.window: windows of 128x128 pixels, every 85 rows and 85 columns." in output
    if task == "segment":
        with Image.open(tmp_path / "out" / "labels" / "photo.png") as labels:
            assert labels.size == (300, 250)
    else:
        objects = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
        assert {tuple(item["segmentation"]["size"]) for item in objects} == {(250, 300)}
        assert max(item["bbox"][0] for item in objects) > 128


@pytest.mark.slow
def test_settings_are_refused_by_the_commands(command, finished_dense, tmp_path):
    run, photo = finished_dense["segment"], tmp_path / "photo.png"
    Image.new("RGB", (300, 250)).save(photo)
    for words, message in [
        (["eval.flip=false"], "eval.flip has no effect with eval.tta=none: add eval.tta=multi_scale."),
        (["eval.windo=[64,64]"], "there is no key 'eval.windo': did you mean eval.window?"),
        (["eval.window=[8,8]"], "eval.window=[8, 8] is not allowed: it has to be two numbers, 32 or more, or null"),
    ]:
        for name, words_ in (("eval", words), ("predict", [*words, photo, tmp_path / "other"])):
            code, output = command(name, f"run={run}", *words_)
            assert code
            assert f"zoo-{name}: error: {message}" in output
    for words, message in [
        (["data.max_pixels=74999"], "it has more than data.max_pixels=74999 pixels"),
        (["optim.lr=1"], "optim.lr does not affect the predictions of a run with task=segment: leave it out."),
        (["data.max_pixels=many"], "data.max_pixels=many: Value 'many'"),
        (["eval.window=64,64"], "eval.window=64,64 gives several values: for a list, write eval.window=[64,64]."),
    ]:
        code, output = command("predict", f"run={run}", *words, photo, tmp_path / "other")
        assert code == 1
        assert message in output


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("eval.resize=false", "eval.window=[512,512]")], ids=["whole", "windows"])
def test_memory_for_a_large_photo(configure, run_cli, tmp_path, words):
    """A photo of 4000 x 3000 pixels and 150 classes, whose scores take 7.2 GB; -s prints the peak of the memory."""
    classes = [f"class {i}" for i in range(150)]
    cfg, model = configure("dense.method=semantic_fpn", classes=classes)
    save_weights(tmp_path / "model.safetensors", dict(model.state_dict()), cfg.model, classes)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((4000, 3000)).save(tmp_path / "photo.jpg")
    measure = (
        "import atexit, resource\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "atexit.register(lambda: print(f'peak {peak():.2f} GiB'))"
    )
    code, output = run_cli(f"run={tmp_path}", "device=cpu", *words, "photo.jpg", "out", cwd=tmp_path,
                           module="predict", program=measure)  # fmt: skip
    print(output)
    assert code == 0, output
    assert float(output.partition("peak ")[2].split()[0]) < 4 * 1e9 / 2**30
    with Image.open(tmp_path / "out" / "labels" / "photo.png") as labels:
        assert labels.size == (4000, 3000)


# Settings.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.tta=twice"], "eval.tta=twice is not allowed: it has to be none, flip or multi_scale"),
        (
            ["eval.window=[8,64]"],
            r"eval.window=\[8, 64\] is not allowed: it has to be two numbers, 32 or more, or null",
        ),
        (["eval.stride=[8,8]"], r"eval.stride=\[8, 8\] has no effect without eval.window"),
        (
            ["eval.window=[64,64]", "eval.stride=[64,65]"],
            r"eval.stride=\[64, 65\] is not allowed: it has to be at most eval.window=\[64, 64\]",
        ),
        (["eval.tta=multi_scale", "eval.scales=[0.01]"], r"eval.scales=\[0.01\] is not allowed: its smallest factor"),
        (["task=classify", "eval.tta=flip"], "eval.tta=flip has no effect with task=classify"),
    ],
)
def test_refused(compose, overrides, message):
    task = [] if "task=classify" in overrides else ["task=segment"]
    with pytest.raises(UserError, match=message):
        check(compose(*task, *overrides))
