"""Efficient probing: the official outputs, gradients; slow, 15 s: every family, and models of timm."""

import json

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import nn

from zoo.backbone import Backbone
from zoo.efficient_probing import EfficientPooling, EfficientProbing, attach, probing_head
from zoo.messages import UserError
from zoo.opening import open_model
from zoo.recipes.classify.model import write_description
from zoo.recipes.config import Config
from zoo.recipes.run_weights import save_weights

from . import golden

MODELS = [name for name in timm.list_models("test_*") if timm.model_entrypoint(name).__module__.startswith("zoo.")]
GOLDENS = {"ep_384_q12": (384, 12), "ep_768_q32": (768, 32)}


def plain(pool, tokens):
    """The paper's formulas, query by query, for tokens (N, C) of one image."""
    values = pool.v.weight @ tokens.T  # channels, N
    width = len(values) // pool.num_queries
    parts = []
    for m, query in enumerate(pool.cls_token[0]):
        attention = (tokens @ query / tokens.shape[1] ** 0.5).softmax(0)
        parts.append(values[m * width : (m + 1) * width] @ attention)
    return torch.cat(parts)


def pooling(dim=12, num_queries=3, **kwargs):
    torch.manual_seed(0)
    pool = EfficientPooling(dim, num_queries, dtype=torch.float64, **kwargs)
    nn.init.normal_(pool.cls_token, std=3)
    return pool


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDENS)
def test_matches_official(name):
    record = json.loads((golden.FOLDER / "goldens" / "heads" / f"{name}.json").read_text())
    dim, num_queries = GOLDENS[name]
    head = EfficientProbing(dim, 1000, num_queries, dtype=torch.float64).eval()
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    head.load_state_dict(golden.weights(shapes, record["gain"]))
    made = record["map"]
    generator = torch.Generator().manual_seed(made["seed"])
    size = (made["batch"], made["channels"], made["height"], made["width"])
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    outputs = {"pooled": head.pool(x), "attention": head.pool.attention(x), "logits": head(x)}
    assert max(golden.difference(output, record[key]) for key, output in outputs.items()) < 1e-6


@pytest.mark.parametrize("d_out", [1, 2])
def test_pooling_is_the_papers(d_out):
    pool, x = pooling(d_out=d_out, num_queries=3), torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(pool(x), torch.stack([plain(pool, tokens) for tokens in x]))
    assert torch.autograd.gradcheck(pool, x.requires_grad_())


def test_hook_on_the_values_is_called():
    """The values are then computed for every token, with the same result."""
    pool, x = pooling(d_out=2), torch.randn(2, 12, 3, 4, dtype=torch.float64)
    want, seen = pool(x), []
    pool.v.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(pool(x), want)
    assert seen == [1]


@torch.no_grad()
def test_layouts_of_features_agree():
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    want, tokens = pooling()(x), x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooling(channels_last=True)(x.permute(0, 2, 3, 1)), want)
    torch.testing.assert_close(pooling()(tokens), want)
    torch.testing.assert_close(pooling(prefix_tokens=2)(torch.cat((torch.ones_like(tokens[:, :2]), tokens), 1)), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EfficientProbing(96, 10, 7), "Got 7 queries for 96 channels; the number has to divide the channels."),
        (lambda: EfficientPooling(96, 32, 2), "Got 32 queries for 48 channels; the number has to divide the channels."),
        (lambda: EfficientPooling(96, 32, 5), "Got d_out=5 for 96 channels; it has to divide them."),
        (
            lambda: EfficientPooling(96)(torch.ones(2, 96)),
            r"Got features of shape \(2, 96\); .* tokens of 96 channels.",
        ),
        (lambda: EfficientPooling(96)(torch.ones(2, 5, 64)), r"Got features of shape \(2, 5, 64\); efficient probing"),
        (lambda: timm.create_model("test_van", global_pool="ep0"), "Got global_pool='ep0'; it has to be one of 'avg'"),
        (lambda: attach(timm.create_model("levit_128s"), 5), "LevitDistilled can't be pooled .* classifiers"),
    ],
    ids=["queries", "slices", "width", "pooled", "channels", "no queries", "two classifiers"],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_default_number_of_queries():
    """The paper's 32, or the largest smaller number that divides the channels."""
    assert [EfficientPooling(dim).num_queries for dim in (768, 96, 90, 7)] == [32, 32, 30, 7]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_it(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 64, 48)
    backbone = {key for key in model.state_dict() if not key.startswith("head.")}
    model.reset_classifier(5, "ep4")
    assert {key for key in model.state_dict() if not key.startswith("head.")} == backbone
    with torch.no_grad():
        features = model.forward_features(x)
    model.forward_head(features).square().mean().backward()
    parts = [p for key, p in model.named_parameters() if key.startswith(("head.", "pre_logits."))]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parts)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))
    model.reset_classifier(3)  # a new classifier on the same pooling
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pre_logits)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    assert probing_head(model) is None


def save_run(folder, name, model, **kwargs):
    """A run folder with what `open_model` reads."""
    folder.mkdir()
    cfg = OmegaConf.structured(Config(model=name, model_kwargs=kwargs))
    classes = [str(i) for i in range(model.num_classes)]
    config = timm.data.resolve_model_data_config(model)
    write_description(folder, model, cfg, classes, config)
    save_weights(folder / "model.safetensors", model.state_dict(), name, classes)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["test_van", "test_vim", "test_vit", "test_convnext", "test_resnet", "test_mambaout"])
def test_run_folder_is_opened_again(name, tmp_path):
    torch.manual_seed(0)
    model = open_model(name, num_classes=4, global_pool="ep8").model
    for module in (probing_head(model)[0], probing_head(model)[2]):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    x = torch.randn(2, *timm.data.resolve_model_data_config(model)["input_size"])
    save_run(tmp_path / "run", name, model, global_pool="ep8")
    torch.testing.assert_close(open_model(str(tmp_path / "run")).model(x), model(x))
    again = open_model(name, str(tmp_path / "run"), num_classes=4, global_pool="ep8").model
    torch.testing.assert_close(again(x), model(x))
    other = open_model(name, str(tmp_path / "run"), num_classes=6, global_pool="ep4").model  # with a new head
    assert other(x).shape == (2, 6)
    kept = model.forward_features(x), other.forward_features(x)
    torch.testing.assert_close(*kept)
    assert probing_head(open_model(str(tmp_path / "run"), features_only=True).model) is None
    with pytest.raises(UserError, match=r"pools by efficient probing, but .*: give global_pool=ep8 \(model_kwargs\."):
        open_model(name, str(tmp_path / "run"), num_classes=4)
    for pooling in ("ep4", "ep"):
        with pytest.raises(UserError, match=r"with 8 queries, but .* with (4|24|32): give global_pool=ep8 \("):
            open_model(name, str(tmp_path / "run"), num_classes=4, global_pool=pooling)
    plain = open_model(name, num_classes=4).model
    save_run(tmp_path / "plain", name, plain)
    probed = open_model(name, str(tmp_path / "plain"), num_classes=4, global_pool="ep8").model  # with a new head
    torch.testing.assert_close(plain.forward_features(x), probed.forward_features(x))
    assert probing_head(probed).pool.num_queries == 8
    assert probed(x).shape == (2, 4)
    if isinstance(model, Backbone):  # timm alone reads it, too
        alone = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
        torch.testing.assert_close(alone(x), model(x))


@torch.no_grad()
def test_patches_are_pooled_without_the_class_token():
    for name in ("test_vit", "test_vim"):
        torch.manual_seed(0)
        model = open_model(name, num_classes=4, global_pool="ep").model
        x = torch.randn(1, *timm.data.resolve_model_data_config(model)["input_size"])
        patches = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(probing_head(model)(patches), model(x))


def test_broken_description_is_refused(tmp_path):
    save_run(
        tmp_path / "run", "test_vit", open_model("test_vit", num_classes=4, global_pool="ep8").model, global_pool="ep8"
    )
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"efficient_probing": 8', '"efficient_probing": "eight"'))
    with pytest.raises(UserError, match="does not describe a model: its efficient_probing is 'eight'"):
        open_model(str(tmp_path / "run"))
