"""MMCV's operators without compiling MMCV: a stand-in for its extension `mmcv._ext`, backed by torchvision.

`mmcv.ops` wraps the functions of the extension in autograd functions; most of these write into tensors that they are
given. Each function here has the name, the arguments and the effect of the extension's, on CPUs and on GPUs. Only the
functions that detectors and segmentors commonly call are implemented; the others raise an error when they are called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from zoo.messages import UserError
from zoo.recipes.logs import log

NAME = "mmcv._ext"


def install() -> None:
    """Make `mmcv.ops` importable: with its compiled operators if MMCV has them, otherwise with torchvision's.

    Call this before anything imports `mmcv.ops`, as mmdet and mmseg do. Calling it again changes nothing.
    """
    try:
        importlib.import_module(NAME)
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        log.warning("mmcv's compiled operators can't be loaded (%s): torchvision's take their place.", error)
    else:
        return
    sys.modules[NAME] = _StandIn()


class _StandIn(ModuleType):
    def __init__(self):
        super().__init__(NAME, __doc__)
        # mmengine looks for the extension with importlib.util.find_spec, which refuses modules without a spec.
        self.__spec__ = ModuleSpec(NAME, loader=None)
        for function in PROVIDED:
            setattr(self, function.__name__, function)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

        def missing(*args, **kwargs) -> NoReturn:
            raise UserError(
                f"mmcv was installed without compiled operators and {name!r} has no replacement from torchvision: "
                "choose a model that does not call it, or install an mmcv that was compiled with MMCV_WITH_OPS=1."
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (int64) of the boxes (N, 4) to keep, best first; widths and heights are x2 - x1 + `offset`."""
    boxes = _at_least_float32(boxes)
    # NMS does not depend on a common shift of all boxes: only their far corners have to include the last pixel.
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS: write the kept boxes and their new scores to the first rows of `dets` (N, 5), and return their indices.

    `method` 0 removes boxes that overlap the chosen one by `iou_threshold` or more, 1 multiplies their scores by
    1 - IoU, 2 multiplies all scores by exp(-IoU^2 / sigma). A box whose score falls below `min_score` is dropped.
    """
    far = boxes[:, 2:] + offset
    areas = (far - boxes[:, :2]).prod(dim=1)
    scores = scores.clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(left):
        position = scores[left].argmax()
        best = left[position]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = torch.cat([left[:position], left[position + 1 :]])
        sides = (torch.minimum(far[best], far[left]) - torch.maximum(boxes[best, :2], boxes[left, :2])).clamp(min=0)
        overlap = sides.prod(dim=1)
        iou = overlap / (areas[best] + areas[left] - overlap)
        if method == 2:
            factor = (-(iou**2) / sigma).exp()
        else:
            factor = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0.0, 1.0)
        scores[left] *= factor
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write RoIAlign of `input` (B, C, H, W) at `rois` (R, 5: image, x1, y1, x2, y2) to `output` (R, C, h, w).

    Raises:
        UserError: `pool_mode` is 0, the maximum, which torchvision does not have.
    """
    if pool_mode == 0:
        raise UserError(
            "mmcv was installed without compiled operators, and torchvision's RoIAlign has no pool_mode='max': use "
            "'avg', or install an mmcv that was compiled with MMCV_WITH_OPS=1."
        )
    input = _at_least_float32(input)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(input, rois.to(input.dtype), size, spatial_scale, sampling_ratio, bool(aligned))
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of `roi_align_forward` to `grad_input` (B, C, H, W)."""
    grad = _at_least_float32(grad_output)
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois.to(grad.dtype), spatial_scale, *size, *grad_input.shape, sampling_ratio, bool(aligned)
        )
    )


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Deformable convolution of `input` (B, C, H, W), written to `output`.

    Args:
        input, weight, offset, output: offsets (B, 2 G K K, h, w) in pixels, y before x, for each of G groups of
            channels and each tap of the kernel.
        columns, ones: buffers of the extension.
        geometry: kW, kH, dW, dH (stride), padW, padH, dilationW, dilationH, group, deformable_group, im2col_step.
    """
    output.copy_(torch.ops.torchvision.deform_conv2d(*_deform_arguments(input, weight, offset, geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Write the gradients with respect to `input` and `offset` to `grad_input` and `grad_offset`."""
    grads = _deform_backward(grad_output, *_deform_arguments(input, weight, offset, geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry: int,
) -> None:
    """Add `scale` times the gradient of `deform_conv_forward` with respect to the weight to `grad_weight`."""
    # The gradient with respect to the weight does not depend on the weight, which is not an argument here.
    arguments = _deform_arguments(input, torch.zeros_like(grad_weight), offset, geometry)
    grad_weight.add_(_deform_backward(grad_output, *arguments)[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Deformable convolution whose taps are weighted by `mask` (B, G K K, h, w), written to `output`.

    Args:
        input, weight, offset: as in `deform_conv_forward`.
        bias: (channels,) if `with_bias`.
        mask: A factor for each offset.
        output: (B, channels, h, w).
        ones, columns: buffers of the extension.
        with_bias: Whether `bias` is added.
        geometry: kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group,
            deformable_group.
    """
    bias = bias if with_bias else None
    output.copy_(torch.ops.torchvision.deform_conv2d(*_deform_arguments(input, weight, offset, geometry, mask, bias)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write the gradients of `modulated_deform_conv_forward` to `grad_input`, `grad_weight`, ..."""
    bias = bias if with_bias else None
    grads = _deform_backward(grad_output, *_deform_arguments(input, weight, offset, geometry, mask, bias))
    for ours, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        ours.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def _deform_arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    geometry: dict[str, int],
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple:
    """The arguments of torchvision's deformable convolution; its backward takes the gradient first, then the same."""
    input = _at_least_float32(input)
    use_mask = mask is not None
    mask = input.new_zeros(len(input), 1) if mask is None else mask
    bias = input.new_zeros(len(weight)) if bias is None else bias
    old_names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
    new_names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    sizes = [geometry[name] for name in (old_names if "dH" in geometry else new_names)]
    tensors = [input, *(x.to(input.dtype).contiguous() for x in (weight, offset, mask, bias))]
    return (*tensors, *sizes, geometry["group"], geometry["deformable_group"], use_mask)


def _deform_backward(grad_output: Tensor, input: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The gradients with respect to input, weight, offset, mask and bias."""
    return torch.ops.torchvision._deform_conv2d_backward(grad_output.to(input.dtype), input, *arguments)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of logits (N, C) for labels (N,) to `output` (N, C); labels outside 0..C-1 are background.

    -alpha (1 - p)^gamma log(p) where the class is the label's, -(1 - alpha) p^gamma log(1 - p) elsewhere, times the
    `weight` (C,) of the label unless it is empty.
    """
    _, factor, logit = _focal(input, target, weight, alpha)
    log_p = F.logsigmoid(logit)
    output.copy_(-factor * (1 - log_p.exp()) ** gamma * log_p)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss with respect to its logit to `grad_input` (N, C)."""
    sign, factor, logit = _focal(input, target, weight, alpha)
    log_p = F.logsigmoid(logit)
    p = log_p.exp()
    grad_input.copy_(-sign * factor * (1 - p) ** gamma * (1 - p - gamma * p * log_p))


def _focal(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each logit: 1 at the label and -1 elsewhere, the factor of the loss, and the logit of the correct answer."""
    hit = target[:, None] == torch.arange(input.shape[1], device=input.device)
    input = _at_least_float32(input)
    factor = torch.where(hit, alpha, 1 - alpha).to(input.dtype)
    if weight.numel():
        factor = factor * weight[target][:, None]
    sign = torch.where(hit, 1.0, -1.0).to(input.dtype)
    return sign, factor, sign * input


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention with mmcv's own PyTorch function: (B, Q, N D).

    Args:
        value: (B, K, N, D), the tokens of all levels one after the other.
        value_spatial_shapes: (L, 2), height and width of each level.
        value_level_start_index: (L,), which follows from the shapes.
        sampling_locations: (B, Q, N, L, P, 2), x and y from 0 to 1.
        attention_weights: (B, Q, N, L, P).
        im2col_step: Images that the extension computes at a time.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # only importable after `install`

    # As plain numbers, the sizes need one synchronization, not one at each use.
    shapes = value_spatial_shapes.tolist()
    return multi_scale_deformable_attn_pytorch(value, shapes, sampling_locations, attention_weights).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward`, which is computed again, to `grad_value`, ..."""
    value, locations, weights = (x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights))
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, locations, weights, im2col_step
        )
    grads = torch.autograd.grad(output, (value, locations, weights), grad_output)
    for ours, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        ours.copy_(grad)


def get_compiler_version() -> str:
    """The entry in mmcv's list of versions."""
    return "none: operators from torchvision"


def get_compiling_cuda_version() -> str:
    """The entry in mmcv's list of versions."""
    return "none: operators from torchvision"


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32: torchvision lacks it on some devices, and it is too coarse for boxes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


PROVIDED = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)
