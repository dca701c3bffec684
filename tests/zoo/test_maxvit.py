"""MaxViT's own arguments, initialisation, padding and windows, and a comparison with timm. 10 s."""

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import zoo
from zoo.layers import mask_padding
from zoo.maxvit import VARIANTS, MaxViT, WindowAttention
from zoo.mbconv import MBConv, StridedConv2d

from .attended import check_keys, patterns, product, window
from .test_parity import multiply_adds


def randomize(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model.eval()


def test_every_variant_is_registered():
    assert set(timm.list_models(module="maxvit")) == set(VARIANTS)
    assert zoo.maxvit.MaxViT is MaxViT


def test_drop_path_ends_below_its_rate():
    model = timm.create_model("test_maxvit", drop_path_rate=0.8)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for branch in ("conv", "block_attn", "grid_attn"):
        rates = [getattr(getattr(block, branch).drop_path, "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("maxvit_tiny")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all()
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.head.weight.abs().max() > 0.08  # four standard deviations: not truncated
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_position_tables_are_not_decayed():
    names = timm.create_model("test_maxvit", device="meta").no_weight_decay()
    assert len(names) == 16
    assert "stages.0.blocks.0.grid_attn.attn.bias_table" in names


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (1, 5)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_strided_convolution_begins_where_tensorflows_does(size):
    torch.manual_seed(0)
    conv, x = StridedConv2d(2, 3), torch.randn(1, 2, *size)
    # the first tap is on the first row of an even side, and one row before it of an odd side
    starts = [[(n % 2) * -1 + 2 * i for i in range(-(-n // 2))] for n in size]
    padded = F.pad(x, (1, 2, 1, 2))
    want = torch.stack(
        [
            torch.stack(
                [F.conv2d(padded[:, :, y + 1 : y + 4, x + 1 : x + 4], conv.weight, conv.bias) for x in starts[1]]
            )
            for y in starts[0]
        ]
    )
    torch.testing.assert_close(conv(x), want[:, :, :, :, 0, 0].permute(2, 3, 0, 1))


def test_shortcut_of_an_odd_map_is_a_mean_of_pixels_only():
    pool = MBConv(4, 4, stride=2).pool
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    want = torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]])
    torch.testing.assert_close(pool(x)[0, 0], want)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["block", "grid"])
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (2, 11)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_no_token_attends_to_padding(layout, size):
    (height, width), (wh, ww), heads, dim = size, (3, 4), 2, 8
    attention = randomize(WindowAttention(dim, heads, (wh, ww), layout).double())
    x = torch.randn(2, height, width, dim, dtype=torch.float64)
    # the plain formulation: a window consists of the tokens with the same key, whatever the padding
    down, across = -(-height // wh), -(-width // ww)  # of windows; also the distance of a grid's tokens
    windows, places = {}, {}
    for row in range(height):
        for column in range(width):
            window, place = (row // wh, column // ww), (row % wh, column % ww)
            if layout == "grid":
                window, place = (row % down, column % across), (row // down, column // across)
            windows.setdefault(window, []).append((row, column))
            places[row, column] = place
    query, key, value = attention.qkv(x).unflatten(-1, (3, heads, -1)).unbind(3)
    want = torch.empty_like(x)
    for tokens in windows.values():
        for row, column in tokens:
            logits = [torch.einsum("bnd,bnd->bn", query[:, row, column], key[:, r, c]) / 2 for r, c in tokens]
            offsets = [(places[t][0] - places[row, column][0], places[t][1] - places[row, column][1]) for t in tokens]
            bias = [attention.bias_table[:, y + wh - 1, x + ww - 1] for y, x in offsets]
            weights = (torch.stack(logits) + torch.stack(bias)[:, None]).softmax(0)
            values = torch.stack([value[:, r, c] for r, c in tokens])
            want[:, row, column] = (weights[..., None] * values).sum(0).flatten(1)
    torch.testing.assert_close(attention(x), attention.proj(want))


def test_mask_is_true_for_the_map_only():
    mask = mask_padding(torch.zeros(2, 2, 3, 4), 3, 4)
    assert mask.shape == (2, 3, 4)
    assert mask[1].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


@torch.no_grad()
@pytest.mark.parametrize(("size", "masked"), [((128, 256), 0), ((128, 192), 4), ((96, 96), 8)])
def test_only_maps_that_windows_do_not_divide_are_masked(monkeypatch, size, masked):
    masks = []

    def attend(qkv, *, key_mask, **kwargs):
        masks.append(key_mask)
        return qkv[..., : qkv.shape[-1] // 3]

    monkeypatch.setattr(zoo.maxvit, "window_attention", attend)
    timm.create_model("test_maxvit").eval()(torch.zeros(1, 3, *size))
    assert len(masks) == 16
    assert sum(mask is not None for mask in masks) == masked


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("img_size", "window_size"), [((128, 128), 4), ((128, 192), (4, 6))], ids=["square", "rectangle"]
)
def test_agrees_with_timm(img_size, window_size):
    size = {"depths": (1, 2, 1, 1), "num_classes": 10}
    theirs = timm.create_model(
        "maxvit_small_tf_224", embed_dim=(32, 32, 64, 64), head_hidden_size=64, img_size=img_size, **size
    )
    theirs = randomize(theirs.double())
    ours = timm.create_model(
        "maxvit_small",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": theirs.state_dict(), "num_classes": 10},
        embed_dims=(32, 32, 64, 64),
        window_size=window_size,
        dtype=torch.float64,
        **size,
    ).eval()
    for scale in (1, 2):
        x = torch.randn(2, 3, *(side * scale for side in img_size), dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [6, (4, 5)], ids=["6", "4x5"])
def test_tables_are_resized_for_other_windows_bilinearly(window_size):
    state_dict = timm.create_model("test_maxvit").state_dict()
    model = timm.create_model(
        "test_maxvit",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state_dict},
        window_size=window_size,
    )
    name = "stages.3.blocks.1.block_attn.attn.bias_table"
    size = (11, 11) if window_size == 6 else (7, 9)
    want = F.interpolate(state_dict[name][None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(model.state_dict()[name], want)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*it has to be whole numbers from 1 to 1,000"),
        ({"head_dim": 24}, r"head_dim=24 for embed_dims=\(16, 32, 48, 64\).*multiple"),
        ({"head_dim": 0}, r"head_dim=0; it has to be a whole number from 1"),
        ({"stem_dim": 0}, r"stem_dim=0; it has to be a whole number from 1"),
        ({"window_size": 0}, r"window_size=0; it has to be a whole number from 1"),
        ({"window_size": (4, 4, 4)}, r"window_size=\(4, 4, 4\); give one number .* or two"),
    ],
    ids=["lengths", "depth", "head_dim", "no_heads", "stem_dim", "window", "windows"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_maxvit", **kwargs)


@pytest.mark.slow
def test_exported_strided_block_takes_any_size():
    """Exported programs pad before the convolution; eager execution does not."""
    block = MBConv(12, 8, stride=2).double().eval()
    x = torch.randn(2, 13, 18, 12, dtype=torch.float64)
    sizes = {0: Dim("batch"), 1: Dim("height", min=4, max=512), 2: Dim("width", min=4, max=512)}
    program = torch.export.export(block, (x,), dynamic_shapes=(sizes,)).module()
    for size in ((3, 16, 16), (1, 7, 22), (2, 32, 9)):
        x = torch.randn(*size, 12, dtype=torch.float64)
        torch.testing.assert_close(program(x), block(x))


@pytest.mark.slow
def test_keys_are_those_of_the_operator():
    def grid(place, length, size):
        step = -(-length // size)
        return [other for other in range(length) if other % step == place % step]

    def keys(site, token, size):
        find = window if site.module.layout == "block" else grid
        return [product(*(find(place, length, 4) for place, length in zip(token, size, strict=True)))]

    check_keys("test_maxvit", keys)


def test_pattern():
    block, grid = product(range(7, 14), range(14, 21)), product(range(3, 28, 4), range(0, 28, 4))
    assert patterns("maxvit")[1] == {"MaxViT": [block, grid]}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    assert multiply_adds("maxvit_tiny") == pytest.approx(5.6, rel=0.02)
