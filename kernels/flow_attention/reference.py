"""Flow attention in plain torch: the definition of the correct result.

Letters: B images, H, W map, N heads, D head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """See `op.flow_attention`, which checks the arguments."""
    _, height, width, _ = checks.sizes(q)
    dtype = torch.promote_types(q.dtype, torch.float32)

    def heads(x: Tensor) -> Tensor:
        return x.to(dtype).flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, N, T, D)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return (x + eps) @ (total + eps).transpose(-2, -1) + eps  # (B, N, T, 1)

    sink, source, value = heads(q).sigmoid(), heads(k).sigmoid(), heads(v)
    incoming = flow(sink, source.sum(2, keepdim=True))
    outgoing = flow(source, sink.sum(2, keepdim=True))
    received = flow(sink, (source / outgoing).sum(2, keepdim=True))
    sent = flow(source, (sink / incoming).sum(2, keepdim=True))
    weights = height * width * sent.clamp(-1, 1).softmax(2)
    out = received.sigmoid() / incoming * (sink @ (source.transpose(-2, -1) @ (weights * value)))
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width)).to(q.dtype)
