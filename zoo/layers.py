"""Layers as CPUs like them: linear layers by oneDNN, and wide maps an image at a time."""

from collections.abc import Callable

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear", "Mlp", "by_image"]

WIDE = 16 * 2**20  # bytes


@register_notrace_module
class Linear(nn.Linear):
    """nn.Linear for tokens (..., in_features), which oneDNN computes on CPUs, in float32 and outside of torch.compile.

    There, PyTorch's own calls MKL, which takes twice as long as oneDNN on the AMD CPU of the README's timings. A 1 x 1
    convolution is the same product, and PyTorch has oneDNN compute it, forward and backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self._as_convolution(x):
            return super().forward(x)
        pixels = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)  # (1, in_features, 1, tokens)
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)

    def _as_convolution(self, x: Tensor) -> bool:
        # What is compiled or exported stays a linear layer, for the compiler to choose; autocast's types have oneDNN
        # anyway; and a weight of a type of its own (quantized, sharded) need not know convolutions.
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() > 0
            and x.shape[-1] == self.in_features
            and type(self.weight) in (Tensor, nn.Parameter)
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )


class Mlp(nn.Module):
    """Linear, GELU, Linear on tokens (..., dim), with dropout after both.

    Args:
        dim: channels of the tokens.
        hidden_dim: channels between the layers.
        drop: probability of both dropouts.
        approximate: of the GELU: "none", or "tanh" for its approximation.
        device, dtype: of the parameters.
    """

    def __init__(
        self, dim: int, hidden_dim: int, drop: float = 0.0, approximate: str = "none", device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU(approximate)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def by_image(function: Callable[[Tensor], Tensor], x: Tensor, widening: float) -> Tensor:
    """`function(x)`; in inference on CPUs an image at a time, if that needs maps of more than 16 MiB otherwise.

    So much fits no cache, and the C library asks the system for new pages each time.

    Args:
        function: from maps to maps, each image by itself.
        x: maps of images, (B, ...).
        widening: how many times larger than `x` the largest map in between is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x)
    if len(x) == 1 or widening * x.numel() * x.element_size() <= WIDE:
        return function(x)
    return torch.cat([function(image) for image in x.split(1)])
