"""MaxViT: Multi-Axis Vision Transformer (Tu et al., ECCV 2022, https://arxiv.org/abs/2204.01697).

Every block is an inverted-residual convolution (MBConv), then attention within windows of neighbouring tokens (block),
then attention within groups of equally many tokens that are spread evenly over the map (grid): local and global
attention at linear cost.

Official code, Apache-2.0: https://github.com/google-research/maxvit (TensorFlow). Written from the paper and the facts
of that code; the tests compare outputs. Differences:
- Images can have any size. The official code refuses maps that its windows do not divide, and sets the window to 1/32
  of the image. Here `window_size` is fixed. Both kinds of attention pad maps at the bottom and the right, and no token
  attends to the padding. For sizes that the official code accepts, outputs are the same.
- Query, key and value are one linear layer, as in timm's conversion of the official weights, whose names `KEY_MAP`
  translates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import register_notrace_module
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import certain, sizes, window_attention
from zoo.layers import Mlp, TransformerBlock, crop_tokens, mask_padding, pad_tokens
from zoo.mbconv import MBConv, Stem

__all__ = ["MaxViT"]

# Table 1 of the paper. The window is 1/32 of the training images' side of 224, 384 or 512 pixels.
TINY = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 5, 2), "stem_dim": 64}
SMALL = {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 5, 2), "stem_dim": 64}
BASE = {"embed_dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2), "stem_dim": 64}
LARGE = {"embed_dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "stem_dim": 128}
XLARGE = {"embed_dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2), "stem_dim": 192}
VARIANTS: dict[str, dict[str, Any]] = {
    "maxvit_tiny": {**TINY, "window_size": 7},
    "maxvit_tiny_384": {**TINY, "window_size": 12},
    "maxvit_tiny_512": {**TINY, "window_size": 16},
    "maxvit_small": {**SMALL, "window_size": 7},
    "maxvit_small_384": {**SMALL, "window_size": 12},
    "maxvit_small_512": {**SMALL, "window_size": 16},
    "maxvit_base": {**BASE, "window_size": 7},
    "maxvit_base_384": {**BASE, "window_size": 12},
    "maxvit_base_512": {**BASE, "window_size": 16},
    "maxvit_large": {**LARGE, "window_size": 7},
    "maxvit_large_384": {**LARGE, "window_size": 12},
    "maxvit_large_512": {**LARGE, "window_size": 16},
    "maxvit_xlarge": {**XLARGE, "window_size": 7},
    "maxvit_xlarge_384": {**XLARGE, "window_size": 12},
    "maxvit_xlarge_512": {**XLARGE, "window_size": 16},
    # our own, for tests and small images on a CPU
    "test_maxvit": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "stem_dim": 16,
        "head_dim": 16,
        "window_size": 4,
        "norm_momentum": 0.1,
    },
}

Layout = Literal["block", "grid"]


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention within the windows of a map (B, H, W, dim), "block" or "grid", between linear layers.

    A map that the window does not divide is padded at the bottom and the right. No token attends to the padding.
    """

    def __init__(self, dim: int, num_heads: int, window_size: tuple[int, int], layout: Layout, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.layout = layout
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, *(2 * side - 1 for side in window_size), **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        nn.init.normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        height, width = self.window_size
        return AttentionInfo((f"{self.layout} of {height} x {width}",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        size = sizes(x)[1:3]
        padded = [(n + side - 1) // side * side for n, side in zip(size, self.window_size, strict=True)]
        divides = certain(padded[0] == size[0]) and certain(padded[1] == size[1])
        x = window_attention(
            pad_tokens(linear(self.qkv, x), *padded),  # after the layer, which needs no padding
            num_heads=self.num_heads,
            window_size=self.window_size,
            layout=self.layout,
            bias_table=self.bias_table,
            bias_sign="key_minus_query",
            key_mask=None if divides else mask_padding(x, *padded),
        )
        return linear(self.proj, crop_tokens(x, *size))


class Block(nn.Module):
    """MBConv, block attention with its MLP, grid attention with its MLP: tokens (B, H, W, C) to tokens."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        num_heads: int,
        window_size: tuple[int, int],
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = MBConv(in_dim, dim, stride, drop_path, "tanh", norm_layer=norm_layer, **dd)
        layouts: tuple[Layout, Layout] = ("block", "grid")
        self.block_attn, self.grid_attn = (
            TransformerBlock(
                dim,
                WindowAttention(dim, num_heads, window_size, layout, **dd),
                Mlp(dim, 4 * dim, proj_drop, "tanh", **dd),
                drop_path,
                **dd,
            )
            for layout in layouts
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.grid_attn(self.block_attn(self.conv(x)))


class PreLogits(nn.Module):
    """LayerNorm, Linear, tanh, on pooled features (B, dim)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.fc = nn.Linear(dim, dim, **dd)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(self.norm(x)))


class MaxViT(Backbone):
    """Multi-Axis Vision Transformer: images (B, in_chans, H, W) to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up. There is no norm before the pooling: features are
    the plain outputs of the stages.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths: Channels and blocks of each stage.
        stem_dim: Channels of the stem.
        head_dim: Channels of an attention head.
        window_size: Tokens of a window along each axis, for block and grid. The authors use 1/32 of the image. Weights
            for other windows can be loaded: their relative-position tables are resized (bilinear).
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth. Each of the five branches of block b of N has this rate times b / N.
        norm_momentum: Weight of a batch in the running statistics of batch norm. With the authors' value (0.99 in
            Keras) they need several hundred updates to converge, so short training runs from scratch need a larger one.
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
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_dim: int = 64,
        head_dim: int = 32,
        window_size: int | tuple[int, int] = 7,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_momentum: float = 0.01,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            stem_dim=stem_dim,
            head_dim=head_dim,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_momentum=norm_momentum,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths)
        if any(dim % head_dim for dim in embed_dims):
            raise ValueError(f"Got {head_dim=} for {embed_dims=}; the channels of each stage have to be a multiple.")
        sides = arguments.as_tuple(window_size, 2)
        if len(sides) != 2:
            raise ValueError(f"Got {window_size=}; give one number for rows and columns, or two.")
        for side in sides:
            arguments.check(window_size=side)
        window = (sides[0], sides[1])
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=norm_momentum)
        stem = Stem(in_chans, stem_dim, "tanh", norm_layer, **dd)
        dims, total_depth = (stem_dim, *embed_dims), sum(depths)
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                in_dim, stride = (dim, 1) if j else (dims[i], 2)
                drop_path = drop_path_rate * (sum(depths[:i]) + j) / total_depth
                blocks.append(
                    Block(in_dim, dim, stride, dim // head_dim, window, proj_drop_rate, drop_path, norm_layer, **dd)
                )
            stages.append(Stage(blocks))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            pre_logits=PreLogits(embed_dims[-1], **dd),
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif (reset_parameters := getattr(module, "reset_parameters", None)) is not None:
            reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative-position tables, as in the official recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}


# Names of timm's conversions -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^stem\.norm1\.", "stem.norm."),
    (r"\.conv\.pre_norm\.", ".conv.norm."),
    (r"\.conv\.conv1_1x1\.", ".conv.expand."),
    (r"\.conv\.conv2_kxk\.", ".conv.dw_conv."),
    (r"\.conv\.conv3_1x1\.", ".conv.reduce."),
    (r"\.shortcut\.expand\.", ".shortcut."),
    (r"\.attn_(block|grid)\.", r".\1_attn."),
    (r"\.rel_pos\.relative_position_bias_table$", ".bias_table"),
    (r"^head\.norm\.", "pre_logits.norm."),
    (r"^head\.pre_logits\.", "pre_logits."),
    (r"^head\.fc\.", "head."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP, resize="bilinear")


default_cfgs = checkpoints.default_cfgs("maxvit", first_conv="stem.conv1")


def _create_maxvit(variant: str, pretrained: bool, **kwargs) -> MaxViT:
    return create(MaxViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def maxvit_tiny(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-T, windows of 7 for 224 pixels (30.9 M parameters)."""
    return _create_maxvit("maxvit_tiny", pretrained, **kwargs)


@register_model
def maxvit_tiny_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-T, windows of 12 for 384 pixels (31.0 M)."""
    return _create_maxvit("maxvit_tiny_384", pretrained, **kwargs)


@register_model
def maxvit_tiny_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-T, windows of 16 for 512 pixels (31.1 M)."""
    return _create_maxvit("maxvit_tiny_512", pretrained, **kwargs)


@register_model
def maxvit_small(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-S, windows of 7 for 224 pixels (68.9 M)."""
    return _create_maxvit("maxvit_small", pretrained, **kwargs)


@register_model
def maxvit_small_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-S, windows of 12 for 384 pixels (69.0 M)."""
    return _create_maxvit("maxvit_small_384", pretrained, **kwargs)


@register_model
def maxvit_small_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-S, windows of 16 for 512 pixels (69.1 M)."""
    return _create_maxvit("maxvit_small_512", pretrained, **kwargs)


@register_model
def maxvit_base(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-B, windows of 7 for 224 pixels (119.5 M)."""
    return _create_maxvit("maxvit_base", pretrained, **kwargs)


@register_model
def maxvit_base_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-B, windows of 12 for 384 pixels (119.7 M)."""
    return _create_maxvit("maxvit_base_384", pretrained, **kwargs)


@register_model
def maxvit_base_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-B, windows of 16 for 512 pixels (119.9 M)."""
    return _create_maxvit("maxvit_base_512", pretrained, **kwargs)


@register_model
def maxvit_large(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-L, windows of 7 for 224 pixels (211.8 M)."""
    return _create_maxvit("maxvit_large", pretrained, **kwargs)


@register_model
def maxvit_large_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-L, windows of 12 for 384 pixels (212.0 M)."""
    return _create_maxvit("maxvit_large_384", pretrained, **kwargs)


@register_model
def maxvit_large_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-L, windows of 16 for 512 pixels (212.3 M)."""
    return _create_maxvit("maxvit_large_512", pretrained, **kwargs)


@register_model
def maxvit_xlarge(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XL, windows of 7 for 224 pixels (475.0 M)."""
    return _create_maxvit("maxvit_xlarge", pretrained, **kwargs)


@register_model
def maxvit_xlarge_384(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XL, windows of 12 for 384 pixels (475.3 M)."""
    return _create_maxvit("maxvit_xlarge_384", pretrained, **kwargs)


@register_model
def maxvit_xlarge_512(pretrained: bool = False, **kwargs) -> MaxViT:
    """MaxViT-XL, windows of 16 for 512 pixels (475.8 M)."""
    return _create_maxvit("maxvit_xlarge_512", pretrained, **kwargs)


def test_maxvit(pretrained: bool = False, **kwargs) -> MaxViT:
    """A MaxViT of 0.6 M parameters, for tests and small images."""
    return _create_maxvit("test_maxvit", pretrained, **kwargs)


# timm registers a test model of the same name. Every family here has one, so `import zoo` replaces that of timm.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Overwriting test_maxvit in registry")
    register_model(test_maxvit)


def timm_name(variant: str) -> str | None:
    """The same architecture in timm, whose names end with the image size; see `zoo.families`."""
    if variant == "test_maxvit":
        return None
    size, _, side = variant.removeprefix("maxvit_").partition("_")
    return f"maxvit_{size}_tf_{side or 224}"


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    maps: list[Tensor] = []
    for layout in ("block", "grid"):
        module = WindowAttention(tokens.shape[-1], 2, (7, 7), layout)
        module.reset_parameters()
        maps += attended(module, place, tokens)
    return [Pattern("MaxViT", ("a block of 7 × 7, then", "a grid of 7 × 7"), tuple(maps), (place,))]
