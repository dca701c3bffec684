"""Flow attention in PyTorch, fast on CPUs.

Letters: B images, H, W map, N heads, D head dim, C = N D channels, T tokens.

The flows are products of tokens with one vector per head. With the vectors of all heads in one matrix (C, N), which is
zero outside of their blocks, they are matrix products of (T, C), without a copy of the tokens for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.constants import constant


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """See `op.flow_attention`, which checks the arguments."""
    _, height, width, channels = checks.sizes(q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    blocks = constant(_blocks, num_heads, channels // num_heads, dtype, like=q)  # (C, N)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        """Of tokens (B, T, C) and a sum of tokens (B, C): (B, T, N)."""
        matrix = (total + eps)[..., None] * blocks
        return x @ matrix + (eps * matrix.sum(1, keepdim=True) + eps)

    def weighted(x: Tensor, weights: Tensor) -> Tensor:
        """The sum of tokens (B, T, C), weighted by (B, T, N): (B, C)."""
        return ((weights.transpose(1, 2) @ x) * blocks.T).sum(1)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1))  # (B, T, N, D)

    sink, source, value = (x.to(dtype).flatten(1, 2) for x in (q, k, v))
    sink, source = sink.sigmoid(), source.sigmoid()
    share = flow(sink, source.sum(1)).reciprocal()
    sent = flow(source, weighted(sink, share))
    received = flow(sink, weighted(source, flow(source, sink.sum(1)).reciprocal()))
    weights = height * width * sent.clamp(-1, 1).softmax(1)

    value = weights[..., None] * heads(value)
    matrix = heads(source).permute(0, 2, 3, 1) @ value.transpose(1, 2)  # (B, N, D, D)
    out = (heads(sink).transpose(1, 2) @ matrix).transpose(1, 2) * (share * received.sigmoid())[..., None]
    return out.to(q.dtype).flatten(2).unflatten(1, (height, width))


def _blocks(num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, N): which channels are a head's."""
    return torch.eye(num_heads, dtype=dtype, device=device).repeat_interleave(head_dim, 0)
