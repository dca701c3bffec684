"""Probes of frozen features: a journey of each kind, what they compute, messages. 20 s; slow ones 30 s."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from zoo.efficient_probing import EfficientProbing
from zoo.messages import UserError
from zoo.recipes import config, report
from zoo.recipes.classify import train
from zoo.recipes.classify.probe_heads import Fit, LinearHeads, ProbingHeads, Rows, nearest_votes, score

WORDS = ("model=test_vit", "data=imagefolder", "data.img_size=32", "data.num_workers=0", "trainer.device=cpu")
SMALL = ("probe.epochs=5", "probe.batch_size=8", "probe.lrs=[0.01,0.03]", "probe.holdout=0.3")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def probed(command, images):
    """Run `zoo-train probe=<kind>` on the small folder of images; returns exit code and output."""

    def call(kind, *words, run="run"):
        small = () if kind == "knn" else SMALL
        given = (*WORDS, f"data.root={images}", "log.wandb=disabled", f"run={run}", *small, *words)
        return command("train", f"probe={kind}", *given)

    return call


def rows(values, labels, prepare=lambda x: x):
    return Rows(values.numpy(), labels.numpy(), np.arange(len(labels)), prepare, torch.device("cpu"))


# Journeys.


@pytest.mark.slow
def test_nearest_neighbours(probed, command, tmp_path):
    code, out = probed("knn", "probe.k=5")
    assert code == 0, out
    assert "probe=knn: the 5 nearest training images vote (probe.k)" in out
    assert "The model has random weights (pretrained=false)" in out
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["probe"] == {"kind": "knn", "k": 5}
    assert found["metrics"].keys() == {"top1", "top5"}
    assert f"k nearest neighbours: top-1 {found['metrics']['top1']:.2f} % on 15 validation images" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Frozen features, k nearest neighbours" in page
    assert "<h2>Curves</h2>" not in page
    code, out = command("eval", "run")
    assert code == 1
    assert "run is a run of probe=knn, which has no weights: give one of probe=linear or probe=ep." in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "ep"])
def test_probe_becomes_a_classifier(probed, command, tmp_path, images, kind):
    code, out = probed(kind)
    assert code == 0, out
    assert "6 training images are held out to choose the learning rate (probe.holdout)." in out
    assert out.count("(chosen)") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["probe"]["chosen"] in [rate["lr"] for rate in summary["probe"]["rates"]] == [0.01, 0.03]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["lr"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Learning rates</h2>" in page
    assert ("Attention of the probe" in page) == (kind == "ep")
    assert ('<div class="samples wide many row">' in page) == (kind == "ep")  # narrow, also on a phone
    for line in ("  zoo-eval run", "  zoo-predict run=run photos/ out/", "  zoo-export run"):
        assert line in out
    code, out = command("eval", "run", "log.wandb=disabled")
    assert code == 0, out
    evaluated = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert evaluated["metrics"]["top1"] == summary["metrics"]["top1"]
    assert evaluated["metrics"]["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-3)
    code, out = command("predict", "run=run", images / "val", "out")
    assert code == 0, out
    code, out = probed(kind)
    assert "This run is finished: choose another run=<folder>." in out
    code, out = probed("knn")
    assert code == 1
    assert "holds a run with probe" in out
    code, out = command("eval", "run", "checkpoint=best")
    assert "run is a run of a probe, which has no best epoch: leave out checkpoint=best." in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "ep"])
@pytest.mark.parametrize(
    "model", ["test_van", "test_vim", "test_maxvit", "test_casvit", "test_convnext", "test_mambaout"]
)
def test_models_with_other_heads(compose, images, tmp_path, model, kind):
    """The run compares the logits of the saved model with those of the probe: it would end with an error."""
    words = (*WORDS[1:], f"model={model}", f"data.root={images}", f"run={tmp_path / 'run'}", "data.img_size=64")
    longer = (*SMALL[1:], "probe.epochs=15")  # a batch norm's running statistics need some updates
    found = train.train(compose(f"probe={kind}", *words, *longer), report.write_or_warn)
    assert found["metrics"]["top1"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_van"])
def test_run_of_a_probe_is_probed_again(probed, command, tmp_path, model):
    """Its features are those of the model that it probed, whatever its classifier is."""
    for run, kind, words in (
        ("first", "ep", ()),
        ("second", "ep", ("pretrained=first",)),
        ("third", "linear", ("pretrained=second",)),
        ("fourth", "knn", ("pretrained=second", "probe.k=5")),
    ):
        code, out = probed(kind, f"model={model}", *words, run=run)
        assert code == 0, out
    assert out.count("The features of the") == 2  # those of the third run, from the cache
    code, out = command("eval", "second", "log.wandb=disabled")
    assert code == 0, out
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first if not key.startswith("head."))


# What they compute.


def test_votes_are_dinos():
    torch.manual_seed(0)
    bank, labels, features = torch.randn(9, 4), torch.arange(9) % 3, torch.randn(5, 4)
    votes = nearest_votes(bank, labels, features, 4, k=3, temperature=0.07)
    for query, got in zip(features, votes, strict=True):
        similarity = F.cosine_similarity(bank, query[None])
        want = torch.zeros(4)
        for place in similarity.argsort(descending=True)[:3]:
            want[labels[place]] += (similarity[place] / 0.07).exp()
        torch.testing.assert_close(got, want / want.sum())


@pytest.mark.parametrize("kind", ["linear", "ep"])
def test_each_learning_rate_is_trained_as_if_alone(kind):
    torch.manual_seed(0)
    labels = torch.arange(20) % 3
    values = torch.randn(20, 6) if kind == "linear" else torch.randn(20, 5, 6)
    data = rows(values, labels)
    head = EfficientProbing(6, 3)

    def fitted(rates):
        heads = LinearHeads(*data.moments(), 3, len(rates)) if kind == "linear" else ProbingHeads(head, len(rates))
        fit = Fit(heads, rates, data, epochs=3, batch_size=8, seed=0)
        losses = [fit.run_epoch(lambda _: None)[0] for _ in range(3)]
        return heads, torch.stack(losses)

    heads, losses = fitted([0.01, 0.1])
    alone = [fitted([rate]) for rate in (0.01, 0.1)]
    torch.testing.assert_close(losses, torch.cat([loss for _, loss in alone], 1))
    x, _ = data.batch(np.arange(20))
    torch.testing.assert_close(heads.eval()(x), torch.cat([one.eval()(x) for one, _ in alone]))


def test_linear_classifier_takes_plain_features():
    torch.manual_seed(0)
    data = rows(3 + 5 * torch.randn(50, 6), torch.arange(50) % 3)
    mean, std = data.moments()
    torch.testing.assert_close(mean, torch.from_numpy(data.values).mean(0))
    torch.testing.assert_close(std, torch.from_numpy(data.values).std(0, unbiased=False), rtol=1e-4, atol=0)
    heads = LinearHeads(mean, std, 3, 1)
    nn.init.normal_(heads.heads[0].weight)
    weight, bias = heads.plain()
    x, _ = data.batch(np.arange(50))
    torch.testing.assert_close(F.linear(x, weight, bias), heads(x)[0], rtol=1e-4, atol=1e-4)


def test_diverged_rate_has_no_score():
    data = rows(torch.randn(10, 4), torch.zeros(10, dtype=torch.int64))
    heads = LinearHeads(*data.moments(), 2, 2)
    nn.init.constant_(heads.heads[1].bias, float("nan"))
    top1, losses = score(heads, data)
    assert top1 == [100, None]
    assert losses == [pytest.approx(np.log(2)), np.inf]


# Messages.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("probe=knn", "augment=light"), "augment has no effect with probe=knn: the model is frozen"),
        (("probe=ep", "augment.hflip=0.5"), "augment.hflip has no effect with probe=ep"),
        (("probe=linear", "optim.lr=1"), "optim.lr has no effect with probe=linear"),
        (("probe=linear", "trainer.epochs=3"), "trainer.epochs has no effect .* settings of its own, probe.<key>"),
        (("probe=linear", "task=detect"), "probe=linear is for task=classify, not for task=detect: leave out one"),
        (("probe.k=3",), "probe.k=3 has no effect with probe=none: it is for probe=knn; leave it out."),
        (("probe=knn", "probe.lrs=[1]"), r"probe.lrs=\[1.0\] has no effect with probe=knn: it is for probe=linear and"),
        (("probe=linear", "probe.queries=3"), "probe.queries=3 has no effect with probe=linear: it is for probe=ep;"),
        (("probe=linear", "probe.lrs=[1,1]"), "has a learning rate twice: give each of them once."),
        (("probe=ep", "model_kwargs.global_pool=avg"), "model_kwargs.global_pool=avg can't be used with probe=ep"),
        (("probe=linear", "probe.holdout=1"), "probe.holdout=1.0 is not allowed: it has to be between 0 and 1."),
        (("probe.kind=other",), "probe.kind=other is not allowed: it has to be none, linear, knn or ep."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_without_effect_are_refused(compose, words, message):
    keys = [word.partition("=")[0] for word in words]
    words = [f"+{word}" if word.startswith("model_kwargs") else word for word in words]

    def check():
        cfg = compose(*words)
        config.check(cfg)
        config.check_effect_on_probe(cfg, keys)

    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("knn", ("probe.k=25",), "probe.k=25, but there are 24 training images: lower it."),
        ("ep", ("probe.queries=7",), "probe=ep can't be used with test_vit: .*7 queries for 64 channels"),
        ("ep", ("model=deit_tiny_distilled_patch16_224",), r"it has the classifiers \('head', 'head_dist'\)"),
    ],
    ids=["k", "queries", "two classifiers"],
)
def test_probes_that_can_not_be_made(compose, images, tmp_path, kind, words, message):
    with pytest.raises(UserError, match=message):
        train.train(compose(f"probe={kind}", *WORDS, f"data.root={images}", f"run={tmp_path / 'run'}", *words))
