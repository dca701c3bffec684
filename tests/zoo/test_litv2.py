"""LITv2's own arguments, initialisation, padding of HiLo, deformable merging and alphas of tags. 10 s."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

import zoo
from zoo import families
from zoo.litv2 import (
    TAG_ALPHAS,
    VARIANTS,
    DeformableMerging,
    HiLoAttention,
    LITv2,
    dot_product_attention,
    sample_patches,
)

from .attended import check_keys, patterns, product, window
from .test_parity import multiply_adds


def test_every_variant_is_registered():
    assert set(timm.list_models(module="litv2")) == set(VARIANTS)
    assert zoo.litv2.LITv2 is LITv2


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_litv2", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("litv2_small")
    mlp = model.stages[2].blocks[0].mlp
    assert mlp.dw_conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert mlp.dw_conv.bias.eq(0).all()
    assert mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    merging = model.stages[2].downsample
    assert merging.offset.weight.eq(0).all()
    assert merging.offset.bias.eq(0).all()
    bound = (4 * 192) ** -0.5
    for parameter in (merging.proj.weight, merging.proj.bias):
        assert 0.95 * bound < parameter.abs().max() <= bound
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_attention_begins_in_the_third_stage():
    model = timm.create_model("test_litv2")
    attentions = [[module for module in stage.modules() if isinstance(module, HiLoAttention)] for stage in model.stages]
    assert [len(modules) for modules in attentions] == [0, 0, 2, 2]
    assert [modules[0].window_size for modules in attentions[2:]] == [3, 1]
    assert attentions[3][0].hifi is None


@pytest.mark.parametrize(
    ("alpha", "heads"), [(0, (12, 0)), (0.2, (10, 2)), (0.5, (6, 6)), (0.7, (4, 8)), (0.9, (2, 10)), (1, (0, 12))]
)
def test_alpha_divides_the_heads(alpha, heads):
    attention = HiLoAttention(384, head_dim=32, window_size=2, alpha=alpha, device="meta")
    parts = (attention.hifi, attention.lofi)
    assert tuple(0 if part is None else part.num_heads for part in parts) == heads


def hilo(attention, x):
    """The plain formulation: token by token, and head by head."""
    height, width, s = *x.shape[1:3], attention.window_size
    padded = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    query, key, value = attention.hifi.qkv(padded).unflatten(-1, (3, attention.hifi.num_heads, -1)).unbind(3)
    high = torch.empty_like(query[:, :height, :width])
    for row in range(height):
        for column in range(width):
            window = slice(row // s * s, row // s * s + s), slice(column // s * s, column // s * s + s)
            keys, values = (tensor[:, window[0], window[1]].flatten(1, 2) for tensor in (key, value))
            logits = torch.einsum("bnd,bknd->bnk", query[:, row, column], keys) * query.shape[-1] ** -0.5
            high[:, row, column] = torch.einsum("bnk,bknd->bnd", logits.softmax(-1), values)
    query = attention.lofi.q(x).unflatten(-1, (attention.lofi.num_heads, -1))
    tiles = padded.unfold(1, s, s).unfold(2, s, s)  # (B, windows down, windows across, C, s, s)
    means = tiles.sum((-1, -2)) / s**2
    key, value = attention.lofi.kv(means).unflatten(-1, (2, attention.lofi.num_heads, -1)).unbind(3)
    logits = torch.einsum("bhwnd,bijnd->bnhwij", query, key) * query.shape[-1] ** -0.5
    low = torch.einsum("bnhwij,bijnd->bhwnd", logits.flatten(4).softmax(-1).view_as(logits), value)
    return torch.cat([attention.hifi.proj(high.flatten(3)), attention.lofi.proj(low.flatten(3))], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("window_size", [2, 4])
def test_padding_is_a_key_of_high_and_zeros_for_low_frequencies(size, window_size):
    torch.manual_seed(0)
    attention = HiLoAttention(32, head_dim=8, window_size=window_size, alpha=0.5, dtype=torch.float64)
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    torch.testing.assert_close(attention(x), hilo(attention, x))


@torch.no_grad()
def test_single_tokens_as_windows_are_ordinary_attention():
    torch.manual_seed(0)
    attention = HiLoAttention(16, head_dim=8, window_size=1, alpha=0.5, dtype=torch.float64)
    assert attention.hifi is None
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    lofi = attention.lofi
    query, key, value = (y.unflatten(-1, (-1, 8)).flatten(1, 2) for y in (lofi.q(x), *lofi.kv(x).chunk(2, -1)))
    weights = (torch.einsum("btnd,bknd->bntk", query, key) * 8**-0.5).softmax(-1)
    want = lofi.proj(torch.einsum("bntk,bknd->btnd", weights, value).reshape(2, 3, 5, 16))
    torch.testing.assert_close(attention(x), want)


def test_unfused_attention_agrees():
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    want = dot_product_attention(query, key[:, :, :5], value[:, :, :5])
    timm.layers.set_fused_attn(False)
    try:
        torch.testing.assert_close(dot_product_attention(query, key[:, :, :5], value[:, :, :5]), want)
    finally:
        timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("offset_scale", [0.0, 2.0], ids=["start", "moved"])
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 9), (3, 2)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_merging_is_a_deformable_convolution(size, offset_scale, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=dtype, requires_grad=True)
    offset = offset_scale * torch.randn(2, 8, size[0] // 2, size[1] // 2, dtype=dtype)  # many point outside the map
    offset.requires_grad_()
    weight, bias = torch.randn(7, 5, 2, 2, dtype=dtype), torch.randn(7, dtype=dtype)
    got = F.conv2d(sample_patches(x, offset), weight, bias, stride=2)
    want = deform_conv2d(x, offset, weight, bias, stride=(2, 2))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **tolerance)
    grad = torch.randn_like(want)
    grads = (torch.autograd.grad(out, (x, offset), grad) for out in (got, want))
    # At offsets of zero the derivative is discontinuous: it has to be that of the same side as in torchvision.
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@torch.no_grad()
def test_merging_starts_as_an_ordinary_convolution():
    torch.manual_seed(0)
    model = timm.create_model("test_litv2", dtype=torch.float64).eval()
    merging, x = model.stages[1].downsample, torch.randn(2, 16, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(merging(x), F.gelu(merging.norm(merging.proj(x))))


@torch.no_grad()
def test_offsets_keep_their_precision_under_autocast(monkeypatch):
    offsets = []

    def sample(x, offset):
        offsets.append(offset)
        return sample_patches(x, offset)

    monkeypatch.setattr(zoo.litv2, "sample_patches", sample)
    merging = DeformableMerging(8, 12).eval()
    nn.init.constant_(merging.offset.weight, 0)
    nn.init.constant_(merging.offset.bias, 4.51)  # the nearest bfloat16 is 4.5
    with torch.autocast("cpu", torch.bfloat16):
        merging(torch.randn(2, 8, 16, 16))
    assert offsets[0].eq(4.51).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "sides"), [((32, 61), ((8, 4, 2, 1), (16, 8, 4, 2))), ((33, 47), ((9, 4, 2, 1), (12, 6, 3, 1)))]
)
def test_odd_maps_are_rounded_down(size, sides):
    backbone = timm.create_model("test_litv2", features_only=True).eval()
    shapes = [tuple(feature.shape[2:]) for feature in backbone(torch.randn(1, 3, *size))]
    assert shapes == list(zip(*sides, strict=True))


@torch.no_grad()
def test_pixels_of_padding_are_zeros():
    model, x = timm.create_model("test_litv2").eval(), torch.randn(1, 3, 61, 66)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))))


def reload(state_dict, **kwargs):
    overlay = {"state_dict": state_dict}
    return timm.create_model("test_litv2", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("output_norm", [True, (1, 2, 3)], ids=["segmentation", "detection"])
def test_dense_prediction_norms_the_features_it_lists(output_norm):
    model, x = timm.create_model("test_litv2", num_classes=0, output_norm=output_norm).eval(), torch.randn(1, 3, 64, 64)
    for parameter in model.output_norms.parameters():
        nn.init.normal_(parameter)
    features = model.forward_intermediates(x, intermediates_only=True)
    raw = reload(model.state_dict(), features_only=True)(x)
    for i, (feature, before) in enumerate(zip(features, raw, strict=True)):
        assert isinstance(model.output_norms[i], nn.LayerNorm) == (output_norm is True or i in output_norm)
        torch.testing.assert_close(feature, model.output_norms[i](before))
    official = {key.replace("output_norms.", "norm"): value for key, value in model.state_dict().items()}
    loaded = reload(official, features_only=True, output_norm=output_norm)
    for feature, want in zip(loaded(x), features, strict=True):
        torch.testing.assert_close(feature, want)


@pytest.mark.parametrize("tag", TAG_ALPHAS)
def test_tag_sets_the_alpha_of_its_weights(tag):
    heads = int(12 * TAG_ALPHAS[tag])
    model = timm.create_model(f"litv2_small.{tag}", device="meta")
    lofi = model.stages[2].blocks[0].attn.lofi
    assert (0 if lofi is None else lofi.num_heads) == heads
    assert model.pretrained_cfg["url"].endswith(f"alpha_{TAG_ALPHAS[tag]:g}.pth")


def test_alpha_of_the_call_takes_precedence_over_that_of_the_tag():
    model = timm.create_model("litv2_small.in1k_alpha_05", alpha=0, device="meta")
    assert model.stages[2].blocks[0].attn.lofi is None


@pytest.mark.parametrize("alpha", [0, 0.25, 1])
def test_weights_of_another_alpha_are_refused(alpha):
    state_dict = timm.create_model("test_litv2", alpha=alpha).state_dict()
    message = rf"has {alpha:.0%} Lo-Fi heads .* model 50%: create it with alpha={alpha:.2f}"
    with pytest.raises(RuntimeError, match=message):
        reload(state_dict)


@pytest.mark.slow
def test_another_window_takes_the_same_weights():
    state_dict = timm.create_model("test_litv2").state_dict()
    reload(state_dict, window_size=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*it has to be whole numbers from 1 to 1,000"),
        ({"head_dim": 24}, r"head_dim=24 for embed_dims=\(16, 32, 64, 96\).*multiples"),
        ({"head_dim": 0}, r"head_dim=0; it has to be a whole number from 1"),
        ({"alpha": 1.5}, r"alpha=1.5; it has to be a number from 0 to 1"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1"),
        (
            {"output_norm": (1, 4), "num_classes": 0},
            r"output_norm=\(1, 4\); it has to be True, False or a list of stages from 0 to 3",
        ),
        ({"output_norm": True}, r"1000 classes.*num_classes=0"),
    ],
    ids=["lengths", "depth", "head_dim", "no_heads", "alpha", "window", "stages", "classes"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_litv2", **kwargs)


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("litv2_small", "detect", {"output_norm": (1, 2, 3)}),
        ("test_litv2", "detect", {"output_norm": (1, 2, 3)}),
        ("litv2_small", "segment", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(model, task, expected):
    assert families.dense_kwargs(model, task) == expected


def test_keys_are_those_of_the_operator():
    def keys(site, token, size):
        if site.stage == 4:
            return [product(*map(range, size))]
        if "Hi-Fi" in site.info.groups[0]:
            return [product(*(window(place, length, 3) for place, length in zip(token, size, strict=True)))]
        return [product(*(range(-(-length // 3)) for length in size))]

    check_keys("test_litv2", keys)


def test_pattern():
    assert patterns("litv2")[1] == {"LITv2": [product((10, 11), (16, 17)), product(range(14), range(14))]}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("litv2_small") == pytest.approx(3.7, rel=0.02)
