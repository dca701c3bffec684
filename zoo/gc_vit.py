"""GC ViT: Global Context Vision Transformer (Hatamizadeh et al., ICML 2023, https://arxiv.org/abs/2206.09959).

Tokens attend within windows as in Swin, without shifts. In every second block, the windows have their own queries. In
the blocks between them, all windows of an image share a global query, a summary of the whole map.

Official code, https://github.com/NVlabs/GCVit, for research or evaluation only: nothing here comes from it. Written
from the paper and facts about that code; the tests compare outputs. The published weights are CC-BY-NC-SA-4.0: not for
commercial use. Differences:
- Images can have any size, as in the official detection code: maps are padded to whole windows, tokens attend to the
  padding, and a global query of another size than the window is resized (bicubic). The official classification code
  takes 224 x 224 only.
- The tables are resized (bicubic) when weights are loaded for windows of another size; detection uses `window_size=24`.
- The downsampling at the end of an official level begins the next stage here, so that a stage's output is its feature.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear, spatial_mean
from zoo.kernels import sizes, window_attention
from zoo.layers import Mlp, TransformerBlock, check_images, crop_tokens, pad_tokens, stage_rates

__all__ = ["GCViT"]


def _gc_vit(embed_dim: int, depths: tuple[int, ...], mlp_ratio: int, layer_scale: float | None, window: int) -> dict:
    return {
        "embed_dims": tuple(embed_dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": tuple(embed_dim * 2**i // 32 for i in range(4)),
        "mlp_ratio": mlp_ratio,
        "layer_scale": layer_scale,
        "window_size": (window, window, 2 * window, window),
    }


# The official repository's variants; the windows are (w, w, 2 w, w).
VARIANTS: dict[str, dict[str, Any]] = {
    "gc_vit_xxtiny": _gc_vit(64, (2, 2, 6, 2), 3, None, 7),
    "gc_vit_xtiny": _gc_vit(64, (3, 4, 6, 5), 3, None, 7),
    "gc_vit_tiny": _gc_vit(64, (3, 4, 19, 5), 3, None, 7),
    "gc_vit_tiny2": _gc_vit(64, (3, 4, 29, 5), 3, None, 7),
    "gc_vit_small": _gc_vit(96, (3, 4, 19, 5), 2, 1e-5, 7),
    "gc_vit_small2": _gc_vit(96, (3, 4, 23, 5), 3, 1e-5, 7),
    "gc_vit_base": _gc_vit(128, (3, 4, 19, 5), 2, 1e-5, 7),
    "gc_vit_large": _gc_vit(192, (3, 4, 19, 5), 2, 1e-5, 7),
    "gc_vit_large_384": _gc_vit(192, (3, 4, 19, 5), 2, 1e-5, 12),
    "gc_vit_large_512": _gc_vit(192, (3, 4, 19, 5), 2, 1e-5, 16),
    # our own, for tests and small images on a CPU
    "test_gc_vit": {
        "embed_dims": (16, 32, 64, 96),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 6),
        "mlp_ratio": 2,
        "window_size": (4, 4, 4, 2),
    },
}


class SqueezeExcite(nn.Module):
    """x * sigmoid(MLP(mean of x over the map)), NCHW. The activation is GELU, and the layers have no bias."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = max(dim // 4, 1)
        self.fc1 = nn.Linear(dim, hidden, bias=False, **dd)
        self.fc2 = nn.Linear(hidden, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.gelu(self.fc1(spatial_mean(x))))
        return x * gate.sigmoid()[:, :, None, None]


@register_notrace_module
class MBConv(nn.Module):
    """x + 1 x 1 convolution(squeeze-excite(GELU(3 x 3 depth-wise convolution(x)))), NCHW, without norms and biases."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dw_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim, **dd)
        self.pw_conv = nn.Conv2d(dim, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x + convolution(self.pw_conv, self.se(convolution(self.dw_conv, x, act=self.act)))


class Downsample(nn.Module):
    """LayerNorm, MBConv, 3 x 3 convolution with stride 2, LayerNorm: (B, C, H, W) -> (B, dim, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm2d(in_dim, eps=1e-5, **dd)
        self.mbconv = MBConv(in_dim, **dd)
        self.reduction = nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.mbconv(self.norm1(x))))


@register_notrace_module
class Stem(nn.Module):
    """3 x 3 convolution with stride 2, downsampling: (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 3, 2, 1, **dd)
        self.downsample = Downsample(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv)
        return self.downsample(convolution(self.conv, x))


@register_notrace_module
class GlobalQuery(nn.Module):
    """The map of an image, reduced to the queries of one window of w x w: (B, dim, H, W) -> (B, w * w, dim).

    Args:
        dim: Channels.
        window_size: The side w of the window, in tokens.
        num_convs: Number of MBConvs.
        pool: Whether max pooling, 3 x 3 with stride 2, follows each of them.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, window_size: int, num_convs: int, pool: bool, device=None, dtype=None):
        super().__init__()
        self.window_size = window_size
        self.pool = pool
        self.mbconvs = nn.ModuleList(MBConv(dim, device=device, dtype=dtype) for _ in range(num_convs))

    def forward(self, x: Tensor) -> Tensor:
        for mbconv in self.mbconvs:
            x = mbconv(x)
            if self.pool:
                x = F.max_pool2d(x, 3, 2, 1)
        height, width = sizes(x)[2:]
        # If sizes are symbolic in torch.export, the map is always resized. This does not change a map of w x w.
        if not (isinstance(height, int) and isinstance(width, int) and height == width == self.window_size):
            x = F.interpolate(x, size=(self.window_size,) * 2, mode="bicubic", align_corners=False)
        return x.flatten(2).transpose(1, 2)


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention of tokens (B, H, W, dim) in windows, between linear layers, optionally with the image's global query.

    The map is padded with zeros at the bottom and the right to whole windows. As in the official detection code, tokens
    attend to the padding, whose keys and values are the bias of the qkv layer.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, use_global_query: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.use_global_query = use_global_query
        self.qkv = nn.Linear(dim, (2 if use_global_query else 3) * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        trunc_normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        query = ", global query" if self.use_global_query else ""
        return AttentionInfo((f"window of {self.window_size} x {self.window_size}{query}",), values=self.qkv)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Tokens (B, H, W, dim) to tokens. `query` (B, w * w, dim) is ignored without `use_global_query`."""
        _, height, width, _ = sizes(x)
        w = self.window_size
        x = pad_tokens(x, (height + w - 1) // w * w, (width + w - 1) // w * w)
        x = window_attention(
            linear(self.qkv, x),
            num_heads=self.num_heads,
            window_size=w,
            bias_table=self.bias_table,
            bias_sign="query_minus_key",
            q=query if self.use_global_query else None,
        )
        return linear(self.proj, crop_tokens(x, height, width))


class GlobalContextStage(Stage):
    """A stage that computes the global query of its input once and passes it to its blocks, unless `query` is None."""

    def __init__(self, query: GlobalQuery | None, blocks: Sequence[nn.Module], downsample: nn.Module | None = None):
        super().__init__(blocks, downsample)
        self.query = query

    def forward_blocks(self, x: Tensor, *context: Tensor) -> Tensor:
        """Run the blocks, with the global query."""
        if self.query is not None:
            context = (self.query(x.permute(0, 3, 1, 2)), *context)
        return super().forward_blocks(x, *context)


def pooled_stages(window_sizes: Sequence[int]) -> list[bool]:
    """For each stage, whether the maps of its global query are pooled. They are not if one window covers the map.

    This refers to the image size that the windows are made for. At that size, a window of the last stage covers the
    map, and the map of every earlier stage is twice as large as the next: 56, 28, 14 and 7 tokens for windows of 7, 7,
    14 and 7. The rule covers the official cases: the third stage pools in detection (windows of 24 in all stages), and
    does not in classification, at 224, 384 and 512 pixels.
    """
    last = len(window_sizes) - 1
    return [window < window_sizes[-1] * 2 ** (last - i) for i, window in enumerate(window_sizes)]


class GCViT(Backbone):
    """Global Context Vision Transformer: images (B, in_chans, H, W) to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. Every second block is global.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the stage's channels.
        window_size: Side of the windows, in tokens; one number, or one per stage. It also decides whether the global
            query of a stage pools its maps, see `pooled_stages`.
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
        depths: Sequence[int] = (3, 4, 19, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3,
        window_size: int | Sequence[int] = (7, 7, 14, 7),
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
            layer_scale=layer_scale,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio, window_size=window_size
        )
        windows = arguments.as_tuple(window_size, len(depths))
        dd = {"device": device, "dtype": dtype}
        stem = Stem(in_chans, embed_dims[0], **dd)
        drop_path_rates = stage_rates(drop_path_rate, depths)
        pooled = pooled_stages(windows)
        stages = []
        for i, (dim, depth, heads, window) in enumerate(zip(embed_dims, depths, num_heads, windows, strict=True)):
            blocks: list[nn.Module] = []
            for j, drop_path in enumerate(drop_path_rates[i]):
                attn = WindowAttention(dim, heads, window, use_global_query=j % 2 == 1, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, layer_scale, **dd))
            # A stage with a single block, which is local, needs no query.
            query = GlobalQuery(dim, window, max(len(depths) - 1 - i, 1), pooled[i], **dd) if depth > 1 else None
            stages.append(GlobalContextStage(query, blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None))
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
    (r"\.relative_position_index$", None),  # a constant, which window attention computes
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.conv_down\.conv\.", "stem.downsample.mbconv."),
    (r"^patch_embed\.conv_down\.", "stem.downsample."),
    (r"^levels\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^levels\.(\d)\.q_global_gen\.to_q_global\.(\d)\.conv\.", r"stages.\1.query.mbconvs.\2."),
    (r"^levels\.0\.downsample\.", "stages.1.downsample."),
    (r"^levels\.1\.downsample\.", "stages.2.downsample."),
    (r"^levels\.2\.downsample\.", "stages.3.downsample."),
    (r"^(stages\.\d\.downsample)\.conv\.", r"\1.mbconv."),
    # the layers of every MBConv
    (r"\.(mbconv|mbconvs\.\d)\.0\.", r".\1.dw_conv."),
    (r"\.(mbconv|mbconvs\.\d)\.2\.fc\.0\.", r".\1.se.fc1."),
    (r"\.(mbconv|mbconvs\.\d)\.2\.fc\.2\.", r".\1.se.fc2."),
    (r"\.(mbconv|mbconvs\.\d)\.3\.", r".\1.pw_conv."),
    (r"^norm([0-3])\.", r"output_norms.\1."),  # of the detection backbone
    (r"\.relative_position_bias_table$", ".bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("gc_vit", first_conv="stem.conv")


def _create_gc_vit(variant: str, pretrained: bool, **kwargs) -> GCViT:
    weights = checkpoints.published_cfg(variant, kwargs) if pretrained else None
    if weights is not None and weights.license == "cc-by-nc-sa-4.0":
        _warn_of_licence()
    return create(GCViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@cache  # once per process
def _warn_of_licence() -> None:
    warnings.warn("NVIDIA's weights of GC ViT are CC-BY-NC-SA-4.0: not for commercial use.", stacklevel=5)


@register_model
def gc_vit_xxtiny(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-XXTiny (12.0 M parameters)."""
    return _create_gc_vit("gc_vit_xxtiny", pretrained, **kwargs)


@register_model
def gc_vit_xtiny(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-XTiny (20.0 M)."""
    return _create_gc_vit("gc_vit_xtiny", pretrained, **kwargs)


@register_model
def gc_vit_tiny(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Tiny (28.2 M)."""
    return _create_gc_vit("gc_vit_tiny", pretrained, **kwargs)


@register_model
def gc_vit_tiny2(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Tiny2 (34.5 M)."""
    return _create_gc_vit("gc_vit_tiny2", pretrained, **kwargs)


@register_model
def gc_vit_small(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Small (51.1 M)."""
    return _create_gc_vit("gc_vit_small", pretrained, **kwargs)


@register_model
def gc_vit_small2(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Small2 (68.6 M)."""
    return _create_gc_vit("gc_vit_small2", pretrained, **kwargs)


@register_model
def gc_vit_base(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Base (90.3 M)."""
    return _create_gc_vit("gc_vit_base", pretrained, **kwargs)


@register_model
def gc_vit_large(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Large (202.1 M)."""
    return _create_gc_vit("gc_vit_large", pretrained, **kwargs)


@register_model
def gc_vit_large_384(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Large with windows for 384 x 384 pixels (202.9 M)."""
    return _create_gc_vit("gc_vit_large_384", pretrained, **kwargs)


@register_model
def gc_vit_large_512(pretrained: bool = False, **kwargs) -> GCViT:
    """GC ViT-Large with windows for 512 x 512 pixels (203.8 M)."""
    return _create_gc_vit("gc_vit_large_512", pretrained, **kwargs)


@register_model
def test_gc_vit(pretrained: bool = False, **kwargs) -> GCViT:
    """A GC ViT of 0.4 M parameters, for tests and small images."""
    return _create_gc_vit("test_gc_vit", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The windows that the official code uses for detection; see `zoo.families`."""
    return {"window_size": 24} if task == "detect" and variant != "test_gc_vit" else {}


def timm_name(variant: str) -> str | None:
    """The same architecture in timm; see `zoo.families`."""
    size = variant.removeprefix("gc_vit_")
    return f"gcvit_{size}" if size in ("xxtiny", "xtiny", "tiny", "small", "base") else None


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    dim, size = tokens.shape[-1], 7
    window, query = WindowAttention(dim, 2, size, use_global_query=True), GlobalQuery(dim, size, 2, pool=True)
    window.reset_parameters()
    image = tokens.permute(0, 3, 1, 2).detach().requires_grad_()
    queries = query(image)
    own = queries[0, place[0] % size * size + place[1] % size]
    (sources,) = torch.autograd.grad(own.sum(), image)  # the tokens that the query is computed from
    read = 0.45 * (sources[0].abs().sum(0) > 0)
    maps = (*attended(window, place, tokens, queries.detach()), read)
    return [Pattern("GC ViT", ("keys: a window of 7 × 7", "queries: the whole map"), maps, (place,))]
