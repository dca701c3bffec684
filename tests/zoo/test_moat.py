"""MOAT's own arguments, initialisation, tables, pooling and weights of TensorFlow. 6 s."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.checkpoints import closest_models
from zoo.mbconv import SamePool2d
from zoo.moat import MOAT, VARIANTS, Attention

from . import golden
from .attended import check_keys, patterns, product, window
from .test_parity import multiply_adds


def test_every_variant_is_registered():
    assert set(timm.list_models(module="moat")) == set(VARIANTS)
    assert zoo.moat.MOAT is MOAT


def test_drop_path_ends_below_its_rate():
    model = timm.create_model("test_moat", drop_path_rate=0.8)
    blocks = [block for stage in model.stages for block in stage.blocks]
    branches = [*blocks[:4], *(block.conv for block in blocks[4:])], blocks[4:]
    for found, first in zip(branches, (0, 4), strict=True):
        rates = [getattr(branch.drop_path, "drop_prob", 0.0) for branch in found]
        assert rates == pytest.approx([0.1 * i for i in range(first, 8)])


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("moat_tiny0")
    for name, parameter in model.named_parameters():
        if "norm" in name or name.startswith("pre_logits"):
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all()
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.head.weight.abs().max() > 0.08  # four standard deviations: not truncated
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize(
    ("model", "millions"), [("moat_2_384", 73.422), ("moat_3_512", 189.958), ("moat_4_512", 483.214)]
)
def test_parameters_of_large_models_are_official(model, millions):
    """The official names of their tensors are not known to the tests."""
    count = sum(parameter.numel() for parameter in timm.create_model(model, device="meta").parameters())
    assert count / 1e6 == pytest.approx(millions, abs=6e-4)


def test_position_tables_are_not_decayed():
    names = timm.create_model("test_moat", device="meta").no_weight_decay()
    assert len(names) == 4
    assert "stages.3.blocks.1.attn.bias_table" in names


def plain_attention(attention, x, groups, table):
    """Each token's attention to the tokens of its group: `groups` maps a token to tokens and their offsets from it."""
    heads, (height, width) = attention.num_heads, x.shape[1:3]
    query, key, value = attention.qkv(x).unflatten(-1, (3, heads, -1)).unbind(3)
    out = torch.empty_like(x)
    for row in range(height):
        for column in range(width):
            logits, values = [], []
            for (y, x_), (down, right) in groups(row, column):
                dot = torch.einsum("bnd,bnd->bn", query[:, row, column], key[:, y, x_]) * query.shape[-1] ** -0.5
                logits.append(dot if table is None else dot + table[:, down, right])
                values.append(value[:, y, x_])
            weights = torch.stack(logits).softmax(0)
            out[:, row, column] = (weights[..., None] * torch.stack(values)).sum(0).flatten(1)
    return attention.proj(out)


@torch.no_grad()
@pytest.mark.parametrize("table_side", [None, 3], ids=["no_table", "table"])
def test_attention_is_to_the_whole_map(table_side):
    torch.manual_seed(0)
    attention = Attention(8, 2, table_side=table_side, dtype=torch.float64)
    if table_side:
        attention.bias_table.normal_()
        table = F.interpolate(attention.bias_table[None], (7, 5), mode="bilinear", align_corners=False)[0]
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)

    def groups(row, column):
        return [((y, x), (y - row + 3, x - column + 2)) for y in range(4) for x in range(3)]

    want = plain_attention(attention, x, groups, table if table_side else None)
    torch.testing.assert_close(attention(x), want)


@torch.no_grad()
def test_no_token_of_a_window_attends_to_padding():
    torch.manual_seed(0)
    attention = Attention(8, 2, window_size=(3, 2), table_side=3, dtype=torch.float64)
    attention.bias_table.normal_()
    table = F.interpolate(attention.bias_table[None], (5, 3), mode="bilinear", align_corners=False)[0]
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)

    def groups(row, column):
        places = product(window(row, 4, 3), window(column, 5, 2))
        return [((y, x), (y - row + 2, x - column + 1)) for y, x in sorted(places)]

    torch.testing.assert_close(attention(x), plain_attention(attention, x, groups, table))


def test_last_block_of_a_stage_can_be_global():
    model = timm.create_model("test_moat", window_size=[4, (2, 3)], global_last=True)
    found = [[block.attn.window_size for block in stage.blocks] for stage in model.stages[2:]]
    assert found == [[(4, 4), None], [(2, 3), None]]


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (1, 5), (2, 2)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_pooling_of_dense_prediction_is_a_mean_of_pixels_only(size):
    torch.manual_seed(0)
    x = torch.randn(1, 2, *size)
    # the first pixel is on the first row of an even side, and one row before it of an odd side
    rows, columns = ([range(max(2 * i - n % 2, 0), min(2 * i - n % 2 + 3, n)) for i in range(-(-n // 2))] for n in size)
    want = [[x[:, :, ys.start : ys.stop, xs.start : xs.stop].mean((2, 3)) for xs in columns] for ys in rows]
    want = torch.stack([torch.stack(row, -1) for row in want], -2)
    torch.testing.assert_close(SamePool2d()(x), want)


@torch.no_grad()
def test_dense_features_are_activated():
    torch.manual_seed(0)
    plain = timm.create_model("test_moat", features_only=True).eval()
    active = timm.create_model("test_moat", features_only=True, output_act=True).eval()
    active.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for feature, want in zip(active(x), plain(x), strict=True):
        torch.testing.assert_close(feature, F.gelu(want))


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_kwargs_are_the_official_codes(task):
    assert families.dense_kwargs("moat_0", task) == {"pool_size": 3, "output_act": True}
    assert families.dense_kwargs("test_moat", task) == {}


@pytest.mark.slow
def test_tag_without_tables():
    model = timm.create_model("moat_tiny0.in1k_no_bias", device="meta")
    assert not [name for name in model.state_dict() if name.endswith("bias_table")]
    assert families.tag_kwargs("moat_tiny0.in1k") == {}


def tensorflow_names(weights):
    """The variables of an official checkpoint: names and layouts of TensorFlow, averages, the optimizer's variables."""
    leaves = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    variables = {"global_step": torch.tensor(7), "moat/block_00_00/expand_conv/kernel/Momentum": torch.zeros(3)}
    for key, value in weights.items():
        layer, _, leaf = key.rpartition(".")
        name, part = f"moat/{layer}".replace(".", "/"), layer.rpartition(".")[2]
        name = name.replace("moat/conv_", "moat/stem/conv_").replace("moat/norm_", "moat/stem/norm_")
        if part in ("q", "k", "v"):
            leaf, value = "kernel" if leaf == "weight" else leaf, value.unflatten(0, (-1, 32))
            value = value.permute(2, 0, 1) if value.ndim == 3 else value
        elif part == "o" and leaf == "weight":
            leaf, value = "kernel", value.T.unflatten(0, (-1, 32))
        elif "norm" in part:
            leaf = {"weight": "gamma", "bias": "beta"}.get(leaf, leaves.get(leaf))
        elif leaf == "weight" and "depthwise" in part:
            leaf, value = "depthwise_kernel", value.permute(2, 3, 0, 1)
        elif leaf == "weight":
            leaf, value = "kernel", value.permute(2, 3, 1, 0)
        variables[f"{name}/{leaf}"] = torch.zeros_like(value)
        variables[f"{name}/{leaf}/ExponentialMovingAverage"] = value
    return variables


@pytest.mark.slow
def test_tensorflow_checkpoint_loads_and_is_recognised():
    weights = golden.official_weights("moat_tiny0")
    variables = tensorflow_names(weights)
    models = [
        timm.create_model("moat_tiny0", pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}).state_dict()
        for state_dict in (weights, variables)
    ]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert closest_models(weights) == (["moat_tiny0"], 1.0)


@pytest.mark.slow
def test_checkpoint_without_tables_is_recognised():
    weights = {key: value for key, value in golden.official_weights("moat_tiny0").items() if "position" not in key}
    assert closest_models(weights) == (["moat_tiny0.in1k_no_bias"], 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"embed_dims": (16, 32), "depths": (1, 1)}, r"embed_dims=\(16, 32\); give the channels of four stages"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*it has to be whole numbers from 1 to 1,000"),
        ({"head_dim": 32}, r"head_dim=32 for embed_dims=\(16, 32, 48, 64\).*multiple"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1"),
        ({"window_size": (4, 4, 4)}, r"window_size=\(4, 4, 4\); give one size, or a list"),
        ({"window_size": (4, (4, 4, 4))}, r"a window of \(4, 4, 4\); give one number .* or two"),
        ({"pool_size": 4}, r"pool_size=4; it has to be one of 2, 3"),
        ({"output_act": "gelu"}, r"output_act='gelu'; it has to be one of True, False"),
    ],
    ids=["lengths", "stages", "depth", "head_dim", "window", "windows", "sides", "pool_size", "output_act"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_moat", **kwargs)


@pytest.mark.slow
def test_keys_are_the_whole_map():
    check_keys("test_moat", lambda site, token, size: [product(*map(range, size))])


def test_pattern():
    assert patterns("moat")[1] == {"MOAT": [product(range(28), range(28))]}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("moat_0") == pytest.approx(5.7, rel=0.02)
