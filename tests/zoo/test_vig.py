"""ViG's token mixing, stems, position embedding, initialisation and keys. 5 s."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo import families
from zoo.vig import VARIANTS, GatedLinearAttention, TokenMixer, isotropic_side

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

# A small model of the isotropic kind.
PLAIN = {
    "embed_dims": (32,) * 4,
    "depths": (1, 1, 1, 2),
    "num_heads": (2,) * 4,
    "layout": "isotropic",
    "activations": True,
    "img_size": 64,
}


def build(cls, *args):
    torch.manual_seed(0)
    module = cls(*args, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def recurrence(x, attn, head, reverse):
    """One head's output in one direction, token by token, for tokens (T, C)."""
    half = x.shape[1] // 2
    q, k, v = (part.chunk(attn.num_heads, -1)[head] for part in attn.qkv(x).split((half, half, 2 * half), -1))
    gates = torch.sigmoid(attn.gates_out(attn.gates_in(x))).chunk(2, -1)[reverse] ** (1 / 16)
    gates = gates.chunk(attn.num_heads, -1)[head]
    state, out = torch.zeros(q.shape[1], v.shape[1], dtype=x.dtype), torch.zeros_like(v)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        state = gates[t][:, None] * state + k[t][:, None] * v[t]
        out[t] = q[t] @ state
    return out / math.sqrt(q.shape[1])


@torch.no_grad()
def test_attention_is_the_mean_of_both_recurrences():
    attn = build(GatedLinearAttention, 16, 2, 0.5)
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    tokens = x.flatten(0, 2)  # row by row
    want = [(recurrence(tokens, attn, head, 0) + recurrence(tokens, attn, head, 1)) / 2 for head in (0, 1)]
    torch.testing.assert_close(attn(x)[0].flatten(0, 1), torch.cat(want, -1))


@torch.no_grad()
@pytest.mark.parametrize("activations", [False, True])
def test_gate_mixes_attention_and_convolution(activations):
    mixer = build(TokenMixer, 16, 2, 0.5, activations)
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    act = F.silu if activations else lambda y: y
    u = act(F.conv2d(x.permute(0, 3, 1, 2), mixer.dw_conv.weight, padding=1, groups=16).permute(0, 2, 3, 1))

    def normed(y, norm):
        heads = y.unflatten(-1, (2, 8))
        return (heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight).flatten(-2)

    share = torch.sigmoid(mixer.gate(u))
    mixed = share * normed(mixer.attn(u), mixer.global_norm) + (1 - share) * normed(u, mixer.local_norm)
    torch.testing.assert_close(mixer(x), mixer.proj(act(mixed)))


@torch.no_grad()
def test_isotropic_model():
    torch.manual_seed(0)
    model = timm.create_model("test_vig", **PLAIN).eval()
    assert [info["reduction"] for info in model.feature_info] == [16] * 4
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.stages.modules())
    for height, width in ((64, 64), (32, 100), (33, 47)):
        x = torch.randn(1, 3, height, width)
        side = tuple(map(isotropic_side, (height, width)))
        features = model.forward_intermediates(x, intermediates_only=True)
        assert [tuple(feature.shape[2:]) for feature in features] == [side] * 4
        assert model(x).shape == (1, 1000)


@torch.no_grad()
def test_position_embedding_is_resized():
    torch.manual_seed(0)
    stem = timm.create_model("test_vig", **PLAIN).stem
    x = torch.randn(1, 3, 64, 100)
    without = stem.norm2(stem.conv2(F.silu(stem.norm1(stem.conv1(x)))))
    table = stem.pos_embed.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    want = F.interpolate(table, (4, isotropic_side(100)), mode="bicubic")
    torch.testing.assert_close(stem(x), without + want)


@torch.no_grad()
def test_position_embedding_of_other_images_is_resized_on_loading():
    weights = timm.create_model("test_vig", **PLAIN | {"img_size": 96}).state_dict()
    table = weights["stem.pos_embed"].view(1, 6, 6, 32).permute(0, 3, 1, 2)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    loaded = timm.create_model("test_vig", **PLAIN, **overlay).stem.pos_embed
    want = F.interpolate(table, (4, 4), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(loaded.detach(), want)


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    for name, std in (("vig_h_t", 0.02), ("vig_gla_t", math.sqrt(2 / (192 + 384)) * 2**-2.5)):
        mixer = timm.create_model(name).stages[1].blocks[0].attn
        assert mixer.attn.qkv.weight.std().item() == pytest.approx(std, rel=0.05)
        fan = 9 + 9 * mixer.dw_conv.out_channels
        assert mixer.dw_conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan) * 2**-2.5, rel=0.05)
        assert mixer.attn.gates_out.bias.eq(0).all()
    plain = timm.create_model("vig_gla_t")
    for weight in (plain.stages[0].blocks[0].mlp.fc1.weight, plain.stem.pos_embed, plain.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_vig", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@torch.no_grad()
def test_norms_of_a_dense_backbone():
    torch.manual_seed(0)
    norms = timm.create_model("test_vig", num_classes=0, output_norm=True).output_norms
    official = timm.create_model("test_vig").state_dict()
    official |= {f"outnorm{key}": torch.randn_like(value) for key, value in norms.state_dict().items()}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": official}, "features_only": True}
    x = torch.randn(1, 3, 64, 64)
    plain, normed = (timm.create_model("test_vig", output_norm=norm, **overlay).eval()(x) for norm in (False, True))
    for i, (before, after) in enumerate(zip(plain, normed, strict=True)):
        norm = official[f"outnorm{i}.weight"], official[f"outnorm{i}.bias"]
        want = F.layer_norm(before.permute(0, 2, 3, 1), before.shape[1:2], *norm, eps=1e-5)
        torch.testing.assert_close(after, want.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layout": "plain"}, "layout='plain'; it has to be one of 'hierarchical', 'isotropic'"),
        ({"layout": "isotropic"}, r"embed_dims=\(16, 32, 48, 64\); with layout='isotropic'"),
        ({"activations": 1}, "activations=1; it has to be one of True, False"),
        ({"num_heads": (16, 2, 3, 4)}, "heads need an even number of channels"),
        ({"num_heads": (3, 2, 3, 4)}, "heads have to divide their stage's channels"),
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"img_size": (224, 256)}, r"img_size=\(224, 256\)"),
        ({"img_size": "224"}, "img_size='224'"),
        ({"output_norm": True}, "output_norm=True with 1000 classes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vig", **kwargs)


def test_both_sides_of_square_images_are_accepted():
    """timm's files of a model have both."""
    assert timm.create_model("test_vig", **PLAIN | {"img_size": (64, 64)}).stem.pos_embed.shape == (1, 16, 32)


def test_facts():
    assert set(timm.list_models(module="vig")) == set(VARIANTS)
    assert families.dense_kwargs("vig_h_t", "detect") == {}
    assert [families.feature_side("vig_gla_t", side, 16) for side in (224, 32, 200, 264)] == [14, 2, 13, 17]
    assert families.feature_side("vig_h_t", 33, 32) == 2
    assert timm.get_pretrained_cfg("vig_gla_s.in1k").pool_size == (14, 14)


def test_keys_are_those_of_the_operator():
    check_keys("test_vig", lambda site, token, size: [product(*map(range, size))])


def test_pattern():
    panels, got = patterns("vig")
    (weights,) = panels["ViG"].maps
    y, x = panels["ViG"].queries[0]
    assert got["ViG"] == [product(range(28), range(28))]
    flat, place = weights.flatten(), 28 * y + x
    assert flat.argmax() == place
    assert (flat[:place].diff() > 0).all()
    assert (flat[place:].diff() < 0).all()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("model", "billions"), [("vig_h_t", 4.5), ("vig_h_b", 15.5)])
@torch.no_grad()
def test_multiply_adds_are_the_papers(model, billions):
    assert multiply_adds(model) == pytest.approx(billions, rel=0.05)
