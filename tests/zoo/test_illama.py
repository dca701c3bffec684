"""iLLaMA's attention, class token, positions, soft mask, pyramid, initialisation and keys. Seconds."""

import cmath
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from zoo import checkpoints, families, illama
from zoo.illama import CausalAttention
from zoo.tools import look_attention

from . import golden
from .attended import check_keys, patterns, places
from .test_parity import multiply_adds


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_illama", **kwargs).eval()


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def attention(count=7, **kwargs):
    """A module of two heads of 8 channels, and tokens for it."""
    torch.manual_seed(0)
    module = CausalAttention(16, 2, dtype=torch.float64, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval(), torch.randn(2, 1, count, 16, dtype=torch.float64)


def loops(module, x, share=0.0):
    """The output for tokens (B, 1, T, 16), token by token; later tokens count with this share of their weights."""
    out = torch.zeros_like(x)
    for b, tokens in enumerate(x[:, 0]):
        qkv = module.qkv(tokens).view(len(tokens), 3, 2, 8)
        for n in range(2):
            query, key = ([turn(qkv[t, part, n], t) for t in range(len(tokens))] for part in (0, 1))
            for i in range(len(tokens)):
                logits = torch.stack([query[i] @ key[j] for j in range(len(tokens))]) / math.sqrt(8)
                for j, weight in enumerate(logits.softmax(0)):
                    out[b, 0, i, 8 * n : 8 * n + 8] += weight * (1 if j <= i else share) * qkv[j, 2, n]
    return module.proj(out)


def turn(x, position):
    """The vector x (8,), in which each pair of adjacent channels is turned."""
    pairs = torch.view_as_complex(x.unflatten(0, (-1, 2)))
    turned = [complex(pair) * cmath.exp(1j * position * 10000 ** (-2 * i / 8)) for i, pair in enumerate(pairs)]
    return torch.view_as_real(torch.tensor(turned, dtype=torch.complex128)).flatten()


@torch.no_grad()
@pytest.mark.parametrize("rows", [512, 3])
def test_mask_follows_the_softmax(rows, monkeypatch):
    """Also if the queries are taken in parts."""
    monkeypatch.setattr(illama, "ROWS", rows)
    module, x = attention()
    torch.testing.assert_close(module(x), loops(module, x))


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soft_mask_adds_a_share_of_later_tokens_in_training(share):
    module, x = attention(soft=True)
    module.soft_mask.fill_(share)
    torch.testing.assert_close(module(x), loops(module, x))
    torch.testing.assert_close(module.train()(x), loops(module, x, share))


@torch.no_grad()
def test_tokens_of_a_map_are_its_rows():
    module, x = attention(6)
    torch.testing.assert_close(module(x.view(2, 2, 3, 16)), module(x).view(2, 2, 3, 16))


@pytest.mark.parametrize(
    ("schedule", "epochs", "shares"),
    [
        ("linear", 4, [1.0, 0.75, 0.375, 0.0, 0.0]),
        ("constant", 4, [1.0, 1.0, 1.0, 0.0, 0.0]),
        ("linear", 0, [0.0] * 5),
    ],
)
def test_soft_mask_follows_the_epoch(schedule, epochs, shares):
    model = build(soft_mask=schedule, soft_mask_epochs=epochs)
    masks = [module.soft_mask for module in model.modules() if isinstance(module, CausalAttention)]
    assert len(masks) == 8
    assert {mask.item() for mask in masks} == {shares[0]}  # before training
    for epoch, share in zip((0, 1, 2.5, 4, 7), shares, strict=True):
        model.set_epoch(epoch)
        assert {mask.item() for mask in masks} == {share}
    assert not [key for key in model.state_dict() if "soft_mask" in key]


@torch.no_grad()
def test_class_token_is_the_last_of_the_sequence():
    model, x = build(class_token=True, num_classes=5), images(64, 48)
    stream = model.stem.proj(x).flatten(2).transpose(1, 2)
    position, token = model.stem.pos_embed, model.stem.cls_token
    grid = position[:, :16].transpose(1, 2).unflatten(2, (4, 4))
    stream = stream + F.interpolate(grid, (4, 3), mode="bicubic").flatten(2).transpose(1, 2)
    stream = torch.cat((stream, (token + position[:, 16:]).expand(2, -1, -1)), 1)[:, None]
    features = model.forward_intermediates(x, intermediates_only=True)
    for stage, feature in zip(model.stages, features, strict=True):
        for block in stage.blocks:
            stream = stream + block.attn(F.rms_norm(stream, (48,), block.norm1.weight, 1e-6))
            normed = F.rms_norm(stream, (48,), block.norm2.weight, 1e-6)
            gate, up = block.mlp.fc1.weight.chunk(2)
            stream = stream + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), block.mlp.fc2.weight)
        torch.testing.assert_close(feature, stream[:, 0, :-1].transpose(1, 2).unflatten(2, (4, 3)))
    normed = F.rms_norm(stream[:, 0], (48,), model.norm.weight, 1e-6)
    torch.testing.assert_close(model.forward_features(x), normed)
    torch.testing.assert_close(model(x), model.head(normed[:, -1]))


@torch.no_grad()
def test_model_without_a_class_token_takes_the_rest_of_a_file():
    weights = build(class_token=True).state_dict()
    model, x = build(pretrained=True, pretrained_cfg_overlay={"state_dict": {"model": weights}}), images(64, 80)
    assert torch.equal(model.stem.pos_embed, weights["stem.pos_embed"][:, :16])
    torch.testing.assert_close(model(x), model.head(model.forward_features(x).mean((2, 3))))


@torch.no_grad()
@pytest.mark.parametrize("depths", [(3, 1, 1, 3), (1, 2, 5)])
def test_weights_load_into_stages_that_divide_the_blocks_otherwise(depths):
    whole, x = build(class_token=True), images(64, 48)
    one_by_one = []
    for stage in whole.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda *args: one_by_one.append(args[2]))
    logits = whole(x)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": whole.state_dict()}, "class_token": True}
    count = len(depths)
    other = build(depths=depths, embed_dims=(48,) * count, num_heads=(3,) * count, **overlay)
    assert torch.equal(other(x), logits)
    lasts = [sum(depths[: i + 1]) - 1 for i in range(count)]
    wanted = [one_by_one[last][:, 0, :-1].transpose(1, 2).unflatten(2, (4, 3)) for last in lasts]
    features = other.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(features, wanted, strict=True))


@pytest.mark.parametrize("count", [3, 5])
def test_features_of_another_number_of_stages(count):
    stages = {"depths": (1,) * count, "embed_dims": (48,) * count, "num_heads": (3,) * count}
    assert len(build(features_only=True, **stages)(images(64, 64))) == count
    assert len(build(features_only=True, out_indices=(count - 1,), **stages)(images(64, 64))) == 1
    with pytest.raises(
        ValueError, match=rf"out_indices=\({count},\); it has to be a list of stages from 0 to {count - 1}"
    ):
        build(features_only=True, out_indices=(count,), **stages)


@pytest.mark.slow  # the message compares the file with all models
def test_another_number_of_blocks_is_refused():
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": build().state_dict()}}
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.2"):
        build(depths=(3, 2, 2, 2), **overlay)


def pyramid(**kwargs):
    return build(features_only=True, pyramid=True, class_token=True, **kwargs)


@torch.no_grad()
def test_pyramid_is_made_of_the_features():
    backbone, x = pyramid(), images(64, 80)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    features = backbone(x)
    assert [tuple(feature.shape[2:]) for feature in features] == [(16, 20), (8, 10), (4, 5), (2, 2)]
    model = backbone.model
    maps = []
    stream = model.stem(x)
    for stage in model.stages:
        stream = stage(stream)
        maps.append(stream.map)
    up, norm, act, further = model.output_norms[0]
    torch.testing.assert_close(features[0], further(act(norm(up(maps[0])))))
    torch.testing.assert_close(features[1], model.output_norms[1](maps[1]))
    torch.testing.assert_close(features[2], maps[2])
    torch.testing.assert_close(features[3], F.max_pool2d(maps[3], 2))


@torch.no_grad()
def test_file_of_an_official_segmentor():
    """It has a pyramid, with names of its own, and the final norm, which nothing reads."""
    whole = pyramid(depths=(3, 1, 1, 3))
    theirs = {"stem.pos_embed": "pos_embed", "stem.cls_token": "cls_token", "stem.proj": "patch_embed.proj"}
    theirs |= {"output_norms.0": "fpn1", "output_norms.1": "fpn2.0"}
    for number, (stage, block) in enumerate((i, j) for i, depth in enumerate((3, 1, 1, 3)) for j in range(depth)):
        theirs[f"stages.{stage}.blocks.{block}"] = f"blocks.{number}"
    file = {"backbone.norm.weight": torch.ones(48), "decode_head.conv_seg.weight": torch.ones(3)}
    for key, value in whole.model.state_dict().items():
        start = next(name for name in theirs if key == name or key.startswith(f"{name}."))
        name = f"backbone.{theirs[start]}{key.removeprefix(start)}"
        if ".fc1." in name:
            gate, up = value.chunk(2)
            file |= {name: gate, name.replace("fc1", "fc3"): up}
        else:
            file[name] = value
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": {"state_dict": file}}}
    x = images(64, 64)
    for depths in ((3, 1, 1, 3), (2, 2, 2, 2)):
        loaded = pyramid(depths=depths, **overlay)
        assert torch.equal(loaded(x)[3], whole(x)[3])
    assert all(torch.equal(*pair) for pair in zip(pyramid(depths=(3, 1, 1, 3), **overlay)(x), whole(x), strict=True))


def test_every_parameter_of_a_pyramid_gets_a_gradient():
    backbone = pyramid().train()
    sum(feature.square().mean() for feature in backbone(images(64, 64))).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_prediction_has_a_pyramid(task):
    assert families.dense_kwargs("illama_tiny", task) == {"pyramid": True}


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx"])
def test_features_of_a_model_with_a_class_token(feature_cls):
    whole, x = build(class_token=True), images(70, 64)
    want = whole.forward_intermediates(x, intermediates_only=True)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": whole.state_dict()}}
    backbone = build(features_only=True, feature_cls=feature_cls, class_token=True, **overlay)
    assert all(torch.equal(*pair) for pair in zip(backbone(x), want, strict=True))


def test_every_parameter_beside_a_class_token_gets_a_gradient():
    model = build(class_token=True, num_classes=5, soft_mask_epochs=2).train()
    model.set_grad_checkpointing()
    model(images(64, 64)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 128])
def test_positions_of_other_images_are_resized_on_loading(side):
    """That of the class token is kept."""
    weights = build(img_size=side, class_token=True).state_dict()
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}, "class_token": True}
    given, count = weights["stem.pos_embed"], (side // 16) ** 2
    assert torch.equal(build(img_size=(side, side), **overlay).stem.pos_embed, given)
    grid = given[:, :count].transpose(1, 2).unflatten(2, (side // 16, side // 16))
    want = F.interpolate(grid, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    loaded = build(**overlay).stem.pos_embed.detach()
    torch.testing.assert_close(loaded, torch.cat((want, given[:, count:]), 1))


@pytest.mark.slow  # the message compares the file with all models
@pytest.mark.parametrize("count", [0, 15])
def test_positions_that_are_no_square_are_refused(count):
    weights = build().state_dict() | {"stem.pos_embed": torch.zeros(1, count, 48)}
    with pytest.raises(RuntimeError, match=rf"stem.pos_embed \(1, {count}, 48\) for \(1, 16, 48\)"):
        build(pretrained=True, pretrained_cfg_overlay={"state_dict": weights})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["illama_tiny", "illama_large"])
def test_official_file_is_recognised(name):
    """Of 12 blocks and of 24."""
    keys = golden.official()[name]["keys"]
    file = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    assert checkpoints.closest_models(file) == ([name], 1.0)


@pytest.mark.parametrize(("name", "want"), [("illama_tiny", 1.3), ("illama_small", 4.6), ("illama_base", 17.6)])
def test_multiply_adds_are_the_readmes(name, want):
    assert multiply_adds(name) == pytest.approx(want, abs=0.06)


def test_hidden_channels_are_those_of_llama():
    for name, hidden in (("tiny", 512), ("small", 1024), ("base", 2048), ("large", 2816)):
        model = timm.create_model(f"illama_{name}", device="meta")
        assert model.stages[0].blocks[0].mlp.fc2.in_features == hidden


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("illama_tiny", depths=(1,) * 4, drop_path_rate=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or module.bias.eq(0).all()
    assert model.stem.proj.weight.abs().max().item() == pytest.approx((3 * 256) ** -0.5, rel=0.01)
    assert model.stem.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stem.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.RMSNorm)} == {1e-6}
    assert model.no_weight_decay() == {"stem.pos_embed", "stem.cls_token"}
    rates = [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_pixels_that_fill_no_patch_are_left_out():
    assert [families.feature_side("illama_tiny", side, 16) for side in (224, 32, 50)] == [14, 2, 3]
    assert timm.get_pretrained_cfg("illama_tiny.in1k").pool_size == (14, 14)


def before(token, size):
    """A token and those before it, row by row."""
    return {(y, x) for y in range(size[0]) for x in range(size[1]) if (y, x) <= token}


def test_keys_are_the_tokens_before():
    def keys(site, _, size):
        token = tuple(place // 16 for place in (70, 40))
        return [before((min(token[0], size[0] - 1), token[1]), size)]

    check_keys("test_illama", keys)


@torch.no_grad()
def test_keys_beside_a_class_token():
    model, x = build(class_token=True), images(48, 64)[:1]
    for keys in look_attention.keys(model, "test_illama", x, (40, 20)):
        assert places(keys.weights) == before((2, 1), (3, 4))
        assert keys.padding == 0


def test_pattern():
    (panel,) = patterns("illama")[0].values()
    assert patterns("illama")[1] == {"iLLaMA": [before(panel.queries[0], (28, 28))]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (48, 48, 48, 96)}, "all stages have the same number of channels"),
        ({"num_heads": (16,) * 4}, "heads need an even number of channels"),
        ({"patch_size": 33}, "patch_size=33; it has to be a whole number from 1 to 32"),
        ({"img_size": (64, 96)}, r"img_size=\(64, 96\); it has to be one side"),
        ({"soft_mask": "cosine"}, "soft_mask='cosine'; it has to be one of 'constant', 'linear'"),
        ({"soft_mask_epochs": -1}, "soft_mask_epochs=-1; it has to be a number from 0"),
        ({"pyramid": True}, "pyramid=True with 1000 classes and 4 stages"),
        ({"pyramid": True, "num_classes": 0, "patch_size": 6}, "pyramid=True with patch_size=6; .* use 8 or 16"),
    ],
    ids=["channels", "heads", "patch", "sides", "mask", "epochs", "pyramid", "strides"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)
