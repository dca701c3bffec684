"""Layers as CPUs like them: linear layers by oneDNN, and wide maps an image at a time.

Both are only ways to compute what the modules say, and give way to whatever else calling a module would do: hooks,
parametrizations, pruning, another module in its place.
"""

from collections.abc import Callable

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

__all__ = ["Mlp", "by_image", "has_hooks", "is_plain", "linear"]

WIDE = 16 * 2**20  # bytes


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its `forward`, or another one than its class has."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own or torch_module._has_any_global_hook()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what a `kind` does with its weight and bias, and nothing else."""
    return type(module) is kind and not has_hooks(module)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a linear layer: tokens (..., in_features) to (..., out_features).

    On CPUs, in float32 and outside of torch.compile, oneDNN computes it. There, PyTorch's own calls MKL, which takes
    twice as long on the AMD CPU of the README's timings. A 1 x 1 convolution is the same product, and PyTorch has
    oneDNN compute it, forward and backward.
    """
    # What is compiled or exported stays a linear layer, for the compiler to choose; autocast's types have oneDNN
    # anyway; and a weight of a type of its own (quantized, sharded) need not know convolutions.
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
        or not is_plain(layer, nn.Linear)
        or not (x.dtype == layer.weight.dtype == torch.float32)
        or x.numel() == 0
        or x.shape[-1] != layer.in_features
        or type(layer.weight) not in (Tensor, nn.Parameter)
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
    ):
        return layer(x)
    pixels = x.reshape(1, 1, -1, layer.in_features).permute(0, 3, 1, 2)  # (1, in_features, 1, tokens)
    out = F.conv2d(pixels, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], layer.out_features)


@register_notrace_module
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
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU(approximate)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.drop2(linear(self.fc2, self.drop1(self.act(linear(self.fc1, x)))))


def by_image(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, widening: float) -> Tensor:
    """`function(x)`; in inference on CPUs an image at a time, if that needs maps of more than 16 MiB otherwise.

    So much fits no cache, and the C library asks the system for new pages each time.

    Args:
        module: whose function it is; if it or a part of it has hooks, they see all images at once.
        function: from maps to maps, each image by itself.
        x: maps of images, (B, ...).
        widening: how many times larger than `x` the largest map in between is.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x)
    if len(x) == 1 or widening * x.numel() * x.element_size() <= WIDE or any(map(has_hooks, module.modules())):
        return function(x)
    return torch.cat([function(image) for image in x.split(1)])
