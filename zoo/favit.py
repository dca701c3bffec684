"""FaViT: Factorization Vision Transformer (Qin et al., TNNLS 2023, https://arxiv.org/abs/2312.08614).

Every token attends to few keys that come from the whole map, in groups of channels. The keys of a global group are
patches. Those of a local group are the 49 places of a window of 7 x 7 tokens, possibly dilated: each is the mean over
all windows of the map.

Official code, without a licence: https://github.com/q2479036243/FaViT. Written from the paper and facts about that
code; the tests compare outputs of favit_b0. Differences:
- The mean over windows pools runs of the numbers of all windows, and so mixes channels; see `LocalAttention`. This is
  how the official code computes it, and not the mean of each channel.
- Images may have any size from 32 pixels up. The official code needs about 97, since it can't reflect a map further
  than to its other side.
- The windows are gathered from the map, which is not padded.
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
from zoo.cpu import convolution, linear
from zoo.kernels import sizes
from zoo.kernels.constants import constant
from zoo.kernels.gather import take
from zoo.layers import (
    ConvMlp,
    DepthwiseConv,
    OverlappingPatches,
    OverlappingStem,
    ResidualConv,
    TransformerBlock,
    dot_product_attention,
    init_by_fan_out,
    stage_rates,
    sym_max,
)

__all__ = ["FaViT"]

# The variants of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "favit_b0": {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 6, 2)},
    "favit_b1": {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2)},
    "favit_b2": {"embed_dims": (64, 128, 256, 512), "depths": (2, 3, 18, 3)},
    "favit_b3": {"embed_dims": (96, 192, 384, 768), "depths": (2, 3, 14, 3)},
    # our own, for tests and small images on a CPU: windows of 3 do not divide the maps, which are reflected
    "test_favit": {
        "embed_dims": (16, 32, 64, 96),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 4),
        "mlp_ratios": (4, 4, 2, 2),
        "window_size": 3,
    },
}


def window_count(height: int, width: int, size: int, dilation: int) -> int:
    """The number of windows of `size` x `size` tokens that cover a map side by side."""
    reach = dilation * (size - 1) + 1
    return ((height + reach - 1) // reach) * ((width + reach - 1) // reach)


def _remainder(x: Tensor, divisor: int) -> Tensor:
    """x % divisor, which ONNX can't compute if the divisor is symbolic."""
    return x - x // divisor * divisor


def window_entries(
    height: int, width: int, num_heads: int, head_dim: int, size: int, dilation: int, device: torch.device
) -> Tensor:
    """The entries of a map (H, W, N, D), as indices of its flat form, that the windows read.

    They are (size * size * N, windows * D): place by place in a window, and head by head, those of the first window,
    which is at the top left, then those of the second one, and so on. A token beyond the end of the map is reflected at
    the last one, and again at the first one if it is beyond that, and so on.
    """
    reach = dilation * (size - 1) + 1
    across = (width + reach - 1) // reach
    # Without a dimension of windows: there may be a single one, which torch.export treats as another case.
    row = torch.arange(size * size * num_heads, device=device)[:, None]
    column = torch.arange(window_count(height, width, size, dilation) * head_dim, device=device)
    place, head, window, channel = row // num_heads, row % num_heads, column // head_dim, column % head_dim
    y, x = (
        last - (_remainder(at, sym_max(2 * last, 1)) - last).abs()
        for last, at in (
            (height - 1, dilation * (place // size) + reach * (window // across)),
            (width - 1, dilation * (place % size) + reach * _remainder(window, across)),
        )
    )
    return ((y * width + x) * num_heads + head) * head_dim + channel


def _below(count: int, limit: int, like: Tensor) -> Tensor:
    """`count` ones and zeros: ones before `limit`."""
    return (torch.arange(count, device=like.device) < limit).to(like.dtype)


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of all tokens to patches of `patch_size` x `patch_size` tokens, with one head.

    A strided convolution makes the patches. It leaves out rows and columns beyond the last whole patch.
    """

    def __init__(self, dim: int, patch_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.patches = nn.Conv2d(dim, dim, patch_size, patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.value_conv = ResidualConv(dim, 3, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        size = self.patch_size
        kind = f"patches of {size} x {size}" if size > 1 else "all tokens"
        return AttentionInfo((kind,), values=self.value_conv, key_size=size)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """The tokens and the queries, both (B, H, W, dim), to (B, H, W, dim)."""
        size, (height, width) = self.patch_size, sizes(x)[1:3]
        real, bias = None, None
        if not (isinstance(height, int) and isinstance(width, int)):
            # If sizes are symbolic, torch.export must know that there is more than one patch. A second row or column of
            # patches may consist of zeros, and no token attends to it.
            tall, wide = sym_max(height, 2 * size), sym_max(width, 2 * size)
            real = _below(tall // size, height // size, x)[:, None] * _below(wide // size, width // size, x)
            bias = torch.where(real.flatten() > 0, 0.0, -torch.inf).to(x.dtype)[None, None, None]
            x = F.pad(x, (0, 0, 0, wide - width, 0, tall - height))
        patches = convolution(self.patches, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        key, value = linear(self.kv, self.norm(patches)).chunk(2, dim=-1)
        value = self.value_conv(value if real is None else value * real[..., None])
        query, key, value = (y.flatten(1, 2)[:, None] for y in (query, key, value))
        return dot_product_attention(query, key, value, bias=bias).unflatten(1, (height, width))


@register_notrace_module
class LocalAttention(nn.Module):
    """Attention of all tokens to the places of a window, each of which is a mean over all windows of the map.

    At each place, the D channels of a head stand in a row, those of the first window, then those of the second one, and
    so on. The D means are those of equal runs of this row, each with as many entries as there are windows. So a mean is
    not that of a channel, and the number of windows decides what it mixes.

    Args:
        num_heads: Number of heads, which share their linear layers.
        head_dim: Channels of a head, D.
        window_size: Side of the windows, in tokens.
        dilation: Distance between the tokens of a window.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, dilation: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.window_size = window_size
        self.dilation = dilation
        self.fc = nn.Linear(head_dim, head_dim, **dd)
        self.kv = nn.Linear(head_dim, 2 * head_dim, **dd)
        self.value_conv = ResidualConv(num_heads * head_dim, 3, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        size = self.window_size
        kind = f"windows of {size} x {size}" + (f", dilated by {self.dilation}" if self.dilation > 1 else "")
        return AttentionInfo((kind,), values=self.value_conv, spread=self.spread)

    def spread(self, weights: Tensor, size: tuple[int, int]) -> Tensor:
        """Weights of the places of a window (..., h, w) as weights of the tokens of a map (..., H, W)."""
        tokens = window_entries(*size, 1, 1, self.window_size, self.dilation, weights.device)
        shares = weights.new_zeros(len(tokens), size[0] * size[1])
        shares.scatter_add_(1, tokens, torch.full_like(tokens, 1 / tokens.shape[1], dtype=weights.dtype))
        return (weights.flatten(-2) @ shares).unflatten(-1, size)

    def pooled(self, x: Tensor) -> Tensor:
        """The map (B, H, W, N D) to the means over its windows, (B, h w N, D)."""
        batch, (_, height, width, _) = x.shape[0], sizes(x)
        heads, dim, options = self.num_heads, self.head_dim, (self.window_size, self.dilation)
        windows = window_count(height, width, *options)
        if isinstance(windows, int):
            rows = constant(window_entries, height, width, heads, 1, *options, like=x)
            x = take(x.unflatten(-1, (heads, dim)).flatten(1, 3), 1, rows.flatten())
            return x.view(batch, self.window_size**2 * heads, dim, windows).mean(-1)
        # The same for symbolic sizes; see `window_entries`.
        x = x.flatten(1)[:, window_entries(height, width, heads, dim, *options, x.device)]
        runs = torch.arange(windows * dim, device=x.device)[:, None] // windows
        return x @ ((runs == torch.arange(dim, device=x.device)).to(x.dtype) / windows)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """The map of keys (B, H, W, N D) and the queries (B, H, W, N, D) to (B, H, W, N D)."""
        size, heads, dim = self.window_size, self.num_heads, self.head_dim
        key, value = linear(self.kv, linear(self.fc, self.pooled(x))).unflatten(1, (size * size, heads)).chunk(2, -1)
        value = self.value_conv(value.unflatten(1, (size, size)).flatten(3)).flatten(1, 2).unflatten(-1, (heads, dim))
        query, key, value = (y.transpose(1, 2) for y in (query.flatten(1, 2), key, value))
        return dot_product_attention(query, key, value).unflatten(1, sizes(x)[1:3])


@register_notrace_module
class FactorizedAttention(nn.Module):
    """Global attention and local attention in groups of channels, between linear layers, on tokens (B, H, W, dim).

    Args:
        dim: Channels. The global group has an eighth of them.
        num_heads: Heads of each local group.
        sr_ratio: Side of the patches of the global group. Above 1, there are two local groups, and the windows of the
            second one are dilated by this number; otherwise there is one.
        window_size: Side of the windows of the local groups, in tokens.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dilations = (1, sr_ratio) if sr_ratio > 1 else (1,)
        self.num_heads = num_heads
        self.global_dim, self.local_dim = dim // 8, dim - dim // 8
        self.head_dim = self.local_dim // len(dilations) // num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.global_group = GlobalAttention(self.global_dim, sr_ratio, **dd)
        self.dw_conv = DepthwiseConv(self.local_dim, 3, **dd)
        self.pw_conv = nn.Conv2d(self.local_dim, self.local_dim, 1, **dd)
        self.local_groups = nn.ModuleList(
            LocalAttention(num_heads, self.head_dim, window_size, dilation, **dd) for dilation in dilations
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        widths = self.global_dim, self.local_dim
        (coarse, fine), (query, queries) = x.split(widths, -1), linear(self.q, x).split(widths, -1)
        outputs = [self.global_group(coarse, query)]
        maps = convolution(self.pw_conv, self.dw_conv(fine).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # The channels of the keys are divided into groups, and those of a group into heads; with queries it is the
        # other way round.
        queries = queries.unflatten(-1, (self.num_heads, -1)).split(self.head_dim, -1)
        maps = maps.split(self.num_heads * self.head_dim, -1)
        outputs += [group(*given) for group, *given in zip(self.local_groups, maps, queries, strict=True)]
        return linear(self.proj, torch.cat(outputs, -1))


class FaViT(Backbone):
    """FaViT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up), each after its stage's LayerNorm.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths: Channels and blocks of each stage.
        num_heads: Heads of each stage's local groups.
        mlp_ratios: Hidden channels of each stage's MLPs, as multiples of `embed_dims`.
        sr_ratios: Side of the patches that each stage's global group attends to, and dilation of its second local
            group; 1 for a stage with one local group.
        window_size: Side of the windows, in tokens.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        norm_eps: Epsilon of the LayerNorms of blocks and stages.
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
        depths: Sequence[int] = (2, 3, 18, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 7,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            window_size=window_size,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
        )
        stages_of = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
        arguments.check_stages(**stages_of, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        most = [max(8 >> i, 1) for i in range(len(embed_dims))]
        if any(ratio > limit for ratio, limit in zip(sr_ratios, most, strict=True)):
            raise ValueError(
                f"Got {sr_ratios=}; they are at most {tuple(most)}, so that a patch fits in the maps of an image of 32 "
                "pixels."
            )
        for dim, heads, ratio in zip(embed_dims, num_heads, sr_ratios, strict=True):
            groups = 2 if ratio > 1 else 1
            if dim % 8 or (dim - dim // 8) % (groups * heads):
                raise ValueError(
                    f"Got {num_heads=} and {sr_ratios=} for {embed_dims=}; channels have to be a multiple of 8, and "
                    "those of a local group (seven eighths, or half of that if the sr_ratio is above 1) a multiple of "
                    "its heads."
                )
        dd = {"device": device, "dtype": dtype}
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stem = OverlappingStem(in_chans, embed_dims[0], **dd)
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = [
                TransformerBlock(
                    dim,
                    FactorizedAttention(dim, num_heads[i], sr_ratios[i], window_size, **dd),
                    ConvMlp(dim, int(dim * mlp_ratios[i]), proj_drop_rate, **dd),
                    drop_path,
                    norm_eps=norm_eps,
                    **dd,
                )
                for drop_path in drop_path_rates[i]
            ]
            downsample = OverlappingPatches(embed_dims[i - 1], dim, kernel_size=3, stride=2, **dd) if i else None
            stages.append(Stage(blocks, downsample, LayerNorm2d(dim, eps=norm_eps, **dd)))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        init_by_fan_out(module)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed2\.", "stages.1.downsample."),
    (r"^patch_embed3\.", "stages.2.downsample."),
    (r"^patch_embed4\.", "stages.3.downsample."),
    (r"^block1\.", "stages.0.blocks."),
    (r"^block2\.", "stages.1.blocks."),
    (r"^block3\.", "stages.2.blocks."),
    (r"^block4\.", "stages.3.blocks."),
    (r"^norm1\.", "stages.0.norm."),
    (r"^norm2\.", "stages.1.norm."),
    (r"^norm3\.", "stages.2.norm."),
    (r"^norm4\.", "stages.3.norm."),
    (r"\.attn\.sr\.", ".attn.global_group.patches."),
    (r"\.attn\.norm\.", ".attn.global_group.norm."),
    (r"\.attn\.kv_g\.", ".attn.global_group.kv."),
    (r"\.attn\.local_conv_g\.", ".attn.global_group.value_conv.conv."),
    (r"\.attn\.kv_l\.depth_conv\.", ".attn.dw_conv."),
    (r"\.attn\.kv_l\.point_conv\.", ".attn.pw_conv."),
    (r"\.attn\.fcs\.(\d)\.", r".attn.local_groups.\1.fc."),
    (r"\.attn\.single_heads\.(\d)\.", r".attn.local_groups.\1.kv."),
    (r"\.attn\.local_convs\.(\d)\.", r".attn.local_groups.\1.value_conv.conv."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dw_conv."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("favit", first_conv="stem.proj")


def _create_favit(variant: str, pretrained: bool, **kwargs) -> FaViT:
    return create(FaViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def favit_b0(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B0 (3.4 M parameters)."""
    return _create_favit("favit_b0", pretrained, **kwargs)


@register_model
def favit_b1(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B1 (13.0 M)."""
    return _create_favit("favit_b1", pretrained, **kwargs)


@register_model
def favit_b2(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B2 (24.9 M)."""
    return _create_favit("favit_b2", pretrained, **kwargs)


@register_model
def favit_b3(pretrained: bool = False, **kwargs) -> FaViT:
    """FaViT-B3 (48.7 M)."""
    return _create_favit("favit_b3", pretrained, **kwargs)


@register_model
def test_favit(pretrained: bool = False, **kwargs) -> FaViT:
    """A FaViT of 0.4 M parameters, for tests and small images."""
    return _create_favit("test_favit", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    dim = tokens.shape[-1] // 2
    keys, query = tokens.split(dim, -1)
    local = attended(LocalAttention(2, dim // 2, 7, 4), place, keys, query.unflatten(-1, (2, -1)))
    patches = tuple(0.45 * weights for weights in attended(GlobalAttention(dim, 4), place, keys, query))
    return [Pattern("FaViT", ("windows, dilated", "patches of 4 × 4"), (*local, *patches), (place,))]
