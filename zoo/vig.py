"""ViG and ViG-H: vision gated linear attention (Liao et al., AAAI 2025, https://arxiv.org/abs/2405.18425).

Tokens are visited row by row, forward and backward. Each direction keeps a matrix per head, to which every token adds
its key and value after its gates, one for each channel of the key, have shrunk it; a query reads the mean of both. A
second gate mixes the result with the token itself, after a depth-wise convolution. The cost is linear in the tokens.

Official code, MIT: https://github.com/hustvl/ViG. Written from the paper and facts about that code; the tests compare
outputs of vig_h_t and vig_gla_t. Differences:
- Both directions are computed by one call, on shared queries, keys and values, without reversed copies.
- ViG (not ViG-H) halves the sum of both directions a second time in evaluation. So do we, in training too, where the
  official code halves it once. Only the epsilon of the norm that follows sees the factor.
- ViG's twelve blocks are four stages of three. Features are tokens after a stage, without the final norm.
- `drop_rate` is the dropout before the classifier, as in all of timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attention
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import gated_linear_attention, sizes
from zoo.layers import (
    DepthwiseConv,
    GatedMlp,
    RmsBlock,
    RmsNorm2d,
    TransformerBlock,
    check_images,
    depthwise,
    init_transformer,
    position_map,
    resize_positions,
    stage_rates,
)

__all__ = ["ViG"]


def _isotropic(dim: int, num_heads: int, activations: bool = False) -> dict[str, Any]:
    return {
        "embed_dims": (dim,) * 4,
        "depths": (3, 3, 3, 3),
        "num_heads": (num_heads,) * 4,
        "layout": "isotropic",
        "activations": activations,
    }


# The variants of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "vig_h_t": {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 5, 2), "num_heads": (3, 6, 12, 24)},
    "vig_h_s": {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 17, 2), "num_heads": (3, 6, 12, 24)},
    "vig_h_b": {"embed_dims": (128, 256, 512, 1024), "depths": (2, 2, 17, 2), "num_heads": (4, 8, 16, 32)},
    "vig_gla_t": _isotropic(192, 3, activations=True),
    "vig_gla_s": _isotropic(384, 6),
    "vig_gla_b": _isotropic(768, 12),
    # our own, for tests and small images on a CPU
    "test_vig": {"embed_dims": (16, 32, 48, 64), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)},
}

GATE_RANK = 16  # channels between the two linear layers of the gates
GATE_DIVISOR = 16  # of the logarithms of the gates, which are therefore close to 1 at first


@register_notrace_module
class GatedLinearAttention(nn.Module):
    """Gated linear attention of tokens (B, H, W, dim) to all tokens, in both directions row by row.

    Queries and keys have half as many channels as values. Linear layers with few channels in between compute the gates
    of both directions; the logarithm of a gate is that of a sigmoid, divided by 16.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads.
        weight: Weight of each direction in the sum of both: 0.5 for their mean.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, weight: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.widths = (dim // 2, dim // 2, dim)
        self.scale = weight * (dim // 2 // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.gates_in = nn.Linear(dim, GATE_RANK, bias=False, **dd)
        self.gates_out = nn.Linear(GATE_RANK, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, faded by gates, absolute",), values=self.qkv, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        gates = linear(self.gates_out, linear(self.gates_in, x))
        gates = F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32))) / GATE_DIVISOR
        parts = *linear(self.qkv, x).split(self.widths, -1), *gates.chunk(2, -1)
        heads = (part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for part in parts)  # (B, H W, N, channels)
        out = gated_linear_attention(*heads, scale=self.scale)
        return out.flatten(2).unflatten(1, sizes(x)[1:3])


@register_notrace_module
class TokenMixer(nn.Module):
    """A depth-wise convolution, gated linear attention, and a gated sum of both, on tokens (B, H, W, dim).

    Args:
        dim, num_heads, weight: As for `GatedLinearAttention`.
        activations: Whether a SiLU follows the convolution, and another one the gated sum.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, weight: float, activations: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.dw_conv = DepthwiseConv(dim, 3, bias=False, **dd)
        self.act1 = nn.SiLU() if activations else nn.Identity()
        self.attn = GatedLinearAttention(dim, num_heads, weight, **dd)
        self.global_norm = nn.RMSNorm(dim // num_heads, eps=1e-6, **dd)  # of each head
        self.local_norm = nn.RMSNorm(dim // num_heads, eps=1e-6, **dd)
        self.gate = nn.Linear(dim, dim, **dd)
        self.act2 = nn.SiLU() if activations else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = depthwise(self.dw_conv, x, self.act1)
        far, near = (y.unflatten(-1, (self.num_heads, -1)) for y in (self.attn(x), x))
        far, near = self.global_norm(far).flatten(-2), self.local_norm(near).flatten(-2)
        share = linear(self.gate, x).sigmoid()
        return linear(self.proj, self.act2(near + share * (far - near)))


@register_notrace_module
class Stem(nn.Module):
    """A convolution to half of the channels, LayerNorm, activation, 3 x 3 convolution with stride 2, LayerNorm.

    Both convolutions have one row and column of zeros around the map. (B, C, H, W) -> (B, dim, H', W').
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, act: nn.Module, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, kernel_size, stride, 1, **dd)
        self.norm1 = LayerNorm2d(dim // 2, eps=1e-5, **dd)
        self.act = act
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        x = self.act(self.norm1(convolution(self.conv1, x)))
        return self.norm2(convolution(self.conv2, x))


class PositionStem(Stem):
    """The stem of an isotropic model: patches of 16 pixels, plus a position embedding that is resized to the map."""

    def __init__(self, in_chans: int, dim: int, side: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chans, dim, 9, 8, nn.SiLU(), **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise the embedding."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + position_map(self.pos_embed, sizes(x)[2:])


@register_notrace_module
class Downsample(nn.Module):
    """3 x 3 convolution with stride 2, LayerNorm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolution(self.conv, x))


def isotropic_side(side: int) -> int:
    """The side of the map that the stem of an isotropic model makes of `side` pixels."""
    return ((side - 7) // 8 + 2) // 2


class ViG(Backbone):
    """ViG or ViG-H: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW: of ViG-H at strides 4, 8, 16, 32, with sizes rounded up; of ViG all at stride 16. They have no
    norm.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. Heads have an even number of channels.
        layout: "hierarchical" for ViG-H, or "isotropic" for ViG, with patches of 16 pixels, a position embedding,
            RMSNorm and no downsampling.
        activations: Whether SiLUs follow the depth-wise convolutions and the gated sums, as in vig_gla_t.
        img_size: Side of the square images, in pixels, that the position embedding of an isotropic model is made for;
            or both sides, if they are equal. Images may have any other size.
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
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        layout: str = "hierarchical",
        activations: bool = False,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        arguments.check_choice("layout", layout, ("hierarchical", "isotropic"))
        arguments.check_choice("activations", activations, (True, False))
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        arguments.check_halved(embed_dims)
        if any(dim // heads % 2 for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(
                f"Got {num_heads=} for {embed_dims=}; heads need an even number of channels, since keys have half as "
                "many as values."
            )
        isotropic = layout == "isotropic"
        if isotropic and any(dim != embed_dims[0] for dim in embed_dims):
            raise ValueError(
                f"Got {embed_dims=}; with layout='isotropic', all stages have the same number of channels."
            )
        dd = {"device": device, "dtype": dtype}
        self.isotropic = isotropic
        stem: nn.Module
        if isotropic:
            stem = PositionStem(in_chans, embed_dims[0], isotropic_side(img_size), **dd)
        else:
            stem = Stem(in_chans, embed_dims[0], 3, 2, nn.GELU(), **dd)
        block_cls, weight, multiple = (RmsBlock, 0.25, 256) if isotropic else (TransformerBlock, 0.5, 32)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for drop_path in stage_rates(drop_path_rate, depths)[i]:
                mixer = TokenMixer(dim, heads, weight, activations, **dd)
                mlp = GatedMlp(dim, math.ceil(8 * dim // 3 / multiple) * multiple, **dd)
                blocks.append(block_cls(dim, mixer, mlp, drop_path, **dd))
            downsample = Downsample(embed_dims[i - 1], dim, **dd) if i and not isotropic else None
            stages.append(Stage(blocks, downsample))
        norm = RmsNorm2d(embed_dims[-1], eps=1e-6, **dd) if isotropic else LayerNorm2d(embed_dims[-1], eps=1e-5, **dd)
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            strides=[16] * len(depths) if isotropic else None,
            norm=norm,
            output_norm=output_norm,
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, nn.Linear) and self.isotropic:
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenMixer):
            # After the layers that it contains.
            attn = module.attn
            layers: list[nn.Conv2d | nn.Linear] = [module.dw_conv]
            if self.isotropic:
                layers += [attn.qkv, attn.gates_in, attn.gates_out, module.gate, module.proj]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        else:
            init_transformer(module)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    # ViG-H
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^layers\.{i}\.downsample\.1\.", f"stages.{i + 1}.downsample.conv.") for i in range(3)),
    *((rf"^layers\.{i}\.downsample\.3\.", f"stages.{i + 1}.downsample.norm.") for i in range(3)),
    (r"^outnorm(\d)\.", r"output_norms.\1."),  # of the backbone for dense prediction
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.op\.", ".attn."),
    # ViG: twelve blocks, here four stages of three
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.norm1."),
    (r"^patch_embed\.proj\.3\.", "stem.conv2."),
    (r"^patch_embed\.proj\.4\.", "stem.norm2."),
    (r"^pos_embed$", "stem.pos_embed"),
    *((rf"^blocks\.{i}\.", f"stages.{i // 3}.blocks.{i % 3}.") for i in range(12)),
    (r"\.attn_norm\.", ".norm1."),
    (r"\.mlp_norm\.", ".norm2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    # both
    (r"\.attn\.in_proj\.0\.", ".attn.dw_conv."),
    (r"\.attn\.qkv_proj\.", ".attn.attn.qkv."),
    (r"\.attn\.gk_proj\.0\.", ".attn.attn.gates_in."),
    (r"\.attn\.gk_proj\.1\.", ".attn.attn.gates_out."),
    (r"\.attn\.o_proj\.", ".attn.proj."),
    (r"\.attn\.g_norm\.", ".attn.global_norm."),
    (r"\.attn\.l_norm\.", ".attn.local_norm."),
    (r"\.attn\.g_proj\.", ".attn.gate."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    A position embedding that was made for images of another size is resized.
    """
    name = "stem.pos_embed"
    given = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    want = model.state_dict().get(name)
    if want is not None and name in given and given[name].ndim == 3:
        given[name] = resize_positions(given[name], want.shape[1])
    return checkpoints.convert(given, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs(
    "vig",
    first_conv="stem.conv1",
    exceptions={name: ("stem.conv1", 16) for name, kwargs in VARIANTS.items() if kwargs.get("layout") == "isotropic"},
)


def _create_vig(variant: str, pretrained: bool, **kwargs) -> ViG:
    return create(ViG, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def vig_h_t(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-H-T (28.6 M parameters)."""
    return _create_vig("vig_h_t", pretrained, **kwargs)


@register_model
def vig_h_s(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-H-S (50.1 M)."""
    return _create_vig("vig_h_s", pretrained, **kwargs)


@register_model
def vig_h_b(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-H-B (88.9 M)."""
    return _create_vig("vig_h_b", pretrained, **kwargs)


@register_model
def vig_gla_t(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-T (5.8 M)."""
    return _create_vig("vig_gla_t", pretrained, **kwargs)


@register_model
def vig_gla_s(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-S (22.6 M)."""
    return _create_vig("vig_gla_s", pretrained, **kwargs)


@register_model
def vig_gla_b(pretrained: bool = False, **kwargs) -> ViG:
    """ViG-B (89.0 M)."""
    return _create_vig("vig_gla_b", pretrained, **kwargs)


@register_model
def test_vig(pretrained: bool = False, **kwargs) -> ViG:
    """A ViG-H of 0.3 M parameters, for tests and small images."""
    return _create_vig("test_vig", pretrained, **kwargs)


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map; see `zoo.families`."""
    return isotropic_side(side) if variant.startswith("vig_gla") else -(-side // reduction)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    module = GatedLinearAttention(tokens.shape[-1], 1, 0.5)
    nn.init.ones_(module.qkv.weight)  # queries and keys are equal, so a weight is what the gates leave
    for parameter in module.gates_out.parameters():  # the gates are those of an untrained model
        nn.init.zeros_(parameter)
    weights = attention(module, (torch.ones_like(tokens),), [place])[0, 0]
    return [Pattern("ViG", ("all tokens, row by row,", "faded by gates"), (weights / weights.max(),), (place,))]
