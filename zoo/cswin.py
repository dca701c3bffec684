"""CSWin Transformer: cross-shaped windows (Dong et al., CVPR 2022, https://arxiv.org/abs/2107.00652).

Half of the heads attend within vertical stripes of the map, half within horizontal stripes. The last stage attends to
the whole map. A depth-wise convolution of the values, LePE, encodes positions: no parameter depends on the image size.

Official code, MIT: https://github.com/microsoft/CSWin-Transformer. Written from the paper and facts about that code;
the tests compare outputs of cswin_tiny. Differences:
- One class serves classification and dense prediction and takes images of any size, with the padding of the official
  segmentation code. The official classifier takes one square size, for which the two agree.
- CSWin-L has 24 heads in its last stage, as in the code and its weights; the paper's table says 48.
- The convolution at the end of an official stage begins the next one here, so that a stage's output is its feature.
- `drop_rate` is the dropout before the classifier, as in all of timm; the official dropout is `proj_drop_rate` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import is_plain, linear
from zoo.kernels import certain, depthwise_conv2d_nhwc, sizes, window_attention
from zoo.layers import DepthwiseConv, Mlp, TransformerBlock, check_images, global_attention, stage_rates, sym_max

__all__ = ["CSWin"]


def _cswin(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], split_size: int = 7) -> dict:
    return {
        "embed_dims": tuple(embed_dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": num_heads,
        "split_sizes": (1, 2, split_size, split_size),
    }


# Table 1 of the paper, and its stripes of 12 tokens for 384 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    "cswin_tiny": _cswin(64, (1, 2, 21, 1), (2, 4, 8, 16)),
    "cswin_small": _cswin(64, (2, 4, 32, 2), (2, 4, 8, 16)),
    "cswin_base": _cswin(96, (2, 4, 32, 2), (4, 8, 16, 32)),
    "cswin_base_384": _cswin(96, (2, 4, 32, 2), (4, 8, 16, 32), 12),
    "cswin_large": _cswin(144, (2, 4, 32, 2), (6, 12, 24, 24)),
    "cswin_large_384": _cswin(144, (2, 4, 32, 2), (6, 12, 24, 24), 12),
    # our own, for tests and small images on a CPU: 3 does not divide the map of stage 3, which is padded
    "test_cswin": _cswin(16, (2, 2, 2, 2), (2, 4, 8, 8), 3),
}


def to_stripes(x: Tensor, split_size: int) -> tuple[Tensor, int, int]:
    """Cut tokens (B, H, W, ...) into vertical stripes (stripes * B, H, split_size, ...).

    Columns of zeros on both sides make the width a multiple of `split_size`. If their number is odd, the right side has
    one more.

    Returns:
        The stripes, their number per image, and the number of columns of zeros on the left.
    """
    height, width = sizes(x)[1:3]
    stripes = (width + split_size - 1) // split_size
    left, bottom = (stripes * split_size - width) // 2, 0
    if not (isinstance(height, int) and isinstance(width, int)):
        # If sizes are symbolic, torch.export has to prove that reshapes are possible. It can if a side is a maximum,
        # not a sum that it multiplies out, and is never 1. A second stripe of zeros is cropped again.
        stripes, bottom = sym_max(stripes, 2), sym_max(height, 1) - height
    right = stripes * split_size - width - left
    if not certain(left + right + bottom == 0):
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (left, right, 0, bottom))
    return x.unflatten(2, (-1, split_size)).movedim(2, 0).flatten(0, 1), stripes, left


def from_stripes(x: Tensor, stripes: int, left: int, width: int) -> Tensor:
    """(stripes * B, H, split_size, C) -> (B, H, width, C), the inverse of `to_stripes`."""
    x = x.unflatten(0, (stripes, -1)).movedim(0, 2).flatten(2, 3)
    if isinstance(left, int) and isinstance(width, int):
        return x[:, :, left : left + width]
    # torch.export has to prove that a slice is within the map, but not that an index is.
    return x.index_select(2, torch.arange(width, device=x.device) + left)


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of all tokens (B, H, W, dim) to all, plus LePE, between linear layers."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.ModuleList([DepthwiseConv(dim, 3, **dd)])
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = linear(self.qkv, x).unflatten(-1, (3, -1))
        return linear(self.proj, global_attention(qkv, self.num_heads) + self.lepe[0](qkv[..., 2, :]))


@register_notrace_module
class CrossShapedAttention(nn.Module):
    """Attention within stripes of tokens (B, H, W, dim), plus LePE within them, between linear layers.

    The first half of the heads, and so of the channels of query, key and value, has stripes of `split_size` columns,
    the second half has stripes of `split_size` rows. A map whose sides are not multiples of `split_size` is padded with
    zeros on both sides, after the linear layer. As in the official segmentation code, tokens attend to the padding,
    with logits and values of 0.
    """

    def __init__(self, dim: int, num_heads: int, split_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads // 2  # of each branch
        self.split_size = split_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.ModuleList(DepthwiseConv(dim // 2, 3, **dd) for _ in range(2))
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        stripes = tuple(f"stripes, {self.split_size} {side}" for side in ("wide", "high"))
        return AttentionInfo(stripes, values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        columns, rows = linear(self.qkv, x).unflatten(-1, (3, 2, -1)).unbind(-2)  # (B, H, W, 3, dim / 2) each
        columns = self.attend_in_stripes(columns, 0)
        # Horizontal stripes are the vertical ones of the transposed map.
        rows = self.attend_in_stripes(rows.transpose(1, 2), 1).transpose(1, 2)
        return linear(self.proj, torch.cat([columns, rows], dim=-1))

    def attend_in_stripes(self, qkv: Tensor, branch: int) -> Tensor:
        """(B, H, W, 3, C) -> (B, H, W, C), in vertical stripes."""
        width = sizes(qkv)[2]
        qkv, stripes, left = to_stripes(qkv, self.split_size)
        _, height, columns, *_ = sizes(qkv)  # of a stripe
        if torch.compiler.is_exporting():
            # The same attention. torch.export can't prove the operator's reshapes if sizes are symbolic.
            x = global_attention(qkv, self.num_heads)
        else:
            x = window_attention(qkv.flatten(-2), num_heads=self.num_heads, window_size=(height, columns))
        conv, value = self.lepe[branch], qkv[..., 2, :]
        if branch == 0:
            lepe = conv(value)
        elif is_plain(conv, DepthwiseConv):  # the map is transposed, and the kernel is cheaper to transpose
            lepe = depthwise_conv2d_nhwc(value, conv.weight.transpose(2, 3), conv.bias)
        else:
            lepe = conv(value.transpose(1, 2)).transpose(1, 2)
        return from_stripes(x + lepe, stripes, left, width)


class Stem(nn.Module):
    """7 x 7 convolution with stride 4, LayerNorm: (B, C, H, W) -> (B, dim, (H + 1) // 4, (W + 1) // 4)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv)
        return self.norm(self.conv(x))


class Downsample(nn.Module):
    """3 x 3 convolution with stride 2, LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class CSWin(Backbone):
    """CSWin Transformer: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32. A side of n pixels has (n + 1) // 4 tokens after the stem; every later
    stage halves it and rounds up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        split_sizes: Columns or rows of a stripe in each stage. The last value has no effect, since the last stage
            attends to the whole map; in the paper's table it stands for the map of 7 x 7.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        output_norm: Apply a LayerNorm to each feature, for dense prediction. Only without a classifier.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, split_sizes=split_sizes, mlp_ratio=mlp_ratio
        )
        if any(heads % 2 for heads in num_heads[:-1]):
            raise ValueError(
                f"Got {num_heads=}; it has to be an even number in all stages but the last: half of the heads have "
                "vertical stripes, half horizontal ones."
            )
        dd = {"device": device, "dtype": dtype}
        stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks: list[nn.Module] = []
            for drop_path in drop_path_rates[i]:
                attn: nn.Module
                if i < len(depths) - 1:
                    attn = CrossShapedAttention(dim, heads, split_sizes[i], **dd)
                else:
                    attn = GlobalAttention(dim, heads, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, **dd))
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=LayerNorm2d(embed_dims[-1], eps=1e-5, **dd),
            output_norm=output_norm,
        )


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge1\.", "stages.1.downsample."),
    (r"^merge2\.", "stages.2.downsample."),
    (r"^merge3\.", "stages.3.downsample."),
    (r"^stage1\.", "stages.0.blocks."),
    (r"^stage2\.", "stages.1.blocks."),
    (r"^stage3\.", "stages.2.blocks."),
    (r"^stage4\.", "stages.3.blocks."),
    (r"^norm1\.", "output_norms.0."),  # of the segmentation backbone
    (r"^norm2\.", "output_norms.1."),
    (r"^norm3\.", "output_norms.2."),
    (r"^norm4\.", "output_norms.3."),
    (r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.attns\.(\d)\.get_v\.", r".attn.lepe.\1."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("cswin", first_conv="stem.conv")


def _create_cswin(variant: str, pretrained: bool, **kwargs) -> CSWin:
    return create(CSWin, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-T (22.3 M parameters)."""
    return _create_cswin("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-S (34.6 M)."""
    return _create_cswin("cswin_small", pretrained, **kwargs)


@register_model
def cswin_base(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-B (77.4 M)."""
    return _create_cswin("cswin_base", pretrained, **kwargs)


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-B with the stripes for 384 pixels (77.4 M)."""
    return _create_cswin("cswin_base_384", pretrained, **kwargs)


@register_model
def cswin_large(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-L (173.3 M)."""
    return _create_cswin("cswin_large", pretrained, **kwargs)


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs) -> CSWin:
    """CSWin-L with the stripes for 384 pixels (173.3 M)."""
    return _create_cswin("cswin_large_384", pretrained, **kwargs)


@register_model
def test_cswin(pretrained: bool = False, **kwargs) -> CSWin:
    """A CSWin of 0.8 M parameters, for tests and small images."""
    return _create_cswin("test_cswin", pretrained, **kwargs)


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map; see `zoo.families`. The stem is a 7 x 7 convolution with stride 4 and padding 2."""
    return -(-((side + 1) // 4 * 4) // reduction)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    maps = attended(CrossShapedAttention(tokens.shape[-1], 2, 2), place, tokens)
    return [Pattern("CSWin", ("half the heads: columns", "the other half: rows"), maps, (place,))]
