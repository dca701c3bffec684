"""FaViT's own arguments, initialisation, windows, pooling and attention. A few seconds."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.favit import VARIANTS, FactorizedAttention, FaViT, LocalAttention, window_entries

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def test_every_variant_is_registered():
    assert set(timm.list_models(module="favit")) == set(VARIANTS)
    assert zoo.favit.FaViT is FaViT


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_favit", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("favit_b0")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
            assert module.bias.eq(0).all()
        elif isinstance(module, nn.Linear) and module.weight.numel() > 2000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias.eq(0).all()


def test_epsilons_are_official():
    model = timm.create_model("test_favit", device="meta")
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    wide = {name for name, eps in found.items() if eps == 1e-5}
    assert set(found.values()) == {1e-5, 1e-6}
    assert all("global_group" in name or "stem" in name or "downsample" in name for name in wide)
    assert len(wide) == 4 + 8  # patch embeddings, and the global groups of all blocks


def reflected(place, side):
    """Where a place beyond the last token ends after as many reflections as it takes."""
    while side > 1 and not 0 <= place < side:
        place = -place if place < 0 else 2 * (side - 1) - place
    return place if side > 1 else 0


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 3), (14, 25), (56, 57)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("dilation", [1, 2, 8])
def test_windows_lie_side_by_side_and_are_reflected(size, dilation):
    reach = 6 * dilation + 1
    places = [
        [
            [reflected(window * reach + inside * dilation, side) for window in range(math.ceil(side / reach))]
            for inside in range(7)
        ]
        for side in size
    ]
    expected = [
        [((row * size[1] + column) * 2 + head) * 3 + c for row in rows for column in columns for c in range(3)]
        for rows in places[0]
        for columns in places[1]
        for head in range(2)
    ]
    assert window_entries(*size, 2, 3, 7, dilation, torch.device("cpu")).tolist() == expected


def plain(attention, x, window):
    """The attention head by head, in the form of the official code: padding, unfolding and adaptive pooling."""
    batch, height, width, dim = x.shape
    first, heads = dim // 8, attention.num_heads
    outputs = []

    def attend(query, key, value):
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value

    query, part = attention.q(x).flatten(1, 2), attention.global_group
    patches = part.patches(x[..., :first].permute(0, 3, 1, 2))
    key, value = part.kv(part.norm(patches.flatten(2).transpose(1, 2))).chunk(2, -1)
    value = value.transpose(1, 2).unflatten(2, patches.shape[2:])
    value = value + F.conv2d(value, part.value_conv.conv.weight, part.value_conv.conv.bias, padding=1, groups=first)
    outputs.append(attend(query[..., :first], key, value.flatten(2).transpose(1, 2)))

    maps = attention.pw_conv(attention.dw_conv(x[..., first:]).permute(0, 3, 1, 2))
    queries = query[..., first:].unflatten(-1, (heads, -1)).transpose(1, 2)
    groups = attention.local_groups
    for part, map_, query in zip(groups, maps.chunk(len(groups), 1), queries.chunk(len(groups), -1), strict=True):
        reach, channels = part.dilation * (window - 1) + 1, map_.shape[1]
        padded = F.pad(map_, (0, -width % reach, 0, -height % reach), "reflect")
        windows = F.unfold(padded, window, dilation=part.dilation, stride=reach)  # (B, C places, windows)
        windows = windows.view(batch, heads, channels // heads, window**2, -1)
        rows = windows.permute(0, 1, 3, 4, 2).reshape(batch * heads, window**2, -1)
        means = F.adaptive_avg_pool1d(rows, channels // heads).view(batch, heads, window**2, -1)
        key, value = part.kv(part.fc(means)).chunk(2, -1)
        value = value.transpose(-1, -2).reshape(batch, channels, window, window)
        value = value + F.conv2d(
            value, part.value_conv.conv.weight, part.value_conv.conv.bias, padding=1, groups=channels
        )
        value = value.view(batch, heads, channels // heads, -1).transpose(-1, -2)
        outputs.append(attend(query, key, value).transpose(1, 2).flatten(2))
    return attention.proj(torch.cat(outputs, -1)).view(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (11, 16)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("ratio", [1, 2])
def test_attention_agrees_with_the_plain_form(size, ratio):
    torch.manual_seed(0)
    attention = FactorizedAttention(48, num_heads=3, sr_ratio=ratio, window_size=3, dtype=torch.float64)
    for parameter in attention.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(2, *size, 48, dtype=torch.float64)
    torch.testing.assert_close(attention(x), plain(attention, x, 3))


@torch.no_grad()
def test_means_are_of_runs_of_the_channels_of_all_windows():
    group = LocalAttention(1, 4, window_size=2, dilation=1, dtype=torch.float64)
    x = torch.arange(6.0, dtype=torch.float64)[:, None, None] + torch.tensor([0, 100, 200, 300])  # 3 windows of 2 rows
    x = x.expand(6, 2, 4)[None]
    # The first place of the windows is in rows 0, 2 and 4.
    row = torch.tensor([0, 100, 200, 300, 2, 102, 202, 302, 4, 104, 204, 304.0], dtype=torch.float64)
    torch.testing.assert_close(group.pooled(x)[0, 0], row.view(4, 3).mean(1))


@torch.no_grad()
def test_weights_of_a_place_are_divided_among_its_tokens():
    group = LocalAttention(1, 7, window_size=3, dilation=2)
    weights = torch.rand(2, 1, 3, 3)
    spread = group.spread(weights, (7, 5))
    assert spread.shape == (2, 1, 7, 5)
    torch.testing.assert_close(spread.sum((2, 3)), weights.sum((2, 3)))
    # Rows 5 and 7 of the second window of 7 rows are row 5, and row 9 is row 3.
    torch.testing.assert_close(spread.sum(3)[..., 0], weights.sum(3)[..., 0] / 2)
    torch.testing.assert_close(spread.sum(3)[..., 5], weights.sum(3)[..., :2].sum(-1) / 2)
    torch.testing.assert_close(spread.sum(3)[..., 3], weights.sum(3)[..., 2] / 2)


def test_weights_are_not_published():
    for name in ("favit_b0", "favit_b3"):
        cfg = timm.get_pretrained_cfg(name)
        assert not cfg.has_weights
        assert (cfg.mean, cfg.crop_pct, cfg.interpolation) == ((0.485, 0.456, 0.406), 0.875, "bicubic")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1, 2, 4)}, r"3 num_heads=\(1, 2, 4\).*one value per stage"),
        ({"sr_ratios": (8, 4, 2, 0)}, r"sr_ratios=\(8, 4, 2, 0\).*it has to be whole numbers from 1 to 1,024"),
        ({"sr_ratios": (8, 8, 2, 1)}, r"sr_ratios=\(8, 8, 2, 1\); they are at most \(8, 4, 2, 1\)"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1"),
        ({"embed_dims": (16, 32, 64, 100)}, r"embed_dims=\(16, 32, 64, 100\); channels .* a multiple of 8"),
        ({"num_heads": (2, 2, 4, 4)}, r"num_heads=\(2, 2, 4, 4\).*a multiple of its heads"),
    ],
    ids=["lengths", "ratio", "patch", "window", "channels", "heads"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_favit", **kwargs)


def test_keys_are_those_of_the_groups():
    def keys(site, token, size):
        ratio = (8, 4, 2, 1)[site.stage - 1]
        if "window" not in site.info.groups[0]:
            return [product(*(range(length // ratio) for length in size))]
        if "dilated" not in site.info.groups[0]:
            return [product(*map(range, size))]
        reach = 2 * ratio + 1
        return [
            product(
                *(
                    [
                        reflected(window * reach + ratio * inside, length)
                        for window in range(math.ceil(length / reach))
                        for inside in range(3)
                    ]
                    for length in size
                )
            )
        ]

    check_keys("test_favit", keys)


def test_pattern():
    lattice = [*range(0, 28, 4), *range(5, 26, 4)]  # the second window is reflected
    assert patterns("favit")[1] == {"FaViT": [product(lattice, lattice), product(range(7), range(7))]}


@pytest.mark.slow
def test_multiply_adds_are_the_papers():
    assert multiply_adds("favit_b0") == pytest.approx(0.6, rel=0.06)
    assert multiply_adds("favit_b2") == pytest.approx(4.5, rel=0.02)
