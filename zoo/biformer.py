"""BiFormer: Vision Transformer with Bi-Level Routing Attention (Zhu et al., CVPR 2023, https://arxiv.org/abs/2303.08810).

A map of any size is cut into 7 x 7 regions. Every region is routed to the few regions whose mean keys match its mean
query best, and its tokens attend to all tokens of these. The last stage attends to the whole map.

Official code, MIT: https://github.com/rayleizhu/BiFormer. Written from the paper and facts about that code; the tests
compare outputs of biformer_tiny. Differences:
- Images can have any size: maps are padded as by `auto_pad` in the official detection code. The official classifier and
  biformer_stl refuse maps that can't be cut into equal regions. biformer_stl_nchw follows the refactored official
  code, which has other rules. They are extended here to maps smaller than 7 x 7.
- Dense prediction uses more regions with the same weights: `num_regions=16` for COCO, 8 for ADE20K.
- The downsampling before an official stage belongs to the stage here, so that a stage's output is its feature.
- Options that no published model uses are left out: pooled keys and values, soft routing, layer scale, norms after the
  branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import routed_attention, sizes
from zoo.layers import (
    DepthwiseConv,
    Mlp,
    TransformerBlock,
    check_images,
    crop_tokens,
    dot_product_attention,
    global_attention,
    pad_tokens,
    stage_rates,
    sym_max,
)

__all__ = ["BiFormer"]

FULL = -2  # the official code's top-k for attention to the whole map


def _biformer(embed_dim: int, depths: tuple[int, ...], mlp_ratio: int = 3, **settings) -> dict:
    return {
        "embed_dims": tuple(embed_dim * 2**i for i in range(4)),
        "depths": depths,
        # Attention to the whole map has 8 heads in all variants.
        "num_heads": (*(embed_dim * 2**i // 32 for i in range(3)), 8),
        "mlp_ratio": mlp_ratio,
        **settings,
    }


# Table 1 of the paper, and its ablation in the layout of Swin-T.
VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": _biformer(64, (2, 2, 8, 2)),
    "biformer_small": _biformer(64, (4, 4, 18, 4)),
    "biformer_base": _biformer(96, (4, 4, 18, 4)),
    "biformer_stl": _biformer(96, (2, 2, 6, 2), 4, layout="stl"),
    "biformer_stl_nchw": _biformer(96, (2, 2, 6, 2), 4, layout="stl_nchw"),
    # our own, for tests and small images on a CPU
    "test_biformer": {
        "embed_dims": (16, 32, 64, 128),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "num_regions": 4,
        "topks": (1, 2, 4, FULL),
    },
}


def divmod_open(number: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder by `size`, without the operator %, which ONNX lacks for symbolic sizes."""
    quotient = number // size
    return quotient, number - quotient * size


@register_notrace_module
class RoutedAttention(nn.Module):
    """Bi-level routing attention of tokens (B, H, W, dim), plus LePE, between linear layers.

    One routing serves all heads: mean queries times mean keys over all channels. It has no gradient. Maps that can't
    be cut into equal regions are padded with zeros at the bottom and the right, before the linear layer. The padding
    takes part in the means, in attention and in LePE; its query, key and value are the layer's bias.
    """

    def __init__(self, dim: int, num_heads: int, num_regions: int, topk: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5  # from all channels, not those of a head; attention uses it too
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        regions = self.num_regions
        routed = f"{min(self.topk, regions**2)} of {regions} x {regions} regions"
        return AttentionInfo((routed,), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        height, width, regions = *sizes(x)[1:3], self.num_regions
        rows, columns = ((side + regions - 1) // regions for side in (height, width))  # of a region
        x = pad_tokens(x, regions * rows, regions * columns)
        query, key, value = linear(self.qkv, x).chunk(3, dim=-1)
        if torch.compiler.is_exporting():
            x = self.attend_by_index(query, key, value, rows, columns)
        else:
            routes = self.route(self.region_means(query), self.region_means(key))
            x = routed_attention(query, key, value, routes, num_heads=self.num_heads, regions=regions, scale=self.scale)
        return linear(self.proj, crop_tokens(x + self.lepe(value), height, width))

    def region_means(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, regions, dim)."""
        split, wide = (self.num_regions, -1), torch.promote_types(x.dtype, torch.float32)
        # A mean over both axes at once takes 5 to 10 times as long on CPUs.
        rows = x.detach().unflatten(1, split).mean(dim=2, dtype=wide)
        return rows.unflatten(2, split).mean(dim=3).flatten(1, 2).to(x.dtype)

    def route(self, query: Tensor, key: Tensor) -> Tensor:
        """The regions that each region attends to: two means (B, regions, dim) -> (B, regions, topk)."""
        logits = self.scale * query @ key.transpose(1, 2)
        return logits.topk(min(self.topk, sizes(logits)[2]), dim=2).indices

    def attend_by_index(self, query: Tensor, key: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
        """Routing and attention for symbolic sizes, where torch.export can't prove that the regions divide the map.

        Tokens are therefore gathered and returned by index, without a reshape of the map. torch.export treats a side of
        1 as another case, so such a region takes its tokens twice, which changes neither mean nor weighted sum.
        """
        side, device = self.num_regions, query.device
        across = sym_max(columns, 2)
        tokens = sym_max(rows, 2) * across
        down, right = divmod_open(torch.arange(side**2, device=device)[:, None], side)
        row, column = divmod_open(torch.arange(tokens, device=device), across)
        row, column = down * rows + row.clamp(max=rows - 1), right * columns + column.clamp(max=columns - 1)
        query, key, value = (x[:, row, column] for x in (query, key, value))  # (B, regions, tokens, dim)

        routes = self.route(query.mean(dim=2), key.mean(dim=2))
        image = torch.arange(query.shape[0], device=device)[:, None, None]
        choice, token = divmod_open(torch.arange(self.topk * tokens, device=device), tokens)
        key, value = (x[image, routes[:, :, choice], token] for x in (key, value))
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3).flatten(0, 1) for x in (query, key, value)
        )
        x = dot_product_attention(query, key, value, self.scale)
        x = x.unflatten(0, (-1, side**2))  # (B, regions, tokens, dim)

        down, row = divmod_open(torch.arange(side * rows, device=device)[:, None], rows)
        right, column = divmod_open(torch.arange(side * columns, device=device), columns)
        return x[:, down * side + right, row * across + column]


@register_notrace_module
class GrowingRoutedAttention(RoutedAttention):
    """Bi-level routing attention of the official refactored code: other map sizes have more regions, not larger ones.

    The sides of a region are those of the map over `num_regions`, rounded down. The remaining tokens form regions of
    their own. These are padded after the linear layer: the padding takes part only as keys and values of zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        height, width = sizes(x)[1:3]
        region = (max(height // self.num_regions, 1), max(width // self.num_regions, 1))
        grid = (-(-height // region[0]), -(-width // region[1]))
        query, key, value = linear(self.qkv, x).chunk(3, dim=-1)
        routes = self.route(*(self.real_means(x, region) for x in (query, key)))
        # The operator needs equally many regions along both axes. No region is routed to the additional ones.
        regions = max(grid)
        routes = (routes // grid[1] * regions + routes % grid[1]).unflatten(1, grid)
        routes = F.pad(routes, (0, 0, 0, regions - grid[1], 0, regions - grid[0])).flatten(1, 2)
        lepe = self.lepe(value)
        query, key, value = (pad_tokens(x, regions * region[0], regions * region[1]) for x in (query, key, value))
        x = routed_attention(query, key, value, routes, num_heads=self.num_heads, regions=regions, scale=self.scale)
        return linear(self.proj, crop_tokens(x, height, width) + lepe)

    @staticmethod
    def real_means(x: Tensor, region: tuple[int, int]) -> Tensor:
        """(B, H, W, dim) -> (B, regions, dim). The last regions may be smaller."""
        x = x.detach().permute(0, 3, 1, 2)
        return F.avg_pool2d(x, region, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of all tokens (B, H, W, dim) to all, plus LePE of the input or the values, between linear layers."""

    def __init__(self, dim: int, num_heads: int, lepe_of: str = "input", device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_of = lepe_of
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = linear(self.qkv, x).unflatten(-1, (3, -1))
        lepe = self.lepe(qkv[..., 2, :] if self.lepe_of == "value" else x)
        return linear(self.proj, global_attention(qkv, self.num_heads) + lepe)


class Block(TransformerBlock):
    """A transformer block that first adds a depth-wise 3 x 3 convolution of the tokens, which encodes positions."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__(dim, attn, mlp, drop_path, norm_eps=1e-6, device=device, dtype=dtype)
        self.pos_embed = DepthwiseConv(dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return super().forward(x + self.pos_embed(x), *context)


@register_notrace_module
class ConvStem(nn.Module):
    """Two 3 x 3 convolutions with stride 2 and batch norms: (B, C, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        return convolution(self.conv2, convolution(self.conv1, x, self.norm1, self.act), self.norm2)


class FlooringPatchStem(nn.Module):
    """Patches of 4 x 4 pixels, batch norm: (B, C, H, W) -> (B, dim, H // 4, W // 4)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        # The first modules of both stems have the same official names, and so the same names here.
        self.conv1 = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        return self.norm1(self.conv1(x))


def conv_downsample(in_dim: int, dim: int, device=None, dtype=None) -> nn.Sequential:
    """3 x 3 convolution with stride 2, batch norm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""
    dd = {"device": device, "dtype": dtype}
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))


def patch_downsample(in_dim: int, dim: int, device=None, dtype=None) -> nn.Sequential:
    """Batch norm, 2 x 2 convolution with stride 2: (B, C, H, W) -> (B, dim, H // 2, W // 2)."""
    dd = {"device": device, "dtype": dtype}
    return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, 2, **dd))


class BiFormer(Backbone):
    """BiFormer: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32. Sizes are rounded up, but down in the layouts "stl" and "stl_nchw".

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels.
        num_regions: Regions along each side of a map.
        topks: For each stage, the number of regions that a region attends to; -2 for attention to the whole map.
        layout: "biformer" for a convolutional stem and downsampling, and a depth-wise convolution in each block; "stl"
            for Swin's patches of 4 pixels and downsampling, which do not overlap; "stl_nchw" for "stl" as in the
            official refactored code: LePE of global attention reads the values, not the input, and maps that the
            regions do not divide have more regions, not larger ones.
        drop_rate: Dropout before the classifier.
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
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        mlp_ratio: float = 3,
        num_regions: int = 7,
        topks: Sequence[int] = (1, 4, 16, FULL),
        layout: str = "biformer",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            num_regions=num_regions,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_choice("layout", layout, ("biformer", "stl", "stl_nchw"))
        arguments.check_stages(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio, topks=topks
        )
        if layout == "biformer":
            arguments.check_halved(embed_dims)
        if not all(arguments.is_number(k, 1, num_regions**2) or arguments.is_number(k, FULL, FULL) for k in topks):
            raise ValueError(
                f"Got topks={arguments.shown(topks)}; "
                f"give numbers from 1 to {num_regions**2}, the regions of a map with {num_regions=}, or "
                f"{FULL} for attention to the whole map."
            )
        dd = {"device": device, "dtype": dtype}
        overlapping = layout == "biformer"
        stem_cls, downsample = (ConvStem, conv_downsample) if overlapping else (FlooringPatchStem, patch_downsample)
        routed_cls, lepe_of = (GrowingRoutedAttention, "value") if layout == "stl_nchw" else (RoutedAttention, "input")
        stem = stem_cls(in_chans, embed_dims[0], **dd)
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads, topk) in enumerate(zip(embed_dims, num_heads, topks, strict=True)):
            blocks: list[nn.Module] = []
            for drop_path in drop_path_rates[i]:
                attn: nn.Module
                if topk == FULL:
                    attn = GlobalAttention(dim, heads, lepe_of, **dd)
                else:
                    attn = routed_cls(dim, heads, num_regions, topk, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
                if layout == "biformer":
                    blocks.append(Block(dim, attn, mlp, drop_path, **dd))
                else:
                    blocks.append(TransformerBlock(dim, attn, mlp, drop_path, norm_eps=1e-6, **dd))
            stages.append(Stage(blocks, downsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=nn.BatchNorm2d(embed_dims[-1], **dd),
            output_norm=output_norm,
            output_norm_eps=1e-6,
        )
        self.layout = layout


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.4\.", "stem.norm2."),
    (r"^downsample_layers\.([1-3])\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^extra_norms\.", "output_norms."),  # of the detection and segmentation backbones
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.attn\.qkv_linear\.", ".attn.qkv."),
    (r"\.attn\.output_linear\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    converted = checkpoints.convert(state_dict, model, KEY_MAP)
    # The two STL models have the same layers but compute different functions. Only the official names differ.
    for layout, other, name in (("stl", "stl_nchw", ".attn.qkv_linear."), ("stl_nchw", "stl", ".attn.qkv.qkv.")):
        if model.layout == layout and any(name in key for key in checkpoints.unwrap(state_dict)):
            raise RuntimeError(
                f"The checkpoint belongs to biformer_{other}, not to biformer_{layout}: create that model instead."
            )
    return converted


default_cfgs = checkpoints.default_cfgs("biformer", first_conv="stem.conv1")


def _create_biformer(variant: str, pretrained: bool, cache_dir: str | Path | None = None, **kwargs) -> BiFormer:
    # Downloads are cached under the last part of their address, which is "content" for all official files.
    cache_dir = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints") / variant
    settings = VARIANTS[variant]
    return create(BiFormer, variant, settings, pretrained, checkpoint_filter_fn, cache_dir=cache_dir, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T (13.1 M parameters)."""
    return _create_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S (25.5 M)."""
    return _create_biformer("biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B (56.8 M)."""
    return _create_biformer("biformer_base", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL, in the layout of Swin-T (28.4 M)."""
    return _create_biformer("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-STL of the official refactored code, with other weights and rules (28.4 M)."""
    return _create_biformer("biformer_stl_nchw", pretrained, **kwargs)


@register_model
def test_biformer(pretrained: bool = False, **kwargs) -> BiFormer:
    """A BiFormer of 0.7 M parameters, for tests and small images."""
    return _create_biformer("test_biformer", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The regions that the official code uses for detection or segmentation; see `zoo.families`."""
    if VARIANTS[variant].get("layout", "biformer") != "biformer" or variant == "test_biformer":
        return {}
    return {"num_regions": 16 if task == "detect" else 8}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    maps = attended(RoutedAttention(tokens.shape[-1], 2, 7, 4), place, tokens)
    return [Pattern("BiFormer", ("4 regions out of 7 × 7,", "those that answer best"), maps, (place,))]
