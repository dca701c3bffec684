"""MOAT: Alternating Mobile Convolution and Attention (Yang et al., ICLR 2023, https://arxiv.org/abs/2210.01820).

A MOAT block is an inverted-residual convolution (MBConv), then attention. The convolution comes before the attention
and takes the place of its MLP; it also does the downsampling. The first two stages consist of MBConvs alone. Attention
is global, at strides 16 and 32.

Official code, Apache-2.0: https://github.com/google-research/deeplab2 (TensorFlow). Written from the paper and the
facts of that code; the tests compare outputs of moat_tiny0. Differences:
- Images can have any size. An official model is built for one size. Its relative-position tables are resized to the map
  then (bilinear), here at each call.
- Query, key and value are one linear layer.
- The official code refuses maps that a `window_size` does not divide. Here they are padded at the bottom and the right,
  and no token attends to the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, register_notrace_module
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import certain, sizes, window_attention
from zoo.key_maps import resize_table
from zoo.layers import crop_tokens, mask_padding, pad_tokens
from zoo.mbconv import HalfPool2d, MBConv, SamePool2d, Stem

__all__ = ["MOAT"]

# Table 1 of the paper, and its table of the tiny models. The last part of a name is the side of the training images if
# it is not 224, or 256 for the tiny models.
SHALLOW, MIDDLE, DEEP = (2, 3, 7, 2), (2, 6, 14, 2), (2, 12, 28, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "moat_tiny0": {"embed_dims": (32, 64, 128, 256), "depths": SHALLOW, "stem_dim": 32},
    "moat_tiny1": {"embed_dims": (40, 80, 160, 320), "depths": SHALLOW, "stem_dim": 40},
    "moat_tiny2": {"embed_dims": (56, 112, 224, 448), "depths": SHALLOW, "stem_dim": 56},
    "moat_tiny3": {"embed_dims": (80, 160, 320, 640), "depths": SHALLOW, "stem_dim": 80},
    "moat_0": {"embed_dims": (96, 192, 384, 768), "depths": SHALLOW, "stem_dim": 64},
    "moat_1": {"embed_dims": (96, 192, 384, 768), "depths": MIDDLE, "stem_dim": 64},
    "moat_2_384": {"embed_dims": (128, 256, 512, 1024), "depths": MIDDLE, "stem_dim": 128},
    "moat_3_512": {"embed_dims": (160, 320, 640, 1280), "depths": DEEP, "stem_dim": 160},
    "moat_4_512": {"embed_dims": (256, 512, 1024, 2048), "depths": DEEP, "stem_dim": 256},
    # our own, for tests and small images on a CPU
    "test_moat": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "stem_dim": 16,
        "head_dim": 16,
        "norm_momentum": 0.1,
    },
}

# The map that the table of a stage is made for: that of an image of 224 pixels, whatever the image.
TABLE_SIDES = (56, 28, 14, 7)


@register_notrace_module
class Attention(nn.Module):
    """Attention of all tokens of a map (B, H, W, dim) to all of them, or within windows, between linear layers.

    A map that the window does not divide is padded at the bottom and the right. No token attends to the padding.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads.
        window_size: Tokens of a window along each axis; None for a single window, the map.
        table_side: Side of the map that the relative-position table is made for; None for no table. For windows of
            another size, the table is resized (bilinear).
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int] | None = None,
        table_side: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        side = 2 * table_side - 1 if table_side else 0
        self.bias_table = nn.Parameter(torch.empty(num_heads, side, side, **dd)) if table_side else None
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        if self.bias_table is not None:
            nn.init.normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        what = "the whole map" if self.window_size is None else "block of {} x {}".format(*self.window_size)
        return AttentionInfo((what,), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        size = sizes(x)[1:3]
        window = self.window_size or (size[0], size[1])
        qkv, key_mask = linear(self.qkv, x), None
        if self.window_size is not None:
            padded = [(n + side - 1) // side * side for n, side in zip(size, window, strict=True)]
            if not (certain(padded[0] == size[0]) and certain(padded[1] == size[1])):
                qkv, key_mask = pad_tokens(qkv, *padded), mask_padding(x, *padded)
        out = window_attention(
            qkv,
            num_heads=self.num_heads,
            window_size=window,
            bias_table=self._resized_table(window),
            bias_sign="key_minus_query",
            key_mask=key_mask,
        )
        return linear(self.proj, out if key_mask is None else crop_tokens(out, *size))

    def _resized_table(self, window: tuple[int, int]) -> Tensor | None:
        """The table of a window (h, w): (num_heads, 2 h - 1, 2 w - 1)."""
        if self.bias_table is None:
            return None
        size = (2 * window[0] - 1, 2 * window[1] - 1)
        have = sizes(self.bias_table)[1:]
        if certain(size[0] == have[0]) and certain(size[1] == have[1]):
            return self.bias_table
        return resize_table(self.bias_table, size, "bilinear")


class Block(nn.Module):
    """MBConv, then attention after LayerNorm, on tokens: (B, H, W, C) -> (B, ceil(H/s), ceil(W/s), dim)."""

    def __init__(self, conv: MBConv, attn: Attention, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.drop_path(self.attn(self.norm(x)))


class MOAT(Backbone):
    """MOAT: images (B, in_chans, H, W) to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up: the plain outputs of the stages, or their GELU.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths: Channels and blocks of each of the four stages.
        stem_dim: Channels of the stem.
        head_dim: Channels of an attention head.
        window_size: Attention within windows of so many tokens along each axis, for rows and columns alike or as a
            pair, in the last two stages; None for attention to the whole map. A list has one of these for each of the
            two stages.
        global_last: Whether the last block of a stage attends to the whole map anyway.
        position_bias: Whether there are relative-position tables. Each weight has two official releases, with and
            without tables.
        pool_size: Side of the pooling in the shortcut of strided blocks: 2, or 3 in the official code for dense
            prediction.
        output_act: Whether `forward_intermediates` returns the GELU of each feature, which the official decoders read.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth. Both branches of block b of N have this rate times b / N.
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
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = SHALLOW,
        stem_dim: int = 64,
        head_dim: int = 32,
        window_size: int | Sequence[int | tuple[int, int] | None] | None = None,
        global_last: bool = False,
        position_bias: bool = True,
        pool_size: int = 2,
        output_act: bool = False,
        drop_rate: float = 0.0,
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
            drop_path_rate=drop_path_rate,
            norm_momentum=norm_momentum,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths)
        if len(embed_dims) != 4:
            raise ValueError(f"Got {embed_dims=}; give the channels of four stages, of which the last two attend.")
        if any(dim % head_dim for dim in embed_dims[2:]):
            raise ValueError(
                f"Got {head_dim=} for {embed_dims=}; the channels of stages 3 and 4 have to be a multiple."
            )
        arguments.check_choice("pool_size", pool_size, (2, 3))
        for name, value in (
            ("global_last", global_last),
            ("position_bias", position_bias),
            ("output_act", output_act),
        ):
            arguments.check_choice(name, value, (True, False))
        windows = (None, None, *_windows(window_size))
        dd = {"device": device, "dtype": dtype}
        norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=norm_momentum)
        pool: Callable[[], nn.Module] = HalfPool2d if pool_size == 2 else SamePool2d
        dims, total_depth = (stem_dim, *embed_dims), sum(depths)
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            attends = i >= 2
            for j in range(depth):
                in_dim, stride = (dim, 1) if j else (dims[i], 2)
                drop_path = drop_path_rate * (sum(depths[:i]) + j) / total_depth
                conv = MBConv(in_dim, dim, stride, drop_path, se=not attends, pool=pool, norm_layer=norm_layer, **dd)
                if attends:
                    window = None if global_last and j == depth - 1 else windows[i]
                    attn = Attention(dim, dim // head_dim, window, TABLE_SIDES[i] if position_bias else None, **dd)
                    blocks.append(Block(conv, attn, dim, drop_path, **dd))
                else:
                    blocks.append(conv)
            stages.append(Stage(blocks))
        super().__init__(
            Stem(in_chans, stem_dim, norm_layer=norm_layer, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            pre_logits=nn.LayerNorm(embed_dims[-1], eps=1e-5, **dd),
        )
        self.output_act = nn.GELU() if output_act else nn.Identity()

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
        """The relative-position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in `Backbone`, with the activation of each feature if `output_act`."""
        found = super().forward_intermediates(x, *args, **kwargs)
        if isinstance(found, tuple):
            return found[0], [self.output_act(feature) for feature in found[1]]
        return [self.output_act(feature) for feature in found]


def _windows(window_size: Any) -> list[tuple[int, int] | None]:
    """The windows of the two stages that attend, from the argument of that name."""
    listed = list(window_size) if arguments.is_list(window_size) else [window_size] * 2
    if len(listed) != 2:
        given = arguments.shown(window_size)
        raise ValueError(f"Got window_size={given}; give one size, or a list with one for each of the last two stages.")
    windows: list[tuple[int, int] | None] = []
    for size in listed:
        sides = None if size is None else arguments.as_tuple(size, 2)
        if sides is not None and len(sides) != 2:
            raise ValueError(f"Got a window of {arguments.shown(size)}; give one number for rows and columns, or two.")
        for side in sides or ():
            arguments.check(window_size=side)
        windows.append(None if sides is None else (sides[0], sides[1]))
    return windows


# Official names as zoo.tensorflow_files.to_torch gives them -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^moat\.(stem\.)?", ""),
    (r"^conv_0\.", "stem.conv1."),
    (r"^norm_0\.", "stem.norm."),
    (r"^conv_1\.", "stem.conv2."),
    (r"^block_0([01])_0?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^block_0([23])_0?(\d+)\.(?!attention)", r"stages.\1.blocks.\2.conv."),
    (r"^block_0([23])_0?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.pre_norm\.", ".norm."),
    (r"\.expand_conv\.", ".expand."),
    (r"\.expand_norm\.", ".norm1."),
    (r"\.depthwise_conv\.", ".dw_conv."),
    (r"\.depthwise_norm\.", ".norm2."),
    (r"\.se\.reduce_conv2d\.", ".se.fc1."),
    (r"\.se\.expand_conv2d\.", ".se.fc2."),
    (r"\.shrink_conv\.", ".reduce."),
    (r"\.shortcut_conv\.", ".shortcut."),
    (r"\.attention_norm\.", ".norm."),
    (r"\.attention\.q\.", ".attn.qkv[0]."),
    (r"\.attention\.k\.", ".attn.qkv[1]."),
    (r"\.attention\.v\.", ".attn.qkv[2]."),
    (r"\.attention\.o\.", ".attn.proj."),
    (r"\.attention\.relative_position_embedding$", ".attn.bias_table"),
    (r"^final_layer_norm\.", "pre_logits."),
    (r"^logits_head\.", "head."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP, resize="bilinear")


default_cfgs = checkpoints.default_cfgs("moat", first_conv="stem.conv1")


def _create_moat(variant: str, pretrained: bool, **kwargs) -> MOAT:
    kwargs = tag_kwargs(kwargs.get("pretrained_cfg")) | kwargs
    return create(MOAT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def moat_tiny0(pretrained: bool = False, **kwargs) -> MOAT:
    """tiny-MOAT-0, for 256 pixels (3.4 M parameters)."""
    return _create_moat("moat_tiny0", pretrained, **kwargs)


@register_model
def moat_tiny1(pretrained: bool = False, **kwargs) -> MOAT:
    """tiny-MOAT-1, for 256 pixels (5.1 M)."""
    return _create_moat("moat_tiny1", pretrained, **kwargs)


@register_model
def moat_tiny2(pretrained: bool = False, **kwargs) -> MOAT:
    """tiny-MOAT-2, for 256 pixels (9.8 M)."""
    return _create_moat("moat_tiny2", pretrained, **kwargs)


@register_model
def moat_tiny3(pretrained: bool = False, **kwargs) -> MOAT:
    """tiny-MOAT-3, for 256 pixels (19.5 M)."""
    return _create_moat("moat_tiny3", pretrained, **kwargs)


@register_model
def moat_0(pretrained: bool = False, **kwargs) -> MOAT:
    """MOAT-0 (27.8 M)."""
    return _create_moat("moat_0", pretrained, **kwargs)


@register_model
def moat_1(pretrained: bool = False, **kwargs) -> MOAT:
    """MOAT-1 (41.6 M)."""
    return _create_moat("moat_1", pretrained, **kwargs)


@register_model
def moat_2_384(pretrained: bool = False, **kwargs) -> MOAT:
    """MOAT-2, for 384 pixels (73.4 M)."""
    return _create_moat("moat_2_384", pretrained, **kwargs)


@register_model
def moat_3_512(pretrained: bool = False, **kwargs) -> MOAT:
    """MOAT-3, for 512 pixels (190.0 M)."""
    return _create_moat("moat_3_512", pretrained, **kwargs)


@register_model
def moat_4_512(pretrained: bool = False, **kwargs) -> MOAT:
    """MOAT-4, for 512 pixels (483.2 M)."""
    return _create_moat("moat_4_512", pretrained, **kwargs)


@register_model
def test_moat(pretrained: bool = False, **kwargs) -> MOAT:
    """A MOAT of 0.3 M parameters, for tests and small images."""
    return _create_moat("test_moat", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The pooling and the activation of the features that the official code has for dense tasks; see `zoo.families`."""
    return {} if variant == "test_moat" else {"pool_size": 3, "output_act": True}


def tag_kwargs(tag: Any) -> dict[str, Any]:
    """The weights of tags that end in "_no_bias" have no relative-position tables; see `zoo.families`."""
    return {"position_bias": False} if isinstance(tag, str) and tag.endswith("_no_bias") else {}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    module = Attention(tokens.shape[-1], 2, table_side=14)
    module.reset_parameters()
    return [Pattern("MOAT", ("the whole map, after a", "3 × 3 convolution"), attended(module, place, tokens), (place,))]
