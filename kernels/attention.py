"""Attention of many small sets of tokens in PyTorch, shared by the operators' fast paths.

Letters: T queries, K keys, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import dispatch


def fused(*tensors: Tensor | None) -> bool:
    """Whether to use PyTorch's fused attention: where it may be and no gradients of `tensors` are wanted.

    On CPUs its gradients are slow, in bfloat16 several times, and have no gradients themselves; torch.func and
    forward-mode differentiation don't work with it at all. Exported programs are for inference.
    """
    if not dispatch.fused_allowed() or dispatch.transformed():
        return False
    return torch.compiler.is_exporting() or not dispatch.again_differentiable(*tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, fuse: bool) -> Tensor:
    """softmax(scale * query @ key^T + bias) @ value; logits and softmax of half precision are float32.

    Args:
        query: (..., N, T, D).
        key: (..., N, K, D).
        value: Like `key`.
        bias: Added to the logits, (..., N, T, K) or of sizes that expand to it; 4 dimensions if `fuse`.
        scale: Of the logits.
        fuse: Whether by PyTorch's fused attention, which takes 4 dimensions.

    Returns:
        (..., T, N, D), in the type of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if fuse:
        if bias is not None:
            # Only on CPUs does it take a bias of float32 beside half precision, and ONNX has no such addition.
            wide = query.device.type == "cpu" and not torch.compiler.is_exporting()
            bias = bias.to(dtype if wide else query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(-3, -2)
        # Other machines than the one that a program is exported on lay the output out differently.
        return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out
    logits = (scale * query.to(dtype)) @ key.to(dtype).transpose(-2, -1)
    weights = (logits if bias is None else logits + bias.to(dtype)).softmax(-1)
    return (weights @ value.to(dtype)).to(query.dtype).transpose(-3, -2)
