"""Varied-size windows against a plain formulation, both rules for sizes, initialisation, facts. 5 s."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.vitae_vsa import VARIANTS, VariedWindowAttention, ViTAEVSA

from . import golden
from .attended import check_keys, patterns
from .test_parity import load


def test_every_variant_is_registered():
    assert set(timm.list_models(module="vitae_vsa")) == set(VARIANTS)
    assert zoo.vitae_vsa.ViTAEVSA is ViTAEVSA


def build(*args, **kwargs):
    torch.manual_seed(0)
    attn = VariedWindowAttention(*args, **kwargs, dtype=torch.float64)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.normal_()
    return attn


def axis(attn, length, other):
    """Of an axis of a map: the zeros before it, the padded length, and the tokens that an offset of 1 stands for."""
    w = attn.window_size
    padded = math.ceil(length / w) * w
    before = (padded - length) // 2 if attn.detection else 0
    whole = (other if attn.detection else length) // w
    return before, padded, (padded - 1) / 2 / max(whole, 1)


def place_of(attn, x, token, head):
    """The row and the column where the head samples the key of a token of a padded map (rows, columns, C)."""
    w, (height, width) = attn.window_size, attn.size
    corner = [p // w * w for p in token]
    mean = x[corner[0] : corner[0] + w, corner[1] : corner[1] + w].mean((0, 1))
    mean = torch.where(mean > 0, mean, 0.01 * mean)
    units = axis(attn, height, width)[2], axis(attn, width, height)[2]
    found = []
    for i in (0, 1):  # rows, columns
        x_or_y = 2 * head + 1 - i
        local = token[i] - corner[i] - (w - 1) / 2
        found.append(token[i] + attn.scales(mean)[x_or_y] * local + attn.offsets(mean)[x_or_y] * units[i])
    return found


def taps(place, size):
    """The tokens of a map between which a place lies, with their shares."""
    first = [math.floor(p) for p in place]
    for y in (first[0], first[0] + 1):
        for x in (first[1], first[1] + 1):
            if 0 <= y < size[0] and 0 <= x < size[1]:
                yield (y, x), (1 - abs(place[0] - y)) * (1 - abs(place[1] - x))


def plain_attention(attn, x):
    """Token by token and head by head, on one image (H, W, C)."""
    w, n = attn.window_size, attn.num_heads
    attn.size = x.shape[:2]
    (top, rows, _), (left, columns, _) = (axis(attn, *size) for size in (x.shape[:2], x.shape[1::-1]))
    pad = (0, 0, left, columns - x.shape[1] - left, top, rows - x.shape[0] - top)
    q, k, v = (part.unflatten(-1, (n, -1)) for part in F.pad(attn.qkv(x), pad).chunk(3, -1))
    x = F.pad(x, pad)
    out = torch.empty_like(q)
    tokens = [(y, z) for y in range(rows) for z in range(columns)]
    for head in range(n):
        places = {token: list(taps(place_of(attn, x, token, head), (rows, columns))) for token in tokens}
        zero = torch.zeros_like(k[0, 0, head])
        key, value = (
            {token: sum((share * y[tap][head] for tap, share in places[token]), zero) for token in tokens}
            for y in (k, v)
        )
        for y, z in tokens:
            keys = [(i, j) for i, j in tokens if (i // w, j // w) == (y // w, z // w)]
            logits = torch.stack([q[y, z, head] @ key[i] for i in keys]) * (x.shape[-1] / n) ** -0.5
            logits = logits + torch.stack([attn.bias_table[head, y - i + w - 1, z - j + w - 1] for i, j in keys])
            out[y, z, head] = sum(weight * value[i] for weight, i in zip(logits.softmax(0), keys, strict=True))
    height, width = attn.size
    return attn.proj(out.flatten(2)[top : top + height, left : left + width])


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (2, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("window", "detection"), [(2, False), (2, True), (3, True)])
def test_attention_matches_a_plain_formulation(window, detection, size):
    attn = build(6, 4, 2, window, detection)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(attn(x), torch.stack([plain_attention(attn, image) for image in x]))


@torch.no_grad()
@pytest.mark.parametrize(("size", "same"), [((6, 6), True), ((6, 9), False), ((7, 7), False)])
def test_rules_agree_on_squares_of_whole_windows(size, same):
    x = torch.randn(1, *size, 4, dtype=torch.float64)
    outputs = [build(4, 4, 1, 3, detection)(x) for detection in (False, True)]
    assert torch.allclose(*outputs) == same


@pytest.mark.parametrize("detection", [False, True])
@pytest.mark.parametrize("size", [(14, 7), (10, 5), (1, 6)], ids=str)
def test_gathered_rows_are_those_of_sampling(size, detection):
    attn, x = build(8, 8, 2, 5, detection).float(), torch.randn(2, *size, 8)
    with torch.no_grad():
        for layer in (attn.scales, attn.offsets):
            layer.weight.mul_(0.3)
    sampled = attn(x).detach()
    with torch.no_grad(), torch.profiler.profile() as profile:
        gathered = attn(x)
    torch.testing.assert_close(gathered, sampled, rtol=1e-4, atol=1e-4)
    names = {event.key for event in profile.key_averages()}
    assert "aten::embedding_bag" in names
    assert "aten::grid_sampler" not in names


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_keys_keep_their_places_in_half_precision(dtype):
    """In bfloat16, they would move by a tenth of a token."""
    attn, x = build(8, 8, 2).float(), torch.randn(1, 56, 56, 8)
    for layer in (attn.offsets, attn.scales):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 0.25)
    want = attn.key_places(x, (56, 56))
    assert want[0].dtype == torch.float32
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(attn.key_places(x, (56, 56)), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(attn.to(dtype).key_places(x.to(dtype), (56, 56)), want, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_classifier_of_another_size_matches_official():
    """Built for 256 x 256 pixels: no map consists of whole windows."""
    record = golden.read("vitaev2_vsa_s")
    logits = load("vitaev2_vsa_s", record)(golden.image(**record["third_input"]))
    assert golden.difference(logits, record["third_logits"]) < 1e-6


def test_stochastic_depth_starts_at_the_depth_of_the_previous_stage():
    model = timm.create_model("test_vitae_vsa", depths=(2, 2, 4, 2), drop_path_rate=0.9, device="meta")
    rates = [[getattr(block.drop_path, "drop_prob", 0.0) for block in stage.blocks] for stage in model.stages]
    want = [[0, 0.1], [0.2, 0.3], [0.2, 0.3, 0.4, 0.5], [0.4, 0.5]]
    for found, expected in zip(rates, want, strict=True):
        assert found == pytest.approx(expected)


def test_positions_reach_the_attention_alone():
    torch.manual_seed(0)
    block, x = timm.create_model("test_vitae_vsa").stages[0].blocks[0].eval(), torch.randn(1, 4, 4, 16)
    nn.init.zeros_(block.attn.proj.weight)
    nn.init.zeros_(block.attn.proj.bias)
    before = block(x)
    nn.init.ones_(block.pos_embed.conv.weight)
    assert torch.equal(block(x), before)


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("vitaev2_vsa_s")
    block = model.stages[2].blocks[0]
    for layer, fan_in in ((block.attn.scales, 256), (block.attn.qkv, 256), (block.convs.conv2, 144)):  # PyTorch's own
        assert layer.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert layer.bias.std() > 0.1 * fan_in**-0.5
    for tensor in (block.attn.bias_table, block.mlp.fc1.weight, model.head.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.fc1.bias.eq(0).all()
    assert {module.eps for module in block.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert {module.eps for module in model.stem.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_keys_are_sampled_in_a_window_of_each_head():
    def keys(site, token, size):
        attn, (x,) = site.module, site.args
        w, attn.size = attn.window_size, size
        rows, columns = (math.ceil(side / w) * w for side in size)
        x = F.pad(x[0], (0, 0, 0, columns - size[1], 0, rows - size[0]))
        corner = [p // w * w for p in token]
        window = [(corner[0] + i, corner[1] + j) for i in range(w) for j in range(w)]
        places = [place_of(attn, x, key, head) for key in window for head in range(attn.num_heads)]
        return [{tap for place in places for tap, _ in taps(place, size)}]

    check_keys("test_vitae_vsa", keys)


def test_pattern():
    panels, got = patterns("vitae_vsa")
    small, large = got["VSA"]
    assert panels["VSA"].queries == ((11, 16),)
    sides = [[max(p[i] for p in keys) - min(p[i] for p in keys) + 1 for i in (0, 1)] for keys in (large, small)]
    assert min(sides[0]) > 10
    assert max(sides[1]) < 6


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_kwargs_are_the_official_codes(task):
    assert families.dense_kwargs("vitaev2_vsa_48m", task) == {"detection_windows": True}


def test_images_are_padded_to_multiples_of_32():
    assert [families.feature_side("vitaev2_vsa_s", 65, reduction) for reduction in (4, 8, 16, 32)] == [24, 12, 6, 3]
    model, x = timm.create_model("test_vitae_vsa").eval(), torch.randn(1, 3, 70, 33)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(F.pad(x, (0, 31, 0, 26))))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction_heads": (1, 1, 5, 4)}, r"reduction_heads=\(1, 1, 5, 4\) for embed_dims=.*divide"),
        ({"groups": (1, 8, 7, 16)}, r"groups=\(1, 8, 7, 16\) for embed_dims=.*mlp_ratio=2"),
        ({"reduction_groups": (2, 8, 16, 16)}, r"reduction_groups=\(2, 8, 16, 16\).*in_chans=3"),
        ({"mlp_ratio": 1.1}, r"groups=\(1, 8, 16, 16\).*mlp_ratio=1.1"),
        ({"wide": 1}, "wide=1; it has to be one of True, False"),
        ({"detection_windows": "yes"}, "detection_windows='yes'; it has to be one of True, False"),
        ({"window_size": [7, 7, 7, 7]}, r"window_size=\[7, 7, 7, 7\]; it has to be a whole number"),
        ({"window_size": 1}, "window_size=1; it has to be 2 or more"),
        ({"depths": (1, 1)}, r"2 depths=\(1, 1\).*one value per stage"),
    ],
    ids=["heads", "groups", "reduction_groups", "mlp_ratio", "wide", "rule", "windows", "window", "lengths"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vitae_vsa", **kwargs)
