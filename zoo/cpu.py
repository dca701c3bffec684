"""Faster ways to compute some modules on CPUs: linear layers by oneDNN, and wide maps one image at a time.

Both give the module's own result. With hooks, parametrizations, pruned weights and replaced modules, the module itself
is called, since they take effect only then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

__all__ = ["by_image", "has_hooks", "is_plain", "linear"]

WIDE = 16 * 2**20  # bytes
_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # Dynamo cannot trace the call

Kind = TypeVar("Kind", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its `forward`, or another `forward` than that of its class."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own or torch_module._has_any_global_hook()


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling `module` computes only what the class `kind` computes from its weight and bias."""
    return type(module) is kind and not has_hooks(module)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a linear layer: tokens (..., in_features) to (..., out_features).

    On CPUs, oneDNN computes maps (B, H, W, in_features) of float32, in eager mode and compiled. PyTorch calls MKL
    there, which takes twice as long on the AMD CPU of the README's timings. A 1 x 1 convolution is the same product,
    and PyTorch hands it to oneDNN, forward and backward.
    """
    # Exported programs keep the linear layer, since they may run elsewhere. Under autocast, PyTorch uses oneDNN anyway.
    # A weight that is a tensor subclass (quantized, sharded) may not support convolutions. Other tokens than maps could
    # be a map of one row, but Inductor loses the strides of such a map, and copies it to NCHW and back.
    if (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
        or not is_plain(layer, nn.Linear)
        or not (x.dtype == layer.weight.dtype == torch.float32)
        or x.numel() == 0
        or x.ndim != 4
        or x.shape[-1] != layer.in_features
        or type(layer.weight) not in (Tensor, nn.Parameter)
        or torch.is_autocast_enabled("cpu")
        or not _HAS_ONEDNN
    ):
        return layer(x)
    out = F.conv2d(x.contiguous().permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1)


def by_image(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, widening: float) -> Tensor:
    """`function(x)`, one image at a time in inference on CPUs if a map inside it would otherwise exceed 16 MiB.

    A larger map does not fit in the cache, and the C library requests its memory from the system at every call.

    Args:
        module: The module that `function` belongs to. If it or one of its submodules has hooks, they see all images at
            once.
        function: Function from maps to maps, each image independent of the others.
        x: Maps of images, (B, ...).
        widening: The size of the largest map inside `function`, as a multiple of the size of `x`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x)
    if len(x) == 1 or widening * x.numel() * x.element_size() <= WIDE or any(map(has_hooks, module.modules())):
        return function(x)
    return torch.cat([function(image) for image in x.split(1)])
