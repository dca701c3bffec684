"""MoH-ViT: Mixture-of-Head attention (Jin et al., 2024, https://arxiv.org/abs/2410.11842) in TransNeXt's network.

The network is TransNeXt (Shi, CVPR 2024, https://arxiv.org/abs/2311.17132). In its aggregated attention, a token
attends to its 3 x 3 neighbours and to the means of large patches, with one softmax over both; in the last stage, all
tokens attend to all. Mixture-of-Head attention treats the heads as experts: every token weights its shared heads, and
chooses a few of the others, which are routed.

Official code, Apache-2.0: https://github.com/SkyworkAI/MoH, https://github.com/DaiShiResearch/TransNeXt. Written from
the papers and facts about that code; the tests compare outputs of moh_vit_s_75. Differences:
- Images may have any size from 32 pixels up; the official model is built for one square size. The position bias, the
  numbers of keys and the padding follow the map; distances stay scaled for the size of pre-training.
- Each distance passes the MLP of the position bias once.

All heads are computed, and the gates of those that a token leaves out are 0, as in the official code.
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
from zoo.cpu import by_image, convolution, fused_convolution, is_plain, linear
from zoo.kernels import certain, sizes
from zoo.kernels.constants import constant
from zoo.kernels.gather import take
from zoo.layers import (
    DepthwiseConv,
    OverlappingPatches,
    OverlappingStem,
    TransformerBlock,
    bin_ends,
    bin_weights,
    depthwise,
    dot_product_attention,
    init_by_fan_out,
    pool_to_bins,
    stage_rates,
    sym_max,
)

__all__ = ["MoHViT"]


def _network(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...], **settings) -> dict[str, Any]:
    return {"embed_dims": dims, "depths": depths, "num_heads": heads, **settings}


_S = _network((72, 144, 288, 576), (5, 5, 22, 5), (3, 6, 12, 24))
_B = _network((96, 192, 384, 768), (5, 5, 23, 5), (4, 8, 16, 32))

# The variants of the official code. The number in a name is the percentage of heads that a token uses.
VARIANTS: dict[str, dict[str, Any]] = {
    "moh_vit_s_75": {**_S, "shared_heads": (3, 6, 3, 4), "routed_heads": (0, 0, 6, 12)},
    "moh_vit_s_80": {**_S, "shared_heads": (3, 6, 3, 8), "routed_heads": (0, 0, 6, 12)},
    "moh_vit_b_50": {**_B, "shared_heads": (2, 2, 2, 4), "routed_heads": (2, 4, 6, 8)},
    "moh_vit_b_75": {**_B, "shared_heads": (4, 8, 4, 5), "routed_heads": (0, 0, 8, 16)},
    # our own, for tests and small images on a CPU
    "test_moh": _network(
        (16, 32, 48, 64),
        (2, 2, 2, 2),
        (2, 4, 6, 8),
        mlp_ratios=(4, 4, 3, 3),
        shared_heads=(2, 1, 2, 2),
        routed_heads=(0, 2, 2, 3),
    ),
}

BALANCE = 0.01  # the weight of the balancing loss
NATIVE = 8  # the coordinate of the furthest key in a map of the size of pre-training, before the logarithm
TAPS = [(i, j) for i in range(3) for j in range(3)]  # rows and columns of a neighbourhood


def _steps(length: int, real: int) -> tuple[int, int]:
    """Distances between tokens and bins lie between -reach / 2 and reach / 2, in steps of step / 2: (reach, step)."""
    if certain(length % real == 0):  # then all bins have the same size
        return 2 * (length - 1) - (length // real - 1), 2
    return 2 * (length - 1), 1


def bin_distances(length: int, real: int, native: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All distances between a token and the middle of a bin, in order, as coordinates for the position bias."""
    reach, step = _steps(length, real)
    distance = (step * torch.arange(2 * reach // step + 1, device=device) - reach).to(dtype) / 2
    distance = distance * (NATIVE / (native - 1))
    return distance.sign() * (distance.abs() + 1).log2() / math.log2(NATIVE)


def _indices(length: int, real: int, count: int, padding: int, device: torch.device) -> Tensor:
    """(count, length + padding): the index in `bin_distances` of the distance of each token to each bin.

    Tokens of the padding have that of the last token.
    """
    reach, step = _steps(length, real)
    start, end = bin_ends(length, real, count, device)
    token = torch.arange(length + padding, device=device).clamp(max=length - 1)
    return ((2 * token - (start + end - 1)[:, None] + reach) // step).clamp(min=0)


def bin_indices(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], padding: int, device: torch.device
) -> Tensor:
    """(h w, H (W + padding)): the index, among all pairs of distances, of that between each token and each bin.

    `rows` and `columns` have the number of bins that exist and of all.
    """
    (height, width), (reach, step) = size, _steps(size[1], columns[0])
    down, right = _indices(height, *rows, 0, device), _indices(width, *columns, padding, device)
    index = down[:, None, :, None] * (2 * reach // step + 1) + right[:, None]  # (h, w, H, W + padding)
    return index.flatten(2).flatten(0, 1)


def real_bins(rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor:
    """(h w,): whether a bin exists, for the number of those that exist and of all, in rows and in columns."""
    tall, wide = (torch.arange(count, device=device) < real for real, count in (rows, columns))
    return (tall[:, None] & wide).flatten()


def _inside(length: int, padding: int, device: torch.device) -> Tensor:
    """(3, length + padding): whether a token has a neighbour before it, itself, and one after it."""
    neighbour = torch.arange(length + padding, device=device) + torch.arange(-1, 2, device=device)[:, None]
    return (neighbour >= 0) & (neighbour < length)


def neighbours(height: int, width: int, device: torch.device) -> Tensor:
    """(9, H (W + 1)): which of the 3 x 3 neighbours of a token are in the map; all for the padding of a row."""
    rows, columns = _inside(height, 0, device), _inside(width, 1, device)
    padding = torch.arange(width + 1, device=device) == width
    found = rows[:, None, :, None] & columns[:, None]  # (3, 3, H, W + 1)
    return (found | padding).flatten(2).flatten(0, 1)


def shifted(x: Tensor, offset: int, length: int) -> Tensor:
    """x[..., offset : offset + length]."""
    if isinstance(offset, int) and isinstance(length, int):
        return x.narrow(-1, offset, length)
    # torch.export has to prove that a slice is within the tensor, but not that an index is.
    return x.index_select(-1, torch.arange(length, device=x.device) + offset)


def largest(x: Tensor, count: int) -> Tensor:
    """Which entries of the last dimension are the `count` largest ones; of equal ones, the first."""
    # Few numbers, so that comparing all pairs is faster than to sort them.
    index = torch.arange(x.shape[-1], device=x.device)
    one, other = x[..., None], x[..., None, :]
    before = (other > one) | ((other == one) & (index < index[:, None]))
    return before.sum(-1) < count


def normalize(x: Tensor, dim: int) -> Tensor:
    """`F.normalize(x, dim=dim)`, computed in float32 or more; on CPUs, its norm takes several times as long."""
    full = x.to(_at_least_float32(x))
    return (full * full.square().sum(dim, keepdim=True).clamp(min=1e-24).rsqrt()).to(x.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@register_notrace_module
class HeadGates(nn.Module):
    """The factor of each head for each token, (B, H, W, dim) -> (B, H, W, num_heads), shared heads first.

    The factors of the shared heads are a softmax times their number. Those of the routed heads are a softmax, of which
    the `routed` largest are kept, and scaled so that their sum is their number. If there are both kinds, two more
    factors, one for each kind, have the sum 2.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads.
        shared: The number of heads that all tokens use, the first ones.
        routed: How many of the others a token uses; 0 if there are no others.
        device, dtype: Device and type of the parameters.

    Attributes:
        balance: How unevenly the tokens of the last forward pass in training used the routed heads, (): `routed` if
            they used them evenly, and more otherwise. None before.
    """

    balance: Tensor | None

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype, "bias": False}
        self.num_shared, self.num_routed = shared, routed
        self.kinds = nn.Linear(dim, 2, **dd) if shared and routed else None
        self.shared = nn.Linear(dim, shared, **dd) if shared > 1 else None
        self.routed = nn.Linear(dim, num_heads - shared, **dd) if routed else None
        self.balance = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance": None}  # a tensor of a graph can't be copied

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, num_heads)."""
        gates = []
        if self.shared is not None:
            gates.append(_softmax(self.shared, x) * self.num_shared)
        elif self.num_shared:
            gates.append(x.new_ones(*x.shape[:-1], 1))
        if self.routed is not None:
            shares = _softmax(self.routed, x)
            kept = largest(shares.detach(), self.num_routed)
            if self.training:
                self.balance = _balance(shares, kept)
            shares = shares * kept
            gates.append(shares * (self.num_routed / shares.sum(-1, keepdim=True)))
        if self.kinds is not None:
            kinds = 2 * _softmax(self.kinds, x)
            gates = [gate * kind for gate, kind in zip(gates, kinds.split(1, -1), strict=True)]
        return torch.cat(gates, -1).to(x.dtype)


def _softmax(layer: nn.Module, x: Tensor) -> Tensor:
    """The softmax of a layer's output, in float32 or more."""
    out = linear(layer, x)
    return out.softmax(-1, dtype=_at_least_float32(out))


def _balance(shares: Tensor, kept: Tensor) -> Tensor:
    """The number of heads times the sum of each head's mean share times the part of the tokens that use it: ()."""
    tokens = list(range(shares.ndim - 1))
    return shares.shape[-1] * (shares.mean(tokens) * kept.to(shares.dtype).mean(tokens)).sum()


class PositionBias(nn.Module):
    """A bias for each head from the distance in rows and columns, by an MLP: continuous, so that any map will do.

    Args:
        num_heads: Number of heads.
        native: Side of the map for which the distances are scaled.
        hidden_dim: Hidden features of the MLP.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, num_heads: int, native: int, hidden_dim: int = 512, device=None, dtype=None):
        super().__init__()
        self.native = native
        self.widening = hidden_dim / 2
        self.fc1 = nn.Linear(2, hidden_dim, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden_dim, num_heads, device=device, dtype=dtype)

    def forward(self, size: tuple[int, int], bins: Sequence[tuple[int, int]], padding: int, like: Tensor) -> Tensor:
        """The bias (N, h w, H (W + padding)) between the bins and the tokens of a map (H, W).

        `bins` has the number of bins that exist and of all, for rows and columns. The others have the bias -inf.
        """
        (height, width), ((rows, _), (columns, _)) = size, bins
        # The MLP is computed once for each pair of distances: the map is regular, so there are few of them.
        down, right = (
            constant(bin_distances, side, real, self.native, _at_least_float32(like), like=like)
            for side, real in ((height, rows), (width, columns))
        )
        pairs = torch.stack(torch.broadcast_tensors(down[:, None], right), -1).to(like.dtype)  # (rows, columns, 2)
        table = by_image(self, self.mlp, pairs[:, None], self.widening)[:, 0].flatten(0, 1).T
        index = constant(bin_indices, size, *bins, padding, like=like)
        table = take(table, 1, index.flatten()).unflatten(1, index.shape)
        if isinstance(rows, int) and isinstance(columns, int):
            return table
        return table.masked_fill(~real_bins(*bins, like.device)[:, None], -torch.inf)

    def mlp(self, pairs: Tensor) -> Tensor:
        """The bias of pairs of coordinates: (..., 2) -> (..., N)."""
        return linear(self.fc2, linear(self.fc1, pairs, self.act))


class MixtureOfHeads(nn.Module):
    """Attention by cosines with gates of its heads, on tokens (B, H, W, dim): what both kinds have in common.

    The logits are products of normalized keys and queries. The queries are also shifted by an embedding, and scaled by
    a temperature and by the logarithm of the number of keys.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int, native: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))  # before a softplus
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads, **dd))
        self.position_bias = PositionBias(num_heads, native, **dd)
        self.gates = HeadGates(dim, num_heads, shared, routed, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the parameters that the module itself has, as in the official code."""
        nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))  # its softplus is 1 / 0.24
        trunc_normal_(self.query_embedding, std=0.02)

    def scaled(self, query: Tensor, count: Tensor) -> Tensor:
        """Normalized queries (B, N, D, L), shifted and scaled for the number of keys of each, (L,) or ()."""
        scale = F.softplus(self.temperature) * count.to(_at_least_float32(self.temperature)).log()  # (N, 1, L) or less
        return ((query + self.query_embedding.mT) * scale).to(query.dtype)


@register_notrace_module
class AggregatedAttention(MixtureOfHeads):
    """Attention to the 3 x 3 neighbours and to the means of patches, with one softmax.

    After the softmax, each query adds its products with learnable tokens to the weights of its neighbours.

    Maps are (B, N, D, L) in between, with the tokens last: CPUs then compute with vectors of many tokens at a time. A
    row has a column of zeros behind it, which is also the one before the next row, so L = H (W + 1). The neighbours of
    all tokens in one direction are then a slice.

    Args:
        dim: Channels.
        num_heads: Number of heads.
        shared, routed: See `HeadGates`.
        native: Side of the map for which distances are scaled.
        sr_ratio: Side of the patches, in tokens. A map has as many patches along an axis as fit, but at least one; they
            cover it evenly, and overlap if they do not fit exactly.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self, dim: int, num_heads: int, shared: int, routed: int, native: int, sr_ratio: int, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, shared, routed, native, **dd)
        self.sr_ratio = sr_ratio
        self.local_bias = nn.Parameter(torch.empty(num_heads, 9, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, 9, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(num_heads, 1, 9, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the parameters that the module itself has, as in the official code."""
        super().reset_parameters()
        trunc_normal_(self.local_bias, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        kind = f"3 x 3 neighbours, patches of {self.sr_ratio} x {self.sr_ratio}, absolute"
        return AttentionInfo((kind,), values=self.kv, signed=True, spread=self.spread)

    def bins(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The number of patches that exist and of all, for rows and columns; see `bin_weights`."""
        found = [sym_max(side // self.sr_ratio, 1) for side in size]
        return [(real, real if isinstance(real, int) else sym_max(real, 2)) for real in found]

    def spread(self, weights: Tensor, size: tuple[int, int]) -> Tensor:
        """Weights of tokens and patches (..., 1, H W + h w) as weights of the tokens (..., H, W)."""
        local, pooled = weights[..., 0, :].tensor_split([size[0] * size[1]], -1)
        rows, columns = (
            bin_weights(side, *bins, weights.dtype, weights.device)
            for side, bins in zip(size, self.bins(size), strict=True)
        )
        pooled = pooled.unflatten(-1, (len(rows), len(columns)))
        return local.unflatten(-1, size) + rows.mT @ pooled @ columns

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        bias = self.position_bias((height, width), self.bins((height, width)), 1, x)
        if self.training:  # the balance is that of all images
            return self.attend(x, bias)
        widening = 3 + (9 + sizes(bias)[1]) * self.num_heads / x.shape[-1]
        return by_image(self, lambda images: self.attend(images, bias), x, widening)

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, H, W, dim), and the bias of the patches, to (B, H, W, dim)."""
        heads, (_, height, width, _) = self.num_heads, sizes(x)
        length, slices = height * (width + 1), [i * (width + 1) + j for i, j in TAPS]
        near, (far_key, far_value) = self.keys_and_values(x)
        query = linear(self.q, x).unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2)  # (B, N, D, H, W)
        query = normalize(F.pad(query, (0, 1)).flatten(3), dim=2)  # (B, N, D, L)
        # Zeros are before each row, in a row above the map, and in two below it.
        key, value = (F.pad(y, (1, 0, 1, 2)).flatten(3) for y in near)
        key, far_key = normalize(key, dim=2), normalize(far_key, dim=2)

        inside = constant(neighbours, height, width, like=x)  # (9, L)
        (rows, _), (columns, _) = self.bins((height, width))
        scaled = self.scaled(query, inside.sum(0) + rows * columns)
        local = torch.cat([(scaled * shifted(key, at, length)).sum(2, keepdim=True) for at in slices], 2)
        local = local + self.local_bias[..., None].masked_fill(~inside, -torch.inf)  # (B, N, 9, L)
        logits = torch.cat((local, far_key.mT @ scaled + bias), 2)  # (B, N, 9 + h w, L)
        weights = logits.softmax(2, dtype=_at_least_float32(logits)).to(value.dtype)
        local = (weights[:, :, :9] + (self.learnable_tokens.mT @ query + self.learnable_bias.mT)).to(value.dtype)

        out = far_value @ weights[:, :, 9:]  # (B, N, D, L)
        for i, at in enumerate(slices):
            out = torch.addcmul(out, local[:, :, i, None], shifted(value, at, length))
        gates = F.pad(self.gates(x).permute(0, 3, 1, 2), (0, 1)).flatten(2)  # (B, N, L)
        out = (out * gates[:, :, None]).unflatten(-1, (height, width + 1))[..., :width]
        return linear(self.proj, out.permute(0, 3, 4, 1, 2).flatten(3))

    def keys_and_values(self, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of the tokens, (B, N, D, H, W), and those of the patches, (B, N, D, h w)."""
        _, height, width, _ = sizes(x)
        features = convolution(self.sr, x.permute(0, 3, 1, 2), act=self.act)
        patches = self.norm(pool_to_bins(features, self.bins((height, width))).flatten(2).mT)
        # One call for both, so that what hooks see is whole.
        near, far = linear(self.kv, torch.cat((x.flatten(1, 2), patches), 1)[:, None])[:, 0].tensor_split(
            [height * width], 1
        )
        near = near.unflatten(-1, (2, self.num_heads, -1)).unflatten(1, (height, width))
        far = far.unflatten(-1, (2, self.num_heads, -1))
        return near.permute(3, 0, 4, 5, 1, 2).unbind(), far.permute(2, 0, 3, 4, 1).unbind()


@register_notrace_module
class GlobalAttention(MixtureOfHeads):
    """Attention of all tokens to all; the arguments are those of `MixtureOfHeads`."""

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int, native: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, shared, routed, native, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, times gates",), values=self.qkv, signed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, _ = sizes(x)
        bias = self.position_bias((height, width), ((height, height), (width, width)), 0, x)  # keys by queries
        qkv = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)  # (B, N, H W, D) each
        count = torch.full((), height * width, device=x.device)
        query = self.scaled(normalize(query, dim=3).mT, count).mT
        out = dot_product_attention(query, normalize(key, dim=3), value, scale=1.0, bias=bias.mT[None].to(query.dtype))
        out = out.unflatten(1, (height, width)).unflatten(-1, (self.num_heads, -1)) * self.gates(x)[..., None]
        return linear(self.proj, out.flatten(3))


@register_notrace_module
class GatedConvMlp(nn.Module):
    """Linear to two halves, the GELU of the first one's depth-wise 3 x 3 convolution times the second one, Linear.

    Args:
        dim: Channels of the tokens (B, H, W, dim).
        hidden_dim: Channels of each half.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.widening = 2 * hidden_dim / dim
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dw_conv = DepthwiseConv(hidden_dim, 3, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        gate, value = self.halves(x)
        return linear(self.fc2, depthwise(self.dw_conv, gate, self.act) * value)

    def halves(self, x: Tensor) -> Sequence[Tensor]:
        """Both halves of the first layer's output, each (B, H, W, hidden_dim)."""
        if is_plain(self.fc1, nn.Linear):
            # The halves of a channels-last map are not channels-last themselves.
            maps = x.permute(0, 3, 1, 2)
            weight, bias = self.fc1.weight[:, :, None, None].chunk(2), self.fc1.bias.chunk(2)
            halves = zip(weight, bias, strict=True)
            parts = [fused_convolution(maps, *half, (0, 0), (1, 1), (1, 1), 1) for half in halves]
            if all(part is not None for part in parts):
                return [part.permute(0, 2, 3, 1) for part in parts if part is not None]
        return linear(self.fc1, x).chunk(2, -1)


class MoHViT(Backbone):
    """MoH-ViT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up), each after its stage's LayerNorm.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage.
        shared_heads: The number of heads of each stage that all tokens use.
        routed_heads: How many of the other heads a token uses, in each stage; 0 if all heads are shared.
        mlp_ratios: Hidden channels of each stage's MLPs, as multiples of `embed_dims`, before they are reduced by a
            third: of the two halves of the first layer, one is a gate.
        sr_ratios: Side of the patches that each stage's tokens attend to; 1 for attention of all tokens to all.
        pretrain_size: Side of the images, in pixels, for which the distances of the position bias are scaled. It
            belongs to the weights, and is no limit.
        drop_rate: Dropout before the classifier.
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
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        shared_heads: Sequence[int] = (3, 6, 3, 4),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        pretrain_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            pretrain_size=pretrain_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
        )
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            shared_heads=shared_heads,
            routed_heads=routed_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
        )
        for heads, shared, routed in zip(num_heads, shared_heads, routed_heads, strict=True):
            if not (0 < routed <= heads - shared or routed == heads - shared == 0):
                raise ValueError(
                    f"Got {shared_heads=} and {routed_heads=} for {num_heads=}; routed_heads are from 1 to the number "
                    "of heads that are not shared, or 0 if all are."
                )
        hidden_dims = [_hidden_dim(dim, ratio) for dim, ratio in zip(embed_dims, mlp_ratios, strict=True)]
        if min(hidden_dims) < 1:
            raise ValueError(
                f"Got {mlp_ratios=} for {embed_dims=}; a stage's MLPs need one hidden channel or more: raise its ratio."
            )
        dd = {"device": device, "dtype": dtype}
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stem = OverlappingStem(in_chans, embed_dims[0], **dd)
        stages = []
        for i, dim in enumerate(embed_dims):
            head_args = num_heads[i], shared_heads[i], routed_heads[i], math.ceil(pretrain_size / 2 ** (i + 2))
            blocks = []
            for drop_path in drop_path_rates[i]:
                attn: nn.Module
                if sr_ratios[i] > 1:
                    attn = AggregatedAttention(dim, *head_args, sr_ratios[i], **dd)
                else:
                    attn = GlobalAttention(dim, *head_args, **dd)
                mlp = GatedConvMlp(dim, hidden_dims[i], **dd)
                blocks.append(TransformerBlock(dim, attn, mlp, drop_path, norm_eps=norm_eps, **dd))
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

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the logits: embeddings, biases and temperatures."""
        kinds = ("query_embedding", "local_bias", "temperature")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds) or ".position_bias." in name}

    def auxiliary_loss(self) -> Tensor:
        """The balancing loss of the last forward pass in training, (): add it to the loss of the task.

        It is small if tokens use a layer's routed heads evenly, with even gates. It is 0.01 times the mean over the
        layers with routed heads, and 0 if there are none. `zoo-train` adds it.

        Raises:
            RuntimeError: There was no forward pass in training.
        """
        gates = [module for module in self.modules() if isinstance(module, HeadGates) and module.routed is not None]
        found = [module.balance for module in gates if module.balance is not None]
        if len(found) < len(gates):
            raise RuntimeError("The balancing loss is that of a forward pass in training: call train() and the model.")
        return BALANCE * torch.stack(found).mean() if found else next(self.parameters()).new_zeros(())


def _hidden_dim(dim: int, ratio: float) -> int:
    """The official code's number of channels in each half of an MLP."""
    return int(2 * int(dim * ratio) / 3)


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
    (r"\.attn\.relative_pos_bias_local$", ".attn.local_bias"),
    (r"\.attn\.cpb_fc([12])\.", r".attn.position_bias.fc\1."),
    (r"\.attn\.wg\.", ".attn.gates.routed."),
    (r"\.attn\.wg_0\.", ".attn.gates.kinds."),
    (r"\.attn\.wg_1\.", ".attn.gates.shared."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dw_conv."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("moh", first_conv="stem.proj")


def _create_moh(variant: str, pretrained: bool, **kwargs) -> MoHViT:
    return create(MoHViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def moh_vit_s_75(pretrained: bool = False, **kwargs) -> MoHViT:
    """MoH-ViT-S with 75 % of the heads (49.9 M parameters)."""
    return _create_moh("moh_vit_s_75", pretrained, **kwargs)


@register_model
def moh_vit_s_80(pretrained: bool = False, **kwargs) -> MoHViT:
    """MoH-ViT-S with 80 % of the heads (49.9 M)."""
    return _create_moh("moh_vit_s_80", pretrained, **kwargs)


@register_model
def moh_vit_b_50(pretrained: bool = False, **kwargs) -> MoHViT:
    """MoH-ViT-B with 50 % of the heads (90.0 M)."""
    return _create_moh("moh_vit_b_50", pretrained, **kwargs)


@register_model
def moh_vit_b_75(pretrained: bool = False, **kwargs) -> MoHViT:
    """MoH-ViT-B with 75 % of the heads (90.0 M)."""
    return _create_moh("moh_vit_b_75", pretrained, **kwargs)


@register_model
def test_moh(pretrained: bool = False, **kwargs) -> MoHViT:
    """A MoH-ViT of 0.3 M parameters, for tests and small images."""
    return _create_moh("test_moh", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    attn = AggregatedAttention(tokens.shape[-1], 1, 1, 0, native=28, sr_ratio=4).apply(init_by_fan_out)
    nn.init.zeros_(attn.learnable_tokens)  # weights of the softmax alone
    weights = attention(attn, (tokens,), [place])[0]  # (1, H, W)
    patches = -F.max_pool2d(-weights, 4)  # the share of each token in the weight of its patch
    near = weights - patches.repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps = (near[0] > 1e-6).float(), 0.45 * (patches[0] > 0)
    return [Pattern("MoH-ViT", ("3 × 3 neighbours", "means of 4 × 4"), maps, (place,))]
