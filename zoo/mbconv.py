"""Inverted residual convolutions and their stem, as TensorFlow pads them.

With stride 2, an even side gets zeros at its end only. Maps between the layers of a block are NCHW; blocks take and
return tokens (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath, SqueezeExcite, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.cpu import by_image, convolution, fused_convolution, is_plain
from zoo.kernels import certain, sizes
from zoo.layers import check_images

__all__ = ["HalfPool2d", "MBConv", "SamePool2d", "Stem", "StridedConv2d"]


def same_padding(n: int) -> tuple[int, int]:
    """Zeros before and after n pixels, such that a 3 x 3 convolution with stride 2 gives ceil(n / 2), as in TensorFlow.

    An even side gets one zero, at its end. PyTorch's padding of 1 would shift the output by one pixel of the input.
    """
    # The end always gets 1. In this form torch.export can prove that 2 * ceil(n / 2) + 1 rows become ceil(n / 2).
    return n % 2, 2 * ((n + 1) // 2) + 1 - n - n % 2


@register_notrace_module
class StridedConv2d(nn.Conv2d):
    """3 x 3 convolution with stride 2 and `same_padding`."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__(in_dim, dim, 3, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""
        height, width = sizes(x)[2:]
        return super().forward(F.pad(x, (*same_padding(width), *same_padding(height))))


@register_notrace_module
class TurnedConv2d(nn.Conv2d):
    """A depth-wise `StridedConv2d` on maps rotated by 180 degrees: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    The rotated map needs its zeros at the beginning, where PyTorch's padding of 1 has them, so no map is copied to pad
    it.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, 3, 2, padding=1, groups=dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, padding = self.weight.flip(2, 3), 1
        if torch.compiler.is_exporting():  # torch.export can't prove that the size is the same
            height, width = sizes(x)[2:]
            x, padding = F.pad(x, (*same_padding(width)[::-1], *same_padding(height)[::-1])), 0
        return F.conv2d(x, weight, None, 2, padding, 1, self.groups)


def turned_convolution(layer: nn.Module, x: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
    """`convolution` of a `TurnedConv2d` or of another convolution."""
    out = None
    if is_plain(layer, TurnedConv2d):
        options = layer.padding, layer.stride, layer.dilation, layer.groups
        out = fused_convolution(x, layer.weight.flip(2, 3), None, *options, norm, act)
    return convolution(layer, x, norm, act) if out is None else out


@register_notrace_module
class HalfPool2d(nn.Module):
    """Mean of 2 x 2 pixels with stride 2, of fewer at the end of an odd side."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
        right, bottom = (2 * ((n + 1) // 2) - n for n in sizes(x)[:1:-1])
        if not (certain(right == 0) and certain(bottom == 0)):
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")  # the mean of a pixel and its copy is the pixel
        return F.avg_pool2d(x, 2)


@register_notrace_module
class SamePool2d(nn.Module):
    """Mean of 3 x 3 pixels with stride 2 and `same_padding`, whose zeros do not count."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
        height, width = sizes(x)[2:]
        padding = (*same_padding(width), *same_padding(height))
        share = F.avg_pool2d(F.pad(x.new_ones(1, 1, height, width), padding), 3, 2)  # of pixels that are not padding
        return F.avg_pool2d(F.pad(x, padding), 3, 2) / share


@register_notrace_module
class Stem(nn.Module):
    """3 x 3 convolution with stride 2, batch norm, GELU, 3 x 3 convolution.

    Args:
        in_chans: Channels of the images.
        dim: Channels of the output.
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        norm_layer: Makes the batch norm.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        approximate: str = "none",
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = StridedConv2d(in_chans, dim, **dd)
        self.norm = norm_layer(dim, **dd)
        self.act = nn.GELU(approximate)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, ceil(H/2), ceil(W/2))."""
        check_images(x, self.conv1)
        return convolution(self.conv2, self.act(self.norm(self.conv1(x))))


@register_notrace_module
class MBConv(nn.Module):
    """Inverted residual on tokens.

    Batch norm comes first, without an activation. The shortcut bypasses it. The hidden width is 4 times `dim`, not C.

    Args:
        in_dim: Channels of the tokens, C.
        dim: Channels of the output.
        stride: 1 or 2, s.
        drop_path: Probability that the residual is left out for an image in training.
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        se: Whether squeeze and excitation follows the depth-wise convolution.
        pool: Makes the pooling of the shortcut with stride 2.
        norm_layer: Makes the batch norms.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        drop_path: float = 0.0,
        approximate: str = "none",
        se: bool = True,
        pool: Callable[[], nn.Module] = HalfPool2d,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden_dim = 4 * dim
        self.norm = norm_layer(in_dim, **dd)
        self.widening = hidden_dim / in_dim
        self.expand = nn.Conv2d(in_dim, hidden_dim, 1, bias=False, **dd)
        self.norm1 = norm_layer(hidden_dim, **dd)
        self.act = nn.GELU(approximate)
        self.turned = stride == 2
        self.dw_conv = (
            TurnedConv2d(hidden_dim, **dd)
            if self.turned
            else nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=False, **dd)
        )
        self.norm2 = norm_layer(hidden_dim, **dd)
        self.se = (
            SqueezeExcite(hidden_dim, rd_channels=max(1, dim // 4), act_layer=nn.SiLU, **dd) if se else nn.Identity()
        )
        self.reduce = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.pool = pool() if stride == 2 else nn.Identity()
        self.shortcut = nn.Conv2d(in_dim, dim, 1, **dd) if in_dim != dim else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/s), ceil(W/s), dim)."""
        if any(norm.training for norm in (self.norm, self.norm1, self.norm2)):
            return self.forward_images(x)
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/s), ceil(W/s), dim), all images at once, as batch norm in training requires."""
        x = x.permute(0, 3, 1, 2)
        branch = self.norm(x)
        if self.turned:  # rotated here because there are fewer channels than after the expansion
            branch = branch.flip(2, 3)
        branch = convolution(self.expand, branch, self.norm1, self.act)
        branch = turned_convolution(self.dw_conv, branch, self.norm2, self.act)
        branch = convolution(self.reduce, self.se(branch))
        if self.turned:
            branch = branch.flip(2, 3)
        return (convolution(self.shortcut, self.pool(x)) + self.drop_path(branch)).permute(0, 2, 3, 1)
