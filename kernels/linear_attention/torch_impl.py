"""Linear attention in PyTorch, fast on CPUs.

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
        return x.unflatten(-1, (num_heads, -1)).flatten(1, 2).transpose(1, 2)  # (B, N, T, D)

    dtype = torch.promote_types(q.dtype, torch.float32)
    value = heads(v.to(dtype))
    features = [_features(x.to(dtype), feature_map) for x in (q, k)]
    query, key = turned_query, turned_key = [heads(x) for x in features]
    if rope is not None:
        turned_query, turned_key = (heads(rotated(x, rope, num_heads)) for x in features)

    # The weights have the sum 1 over the tokens. Uniform ones are applied to the sums, not to each key.
    weight = 1 / tokens
    if key_weights == "softmax":
        weights = (key @ (scale * query.mean(2)[..., None])).softmax(2)  # (B, N, T, 1)
        mean_key = weights.transpose(-2, -1) @ key  # (B, N, 1, D)
        turned_key, weight = weights * turned_key, 1.0
    else:
        mean_key = weight * key.sum(2, keepdim=True)
    matrix = weight * (turned_key.transpose(-2, -1) @ value)  # (B, N, D, D)

    factor = scale if normalization == "offset" else 1.0
    z = factor * (query @ mean_key.transpose(-2, -1))  # (B, N, T, 1)
    inverse = z + eps
    if denominator_min > 0:
        inverse = inverse.clamp(min=denominator_min / tokens)
    inverse = inverse.reciprocal()
    by_head = None if temperature is None else temperature.to(dtype)[:, None, None]
    if by_head is not None:
        matrix = by_head * matrix
    if normalization == "ratio":
        out = inverse * (turned_query @ matrix)
    else:
        mean_value = weights.transpose(-2, -1) @ value if key_weights == "softmax" else value.mean(2, keepdim=True)
        mean_value = mean_value if by_head is None else by_head * mean_value
        out = (factor + factor * inverse) * (turned_query @ matrix) - z * mean_value
    return out.to(q.dtype).transpose(1, 2).flatten(2).unflatten(1, (height, width))


def _features(x: Tensor, feature_map: str) -> Tensor:
    # torch.nn.functional.elu is slow on CPUs, and loses the digits of small features.
    return x.relu() if feature_map == "relu" else torch.maximum(x + 1, x.clamp(max=0).exp())
