"""Flowformer: attention as a flow from keys to queries (Wu et al., ICML 2022, https://arxiv.org/abs/2202.06258).

All tokens attend to all tokens at a linear cost. Values flow from the keys to the queries, and what leaves a key and
what reaches a query is conserved: keys compete for the queries, and a query's share depends on what reaches it. The
vision model has four stages, patches of 4 x 4 pixels, 12 heads in every stage and a position embedding.

Official code, MIT: https://github.com/thuml/Flowformer. Written from the paper and facts about that code; the tests
compare outputs of flowformer. Differences:
- Images may have any size from 32 pixels up. The official model takes square images of the size that it is built for.
  Here, images and odd maps are padded with zeros at the bottom and the right, and the position embedding is resized.
- `drop_path_rate` applies; the official model has 0.2, whatever the command line says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import flow_attention, sizes
from zoo.layers import Mlp, TransformerBlock, check_images, pad_images, position_map, resize_positions, stage_rates

__all__ = ["Flowformer"]

# The network of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "flowformer": {"embed_dims": (96, 192, 384, 768), "depths": (3, 3, 10, 3), "num_heads": (12, 12, 12, 12)},
    # our own, for tests and small images on a CPU
    "test_flowformer": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "num_heads": (4, 4, 4, 4),
        "mlp_ratio": 2,
        "layer_scale": 1.0,
        "img_size": 64,
    },
}


@register_notrace_module
class FlowAttention(nn.Module):
    """Flow attention of all tokens (B, H, W, dim) to all, between linear layers."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, by flows",), values=self.qkv, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        query, key, value = linear(self.qkv, x).chunk(3, -1)
        return linear(self.proj, flow_attention(query, key, value, num_heads=self.num_heads))


class Block(TransformerBlock):
    """A transformer block with layer scale in the branch of the MLP only."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        super().__init__(dim, FlowAttention(dim, num_heads, **dd), mlp, drop_path, layer_scale, norm_eps=1e-6, **dd)
        self.ls1 = nn.Identity()


@register_notrace_module
class Patches(nn.Module):
    """Patches of `size` x `size` pixels or tokens, without a norm. The map is padded at the bottom and the right."""

    def __init__(self, in_dim: int, dim: int, size: int, device=None, dtype=None):
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(in_dim, dim, size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, dim, ceil(H / size), ceil(W / size))."""
        return convolution(self.proj, pad_images(x, self.size))


@register_notrace_module
class Stem(Patches):
    """Patches of 4 x 4 pixels, plus a position embedding that is resized to the map: (B, C, H, W) -> (B, dim, h, w).

    Attributes:
        pos_embed: (1, N, dim), for the tokens of a square map, row by row.
    """

    def __init__(self, in_chans: int, dim: int, side: int, device=None, dtype=None):
        super().__init__(in_chans, dim, 4, device=device, dtype=dtype)
        self.pos_embed = nn.Parameter(self.proj.weight.new_empty(1, side**2, dim))

    def reset_parameters(self) -> None:
        """Initialise the embedding."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.proj)
        x = super().forward(x)
        return x + position_map(self.pos_embed, sizes(x)[2:])


class Flowformer(Backbone):
    """Flowformer: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up: the residual stream after each stage, without a
    norm.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the channels: one number, or one per stage.
        layer_scale: Initial factors of the MLPs' branches; None for no factors.
        img_size: Side of the square images, in pixels, that the position embedding is made for; or both sides, if they
            are equal. Images may have any other size: the embedding is resized to their maps in every call (bicubic).
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
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (12, 12, 12, 12),
        mlp_ratio: float | Sequence[float] = 4.0,
        layer_scale: float | None = 1e-5,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            layer_scale=layer_scale,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio)
        dd = {"device": device, "dtype": dtype}
        ratios = arguments.as_tuple(mlp_ratio, len(depths))
        stages = []
        for i, rates in enumerate(stage_rates(drop_path_rate, depths)):
            blocks = [Block(embed_dims[i], num_heads[i], ratios[i], rate, layer_scale, **dd) for rate in rates]
            stages.append(Stage(blocks, Patches(embed_dims[i - 1], embed_dims[i], 2, **dd) if i else None))
        super().__init__(
            Stem(in_chans, embed_dims[0], -(-img_size // 4), **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=LayerNorm2d(embed_dims[-1], eps=1e-6, **dd),
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embedding."""
        return {"stem.pos_embed"}


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^pos_embed$", "stem.pos_embed"),
    (r"^patch_embed\.0\.", "stem."),
    (r"^patch_embed\.([1-3])\.", r"stages.\1.downsample."),
    (r"^blocks\.(\d)\.(\d+)\.gamma$", r"stages.\1.blocks.\2.ls2.gamma"),
    (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    A position embedding that was made for images of another size is resized (bicubic).
    """
    name = "stem.pos_embed"
    given = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    if name in given and given[name].ndim == 3:
        given[name] = resize_positions(given[name], model.state_dict()[name].shape[1])
    return checkpoints.convert(given, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("flowformer", first_conv="stem.proj")


def _create_flowformer(variant: str, pretrained: bool, **kwargs) -> Flowformer:
    return create(Flowformer, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def flowformer(pretrained: bool = False, **kwargs) -> Flowformer:
    """Flowformer (43.3 M parameters)."""
    return _create_flowformer("flowformer", pretrained, **kwargs)


@register_model
def test_flowformer(pretrained: bool = False, **kwargs) -> Flowformer:
    """A Flowformer of 0.2 M parameters, for tests and small images."""
    return _create_flowformer("test_flowformer", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    keys = attended(FlowAttention(tokens.shape[-1], 2), place, tokens)
    return [Pattern("Flowformer", ("all tokens, which", "compete to be read"), (0.45 * keys[0],), (place,))]
