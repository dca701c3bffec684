"""Models with several exits: the loss of training, the report of early exit, zoo-train and zoo-eval. 2 s, slow 30 s."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zoo.messages import UserError
from zoo.recipes import distributed, report
from zoo.recipes.classify import evaluate as module
from zoo.recipes.classify.accuracy import Normalize
from zoo.recipes.classify.data import EvalSampler, collate
from zoo.recipes.classify.exits import ExitLoss, exit_report, measure_exits

MODEL = "model=test_dyn_perceiver"


def test_loss_is_the_sum_of_the_exits_and_of_what_the_last_one_teaches():
    generator = torch.Generator().manual_seed(0)
    first, second, last = logits = [torch.randn(4, 5, generator=generator, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, 3, 2, 1])
    loss = ExitLoss(F.cross_entropy, [0.5, 0.0, 2.0], 0.25)(tuple(logits), target)
    want = 0.5 * F.cross_entropy(first, target) + 2 * F.cross_entropy(last, target)
    teacher = last.detach().softmax(1)
    for student in (first, second):
        want = want + 0.25 * (teacher * (teacher.log() - student.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert second.grad.abs().sum() > 0  # by the last exit alone
    (alone,) = torch.autograd.grad(2 * F.cross_entropy(last, target), last)
    torch.testing.assert_close(last.grad, alone)  # the teacher learns nothing from its students


def report_of(count=4000, exits=3):
    """The report for exits that are right as often as they are certain."""
    generator = torch.Generator().manual_seed(0)
    certain = torch.rand(count, 1, generator=generator) ** torch.tensor([1.0, 0.5, 0.25])[:exits]
    right = torch.rand(count, exits, generator=generator) < certain
    return exit_report(certain, right, [10, 20, 40][:exits], seed=0), right


class _Images:
    """Images of one grey each, their class is its remainder by 3; number 4 can't be read."""

    def __getitem__(self, key):
        return torch.full((1, 2, 2), key[1], dtype=torch.uint8), -1 if key[1] == 4 else key[1] % 3, []


class _Exits(torch.nn.Module):
    def forward_exits(self, images):
        grey = images.flatten(1)[:, :1]
        yield torch.cat((grey, grey**2, 1 - grey), 1)
        yield torch.cat((1 - grey, grey, grey**2), 1)


def test_images_of_several_processes_are_in_the_order_of_the_data(monkeypatch):
    """The halves of the fit are then those of one process."""
    normalize = Normalize({"mean": (0.0,), "std": (0.02,)}, torch.device("cpu"))

    def measured(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        loader = DataLoader(_Images(), 2, sampler=EvalSampler(range(9), rank, world), collate_fn=collate)
        return measure_exits(_Exits(), loader, normalize, nullcontext())

    alone = measured(0, 1)
    parts = []
    monkeypatch.setattr(distributed, "gather", lambda part: parts.append(part) or parts)
    together = [measured(rank, 3) for rank in range(3)][-1]
    assert alone[0].shape == (8, 2)
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
    assert len(alone[0].unique()) > 8


def test_report_has_each_exit_by_itself():
    found, right = report_of()
    assert [point["multiply_adds"] for point in found["exits"]] == [10, 20, 40]
    want = (100 * right.double().mean(0)).tolist()
    assert [point["top1"] for point in found["exits"]] == pytest.approx(want)


def test_early_exit_costs_the_mean_of_what_images_pay_and_grows():
    found, _ = report_of()
    for point in found["early"]:
        mean = sum(share * cost for share, cost in zip(point["shares"], (10, 20, 40), strict=True))
        assert point["multiply_adds"] == pytest.approx(mean, abs=0.51)
        assert sum(point["shares"]) == pytest.approx(1)
    costs = [point["multiply_adds"] for point in found["early"]]
    assert costs == sorted(costs)
    shares = found["early"][4]["shares"]  # of the ratio 1
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_thresholds_of_certain_images_beat_a_mixture_of_exits():
    found, _ = report_of()
    point, (low, middle, high) = found["early"][4], (exit["top1"] for exit in found["exits"])
    assert point["top1"] > (low + middle + high) / 3 + 2


def test_accuracy_of_early_exit_is_measured_on_other_images_than_the_fit():
    """An exit whose certainty says nothing, and is different for each image, gains nothing by thresholds."""
    generator = torch.Generator().manual_seed(1)
    certain, right = torch.rand(2000, 2, generator=generator), torch.rand(2000, 2, generator=generator) < 0.5
    found = exit_report(certain, right, [1, 2], seed=0)
    assert all(abs(point["top1"] - 50) < 4 for point in found["early"])


@pytest.fixture
def evaluate(compose):
    def call(*words):
        keys = [word.partition("=")[0] for word in words]
        return module.evaluate(compose(*words, name="eval"), keys, report.write_or_warn)

    return call


@pytest.mark.slow
def test_exits_are_trained_and_fitted(fit, images, evaluate, tmp_path):
    run = tmp_path / "run"
    fit(run, images, MODEL, "trainer.max_updates=2", "exits.weights=[0.5,0.5,1,1]")
    summary = evaluate(f"run={run}", "fit_exits=true")
    early = summary["early_exit"]
    assert early["images"] == summary["metrics"]["images"]
    assert early["exits"][-1]["top1"] == pytest.approx(summary["metrics"]["top1"])
    assert [len(point["thresholds"]) for point in early["early"]] == [3] * 9
    assert json.loads((run / "eval" / "eval.json").read_text())["early_exit"] == early
    assert (run / "eval" / "exits.png").stat().st_size > 1000
    assert "Early exit" in (run / "eval" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            (MODEL, "exits.weights=[1,1]"),
            r"exits.weights=\[1.0, 1.0\].*test_dyn_perceiver has 4 exits: give a weight for",
        ),
        (("exits.weights=[1,1]",), "test_vit has one exit: leave it out"),
        (("exits.distill=-1",), "exits.distill=-1.0 is not allowed: it has to be 0 or more"),
    ],
    ids=["number", "one exit", "range"],
)
def test_wrong_settings_of_exits_are_named(fit, images, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", images, *words)


@pytest.mark.slow
def test_model_with_one_exit_has_none_to_fit(evaluate, finished):
    with pytest.raises(UserError, match="fit_exits=true: test_vit has one exit; leave it out"):
        evaluate(f"run={finished}", "fit_exits=true")
