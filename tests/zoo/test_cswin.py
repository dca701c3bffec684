"""CSWin's stripes and padding against a plain formulation; its arguments, initialisation and key names. 7 s."""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from zoo.checkpoints import convert
from zoo.cswin import KEY_MAP, VARIANTS, CrossShapedAttention, GlobalAttention

from .attended import check_keys, patterns, product
from .test_parity import multiply_adds


@pytest.fixture
def fused_attn():
    before = timm.layers.use_fused_attn()
    yield timm.layers.set_fused_attn
    timm.layers.set_fused_attn(before)


def attention(split_size, dim=16, num_heads=4):
    torch.manual_seed(0)
    return CrossShapedAttention(dim, num_heads, split_size).double()


def tokens(batch, height, width, dim=16):
    return torch.randn(batch, height, width, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_map(query, key, value, num_heads, lepe):
    """Attention of all tokens of one map (H, W, C), and the convolution of its values."""
    parts = [x.reshape(-1, num_heads, x.shape[-1] // num_heads).movedim(1, 0) for x in (query, key, value)]
    weights = (parts[0] @ parts[1].mT / parts[0].shape[-1] ** 0.5).softmax(-1)
    out = (weights @ parts[2]).movedim(0, 1).reshape(query.shape)
    return out + F.conv2d(value.movedim(-1, 0), lepe.weight, lepe.bias, padding=1, groups=len(lepe.bias)).movedim(0, -1)


def plain_stripes(attn, x):
    """Stripe by stripe on one image (H, W, C), without a batch."""
    height, width, dim = x.shape
    qkv, half, size = attn.qkv(x), dim // 2, attn.split_size
    out = []
    for branch, side in enumerate((width, height)):
        missing = -side % size
        pad = (0, 0, missing // 2, missing - missing // 2) + (0, 0) * (branch == 0)
        if branch == 1:
            pad = (0, 0, 0, 0, missing // 2, missing - missing // 2)
        parts = [F.pad(qkv[..., i * dim + branch * half :][..., :half], pad) for i in range(3)]
        axis = 1 if branch == 0 else 0
        stripes = zip(*(part.split(size, dim=axis) for part in parts), strict=True)
        joined = torch.cat([plain_map(*stripe, attn.num_heads, attn.lepe[branch]) for stripe in stripes], dim=axis)
        out.append(joined.narrow(axis, missing // 2, side))
    return attn.proj(torch.cat(out, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (7, 4), (2, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("split_size", [1, 2, 3, 7])
def test_stripes_match_a_plain_formulation(split_size, size):
    attn, x = attention(split_size), tokens(2, *size)
    torch.testing.assert_close(attn(x), torch.stack([plain_stripes(attn, image) for image in x]))


@torch.no_grad()
def test_nothing_leaks_into_the_next_stripe():
    attn, x = attention(2), tokens(1, 6, 6)
    attn.proj = torch.nn.Identity()
    changed = x.clone()
    changed[:, 2, 3] += 1
    vertical, horizontal = (attn(x) != attn(changed)).any(dim=0).unflatten(-1, (2, -1)).any(-1).unbind(-1)
    assert vertical.any(0).tolist() == [False, False, True, True, False, False]
    assert horizontal.any(1).tolist() == [False, False, True, True, False, False]


@torch.no_grad()
def test_global_attention_matches_a_plain_formulation(fused_attn):
    torch.manual_seed(0)
    attn, x = GlobalAttention(16, 4).double(), tokens(2, 3, 5)
    want = torch.stack([attn.proj(plain_map(*attn.qkv(image).chunk(3, -1), 4, attn.lepe[0])) for image in x])
    for enable in (False, True):
        fused_attn(enable)
        torch.testing.assert_close(attn(x), want)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (49, 75)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_images_of_a_padded_batch_are_independent(size):
    torch.manual_seed(0)
    model, x = timm.create_model("test_cswin").eval(), torch.randn(2, 3, *size)
    torch.testing.assert_close(model(x), torch.cat([model(x[:1]), model(x[1:])]))


@torch.no_grad()
@pytest.mark.parametrize(("side", "features"), [(32, [8, 4, 2, 1]), (33, [8, 4, 2, 1]), (35, [9, 5, 3, 2])])
def test_stem_rounds_as_the_official_one(side, features):
    backbone = timm.create_model("test_cswin", features_only=True).eval()
    assert [feature.shape[2] for feature in backbone(torch.zeros(1, 3, side, 64))] == features


def test_last_stage_ignores_its_split_size():
    model = timm.create_model("test_cswin", split_sizes=(2, 4, 4, 1))
    assert [getattr(stage.blocks[0].attn, "split_size", None) for stage in model.stages] == [2, 4, 4, None]


@torch.no_grad()
def test_other_stripes_take_the_same_weights():
    state_dict = timm.create_model("test_cswin").state_dict()
    timm.create_model("test_cswin", split_sizes=(1, 2, 12, 12)).load_state_dict(state_dict)


def test_every_variant_is_registered():
    assert set(timm.list_models(module="cswin")) == set(VARIANTS)


def test_large_has_the_heads_of_its_published_weights():
    assert VARIANTS["cswin_large"]["num_heads"] == VARIANTS["cswin_large_384"]["num_heads"] == (6, 12, 24, 24)


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_cswin", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.slow
def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("cswin_tiny")
    block = model.stages[2].blocks[0]
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, model.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert linear.bias.eq(0).all()
    # PyTorch's default: uniform within 1 / sqrt(fan in), biases too
    for conv, fan_in in ((block.attn.lepe[0], 9), (model.stem.conv, 147), (model.stages[1].downsample.conv, 576)):
        assert conv.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
        assert conv.bias.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.1)


def test_norms_of_the_segmentation_backbone_are_the_output_norms():
    model = timm.create_model("test_cswin", num_classes=0, output_norm=True)
    ours = model.state_dict()
    official = {re.sub(r"^output_norms\.(\d)", lambda m: f"norm{int(m[1]) + 1}", key): x for key, x in ours.items()}
    assert {"norm1.weight", "norm4.bias"} <= official.keys()
    assert all(torch.equal(x, ours[key]) for key, x in convert(official, model, KEY_MAP).items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split_sizes": (1, 2, 7)}, r"3 split_sizes=\(1, 2, 7\).*one value per stage"),
        ({"split_sizes": (1, 0, 7, 7)}, r"split_sizes=\(1, 0, 7, 7\).*it has to be whole numbers from 1 to 1,024"),
        ({"num_heads": (1, 2, 4, 8)}, r"num_heads=\(1, 2, 4, 8\).*even number in all stages but the last"),
        ({"num_heads": (2, 6, 8, 8)}, r"num_heads=\(2, 6, 8, 8\).*divide their stage's channels"),
        ({"output_norm": True}, r"output_norm=True with 1000 classes"),
    ],
    ids=["lengths", "split_size", "odd heads", "heads", "output_norm"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_cswin", **kwargs)


@pytest.mark.slow
def test_keys_are_those_of_the_operator():
    def stripe(place, length, size):
        """A stripe of a map that is padded on both sides, with the larger half on the right."""
        left = (-length % size) // 2
        return [other for other in range(length) if (other + left) // size == (place + left) // size]

    def keys(site, token, size):
        if site.stage == 4:
            return [product(*map(range, size))]
        split = (1, 2, 3)[site.stage - 1]
        columns, rows = stripe(token[1], size[1], split), stripe(token[0], size[0], split)
        return [product(range(size[0]), columns), product(rows, range(size[1]))]

    check_keys("test_cswin", keys)


def test_pattern():
    assert patterns("cswin")[1] == {"CSWin": [product(range(28), (16, 17)), product((10, 11), range(28))]}


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_the_papers():
    # That of cswin_large is off, as the official model is.
    assert multiply_adds("cswin_tiny") == pytest.approx(4.3, rel=0.02)
