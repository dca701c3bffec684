"""L2ViT: The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, https://arxiv.org/abs/2501.16182).

Blocks with attention in windows alternate with blocks of linear attention, whose cost grows linearly with the number of
tokens that attend to each other, here all of the map. Since linear attention spreads its weights widely, a local
concentration module of two depth-wise convolutions follows it.

Official code, MIT: https://github.com/ChuanyangZheng/L2ViT. Written from the paper and facts about that code; the tests
compare outputs of l2vit_tiny. Differences:
- One class serves classification and dense prediction; for the latter, `output_norm` adds a LayerNorm to each feature.
- The downsampling before an official stage belongs to the stage here.
- Modules have shorter names; `KEY_MAP` translates official checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import linear_attention, sizes, window_attention
from zoo.layers import (
    DepthwiseConv,
    Mlp,
    ResidualConv,
    check_images,
    crop_tokens,
    depthwise,
    init_transformer,
    pad_images,
    pad_tokens,
    stage_rates,
)

__all__ = ["L2ViT"]


def _l2vit(embed_dim: int, depth: int, window_size: int = 7) -> dict[str, Any]:
    return {
        "embed_dims": tuple(embed_dim * 2**i for i in range(4)),
        "depths": (2, 2, depth, 2),
        "num_heads": tuple(embed_dim * 2**i // 32 for i in range(4)),
        "window_size": window_size,
    }


# The variants of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "l2vit_tiny": _l2vit(96, 6),
    "l2vit_small": _l2vit(96, 18),
    "l2vit_base": _l2vit(128, 18),
    "l2vit_base_384": _l2vit(128, 18, window_size=12),
    # our own, for tests and small images on a CPU: windows of 3 do not divide the maps, which are padded
    "test_l2vit": {
        "embed_dims": (32, 48, 64, 96),
        "depths": (2, 2, 2, 2),
        "num_heads": (2, 3, 4, 6),
        "window_size": 3,
        "mlp_ratio": 2,
    },
}

# Where keys are few or small, as early in training, the sum in the denominator can be close to zero.
DENOMINATOR_MIN = 100.0


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention within windows of tokens (B, H, W, dim), without a position bias.

    The map is padded with zeros at the bottom and the right to whole windows. As in the official code, tokens attend to
    the padding, whose keys and values are the bias of the qkv layer.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo((f"window of {self.window_size} x {self.window_size}",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        s = self.window_size
        windows = pad_tokens(x, (height + s - 1) // s * s, (width + s - 1) // s * s)
        x = window_attention(linear(self.qkv, windows), num_heads=self.num_heads, window_size=s)
        return linear(self.proj, crop_tokens(x, height, width))


@register_notrace_module
class LinearAttention(nn.Module):
    """Linear attention of all tokens (B, H, W, dim) to all, with a ReLU and a learned temperature for each head."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the temperatures."""
        nn.init.constant_(self.temperature, self.head_dim**-0.5)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, linear",), values=self.qkv, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = linear_attention(
            *linear(self.qkv, x).chunk(3, dim=-1),
            num_heads=self.num_heads,
            feature_map="relu",
            eps=0.0,
            denominator_min=DENOMINATOR_MIN,
            temperature=self.temperature.flatten(),
        )
        return linear(self.proj, x)


@register_notrace_module
class LocalConcentration(nn.Module):
    """Depth-wise 7 x 7 convolution, GELU, batch norm, depth-wise 7 x 7 convolution on tokens (B, H, W, dim)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = DepthwiseConv(dim, 7, **dd)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.conv2 = DepthwiseConv(dim, 7, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = depthwise(self.conv1, x, self.act)
        return self.conv2(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class WindowBlock(nn.Module):
    """Attention within windows and MLP on tokens (B, H, W, dim), each after a convolution that encodes positions."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos1 = ResidualConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.pos2 = ResidualConv(dim, 3, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos1(x)
        x = self.pos2(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LinearBlock(nn.Module):
    """Linear attention, local concentration and MLP on tokens (B, H, W, dim), after a convolution of positions."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos1 = ResidualConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.local = LocalConcentration(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class Stem(nn.Module):
    """Two 3 x 3 convolutions with stride 2 and LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        x = convolution(self.conv1, pad_images(x, 4), self.norm1, self.act)
        return self.norm(convolution(self.conv2, x, self.norm2))


@register_notrace_module
class Downsample(nn.Module):
    """LayerNorm, 2 x 2 convolution with stride 2: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(in_dim, eps=1e-5, **dd)
        self.proj = nn.Conv2d(in_dim, dim, 2, 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return convolution(self.proj, pad_images(self.norm(x), 2))


class L2ViT(Backbone):
    """L2ViT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up).

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. The first block of a stage has
            windows, the second one linear attention, and so on in turns.
        window_size: Side of the windows, in tokens.
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
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
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
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio)
        if embed_dims[0] % 2:
            raise ValueError(
                f"Got {embed_dims=}; the channels of the first stage have to be even, since the first convolution has "
                "half of them."
            )
        dd = {"device": device, "dtype": dtype}
        stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks: list[nn.Module] = []
            for j, drop_path in enumerate(drop_path_rates[i]):
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                if j % 2:
                    blocks.append(LinearBlock(dim, LinearAttention(dim, heads, **dd), mlp, drop_path, **dd))
                else:
                    attn = WindowAttention(dim, heads, window_size, **dd)
                    blocks.append(WindowBlock(dim, attn, mlp, drop_path, **dd))
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

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            init_transformer(module)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^downsample_layers\.0\.proj\.proj\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.proj\.proj\.1\.", "stem.norm1."),
    (r"^downsample_layers\.0\.proj\.proj\.3\.", "stem.conv2."),
    (r"^downsample_layers\.0\.proj\.proj\.4\.", "stem.norm2."),
    (r"^downsample_layers\.0\.norm\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.proj\.", ".pos1.conv."),
    (r"\.cpe\.1\.proj\.", ".pos2.conv."),
    (r"\.local_mp\.bn\.", ".local.norm."),
    (r"\.local_mp\.", ".local."),
    (r"^norm([0-3])\.", r"output_norms.\1."),  # of the backbones for dense prediction
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("l2vit", first_conv="stem.conv1")


def _create_l2vit(variant: str, pretrained: bool, **kwargs) -> L2ViT:
    return create(L2ViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs) -> L2ViT:
    """L2ViT-T (28.6 M parameters)."""
    return _create_l2vit("l2vit_tiny", pretrained, **kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs) -> L2ViT:
    """L2ViT-S (50.2 M)."""
    return _create_l2vit("l2vit_small", pretrained, **kwargs)


@register_model
def l2vit_base(pretrained: bool = False, **kwargs) -> L2ViT:
    """L2ViT-B (88.6 M)."""
    return _create_l2vit("l2vit_base", pretrained, **kwargs)


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs) -> L2ViT:
    """L2ViT-B with windows of 12 tokens, for 384 pixels (88.6 M)."""
    return _create_l2vit("l2vit_base_384", pretrained, **kwargs)


@register_model
def test_l2vit(pretrained: bool = False, **kwargs) -> L2ViT:
    """An L2ViT of 0.4 M parameters, for tests and small images."""
    return _create_l2vit("test_l2vit", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The windows of 7 that the official code has for dense prediction; see `zoo.families`."""
    return {"window_size": 7} if variant == "l2vit_base_384" else {}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    near = attended(WindowAttention(tokens.shape[-1], 2, 7), place, tokens)
    linear_attn = LinearAttention(tokens.shape[-1], 2)
    linear_attn.reset_parameters()
    far = tuple(0.45 * keys for keys in attended(linear_attn, place, tokens))
    return [Pattern("L2ViT", ("a window of 7 × 7", "all tokens, linearly"), (*near, *far), (place,))]
