"""Faster ways to compute some modules on CPUs: layers by oneDNN with what follows, wide maps one image at a time.

All give the module's own result. With hooks, parametrizations, pruned weights and replaced modules, the module itself
is called, since they take effect only then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from zoo.kernels import dispatch
from zoo.kernels.constants import only_traced

__all__ = [
    "by_image",
    "channels_last",
    "convolution",
    "fused_convolution",
    "has_hooks",
    "is_plain",
    "linear",
    "spatial_mean",
]

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


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """`layer(x)` of a linear layer, then `act` if it is given: tokens (..., in_features) to (..., out_features).

    On CPUs, oneDNN computes it, and without a gradient a GELU, ReLU or SiLU along with it. In float32, PyTorch calls
    MKL, which takes up to twice as long on AMD CPUs. With a gradient, maps (B, H, W, in_features) go through a 1 x 1
    convolution: the same product, which PyTorch hands to oneDNN, forward and backward. On one thread, PyTorch does so
    from 16 images on, so that fewer stay a matrix product.
    """
    if is_plain(layer, nn.Linear) and x.shape[-1:] == (layer.in_features,):
        given = _for_onednn(x, layer.weight, layer.bias)
        if given is not None:
            return _followed(_linear, given, act)
        if _for_convolution(x, layer.weight):
            out = F.conv2d(x.contiguous().permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias)
            out = out.permute(0, 2, 3, 1)
            return out if act is None else act(out)
    out = layer(x)
    return out if act is None else act(out)


def convolution(layer: nn.Module, x: Tensor, norm: nn.Module | None = None, act: nn.Module | None = None) -> Tensor:
    """`layer(x)` of a convolution, NCHW, then `norm` and `act` if they are given; see `fused_convolution`."""
    out = None
    if is_plain(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        options = layer.padding, layer.stride, layer.dilation, layer.groups
        out = fused_convolution(x, layer.weight, layer.bias, *options, norm, act)
    if out is None:
        out = layer(x)
        out = out if norm is None else norm(out)
        out = out if act is None else act(out)
    return out


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W), copied to channels-last on CPUs, so that the maps of the stem are too.

    The layers that follow the stem's convolutions then need no copies. Without a gradient, oneDNN computes these
    convolutions with what follows; see `fused_convolution`.
    """
    if only_traced(images) or images.device.type != "cpu" or images.ndim != 4:
        return images
    if _is_channels_last(images):
        return images
    # A transposed matrix is copied 20 times as fast as `contiguous` copies images of three channels.
    batch, channels, height, width = images.shape
    pixels = images.flatten(2).transpose(1, 2).contiguous()
    return pixels.flatten().view(batch, height, width, channels).permute(0, 3, 1, 2)


def _is_channels_last(maps: Tensor) -> bool:
    """Whether oneDNN takes maps (B, C, H, W) as channels-last; contiguous maps of one channel are both to PyTorch."""
    return maps.is_contiguous(memory_format=torch.channels_last) and maps.stride(1) == 1


def spatial_mean(maps: Tensor) -> Tensor:
    """The mean of maps over their pixels: (B, C, H, W) -> (B, C), in the dtype of the maps.

    On CPUs, PyTorch's mean of bfloat16 first copies the maps to float32. Its pooling does not, and sums in float32 too.
    """
    if maps.dtype != torch.bfloat16 or maps.device.type != "cpu" or only_traced(maps) or torch.is_grad_enabled():
        return maps.mean(dim=(2, 3))
    return F.avg_pool2d(maps, maps.shape[2:]).flatten(1)


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: str | tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
) -> Tensor | None:
    """A convolution by oneDNN with what follows: batch norm joins its weights, and it computes an activation too.

    Returns None if that can't be done. It can on CPUs, outside of torch.export, for channels-last maps, if no gradient
    is needed. Batch norm has to be in evaluation mode, and the padding consists of zeros.
    """
    given = _for_onednn(x, weight, bias)
    if given is None or isinstance(padding, str) or x.ndim != 4 or x.shape[1] != weight.shape[1] * groups:
        return None
    if not _is_channels_last(x):
        return None
    if norm is not None:
        if not is_plain(norm, nn.BatchNorm2d) or norm.training or norm.running_mean is None or norm.running_var is None:
            return None
        if dispatch.again_differentiable(norm.weight, norm.bias):
            return None
        x, weight, bias = dispatch.autocast(given[0], *_with_norm(weight, bias, norm))
        given = x, weight, bias
    return _followed(_convolution, (*given, padding, stride, dilation, groups), act)


def _with_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that includes the batch norm after it."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    mean, scale = mean.float(), (variance.float() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if norm.bias is None else shift + norm.bias
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def _for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The arguments in the dtype of a layer, if oneDNN can compute it without autograd and nothing traces it."""
    # A weight that is a tensor subclass (quantized, sharded) may only support the layer itself.
    if (
        (only_traced(x) and not dispatch.compiled_for_cpu(x))
        or x.device.type != "cpu"
        or x.numel() == 0
        or type(weight) not in (Tensor, nn.Parameter)
        or dispatch.again_differentiable(x, weight, bias)
    ):
        return None
    x, weight, bias = dispatch.autocast(x, weight, bias)
    if any(other is not None and other.dtype != x.dtype for other in (weight, bias)):
        return None
    return (x, weight, bias) if _onednn_computes(x.dtype) else None


@torch.compiler.assume_constant_result  # Dynamo cannot trace these calls
def _onednn_computes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _for_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch hands a linear layer to oneDNN as a convolution, but not as it is."""
    # Exported programs keep the linear layer, since they may run elsewhere. Under autocast, PyTorch uses oneDNN anyway.
    # A weight that is a tensor subclass (quantized, sharded) may not support convolutions. Other tokens than maps could
    # be a map of one row, but Inductor loses the strides of such a map, and copies it to NCHW and back.
    return not (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
        or not (x.dtype == weight.dtype == torch.float32)
        or x.numel() == 0
        or x.ndim != 4
        or type(weight) not in (Tensor, nn.Parameter)
        or torch.is_autocast_enabled("cpu")
        or not _HAS_ONEDNN
        # PyTorch's own convolution would compute it, slower than a matrix product.
        or (not torch.compiler.is_compiling() and x.shape[0] < 16 and torch.get_num_threads() == 1)
    )


def _followed(operator: Callable[..., Tensor], given: tuple[Any, ...], act: nn.Module | None) -> Tensor:
    """`act` of one of oneDNN's operators. It computes a GELU, a ReLU and a SiLU itself."""
    if act is not None and is_plain(act, nn.GELU):
        return operator(*given, "gelu", act.approximate)
    if act is not None and is_plain(act, nn.ReLU):
        return operator(*given, "relu", "")
    if act is not None and is_plain(act, nn.SiLU):
        return operator(*given, "swish", "")
    out = operator(*given, "none", "")
    return out if act is None else act(out)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, algorithm: str) -> Tensor:
    operator = torch.ops.zoo.onednn_linear if torch.compiler.is_compiling() else _run_linear
    return operator(x, weight, bias, act, algorithm)


def _convolution(x: Tensor, *arguments: Any) -> Tensor:
    operator = torch.ops.zoo.onednn_convolution if torch.compiler.is_compiling() else _run_convolution
    return operator(x, *arguments)


def _run_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, algorithm: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], algorithm)


def _run_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    algorithm: str,
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, act, [], algorithm
    )


# Inductor takes oneDNN's own operators for constant weights only, which it has after freezing a model.
@torch.library.register_fake(torch.library.custom_op("zoo::onednn_linear", _run_linear, mutates_args=()))
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake(torch.library.custom_op("zoo::onednn_convolution", _run_convolution, mutates_args=()))
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: object,
) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return torch.empty_like(out, memory_format=torch.channels_last)


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
