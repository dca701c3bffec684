"""RAVLT and MAViT: vision transformers with rank-augmented (RALA) and magnitude-aware (MALA) linear attention.

Fan et al., CVPR 2025, https://arxiv.org/abs/2411.07635, and Fan et al., ICCV 2025, https://arxiv.org/abs/2507.00698.
Both papers use one network. Its first two stages have linear attention, whose cost grows linearly with the number of
tokens: RALA weights the keys by their products with the mean query, so that the sum of keys times values has a higher
rank. MALA's weights depend on the magnitude of the query, as those of a softmax do. The last two stages have ordinary
attention. In all stages, queries and keys are rotated by their row and column, and a gate multiplies the output.

Official code, without a licence: https://github.com/qhfan/RALA, https://github.com/qhfan/MALA. Written from the papers
and facts about that code; the tests compare outputs of ravlt_t and mavit_t. Differences:
- The downsampling at the end of an official stage begins the next one here, so that a stage's output is its feature.
- The angles of the rotation are computed, and those in official checkpoints are ignored.
- Tokens are channels-last; 1 x 1 convolutions are linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attention
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import linear_attention, rotate_2d, sizes
from zoo.layers import (
    DepthwiseConv,
    HeadConv,
    ResidualConvMlp,
    dot_product_attention,
    rope_frequencies,
    stage_rates,
)
from zoo.rmt import Block, Downsample, Stem

__all__ = ["RAVLT"]


def _network(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], **settings) -> dict[str, Any]:
    return {"embed_dims": dims, "depths": depths, "num_heads": heads, **settings}


_T = _network((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8))
_S = _network((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8))
_B = _network((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), layer_scale_init=(1, 1, 1e-6, 1e-6))
_L = _network((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), layer_scale_init=(1e-6,) * 4)
_TEST = _network((16, 32, 48, 64), (2, 2, 2, 2), (1, 2, 3, 4), mlp_ratio=2, head_width=128)

# The variants of the official code. Both papers have the same networks, except for linear attention and `head_width`.
VARIANTS: dict[str, dict[str, Any]] = {
    "ravlt_t": _T,
    "ravlt_s": _S,
    "ravlt_b": _B,
    "ravlt_l": _L,
    "mavit_t": {**_T, "linear_attn": "mala", "head_width": 2048},
    "mavit_s": {**_S, "linear_attn": "mala", "head_width": 2048},
    "mavit_b": {**_B, "linear_attn": "mala", "head_width": 2048},
    "mavit_l": {**_L, "linear_attn": "mala", "head_width": 2560},
    # our own, for tests and small images on a CPU
    "test_ravlt": _TEST,
    "test_mavit": {**_TEST, "linear_attn": "mala"},
}

# The options of `zoo.kernels.linear_attention` for the two kinds.
LINEAR_ATTENTION: dict[str, dict[str, Any]] = {"rala": {"key_weights": "softmax"}, "mala": {"normalization": "offset"}}


class GatedAttention(nn.Module):
    """Attention of all tokens (B, H, W, dim) to all, plus LePE of the values, times a gate, between linear layers.

    The gate is linear in the tokens, without an activation. Queries and keys are rotated: a pair of channels turns by
    an angle that is proportional to the token's row (in the first half of a head) or column (in the second half).
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.rope = rope_frequencies(dim // num_heads)
        self.qkvo = nn.Linear(dim, 4 * dim, **dd)  # o is the gate
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        query, key, value, gate = linear(self.qkvo, x).chunk(4, dim=-1)
        return linear(self.proj, (self.attend(query, key, value) + self.lepe(value)) * gate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention between queries, keys and values (B, H, W, dim): (B, H, W, dim)."""
        raise NotImplementedError


@register_notrace_module
class LinearAttention(GatedAttention):
    """Gated attention without a softmax: of the kind "rala" or "mala"."""

    def __init__(self, dim: int, num_heads: int, kind: str, device=None, dtype=None):
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        self.kind = kind

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo((f"all tokens, {self.kind.upper()}, absolute",), values=self.qkvo, gated=True, signed=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention between queries, keys and values (B, H, W, dim): (B, H, W, dim)."""
        options = LINEAR_ATTENTION[self.kind]
        return linear_attention(query, key, value, num_heads=self.num_heads, rope=self.rope, **options)


@register_notrace_module
class SoftmaxAttention(GatedAttention):
    """Gated attention with a softmax."""

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkvo, gated=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention between queries, keys and values (B, H, W, dim): (B, H, W, dim)."""
        query, key = (rotate_2d(x, self.rope, num_heads=self.num_heads) for x in (query, key))
        heads = (x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        return dot_product_attention(*heads).unflatten(1, sizes(value)[1:3])


class RAVLT(Backbone):
    """RAVLT or MAViT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up. They have no norm. `norm` is the convolution
    before pooling, with batch norm and SiLU; its output has `head_width` channels.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. Heads have a multiple of 4 channels.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels; one for all stages or for each.
        linear_attn: The linear attention of the first two stages: "rala" as in RAVLT, or "mala" as in MAViT.
        layer_scale_init: Initial factors of the residual branches, one for each stage.
        head_width: Channels of the convolution before pooling.
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
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float | Sequence[float] = 3.5,
        linear_attn: str = "rala",
        layer_scale_init: Sequence[float] = (1, 1, 1, 1),
        head_width: int = 1024,
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
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_choice("linear_attn", linear_attn, tuple(LINEAR_ATTENTION))
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            layer_scale_init=layer_scale_init,
        )
        if any(dim // heads % 4 for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(
                f"Got {num_heads=} for {embed_dims=}; heads need a multiple of 4 channels, pairs for rows and columns."
            )
        if not arguments.is_number(head_width, 1, 2**14):
            shown = arguments.shown(head_width)
            raise ValueError(f"Got head_width={shown}; it has to be a whole number from 1 to {2**14:,}.")
        dd = {"device": device, "dtype": dtype}
        drop_path_rates = stage_rates(drop_path_rate, depths)
        mlp_ratios = arguments.as_tuple(mlp_ratio, len(depths))
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for drop_path in drop_path_rates[i]:
                attn: nn.Module
                attn = LinearAttention(dim, heads, linear_attn, **dd) if i < 2 else SoftmaxAttention(dim, heads, **dd)
                mlp = ResidualConvMlp(dim, int(dim * mlp_ratios[i]), **dd)
                blocks.append(Block(dim, attn, mlp, drop_path, layer_scale_init[i], **dd))
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            Stem(in_chans, embed_dims[0], strides=(2, 1, 1, 2), **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=HeadConv(embed_dims[-1], head_width, **dd),
            num_features=head_width,
            output_norm=output_norm,
            output_norm_eps=1e-6,
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
    (r"\.RoPE\.angle$", None),  # the frequencies of the rotation, which are computed
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.norm1."),
    (r"^patch_embed\.proj\.3\.", "stem.conv2."),
    (r"^patch_embed\.proj\.4\.", "stem.norm2."),
    (r"^patch_embed\.proj\.6\.", "stem.conv3."),
    (r"^patch_embed\.proj\.7\.", "stem.norm3."),
    (r"^patch_embed\.proj\.9\.", "stem.conv4."),
    (r"^patch_embed\.proj\.10\.", "stem.norm4."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.0\.downsample\.", "stages.1.downsample."),
    (r"^layers\.1\.downsample\.", "stages.2.downsample."),
    (r"^layers\.2\.downsample\.", "stages.3.downsample."),
    (r"^proj\.", "norm.proj."),
    (r"^norm\.(?!proj\.|norm\.)", "norm.norm."),
    (r"^extra_norms\.(\d)\.norm\.", r"output_norms.\1."),  # of the detection and segmentation backbones
    (r"\.pos\.", ".pos_embed."),
    (r"\.(norm[12])\.norm\.", r".\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.ffn\.", ".mlp."),
    (r"\.dwconv\.", ".dw_conv."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("ravlt", "stem.conv1", ("test_ravlt", "test_mavit"))


def _create_ravlt(variant: str, pretrained: bool, **kwargs) -> RAVLT:
    return create(RAVLT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def ravlt_t(pretrained: bool = False, **kwargs) -> RAVLT:
    """RAVLT-T (14.9 M parameters)."""
    return _create_ravlt("ravlt_t", pretrained, **kwargs)


@register_model
def ravlt_s(pretrained: bool = False, **kwargs) -> RAVLT:
    """RAVLT-S (25.6 M)."""
    return _create_ravlt("ravlt_s", pretrained, **kwargs)


@register_model
def ravlt_b(pretrained: bool = False, **kwargs) -> RAVLT:
    """RAVLT-B (48.2 M)."""
    return _create_ravlt("ravlt_b", pretrained, **kwargs)


@register_model
def ravlt_l(pretrained: bool = False, **kwargs) -> RAVLT:
    """RAVLT-L (95.2 M)."""
    return _create_ravlt("ravlt_l", pretrained, **kwargs)


@register_model
def mavit_t(pretrained: bool = False, **kwargs) -> RAVLT:
    """MAViT-T (16.4 M)."""
    return _create_ravlt("mavit_t", pretrained, **kwargs)


@register_model
def mavit_s(pretrained: bool = False, **kwargs) -> RAVLT:
    """MAViT-S (27.1 M)."""
    return _create_ravlt("mavit_s", pretrained, **kwargs)


@register_model
def mavit_b(pretrained: bool = False, **kwargs) -> RAVLT:
    """MAViT-B (49.8 M)."""
    return _create_ravlt("mavit_b", pretrained, **kwargs)


@register_model
def mavit_l(pretrained: bool = False, **kwargs) -> RAVLT:
    """MAViT-L (97.8 M)."""
    return _create_ravlt("mavit_l", pretrained, **kwargs)


@register_model
def test_ravlt(pretrained: bool = False, **kwargs) -> RAVLT:
    """A RAVLT of 0.3 M parameters, for tests and small images."""
    return _create_ravlt("test_ravlt", pretrained, **kwargs)


@register_model
def test_mavit(pretrained: bool = False, **kwargs) -> RAVLT:
    """A MAViT of 0.3 M parameters, for tests and small images."""
    return _create_ravlt("test_mavit", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    panels = []
    for title, kind, lines in (
        ("RAVLT", "rala", ("all tokens, near ones", "with larger weights")),
        ("MAViT", "mala", ("near tokens; far ones", "have negative weights")),
    ):
        attn = LinearAttention(tokens.shape[-1], 1, kind)
        # Equal queries and keys, so that only their rotation makes the weights. Shown relative to the largest one.
        nn.init.zeros_(attn.qkvo.weight)
        nn.init.zeros_(attn.qkvo.bias)
        weights = attention(attn, (tokens,), [place])[0, 0].clamp(min=0)
        panels.append(Pattern(title, lines, (weights / weights.max(),), (place,)))
    return panels
