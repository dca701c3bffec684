"""GC ViT's own arguments, windows, global queries, licence. 10 s."""

import warnings

import pytest
import timm
import torch
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.gc_vit import VARIANTS, GCViT, GlobalQuery, WindowAttention, pooled_stages

from . import golden
from .attended import check_keys, patterns, product, window
from .test_parity import TOLERANCE, deviation, load, multiply_adds


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(cls, *args, **kwargs):
    torch.manual_seed(0)
    module = cls(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain_attention(attn, x, query=None):
    """Attention window by window and image by image, from the definition of the table."""
    batch, height, width, dim = x.shape
    w, heads = attn.window_size, attn.num_heads
    out = torch.empty_like(x)
    padded = x.new_zeros(batch, height + -height % w, width + -width % w, dim)
    padded[:, :height, :width] = x
    place = torch.cartesian_prod(torch.arange(w), torch.arange(w))
    down, right = (place[:, None] - place[None] + w - 1).unbind(-1)  # query minus key
    for image, top, left in torch.cartesian_prod(
        torch.arange(batch), torch.arange(0, height, w), torch.arange(0, width, w)
    ):
        window = padded[image, top : top + w, left : left + w].reshape(w * w, dim)
        *q, k, v = attn.qkv(window).split(dim, dim=-1)
        q = q[0] if query is None else query[image]
        q, k, v = (part.reshape(w * w, heads, dim // heads).transpose(0, 1) for part in (q, k, v))
        logits = q @ k.transpose(1, 2) * (dim // heads) ** -0.5 + attn.bias_table[:, down, right]
        result = attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(w * w, dim)).reshape(w, w, dim)
        rows, columns = min(w, height - top), min(w, width - left)
        out[image, top : top + w, left : left + w] = result[:rows, :columns]
    return out


def test_every_variant_is_registered():
    assert set(timm.list_models(module="gc_vit")) == set(VARIANTS)
    assert zoo.gc_vit.GCViT is GCViT


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 4), (5, 9), (3, 2)], ids=str)
@pytest.mark.parametrize("use_global_query", [False, True], ids=["local", "global"])
def test_attention_is_that_of_zero_padded_windows(size, use_global_query):
    attn = build(WindowAttention, 8, num_heads=2, window_size=4, use_global_query=use_global_query)
    x = tokens(2, *size, 8)
    query = tokens(2, 16, 8) if use_global_query else None
    torch.testing.assert_close(attn(x, query), plain_attention(attn, x, query))


@torch.no_grad()
@pytest.mark.parametrize(("size", "pool"), [((32, 32), True), ((4, 4), False), ((20, 12), True), ((4, 5), False)])
def test_query_is_resized_only_where_it_does_not_fit(size, pool):
    query, x = build(GlobalQuery, 8, window_size=4, num_convs=3, pool=pool), tokens(2, 8, *size)
    want = x
    for mbconv in query.mbconvs:
        want = F.max_pool2d(mbconv(want), 3, 2, 1) if pool else mbconv(want)
    if want.shape[2:] != (4, 4):
        want = F.interpolate(want, (4, 4), mode="bicubic")
    assert torch.equal(query(x), want.permute(0, 2, 3, 1).reshape(2, 16, 8))


@torch.no_grad()
def test_blocks_alternate_and_share_the_query_of_the_stages_input():
    model = timm.create_model("test_gc_vit", depths=(2, 2, 5, 2)).eval()
    assert [block.attn.use_global_query for block in model.stages[2].blocks] == [False, True, False, True, False]
    inputs, queries = [], []
    stage = model.stages[2]
    stage.query.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for block in stage.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: queries.append(args[1]))
    x = torch.randn(2, 32, 9, 10)
    stage(x)
    (given,) = inputs
    torch.testing.assert_close(given, stage.downsample(x))
    assert all(query is queries[0] for query in queries)


@pytest.mark.parametrize(
    ("windows", "third_pools"),
    [
        ((7, 7, 14, 7), False),
        ((12, 12, 24, 12), False),
        ((16, 16, 32, 16), False),
        ((24, 24, 24, 24), True),
        ((7, 7, 7, 7), True),
    ],
    ids=["224", "384", "512", "detection", "equal"],
)
def test_third_stage_pools_unless_its_window_is_the_whole_map(windows, third_pools):
    assert pooled_stages(windows) == [True, True, third_pools, False]


@pytest.mark.slow
@torch.no_grad()
def test_detection_backbone_matches_official():
    record = golden.read("gc_vit_xxtiny")
    backbone = load("gc_vit_xxtiny", record, features_only=True, window_size=24)
    assert deviation(backbone(golden.image(**record["detection_input"])), record["detection_features"]) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_norms_of_a_detection_checkpoint():
    model = timm.create_model("test_gc_vit", features_only=True, output_norm=True).eval()
    state_dict = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    renamed = {
        key.replace("output_norms.", "norm") if key.startswith("output_norms.") else key: torch.randn_like(value)
        for key, value in state_dict.items()
    }
    overlay = {"state_dict": renamed}
    normed = timm.create_model(
        "test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, output_norm=True
    ).eval()
    raw = timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    for i, (got, feature) in enumerate(zip(normed(x), raw(x), strict=True)):
        norm = renamed[f"norm{i}.weight"], renamed[f"norm{i}.bias"]
        want = F.layer_norm(feature.permute(0, 2, 3, 1), feature.shape[1:2], *norm, eps=1e-5)
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


@torch.no_grad()
def test_tables_are_resized_for_other_windows():
    model = timm.create_model("test_gc_vit")
    overlay = {"state_dict": model.state_dict()}
    larger = timm.create_model("test_gc_vit", pretrained=True, pretrained_cfg_overlay=overlay, window_size=6)
    table = model.stages[1].blocks[1].attn.bias_table
    want = F.interpolate(table[None], (11, 11), mode="bicubic")[0]
    torch.testing.assert_close(larger.stages[1].blocks[1].attn.bias_table.data, want)


@torch.no_grad()
@pytest.mark.parametrize("window_size", [2, 5, (2, 2, 4, 2)])
def test_any_window_takes_any_size_and_images_are_independent(window_size):
    torch.manual_seed(0)
    model = timm.create_model("test_gc_vit", window_size=window_size).eval()
    x = torch.randn(2, 3, 45, 70)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


def test_stage_of_one_block_has_no_query():
    model = timm.create_model("test_gc_vit", depths=(1, 2, 1, 1))
    assert [stage.query is None for stage in model.stages] == [True, False, True, True]
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_gc_vit", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("gc_vit_xxtiny", layer_scale=1e-5)
    block = model.stages[3].blocks[0]
    assert block.ls1.gamma.eq(1e-5).all()
    for tensor in (block.mlp.fc1.weight, block.attn.bias_table, model.stages[3].query.mbconvs[0].se.fc1.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
    # PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)
    assert model.stages[3].downsample.reduction.weight.abs().max().item() == pytest.approx((9 * 256) ** -0.5, rel=0.01)
    linear_and_norm = {name: p for name, p in model.named_parameters() if name.endswith("bias") and "conv" not in name}
    assert all(p.eq(0).all() for p in linear_and_norm.values())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window_size": (7, 7, 14)}, r"3 window_size=\(7, 7, 14\).*one value per stage"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1 to 1,024"),
        ({"window_size": (4, 4, -4, 4)}, r"window_size=\(4, 4, -4, 4\); it has to be whole numbers from 1"),
        ({"depths": (2, 2, 0, 2)}, r"depths=\(2, 2, 0, 2\).*it has to be whole numbers from 1 to 1,000"),
        ({"output_norm": True}, r"output_norm=True with 1000 classes"),
        ({"num_heads": (1, 3, 4, 6)}, r"num_heads=\(1, 3, 4, 6\) for embed_dims=.*divide"),
    ],
    ids=["count", "zero", "negative", "depth", "output_norm", "heads"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_gc_vit", **kwargs)


@pytest.fixture
def no_weights(monkeypatch):
    """No model is built and nothing is downloaded; the warning about the licence appears again."""
    monkeypatch.setattr("zoo.gc_vit.create", lambda *args, **kwargs: torch.nn.Identity())
    zoo.gc_vit._warn_of_licence.cache_clear()
    yield
    zoo.gc_vit._warn_of_licence.cache_clear()


def test_licence_of_published_weights_is_mentioned_once(no_weights):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timm.create_model("gc_vit_tiny", pretrained=True)
        timm.create_model("gc_vit_large_384.in22k_ft_in1k_384", pretrained=True, features_only=True)
    (warning,) = caught
    assert "CC-BY-NC-SA-4.0" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": False},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "mine.pth"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": {"weight": torch.zeros(1)}}},
    ],
    ids=["none", "file", "state_dict"],
)
def test_other_weights_give_no_warning_about_the_licence(no_weights, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.create_model("gc_vit_tiny", **kwargs)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("test_")])
def test_every_configuration_has_the_licence(name):
    assert timm.get_pretrained_cfg(name).license == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("gc_vit_tiny", "detect", {"window_size": 24}),
        ("gc_vit_tiny", "segment", {}),
        ("test_gc_vit", "detect", {}),
    ],
)
def test_dense_kwargs_are_the_official_codes(model, task, expected):
    assert families.dense_kwargs(model, task) == expected


def test_keys_are_those_of_the_operator():
    def keys(site, token, size):
        side = (4, 4, 4, 2)[site.stage - 1]
        return [product(*(window(place, length, side) for place, length in zip(token, size, strict=True)))]

    check_keys("test_gc_vit", keys)


def test_pattern():
    own, whole = product(range(7, 14), range(14, 21)), product(range(28), range(28))
    assert patterns("gc_vit")[1] == {"GC ViT": [own, whole]}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    # Of some other variants it is off, as the official models are.
    assert multiply_adds("gc_vit_tiny") == pytest.approx(4.7, rel=0.02)
