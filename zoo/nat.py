"""NAT and DiNAT: (Dilated) Neighborhood Attention Transformers (Hassani et al., CVPR 2023; Hassani and Shi, 2022).

https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001. Every token attends to the kernel_size x kernel_size
tokens around it. In DiNAT, every second block has a dilation that spreads them over the map. DiNAT_s has Swin's layout,
the isotropic models have ViT's, and ViT-rpb is their counterpart with attention to all tokens.

Official code, MIT: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer. Written from the papers and facts
about that code; the tests compare outputs. Differences:
- The downsampling at the end of an official level begins the next stage here, so that a stage's output is its feature.
- ViT-rpb takes images of any size: its table is resized (bicubic) for maps other than 14 x 14.
- Dense prediction uses other dilations with the same weights: `dilations=[[1, 28, 1], [1, 7, 1, 14], ...]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import neighborhood_attention, sizes, window_attention
from zoo.layers import Mlp, PatchStem, TransformerBlock, check_images, crop_tokens, pad_tokens, stage_rates, sym_max

__all__ = ["NAT"]


def _nat(embed_dim: int, depths: tuple[int, ...], heads: int, mlp_ratio: int, **settings) -> dict:
    return {
        "embed_dims": tuple(embed_dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "mlp_ratio": mlp_ratio,
        **settings,
    }


def _isotropic(dim: int, **settings) -> dict:
    return {
        "embed_dims": (dim,) * 4,
        "depths": (3,) * 4,
        "num_heads": (dim // 32,) * 4,
        "mlp_ratio": 4,
        "layout": "isotropic",
        **settings,
    }


# Table 1 of NAT; tables 2 and 3 (DiNAT_s) of DiNAT, and the isotropic models of its appendix.
DILATED, DILATED_384 = {"dilations": (8, 4, 2, 1)}, {"dilations": (13, 6, 3, 1)}
SWIN = {"layout": "swin", **DILATED}
VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": _nat(64, (3, 4, 6, 5), 2, 3),
    "nat_tiny": _nat(64, (3, 4, 18, 5), 2, 3),
    "nat_small": _nat(96, (3, 4, 18, 5), 3, 2, layer_scale=1e-5),
    "nat_base": _nat(128, (3, 4, 18, 5), 4, 2, layer_scale=1e-5),
    "dinat_mini": _nat(64, (3, 4, 6, 5), 2, 3, **DILATED),
    "dinat_tiny": _nat(64, (3, 4, 18, 5), 2, 3, **DILATED),
    "dinat_small": _nat(96, (3, 4, 18, 5), 3, 2, **DILATED),
    "dinat_base": _nat(128, (3, 4, 18, 5), 4, 2, layer_scale=1e-5, **DILATED),
    "dinat_large": _nat(192, (3, 4, 18, 5), 6, 2, **DILATED),
    "dinat_large_384": _nat(192, (3, 4, 18, 5), 6, 2, **DILATED_384),
    "dinat_large_384_11x11": _nat(192, (3, 4, 18, 5), 6, 2, kernel_size=11, **DILATED),
    "dinat_s_tiny": _nat(96, (2, 2, 6, 2), 3, 4, **SWIN),
    "dinat_s_small": _nat(96, (2, 2, 18, 2), 3, 4, **SWIN),
    "dinat_s_base": _nat(128, (2, 2, 18, 2), 4, 4, **SWIN),
    "dinat_s_large": _nat(192, (2, 2, 18, 2), 6, 4, **SWIN),
    "dinat_s_large_384": _nat(192, (2, 2, 18, 2), 6, 4, **SWIN | DILATED_384),
    "nat_isotropic_small": _isotropic(384),
    "nat_isotropic_base": _isotropic(768),
    # Stages of three blocks; the second and the fourth begin with a dilated one.
    "dinat_isotropic_small": _isotropic(384, dilations=((1, 2, 1), (2, 1, 2), (1, 2, 1), (2, 1, 2))),
    "dinat_isotropic_base": _isotropic(768, dilations=((1, 2, 1), (2, 1, 2), (1, 2, 1), (2, 1, 2))),
    "vitrpb_small": _isotropic(384, kernel_size=None),
    "vitrpb_base": _isotropic(768, kernel_size=None),
    # our own, for tests and small images on a CPU
    "test_nat": _nat(16, (2, 2, 2, 2), 1, 2, kernel_size=3),
    "test_dinat": _nat(16, (2, 2, 2, 2), 1, 2, kernel_size=3, dilations=(4, 2, 1, 1)),
}


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Neighborhood attention on tokens (B, H, W, dim), between linear layers.

    Maps smaller than kernel_size * dilation are padded with zeros at the bottom and the right. As in the official code,
    tokens attend to the padding, whose keys and values are the bias of the qkv layer.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        trunc_normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        dilated = f", dilated by {self.dilation}" if self.dilation > 1 else ""
        return AttentionInfo((f"{self.kernel_size} x {self.kernel_size} neighbours{dilated}",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        span = self.kernel_size * self.dilation
        x = pad_tokens(x, sym_max(height, span), sym_max(width, span))
        x = neighborhood_attention(
            linear(self.qkv, x),
            num_heads=self.num_heads,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            bias_table=self.bias_table,
        )
        return linear(self.proj, crop_tokens(x, height, width))


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of all tokens (B, H, W, dim) to all, with a relative-position table for a map of `size` x `size`."""

    def __init__(self, dim: int, num_heads: int, size: int = 14, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * size - 1, 2 * size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        trunc_normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        x = window_attention(
            linear(self.qkv, x),
            num_heads=self.num_heads,
            window_size=(height, width),
            bias_table=checkpoints.resize_table(self.bias_table, (2 * height - 1, 2 * width - 1)),
            bias_sign="key_minus_query",
        )
        return linear(self.proj, x)


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions with stride 2, LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        return self.norm(self.conv2(self.conv1(x)))


class ConvDownsample(nn.Module):
    """3 x 3 convolution with stride 2, LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


@register_notrace_module
class PatchMerging(nn.Module):
    """Patch merging of Swin: concatenated 2 x 2 patches, LayerNorm, Linear. Odd sides are padded with zeros."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * in_dim, **dd)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        _, height, width, _ = sizes(x)
        x = pad_tokens(x, height + height % 2, width + width % 2)
        patches = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return linear(self.reduction, self.norm(torch.cat(patches, dim=-1))).permute(0, 3, 1, 2)


def block_dilations(dilations: int | Sequence[int], depth: int) -> list[int]:
    """The dilation of each block of a stage, from the dilation of every second block or from a repeated pattern."""
    pattern: tuple[Any, ...] = tuple(dilations) if arguments.is_list(dilations) else (1, dilations)
    fits = 0 < len(pattern) <= depth or not arguments.is_list(dilations)
    if not fits or not all(arguments.is_number(dilation, 1, 2**10) for dilation in pattern):
        raise ValueError(
            f"Got dilations={arguments.shown(dilations)} for a stage of {depth} blocks; give the dilation of every "
            f"second block, or a pattern of 1 to {depth} dilations."
        )
    return [pattern[i % len(pattern)] for i in range(depth)]


class NAT(Backbone):
    """(Dilated) Neighborhood Attention Transformer: images (B, in_chans, H, W) to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (at stride 16 in an isotropic model). Their sizes are rounded up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels.
        kernel_size: Neighbours of a token along each axis; None for attention to all tokens.
        dilations: For each stage, the dilation of every second block, or a pattern that its blocks repeat.
        layout: "nat" for a convolutional stem and downsampling, "swin" for patches of 4 pixels and patch merging,
            "isotropic" for patches of 16 pixels and no downsampling.
        layer_scale: Initial factor of the residual branches; None for no layer scale.
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
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3,
        kernel_size: int | None = 7,
        dilations: Sequence[int | Sequence[int]] | None = None,
        layout: str = "nat",
        layer_scale: float | None = None,
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
            kernel_size=kernel_size,
            layer_scale=layer_scale,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_choice("layout", layout, ("nat", "swin", "isotropic"))
        arguments.check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio)
        dilations = (1,) * len(depths) if dilations is None else dilations
        arguments.check_stages(embed_dims=embed_dims, dilations=dilations)
        if layout == "nat":
            arguments.check_halved(embed_dims)
        if layout == "isotropic" and any(dim != embed_dims[0] for dim in embed_dims):
            raise ValueError(
                f"Got {embed_dims=}; with layout='isotropic', all stages have the same number of channels."
            )
        dd = {"device": device, "dtype": dtype}
        stride = 16 if layout == "isotropic" else 4
        downsample_cls = {"nat": ConvDownsample, "swin": PatchMerging}.get(layout)
        stem = (
            ConvStem(in_chans, embed_dims[0], **dd)
            if layout == "nat"
            else PatchStem(in_chans, embed_dims[0], stride, **dd)
        )
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            blocks: list[nn.Module] = []
            for drop_path, dilation in zip(drop_path_rates[i], block_dilations(dilations[i], depth), strict=True):
                attn: nn.Module
                if kernel_size is None:
                    attn = GlobalAttention(dim, heads, **dd)
                else:
                    attn = NeighborhoodAttention(dim, heads, kernel_size, dilation, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, layer_scale, **dd))
            downsample = downsample_cls(embed_dims[i - 1], dim, **dd) if downsample_cls and i else None
            stages.append(Stage(blocks, downsample))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            strides=[stride] * len(depths) if layout == "isotropic" else None,
            norm=LayerNorm2d(embed_dims[-1], eps=1e-5, **dd),
            output_norm=output_norm,
        )


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"\.relative_position_index$", None),  # ViT-rpb: a constant, which window attention computes
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.", "stem."),
    # NAT and DiNAT: levels of several blocks; DiNAT_s calls them layers
    (r"^(?:levels|layers)\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^(?:levels|layers)\.0\.downsample\.", "stages.1.downsample."),
    (r"^(?:levels|layers)\.1\.downsample\.", "stages.2.downsample."),
    (r"^(?:levels|layers)\.2\.downsample\.", "stages.3.downsample."),
    # the isotropic models: twelve layers of one block, here four stages of three
    *((rf"^layers\.{i}\.(?=norm|attn|mlp|gamma)", f"stages.{i // 3}.blocks.{i % 3}.") for i in range(12)),
    (r"^norm([0-3])\.", r"output_norms.\1."),  # of the detection and segmentation backbones
    (r"\.attn\.rpb$", ".attn.bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


# The first convolution and the last stride of the models in which one of them differs.
_EXCEPTIONS = {
    name: ("stem.proj", 16 if settings["layout"] == "isotropic" else 32)
    for name, settings in VARIANTS.items()
    if "layout" in settings
}
default_cfgs = checkpoints.default_cfgs("nat", "stem.conv1", ("test_nat", "test_dinat"), _EXCEPTIONS)


def _create_nat(variant: str, pretrained: bool, **kwargs) -> NAT:
    return create(NAT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def nat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Mini (20.0 M parameters)."""
    return _create_nat("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Tiny (27.9 M)."""
    return _create_nat("nat_tiny", pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Small (50.7 M)."""
    return _create_nat("nat_small", pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT-Base (89.8 M)."""
    return _create_nat("nat_base", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Mini (20.0 M)."""
    return _create_nat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Tiny (27.9 M)."""
    return _create_nat("dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Small (50.7 M)."""
    return _create_nat("dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Base (89.8 M)."""
    return _create_nat("dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large (200.9 M)."""
    return _create_nat("dinat_large", pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large with the dilations for 384 pixels (200.9 M)."""
    return _create_nat("dinat_large_384", pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT-Large with 11 x 11 neighbours, for 384 pixels (201.1 M)."""
    return _create_nat("dinat_large_384_11x11", pretrained, **kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Tiny, in Swin's layout (28.3 M)."""
    return _create_nat("dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Small (49.6 M)."""
    return _create_nat("dinat_s_small", pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Base (87.8 M)."""
    return _create_nat("dinat_s_base", pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large (196.5 M)."""
    return _create_nat("dinat_s_large", pretrained, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT_s-Large with the dilations for 384 pixels (196.5 M)."""
    return _create_nat("dinat_s_large_384", pretrained, **kwargs)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    """NAT in ViT-Small's layout (22.0 M)."""
    return _create_nat("nat_isotropic_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    """NAT in ViT-Base's layout (86.5 M)."""
    return _create_nat("nat_isotropic_base", pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT in ViT-Small's layout (22.0 M)."""
    return _create_nat("dinat_isotropic_small", pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs) -> NAT:
    """DiNAT in ViT-Base's layout (86.5 M)."""
    return _create_nat("dinat_isotropic_base", pretrained, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs) -> NAT:
    """ViT-Small with relative positions, the isotropic models' counterpart (22.1 M)."""
    return _create_nat("vitrpb_small", pretrained, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs) -> NAT:
    """ViT-Base with relative positions (86.6 M)."""
    return _create_nat("vitrpb_base", pretrained, **kwargs)


@register_model
def test_nat(pretrained: bool = False, **kwargs) -> NAT:
    """A NAT of 0.3 M parameters, for tests and small images."""
    return _create_nat("test_nat", pretrained, **kwargs)


@register_model
def test_dinat(pretrained: bool = False, **kwargs) -> NAT:
    """A DiNAT of 0.3 M parameters, for tests and small images."""
    return _create_nat("test_dinat", pretrained, **kwargs)


# Dilations for dense prediction, by layout and task; the weights do not depend on them. Each stage has a list.
DENSE_DILATIONS = {
    ("nat", "detect"): ([1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]),
    ("nat", "segment"): ([1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]),
    ("swin", "detect"): ([1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]),
    ("swin", "segment"): ([1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]),
}
# The same for segmentation by the large models, which are trained on crops of 640 pixels.
_STAGE_3_OF_LARGE = [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]
DENSE_DILATIONS_OF_LARGE = {
    "nat": ([1, 20, 1], [1, 5, 1, 10], _STAGE_3_OF_LARGE, [1, 2, 1, 2, 1]),
    "swin": ([1, 20], [1, 10], _STAGE_3_OF_LARGE, [1, 2]),
}
# The same for both tasks by the Mask2Former model, whose 11 x 11 kernels reach as far with less dilation.
DENSE_DILATIONS_11X11 = (
    [1, 14, 1],
    [1, 4, 1, 7],
    [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3],
    [1, 1, 1, 1, 1],
)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The dilations that the official code uses for detection or segmentation; see `zoo.families`."""
    settings = VARIANTS[variant]
    layout = settings.get("layout", "nat")
    if variant == "test_dinat" or layout == "isotropic" or "dilations" not in settings:
        return {}
    if settings.get("kernel_size") == 11:
        dilations = DENSE_DILATIONS_11X11
    elif task == "segment" and "_large" in variant:
        dilations = DENSE_DILATIONS_OF_LARGE[layout]
    else:
        dilations = DENSE_DILATIONS[layout, task]
    return {"dilations": [list(stage) for stage in dilations]}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    dim, corner = tokens.shape[-1], (tokens.shape[1] - 2, 2)
    near, spread = (NeighborhoodAttention(dim, 2, 7, dilation) for dilation in (1, 3))
    for module in (near, spread):
        module.reset_parameters()
    maps = (*attended(near, place, tokens), *attended(near, corner, tokens))
    lines = ("7 × 7 around the token,", "moved inward at a rim")
    return [
        Pattern("NAT", lines, maps, (place, corner)),
        Pattern("DiNAT", ("7 × 7, every third token:", "dilated by 3"), attended(spread, place, tokens), (place,)),
    ]
