"""Distillation: the teacher's loss and input, the run of a student from its start to its evaluation. 5 s, slow 20 s."""

import json

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo.efficient_probing import attach
from zoo.messages import UserError
from zoo.recipes import config, early
from zoo.recipes.classify import distillation
from zoo.recipes.classify.train_state import TrainState

CPU = torch.device("cpu")
THREE = ["apple", "banana", "cherry"]
NORMALIZED = {"input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.25, 0.2)}


@pytest.fixture(scope="module")
def teacher_folder(fit, images, tmp_path_factory):
    """A run folder of a narrower model with another normalization; read only."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    fit(folder, images, "model=test_van", "data.mean=[0.5,0.5,0.5]", "data.std=[0.1,0.2,0.3]")
    return folder


def _state(compose, folder, *words, classes=THREE):
    """A student's state of training, its teacher, and a batch."""
    cfg = compose("model=test_vit", "data.img_size=32", f"distill.teacher={folder}", *words)
    config.check(cfg)
    torch.manual_seed(0)
    student = timm.create_model("test_vit", img_size=32, num_classes=len(classes))
    teacher = distillation.open_teacher(cfg, student, NORMALIZED, classes)
    return (
        TrainState(cfg, student, len(classes), 10, CPU, teacher=teacher),
        torch.rand(4, 3, 32, 32),
        torch.arange(4) % 3,
    )


def _own_logits(folder, images):
    """The logits of the teacher for pixels of 0 to 1."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return model((images - mean) / std), model.forward_head(model.forward_features((images - mean) / std), True)


def _normalized(images):
    mean, std = (torch.tensor(NORMALIZED[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.slow
def test_loss_compares_logits_of_the_same_classes_for_the_same_pixels(compose, teacher_folder):
    words = ("distill.temperature=2", "distill.weight=3", "distill.label_weight=0.5", "augment.smoothing=0")
    order = ["cherry", "apple", "banana"]
    state, images, labels = _state(compose, teacher_folder, *words, classes=order)
    result = state.forward(_normalized(images), labels)
    logits, _ = _own_logits(teacher_folder, images)
    logits = logits[:, [THREE.index(name) for name in order]]
    own = result["output"]
    distance = F.kl_div((own / 2).log_softmax(1), (logits / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(result["loss"], 0.5 * F.cross_entropy(own, labels) + 3 * 4 * distance)


@pytest.mark.slow
def test_features_of_any_classes_train_a_projection_too(compose, teacher_folder):
    words = ("distill.match=features", "distill.weight=2", "augment.smoothing=0", "trainer.ema_decay=0.5")
    state, images, labels = _state(compose, teacher_folder, *words, classes=["a", "b", "c", "d"])
    wrapper = state.task.trainable_module
    result = state.forward(_normalized(images), labels)
    _, features = _own_logits(teacher_folder, images)
    student = wrapper.student
    own = wrapper.projection(student.forward_head(student.forward_features(_normalized(images)), pre_logits=True))
    expected = F.cross_entropy(result["output"], labels) + 2 * F.mse_loss(own, features)
    torch.testing.assert_close(result["loss"], expected)

    before = {name: value.clone() for name, value in state.task.state_dict().items()}
    state.backward(result["loss"])
    state.step()
    state.end_update(1, stepped=True)
    changed = {name for name, value in state.task.state_dict().items() if not torch.equal(value, before[name])}
    assert "trainable_module.projection.weight" in changed
    assert not any(name.startswith("teacher.") for name in changed)
    assert state.weights().keys() == student.state_dict().keys()
    kept = state.state_dict()
    other, *_ = _state(compose, teacher_folder, *words, classes=["a", "b", "c", "d"])
    other.load_state_dict(kept)
    assert torch.equal(other.task.trainable_module.projection.weight, wrapper.projection.weight)
    assert torch.equal(other.weights()["head.bias"], state.weights()["head.bias"])


@pytest.mark.slow
def test_student_trains_resumes_and_is_evaluated_without_its_teacher(fit, command, images, teacher_folder, tmp_path):
    teacher, words = tmp_path / "teacher", ("trainer.epochs=2", "distill.match=features")
    teacher.symlink_to(teacher_folder)
    for folder, limits in (("whole", [None]), ("parts", [2, None])):
        for limit in limits:
            stop = [f"trainer.max_updates={limit}"] if limit else []
            fit(tmp_path / folder, images, *words, f"distill.teacher={teacher}", *stop)
    whole, parts = (timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    log = (tmp_path / "parts" / "train.log").read_text()
    assert "its last weights; the loss on its features counts 1 times, that on the labels 1 times" in log
    teacher.unlink()
    code, output = command("eval", f"run={tmp_path / 'parts'}")
    assert code == 0, output
    found = json.loads((tmp_path / "parts" / "eval" / "eval.json").read_text())["metrics"]
    trained = json.loads((tmp_path / "parts" / "summary.json").read_text())["metrics"]
    assert found["top1"] == pytest.approx(trained["top1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "classes", "message"),
    [
        (
            (),
            ["apple", "kiwi"],
            "does not know kiwi: give a teacher that was trained on these classes, or use",
        ),
        (
            ("+model_kwargs.in_chans=4",),
            THREE,
            "and test_vit can't be used together with distill.match=logits and images 4x32",
        ),
    ],
)
def test_teacher_that_does_not_fit(compose, finished, words, classes, message):
    cfg = compose("model=test_vit", f"distill.teacher={finished}", *words)
    size = {"input_size": (4 if words else 3, 32, 32)}
    student = timm.create_model("test_vit", img_size=32, num_classes=len(classes), in_chans=size["input_size"][0])
    with pytest.raises(UserError, match=message):
        distillation.open_teacher(cfg, student, NORMALIZED | size, classes)


@pytest.mark.slow
def test_teacher_without_pooled_features(compose, finished, monkeypatch):
    """One of timm's models with efficient probing pools in its classifier."""
    opened = distillation.open_model(str(finished))
    attach(opened.model, 3, 4, 32)
    monkeypatch.setattr(distillation, "open_model", lambda *args, **kwargs: opened)
    student = timm.create_model("test_vit", img_size=32, num_classes=3)
    cfg = compose("model=test_vit", f"distill.teacher={finished}", "distill.match=features")
    with pytest.raises(UserError, match=r"can't be used together with distill.match=features .* have the shape \(1, 5"):
        distillation.open_teacher(cfg, student, NORMALIZED, THREE)


def test_teacher_of_other_classes_without_names(compose, tmp_path):
    file = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_van", num_classes=5).state_dict(), file)
    cfg = compose("model=test_vit", "distill.teacher=test_van", f"distill.weights={file}")
    student = timm.create_model("test_vit", img_size=32, num_classes=3)
    with pytest.raises(UserError, match=r"distill.teacher=test_van has 5 classes, but the data have 3: give a teacher"):
        distillation.open_teacher(cfg, student, NORMALIZED, THREE)
    cfg.distill.match = "features"
    assert distillation.open_teacher(cfg, student, NORMALIZED, THREE).opened.weights == "weights of teacher.pth"


def test_logits_of_several_labels_are_refused(compose):
    cfg = compose("model=test_vit", "distill.teacher=test_van")
    student = timm.create_model("test_vit", img_size=32, num_classes=3)
    with pytest.raises(UserError, match=r"distill.match=logits can't be used if images have several labels"):
        distillation.open_teacher(cfg, student, NORMALIZED, THREE, multi_label=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("task=detect", "distill.teacher=resnet50"), "distill.teacher=resnet50 has no effect with task=detect"),
        (("distill.weight=2",), r"distill.weight=2.0 has no effect without a teacher: add distill.teacher=<model or"),
        (
            ("distill.teacher=resnet50", "distill.match=features", "distill.temperature=2"),
            "distill.temperature=2.0 has no effect with distill.match=features",
        ),
        (("distill.teacher=resnet50", "distill.weight=0"), "distill.weight=0 is not allowed with a teacher"),
        (("distill.teacher=resnet50", "trainer.parallel=fsdp"), "can't be used with trainer.parallel=fsdp: use ddp"),
        (("distill.teacher=resnet50", "distill.temperature=0"), "distill.temperature=0.0 is not allowed"),
    ],
)
def test_keys_that_do_not_fit_are_refused(compose, words, message):
    with pytest.raises(UserError, match=message):
        config.check(compose(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("distill.teacher=resnet5O",), "there is no model 'resnet5O': did you mean resnet50"),
        (("distill.teacher=runs/teacher",), "there is no run folder distill.teacher=runs/teacher"),
        (("distill.teacher=resnet50", "distill.weights=none.pth"), r"distill.weights=none\.pth does not exist"),
    ],
)
def test_teacher_that_does_not_exist_is_refused_early(compose, words, message):
    with pytest.raises(UserError, match=message):
        early.check(compose(*words))
