"""Losses, weights of classes and balanced sampling. 5 s; slow ones a minute."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from zoo.messages import UserError
from zoo.recipes.classify import losses
from zoo.recipes.classify.data import EpochSampler, train_labels
from zoo.recipes.classify.losses import ClassLoss, class_weights, make_loss

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
MIXED = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
SEVERAL = (torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) > 0.5).float()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0])


def _same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Without weights, the losses of timm and torchvision.


def test_cross_entropy_is_that_of_timm():
    _same(ClassLoss("ce", smoothing=0.1)(LOGITS, LABELS), LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS))
    mixed = ClassLoss("ce", smoothing=0.1, soft_targets=True)
    _same(mixed(LOGITS, MIXED), SoftTargetCrossEntropy()(LOGITS, MIXED))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_that_of_timm(smoothing):
    _same(ClassLoss("bce", smoothing=smoothing)(LOGITS, LABELS), BinaryCrossEntropy(smoothing)(LOGITS, LABELS))
    several = ClassLoss("bce", multi_label=True, smoothing=smoothing)
    _same(several(LOGITS, SEVERAL), BinaryCrossEntropy(smoothing, smooth_dense=True)(LOGITS, SEVERAL))


def test_focal_loss_without_gamma_is_binary_cross_entropy():
    for targets, several in ((LABELS, False), (MIXED, False), (SEVERAL, True)):
        focal = ClassLoss("focal", multi_label=several, smoothing=0.1, gamma=0.0, soft_targets=targets is MIXED)
        binary = ClassLoss("bce", multi_label=several, smoothing=0.1, soft_targets=targets is MIXED)
        _same(focal(LOGITS, targets), binary(LOGITS, targets))


def test_focal_loss_by_hand():
    p = LOGITS.double().sigmoid()
    t = F.one_hot(LABELS, 4).double()
    right = torch.where(t > 0, p, 1 - p)
    _same(ClassLoss("focal", gamma=3.0)(LOGITS, LABELS), (-((1 - right) ** 3) * right.log()).mean().float())


# Weights.


@pytest.mark.parametrize("name", ["ce", "bce", "focal"])
def test_weights_multiply_the_loss_of_each_image(name):
    each = torch.stack([ClassLoss(name, smoothing=0.1)(LOGITS[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    _same(ClassLoss(name, WEIGHTS, smoothing=0.1)(LOGITS, LABELS), (each * WEIGHTS[LABELS]).mean())
    mixed = torch.stack([ClassLoss(name, soft_targets=True)(LOGITS[i : i + 1], MIXED[i : i + 1]) for i in range(6)])
    _same(ClassLoss(name, WEIGHTS, soft_targets=True)(LOGITS, MIXED), (mixed * (MIXED @ WEIGHTS)).mean())


@pytest.mark.parametrize("name", ["ce", "bce", "focal"])
def test_weights_of_one_change_nothing(name):
    _same(ClassLoss(name, torch.ones(4))(LOGITS, LABELS), ClassLoss(name)(LOGITS, LABELS))


def test_weights_of_several_labels_are_those_of_torch():
    expected = nn.BCEWithLogitsLoss(pos_weight=WEIGHTS)(LOGITS, SEVERAL)
    _same(ClassLoss("bce", WEIGHTS, multi_label=True)(LOGITS, SEVERAL), expected)


@pytest.mark.slow
def test_smoothed_labels_do_not_draw_towards_large_weights():
    """The best logits for an image of a common class are those without weights."""
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = ClassLoss("ce", torch.tensor([0.01, 1, 100, 1000]), smoothing=0.1)
    optimizer = torch.optim.SGD([logits], 100.0)
    for _ in range(2000):
        optimizer.zero_grad()
        loss(logits, torch.tensor([0])).backward()
        optimizer.step()
    _same(logits.softmax(1).detach(), torch.tensor([[0.925, 0.025, 0.025, 0.025]]))


NAMES = ["cat", "dog", "7"]


def _weights(compose, value, counts=(60, 30, 10), several=False):
    cfg = compose()
    cfg.loss.weights = value
    return class_weights(cfg, NAMES, counts, 100, several)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("balanced", [100 / 180, 100 / 90, 100 / 30]),
        ([1, 2, 3.5], [1, 2, 3.5]),
        ({"dog": 2, 7: 0.5}, [1, 2, 0.5]),
    ],
    ids=str,
)
def test_weights_of_the_key(compose, value, expected):
    found = _weights(compose, value)
    assert found is expected if expected is None else found.tolist() == pytest.approx(expected)


def test_balanced_weights(compose):
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 60 + [1] * 30 + [2] * 10
    scikit = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert _weights(compose, "balanced").tolist() == pytest.approx(scikit.tolist())
    assert _weights(compose, "balanced", (60, 40, 0)).tolist() == pytest.approx([100 / 120, 100 / 80, 1])
    assert _weights(compose, "balanced", (50, 20, 0), several=True).tolist() == [1, 4, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("even", r"loss\.weights=even is not allowed: it has to be balanced, a list of numbers, numbers by class"),
        (3, r"loss\.weights=3 is not allowed"),
        ([1, 2], r"loss\.weights has 2 numbers, but there are 3 classes \(cat, dog, 7\)"),
        ([1, 2, 0], r"0 has to be a number above 0"),
        ([1, 2, "x"], r"'x' has to be a number above 0"),
        ({"dgo": 1}, r"loss\.weights names 'dgo', which is not a class: did you mean dog\?"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(compose, value, message):
    with pytest.raises(UserError, match=message):
        _weights(compose, value)


def test_settings_that_do_not_fit(compose):
    with pytest.raises(UserError, match=r"loss\.weights=balanced needs the label of every training image"):
        _weights(compose, "balanced", None)
    with pytest.raises(UserError, match=r"loss\.gamma=1\.0 has no effect with loss\.name=ce: set loss\.name=focal"):
        make_loss(compose("loss.gamma=1"), None, False)
    assert make_loss(compose("loss.name=ce"), None, False) is None  # timm's


@pytest.mark.parametrize("word", ["loss.name=focal", "data.sampling=balanced", "eval.threshold=0.3"])
def test_keys_of_classifiers_are_refused_by_other_tasks(compose, word):
    from zoo.recipes import config

    with pytest.raises(UserError, match=rf"{re.escape(word)} has no effect with task=detect: it is for classifiers"):
        config.check(compose("task=detect", word))


def test_shares_in_words():
    assert losses.shares(["a", "b"], [3, 1], 4) == "a: 3 (75 %), b: 1 (25 %)"
    names = [f"c{i}" for i in range(20)]
    assert losses.shares(names, list(range(20)), 190).startswith("c19: 19 (10 %), c18: 18 (9.47 %)")
    assert losses.shares(names, list(range(20)), 190).endswith("c1: 1 (0.526 %), c0: 0 (0 %)")


# Balanced sampling.

UNEVEN = [0] * 50 + [1] * 9 + [2] * 5


def _shares(world, epoch=0, start=0, repeats=1, batch=8):
    samplers = [EpochSampler(range(100, 164), batch, 0, rank, world, repeats, UNEVEN) for rank in range(world)]
    for sampler in samplers:
        sampler.epoch, sampler.start = epoch, start
    return [list(sampler) for sampler in samplers]


def test_epoch_has_as_many_images_of_each_class():
    (share,) = _shares(1)
    assert len(share) == 64
    assert sorted(np.bincount([UNEVEN[index - 100] for _, index, _ in share])) == [21, 21, 22]
    # All images of a class come before one comes again, and each time in another form.
    for label, size in ((1, 9), (2, 5)):
        of_class = [(index, form) for _, index, form in share if UNEVEN[index - 100] == label]
        assert len(set(of_class)) == len(of_class)
        assert len({index for index, _ in of_class}) == size
        assert max(form for _, form in of_class) == (len(of_class) - 1) // size


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_balanced_epoch_is_shared_and_continues_in_the_middle(world, repeats):
    (alone,) = _shares(1, repeats=repeats)
    together = _shares(world, repeats=repeats)
    for first in range(0, 64, 8):
        update = [key for share in together for key in share[first // world : (first + 8) // world]]
        assert sorted(update) == sorted(alone[first : first + 8])
    rest = _shares(world, start=24, repeats=repeats)
    assert [share[24 // world :] for share in together] == rest
    assert _shares(1, epoch=1, repeats=repeats)[0] != alone


# Training.


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "loss.name=focal loss.gamma=1 augment.mixup=0.4",
        "loss.name=bce loss.weights=balanced trainer.ema_decay=0.9",
        "loss.weights={apple:2} data.sampling=balanced augment.cutmix=1 trainer.amp=bf16",
        "data.sampling=balanced augment.repeats=2",
    ],
)
def test_losses_and_sampling_train_and_resume(fit, images, tmp_path, weights, same, words):
    words = ["trainer.epochs=2", *words.split()]
    result = fit(tmp_path / "whole", images, *words)
    fit(tmp_path / "parts", images, *words, "trainer.max_updates=2")
    fit(tmp_path / "parts", images, *words)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    if "loss.name" in " ".join(words):  # a mean over the classes: 0.69 of even chances
        assert first["train_loss"] < 0.75
    assert result["metrics"]["balanced_accuracy"] == result["metrics"]["top1"]  # as many images of each class
    start = json.loads((tmp_path / "whole" / "start.json").read_text())
    assert "training images of each class: apple: 8 (33.3 %), banana: 8 (33.3 %), cherry: 8 (33.3 %)" in start["data"]
    assert f"sampling: {'balanced' if 'data.sampling=balanced' in words else 'uniform'}" in start["data"]
    assert start["data"][-1].startswith("loss: ")


@pytest.mark.slow
def test_accumulated_weighted_gradients_are_those_of_the_whole_batch(fit, images, tmp_path, weights, same):
    words = ("optim=sgd", "optim.lr=0.01", "trainer.max_updates=2", "augment=none")
    weighted = (*words, "loss.weights={apple:5}")
    fit(tmp_path / "a", images, *weighted, "trainer.batch_size=8")
    fit(tmp_path / "b", images, *weighted, "trainer.batch_size=4", "trainer.effective_batch_size=8")
    fit(tmp_path / "plain", images, *words, "trainer.batch_size=8")
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "plain"))
    for name, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(value, weights(tmp_path / "b")[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_labels_of_data(compose, images):
    from zoo.recipes.classify.data import open_data

    data = open_data(compose("data=imagefolder", f"data.root={images}").data, 0)
    assert train_labels(data) == [label for label in range(3) for _ in range(8)]
    assert np.bincount(train_labels(open_data(compose().data, 0))).sum() == 1437
