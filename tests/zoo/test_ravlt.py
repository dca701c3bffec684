"""RAVLT's and MAViT's attention, gate, rotation, head, initialisation and keys. 10 s."""

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo import checkpoints, families
from zoo.ravlt import LinearAttention, SoftmaxAttention

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(cls, *args):
    torch.manual_seed(0)
    module = cls(*args, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def rotated(x):
    """Complex numbers turned by row and column: (H, W, D), one head."""
    height, width, dim = x.shape
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    speeds = 10000 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat((rows[..., None] * speeds, columns[..., None] * speeds), -1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles) * pairs).flatten(-2)


def plain_weights(q, k, kind):
    """The weights (T, T) of each token for each, for a head of (H, W, D), by the formulas of the papers."""
    scale, count = q.shape[-1] ** -0.5, q.shape[0] * q.shape[1]
    if kind == "softmax":
        return (scale * rotated(q).flatten(0, 1) @ rotated(k).flatten(0, 1).T).softmax(-1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if kind == "rala":
        alpha = (scale * (k @ q.mean((0, 1)))).flatten().softmax(0).view(k.shape[:2])
        k = count * alpha[..., None] * k
    products = rotated(q).flatten(0, 1) @ rotated(k).flatten(0, 1).T / count
    z = q.flatten(0, 1) @ k.mean((0, 1))[:, None]
    if kind == "rala":
        return products / (z + 1e-6)
    z = scale * z
    return (1 + 1 / (z + 1e-6)) * scale * products - z / count


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rala", "mala", "softmax"])
def test_attention_is_the_papers(kind):
    attn = build(SoftmaxAttention, 16, 2) if kind == "softmax" else build(LinearAttention, 16, 2, kind)
    x = tokens(1, 3, 5, 16)
    q, k, v, gate = attn.qkvo(x)[0].split(16, dim=-1)
    heads = [
        plain_weights(*(part[..., channels] for part in (q, k)), kind) @ v[..., channels].flatten(0, 1)
        for channels in (slice(0, 8), slice(8, 16))
    ]
    lepe = F.conv2d(v.permute(2, 0, 1)[None], attn.lepe.weight, attn.lepe.bias, padding=2, groups=16)[0]
    out = torch.cat(heads, -1).view(3, 5, 16) + lepe.permute(1, 2, 0)
    torch.testing.assert_close(attn(x)[0], attn.proj(out * gate))


def test_heads_of_four_channels_turn_by_whole_radians():
    assert LinearAttention(8, 2, "rala").rope == (1.0,)


def test_stages_have_their_attention():
    for name, kind in (("test_ravlt", "rala"), ("test_mavit", "mala")):
        stages = timm.create_model(name, device="meta").stages
        kinds = [{getattr(block.attn, "kind", "softmax") for block in stage.blocks} for stage in stages]
        assert kinds == [{kind}, {kind}, {"softmax"}, {"softmax"}]


@torch.no_grad()
def test_head_comes_before_pooling():
    model = timm.create_model("test_ravlt").eval()
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    assert features.shape == (2, 64, 2, 3)
    assert model.forward_features(x).shape == (2, 128, 2, 3)
    assert (model.num_features, model.head_hidden_size) == (128, 128)
    pooled = F.silu(model.norm.norm(model.norm.proj(features))).mean((2, 3))
    torch.testing.assert_close(model(x), model.head(pooled))
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)  # the classifier no longer fits
    assert torch.equal(model(x), features)
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (64, 64, 0)


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("test_ravlt", layer_scale_init=(1, 0.5, 1e-6, 1e-6), drop_path_rate=0.7)
    for stage, init in zip(model.stages, (1, 0.5, 1e-6, 1e-6), strict=True):
        for block in stage.blocks:
            assert block.ls1.gamma.eq(init).all()
            assert block.ls2.gamma.eq(init).all()
            assert block.ls1.gamma.ndim == 2  # decayed, as in the official code
    for weight in (model.stages[3].blocks[0].attn.qkvo.weight, model.stages[1].downsample.reduction.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stages[0].blocks[0].mlp.dw_conv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@torch.no_grad()
def test_norms_of_a_detection_checkpoint():
    """As the official backbones name them, with the rest of the classifier."""
    norms = timm.create_model("test_ravlt", num_classes=0, output_norm=True).output_norms
    state_dict = timm.create_model("test_ravlt").state_dict()
    state_dict |= {f"output_norms.{key}": torch.randn_like(value) for key, value in norms.state_dict().items()}
    official = {
        f"extra_norms.{key[13]}.norm.{key[15:]}" if key.startswith("output_norms.") else key: value
        for key, value in state_dict.items()
    }
    official["layers.0.RoPE.angle"] = torch.ones(8)
    x, found = torch.randn(1, 3, 64, 64), []
    for normed in (True, False):
        overlay = {"state_dict": official}
        kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
        found.append(timm.create_model("test_ravlt", output_norm=normed, **kwargs).eval()(x))
    for i, (got, feature) in enumerate(zip(*found, strict=True)):
        norm = state_dict[f"output_norms.{i}.weight"], state_dict[f"output_norms.{i}.bias"]
        want = F.layer_norm(feature.permute(0, 2, 3, 1), feature.shape[1:2], *norm, eps=1e-6)
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


@pytest.mark.slow
def test_weights_of_the_two_papers_differ_in_the_head():
    state_dict = timm.create_model("mavit_s", device="meta").state_dict()
    assert checkpoints.closest_models(state_dict)[0] == ["mavit_s"]


@pytest.mark.parametrize("name", ["test_ravlt", "test_mavit"])
def test_keys_are_those_of_the_operator(name):
    check_keys(name, lambda site, token, size: [product(*map(range, size))])


def test_patterns():
    panels, got = patterns("ravlt")
    assert got["RAVLT"] == [product(range(28), range(28))]
    (nearby,) = got["MAViT"]
    assert 1 < len(nearby) < 28 * 28 / 2
    for panel in panels.values():
        (weights,) = panel.maps
        row, column = panel.queries[0]
        assert weights[row, column] == 1 > weights[row, column + 1] > weights[row + 1, column + 1]


@pytest.mark.parametrize(("name", "task"), [("ravlt_t", "detect"), ("mavit_s", "segment")])
def test_dense_prediction_changes_nothing(name, task):
    assert families.dense_kwargs(name, task) == {}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "count"), [("ravlt_t", 2.61), ("mavit_t", 2.64)])
def test_multiply_adds(name, count):
    # The README says 2.4: without the products of attention, 0.2 G.
    assert multiply_adds(name) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (1, 2, 3, 5)}, r"num_heads=\(1, 2, 3, 5\) for embed_dims=.*divide"),
        ({"num_heads": (1, 2, 3, 32)}, r"num_heads=\(1, 2, 3, 32\) for embed_dims=.*multiple of 4 channels"),
        ({"linear_attn": "softmax"}, "linear_attn='softmax'; it has to be one of 'rala', 'mala'"),
        ({"layer_scale_init": (1, 1)}, r"2 layer_scale_init=\(1, 1\).*one value per stage"),
        ({"head_width": 0}, "head_width=0; it has to be a whole number from 1 to 16,384"),
        ({"embed_dims": (1, 2, 4, 8), "num_heads": (1,) * 4}, r"embed_dims=\(1, 2, 4, 8\)"),
        ({"output_norm": True}, "output_norm=True with 1000 classes"),
    ],
    ids=["divisor", "pairs", "kind", "scales", "head", "channels", "output_norm"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_ravlt", **kwargs)
