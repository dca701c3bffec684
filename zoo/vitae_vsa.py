"""ViTAEv2-VSA: varied-size window attention in the pyramid of ViTAEv2 (Zhang et al., ECCV 2022, arXiv 2204.08446).

https://arxiv.org/abs/2204.08446; the pyramid: https://arxiv.org/abs/2202.10108. Queries belong to windows of 7 x 7
tokens, and each head moves and scales the window from which it samples keys and values, as it predicts from the mean of
the window's tokens. Beside the attention of every block, three convolutions read the same input.

Official code, without a licence: https://github.com/ViTAE-Transformer/ViTAE-VSA. Nothing here comes from it: this file
is written from the papers and facts about the code, and the tests compare outputs of vitaev2_vsa_s. Differences:
- Images can have any size: they are padded with zeros at the bottom and the right to multiples of 32, and a map that is
  smaller than a window counts as one window.
- The official code has two rules for maps that windows don't divide, one for classification and one for detection;
  `detection_windows` chooses the latter. They agree where a map is a square of whole windows.
- The reduction cell at the beginning of an official stage is the stem, or the stage's downsampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, linear
from zoo.kernels import dispatch, sizes, window_attention
from zoo.kernels.constants import only_traced
from zoo.layers import Mlp, ResidualConv, check_images, crop_tokens, pad_images, pad_tokens, stage_rates, sym_max

__all__ = ["ViTAEVSA"]


def _wide(dim: int, depths: tuple[int, ...]) -> dict:
    heads = tuple(dim // 32 * 2**i for i in range(4))
    return {
        "embed_dims": tuple(dim * 2**i for i in range(4)),
        "depths": depths,
        "num_heads": heads,
        "reduction_heads": heads,
        "wide": True,
    }


# The official configurations. Figures of the small model are published without "wide".
VARIANTS: dict[str, dict[str, Any]] = {
    "vitaev2_vsa_s": _wide(64, (2, 2, 8, 2)) | {"reduction_heads": (2, 2, 4, 8), "wide": False},
    "vitaev2_vsa_wide_s": _wide(64, (2, 2, 8, 2)),
    "vitaev2_vsa_48m": _wide(96, (2, 2, 11, 2)),
    "vitaev2_vsa_b": _wide(128, (2, 2, 12, 2)),
    # our own, for tests and small images on a CPU: the maps of 64 pixels are 16, 8, 4 and 2 tokens wide
    "test_vitae_vsa": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 3, 4),
        "reduction_heads": (1, 1, 2, 4),
        "groups": (1, 8, 16, 16),
        "reduction_groups": (1, 8, 16, 16),
        "window_size": 3,
        "mlp_ratio": 2,
    },
}


@register_notrace_module
class VariedWindowAttention(nn.Module):
    """Attention in windows whose keys and values are sampled from a window of another size and place, for each head.

    From the mean of the tokens of a window, a leaky ReLU and two linear layers predict a scale and an offset for each
    head and axis. A key that is `local` tokens from the middle of its window is sampled (bilinear) at its own place +
    scale * local + offset; around the map are zeros. Queries stay where they are.

    Maps are padded with zeros to whole windows, after the qkv layer. Tokens attend to the padding.

    Args:
        in_dim: Channels of the tokens (B, H, W, in_dim). The factor of the logits is (in_dim / num_heads) ** -0.5.
        dim: Channels of queries, keys, values and of the output.
        num_heads: Heads.
        window_size: Side of a window, in tokens.
        detection: The rule for maps that windows don't divide. False: they are padded at the bottom and the right, and
            offsets are in units of a half of the map's width (height), divided by the number of whole windows along it.
            True: they are padded on all sides, and the numbers of windows along width and height are exchanged.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        detection: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.detection = detection
        self.scale = (in_dim / num_heads) ** -0.5
        self.act = nn.LeakyReLU(0.01)
        self.offsets = nn.Linear(in_dim, 2 * num_heads, **dd)  # of x and y, for each head
        self.scales = nn.Linear(in_dim, 2 * num_heads, **dd)
        self.qkv = nn.Linear(in_dim, 3 * dim, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the table, and the layers as PyTorch does: the official ones are 1 x 1 convolutions."""
        trunc_normal_(self.bias_table, std=0.02)
        for layer in (self.offsets, self.scales, self.qkv, self.proj):
            layer.reset_parameters()

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("a window of learned size and place for each head",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_dim) -> (B, H, W, dim)."""
        _, *size, _ = sizes(x)
        w = self.window_size
        windows = [(side + w - 1) // w for side in size]
        first = [(count * w - side) // 2 if self.detection else 0 for count, side in zip(windows, size, strict=True)]
        if not all(isinstance(side, int) for side in size):
            # torch.export can leave the number of windows open if it is never 1. A second one of zeros changes nothing.
            windows = [sym_max(count, 2) for count in windows]
        rows, columns = (count * w for count in windows)
        places = self.key_places(pad_tokens(x, rows, columns, *first), size)
        qkv = linear(self.qkv, x)
        if rows_can_be_gathered(qkv):
            key_value = gather(qkv, places, first)
            query = pad_tokens(qkv[..., : qkv.shape[-1] // 3], rows, columns, *first)
        else:
            query, key, value = pad_tokens(qkv, rows, columns, *first).chunk(3, -1)
            key_value = sample(key, value, places)
        x = window_attention(
            torch.cat((query, key_value), -1),
            num_heads=self.num_heads,
            window_size=w,
            bias_table=self.bias_table,
            bias_sign="query_minus_key",
            scale=self.scale,
        )
        return linear(self.proj, crop_tokens(x, *size, *first))

    def key_places(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where each head samples the keys of tokens (B, H, W, in_dim), whose map had the height and width `size`.

        Returns:
            Rows (B, N, h, w, window_size) for each row of tokens of h x w windows, and columns (B, N, h, w,
            window_size) for each of their columns. They are float32 for half precision.
        """
        w = self.window_size
        dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 would move keys by a tenth of a token
        means = self.act(F.avg_pool2d(x.permute(0, 3, 1, 2), w).permute(0, 2, 3, 1).contiguous())
        # (2, B, N, h, w), x and y. These are copies, since torch.export can't compare strides that it leaves open.
        offsets, scales = (
            layer(means).to(dtype).unflatten(-1, (-1, 2)).permute(4, 0, 3, 1, 2).contiguous()
            for layer in (self.offsets, self.scales)
        )
        steps = torch.arange(w, device=x.device, dtype=dtype)
        places = []
        for axis, side in enumerate(size):
            # An offset of 1 is half of the map, divided by the number of whole windows along this axis or the other.
            half, whole = (side + w - 1) // w * w - 1, size[1 - axis if self.detection else axis] // w
            scale, offset = (each[1 - axis][..., None] for each in (scales, offsets))
            own = torch.arange(sizes(means)[1 + axis], device=x.device, dtype=dtype)[:, None] * w + steps
            own = own[:, None] if axis == 0 else own
            places.append(own + scale * (steps - (w - 1) / 2) + offset * half / (2 * sym_max(whole, 1)))
        return places[0], places[1]


def sample(key: Tensor, value: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Keys and values (B, H, W, dim) interpolated at rows and columns of `key_places`: (B, H, W, 2 dim)."""
    heads, (_, height, width, _) = sizes(places[0])[1], sizes(key)
    maps = torch.stack((key, value)).unflatten(-1, (heads, -1)).permute(1, 4, 0, 5, 2, 3)  # (B, N, 2, D, H, W)
    # Explicit copies, since torch.export can only prove that contiguous tensors have views if it leaves sizes open.
    maps = merge_heads(maps.contiguous().flatten(2, 3)).to(places[0].dtype)
    rows, columns = (place * 2 / (side - 1) - 1 for place, side in zip(places, (height, width), strict=True))
    rows, columns = rows.transpose(3, 4)[..., None], columns[:, :, :, None]
    grid = torch.stack(torch.broadcast_tensors(columns, rows), -1)  # (B, N, h, window_size, w, window_size, 2)
    grid = merge_heads(grid.flatten(4, 5).flatten(2, 3))
    maps = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    maps = maps.unflatten(1, (2, -1)).unflatten(0, (-1, heads))
    return maps.permute(0, 4, 5, 2, 1, 3).contiguous().flatten(3).to(key.dtype)


def merge_heads(x: Tensor) -> Tensor:
    """(B, N, ...) -> (B N, ...)."""
    return x[:, 0] if x.shape[1] == 1 else x.flatten(0, 1)  # torch.export can't prove the view of a single head


def rows_can_be_gathered(qkv: Tensor) -> bool:
    """Whether `gather` can take the place of `sample`: in inference on CPUs, where it is faster."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.numel() > 0
        and not only_traced(qkv)
        and not dispatch.again_differentiable(qkv)
    )


def gather(qkv: Tensor, places: tuple[Tensor, Tensor], first: Sequence[int]) -> Tensor:
    """`sample` of the keys and values in tokens (B, H, W, 3 dim) without padding, whose first has the place `first`.

    A key or value of a head is a row of a table, and interpolation a weighted sum of four rows, as of an embedding bag.
    """
    batch, height, width, channels = qkv.shape
    heads = places[0].shape[1]
    taps = []
    for place, start, side in zip(places, first, (height, width), strict=True):
        place = (place - start).clamp(-1, side)
        before = place.floor()
        share = place - before
        shares = torch.stack((1 - share, share), -1)  # (B, N, h, w, window_size, 2)
        index = torch.stack((before, before + 1), -1).to(torch.int32)
        taps.append((shares.masked_fill((index < 0) | (index >= side), 0), index.clamp(0, side - 1)))
    (row_shares, rows), (column_shares, columns) = taps

    def pairs(by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, window_size, w, window_size, 1, N, 2, 2) for all pairs of a row and a column of a window."""
        by_row = by_row.permute(0, 2, 4, 3, 1, 5).contiguous()[:, :, :, :, None, None, :, :, None]
        return by_row, by_column.permute(0, 2, 3, 4, 1, 5).contiguous()[:, :, None, :, :, None, :, None]

    image = torch.arange(batch, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1)
    row, column = pairs((rows + image * height) * width, columns)
    kind = torch.arange(heads, 3 * heads, dtype=torch.int32).view(2, heads, 1, 1)  # key or value, and head
    index = (row + column) * (3 * heads) + kind
    row_share, column_share = pairs(row_shares, column_shares)
    share = (row_share * column_share).expand(index.shape)
    table = qkv.reshape(-1, channels // (3 * heads)).to(share.dtype)
    out = F.embedding_bag(index.reshape(-1, 4), table, per_sample_weights=share.reshape(-1, 4), mode="sum")
    height, width = index.shape[1] * index.shape[2], index.shape[3] * index.shape[4]
    return out.view(batch, height, width, -1).to(qkv.dtype)


def for_export(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W), copied in torch.export, which can't order the strides of channels-last maps of open sizes."""
    return maps.contiguous() if torch.compiler.is_exporting() else maps


@register_notrace_module
class ParallelConvs(nn.Module):
    """Three 3 x 3 convolutions, the first two with batch norm and SiLU: (B, C, H, W) -> (B, dims[2], H', W').

    Args:
        in_dim: Channels of the input, C.
        dims: Channels of the outputs of the convolutions.
        strides: Their strides.
        groups: Their groups of channels.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dims: tuple[int, int, int],
        strides: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_dim, dims[0], 3, strides[0], 1, groups=groups, **dd)
        self.norm1 = nn.BatchNorm2d(dims[0], **dd)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(dims[0], dims[1], 3, strides[1], 1, groups=groups, **dd)
        self.norm2 = nn.BatchNorm2d(dims[1], **dd)
        self.conv3 = nn.Conv2d(dims[1], dims[2], 3, strides[2], 1, groups=groups, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = convolution(self.conv1, for_export(x), self.norm1, self.act)
        x = convolution(self.conv2, x, self.norm2, self.act)
        return convolution(self.conv3, x)


@register_notrace_module
class PyramidReduction(nn.Module):
    """Convolutions of several dilations side by side, GELU: (B, C, H, W) -> (B, n dim, H / stride, W / stride).

    Args:
        in_dim: Channels of the input, C.
        dim: Channels of each convolution.
        kernel_size: Side of the kernels.
        stride: Stride. The sides of the map are multiples of it.
        dilations: Dilation of each of the n convolutions.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int,
        dilations: Sequence[int],
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = (dilation * (kernel_size - 1) + 2 - stride) // 2
            conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, dilation, device=device, dtype=dtype)
            self.convs.append(conv)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = for_export(x)
        return torch.cat([convolution(conv, x, act=self.act) for conv in self.convs], 1)


class ReductionCell(nn.Module):
    """Downsampling: attention and convolutions side by side, then an MLP: (B, C, H, W) -> (B, dim, H / s, W / s).

    Attention reads dilated convolutions of the input, the parallel convolutions the input itself. There is no shortcut.

    Args:
        in_dim: Channels of the input, C.
        dim: Channels of the output.
        num_heads: Heads of the attention.
        stride: The stride s, 4 for images or 2 for maps. The sides of the input are multiples of it.
        dilations: Dilations of the pyramid reduction.
        groups: Groups of the parallel convolutions.
        wide: Whether the first two parallel convolutions have 2 `dim` channels instead of as many as the pyramid's.
        window_size, detection: As for `VariedWindowAttention`.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        stride: int,
        dilations: Sequence[int],
        groups: int,
        wide: bool,
        window_size: int,
        detection: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        images = stride == 4
        embed_dim = dim if images else in_dim
        hidden_dim = 2 * dim if wide else embed_dim
        wide_dim = embed_dim * len(dilations)
        self.pyramid = PyramidReduction(in_dim, embed_dim, 7 if images else 3, stride, dilations, **dd)
        self.pos_embed = ResidualConv(wide_dim, 7, **dd)
        self.norm1 = nn.LayerNorm(wide_dim, eps=1e-5, **dd)
        self.attn = VariedWindowAttention(wide_dim, dim, num_heads, window_size, detection, **dd)
        strides = (2, 2, 1) if images else (2, 1, 1)
        self.convs = ParallelConvs(in_dim, (hidden_dim, hidden_dim, dim), strides, groups, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.pyramid(x).permute(0, 2, 3, 1).contiguous()
        tokens = self.attn(self.norm1(self.pos_embed(tokens)))
        tokens = tokens + self.convs(x).permute(0, 2, 3, 1).contiguous()
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.permute(0, 3, 1, 2)


@register_notrace_module
class Stem(ReductionCell):
    """A `ReductionCell` of images, which are padded with zeros at the bottom and the right to multiples of 32."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, 8 ceil(H / 32), 8 ceil(W / 32))."""
        check_images(x, self.convs.conv1)
        return super().forward(pad_images(x, 32))


class NormalCell(nn.Module):
    """Attention and convolutions side by side, then an MLP, on a residual stream (B, H, W, dim).

    The attention alone gets positions, from a depth-wise convolution of its input.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads of the attention.
        hidden_dim: Channels inside the MLP and the parallel convolutions.
        groups: Groups of the parallel convolutions.
        window_size, detection: As for `VariedWindowAttention`.
        drop_path: Probability that a branch is left out for an image in training.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        groups: int,
        window_size: int,
        detection: bool,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pos_embed = ResidualConv(dim, 7, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = VariedWindowAttention(dim, dim, num_heads, window_size, detection, **dd)
        self.convs = ParallelConvs(dim, (hidden_dim, dim, dim), groups=groups, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, hidden_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        local = self.convs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        x = x + self.drop_path(self.attn(self.norm1(self.pos_embed(x)))) + self.drop_path(local)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViTAEVSA(Backbone):
    """ViTAEv2-VSA: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 of images padded to multiples of 32: the plain outputs of the stages.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none: without a classifier, the
            model then returns its last feature map.
        embed_dims, depths, num_heads: Channels, normal cells and their heads of each stage.
        reduction_heads: Heads of the reduction cell that begins each stage.
        wide: Whether the parallel convolutions of the reduction cells have twice the channels of their stage inside.
        groups: Groups of the parallel convolutions of each stage's normal cells.
        reduction_groups: The same for its reduction cell.
        window_size: Side of the windows, in tokens.
        mlp_ratio: Hidden channels of the normal cells' MLPs and convolutions, as a multiple of the stage's channels.
        detection_windows: The rule for maps that windows don't divide: that of the official code for detection, or
            False for that of classification; see `VariedWindowAttention`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth. Rates grow linearly from 0 to this number over as many steps as there are
            normal cells. As in the official code, those of a stage start at the step whose number is the depth of the
            previous stage.
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
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 2, 4, 8),
        wide: bool = False,
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        window_size: int = 7,
        mlp_ratio: float = 4,
        detection_windows: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
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
            drop_path_rate=drop_path_rate,
        )
        if window_size < 2:
            raise ValueError(f"Got {window_size=}; it has to be 2 or more: a window of one token has no scale.")
        for name, value in (("wide", wide), ("detection_windows", detection_windows)):
            arguments.check_choice(name, value, (True, False))
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            reduction_heads=reduction_heads,
            groups=groups,
            reduction_groups=reduction_groups,
            mlp_ratio=mlp_ratio,
        )
        _check_divisors(in_chans, embed_dims, reduction_heads, groups, reduction_groups, wide, mlp_ratio)
        dd = {"device": device, "dtype": dtype}
        stages, cells, dims = [], [], (in_chans, *embed_dims)
        for i, (dim, rates) in enumerate(zip(embed_dims, cell_rates(drop_path_rate, depths), strict=True)):
            cell_cls, stride, dilations = (ReductionCell, 2, range(1, max(5 - i, 3))) if i else (Stem, 4, range(1, 5))
            shared = {"window_size": window_size, "detection": detection_windows, **dd}
            heads, conv_groups = reduction_heads[i], reduction_groups[i]
            cells.append(cell_cls(dims[i], dim, heads, stride, dilations, conv_groups, wide, **shared))
            hidden_dim = int(dim * mlp_ratio)
            blocks = [
                NormalCell(dim, num_heads[i], hidden_dim, groups[i], drop_path=drop_path, **shared)
                for drop_path in rates
            ]
            stages.append(Stage(blocks, cells[i] if i else None))
        super().__init__(
            cells[0],
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def cell_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The stochastic-depth rate of each normal cell, by stage; see `ViTAEVSA`."""
    (steps,) = stage_rates(rate, [sum(depths)])
    firsts = (0, *depths[:-1])
    return [steps[first : first + depth] for first, depth in zip(firsts, depths, strict=True)]


def _check_divisors(
    in_chans: int,
    embed_dims: Sequence[int],
    reduction_heads: Sequence[int],
    groups: Sequence[int],
    reduction_groups: Sequence[int],
    wide: bool,
    mlp_ratio: float,
) -> None:
    """Raise ValueError unless heads and groups divide the channels that they split."""
    ins = (in_chans, *embed_dims[:-1])
    for i, dim in enumerate(embed_dims):
        if dim % reduction_heads[i]:
            raise ValueError(f"Got {reduction_heads=} for {embed_dims=}; heads have to divide their stage's channels.")
        if dim % groups[i] or int(dim * mlp_ratio) % groups[i]:
            raise ValueError(
                f"Got {groups=} for {embed_dims=} and {mlp_ratio=}; groups have to divide their stage's channels, and "
                "these times mlp_ratio."
            )
        if dim % reduction_groups[i] or ins[i] % reduction_groups[i]:
            raise ValueError(
                f"Got {reduction_groups=} for {embed_dims=} and {in_chans=}; groups have to divide the channels of "
                "their stage and those of its input."
            )


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"\.relative_position_index$", None),  # a constant, which window attention computes
    (r"^layers\.0\.RC\.", "stem."),
    (r"^layers\.(\d)\.RC\.", r"stages.\1.downsample."),
    (r"^layers\.(\d)\.NC\.", r"stages.\1.blocks."),
    (r"\.PRM\.convs\.(\d)\.0\.", r".pyramid.convs.\1."),
    (r"\.PCM\.0\.", ".convs.conv1."),
    (r"\.PCM\.1\.", ".convs.norm1."),
    (r"\.PCM\.3\.", ".convs.conv2."),
    (r"\.PCM\.4\.", ".convs.norm2."),
    (r"\.PCM\.6\.", ".convs.conv3."),
    (r"\.pos\.", ".pos_embed.conv."),
    (r"\.relative_position_bias_table$", ".bias_table"),
    (r"\.sampling_(offsets|scales)\.2\.", r".\1."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs(
    "vitae_vsa", first_conv=(*(f"stem.pyramid.convs.{i}" for i in range(4)), "stem.convs.conv1")
)


def _create_vitae_vsa(variant: str, pretrained: bool, **kwargs) -> ViTAEVSA:
    return create(ViTAEVSA, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def vitaev2_vsa_s(pretrained: bool = False, **kwargs) -> ViTAEVSA:
    """ViTAEv2-VSA-S (19.8 M parameters)."""
    return _create_vitae_vsa("vitaev2_vsa_s", pretrained, **kwargs)


@register_model
def vitaev2_vsa_wide_s(pretrained: bool = False, **kwargs) -> ViTAEVSA:
    """ViTAEv2-VSA-S with wide parallel convolutions in its reduction cells (20.3 M)."""
    return _create_vitae_vsa("vitaev2_vsa_wide_s", pretrained, **kwargs)


@register_model
def vitaev2_vsa_48m(pretrained: bool = False, **kwargs) -> ViTAEVSA:
    """ViTAEv2-VSA-48M (51.1 M)."""
    return _create_vitae_vsa("vitaev2_vsa_48m", pretrained, **kwargs)


@register_model
def vitaev2_vsa_b(pretrained: bool = False, **kwargs) -> ViTAEVSA:
    """ViTAEv2-VSA-B (93.7 M)."""
    return _create_vitae_vsa("vitaev2_vsa_b", pretrained, **kwargs)


@register_model
def test_vitae_vsa(pretrained: bool = False, **kwargs) -> ViTAEVSA:
    """A ViTAEv2-VSA of 0.5 M parameters, for tests and small images."""
    return _create_vitae_vsa("test_vitae_vsa", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The rule of the official code for detection for maps that windows don't divide; see `zoo.families`."""
    return {"detection_windows": True}


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map, of an image padded to a multiple of 32; see `zoo.families`."""
    return -(-side // 32) * 32 // reduction


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    maps = []
    for scale, offset in ((-0.5, (0.3, 0.1)), (0.8, (0.1, -0.3))):
        attn = VariedWindowAttention(tokens.shape[-1], tokens.shape[-1], 1)
        nn.init.trunc_normal_(attn.bias_table, std=0.02)
        for layer, values in ((attn.scales, (scale, scale)), (attn.offsets, offset)):
            nn.init.zeros_(layer.weight)
            layer.bias.data = torch.tensor(values)
        maps.append(attended(attn, place, tokens)[0])
    return [Pattern("VSA", ("a head: a small window", "another: a large one"), tuple(maps), (place,))]
