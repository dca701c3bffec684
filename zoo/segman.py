"""SegMAN's encoder: local attention, then scans of the map (Fu et al., CVPR 2025, https://arxiv.org/abs/2412.11890).

A pyramid for segmentation. A block attends to the neighbourhood of each token; in the first three stages, a state space
model then scans the output along rows and columns, in both directions, so that each token also depends on all others.
In the last stage, attention of all tokens to all takes the place of the scans.

Official code, Apache-2.0: https://github.com/yunxiangfu2001/SegMAN. Written from the paper and facts about that code;
the tests compare outputs of segman_encoder_t. Differences:
- Only the encoder is here. For segmentation, it serves the heads of MMSegmentation.
- Images of any size from 32 pixels up. On maps smaller than a window, tokens attend to all tokens along that axis. The
  table of the last stage is resized (bicubic), as in the official code for segmentation.
- The angles of the rotation are computed, and those in official checkpoints are ignored.
- Tokens are channels-last; 1 x 1 convolutions are linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import certain, neighborhood_attention, rotate_2d, selective_scan, sizes
from zoo.layers import (
    DepthwiseConv,
    HeadConv,
    ResidualConvMlp,
    crop_tokens,
    dot_product_attention,
    mask_padding,
    pad_tokens,
    plus_depthwise,
    rope_frequencies,
    stage_rates,
    sym_max,
)
from zoo.rmt import Stem

__all__ = ["SegMAN"]

# The variants of the official code: SegMANEncoder_t, _s, _b and _l.
VARIANTS: dict[str, dict[str, Any]] = {
    "segman_encoder_t": {
        "embed_dims": (32, 64, 144, 192),
        "depths": (2, 2, 4, 2),
        "num_heads": (1, 2, 4, 8),
        "window_size": (11, 9, 9, 7),
        "mlp_ratio": (4, 4, 3, 3),
    },
    "segman_encoder_s": {
        "embed_dims": (64, 144, 288, 512),
        "depths": (2, 2, 10, 4),
        "num_heads": (2, 4, 8, 16),
        "window_size": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3.4, 3.4),
    },
    "segman_encoder_b": {
        "embed_dims": (96, 160, 364, 560),
        "depths": (4, 4, 18, 4),
        "num_heads": (4, 8, 13, 20),
        "window_size": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3, 3),
        "layer_scale": 1e-6,
    },
    "segman_encoder_l": {
        "embed_dims": (96, 192, 432, 640),
        "depths": (4, 4, 28, 4),
        "num_heads": (4, 8, 12, 20),
        "window_size": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3, 3),
        "layer_scale": 1e-6,
    },
    # our own, for tests and small images on a CPU
    "test_segman": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 3, 4),
        "window_size": (5, 5, 3, 3),
        "mlp_ratio": (2, 2, 2, 2),
        "table_grid": 2,
        "head_width": 128,
    },
}

# The order of the scans, by which their weights are stored.
DIRECTIONS: tuple[Literal["rows", "columns", "rows_reversed", "columns_reversed"], ...]
DIRECTIONS = ("rows", "columns", "rows_reversed", "columns_reversed")


class Scan(nn.Module):
    """The sum of four scans of a map by a state space model (selective scan, one state per channel).

    The input is (B, H, W, dim). It passes a depth-wise convolution, batch norm and SiLU; the sum passes a LayerNorm. In
    each direction, the state decays from token to token by a factor that depends on the token, and the token is added
    to it.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        count, self.rank = len(DIRECTIONS), math.ceil(dim / 16)
        self.dw_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.SiLU()
        # For each direction, `rank` channels that become the step sizes, then B and C.
        self.x_proj = nn.Linear(dim, count * (self.rank + 2), bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(count, dim, self.rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(count, dim, **dd))
        # In these forms, timm's optimizers apply weight decay to A_log but not to D, as the official code does.
        self.A_log = nn.Parameter(torch.empty(count * dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(count * dim, **dd))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)

    def reset_parameters(self) -> None:
        """Initialise the state space model: step sizes from 0.001 to 0.1, a decay of exp(-step), D = 1."""
        bound = self.x_proj.in_features**-0.5
        nn.init.uniform_(self.x_proj.weight, -bound, bound)
        nn.init.uniform_(self.dt_weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
            step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = convolution(self.dw_conv, x.permute(0, 3, 1, 2), self.norm1, self.act).permute(0, 2, 3, 1)
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        projected = linear(self.x_proj, x).unflatten(-1, (len(DIRECTIONS), -1))
        steps, inputs, outputs = projected.split((self.rank, 1, 1), dim=-1)
        out = selective_scan(
            x,
            torch.einsum("bhwkr,kcr->bhwkc", steps, self.dt_weight),
            -self.A_log.to(dtype).exp().unflatten(0, (len(DIRECTIONS), -1)),
            inputs,
            outputs,
            self.D.unflatten(0, (len(DIRECTIONS), -1)),
            delta_bias=self.dt_bias,
            delta_softplus=True,
            directions=DIRECTIONS,
        )
        return self.norm2(out)


class TokenMixer(nn.Module):
    """Neighborhood attention, then a global step, plus LePE of the values, between linear layers.

    Queries and keys are rotated: a pair of channels turns by an angle that is proportional to the token's row (in the
    first half of a head) or column (in the second half).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.rope = rope_frequencies(dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        nn.init.zeros_(self.bias_table)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        query, key, value = linear(self.qkv, x).chunk(3, dim=-1)
        query, key = (rotate_2d(x, self.rope, num_heads=self.num_heads) for x in (query, key))
        out = self.attend_globally(query, key, self.attend_locally(query, key, value))
        return linear(self.proj, out + self.lepe(value))

    def attend_locally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each token to its neighbourhood: rotated queries and keys, values (B, H, W, dim)."""
        _, height, width, _ = sizes(query)
        qkv, side, key_mask = torch.cat((query, key, value), dim=-1), self.window_size, None
        # Along an axis with fewer tokens than the window, all tokens are neighbours.
        if not (certain(height >= side) and certain(width >= side)):
            qkv = pad_tokens(qkv, sym_max(height, side), sym_max(width, side))
            key_mask = mask_padding(query, *sizes(qkv)[1:3])
        out = neighborhood_attention(
            qkv, num_heads=self.num_heads, kernel_size=side, bias_table=self.bias_table, key_mask=key_mask
        )
        return out if key_mask is None else crop_tokens(out, height, width)

    def attend_globally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix the output (B, H, W, dim) of `attend_locally` over the whole map."""
        raise NotImplementedError


@register_notrace_module
class ScanMixer(TokenMixer):
    """Neighborhood attention, to whose output its scans are added."""

    def __init__(self, dim: int, num_heads: int, window_size: int, device=None, dtype=None):
        super().__init__(dim, num_heads, window_size, device=device, dtype=dtype)
        self.scan = Scan(dim, device=device, dtype=dtype)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to, without the scans; see `zoo.attention_maps`."""
        side = self.window_size
        return AttentionInfo((f"{side} x {side} neighbours",), values=self.qkv, silent=("lepe.", "scan.norm2."))

    def attend_globally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add the scans of the output (B, H, W, dim) of `attend_locally`."""
        return value + self.scan(value)


@register_notrace_module
class GlobalMixer(TokenMixer):
    """Neighborhood attention, then attention of all tokens to its outputs, with the same queries and keys.

    The second attention has a table with one number for each pair of tokens of a map of `table_grid` x `table_grid`.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, table_grid: int, device=None, dtype=None):
        super().__init__(dim, num_heads, window_size, device=device, dtype=dtype)
        tokens = table_grid**2
        self.global_bias_table = nn.Parameter(torch.empty(num_heads, tokens, tokens, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise the tables."""
        super().reset_parameters()
        nn.init.zeros_(self.global_bias_table)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, by way of their neighbours",), values=self.qkv)

    def attend_globally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of all tokens to the output (B, H, W, dim) of `attend_locally`."""
        _, height, width, _ = sizes(query)
        query, key, value = (
            x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        # Pairs of tokens are resized as if they were pixels, as in the official code.
        bias = checkpoints.resize_table(self.global_bias_table, (height * width, height * width))[None]
        return dot_product_attention(query, key, value, bias=bias.to(query.dtype)).unflatten(1, (height, width))


@register_notrace_module
class LayerScale(nn.Module):
    """A factor and an offset for each channel of tokens (..., dim).

    The factors are (dim, 1), so that timm's optimizers apply weight decay to them, as the official code does to the
    1 x 1 convolution in their place.
    """

    def __init__(self, dim: int, init: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, 1, **dd))
        self.bias = nn.Parameter(torch.empty(dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise the factors and offsets."""
        nn.init.constant_(self.weight, self.init)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flatten() + self.bias


@register_notrace_module
class Block(nn.Module):
    """Token mixer and MLP, each after LayerNorm, and before each a residual convolution that encodes positions."""

    def __init__(
        self,
        dim: int,
        mixer: TokenMixer,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.cpe2 = DepthwiseConv(dim, 3, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = plus_depthwise(self.cpe1, x)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        x = plus_depthwise(self.cpe2, x)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


@register_notrace_module
class Downsample(nn.Module):
    """3 x 3 convolution with stride 2, batch norm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return convolution(self.reduction, x, self.norm)


class SegMAN(Backbone):
    """SegMAN's encoder: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up: the plain outputs of the stages. `norm` is the
    convolution before pooling, with batch norm and SiLU; its output has `head_width` channels.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. Heads have a multiple of 4 channels.
        window_size: Neighbours of a token along each axis, an odd number; one for all stages or for each.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels; one for all stages or for each.
        layer_scale: Initial factor of the residual branches; None for no layer scale.
        table_grid: Side, in tokens, of the maps for which the last stage has a table; 7 for images of 224 pixels. For
            other maps, the table is resized.
        head_width: Channels of the convolution before pooling.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 144, 192),
        depths: Sequence[int] = (2, 2, 4, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        window_size: int | Sequence[int] = (11, 9, 9, 7),
        mlp_ratio: float | Sequence[float] = (4, 4, 3, 3),
        layer_scale: float | None = None,
        table_grid: int = 7,
        head_width: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            layer_scale=layer_scale,
            table_grid=table_grid,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        arguments.check_stages(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, window_size=window_size, mlp_ratio=mlp_ratio
        )
        arguments.check_halved(embed_dims)
        window_sizes = arguments.as_tuple(window_size, len(depths))
        if any(side % 2 == 0 for side in window_sizes):
            raise ValueError(f"Got {window_size=}; windows have to be odd, so that their token is in the middle.")
        if any(dim // heads % 4 for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(
                f"Got {num_heads=} for {embed_dims=}; heads need a multiple of 4 channels, pairs for rows and columns."
            )
        if not arguments.is_number(head_width, 1, 2**14):
            shown = arguments.shown(head_width)
            raise ValueError(f"Got head_width={shown}; it has to be a whole number from 1 to {2**14:,}.")
        dd = {"device": device, "dtype": dtype}
        mlp_ratios = arguments.as_tuple(mlp_ratio, len(depths))
        stages = []
        for i, rates in enumerate(stage_rates(drop_path_rate, depths)):
            dim, last = embed_dims[i], i == len(depths) - 1
            blocks = []
            for rate in rates:
                window = dim, num_heads[i], window_sizes[i]
                mixer = GlobalMixer(*window, table_grid, **dd) if last else ScanMixer(*window, **dd)
                mlp = ResidualConvMlp(dim, int(dim * mlp_ratios[i]), **dd)
                blocks.append(Block(dim, mixer, mlp, rate, layer_scale, **dd))
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            Stem(in_chans, embed_dims[0], bias=False, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=HeadConv(embed_dims[-1], head_width, **dd),
            num_features=head_width,
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super().init_module(module)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"\.rope\.angle$", None),  # the frequencies of the rotation, which are computed
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm1."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^patch_embed\.4\.", "stem.norm2."),
    (r"^patch_embed\.6\.", "stem.conv3."),
    (r"^patch_embed\.7\.", "stem.norm3."),
    (r"^patch_embed\.9\.", "stem.conv4."),
    (r"^patch_embed\.10\.", "stem.norm4."),
    (r"^layers\.0\.blocks\.", "stages.0.blocks."),
    (r"^layers\.1\.0\.", "stages.1.downsample.reduction."),
    (r"^layers\.1\.1\.", "stages.1.downsample.norm."),
    (r"^layers\.2\.blocks\.", "stages.1.blocks."),
    (r"^layers\.3\.0\.", "stages.2.downsample.reduction."),
    (r"^layers\.3\.1\.", "stages.2.downsample.norm."),
    (r"^layers\.4\.blocks\.", "stages.2.blocks."),
    (r"^layers\.5\.0\.", "stages.3.downsample.reduction."),
    (r"^layers\.5\.1\.", "stages.3.downsample.norm."),
    (r"^layers\.6\.blocks\.", "stages.3.blocks."),
    (r"^classifier\.0\.", "norm.proj."),
    (r"^classifier\.1\.", "norm.norm."),
    (r"^classifier\.4\.", "head."),
    (r"\.layer_scale([12])\.", r".ls\1."),
    (r"\.token_mixer\.dwconv\.0\.", ".mixer.scan.dw_conv."),
    (r"\.token_mixer\.dwconv\.1\.", ".mixer.scan.norm1."),
    (r"\.token_mixer\.norm\.", ".mixer.scan.norm2."),
    (r"\.token_mixer\.ssm\.x_proj_weight$", ".mixer.scan.x_proj.weight"),
    (r"\.token_mixer\.ssm\.dt_projs_(weight|bias)$", r".mixer.scan.dt_\1"),
    (r"\.token_mixer\.ssm\.A_logs$", ".mixer.scan.A_log"),
    (r"\.token_mixer\.ssm\.Ds$", ".mixer.scan.D"),
    (r"\.token_mixer\.rpb\.0$", ".mixer.bias_table"),
    (r"\.token_mixer\.rpb\.1$", ".mixer.global_bias_table"),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.mlp\.dwconv\.", ".mlp.dw_conv."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    The files of official segmentors have neither a classifier nor the convolution before it. A model without a
    classifier keeps its own convolution then, which its features don't depend on.
    """
    tensors = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    if model.num_classes == 0 and not any(key.startswith(("norm.", "head.")) for key in tensors):
        tensors |= {key: value for key, value in model.state_dict().items() if key.startswith("norm.")}
    return checkpoints.convert(tensors, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("segman", first_conv="stem.conv1")


def _create_segman(variant: str, pretrained: bool, **kwargs) -> SegMAN:
    return create(SegMAN, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def segman_encoder_t(pretrained: bool = False, **kwargs) -> SegMAN:
    """SegMAN's encoder T (3.5 M parameters)."""
    return _create_segman("segman_encoder_t", pretrained, **kwargs)


@register_model
def segman_encoder_s(pretrained: bool = False, **kwargs) -> SegMAN:
    """SegMAN's encoder S (25.5 M)."""
    return _create_segman("segman_encoder_s", pretrained, **kwargs)


@register_model
def segman_encoder_b(pretrained: bool = False, **kwargs) -> SegMAN:
    """SegMAN's encoder B (45.0 M)."""
    return _create_segman("segman_encoder_b", pretrained, **kwargs)


@register_model
def segman_encoder_l(pretrained: bool = False, **kwargs) -> SegMAN:
    """SegMAN's encoder L (81.0 M)."""
    return _create_segman("segman_encoder_l", pretrained, **kwargs)


@register_model
def test_segman(pretrained: bool = False, **kwargs) -> SegMAN:
    """A SegMAN encoder of 0.3 M parameters, for tests and small images."""
    return _create_segman("test_segman", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    _, height, width, dim = tokens.shape
    attn = ScanMixer(dim, 2, 11)
    attn.reset_parameters()
    attn.scan.reset_parameters()
    (near,) = attended(attn, place, tokens)
    # What the scans of a single channel bring to the token, with a decay of exp(-0.3) from token to token.
    shape, x = (1, height, width, len(DIRECTIONS), 1), torch.zeros(1, height, width, 1, requires_grad=True)
    step, one, decay = torch.full(shape, 0.3), torch.ones(shape), -torch.ones(len(DIRECTIONS), 1, 1)
    with torch.enable_grad():
        out = selective_scan(x, step, decay, one, one, directions=DIRECTIONS)
        weights = torch.autograd.grad(out[0, place[0], place[1], 0], x)[0][0, :, :, 0]
    lines = ("11 × 11 tokens, then", "scans in 4 directions")
    weights = torch.where(weights > 0.01 * weights.max(), weights / weights.max(), 0)
    return [Pattern("SegMAN", lines, (near, weights), (place,))]
