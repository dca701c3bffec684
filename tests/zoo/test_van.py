"""VAN's own arguments and initialisation. 2 s."""

import pytest
import timm
import torch

import zoo
from zoo import families
from zoo.van import VAN, VARIANTS

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def test_the_tiny_model_is_tiny():
    model = timm.create_model("test_van", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_every_variant_is_registered():
    assert set(timm.list_models(module="van")) == set(VARIANTS)
    assert zoo.van.VAN is VAN


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_van", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("van_b0")
    block = model.stages[2].blocks[0]
    assert block.layer_scale1.eq(0.01).all()
    assert block.mlp.fc1.weight.std().item() == pytest.approx((2 / 640) ** 0.5, rel=0.02)  # fan out: 640 channels
    assert block.mlp.dw_conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)  # fan out: 3 x 3
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_norm_eps_reaches_every_stage():
    model = timm.create_model("test_van", norm_eps=1e-5)
    assert [stage.norm.eps for stage in model.stages] == [1e-5] * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*it has to be whole numbers from 1 to 1,000"),
        ({"global_pool": "max"}, r"global_pool='max'.*'avg'"),
        ({"num_classes": -1}, r"num_classes=-1; it has to be a whole number from 0"),
        ({"mlp_ratios": (8, 8, 4, 0)}, "mlp_ratios 0 for a stage of 96 channels, which leaves no hidden channels"),
    ],
    ids=["lengths", "depth", "global_pool", "num_classes", "mlp_ratio"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_van", **kwargs)


def test_classifier_without_pooling_is_refused():
    model = timm.create_model("test_van", global_pool="").eval()
    with pytest.raises(ValueError, match="num_classes=0"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("van_b0", "segment", {"norm_eps": 1e-5}),
        ("van_b0", "detect", {}),
        ("test_van", "segment", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(model, task, expected):
    assert families.dense_kwargs(model, task) == expected


def test_keys_are_those_of_the_operator():
    def keys(site, token, size):
        everything = product(*map(range, size))
        return [{key for key in everything if max(abs(a - b) for a, b in zip(key, token, strict=True)) <= 11}]

    check_keys("test_van", keys)


def test_pattern():
    panels, got = patterns("van")
    y, x = panels["VAN"].queries[0]
    assert got["VAN"] == [product(range(y - 11, y + 12), range(x - 11, x + 12))]
    # Along an axis: how many of 7 taps, 3 apart, with 5 taps around each, reach a token.
    rows, columns = torch.zeros(28), torch.zeros(28)
    for tap in range(-9, 10, 3):
        rows[y + tap - 2 : y + tap + 3] += 1
        columns[x + tap - 2 : x + tap + 3] += 1
    torch.testing.assert_close(panels["VAN"].maps[0], rows[:, None] * columns / 4)


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("van_b1") == pytest.approx(2.5, rel=0.02)
