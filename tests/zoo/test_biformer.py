"""BiFormer's own arguments, initialisation, routing, padding and layouts. 10 s, the slow ones 40 s."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.biformer import FULL, VARIANTS, BiFormer, GlobalAttention, GrowingRoutedAttention, RoutedAttention

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

LAYOUTS = ("biformer", "stl", "stl_nchw")
SIZES = [(8, 8), (5, 9), (13, 7), (3, 1)]  # of maps for 4 x 4 regions


def size_id(size):
    return f"{size[0]}x{size[1]}"


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_biformer", **kwargs)


def attention(cls, *args):
    torch.manual_seed(0)
    return cls(*args, dtype=torch.float64).eval()


def tokens(batch, height, width, dim=16):
    return torch.randn(batch, height, width, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lepe(attn, x):
    return F.conv2d(x.permute(0, 3, 1, 2), attn.lepe.weight, attn.lepe.bias, padding=2, groups=x.shape[-1]).permute(
        0, 2, 3, 1
    )


def plain_attention(attn, query, key, value, rows, columns):
    """Region by region, for one map (H, W, C). Beyond the map, keys and values are zeros."""
    height, width, channels = query.shape
    cuts = [
        (slice(top, top + rows), slice(left, left + columns))
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    mean_queries, mean_keys = (torch.stack([x[cut].mean((0, 1)) for cut in cuts]) for x in (query, key))
    out = torch.empty_like(query)
    for cut, mean_query in zip(cuts, mean_queries, strict=True):
        chosen = (mean_keys @ mean_query).sort(descending=True).indices[: attn.topk]
        keys, values = (torch.cat([x[cuts[i]].flatten(0, 1) for i in chosen]) for x in (key, value))
        missing = len(chosen) * rows * columns - len(keys)
        keys, values = (F.pad(x, (0, 0, 0, missing)) for x in (keys, values))
        for head in torch.arange(channels).chunk(attn.num_heads):
            weights = (query[cut][..., head] @ keys[:, head].T * channels**-0.5).softmax(-1)
            out[(*cut, head)] = weights @ values[:, head]
    return out


def test_every_variant_is_registered():
    assert set(timm.list_models(module="biformer")) == set(VARIANTS)
    assert zoo.biformer.BiFormer is BiFormer


def test_drop_path_grows_linearly_over_all_blocks():
    model = build(drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("biformer_tiny")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or module.bias.eq(0).all()
        elif isinstance(module, nn.Conv2d):  # PyTorch's own
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert module.eps == (1e-6 if isinstance(module, nn.LayerNorm) else 1e-5)
            assert module.weight.eq(1).all()


def test_only_global_attention_lacks_the_bias_of_queries_keys_and_values():
    model = timm.create_model("biformer_tiny", device="meta")
    assert [{block.attn.qkv.bias is None for block in stage.blocks} for stage in model.stages] == [
        {False},
        {False},
        {False},
        {True},
    ]


@torch.no_grad()
@pytest.mark.parametrize("topk", [1, 3, 16])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_padding_takes_part_in_routed_attention(size, topk):
    attn, (height, width) = attention(RoutedAttention, 16, 2, 4, topk), size
    x = tokens(1, *size)
    rows, columns = -(-height // 4), -(-width // 4)
    padded = F.pad(x, (0, 0, 0, 4 * columns - width, 0, 4 * rows - height))
    query, key, value = attn.qkv(padded).chunk(3, dim=-1)
    want = plain_attention(attn, query[0], key[0], value[0], rows, columns) + lepe(attn, value)
    torch.testing.assert_close(attn(x), attn.proj(want[:, :height, :width]))


@torch.no_grad()
@pytest.mark.parametrize("topk", [1, 3, 16])
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_refactored_routed_attention_has_more_regions(size, topk):
    attn, (height, width) = attention(GrowingRoutedAttention, 16, 2, 4, topk), size
    x = tokens(1, *size)
    rows, columns = max(height // 4, 1), max(width // 4, 1)
    query, key, value = attn.qkv(x).chunk(3, dim=-1)
    want = plain_attention(attn, query[0], key[0], value[0], rows, columns) + lepe(attn, value)
    torch.testing.assert_close(attn(x), attn.proj(want))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=size_id)
def test_attention_of_exported_programs_is_the_same(size):
    attn, x = attention(RoutedAttention, 16, 2, 4, 3), tokens(2, *size)
    exported = torch.export.export(attn, (x,)).module()
    torch.testing.assert_close(exported(x), attn(x))


@pytest.mark.parametrize("cls", [RoutedAttention, GrowingRoutedAttention])
def test_images_are_routed_independently(cls):
    attn, x = attention(cls, 16, 2, 4, 2), tokens(3, 9, 6)
    torch.testing.assert_close(attn(x)[2:], attn(x[2:]))


def test_routing_to_all_regions_is_global_attention():
    routed, x = attention(RoutedAttention, 16, 2, 4, 16), tokens(2, 8, 12)
    full = attention(GlobalAttention, 16, 2, "value")
    full.load_state_dict(routed.state_dict(), strict=False)
    full.qkv = deepcopy(routed.qkv)
    with torch.no_grad():  # global attention scales by a head's channels
        for parameter in full.qkv.parameters():
            parameter[:16] *= 16**-0.5 / 8**-0.5
    torch.testing.assert_close(routed(x), full(x))


@torch.no_grad()
@pytest.mark.parametrize("lepe_of", ["input", "value"])
def test_global_attention_follows_the_formula(lepe_of):
    attn, x = attention(GlobalAttention, 16, 2, lepe_of), tokens(2, 3, 5)
    query, key, value = attn.qkv(x).flatten(1, 2).chunk(3, dim=-1)
    heads = []
    for q, k, v in zip(*(part.chunk(2, dim=-1) for part in (query, key, value)), strict=True):
        heads.append((q @ k.mT * 8**-0.5).softmax(-1) @ v)
    context = torch.cat(heads, dim=-1).unflatten(1, (3, 5))
    want = attn.proj(context + lepe(attn, value.unflatten(1, (3, 5)) if lepe_of == "value" else x))
    torch.testing.assert_close(attn(x), want)


@torch.no_grad()
def test_model_without_fused_attention_agrees():
    model, x = build().eval(), torch.randn(2, 3, 64, 64)
    want = model(x)
    set_fused_attn(False)
    try:
        torch.testing.assert_close(model(x), want)
    finally:
        set_fused_attn(True)


@torch.no_grad()
def test_more_regions_take_the_same_weights():
    x = torch.randn(1, 3, 80, 64)
    model = build().eval()
    other = build(num_regions=8, topks=(1, 4, 16, FULL)).eval()
    assert other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), other(x))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["stl", "stl_nchw"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (75, 50)], ids=size_id)
def test_features_of_the_stl_layouts_round_down(layout, size):
    model, x = build(layout=layout).eval(), torch.randn(2, 3, *size)
    for feature, info in zip(model.forward_intermediates(x, intermediates_only=True), model.feature_info, strict=True):
        stride = info["reduction"]
        assert feature.shape == (2, info["num_chs"], size[0] // stride, size[1] // stride)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


@torch.no_grad()
def test_the_stl_layouts_differ_by_lepe_where_maps_divide():
    x = torch.randn(1, 3, 64, 64)
    stl = build(layout="stl", depths=(1, 1, 1, 1)).eval()
    nchw = build(layout="stl_nchw", depths=(1, 1, 1, 1)).eval()
    nchw.load_state_dict(stl.state_dict())
    want, got = (model.forward_intermediates(x, intermediates_only=True) for model in (stl, nchw))
    for i in range(3):
        torch.testing.assert_close(got[i], want[i])
    assert not torch.allclose(got[3], want[3])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_gets_a_gradient_on_maps_that_do_not_divide(layout):
    model = build(layout=layout).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 75, 50))
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def official_weights(model):
    """The state dict of `model` under the official names of its layout, written without the key map."""
    official, layout = {}, model.layout
    for key, value in model.state_dict().items():
        first, *parts = key.split(".")
        if first == "stem":
            key = f"downsample_layers.0.{['conv1', 'norm1', None, 'conv2', 'norm2'].index(parts[0])}.{parts[1]}"
        elif parts[1:2] == ["downsample"]:
            key = f"downsample_layers.{parts[0]}.{'.'.join(parts[2:])}"
        elif first == "stages":
            if layout == "biformer":
                key = key.replace(".blocks", "")
            key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3" if layout == "biformer" else "mlp.2")
            if parts[0] != "3":
                key = key.replace("attn.qkv", "attn.qkv_linear" if layout == "stl_nchw" else "attn.qkv.qkv")
                key = key.replace("attn.proj", "attn.output_linear" if layout == "stl_nchw" else "attn.wo")
            if layout == "stl_nchw" and value.ndim == 2:
                value = value[:, :, None, None]
        official[key] = value
    return {"model": official}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_weights_load(layout):
    model, x = build(layout=layout).eval(), torch.randn(1, 3, 64, 64)
    overlay = {"state_dict": official_weights(model)}
    loaded = timm.create_model("test_biformer", layout=layout, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "other"), [("stl", "stl_nchw"), ("stl_nchw", "stl")])
def test_weights_of_the_other_stl_layout_are_refused(layout, other):
    overlay = {"state_dict": official_weights(build(layout=other))}
    with pytest.raises(RuntimeError, match=f"belongs to biformer_{other}, not to biformer_{layout}: create that model"):
        build(layout=layout, pretrained=True, pretrained_cfg_overlay=overlay)


def test_official_output_norms_load():
    model = build(features_only=True, output_norm=True)
    norms = model.model.output_norms
    assert [(type(norm).__name__, norm.eps) for norm in norms] == [("LayerNorm2d", 1e-6)] * 4
    weights = {key: value + 1 for key, value in norms.state_dict().items()}
    trunk = {key: value for key, value in official_weights(build(num_classes=0))["model"].items() if key[:4] != "norm"}
    overlay = {"state_dict": trunk | {f"extra_norms.{key}": value for key, value in weights.items()}}
    loaded = build(features_only=True, output_norm=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.model.output_norms.state_dict().items())


@pytest.mark.slow
def test_downloads_of_the_same_name_are_kept_apart(monkeypatch, tmp_path):
    folders = []

    def download(url, model_dir, **_):
        folders.append(model_dir)
        return timm.create_model(url, device="cpu").state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", download)
    for name in ("biformer_tiny", "test_biformer"):
        overlay = {"url": name, "hf_hub_id": None}
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert folders == [tmp_path / "biformer_tiny", tmp_path / "test_biformer"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"topks": (1, 4)}, r"2 topks=\(1, 4\).*one value per stage"),
        ({"topks": (1, 2, 17, -2)}, r"topks=\(1, 2, 17, -2\).*1 to 16.*num_regions=4.*-2 for attention"),
        ({"topks": (1, 2, 4, -1)}, r"topks=\(1, 2, 4, -1\).*1 to 16"),
        ({"num_regions": 0}, r"num_regions=0; it has to be a whole number from 1"),
        ({"num_heads": (1, 2, 4, 7)}, r"num_heads=\(1, 2, 4, 7\).*divide their stage's channels"),
        ({"layout": "nchw"}, r"layout='nchw'.*'biformer', 'stl', 'stl_nchw'"),
        ({"output_norm": True}, "output_norm=True with 1000 classes"),
        ({"topks": (1, 2, 4, "full")}, "topks="),
    ],
    ids=["lengths", "topk", "marker", "regions", "heads", "layout", "output_norm", "word"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("layout", ["stl", "stl_nchw"])
def test_exported_stl_layouts_take_any_batch(layout):
    dim = torch.export.Dim
    shapes = {0: dim("batch", max=64)}
    if layout == "stl":  # below 64 pixels its last map has a side of 1, which torch.export treats as another case
        shapes |= {2: dim("height", min=64, max=4096), 3: dim("width", min=64, max=4096)}
    model = build(layout=layout).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(shapes,)).module()
    for size in [(64, 97), (130, 65)] if layout == "stl" else [(64, 96)]:
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("biformer_small", "detect", {"num_regions": 16}),
        ("biformer_base", "segment", {"num_regions": 8}),
        ("biformer_stl", "detect", {}),
        ("biformer_stl_nchw", "segment", {}),
        ("test_biformer", "detect", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(model, task, expected):
    assert families.dense_kwargs(model, task) == expected


def best_regions(site, token, size, topk):
    """The tokens, without padding, of the regions out of 4 x 4 whose mean keys match the query's region best."""
    (x,) = site.args
    sides = [-(-side // 4) for side in size]
    padded = torch.zeros(4 * sides[0], 4 * sides[1], x.shape[3])
    padded[: size[0], : size[1]] = x[0]
    query, key, _ = site.module.qkv(padded).chunk(3, dim=-1)

    def mean(x, row, column):
        return x[row * sides[0] : (row + 1) * sides[0], column * sides[1] : (column + 1) * sides[1]].mean((0, 1))

    own = mean(query, token[0] // sides[0], token[1] // sides[1])
    answers = {(row, column): (own @ mean(key, row, column)).item() for row, column in product(range(4), range(4))}
    best = sorted(answers, key=answers.get)[-topk:]
    return {(y, x) for y, x in product(*map(range, size)) if (y // sides[0], x // sides[1]) in best}


@pytest.mark.slow
def test_keys_are_those_of_the_operator():
    def keys(site, token, size):
        if site.stage == 4:
            return [product(*map(range, size))]
        return [best_regions(site, token, size, (1, 2, 4)[site.stage - 1])]

    check_keys("test_biformer", keys)


def test_pattern():
    ((regions,),) = patterns("biformer")[1].values()
    chosen = {(row // 4, column // 4) for row, column in regions}
    assert len(chosen) == 4
    whole = product(range(28), range(28))
    assert regions == {(row, column) for row, column in whole if (row // 4, column // 4) in chosen}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("biformer_tiny") == pytest.approx(2.2, rel=0.02)
