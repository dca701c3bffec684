"""Attention of many small sets of tokens in PyTorch, shared by the operators' `torch_impl.py`.

Letters: T queries, K keys, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import dispatch


def fused(*tensors: Tensor | None) -> bool:
    """Whether to use PyTorch's fused attention: it has to be allowed, and none of `tensors` may need a gradient.

    On CPUs its backward pass is slow, several times slower in bfloat16, and cannot be differentiated. It does not
    support torch.func and forward-mode AD. Exported programs are for inference and use it.
    """
    if not dispatch.fused_allowed() or dispatch.transformed():
        return False
    return torch.compiler.is_exporting() or not dispatch.again_differentiable(*tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, fuse: bool) -> Tensor:
    """softmax(scale * query @ key^T + bias) @ value; logits and softmax are float32 for half precision.

    Args:
        query: (..., N, T, D).
        key: (..., N, K, D).
        value: Like `key`.
        bias: Added to the logits; (..., N, T, K), or sizes that broadcast to it. It has 4 dimensions if `fuse`.
        scale: Factor of the logits.
        fuse: Whether to use PyTorch's fused attention, for which all tensors have 4 dimensions.

    Returns:
        (..., T, N, D), in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if fuse:
        if bias is not None:
            # Only the CPU kernel takes a float32 bias with half-precision inputs, and ONNX cannot add the two.
            wide = query.device.type == "cpu" and not torch.compiler.is_exporting()
            bias = bias.to(dtype if wide else query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(-3, -2)
        # The strides of the output depend on the machine, and an exported program may run on another one.
        return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out
    logits = _products(scale * query.to(dtype), key.to(dtype))
    weights = (logits if bias is None else logits + bias.to(dtype)).softmax(-1)
    return (weights @ value.to(dtype)).to(query.dtype).transpose(-3, -2)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """query @ key^T: (..., T, D) and (..., K, D) to (..., T, K)."""
    if dispatch.compiled_for_cpu(query) and dispatch.again_differentiable(query, key):
        return _Products.apply(query, key)
    return query @ key.transpose(-2, -1)


class _Products(torch.autograd.Function):
    """The gradient of the keys is computed as (..., K, D). Autograd's is transposed, and Inductor copies it slowly."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return query @ key.transpose(-2, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        return grad @ key, grad.transpose(-2, -1) @ query
