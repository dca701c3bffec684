"""Early exit of any model with exits: thresholds, costs, and that images that have left cost nothing. 3 s."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.exits import exit_costs, fit_thresholds, has_exits, leave_early, leaving


class Chain(nn.Module):
    """A model of three exits, each after one more linear layer, which is none of zoo's."""

    num_exits = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

    def forward_exits(self, x):
        x = x.flatten(1)
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x).tanh()
            kept = yield head(x)
            x = x if kept is None else x[kept]


def build():
    torch.manual_seed(0)
    return Chain().eval(), torch.randn(50, 1, 4, 4)


def certainties(model, images):
    with torch.no_grad():
        logits = torch.stack(list(model.forward_exits(images)), 1)
    return logits.softmax(-1).amax(-1), logits


def test_models_with_exits_are_known():
    assert has_exits(Chain())
    assert not has_exits(nn.Linear(1, 1))


def test_cost_of_an_exit_is_that_of_all_layers_up_to_it():
    model, _ = build()
    assert exit_costs(model, (1, 4, 4)) == [n * (16 * 16 + 16 * 4) for n in (1, 2, 3)]
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_each_image_gets_the_logits_of_the_first_certain_exit():
    model, images = build()
    certain, logits = certainties(model, images)
    thresholds = [certain[:, 0].median().item(), certain[:, 1].median().item()]
    result, taken = leave_early(model, images, thresholds)
    want = [0 if a >= thresholds[0] else 1 if b >= thresholds[1] else 2 for a, b, _ in certain.tolist()]
    assert taken.tolist() == want == leaving(certain, thresholds).tolist()
    assert set(want) == {0, 1, 2}
    torch.testing.assert_close(result, logits[range(50), want])


@pytest.mark.parametrize(("thresholds", "exit"), [([0.0, 0.0], 0), ([None, 0.0], 1), ([None, None], 2)])
def test_all_images_may_leave_at_one_exit(thresholds, exit):
    model, images = build()
    result, taken = leave_early(model, images, thresholds)
    assert taken.tolist() == [exit] * 50
    torch.testing.assert_close(result, certainties(model, images)[1][:, exit])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "test_dyn_perceiver"])
def test_images_that_have_left_cost_nothing(name):
    """The multiply-adds of a batch are the sum of the costs of the exits that its images take."""
    model, images = build()
    if name != "chain":
        model, images = timm.create_model(name, num_classes=5).eval(), torch.randn(6, 3, 64, 64)
    certain, _ = certainties(model, images)
    thresholds = certain[:, :-1].median(0).values.tolist()
    costs = exit_costs(model, images.shape[1:])
    with zoo.kernels.implementation("reference"), FlopCounterMode(display=False) as counter:
        _, taken = leave_early(model, images, thresholds)
    assert len(set(taken.tolist())) > 1
    assert counter.get_total_flops() // 2 == sum(costs[number] for number in taken.tolist())


def test_batch_without_images():
    model, images = build()
    result, taken = leave_early(model, images[:0], [0.5, 0.5])
    assert result.shape == (0, 4)
    assert len(taken) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_other_numbers_of_thresholds_are_refused(count):
    model, images = build()
    with pytest.raises(ValueError, match=f"Got {count} thresholds for a model of 3 exits: give one for each but"):
        leave_early(model, images, [None] * count)


def test_thresholds_let_the_wanted_shares_leave():
    certain = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0))
    taken = leaving(certain, fit_thresholds(certain, [0.5, 0.2, 0.0, 0.3]))
    assert (taken.bincount(minlength=4) / 1000).tolist() == pytest.approx([0.5, 0.2, 0.0, 0.3])


def test_most_certain_images_leave_first_and_equal_ones_together():
    certain = torch.tensor([[0.9, 0.0], [0.7, 0.0], [0.7, 0.0], [0.2, 0.0]])
    assert fit_thresholds(certain, [0.5, 0.5]) == [pytest.approx(0.7)]
    assert leaving(certain, [0.7]).tolist() == [0, 0, 0, 1]
    assert fit_thresholds(certain, [0.0, 1.0]) == [None]
