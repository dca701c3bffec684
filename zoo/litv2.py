"""LITv2: a fast vision transformer with HiLo attention (Pan et al., NeurIPS 2022, https://arxiv.org/abs/2205.13213).

HiLo splits attention into high and low frequencies: Hi-Fi heads attend within small windows, Lo-Fi heads attend to
averages of windows. The first two stages have no attention. Between stages, a deformable convolution merges tokens
(Deformable Token Merging of LIT: Pan et al., AAAI 2022, https://arxiv.org/abs/2105.14217).

Official code, Apache-2.0: https://github.com/ziplab/LITv2. Written from the paper and facts about that code; the tests
compare outputs of litv2_small. Differences:
- One class serves classification and dense prediction and takes images of any size, with the padding of the official
  detection code. The official classifier takes one square size, for which the two agree. `window_size=4` is the other
  setting of official detection.
- The merging at the end of an official stage begins the next one here, so that a stage's output is its feature.
- Deformable sampling is torch's `grid_sample` before an ordinary convolution, not torchvision's `deform_conv2d`.
  Outputs are the same up to rounding, it is two to six times as fast on CPUs, and ONNX supports it. Sampling is in
  float32 or float64, as in torchvision; the convolution follows autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, register_notrace_module
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import as_given, sizes, window_attention
from zoo.layers import (
    ConvMlp,
    PatchStem,
    TransformerBlock,
    crop_tokens,
    dot_product_attention,
    pad_tokens,
    stage_rates,
)

__all__ = ["LITv2"]

# The variants of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "litv2_small": {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)},
    "litv2_medium": {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2)},
    "litv2_base": {"embed_dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)},
    # our own, for tests and small images on a CPU: windows of 3 do not divide the map of stage 3, which is padded
    "test_litv2": {
        "embed_dims": (16, 32, 64, 96),
        "depths": (2, 2, 2, 2),
        "head_dim": 16,
        "mlp_ratio": 2,
        "alpha": 0.5,
        "window_size": 3,
    },
}

# Tags of published weights, and their alpha where it differs from the 0.9 of the variants.
TAG_ALPHAS = {
    "in1k_alpha_0": 0.0,
    "in1k_alpha_02": 0.2,
    "in1k_alpha_04": 0.4,
    "in1k_alpha_05": 0.5,
    "in1k_alpha_07": 0.7,
    "in1k_alpha_1": 1.0,
}


@register_notrace_module
class HiFiAttention(nn.Module):
    """Attention within whole windows of tokens: (B, H, W, dim) -> (B, H, W, num_heads * head_dim)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, **dd)
        self.proj = nn.Linear(num_heads * head_dim, num_heads * head_dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo((f"Hi-Fi, window of {self.window_size} x {self.window_size}",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        return linear(
            self.proj, window_attention(linear(self.qkv, x), num_heads=self.num_heads, window_size=self.window_size)
        )


@register_notrace_module
class LoFiAttention(nn.Module):
    """Attention of all tokens to the averages of windows, or to all tokens if windows are single tokens."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, window_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.q = nn.Linear(dim, num_heads * head_dim, **dd)
        self.kv = nn.Linear(dim, 2 * num_heads * head_dim, **dd)
        self.proj = nn.Linear(num_heads * head_dim, num_heads * head_dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        size = self.window_size
        means = f"Lo-Fi, means of {size} x {size}" if size > 1 else "all tokens"
        return AttentionInfo((means,), values=self.kv, key_size=size)

    def forward(self, x: Tensor, windows: Tensor) -> Tensor:
        """Tokens (B, H, W, dim), and the same padded to whole windows, to (B, H, W, num_heads * head_dim)."""
        if self.window_size > 1:
            windows = F.avg_pool2d(windows.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        query = linear(self.q, x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, T, D)
        key, value = (
            linear(self.kv, windows).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        out = dot_product_attention(query, key, value)  # (B, T, N D)
        return linear(self.proj, out.unflatten(1, sizes(x)[1:3]))


@register_notrace_module
class HiLoAttention(nn.Module):
    """Hi-Fi and Lo-Fi attention in parallel, on tokens (B, H, W, dim). The channels of the Hi-Fi heads come first.

    The map is padded with zeros at the bottom and the right to whole windows. As in the official code, Hi-Fi attends to
    the padding, whose keys and values are the bias of the qkv layer, and the averages of Lo-Fi include it as zeros.

    Args:
        dim: Channels.
        head_dim: Channels of a head.
        window_size: Side of the windows, in tokens; 1 for ordinary attention, regardless of `alpha`.
        alpha: Share of Lo-Fi heads; their number is rounded down.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, head_dim: int, window_size: int, alpha: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_heads = dim // head_dim
        low = num_heads if window_size == 1 else int(num_heads * alpha)
        self.window_size = window_size
        self.hifi = HiFiAttention(dim, num_heads - low, head_dim, window_size, **dd) if low < num_heads else None
        self.lofi = LoFiAttention(dim, low, head_dim, window_size, **dd) if low else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        s = self.window_size
        windows = pad_tokens(x, (height + s - 1) // s * s, (width + s - 1) // s * s)
        outputs = []
        if self.hifi is not None:
            outputs.append(crop_tokens(self.hifi(windows), height, width))
        if self.lofi is not None:
            outputs.append(self.lofi(x, windows))
        return torch.cat(outputs, dim=-1)


class MlpBlock(nn.Module):
    """x + MLP(norm(x)), with drop path: the blocks of the first two stages."""

    def __init__(self, dim: int, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


def sample_patches(x: Tensor, offset: Tensor) -> Tensor:
    """The map (B, C, H, W) at the displaced pixels of 2 x 2 patches: (B, C, 2 h, 2 w).

    Args:
        x: The map, interpolated bilinearly, with zeros outside.
        offset: (B, 8, h, w), the displacement of each patch's four pixels. Channel 2 (2 i + j) has the rows, channel
            2 (2 i + j) + 1 the columns, of the pixel in row i and column j.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = sizes(x)[2:]
    batch, (_, _, down, across) = offset.shape[0], sizes(offset)
    offset = offset.to(dtype).unflatten(1, (2, 2, 2)).permute(0, 4, 1, 5, 2, 3)  # (B, h, i, w, j, 2)
    # Flattened first, since torch.export can't prove that symbolic sizes h and 2 combine to 2 h.
    offset = offset.flatten().view(batch, 2 * down, 2 * across, 2)
    rows = offset[..., 0] + torch.arange(2 * down, dtype=dtype, device=x.device)[:, None]
    columns = offset[..., 1] + torch.arange(2 * across, dtype=dtype, device=x.device)
    # Coordinates of grid_sample: the map extends from -1 to 1. Training starts from offsets of zero, where the
    # derivative with respect to a coordinate is discontinuous. As in the official code, it has to be the one towards
    # the right and the bottom, so slightly more is added than rounding can subtract from a coordinate.
    grid = torch.stack(((2 * columns + 1) / width, (2 * rows + 1) / height), dim=-1) - (1 - 4 * torch.finfo(dtype).eps)
    return F.grid_sample(x.to(dtype), grid, align_corners=False)


@register_notrace_module
class DeformableMerging(nn.Module):
    """Deformable 2 x 2 convolution with stride 2, batch norm, GELU: (B, C, H, W) -> (B, dim, H // 2, W // 2).

    The last row or column of an odd side is only read if offsets point to it.
    """

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.offset = nn.Conv2d(in_dim, 8, 2, 2, **dd)
        self.proj = nn.Conv2d(in_dim, dim, 2, 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise all offsets to zero, for an ordinary convolution."""
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        # In bfloat16, offsets of 4 pixels and more would be multiples of 1/32 pixels.
        with as_given(x):
            patches = sample_patches(x, self.offset(x.to(next(self.offset.parameters()).dtype)))
        x = F.gelu(self.norm(self.proj(patches.to(x.dtype))))
        # The tokens of the stage are contiguous as NHWC. vmap supports this form, but not memory formats.
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class LITv2(Backbone):
    """LITv2: images (B, in_chans, H, W) to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32. The first have ceil(H / 4) rows. Every later stage halves the number
    and rounds it down.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths: Channels and blocks of each stage. The first two stages have no attention, the last one has
            ordinary attention, and those between have HiLo.
        head_dim: Channels of an attention head.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels.
        alpha: Share of Lo-Fi heads in HiLo; their number is rounded down.
        window_size: Side of HiLo's windows, in tokens: Hi-Fi attends within them, Lo-Fi to their averages.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        output_norm: Apply a LayerNorm to each feature, for segmentation, or to those of the stages in a list, such as
            (1, 2, 3) for detection. Only without a classifier.
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
        head_dim: int = 32,
        mlp_ratio: float = 4,
        alpha: float = 0.9,
        window_size: int = 2,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool | Sequence[int] = False,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            head_dim=head_dim,
            alpha=alpha,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, mlp_ratio=mlp_ratio)
        if any(dim % head_dim for dim in embed_dims[2:]):
            raise ValueError(
                f"Got {head_dim=} for {embed_dims=}; the channels from the third stage on have to be multiples of it."
            )
        last = len(depths) - 1
        listed: Sequence[Any] = output_norm if arguments.is_list(output_norm) else ()
        if not (isinstance(output_norm, bool) or all(arguments.is_number(i, 0, last) for i in listed or [None])):
            given = arguments.shown(output_norm)
            raise ValueError(f"Got output_norm={given}; it has to be True, False or a list of stages from 0 to {last}.")
        dd = {"device": device, "dtype": dtype}
        stem = PatchStem(in_chans, embed_dims[0], 4, **dd)
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks: list[nn.Module] = []
            for drop_path in drop_path_rates[i]:
                mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                if i < 2:
                    blocks.append(MlpBlock(dim, mlp, drop_path, **dd))
                else:
                    attn = HiLoAttention(dim, head_dim, 1 if i == last else window_size, alpha, **dd)
                    blocks.append(TransformerBlock(dim, attn, mlp, drop_path, **dd))
            stages.append(Stage(blocks, DeformableMerging(embed_dims[i - 1], dim, **dd) if i else None))
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
    (r"^patch_embed\.", "stem."),
    (r"^layers\.0\.downsample\.", "stages.1.downsample."),
    (r"^layers\.1\.downsample\.", "stages.2.downsample."),
    (r"^layers\.2\.downsample\.", "stages.3.downsample."),
    (r"\.dconv\.conv_offset\.", ".offset."),
    (r"\.dconv\.", ".proj."),
    (r"\.norm_layer\.", ".norm."),
    (r"^layers\.([01])\.blocks\.(\d+)\.norm2\.", r"stages.\1.blocks.\2.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.attn\.h_", ".attn.hifi."),
    (r"\.attn\.l_", ".attn.lofi."),
    (r"\.dwconv\.dwconv\.", ".dw_conv."),
    (r"^norm([0-3])\.", r"output_norms.\1."),  # of the detection and segmentation backbones
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    Raises:
        RuntimeError: The checkpoint does not fit. If `alpha` is the reason, the message says which value fits.
    """
    _check_alpha(checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP), model.state_dict())
    return checkpoints.convert(state_dict, model, KEY_MAP)


def _check_alpha(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise RuntimeError if `theirs` splits the same number of channels differently between Hi-Fi and Lo-Fi."""
    attn = "stages.2.blocks.0.attn"
    low, our_low, high, our_high = (
        len(weights.get(f"{attn}.{part}.proj.bias", ())) for part in ("lofi", "hifi") for weights in (theirs, ours)
    )
    if low != our_low and low + high == our_low + our_high:
        share, our_share = low / (low + high), our_low / (our_low + our_high)
        raise RuntimeError(
            f"The checkpoint has {share:.0%} Lo-Fi heads in stage 3, and the model {our_share:.0%}: create it with "
            f"alpha={share:.2f} or a little more."
        )


default_cfgs = checkpoints.default_cfgs("litv2", first_conv="stem.proj")


def _create_litv2(variant: str, pretrained: bool, **kwargs) -> LITv2:
    kwargs = tag_kwargs(kwargs.get("pretrained_cfg")) | kwargs
    return create(LITv2, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-S (27.8 M parameters)."""
    return _create_litv2("litv2_small", pretrained, **kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-M (48.8 M)."""
    return _create_litv2("litv2_medium", pretrained, **kwargs)


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-B (86.5 M)."""
    return _create_litv2("litv2_base", pretrained, **kwargs)


@register_model
def test_litv2(pretrained: bool = False, **kwargs) -> LITv2:
    """A LITv2 of 0.4 M parameters, for tests and small images."""
    return _create_litv2("test_litv2", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The norms of the official code; see `zoo.families`. Segmentation has a norm on every output."""
    return {"output_norm": (1, 2, 3)} if task == "detect" else {}


def tag_kwargs(tag: Any) -> dict[str, Any]:
    """The `alpha` of published weights, if it differs from the variant's; see `zoo.families`."""
    return {"alpha": TAG_ALPHAS[tag]} if isinstance(tag, str) and tag in TAG_ALPHAS else {}


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map; see `zoo.families`. The stem pads to whole patches; merging drops odd rows."""
    return -(-side // 4) * 4 // reduction


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    attn = HiLoAttention(tokens.shape[-1], 16, 2, 0.5)
    near = attended(attn.hifi, place, tokens)
    means = tuple(0.45 * keys for keys in attended(attn.lofi, place, tokens, tokens))
    return [Pattern("LITv2", ("Hi-Fi: a window of 2 × 2", "Lo-Fi: means of 2 × 2"), (*near, *means), (place,))]
