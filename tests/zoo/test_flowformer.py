"""Flowformer's blocks, patches, position embedding, initialisation and keys. Seconds."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from zoo import checkpoints
from zoo.kernels import flow_attention

from . import golden
from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_flowformer", **kwargs).eval()


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_block_scales_the_branch_of_the_mlp_only():
    block = build(dtype=torch.float64).stages[1].blocks[0]
    for parameter in block.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    normed = F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, eps=1e-6)
    want = x + block.attn.proj(flow_attention(*block.attn.qkv(normed).chunk(3, -1), num_heads=4))
    normed = F.layer_norm(want, (32,), block.norm2.weight, block.norm2.bias, eps=1e-6)
    want = want + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))
    torch.testing.assert_close(block(x), want)
    assert [name for name, _ in block.named_parameters() if "gamma" in name] == ["ls2.gamma"]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (70, 45), (160, 96)], ids=str)
def test_stem_pads_images_and_resizes_positions(size):
    stem, x = build().stem, images(*size)
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    want = F.conv2d(F.pad(x, (0, 4 * width - size[1], 0, 4 * height - size[0])), stem.proj.weight, stem.proj.bias, 4)
    table = stem.pos_embed.view(1, 16, 16, 16).permute(0, 3, 1, 2)
    want = want + F.interpolate(table, (height, width), mode="bicubic")
    torch.testing.assert_close(stem(x), want)


@torch.no_grad()
def test_odd_maps_are_padded_with_zeros():
    model = build()
    patches, x = model.stages[1].downsample, torch.randn(2, 16, 5, 8)
    want = F.conv2d(F.pad(x, (0, 0, 0, 1)), patches.proj.weight, patches.proj.bias, 2)
    torch.testing.assert_close(patches(x), want)


@torch.no_grad()
def test_features_are_the_residual_stream():
    model, x = build(), images(64, 64)
    want = model.stem(x)
    for stage, feature in zip(model.stages, model.forward_intermediates(x, intermediates_only=True), strict=True):
        want = stage.downsample(want).permute(0, 2, 3, 1)
        for block in stage.blocks:
            want = block(want)
        want = want.permute(0, 3, 1, 2)
        torch.testing.assert_close(feature, want)
    normed = F.layer_norm(want.permute(0, 2, 3, 1), (64,), model.norm.weight, model.norm.bias, eps=1e-6)
    torch.testing.assert_close(model(x), model.head(normed.mean((1, 2))))


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 160])
def test_positions_of_other_images_are_resized_on_loading(side):
    """A model for their size takes them as they are."""
    weights = build(img_size=side).state_dict()
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    assert torch.equal(build(img_size=(side, side), **overlay).stem.pos_embed, weights["stem.pos_embed"])
    table = weights["stem.pos_embed"].view(1, side // 4, side // 4, 16).permute(0, 3, 1, 2)
    want = F.interpolate(table, (16, 16), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(build(**overlay).stem.pos_embed.detach(), want)


@pytest.mark.slow  # the message compares the file with all models
@pytest.mark.parametrize("count", [0, 15])
def test_positions_that_are_no_square_are_refused(count):
    weights = build().state_dict() | {"stem.pos_embed": torch.zeros(1, count, 16)}
    with pytest.raises(RuntimeError, match=rf"stem.pos_embed \(1, {count}, 16\) for \(1, 256, 16\)"):
        build(pretrained=True, pretrained_cfg_overlay={"state_dict": weights})


@pytest.mark.slow
def test_official_file_is_recognised():
    keys = golden.official()["flowformer"]["keys"]
    file = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    assert checkpoints.closest_models(file) == (["flowformer"], 1.0)


@pytest.mark.slow
def test_multiply_adds_are_official():
    assert multiply_adds("flowformer") == pytest.approx(6.88, abs=0.005)


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("flowformer", depths=(1, 1, 2, 1), drop_path_rate=0.2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias.eq(0).all()
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01)
    assert model.stem.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all(block.ls2.gamma.eq(1e-5).all() for block in blocks)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_position_embedding_has_no_weight_decay():
    assert build().no_weight_decay() == {"stem.pos_embed"}


def test_keys_are_all_tokens():
    check_keys("test_flowformer", lambda site, token, size: [product(*map(range, size))])


def test_pattern():
    assert patterns("flowformer")[1] == {"Flowformer": [product(range(28), range(28))]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (3, 3, 3, 3)}, r"num_heads=\(3, 3, 3, 3\) for embed_dims.*heads have to divide"),
        ({"img_size": (64, 96)}, r"img_size=\(64, 96\); it has to be one side"),
        ({"img_size": 16}, "img_size=16; it has to be a whole number from 32"),
        ({"layer_scale": "1"}, "layer_scale='1'; it has to be a number"),
        ({"mlp_ratio": (2, 2)}, r"2 mlp_ratio=\(2, 2\).*one value per stage"),
    ],
    ids=["heads", "sides", "size", "scale", "ratios"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)
