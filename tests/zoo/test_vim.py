"""Vim's scans, class token, position embeddings, pyramid, initialisation and keys. 5 s."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo import checkpoints, families
from zoo.attention_maps import attention
from zoo.tools import look_attention
from zoo.vim import Mixer, Scan

from . import golden
from .attended import check_keys, patterns, product


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_vim", **kwargs).eval()


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def plain_scan(scan, x):
    """A forward scan of a sequence (T, C), token by token, by the paper's formulas."""
    width, (_, state_dim), rank = scan.conv.kernel_size[0], scan.A_log.shape, scan.dt_proj.in_features
    padded = torch.cat((x.new_zeros(width - 1, x.shape[1]), x))
    taps = scan.conv.weight[:, 0].T  # the last one is for the token itself
    x = F.silu(torch.stack([(padded[t : t + width] * taps).sum(0) for t in range(len(x))]) + scan.conv.bias)
    state, out = x.new_zeros(x.shape[1], state_dim), []
    for token in x:
        step, b, c = (scan.x_proj.weight @ token).split((rank, state_dim, state_dim))
        delta = F.softplus(scan.dt_proj(step))
        state = (delta[:, None] * -scan.A_log.exp()).exp() * state + (delta * token)[:, None] * b
        out.append(state @ c + scan.D * token)
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 4), (1, 7)], ids=["map", "sequence"])
def test_mixer_is_the_papers(size):
    torch.manual_seed(0)
    mixer = Mixer(16, 4, 4, dtype=torch.float64)
    for parameter in mixer.parameters():
        parameter.normal_(std=0.3)
    x = tokens(1, *size, 16)
    scanned, gate = mixer.in_proj(x)[0].flatten(0, 1).chunk(2, -1)
    forward, backward = plain_scan(mixer.scan, scanned), plain_scan(mixer.scan_b, scanned.flip(0)).flip(0)
    want = mixer.proj((forward + backward) / 2 * F.silu(gate))
    torch.testing.assert_close(mixer(x)[0].flatten(0, 1), want)


@torch.no_grad()
def test_class_token_is_in_the_middle_of_the_sequence():
    model, x = build(class_token=True, num_classes=5), images(64, 48)
    stream = model.stem.proj(x).flatten(2).transpose(1, 2)
    position, token = model.stem.pos_embed, model.stem.cls_token
    grid = torch.cat((position[:, :8], position[:, 9:]), 1).transpose(1, 2).unflatten(2, (4, 4))
    stream = stream + F.interpolate(grid, (4, 3), mode="bicubic").flatten(2).transpose(1, 2)
    stream = torch.cat((stream[:, :6], (token + position[:, 8:9]).expand(2, -1, -1), stream[:, 6:]), 1)
    for stage in model.stages:
        for block in stage.blocks:
            stream = stream + block.mixer(block.norm(stream)[:, None])[:, 0]
    normed = F.rms_norm(stream, (48,), model.norm.weight, 1e-5)
    torch.testing.assert_close(model(x), model.head(normed[:, 6]))
    feature = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    want = torch.cat((stream[:, :6], stream[:, 7:]), 1).transpose(1, 2).unflatten(2, (4, 3))
    torch.testing.assert_close(feature, want)


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx"])
def test_features_of_a_model_with_a_class_token(feature_cls):
    whole, x = build(class_token=True), images(70, 64)
    want = whole.forward_intermediates(x, intermediates_only=True)
    overlay = {"state_dict": whole.state_dict()}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "class_token": True}
    backbone = build(features_only=True, feature_cls=feature_cls, **kwargs)
    assert all(torch.equal(*pair) for pair in zip(backbone(x), want, strict=True))


@torch.no_grad()
def test_methods_of_a_model_with_a_class_token():
    model, x = build(class_token=True, num_classes=5), images(64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 4 * 4 + 1, 48)  # the class token is the ninth
    torch.testing.assert_close(model.forward_head(features), model(x))
    final, _ = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 8])
    model.reset_classifier(5, "")
    with pytest.raises(ValueError, match="5 classes needs pooled features"):
        model(x)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert model.no_weight_decay() == {"stem.pos_embed", "stem.cls_token"}


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_final_norm_of_large_numbers_in_float16(class_token):
    """Their squares, above 65,504, are no float16."""
    model = build(class_token=class_token)
    for parameter in (model.stem.proj.bias, model.stem.pos_embed, model.stem.cls_token):
        if parameter is not None:
            parameter.mul_(0).add_(500)
    want = model(images(64, 64))
    torch.testing.assert_close(model.half()(images(64, 64).half()).float(), want, rtol=0.02, atol=0.02)


def test_every_parameter_beside_a_class_token_gets_a_gradient():
    model, x = build(class_token=True, num_classes=5).train(), images(64, 64)
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_published_file_gives_a_backbone_without_a_class_token():
    whole = build(class_token=True)
    overlay = {"state_dict": {"model": whole.state_dict()}}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
    backbone = build(**kwargs, **families.dense_kwargs("test_vim", "segment"))
    position = whole.stem.pos_embed
    assert torch.equal(backbone.model.stem.pos_embed, torch.cat((position[:, :8], position[:, 9:]), 1))
    assert torch.equal(
        backbone.model.stages[3].blocks[1].mixer.proj.weight, whole.stages[3].blocks[1].mixer.proj.weight
    )
    assert [tuple(feature.shape[1:]) for feature in backbone(images(64, 96))] == [
        *((48, 16, 24), (48, 8, 12), (48, 4, 6), (48, 2, 3))
    ]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


@torch.no_grad()
def test_file_of_an_official_segmentor():
    """It has a pyramid, with names of its own, and the final norm, which nothing reads, but no class token."""
    kwargs = {"features_only": True, "pyramid": True}
    whole = build(**kwargs)
    pyramid = {"output_norms.0.": "fpn1.", "output_norms.1.": "fpn2.0."}
    file = {}
    for key, value in whole.model.state_dict().items():
        start = next((name for name in pyramid if key.startswith(name)), "")
        file[f"backbone.{pyramid.get(start, '')}{key.removeprefix(start)}"] = value
    file |= {"backbone.norm_f.weight": torch.ones(48), "decode_head.conv_seg.weight": torch.ones(3)}
    loaded = build(**kwargs, pretrained=True, pretrained_cfg_overlay={"state_dict": {"state_dict": file}})
    assert all(torch.equal(*pair) for pair in zip(loaded(images(64, 64)), whole(images(64, 64)), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_position_embeddings_are_resized_to_another_grid(class_token):
    """As fine-tuning to stride 8 needs it. The class token stays in the middle."""
    whole = build(class_token=True)
    overlay = {"state_dict": whole.state_dict()}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "class_token": class_token}
    other = build(stride=8, table_grid=7, **kwargs)
    position = whole.stem.pos_embed
    grid = torch.cat((position[:, :8], position[:, 9:]), 1).transpose(1, 2).unflatten(2, (4, 4))
    want = F.interpolate(grid, (7, 7), mode="bicubic").flatten(2).transpose(1, 2)
    if class_token:
        want = torch.cat((want[:, :24], position[:, 8:9], want[:, 24:]), 1)
    torch.testing.assert_close(other.stem.pos_embed, want)
    assert other(images(64, 64)).shape == (2, 1000)


@pytest.mark.slow
def test_official_files_are_recognised():
    for name in ("vim_tiny", "vim_small_stride8"):
        keys = golden.official()[name]["keys"]
        file = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        assert checkpoints.closest_models(file) == ([name], 1.0)


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny", drop_path_rate=0.23)
    assert model.stem.proj.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert model.stem.proj.bias.eq(0).all()
    for table in (model.stem.pos_embed, model.stem.cls_token, model.head.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.head.bias.eq(0).all()
    mixer = model.stages[2].blocks[3].mixer
    assert mixer.in_proj.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    assert mixer.proj.weight.abs().max().item() == pytest.approx((384 * 24) ** -0.5, rel=0.01)
    for scan in (mixer.scan, mixer.scan_b):
        assert scan.conv.weight.abs().max().item() == pytest.approx(0.5, rel=0.01)
        assert scan.x_proj.weight.abs().max().item() == pytest.approx(384**-0.5, rel=0.01)
        assert scan.dt_proj.weight.abs().max().item() == pytest.approx(12**-0.5, rel=0.01)
        torch.testing.assert_close(scan.A_log[7], torch.arange(1.0, 17).log())
        assert scan.D.eq(1).all()
    steps = F.softplus(mixer.scan.dt_proj.bias).log()
    assert (steps.min().item(), steps.max().item()) == pytest.approx((math.log(1e-3), math.log(1e-1)), abs=0.1)
    assert mixer.scan_b.dt_proj.bias.eq(0).all()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(24)])


def test_weight_decay_is_that_of_the_official_code():
    """A_log, of two dimensions, is decayed."""
    mixer = timm.create_model("test_vim", device="meta").stages[0].blocks[0].mixer
    exempt = {name for name, parameter in mixer.named_parameters() if parameter.ndim <= 1}
    assert exempt == {f"{scan}.{name}" for scan in ("scan", "scan_b") for name in ("conv.bias", "dt_proj.bias", "D")}


@pytest.mark.parametrize(
    ("name", "stride", "sides"), [("vim_tiny", 16, [14, 2, 3]), ("vim_tiny_stride8", 8, [27, 3, 5])]
)
def test_pixels_that_fill_no_patch_are_left_out(name, stride, sides):
    assert [families.feature_side(name, side, stride) for side in (224, 32, 50)] == sides
    assert timm.get_pretrained_cfg(f"{name}.in1k").pool_size == (sides[0], sides[0])


def test_keys_are_those_of_the_operator():
    check_keys("test_vim", lambda site, token, size: [product(*map(range, size))])


@torch.no_grad()
@pytest.mark.parametrize(("pixel", "place"), [((40, 20), (2, 1)), ((10, 20), (0, 1))], ids=["after", "before"])
def test_keys_beside_a_class_token(pixel, place):
    """The class token's share is counted as padding, and the token at the pixel is found in the sequence."""
    model, x = build(class_token=True), images(48, 64)[:1]
    for keys in look_attention.keys(model, "test_vim", x, pixel):
        assert keys.weights.shape == (3, 4)
        assert 0 < keys.padding < 1
        assert keys.weights.sum().item() == pytest.approx(1 - keys.padding, abs=1e-5)
    for module in model.modules():
        if isinstance(module, Scan):  # without states and neighbours, a token depends on itself alone
            module.x_proj.weight.zero_()
            module.conv.weight[..., :-1] = 0
    for keys in look_attention.keys(model, "test_vim", x, pixel):
        assert keys.weights.nonzero().tolist() == [list(place)]


@torch.no_grad()
def test_keys_weigh_tokens_as_the_scans_do():
    """C times the decays on the way times B and the step, and D; times the derivative of SiLU before the scans."""
    mixer = Mixer(1, 1, 1, dtype=torch.float64)
    for parameter in mixer.parameters():
        parameter.fill_(0.5)
    x = tokens(1, 1, 5, 1)
    (weights,) = attention(mixer, (x,), [(0, 2)])[0]
    values = x[0, 0, :, 0] / 2
    scanned = F.silu(values / 2 + 0.5)  # also B and C
    step = F.softplus(scanned / 2 + 0.5)
    way = torch.stack([step[t + 1 : 3].sum() if t < 2 else step[2:t].sum() for t in range(5)])
    want = scanned[2] * (-math.exp(0.5) * way).exp() * scanned * step
    want[2] = 2 * (want[2] + 0.5)  # of both scans
    want *= torch.func.vmap(torch.func.grad(lambda value: F.silu(value / 2 + 0.5)))(values)
    torch.testing.assert_close(weights[0] / weights.sum(), want / want.sum())


def test_pattern():
    panels, got = patterns("vim")
    (weights,) = panels["Vim"].maps
    y, x = panels["Vim"].queries[0]
    assert got["Vim"] == [product(range(28), range(28))]
    assert weights[y, x] == 1
    assert weights[y, x + 3] == weights[y, x - 3] == pytest.approx(math.exp(-0.06) / 2, rel=1e-4)
    assert weights[y + 1, x] == pytest.approx(math.exp(-0.02 * 28) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (48, 48, 48, 64)}, "all stages have the same number of channels"),
        ({"patch_size": 33}, "patch_size=33; it has to be a whole number from 1 to 32"),
        ({"patch_size": "16"}, "patch_size='16'; it has to be a whole number from 1 to 32"),
        ({"stride": 17}, "stride=17; it has to be a whole number from 1 to 16"),
        ({"state_dim": 0}, "state_dim=0; it has to be a whole number from 1 to 1,024"),
        ({"kernel_size": True}, "kernel_size=True; it has to be a whole number from 1 to 1,024"),
        ({"class_token": "mid"}, "class_token='mid'; it has to be one of True, False"),
        ({"pyramid": True}, "pyramid=True with 1000 classes and 4 stages"),
        ({"pyramid": True, "num_classes": 0, "stride": 6}, "pyramid=True with stride=6; .* use 8 or 16"),
        ({"table_grid": 0}, "table_grid=0; it has to be a whole number from 1 to 128"),
    ],
    ids=["channels", "patch", "string", "stride", "states", "kernel", "token", "pyramid", "strides", "grid"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vim", **kwargs)
