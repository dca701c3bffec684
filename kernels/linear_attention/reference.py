"""Linear attention in plain torch: the definition of the correct result.

Letters: B images, H, W map, N heads, D head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.rotation import rotated


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    feature_map: str,
    key_weights: str,
    normalization: str,
    rope: tuple[float, ...] | None,
    scale: float,
    eps: float,
    denominator_min: float,
    temperature: Tensor | None,
) -> Tensor:
    """See `op.linear_attention`, which checks the arguments."""
    _, height, width, _ = checks.sizes(q)
    tokens = height * width

    def heads(x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, N, T, D)

    dtype = torch.promote_types(q.dtype, torch.float32)
    features = [x.to(dtype).relu() if feature_map == "relu" else _elu_plus_one(x.to(dtype)) for x in (q, k)]
    query, key = map(heads, features)
    turned_query, turned_key = (heads(x if rope is None else rotated(x, rope, num_heads)) for x in features)
    value = heads(v.to(dtype))
    if key_weights == "softmax":
        logits = scale * key @ query.mean(2, keepdim=True).transpose(-2, -1)
        weights = logits.softmax(2)  # (B, N, T, 1)
    else:
        weights = torch.full_like(key[..., :1], 1 / tokens)

    z = query @ (weights * key).sum(2)[..., None]  # (B, N, T, 1)
    y = turned_query @ ((weights * turned_key).transpose(-2, -1) @ value)  # (B, N, T, D)
    if normalization == "offset":
        z, y = scale * z, scale * y
    denominator = z + eps
    if denominator_min > 0:
        denominator = denominator.clamp(min=denominator_min / tokens)
    if normalization == "offset":
        out = (1 + 1 / denominator) * y - z * (weights * value).sum(2, keepdim=True)
    else:
        out = y / denominator
    if temperature is not None:
        out = temperature.to(dtype)[:, None, None] * out
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width)).to(q.dtype)


def _elu_plus_one(x: Tensor) -> Tensor:
    return x.relu() + x.clamp(max=0).exp()
