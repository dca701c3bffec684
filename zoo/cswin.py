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

from timm.layers import LayerNorm2d
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.layers import Mlp, TransformerBlock, stage_rates
from zoo.stripes import ConvDownsample, ConvStem, CrossShapedAttention, GlobalAttention

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


class CSWin(Backbone):
    """CSWin Transformer: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32. A side of n pixels has (n + 1) // 4 tokens after the stem; every later
    stage halves it and rounds up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
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
            mlp_ratio=mlp_ratio,
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
        stem = ConvStem(in_chans, embed_dims[0], **dd)
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
            stages.append(Stage(blocks, ConvDownsample(embed_dims[i - 1], dim, **dd) if i else None))
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
