"""MoH-ViT's gates, attention, position bias, balancing loss, arguments and initialisation. 5 s."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.layers import bin_weights
from zoo.moh import (
    VARIANTS,
    AggregatedAttention,
    GlobalAttention,
    HeadGates,
    MoHViT,
    PositionBias,
    largest,
)

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

SIZES = pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 6), (5, 11)], ids=lambda size: f"{size[0]}x{size[1]}")


def build(cls, *args, **kwargs):
    """A module in float64 whose parameters are all random."""
    module = cls(*args, **kwargs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def tokens(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_every_variant_is_registered():
    assert set(timm.list_models(module="moh")) == set(VARIANTS)
    assert zoo.moh.MoHViT is MoHViT


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_moh", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("test_moh")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.3), name
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3), name
            assert (module.bias is None) == (".gates." in name)
        if isinstance(module, GlobalAttention | AggregatedAttention):
            torch.testing.assert_close(F.softplus(module.temperature), torch.full_like(module.temperature, 1 / 0.24))
            assert module.query_embedding.std().item() == pytest.approx(0.02, rel=0.5)
        if isinstance(module, AggregatedAttention):
            assert module.learnable_tokens.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.local_bias.std().item() == pytest.approx(0.0004, rel=0.6)
            assert module.learnable_bias.eq(0).all()
        assert getattr(module, "bias", None) is None or module.bias.eq(0).all()


def test_epsilons_are_official():
    model = timm.create_model("test_moh", device="meta")
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    wide = {name for name, eps in found.items() if eps == 1e-5}
    assert set(found.values()) == {1e-5, 1e-6}
    assert wide == {name for name in found if ".attn." in name or "stem" in name or "downsample" in name}


def test_logits_have_no_weight_decay():
    model = timm.create_model("test_moh", device="meta")
    kinds = {name.partition(".attn.")[2] for name in model.no_weight_decay()}
    bias = {f"position_bias.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}
    assert kinds == {"temperature", "query_embedding", "local_bias", *bias}


# Gates.


def plain_gates(gates, x, shared, routed):
    """The gates of one token, (heads,)."""
    found = []
    if shared:
        found.append(shared * gates.shared(x).softmax(-1) if shared > 1 else x.new_ones(1))
    if routed:
        shares = gates.routed(x).softmax(-1)
        values, index = shares.topk(routed)
        found.append(torch.zeros_like(shares).scatter(0, index, routed * values / values.sum()))
    if len(found) == 2:
        found = [part * 2 * kind for part, kind in zip(found, gates.kinds(x).softmax(-1), strict=True)]
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize(("shared", "routed"), [(2, 3), (1, 2), (7, 0), (0, 4), (2, 5)])
def test_gates_are_those_of_each_token(shared, routed):
    gates, x = build(HeadGates, 16, 7, shared, routed), tokens(2, 2, 3, 16)
    want = torch.stack([plain_gates(gates, token, shared, routed) for token in x.flatten(0, 2)])
    torch.testing.assert_close(gates(x).flatten(0, 2), want)
    assert (gates(x) != 0).sum(-1).eq(shared + routed).all()


def test_of_equal_gates_the_first_are_kept():
    x = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert largest(x, 3).tolist() == [[True, True, True, False, False], [True, True, True, False, False]]


def test_balancing_loss_is_the_mean_over_layers_with_routed_heads():
    torch.manual_seed(0)
    model, images = timm.create_model("test_moh").double().train(), tokens(3, 3, 64, 64)
    inputs = {}
    gates = [m for m in model.modules() if isinstance(m, HeadGates) and m.num_routed]
    for module in gates:
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    assert len(gates) == 6  # all but the first stage's
    model(images)
    losses = []
    for module in gates:
        shares = module.routed(inputs[module].flatten(0, 2)).softmax(-1)
        used = torch.zeros_like(shares).scatter(1, shares.topk(module.num_routed).indices, 1)
        losses.append(shares.shape[1] ** 2 * (shares.mean(0) * used.mean(0)).mean())
    want = 0.01 * torch.stack(losses).mean()
    torch.testing.assert_close(model.auxiliary_loss(), want)
    weights = [module.routed.weight for module in gates]
    got = torch.autograd.grad(model.auxiliary_loss(), weights, retain_graph=True)
    for pair in zip(got, torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(*pair)


def test_balancing_loss_is_the_same_with_gradient_checkpointing():
    torch.manual_seed(0)
    model, images, found = timm.create_model("test_moh").double().train(), tokens(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        loss = model(images).square().mean() + model.auxiliary_loss()
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair)


def test_model_can_be_copied_after_a_step():
    model = timm.create_model("test_moh").train()
    model(torch.randn(1, 3, 32, 32))
    copied = copy.deepcopy(model)
    assert model.auxiliary_loss() > 0
    with pytest.raises(RuntimeError, match="that of a forward pass in training"):
        copied.auxiliary_loss()


def test_without_routed_heads_there_is_no_loss():
    model = timm.create_model("test_moh", shared_heads=(2, 4, 6, 8), routed_heads=(0, 0, 0, 0)).train()
    assert model.auxiliary_loss() == 0


# Attention.


@SIZES
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_patches_are_those_of_adaptive_pooling(size, ratio):
    x, bins = tokens(1, 1, *size), [max(side // ratio, 1) for side in size]
    rows, columns = (bin_weights(side, count, count, x.dtype, x.device) for side, count in zip(size, bins, strict=True))
    torch.testing.assert_close(rows @ x @ columns.mT, F.adaptive_avg_pool2d(x, bins))


def plain_bias(module, size, bins, native):
    """The position bias of each pair of a token and a patch, (heads, H W, h w)."""
    axes = []
    for side, count in zip(size, bins, strict=True):
        places = torch.arange(side, dtype=torch.float64)
        middles = F.adaptive_avg_pool1d(places[None, None], count).flatten()
        distance = (places[:, None] - middles) / (native - 1) * 8
        axes.append(distance.sign() * (distance.abs() + 1).log2() / 3)
    down, right = axes
    shape = (*size, *bins)
    pairs = torch.stack((down[:, None, :, None].expand(shape), right[None, :, None, :].expand(shape)), -1)
    return module.fc2(module.fc1(pairs).relu()).flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


@torch.no_grad()
@SIZES
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_position_bias_is_that_of_each_pair(size, ratio):
    module, bins = build(PositionBias, 3, 14), [max(side // ratio, 1) for side in size]
    got = module(size, [(count, count) for count in bins], 0, tokens(1))
    torch.testing.assert_close(got.mT, plain_bias(module, size, bins, 14))
    padded = module(size, [(count, count) for count in bins], 1, tokens(1)).unflatten(-1, (size[0], size[1] + 1))
    assert torch.equal(padded[..., :-1].flatten(2), got)


def plain_queries(attn, query, count):
    """Normalized queries (heads, tokens, D), and the same with their embedding and scale, for `count` keys each."""
    query = F.normalize(query, dim=-1)
    return query, (query + attn.query_embedding) * F.softplus(attn.temperature) * count.log()[:, None]


def heads_of(x, heads):
    """(H, W, heads D) -> (heads, H W, D)."""
    return x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1)


def plain_aggregated(attn, x, ratio, native):
    """The attention of one image (H, W, dim) in the form of the official code, with unfolded neighbourhoods."""
    (height, width, dim), heads = x.shape, attn.num_heads
    bins = [max(side // ratio, 1) for side in (height, width)]
    pooled = F.adaptive_avg_pool2d(F.gelu(attn.sr(x.permute(2, 0, 1)[None])), bins)[0].permute(1, 2, 0)
    key, value = (heads_of(y, heads) for y in attn.kv(attn.norm(pooled)).chunk(2, -1))

    def unfold(y):  # (heads, H W, D, 9)
        y = F.unfold(y.permute(2, 0, 1)[None], 3, padding=1)
        return y.view(heads, dim // heads, 9, height * width).permute(0, 3, 1, 2)

    near_key, near_value = attn.kv(x).chunk(2, -1)
    near_key = F.normalize(near_key.unflatten(-1, (heads, -1)), dim=-1).flatten(2)
    padding = F.unfold(torch.ones(1, 1, height, width, dtype=x.dtype), 3, padding=1)[0].T == 0  # (H W, 9)
    count = (~padding).sum(1).to(x.dtype) + math.prod(bins)
    query, scaled = plain_queries(attn, heads_of(attn.q(x), heads), count)
    local = (scaled[:, :, None] @ unfold(near_key))[:, :, 0] + attn.local_bias[:, None]
    local = local.masked_fill(padding, -torch.inf)
    far = scaled @ F.normalize(key, dim=-1).mT + plain_bias(attn.position_bias, (height, width), bins, native)
    weights = torch.cat((local, far), -1).softmax(-1)
    local = weights[..., :9] + query @ attn.learnable_tokens + attn.learnable_bias
    out = (unfold(near_value) @ local[..., None])[..., 0] + weights[..., 9:] @ value
    out = out * heads_of(attn.gates(x[None])[0], heads)
    return attn.proj(out.transpose(0, 1).reshape(height, width, dim))


@torch.no_grad()
@SIZES
@pytest.mark.parametrize("ratio", [2, 4])
def test_aggregated_attention_is_the_plain_form(size, ratio):
    attn, x = build(AggregatedAttention, 24, 3, 1, 1, native=14, sr_ratio=ratio), tokens(2, *size, 24)
    torch.testing.assert_close(attn(x), torch.stack([plain_aggregated(attn, image, ratio, 14) for image in x]))


@torch.no_grad()
@SIZES
def test_global_attention_is_the_plain_form(size):
    attn, x = build(GlobalAttention, 24, 3, 1, 1, native=7), tokens(2, *size, 24)
    for image, got in zip(x, attn(x), strict=True):
        query, key, value = (heads_of(y, 3) for y in attn.qkv(image).chunk(3, -1))
        _, scaled = plain_queries(attn, query, torch.full((math.prod(size),), math.prod(size), dtype=x.dtype))
        logits = scaled @ F.normalize(key, dim=-1).mT + plain_bias(attn.position_bias, size, size, 7)
        out = logits.softmax(-1) @ value * heads_of(attn.gates(image[None])[0], 3)
        torch.testing.assert_close(got, attn.proj(out.transpose(0, 1).reshape(*size, 24)))


def test_distances_are_scaled_for_the_size_of_pretraining():
    sides = {}
    for size in (224, 160, 100):
        model = timm.create_model("test_moh", pretrain_size=size, device="meta")
        sides[size] = [stage.blocks[0].attn.position_bias.native for stage in model.stages]
    assert sides == {224: [56, 28, 14, 7], 160: [40, 20, 10, 5], 100: [25, 13, 7, 4]}


# Facts.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"routed_heads": (0, 2, 1)}, r"3 routed_heads=\(0, 2, 1\).*one value per stage"),
        ({"shared_heads": (2, -1, 2, 2)}, r"shared_heads=\(2, -1, 2, 2\).*whole numbers from 0"),
        ({"routed_heads": (0, 2, 5, 3)}, r"routed_heads=\(0, 2, 5, 3\).*not shared, or 0 if all are"),
        ({"routed_heads": (0, 2, 0, 3)}, r"routed_heads=\(0, 2, 0, 3\).*not shared, or 0 if all are"),
        ({"shared_heads": (3, 1, 2, 2)}, r"shared_heads=\(3, 1, 2, 2\).*not shared, or 0 if all are"),
        ({"pretrain_size": 32}, r"pretrain_size=32; it has to be a whole number from 64"),
        ({"mlp_ratios": (4, 4, 3, 0.03)}, r"mlp_ratios=\(4, 4, 3, 0.03\).*one hidden channel"),
        ({"sr_ratios": (8, 4, 2, 0)}, r"sr_ratios=\(8, 4, 2, 0\); it has to be whole numbers from 1"),
    ],
    ids=["lengths", "negative", "many", "none", "shared", "size", "hidden", "ratio"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_moh", **kwargs)


@pytest.mark.slow
def test_keys_are_all_tokens():
    check_keys("test_moh", lambda site, token, size: [product(*map(range, size))])


@torch.no_grad()
def test_weights_of_patches_are_those_of_their_tokens():
    attn = build(AggregatedAttention, 24, 3, 3, 0, native=14, sr_ratio=4)
    weights = torch.rand(2, 1, 1, 7 * 9 + 1 * 2)
    got = attn.spread(weights, (7, 9))[0, 0]
    near, (left, right) = weights[0, 0, 0, :63].view(7, 9), weights[0, 0, 0, 63:]
    columns = torch.stack([left] * 4 + [left + right] + [right] * 4)  # two patches, five columns wide, overlap by one
    torch.testing.assert_close(got, near + columns / 35)


def test_pattern():
    found = patterns("moh")[1]["MoH-ViT"]
    assert found == [product(range(10, 13), range(15, 18)), product(range(7), range(7))]


@pytest.mark.slow
def test_multiply_adds_are_those_of_transnext():
    assert multiply_adds("moh_vit_s_75") == pytest.approx(10.3, rel=0.01)
