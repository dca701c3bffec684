"""L2ViT's own arguments, initialisation, blocks and padding. A few seconds."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.l2vit import VARIANTS, L2ViT, LinearAttention, LinearBlock, WindowAttention, WindowBlock

from .attended import check_keys, patterns, product, window
from .test_parity import multiply_adds


def test_every_variant_is_registered():
    assert set(timm.list_models(module="l2vit")) == set(VARIANTS)
    assert zoo.l2vit.L2ViT is L2ViT


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_l2vit", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_kinds_of_blocks_alternate_within_each_stage():
    model = timm.create_model("l2vit_tiny", depths=(3, 2, 1, 4), device="meta")
    kinds = [[isinstance(block, LinearBlock) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[False, True, False], [False, True], [False], [False, True, False, True]]


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("l2vit_tiny")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias.eq(0).all()
        elif isinstance(module, LinearAttention):
            assert module.temperature.eq(32**-0.5).all()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_temperatures_have_weight_decay():
    model = timm.create_model("test_l2vit", device="meta")
    temperatures = [p for name, p in model.named_parameters() if name.endswith("temperature")]
    assert len(temperatures) == 4
    assert all(p.ndim > 1 for p in temperatures)
    assert not model.no_weight_decay()


def randomize(module):
    for parameter in module.parameters():
        parameter.normal_(std=0.3)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize(("scale", "bounded"), [(0.01, 1.0), (1.0, None), (30.0, 0.0)])
def test_linear_attention_agrees_with_its_matrix(scale, bounded):
    torch.manual_seed(0)
    attention = randomize(LinearAttention(24, num_heads=3, dtype=torch.float64))
    x = scale * torch.randn(2, 5, 7, 24, dtype=torch.float64)
    query, key, value = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    products = query.relu() @ key.relu().transpose(-1, -2)
    sums = products.sum(-1, keepdim=True)
    share = (sums < 100).double().mean()
    assert share == pytest.approx(bounded, abs=0.05) if bounded is not None else 0 < share < 1
    weights = attention.temperature * products / sums.clamp(min=100)
    want = attention.proj((weights @ value).transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(attention(x), want)


@torch.no_grad()
def test_padding_of_windows_is_a_key():
    torch.manual_seed(0)
    attention = randomize(WindowAttention(16, num_heads=2, window_size=3, dtype=torch.float64))
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 2, 0, 1))  # 6 x 9
    query, key, value = attention.qkv(padded).unflatten(-1, (3, 2, 8)).unbind(3)
    want = torch.empty_like(x)
    for row in range(5):
        for column in range(7):
            at = slice(row // 3 * 3, row // 3 * 3 + 3), slice(column // 3 * 3, column // 3 * 3 + 3)
            keys, values = (tensor[:, at[0], at[1]].flatten(1, 2) for tensor in (key, value))
            logits = torch.einsum("bnd,bknd->bnk", query[:, row, column], keys) * 8**-0.5
            want[:, row, column] = torch.einsum("bnk,bknd->bnd", logits.softmax(-1), values).flatten(1)
    torch.testing.assert_close(attention(x), attention.proj(want))


def residual(layer, x):
    """A depth-wise convolution of a block in plain torch, and its input."""
    conv = F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=1, groups=x.shape[-1])
    return x + conv.permute(0, 2, 3, 1)


@torch.no_grad()
def test_window_block_has_a_convolution_before_each_branch():
    torch.manual_seed(0)
    block = randomize(timm.create_model("test_l2vit", dtype=torch.float64).stages[0].blocks[0])
    assert isinstance(block, WindowBlock)
    x = torch.randn(2, 5, 7, 32, dtype=torch.float64)
    want = residual(block.pos1, x)
    want = want + block.attn(F.layer_norm(want, (32,), block.norm1.weight, block.norm1.bias))
    want = residual(block.pos2, want)
    want = want + block.mlp(F.layer_norm(want, (32,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(x), want)


@torch.no_grad()
def test_linear_block_has_three_branches():
    torch.manual_seed(0)
    block = randomize(timm.create_model("test_l2vit", dtype=torch.float64).stages[0].blocks[1])
    x = torch.randn(2, 5, 7, 32, dtype=torch.float64)
    want = residual(block.pos1, x)
    want = want + block.attn(F.layer_norm(want, (32,), block.norm1.weight, block.norm1.bias))
    local = F.layer_norm(want, (32,), block.norm3.weight, block.norm3.bias).permute(0, 3, 1, 2)
    first, second = block.local.conv1, block.local.conv2
    local = F.gelu(F.conv2d(local, first.weight, first.bias, padding=3, groups=32))
    local = F.conv2d(block.local.norm(local), second.weight, second.bias, padding=3, groups=32)
    want = want + local.permute(0, 2, 3, 1)
    want = want + block.mlp(F.layer_norm(want, (32,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(x), want)


@torch.no_grad()
def test_pixels_of_padding_are_zeros():
    model, x = timm.create_model("test_l2vit").eval(), torch.randn(1, 3, 61, 66)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))))


@torch.no_grad()
def test_padding_between_stages_follows_the_norm():
    torch.manual_seed(0)
    merging = randomize(timm.create_model("test_l2vit", dtype=torch.float64).stages[1].downsample)
    x = torch.randn(2, 32, 5, 3, dtype=torch.float64)
    want = F.layer_norm(x.permute(0, 2, 3, 1), (32,), merging.norm.weight, merging.norm.bias).permute(0, 3, 1, 2)
    want = F.conv2d(F.pad(want, (0, 1, 0, 1)), merging.proj.weight, merging.proj.bias, stride=2)
    torch.testing.assert_close(merging(x), want)


@torch.no_grad()
def test_keys_of_the_dense_backbone_are_recognised():
    model = timm.create_model("test_l2vit", num_classes=0, output_norm=True).eval()
    for parameter in model.output_norms.parameters():
        nn.init.normal_(parameter)
    official = {key.replace("output_norms.", "norm"): value for key, value in model.state_dict().items()}
    overlay = {"state_dict": official}
    loaded = timm.create_model(
        "test_l2vit", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, output_norm=True
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    for feature, want in zip(loaded(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(feature, want)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_windows_of_dense_prediction_have_seven_tokens(task):
    assert families.dense_kwargs("l2vit_base_384", task) == {"window_size": 7}
    assert families.dense_kwargs("l2vit_tiny", task) == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (2, 3, 4)}, r"3 num_heads=\(2, 3, 4\).*one value per stage"),
        ({"num_heads": (3, 3, 4, 6)}, r"num_heads=\(3, 3, 4, 6\) for embed_dims.*heads have to divide"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1"),
        ({"embed_dims": (33, 48, 64, 96), "num_heads": (1, 3, 4, 6)}, r"embed_dims=\(33, .*have to be even"),
        ({"output_norm": True}, r"1000 classes.*num_classes=0"),
    ],
    ids=["lengths", "heads", "window", "stem", "classes"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_l2vit", **kwargs)


def test_keys_are_those_of_the_operators():
    def keys(site, token, size):
        if "linear" in site.info.groups[0]:
            return [product(*map(range, size))]
        return [product(*(window(place, length, 3) for place, length in zip(token, size, strict=True)))]

    check_keys("test_l2vit", keys)


def test_pattern():
    everything = product(range(28), range(28))
    assert patterns("l2vit")[1] == {"L2ViT": [product(range(7, 14), range(14, 21)), everything]}


@pytest.mark.slow
def test_multiply_adds_are_the_papers():
    assert multiply_adds("l2vit_tiny") == pytest.approx(4.7, rel=0.02)
