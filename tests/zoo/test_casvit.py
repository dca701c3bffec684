"""CAS-ViT's own arguments, initialisation, classifiers and norms of features. 3 s."""

import pytest
import timm
import torch

import zoo
from zoo import families
from zoo.casvit import VARIANTS, CASViT
from zoo.checkpoints import closest_models, unwrap

from . import golden
from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def official_weights(record=None):
    return golden.official_weights("casvit_xs", record)


def load(state_dict, **kwargs):
    return timm.create_model(
        "casvit_xs", pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}, **kwargs
    ).eval()


def test_every_variant_is_registered():
    assert set(timm.list_models(module="casvit")) == set(VARIANTS)
    assert zoo.casvit.CASViT is CASViT


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_casvit", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_drop_path_keeps_local_perception():
    torch.manual_seed(0)
    model = timm.create_model("test_casvit", drop_path_rate=1.0, depths=(1, 1, 1, 2)).train()
    block = model.stages[3].blocks[1]
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(block(x), x + block.local(x))


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("casvit_xs")
    block = model.stages[2].blocks[0]
    for conv, fan_in in ((block.mlp.fc1, 112), (block.attn.dw_conv, 9)):  # PyTorch's own
        assert conv.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert conv.bias.std() > 0.1 * fan_in**-0.5
    for classifier in (model.head.cls, model.head.dist):
        assert classifier.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert classifier.bias.eq(0).all()


def test_logits_are_the_mean_of_both_classifiers():
    torch.manual_seed(0)
    model, x = timm.create_model("test_casvit", num_classes=5), torch.randn(2, 64)
    head = model.get_classifier()
    want = (head.cls(x) + head.dist(x)) / 2
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode).head(x), want)


def test_distilled_training_gives_the_logits_of_both_classifiers():
    torch.manual_seed(0)
    model, images = timm.create_model("test_casvit", num_classes=5), torch.randn(2, 3, 32, 32)
    model.set_distilled_training()
    pair = model.train()(images)
    assert [tuple(logits.shape) for logits in pair] == [(2, 5), (2, 5)]
    model.reset_classifier(7)
    assert [tuple(logits.shape) for logits in model(images)] == [(2, 7), (2, 7)]
    assert model.eval()(images).shape == (2, 7)
    model.set_distilled_training(False)
    assert model.train()(images).shape == (2, 7)


def test_distilled_training_needs_two_classifiers():
    model = timm.create_model("test_casvit", distillation=False)
    assert type(model.head) is torch.nn.Linear
    with pytest.raises(ValueError, match="distillation=True"):
        model.set_distilled_training()


@pytest.mark.slow
@torch.no_grad()
def test_file_with_one_classifier_gives_its_logits():
    record = golden.read("casvit_xs")
    weights = official_weights(record)
    single = {key: value for key, value in weights.items() if not key.startswith("dist_head.")}
    images = golden.image(**record["input"])
    for state_dict, kwargs in ((single, {}), (single, {"distillation": False}), (weights, {"distillation": False})):
        logits = load(state_dict, dtype=torch.float64, **kwargs)(images)
        assert golden.difference(logits, record["logits_head_only"]) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_dense_backbone_has_a_batch_norm_for_each_feature():
    weights = {key: value for key, value in official_weights().items() if not key.startswith(("norm.", "head", "dist"))}
    for i, dim in zip((0, 2, 4, 6), VARIANTS["casvit_xs"]["embed_dims"], strict=True):
        values = {"weight": torch.rand(dim), "bias": torch.rand(dim)}
        values |= {"running_mean": torch.rand(dim), "running_var": torch.rand(dim) + 0.5}
        weights |= {f"norm{i}.{key}": value for key, value in values.items()}
    gain = golden.read("casvit_xs")["gain"]
    weights = {key: value * gain.get("attn.qkv.weight" if "qkv" in key else "", 1) for key, value in weights.items()}
    image = golden.image(1, 64, 96).float()
    detector = {f"backbone.{key}": value.float() for key, value in weights.items()}
    plain, normed = (load(detector, features_only=True, output_norm=norm)(image) for norm in (False, True))
    for i, before, after in zip((0, 2, 4, 6), plain, normed, strict=True):
        mean, var, weight, bias = (
            weights[f"norm{i}.{key}"].float()[:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        torch.testing.assert_close(after, (before - mean) / (var + 1e-5).sqrt() * weight + bias, rtol=1e-4, atol=1e-3)


def test_names_of_the_official_list_are_no_prefix():
    """The model's own list is called `network`, which is also the name of a wrapper in other checkpoints."""
    weights = official_weights()
    assert unwrap({"model": weights}).keys() == weights.keys()
    for prefix in ("network.", "backbone.", "module.network."):
        assert unwrap({f"{prefix}{key}": value for key, value in weights.items()}).keys() == weights.keys()


@pytest.mark.slow
def test_file_with_one_classifier_is_recognised():
    single = {key: value for key, value in official_weights().items() if not key.startswith("dist_head.")}
    assert closest_models(single) == (["casvit_xs"], 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*it has to be whole numbers from 1 to 1,000"),
        ({"mlp_ratio": 0}, "mlp_ratio 0 for a stage of 16 channels, which leaves no hidden channels"),
        ({"distillation": "hard"}, "distillation='hard'; it has to be one of True, False"),
        ({"output_norm": True}, "output_norm=True with 1000 classes"),
        ({"embed_dims": (1, 2, 2, 4)}, "the first stage needs 2 channels or more"),
    ],
    ids=["lengths", "depth", "mlp_ratio", "distillation", "output_norm", "channels"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_casvit", **kwargs)


def test_weights_for_384_pixels_squash_the_image():
    small, large = (timm.get_pretrained_cfg(f"casvit_m.{tag}") for tag in ("in1k", "in1k_384"))
    assert (small.input_size[1], small.crop_pct, small.crop_mode) == (224, 0.875, "center")
    assert (large.input_size[1], large.crop_pct, large.crop_mode) == (384, 1.0, "squash")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_prediction_changes_no_argument(task):
    assert families.dense_kwargs("casvit_m", task) == {}


def test_keys_are_those_of_the_operator():
    """The means of the whole map reach every token."""

    def keys(site, token, size):
        return [product(*map(range, size))]

    check_keys("test_casvit", keys)


def test_pattern():
    panels, got = patterns("casvit")
    y, x = panels["CAS-ViT"].queries[0]
    near, everything = got["CAS-ViT"]
    assert near == product(range(y - 2, y + 3), range(x - 2, x + 3))
    assert everything == product(range(28), range(28))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "billions"), [("casvit_xs", 0.56), ("casvit_m", 1.89)])
@torch.no_grad()
def test_multiply_adds_are_the_papers(model, billions):
    assert multiply_adds(model) == pytest.approx(billions, rel=0.03)
