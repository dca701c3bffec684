"""The network of RMT around its attention (Fan et al., CVPR 2024, https://arxiv.org/abs/2309.11523).

Stem, blocks and downsampling, which later models kept and gave other attention. Images and features are NCHW, tokens
between the blocks NHWC.
"""

from __future__ import annotations

import torch
from timm.layers import LayerScale, register_notrace_module
from torch import Tensor, nn

from zoo.cpu import convolution
from zoo.layers import DepthwiseConv, TransformerBlock, check_images, plus_depthwise

__all__ = ["Block", "Downsample", "Stem"]


class DecayedLayerScale(LayerScale):
    """A layer scale with factors of `ndim` dimensions, such as (1, dim), instead of (dim,).

    timm's optimizers therefore apply weight decay to them, as the official codes do.
    """

    def __init__(self, dim: int, init: float, ndim: int = 2, device=None, dtype=None):
        super().__init__(dim, init, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.empty(*(1,) * (ndim - 1), dim, device=device, dtype=dtype))


@register_notrace_module
class Block(TransformerBlock):
    """A transformer block that first adds a depth-wise 3 x 3 convolution of the tokens, which encodes positions.

    Args:
        dim: Channels of the tokens (B, H, W, dim).
        attn, mlp: Modules that map tokens to tokens.
        drop_path: Probability that a branch is left out for an image in training.
        layer_scale: Initial factor of both branches; None for no layer scale.
        layer_scale_ndim: Dimensions of the factors.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        layer_scale_ndim: int = 2,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, mlp, drop_path, norm_eps=1e-6, **dd)
        self.pos_embed = DepthwiseConv(dim, 3, **dd)
        if layer_scale is not None:
            self.ls1 = DecayedLayerScale(dim, layer_scale, layer_scale_ndim, **dd)
            self.ls2 = DecayedLayerScale(dim, layer_scale, layer_scale_ndim, **dd)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        return super().forward(plus_depthwise(self.pos_embed, x), *context)


@register_notrace_module
class Stem(nn.Module):
    """Four 3 x 3 convolutions with batch norms, GELU between them: (B, C, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).

    Args:
        in_chans: Channels of the images.
        dim: Channels from the second convolution with stride 2 on; before it there are half as many.
        strides: Strides of the convolutions: 2 for the first and for a later one, else 1.
        bias: Whether the convolutions have biases.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        strides: tuple[int, int, int, int] = (2, 1, 2, 1),
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        half = dim // 2
        third = dim if strides[2] == 2 else half
        self.conv1 = nn.Conv2d(in_chans, half, 3, strides[0], 1, bias=bias, **dd)
        self.norm1 = nn.BatchNorm2d(half, **dd)
        self.conv2 = nn.Conv2d(half, half, 3, strides[1], 1, bias=bias, **dd)
        self.norm2 = nn.BatchNorm2d(half, **dd)
        self.conv3 = nn.Conv2d(half, third, 3, strides[2], 1, bias=bias, **dd)
        self.norm3 = nn.BatchNorm2d(third, **dd)
        self.conv4 = nn.Conv2d(third, dim, 3, strides[3], 1, bias=bias, **dd)
        self.norm4 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""
        check_images(x, self.conv1)
        x = convolution(self.conv1, x, self.norm1, self.act)
        x = convolution(self.conv2, x, self.norm2, self.act)
        x = convolution(self.conv3, x, self.norm3, self.act)
        return convolution(self.conv4, x, self.norm4)


@register_notrace_module
class Downsample(nn.Module):
    """3 x 3 convolution with stride 2, batch norm: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""
        return convolution(self.reduction, x, self.norm)
