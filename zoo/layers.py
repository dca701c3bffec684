"""Layers that several families share: the checked patch stem, the transformer block and its parts, global attention.

Images and features are NCHW. Tokens between the blocks of a transformer are NHWC, as the operators read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    register_notrace_function,
    register_notrace_module,
    trunc_normal_,
    use_fused_attn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.cpu import by_image, convolution, fused_convolution, is_plain, linear
from zoo.kernels import certain, depthwise_conv2d_nhwc, dispatch, sizes

__all__ = [
    "ConvMlp",
    "DepthwiseConv",
    "GatedMlp",
    "HeadConv",
    "Mlp",
    "OverlappingPatches",
    "OverlappingStem",
    "PatchStem",
    "ResidualConv",
    "ResidualConvMlp",
    "RmsBlock",
    "RmsNorm2d",
    "TransformerBlock",
    "bin_ends",
    "bin_weights",
    "check_images",
    "crop_tokens",
    "depthwise",
    "dot_product_attention",
    "global_attention",
    "init_by_fan_out",
    "init_transformer",
    "mask_padding",
    "pad_images",
    "pad_tokens",
    "plus_depthwise",
    "pool_to_bins",
    "position_map",
    "resize_positions",
    "rope_frequencies",
    "stage_rates",
    "sym_max",
]


@register_notrace_function
def check_images(x: Tensor, conv: nn.Module) -> None:
    """Raise ValueError unless `x` is (B, C, H, W) with the channels of `conv` and at least 32 pixels per side."""
    # A traced graph must not fix the sizes, and Dynamo cannot raise. Eager calls are enough to catch a user's mistake.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    in_chans = getattr(conv, "in_channels", None)  # a module that replaces it, such as an adapter, may lack it
    if x.ndim != 4 or in_chans not in (None, x.shape[1]):
        raise ValueError(
            f"Got images of shape {tuple(x.shape)}; expected (batch, {in_chans or 'channels'}, height, width)."
        )
    if min(x.shape[2:]) < 32:
        raise ValueError(f"Got images of {x.shape[2]} x {x.shape[3]} pixels; enlarge or pad them to at least 32 x 32.")


def sym_max(size: int, other: int) -> int:
    """The larger of two sizes, which may be symbolic in torch.export."""
    if isinstance(size, int) and isinstance(other, int):  # Dynamo of torch 2.11 can't trace torch.sym_max of ints
        return max(size, other)
    return torch.sym_max(size, other)


def pad_images(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with zeros at the bottom and the right, so that the sides are multiples of `multiple`."""
    # Written so that torch.export can infer the range.
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in sizes(x)[2:])
    return F.pad(x, (0, right, 0, bottom))


@register_notrace_module
class PatchStem(nn.Module):
    """Patches of `size` x `size` pixels, LayerNorm. The image is padded with zeros at the bottom and the right."""

    def __init__(self, in_chans: int, dim: int, size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.size = size
        self.proj = nn.Conv2d(in_chans, dim, size, size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, ceil(H / size), ceil(W / size))."""
        check_images(x, self.proj)
        return self.norm(self.proj(pad_images(x, self.size)))


@register_notrace_module
class OverlappingPatches(nn.Module):
    """Overlapping patches: a strided convolution and LayerNorm."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride))."""
        return self.norm(convolution(self.proj, x))


@register_notrace_module
class OverlappingStem(OverlappingPatches):
    """The first patches of PVT v2 and its descendants, 7 x 7 with stride 4. It checks the images."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__(in_chans, dim, kernel_size=7, stride=4, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""
        check_images(x, self.proj)
        return super().forward(x)


@register_notrace_module
class DepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of tokens (B, H, W, dim), with zeros around the map."""

    def __init__(self, dim: int, kernel_size: int, bias: bool = True, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return depthwise_conv2d_nhwc(x, self.weight, self.bias)


class ResidualConv(nn.Module):
    """x plus its depth-wise convolution, which encodes positions, on tokens (B, H, W, dim)."""

    def __init__(self, dim: int, kernel_size: int, device=None, dtype=None):
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return x + self.conv(x)


def depthwise(layer: nn.Module, x: Tensor, act: nn.Module) -> Tensor:
    """`act(layer(x))` of a `DepthwiseConv`, (B, H, W, dim) -> (B, H, W, dim)."""
    out = None
    if is_plain(layer, DepthwiseConv):
        options = layer.padding, layer.stride, layer.dilation, layer.groups
        out = fused_convolution(x.permute(0, 3, 1, 2), layer.weight, layer.bias, *options, act=act)
    return act(layer(x)) if out is None else out.permute(0, 2, 3, 1)


def plus_depthwise(layer: nn.Module, x: Tensor) -> Tensor:
    """`x + layer(x)` of a `DepthwiseConv`: (B, H, W, dim) -> (B, H, W, dim).

    In float32, the middle tap of the kernel adds `x`, in one pass over the map. Half precision would round the tap to
    fewer digits than the sum.
    """
    if is_plain(layer, DepthwiseConv):
        (weight,) = dispatch.autocast(layer.weight)
        if weight.dtype in (torch.float32, torch.float64):
            middle = [side // 2 for side in layer.kernel_size for _ in range(2)]
            return depthwise_conv2d_nhwc(x, weight + F.pad(weight.new_ones(1, 1, 1, 1), middle), layer.bias)
    return x + layer(x)


@register_notrace_module
class Mlp(nn.Module):
    """Linear, GELU, Linear on tokens (..., dim), with dropout after both.

    Args:
        dim: Channels of the tokens.
        hidden_dim: Channels between the layers.
        drop: Probability of both dropouts.
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self, dim: int, hidden_dim: int, drop: float = 0.0, approximate: str = "none", device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU(approximate)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.drop2(linear(self.fc2, self.drop1(linear(self.fc1, x, self.act))))


@register_notrace_module
class ConvMlp(nn.Module):
    """Linear, depth-wise 3 x 3 convolution, which encodes positions, GELU, Linear on tokens (B, H, W, dim).

    Args:
        dim: Channels of the tokens.
        hidden_dim: Channels between the layers.
        drop: Probability of the dropouts after the GELU and the last layer.
        device, dtype: Device and type of the parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.widening = hidden_dim / dim
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dw_conv = DepthwiseConv(hidden_dim, 3, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def reset_parameters(self) -> None:
        """Initialise the depth-wise convolution for a fan-out of 3 x 3."""
        nn.init.normal_(self.dw_conv.weight, std=(2 / 9) ** 0.5)
        if self.dw_conv.bias is not None:
            nn.init.zeros_(self.dw_conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        x = depthwise(self.dw_conv, linear(self.fc1, x), self.act)
        return self.drop2(linear(self.fc2, self.drop1(x)))


@register_notrace_module
class ResidualConvMlp(nn.Module):
    """Linear, GELU, depth-wise 3 x 3 convolution with a shortcut, Linear on tokens (B, H, W, dim)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.widening = hidden_dim / dim
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.dw_conv = DepthwiseConv(hidden_dim, 3, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        x = linear(self.fc1, x, self.act)
        return linear(self.fc2, plus_depthwise(self.dw_conv, x))


@register_notrace_module
class GatedMlp(nn.Module):
    """Linear, SiLU(one half) * other half, Linear on tokens (B, H, W, dim)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.widening = 2 * hidden_dim / dim
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=False, **dd)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        gate, x = linear(self.fc1, x).chunk(2, -1)
        return linear(self.fc2, self.act(gate) * x)


@register_notrace_module
class HeadConv(nn.Module):
    """1 x 1 convolution, batch norm and SiLU before pooling: (B, C, H, W) -> (B, dim, H, W)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, dim, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, dim, H, W)."""
        return convolution(self.proj, x, self.norm, self.act)


class RmsNorm2d(nn.RMSNorm):
    """RMSNorm over the channels of maps (B, C, H, W). timm's overflows in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with drop path, and with layer scale if it is given.

    Args:
        dim: Channels of the tokens (B, H, W, dim).
        attn: Module that maps tokens, and any further arguments of `forward`, to tokens.
        mlp: Module that maps tokens to tokens.
        drop_path: Probability that a branch is left out for an image in training.
        layer_scale: Initial factor of both branches; None for no layer scale.
        norm_eps: Epsilon of the LayerNorms.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1: nn.Module = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim). Further arguments are passed to the attention."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), *context)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class RmsBlock(TransformerBlock):
    """A transformer block whose norms are RMSNorms."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, mlp, drop_path, **dd)
        self.norm1, self.norm2 = (nn.RMSNorm(dim, eps=1e-6, **dd) for _ in range(2))


def init_transformer(module: nn.Module) -> None:
    """Initialise linear layers (truncated normal, std 0.02, zero bias), and other modules by `reset_parameters`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif (reset_parameters := getattr(module, "reset_parameters", None)) is not None:
        reset_parameters()


def init_by_fan_out(module: nn.Module) -> None:
    """Initialise convolutions (normal, variance 2 / fan-out, zero bias), and other modules by `init_transformer`."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        init_transformer(module)


def rope_frequencies(head_dim: int) -> tuple[float, ...]:
    """The frequencies of `rotate_2d` for heads of `head_dim` channels, in radians per token: from 1 down to 1/10000."""
    pairs = head_dim // 4  # along each axis
    return tuple(10000 ** (-i / max(pairs - 1, 1)) for i in range(pairs))


def position_map(table: Tensor, size: Sequence[int]) -> Tensor:
    """Position embeddings (1, N, C) of a square map, row by row, as a map (1, C, *size).

    For another size, they are resized (bicubic, without antialiasing), in float32 or more.
    """
    side = math.isqrt(table.shape[1])
    maps = table.mT.unflatten(-1, (side, side))
    if certain(size[0] == side) and certain(size[1] == side):
        return maps
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(exact, size=tuple(size), mode="bicubic", align_corners=False).to(maps.dtype)


def resize_positions(table: Tensor, count: int) -> Tensor:
    """Position embeddings (1, N, C) of a square map for one of `count` tokens; unchanged if N is no square."""
    before, after = math.isqrt(table.shape[1]), math.isqrt(count)
    if before == 0 or before**2 != table.shape[1] or before == after:
        return table
    return position_map(table, (after, after)).flatten(2).mT


def stage_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The stochastic-depth rate of each block, by stage. Rates grow linearly from 0 at the first block to `rate`."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu")
    return [part.tolist() for part in rates.split(tuple(depths))]


def pad_tokens(x: Tensor, height: int, width: int, top: int = 0, left: int = 0) -> Tensor:
    """Tokens (B, H, W, C) padded with zeros to (B, height, width, C), after `top` rows and `left` columns of zeros."""
    _, given_height, given_width, _ = sizes(x)
    bottom, right = height - given_height - top, width - given_width - left
    # If sizes are symbolic in torch.export, the program always pads, possibly by nothing.
    if all(isinstance(side, int) and side == 0 for side in (top, left, bottom, right)):
        return x
    return F.pad(x, (0, 0, left, right, top, bottom))


def mask_padding(x: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width): which tokens of `x` (B, H, W, C), padded to this size, are not padding."""
    _, given_height, given_width, _ = sizes(x)
    rows = torch.arange(height, device=x.device) < given_height
    columns = torch.arange(width, device=x.device) < given_width
    return (rows[:, None] & columns).expand(x.shape[0], -1, -1)


def crop_tokens(x: Tensor, height: int, width: int, top: int = 0, left: int = 0) -> Tensor:
    """Rows and columns of tokens (B, H, W, C) after `top` rows and `left` columns: (B, height, width, C)."""
    if isinstance(height, int) and isinstance(width, int):
        return x[:, top : top + height, left : left + width]
    # torch.export has to prove that a slice is within the map, but not that an index is.
    rows, columns = (torch.arange(side, device=x.device) + first for side, first in ((height, top), (width, left)))
    return x.index_select(1, rows).index_select(2, columns)


def bin_ends(length: int, real: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first token of each bin along an axis, and the one after its last: both (count,).

    An axis of `length` tokens is pooled to `count` bins, as adaptive average pooling does it: they overlap unless
    `count` divides `length`. If sizes are symbolic, torch.export must know that there is more than one bin. So there
    are two or more, and those after the first `real` ones have no tokens.
    """
    i = torch.arange(count, device=device)
    return i * length // real, ((i + 1) * length + real - 1) // real


def bin_weights(length: int, real: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, length): the weight of each token in the mean of a bin; see `bin_ends`."""
    start, end = bin_ends(length, real, count, device)
    token = torch.arange(length, device=device)
    inside = ((token >= start[:, None]) & (token < end[:, None])).to(dtype)
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


def pool_to_bins(x: Tensor, bins: Sequence[tuple[int, int]]) -> Tensor:
    """The means of maps (B, C, H, W) over bins, (B, C, h, w).

    `bins` has the numbers of bins with tokens and of all, for rows and columns; see `bin_ends`.
    """
    (_, height), (_, width) = bins
    if isinstance(height, int) and isinstance(width, int) and not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, (height, width))
    # ONNX has no adaptive pooling. Products in this order give torch.export no reason to restrict the sizes.
    rows, columns = (
        bin_weights(length, *each, x.dtype, x.device) for length, each in zip(sizes(x)[2:], bins, strict=True)
    )
    return ((x @ columns.mT).mT @ rows.mT).mT


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention of all queries (B, N, T, D) to all keys and values (B, N, K, D): (B, T, N D).

    `scale` is the factor of the logits, D ** -0.5 if None. `bias` (1, N, T, K) is added to them.
    """
    # Of a batch without images, PyTorch's operator gives the bias no gradient.
    if use_fused_attn() and (bias is None or not certain(sizes(query)[0] == 0)):
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        if torch.compiler.is_exporting():  # the strides depend on the machine and on gradients
            return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = scale * query @ key.transpose(-2, -1)
        x = (logits if bias is None else logits + bias).softmax(dim=-1) @ value
    return x.transpose(1, 2).flatten(2)


def global_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of all tokens of a map to all tokens: query, key and value (B, H, W, 3, C) to (B, H, W, C)."""
    heads = qkv.unflatten(-1, (num_heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4)  # three of (B, N, H W, D)
    return dot_product_attention(*heads).unflatten(1, sizes(qkv)[1:3])
