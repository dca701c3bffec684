"""Agent Attention in three pyramids: PVT, Swin and CSWin (Han et al., ECCV 2024, https://arxiv.org/abs/2312.08874).

The queries of a map are averaged over a small grid: the agents. The agents attend to all tokens, and every token
attends to the agents. Both are softmax attention, and the cost is linear in the number of tokens. Learned biases and a
depth-wise convolution of the values tell positions apart.

- Agent-PVT has agent attention in all blocks.
- Agent-Swin has it in the first stages, and Swin's shifted windows in the others.
- Agent-CSWin has it in the first stages, and CSWin's stripes in the others.

Official code, without a licence: https://github.com/LeapLabTHU/Agent-Attention. Nothing here comes from it: this file
is written from the paper and facts about the code, and the tests compare outputs of three models. Differences:
- Images can have any size, as in the official code for detection, whose rules hold here for classification too: the
  biases are interpolated over the map and over the grid of agents, Swin's maps are padded with zeros to whole windows,
  and PVT's convolutions drop what is left over at the bottom and the right. PVT's position embedding is interpolated
  for every other map; the official code takes any map with as many tokens for the usual one.
- Agent-CSWin has no official code for detection. It pads stripes as CSWin's segmentation code does.
- The official `agent_pvt_b` is `agent_pvt_l` here, the name in the README.
- The downsampling at the end of an official stage begins the next one here, so that a stage's output is its feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import linear
from zoo.kernels import sizes, window_attention
from zoo.kernels.constants import constant
from zoo.layers import (
    DepthwiseConv,
    Mlp,
    PatchStem,
    TransformerBlock,
    check_images,
    crop_tokens,
    dot_product_attention,
    pad_tokens,
    pool_to_bins,
    stage_rates,
)
from zoo.stripes import ConvDownsample, ConvStem, CrossShapedAttention, GlobalAttention

__all__ = ["AgentCSWin", "AgentPVT", "AgentSwin"]


def _pvt(depths: tuple[int, ...], img_size: int = 224) -> dict:
    return {"depths": depths, "img_size": img_size}


def _swin(
    dim: int,
    depths: tuple[int, ...],
    heads: int,
    agent_depths: tuple[int, ...],
    img_size: int = 224,
    window_size: int = 7,
) -> dict:
    return {
        "embed_dims": tuple(dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "agent_depths": agent_depths,
        "img_size": img_size,
        "window_size": window_size,
    }


def _cswin(dim: int, depths: tuple[int, ...], heads: int, img_size: int = 224, split_size: int = 7) -> dict:
    return {
        "embed_dims": tuple(dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "agent_depths": (*depths[:2], 0, 0),
        "img_size": img_size,
        "split_size": split_size,
    }


# The official configurations.
VARIANTS: dict[str, dict[str, Any]] = {
    "agent_pvt_t": _pvt((2, 2, 2, 2)),
    "agent_pvt_s": _pvt((3, 4, 6, 3)),
    "agent_pvt_m": _pvt((3, 4, 18, 3)),
    "agent_pvt_m_256": _pvt((3, 4, 18, 3), 256),
    "agent_pvt_l": _pvt((3, 8, 27, 3)),
    "agent_swin_t": _swin(96, (2, 2, 6, 2), 3, (2, 2, 6, 0)),
    "agent_swin_s": _swin(96, (2, 2, 18, 2), 3, (2, 2, 0, 0)),
    "agent_swin_s_288": _swin(96, (2, 2, 18, 2), 3, (2, 2, 0, 0), 288, 9),
    "agent_swin_b": _swin(128, (2, 2, 18, 2), 4, (2, 2, 2, 0)),
    "agent_swin_b_384": _swin(128, (2, 2, 18, 2), 4, (2, 2, 2, 0), 384, 12),
    "agent_cswin_t": _cswin(64, (2, 4, 18, 1), 2),
    "agent_cswin_s": _cswin(64, (3, 6, 29, 2), 2),
    "agent_cswin_b": _cswin(96, (3, 6, 29, 2), 4),
    "agent_cswin_b_384": _cswin(96, (3, 6, 29, 2), 4, 384, 12),
    # our own, for tests and small images on a CPU: the maps of 64 pixels are 16, 8, 4 and 2 tokens wide, so that the
    # windows of stage 3 are shifted and padded
    "test_agent": {
        "embed_dims": (16, 32, 64, 96),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 6),
        "agent_depths": (2, 1, 0, 0),
        "agent_grid": (3, 2, 2, 2),
        "table_grid": (3, 2, 2, 2),
        "img_size": 64,
        "window_size": 3,
    },
}


def interpolation(size: int, source: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights (size, source) of linear interpolation along an axis, as of F.interpolate without `align_corners`."""
    place = torch.arange(size, device=device, dtype=torch.promote_types(dtype, torch.float32))
    place = ((place + 0.5) * source / size - 0.5).clamp(0, source - 1)
    return (1 - (place[:, None] - torch.arange(source, device=device)).abs()).clamp(min=0).to(dtype)


def resize_map(table: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), bilinear; a side of 1 has one value for all places and stays."""
    batch, channels, rows, columns = sizes(table)
    # Batches of matrices, since torch.export has to prove that other products can be computed by one.
    x, count = table.flatten(0, 1), batch * channels
    if rows != 1:
        x = constant(interpolation, height, rows, x.dtype, like=x).expand(count, -1, -1) @ x
    if columns != 1:
        x = x @ constant(interpolation, width, columns, x.dtype, like=x).mT.expand(count, -1, -1)
    return x.unflatten(0, (batch, channels))


@register_notrace_module
class AgentAttention(nn.Module):
    """Attention of tokens (B, H, W, dim) to agents, which attend to all tokens, plus LePE, between linear layers.

    With agents a, the means of the queries over a grid: out = softmax(q a^T / sqrt(d) + b2) softmax(a k^T / sqrt(d) +
    b1) v, for each head of d channels. LePE, a 3 x 3 depth-wise convolution of the values, is added to it.

    The biases of agents and tokens are sums of a table of 7 x 7 places and a table for each side of the map.

    Args:
        dim: Channels.
        num_heads: Heads.
        side: Side of the map that the tables are made for; they are interpolated for other maps.
        agent_grid: Side of the grid of agents.
        table_grid: Side of the grid of agents that the tables are made for.
        separate_query: Whether the queries have a linear layer of their own (PVT).
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        agent_grid: int,
        table_grid: int,
        separate_query: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.agent_grid = agent_grid
        self.table_grid = table_grid
        self.separate_query = separate_query
        agents = table_grid**2
        # Of agents (first letter) and tokens (second letter), for places n, rows h and columns w; then the reverse.
        self.an_bias = nn.Parameter(torch.empty(num_heads, agents, 7, 7, **dd))
        self.ah_bias = nn.Parameter(torch.empty(num_heads, agents, side, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(num_heads, agents, 1, side, **dd))
        self.na_bias = nn.Parameter(torch.empty(num_heads, agents, 7, 7, **dd))
        self.ha_bias = nn.Parameter(torch.empty(num_heads, side, 1, agents, **dd))
        self.wa_bias = nn.Parameter(torch.empty(num_heads, 1, side, agents, **dd))
        if separate_query:
            self.q = nn.Linear(dim, dim, **dd)
            self.kv = nn.Linear(dim, 2 * dim, **dd)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.ModuleList([DepthwiseConv(dim, 3, **dd)])
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the tables."""
        for table in (self.an_bias, self.ah_bias, self.aw_bias, self.na_bias, self.ha_bias, self.wa_bias):
            trunc_normal_(table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        side = self.agent_grid
        values = self.kv if self.separate_query else self.qkv
        return AttentionInfo((f"all tokens, through {side} x {side} agents",), values=values)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        if self.separate_query:
            q, (k, v) = linear(self.q, x), linear(self.kv, x).chunk(2, -1)
        else:
            q, k, v = linear(self.qkv, x).chunk(3, -1)
        agents = self.split_heads(self.pool(q))
        query, key, value = (self.split_heads(x.flatten(1, 2)) for x in (q, k, v))
        to_tokens = self.bias(self.an_bias, self.ah_bias, self.aw_bias, height, width)
        rows, columns = (table.permute(0, 3, 1, 2) for table in (self.ha_bias, self.wa_bias))
        to_agents = self.bias(self.na_bias, rows, columns, height, width)
        summaries = self.split_heads(dot_product_attention(agents, key, value, bias=to_tokens))
        out = dot_product_attention(query, agents, summaries, bias=to_agents.mT.contiguous())
        return linear(self.proj, out.unflatten(1, (height, width)) + self.lepe[0](v))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, N, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def pool(self, q: Tensor) -> Tensor:
        """Queries (B, H, W, dim) to agents (B, n, dim), the means over a grid of the map."""
        side = self.agent_grid
        return pool_to_bins(q.permute(0, 3, 1, 2), ((side, side), (side, side))).flatten(2).mT

    def bias(self, places: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        """The bias (1, N, n, H W) of agents and tokens, given tables (N, n, 7, 7), (N, n, side, 1), (N, n, 1, side)."""
        bias = resize_map(places, height, width)
        bias = bias + resize_map(rows, height, width) + resize_map(columns, height, width)
        bias = bias.flatten(2)[None]
        if self.agent_grid != self.table_grid:
            axis = constant(interpolation, self.agent_grid, self.table_grid, bias.dtype, like=bias)
            bias = torch.kron(axis, axis) @ bias
        return bias


def shifted_regions(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The labels (1, height, width) of the parts of a map that was rolled by `shift`, for `window_attention`."""
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    down = (rows >= height - window).int() + (rows >= height - shift).int()
    right = (columns >= width - window).int() + (columns >= width - shift).int()
    return (3 * down[:, None] + right)[None]


@register_notrace_module
class ShiftedWindowAttention(nn.Module):
    """Attention of tokens (B, H, W, dim) in windows, between linear layers; Swin's, with windows shifted if `shift`.

    The map is padded with zeros at the bottom and the right to whole windows. As in the official detection code, tokens
    attend to the padding, whose keys and values are the bias of the qkv layer.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = window_size // 2 if shift else 0
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table."""
        trunc_normal_(self.bias_table, std=0.02)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        shifted = ", shifted" if self.shift else ""
        return AttentionInfo((f"window of {self.window_size} x {self.window_size}{shifted}",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        w, regions = self.window_size, None
        rows, columns = (height + w - 1) // w * w, (width + w - 1) // w * w
        qkv = linear(self.qkv, pad_tokens(x, rows, columns))
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), (1, 2))
            regions = constant(shifted_regions, rows, columns, w, self.shift, like=qkv)
        x = window_attention(
            qkv,
            num_heads=self.num_heads,
            window_size=w,
            bias_table=self.bias_table,
            bias_sign="query_minus_key",
            regions=regions,
        )
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return linear(self.proj, crop_tokens(x, height, width))


@register_notrace_module
class PatchEmbedding(nn.Module):
    """Patches of `size` x `size`, LayerNorm, position embedding: (B, C, H, W) -> (B, dim, H // size, W // size).

    The embedding is made for a map of `side` x `side`, and interpolated for other maps.
    """

    def __init__(self, in_dim: int, dim: int, size: int, side: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.side = side
        self.proj = nn.Conv2d(in_dim, dim, size, size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise the embedding."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x))
        table = self.pos_embed.mT.unflatten(-1, (self.side, self.side))
        height, width = sizes(x)[2:]
        return x + resize_map(table, height, width)


class ImageEmbedding(PatchEmbedding):
    """A `PatchEmbedding` of images."""

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.proj)
        return super().forward(x)


@register_notrace_module
class PatchMerging(nn.Module):
    """Neighbours 2 x 2 side by side, LayerNorm, linear layer: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * in_dim, eps=1e-5, **dd)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        _, height, width, _ = sizes(x)
        x = pad_tokens(x, (height + 1) // 2 * 2, (width + 1) // 2 * 2)
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (B, H / 2, 2, W / 2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # the order (0, 0), (1, 0), (0, 1), (1, 1) of rows and columns
        return linear(self.reduction, self.norm(x)).permute(0, 3, 1, 2)


def check_agent_depths(agent_depths: Sequence[int], depths: Sequence[int]) -> None:
    """Raise ValueError if a stage is to have more blocks with agent attention than blocks."""
    if any(few > depth for few, depth in zip(agent_depths, depths, strict=True)):
        raise ValueError(f"Got {agent_depths=} for {depths=}; it has to be at most the depth of each stage.")


class AgentPVT(Backbone):
    """Agent-PVT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded down.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        agent_grid: Side of the grid of agents in each stage.
        table_grid: The same for the tables of the biases, if the two differ: they are interpolated.
        img_size: Side of the images, in pixels, that the tables are made for; or both sides, if they are equal.
        mlp_ratios: Hidden channels of each stage's MLPs, as a multiple of its channels.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
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
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        agent_grid: Sequence[int] = (3, 4, 7, 7),
        table_grid: Sequence[int] = (3, 4, 7, 7),
        img_size: int | Sequence[int] = 224,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            img_size=img_size,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            agent_grid=agent_grid,
            table_grid=table_grid,
            mlp_ratios=mlp_ratios,
        )
        dd = {"device": device, "dtype": dtype}
        sides = [pvt_side(img_size, 4 * 2**i) for i in range(len(depths))]
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for drop_path in drop_path_rates[i]:
                attn = AgentAttention(dim, heads, sides[i], agent_grid[i], table_grid[i], separate_query=True, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratios[i]), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, norm_eps=1e-6, **dd))
            stages.append(Stage(blocks, PatchEmbedding(embed_dims[i - 1], dim, 2, sides[i], **dd) if i else None))
        super().__init__(
            ImageEmbedding(in_chans, embed_dims[0], 4, sides[0], **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


class AgentSwin(Backbone):
    """Agent-Swin: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        agent_depths: The number of blocks with agent attention in each stage, the first ones. The others have windows,
            and those with an odd index shift them.
        agent_grid: Side of the grid of agents in each stage.
        table_grid: The same for the tables of the biases, if the two differ: they are interpolated.
        img_size: Side of the images, in pixels, that the tables are made for; or both sides, if they are equal.
        window_size: Side of the windows, in tokens; at most that of the map of `img_size`.
        shift_all: Whether windows are shifted in all stages, as in dense prediction. Otherwise they are not in a stage
            with a single window at `img_size`.
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
        agent_depths: Sequence[int] = (2, 2, 6, 0),
        agent_grid: Sequence[int] = (3, 4, 7, 7),
        table_grid: Sequence[int] = (3, 4, 7, 7),
        img_size: int | Sequence[int] = 224,
        window_size: int = 7,
        shift_all: bool = False,
        mlp_ratio: float = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            img_size=img_size,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_choice("shift_all", shift_all, (True, False))
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            agent_depths=agent_depths,
            agent_grid=agent_grid,
            table_grid=table_grid,
            mlp_ratio=mlp_ratio,
        )
        check_agent_depths(agent_depths, depths)
        dd = {"device": device, "dtype": dtype}
        sides = [swin_side(img_size, 4 * 2**i) for i in range(len(depths))]
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for j, drop_path in enumerate(drop_path_rates[i]):
                attn: nn.Module
                if j < agent_depths[i]:
                    attn = AgentAttention(dim, heads, sides[i], agent_grid[i], table_grid[i], **dd)
                else:
                    shift = j % 2 == 1 and (shift_all or sides[i] > window_size)
                    attn = ShiftedWindowAttention(dim, heads, min(window_size, sides[i]), shift, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, **dd))
            stages.append(Stage(blocks, PatchMerging(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            PatchStem(in_chans, embed_dims[0], 4, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=LayerNorm2d(embed_dims[-1], eps=1e-5, **dd),
            output_norm=output_norm,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of the windows. Those of agent attention have weight decay, as in the official code."""
        return {name for name, _ in self.named_parameters() if name.endswith(".bias_table")}


class AgentCSWin(Backbone):
    """Agent-CSWin: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32. A side of n pixels has (n + 1) // 4 tokens after the stem; every later
    stage halves it and rounds up.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        agent_depths: The number of blocks with agent attention in each stage, the first ones. The others have stripes,
            those of the last stage attention of all tokens to all.
        agent_grid: Side of the grid of agents in each stage.
        table_grid: The same for the tables of the biases, if the two differ: they are interpolated.
        img_size: Side of the images, in pixels, that the tables are made for; or both sides, if they are equal.
        split_size: Columns or rows of a stripe.
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
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_depths: Sequence[int] = (2, 4, 0, 0),
        agent_grid: Sequence[int] = (3, 4, 7, 7),
        table_grid: Sequence[int] = (3, 4, 7, 7),
        img_size: int | Sequence[int] = 224,
        split_size: int = 7,
        mlp_ratio: float = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            img_size=img_size,
            split_size=split_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            agent_depths=agent_depths,
            agent_grid=agent_grid,
            table_grid=table_grid,
            mlp_ratio=mlp_ratio,
        )
        check_agent_depths(agent_depths, depths)
        striped = zip(num_heads[:-1], depths, agent_depths, strict=False)
        if any(heads % 2 and agent_depth < depth for heads, depth, agent_depth in striped):
            raise ValueError(
                f"Got {num_heads=}; it has to be an even number in all stages with stripes: half of the heads have "
                "vertical stripes, half horizontal ones."
            )
        dd = {"device": device, "dtype": dtype}
        sides = [cswin_side(img_size, 4 * 2**i) for i in range(len(depths))]
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = []
            for j, drop_path in enumerate(drop_path_rates[i]):
                attn: nn.Module
                if j < agent_depths[i]:
                    attn = AgentAttention(dim, heads, sides[i], agent_grid[i], table_grid[i], **dd)
                elif i < len(depths) - 1:
                    attn = CrossShapedAttention(dim, heads, split_size, **dd)
                else:
                    attn = GlobalAttention(dim, heads, **dd)
                mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop_rate, **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, **dd))
            stages.append(Stage(blocks, ConvDownsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            ConvStem(in_chans, embed_dims[0], **dd),
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
    # constants, which window attention and the shift compute
    (r"\.relative_position_index$", None),
    (r"\.attn_mask$", None),
    # PVT
    (r"^pos_embed1$", "stem.pos_embed"),
    (r"^pos_embed2$", "stages.1.downsample.pos_embed"),
    (r"^pos_embed3$", "stages.2.downsample.pos_embed"),
    (r"^pos_embed4$", "stages.3.downsample.pos_embed"),
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed2\.", "stages.1.downsample."),
    (r"^patch_embed3\.", "stages.2.downsample."),
    (r"^patch_embed4\.", "stages.3.downsample."),
    (r"^(?:block|stage)1\.", "stages.0.blocks."),  # and CSWin
    (r"^(?:block|stage)2\.", "stages.1.blocks."),
    (r"^(?:block|stage)3\.", "stages.2.blocks."),
    (r"^(?:block|stage)4\.", "stages.3.blocks."),
    # Swin
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.0\.downsample\.", "stages.1.downsample."),
    (r"^layers\.1\.downsample\.", "stages.2.downsample."),
    (r"^layers\.2\.downsample\.", "stages.3.downsample."),
    (r"^norm([0-3])\.", r"output_norms.\1."),  # of the detection backbone
    (r"\.relative_position_bias_table$", ".bias_table"),
    # CSWin
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge1\.", "stages.1.downsample."),
    (r"^merge2\.", "stages.2.downsample."),
    (r"^merge3\.", "stages.3.downsample."),
    (r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.attns\.(\d)\.get_v\.", r".attn.lepe.\1."),
    (r"\.attns\.0\.", ".attn."),
    # the convolution of the values in PVT and Swin
    (r"\.attn\.dwc\.", ".attn.lepe.0."),
]

# The axes of the tables that are as long as a side of the map.
AXES = {"ah_bias": -2, "aw_bias": -1, "ha_bias": -3, "wa_bias": -2}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    Tables that were made for images of another size are interpolated, as the official code does for fine-tuning.
    """
    want = model.state_dict()
    given = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    given = {key: _resized(key, value, want[key].shape) if key in want else value for key, value in given.items()}
    return checkpoints.convert(given, model, KEY_MAP)


def _resized(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A table for a map of another size; `value` itself if it is no such table."""
    leaf = key.rpartition(".")[2]
    if leaf == "pos_embed" and value.ndim == 3 and value.shape[::2] == shape[::2]:
        before, after = (math.isqrt(size[1]) for size in (value.shape, shape))
        if before != after and before**2 == value.shape[1]:
            return resize_map(value.mT.unflatten(-1, (before, before)), after, after).flatten(2).mT
    elif leaf in AXES and value.ndim > 3:
        axis, resized = AXES[leaf], list(value.shape[-4:])
        resized[axis] = shape[axis]
        if value.shape[axis] != shape[axis] and resized == list(shape):
            weights = interpolation(shape[axis], value.shape[axis], value.dtype, value.device)
            return (value.movedim(axis, -1) @ weights.mT).movedim(-1, axis)
    return value


default_cfgs = checkpoints.default_cfgs(
    "agent",
    first_conv="stem.proj",
    exceptions={name: ("stem.conv", 32) for name in VARIANTS if name.startswith("agent_cswin")},
)


def _create_agent(variant: str, pretrained: bool, **kwargs) -> Backbone:
    model_cls = {"agent_pvt": AgentPVT, "agent_cswin": AgentCSWin}.get(_architecture(variant), AgentSwin)
    return create(model_cls, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


def _architecture(variant: str) -> str:
    return "_".join(variant.split("_")[:2])


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-PVT-T (11.6 M parameters)."""
    return _create_agent("agent_pvt_t", pretrained, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-PVT-S (20.6 M)."""
    return _create_agent("agent_pvt_s", pretrained, **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-PVT-M (35.9 M)."""
    return _create_agent("agent_pvt_m", pretrained, **kwargs)


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-PVT-M with tables for 256 x 256 pixels (36.1 M)."""
    return _create_agent("agent_pvt_m_256", pretrained, **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-PVT-L (48.7 M)."""
    return _create_agent("agent_pvt_l", pretrained, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-Swin-T (28.9 M)."""
    return _create_agent("agent_swin_t", pretrained, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-Swin-S (49.7 M)."""
    return _create_agent("agent_swin_s", pretrained, **kwargs)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-Swin-S with windows and tables for 288 x 288 pixels (49.7 M)."""
    return _create_agent("agent_swin_s_288", pretrained, **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-Swin-B (88.1 M)."""
    return _create_agent("agent_swin_b", pretrained, **kwargs)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-Swin-B with windows and tables for 384 x 384 pixels (88.3 M)."""
    return _create_agent("agent_swin_b_384", pretrained, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-CSWin-T (20.5 M)."""
    return _create_agent("agent_cswin_t", pretrained, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-CSWin-S (32.8 M)."""
    return _create_agent("agent_cswin_s", pretrained, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-CSWin-B (73.2 M)."""
    return _create_agent("agent_cswin_b", pretrained, **kwargs)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs) -> Backbone:
    """Agent-CSWin-B with stripes and tables for 384 x 384 pixels (73.3 M)."""
    return _create_agent("agent_cswin_b_384", pretrained, **kwargs)


@register_model
def test_agent(pretrained: bool = False, **kwargs) -> Backbone:
    """An Agent-Swin of 0.5 M parameters, for tests and small images."""
    return _create_agent("test_agent", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The grids of agents that the official code has for detection and segmentation; see `zoo.families`."""
    official: dict[str, dict[str, Any]] = {
        "agent_pvt": {"agent_grid": (12, 16, 28, 28)},
        "agent_swin": {"agent_grid": (9, 12, 14, 7), "shift_all": True},
    }
    return official.get(_architecture(variant), {})


def pvt_side(side: int, reduction: int) -> int:
    """The side of a map of Agent-PVT: convolutions drop what is left over."""
    return side // reduction


def swin_side(side: int, reduction: int) -> int:
    """The side of a map of Agent-Swin: images and maps are padded."""
    return -(-side // reduction)


def cswin_side(side: int, reduction: int) -> int:
    """The side of a map of Agent-CSWin: the stem is a 7 x 7 convolution with stride 4 and padding 2."""
    return -(-((side + 1) // 4 * 4) // reduction)


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map; see `zoo.families`."""
    rule = {"agent_pvt": pvt_side, "agent_cswin": cswin_side}.get(_architecture(variant), swin_side)
    return rule(side, reduction)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    (height, width, dim), grid = tokens.shape[1:], 4
    attn = AgentAttention(dim, 2, height, grid, grid)
    attn.reset_parameters()
    queries = tokens.detach().requires_grad_()
    agent = attn.pool(queries)[0, place[0] * grid // height * grid + place[1] * grid // width]
    (averaged,) = torch.autograd.grad(agent.sum(), queries)  # over the tokens that this agent is the mean of
    maps = ((averaged[0].sum(-1) > 0).float(), 0.45 * attended(attn, place, tokens)[0])
    return [Pattern("Agent", ("an agent: a part's mean", "its keys: all tokens"), maps, (place,))]
