"""SegMAN's token mixers, scans, windows at small maps, initialisation and keys. 5 s."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo import checkpoints, families
from zoo.segman import GlobalMixer, Scan, ScanMixer

from . import golden
from .attended import check_keys, patterns, product


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(cls, *args):
    torch.manual_seed(0)
    module = cls(*args, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain_scan(scan, x):
    """The sum of the four scans of tokens (H, W, C), token by token, before the last norm."""
    height, width, dim = x.shape
    rank = scan.dt_weight.shape[-1]
    order = torch.arange(height * width).view(height, width)
    orders = (order.flatten(), order.T.flatten(), order.flatten().flip(0), order.T.flatten().flip(0))
    flat, total = x.flatten(0, 1), torch.zeros(height * width, dim, dtype=x.dtype)
    for i, order in enumerate(orders):
        weight = scan.x_proj.weight.view(4, rank + 2, dim)[i]
        decay, through = -scan.A_log.view(4, dim)[i].exp(), scan.D.view(4, dim)[i]
        state = torch.zeros(dim, dtype=x.dtype)
        for place in order.tolist():
            step, b, c = (weight @ flat[place]).split((rank, 1, 1))
            delta = F.softplus(scan.dt_weight[i] @ step + scan.dt_bias[i])
            state = (delta * decay).exp() * state + delta * b * flat[place]
            total[place] += c * state + through * flat[place]
    return total.view(height, width, dim)


@torch.no_grad()
def test_scans_are_those_of_the_paper():
    scan = build(Scan, 20)
    x = tokens(1, 3, 4, 20)
    conv = F.conv2d(x.permute(0, 3, 1, 2), scan.dw_conv.weight, scan.dw_conv.bias, padding=1, groups=20)
    total = plain_scan(scan, F.silu(scan.norm1(conv))[0].permute(1, 2, 0))
    want = F.layer_norm(total, (20,), scan.norm2.weight, scan.norm2.bias, 1e-6)
    torch.testing.assert_close(scan(x)[0], want)


def rotated(x):
    """Complex numbers turned by row and column: (H, W, D), one head."""
    height, width, dim = x.shape
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    speeds = 10000 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat((rows[..., None] * speeds, columns[..., None] * speeds), -1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles) * pairs).flatten(-2)


def neighbors(place, length, side):
    """The window around a place, moved inward at the rim; the whole axis if it is shorter."""
    start = max(min(place - side // 2, length - side), 0)
    return range(start, min(start + side, length))


def plain_attention(q, k, v, table):
    """Neighborhood attention of a head, (H, W, D), query by query."""
    height, width, dim = q.shape
    side = (table.shape[-1] + 1) // 2
    out = torch.empty_like(v)
    for y in range(height):
        for x in range(width):
            keys = [(i, j) for i in neighbors(y, height, side) for j in neighbors(x, width, side)]
            bias = torch.stack([table[i - y + side - 1, j - x + side - 1] for i, j in keys])
            logits = dim**-0.5 * torch.stack([k[key] @ q[y, x] for key in keys]) + bias
            out[y, x] = logits.softmax(0) @ torch.stack([v[key] for key in keys])
    return out


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 7), (3, 7), (2, 3)], ids=["large", "low", "small"])  # the window has 5 x 5
@pytest.mark.parametrize("cls", [ScanMixer, GlobalMixer])
def test_token_mixer_is_the_papers(cls, size):
    mixer = build(cls, 16, 2, 5, *([3] if cls is GlobalMixer else []))
    x = tokens(1, *size, 16)
    heads = [mixer.qkv(x)[0].chunk(3, -1)[i].chunk(2, -1) for i in range(3)]
    outs = []
    for head in range(2):
        q, k, v = rotated(heads[0][head]), rotated(heads[1][head]), heads[2][head]
        out = plain_attention(q, k, v, mixer.bias_table[head])
        if cls is GlobalMixer:
            count = size[0] * size[1]
            table = F.interpolate(mixer.global_bias_table[None, head : head + 1], (count, count), mode="bicubic")
            weights = (8**-0.5 * q.flatten(0, 1) @ k.flatten(0, 1).T + table[0, 0]).softmax(-1)
            out = (weights @ out.flatten(0, 1)).view_as(out)
        outs.append(out)
    out, value = torch.cat(outs, -1), torch.cat(heads[2], -1).permute(2, 0, 1)[None]
    if cls is ScanMixer:
        out = out + mixer.scan(out[None])[0]
    lepe = F.conv2d(value, mixer.lepe.weight, mixer.lepe.bias, padding=2, groups=16)[0].permute(1, 2, 0)
    torch.testing.assert_close(mixer(x)[0], mixer.proj(out + lepe))


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("segman_encoder_t", layer_scale=1e-6, drop_path_rate=0.9)
    block, last = model.stages[2].blocks[0], model.stages[3].blocks[0]
    for layer in (block.mixer.qkv, block.mixer.lepe, block.cpe1, block.mixer.scan.dw_conv, block.mlp.fc1, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias.eq(0).all()
    assert block.ls1.weight.eq(1e-6).all()
    assert block.ls2.bias.eq(0).all()
    assert block.mixer.bias_table.eq(0).all()
    assert last.mixer.global_bias_table.eq(0).all()
    scan = block.mixer.scan
    assert scan.x_proj.weight.abs().max().item() == pytest.approx(144**-0.5, rel=0.01)
    assert scan.dt_weight.abs().max().item() == pytest.approx(9**-0.5, rel=0.01)
    steps = F.softplus(scan.dt_bias).log()
    assert (steps.min().item(), steps.max().item()) == pytest.approx((math.log(1e-3), math.log(1e-1)), abs=0.1)
    assert scan.A_log.eq(0).all()
    assert scan.D.eq(1).all()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(10)])


def test_weight_decay_is_that_of_the_official_code():
    """Its rule exempts vectors: D and the offsets of layer scales, but not A_log, biases of steps and scales."""
    model = timm.create_model("test_segman", layer_scale=1e-6, device="meta")
    exempt = {name for name, parameter in model.stages[0].blocks[0].named_parameters() if parameter.ndim <= 1}
    assert {"mixer.scan.D", "ls1.bias"} <= exempt
    assert not {"mixer.scan.A_log", "mixer.scan.dt_bias", "ls1.weight", "mixer.bias_table"} & exempt
    assert model.no_weight_decay() == set()


@torch.no_grad()
def test_head_comes_before_pooling():
    model = timm.create_model("test_segman").eval()
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    assert features.shape == (2, 64, 2, 3)
    assert model.forward_features(x).shape == (2, 128, 2, 3)
    pooled = F.silu(model.norm.norm(model.norm.proj(features))).mean((2, 3))
    torch.testing.assert_close(model(x), model.head(pooled))


@torch.no_grad()
def test_checkpoint_of_a_segmentor_gives_features():
    """Such files lack everything after the last stage."""
    torch.manual_seed(0)
    whole = timm.create_model("test_segman").eval()
    file = {f"backbone.{key}": value for key, value in whole.state_dict().items() if key.startswith(("st", "dw"))}
    file["decode_head.conv.weight"] = torch.ones(3)
    overlay, x = {"state_dict": {"state_dict": file}}, torch.randn(1, 3, 64, 64)
    model = timm.create_model("test_segman", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    want = whole.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(model(x), want, strict=True))


@pytest.mark.slow
def test_official_files_are_recognised():
    for name in ("segman_encoder_t", "segman_encoder_l"):
        keys = golden.official()[name]["keys"]
        file = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        assert checkpoints.closest_models(file) == ([name], 1.0)


def test_table_of_another_grid_is_resized():
    model = timm.create_model("test_segman")
    overlay = {"state_dict": model.state_dict()}
    other = timm.create_model("test_segman", pretrained=True, pretrained_cfg_overlay=overlay, table_grid=3)
    assert other.stages[3].blocks[0].mixer.global_bias_table.shape == (4, 9, 9)


def test_keys_are_those_of_the_operator():
    """The scans, which reach every token, are left out."""
    sides = (5, 5, 3)

    def keys(site, token, size):
        if site.stage == 4:
            return [product(*map(range, size))]
        side = sides[site.stage - 1]
        return [product(*(neighbors(place, length, side) for place, length in zip(token, size, strict=True)))]

    check_keys("test_segman", keys)


def test_pattern():
    panels, got = patterns("segman")
    near, scanned = got["SegMAN"]
    y, x = panels["SegMAN"].queries[0]
    assert near == product(range(y - 5, y + 6), range(x - 5, x + 6))
    weights = panels["SegMAN"].maps[1]
    assert weights[y, x] == 1
    for along in (weights[y, x + 1 :], weights[y + 1 :, x]):
        assert along[0] == pytest.approx(math.exp(-0.3) / 4, rel=0.01)  # one of the four scans
    reach = range(-10, 11)  # where more than a hundredth arrives
    assert scanned == {(y + d, x) for d in reach} | {(y, x + d) for d in reach}


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_prediction_changes_nothing(task):
    assert families.dense_kwargs("segman_encoder_s", task) == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1, 2, 3, 5)}, r"num_heads=\(1, 2, 3, 5\) for embed_dims=.*divide"),
        ({"num_heads": (1, 2, 3, 32)}, r"num_heads=\(1, 2, 3, 32\) for embed_dims=.*multiple of 4 channels"),
        ({"window_size": (5, 5, 4, 3)}, r"window_size=\(5, 5, 4, 3\); windows have to be odd"),
        ({"window_size": 4}, "window_size=4; windows have to be odd"),
        ({"window_size": "11"}, "window_size='11'"),
        ({"mlp_ratio": (1, 1)}, r"2 mlp_ratio=\(1, 1\).*one value per stage"),
        ({"table_grid": 0}, "table_grid=0; it has to be a whole number from 1 to 128"),
        ({"head_width": True}, "head_width=True; it has to be a whole number from 1 to 16,384"),
        ({"layer_scale": "1"}, "layer_scale='1'; it has to be a number"),
        ({"embed_dims": (1, 4, 4, 8), "num_heads": (1,) * 4}, "the first stage needs 2 channels or more"),
    ],
    ids=["divisor", "pairs", "even", "even_for_all", "string", "ratios", "grid", "head", "scale", "channels"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_segman", **kwargs)
