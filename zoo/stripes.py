"""Parts of CSWin's pyramid that several families have: cross-shaped windows, global attention with LePE, convolutions.

Images and features are NCHW. Tokens are NHWC.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attention_maps import AttentionInfo
from zoo.cpu import is_plain, linear
from zoo.kernels import certain, depthwise_conv2d_nhwc, sizes, window_attention
from zoo.layers import DepthwiseConv, check_images, global_attention, sym_max

__all__ = ["ConvDownsample", "ConvStem", "CrossShapedAttention", "GlobalAttention", "from_stripes", "to_stripes"]


def to_stripes(x: Tensor, split_size: int) -> tuple[Tensor, int, int]:
    """Cut tokens (B, H, W, ...) into vertical stripes (stripes * B, H, split_size, ...).

    Columns of zeros on both sides make the width a multiple of `split_size`. If their number is odd, the right side has
    one more.

    Returns:
        The stripes, their number per image, and the number of columns of zeros on the left.
    """
    height, width = sizes(x)[1:3]
    stripes = (width + split_size - 1) // split_size
    left, bottom = (stripes * split_size - width) // 2, 0
    if not (isinstance(height, int) and isinstance(width, int)):
        # If sizes are symbolic, torch.export has to prove that reshapes are possible. It can if a side is a maximum,
        # not a sum that it multiplies out, and is never 1. A second stripe of zeros is cropped again.
        stripes, bottom = sym_max(stripes, 2), sym_max(height, 1) - height
    right = stripes * split_size - width - left
    if not certain(left + right + bottom == 0):
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (left, right, 0, bottom))
    return x.unflatten(2, (-1, split_size)).movedim(2, 0).flatten(0, 1), stripes, left


def from_stripes(x: Tensor, stripes: int, left: int, width: int) -> Tensor:
    """(stripes * B, H, split_size, C) -> (B, H, width, C), the inverse of `to_stripes`."""
    x = x.unflatten(0, (stripes, -1)).movedim(0, 2).flatten(2, 3)
    if isinstance(left, int) and isinstance(width, int):
        return x[:, :, left : left + width]
    # torch.export has to prove that a slice is within the map, but not that an index is.
    return x.index_select(2, torch.arange(width, device=x.device) + left)


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of all tokens (B, H, W, dim) to all, plus LePE, between linear layers."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.ModuleList([DepthwiseConv(dim, 3, **dd)])
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        qkv = linear(self.qkv, x).unflatten(-1, (3, -1))
        return linear(self.proj, global_attention(qkv, self.num_heads) + self.lepe[0](qkv[..., 2, :]))


@register_notrace_module
class CrossShapedAttention(nn.Module):
    """Attention within stripes of tokens (B, H, W, dim), plus LePE within them, between linear layers.

    The first half of the heads, and so of the channels of query, key and value, has stripes of `split_size` columns,
    the second half has stripes of `split_size` rows. A map whose sides are not multiples of `split_size` is padded with
    zeros on both sides, after the linear layer. As in the official segmentation code, tokens attend to the padding,
    with logits and values of 0.
    """

    def __init__(self, dim: int, num_heads: int, split_size: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads // 2  # of each branch
        self.split_size = split_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.ModuleList(DepthwiseConv(dim // 2, 3, **dd) for _ in range(2))
        self.proj = nn.Linear(dim, dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        stripes = tuple(f"stripes, {self.split_size} {side}" for side in ("wide", "high"))
        return AttentionInfo(stripes, values=self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        columns, rows = linear(self.qkv, x).unflatten(-1, (3, 2, -1)).unbind(-2)  # (B, H, W, 3, dim / 2) each
        columns = self.attend_in_stripes(columns, 0)
        # Horizontal stripes are the vertical ones of the transposed map.
        rows = self.attend_in_stripes(rows.transpose(1, 2), 1).transpose(1, 2)
        return linear(self.proj, torch.cat([columns, rows], dim=-1))

    def attend_in_stripes(self, qkv: Tensor, branch: int) -> Tensor:
        """(B, H, W, 3, C) -> (B, H, W, C), in vertical stripes."""
        width = sizes(qkv)[2]
        qkv, stripes, left = to_stripes(qkv, self.split_size)
        _, height, columns, *_ = sizes(qkv)  # of a stripe
        if torch.compiler.is_exporting():
            # The same attention. torch.export can't prove the operator's reshapes if sizes are symbolic.
            x = global_attention(qkv, self.num_heads)
        else:
            x = window_attention(qkv.flatten(-2), num_heads=self.num_heads, window_size=(height, columns))
        conv, value = self.lepe[branch], qkv[..., 2, :]
        if branch == 0:
            lepe = conv(value)
        elif is_plain(conv, DepthwiseConv):  # the map is transposed, and the kernel is cheaper to transpose
            lepe = depthwise_conv2d_nhwc(value, conv.weight.transpose(2, 3), conv.bias)
        else:
            lepe = conv(value.transpose(1, 2)).transpose(1, 2)
        return from_stripes(x + lepe, stripes, left, width)


class ConvStem(nn.Module):
    """7 x 7 convolution with stride 4, LayerNorm, for images."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, (H + 1) // 4, (W + 1) // 4)."""
        check_images(x, self.conv)
        return self.norm(self.conv(x))


class ConvDownsample(nn.Module):
    """3 x 3 convolution with stride 2, LayerNorm."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""
        return self.norm(self.conv(x))
