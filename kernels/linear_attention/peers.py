"""Linear attention without `zoo.kernels`: the formula, one operation after the other.

Letters: B images, H, W map, N heads, D head dim, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.peers import Arguments, Contender

# Operations of the backward pass, relative to those of the forward pass: four matrix products to two.
BACKWARD_FLOPS = 2.0


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward."""
    return 4 * int(arguments["q"].shape[-1]) // int(arguments["num_heads"])


def _plain(**given: Any) -> Tensor:
    q, k, v, heads, rope = (given[name] for name in ("q", "k", "v", "num_heads", "rope"))
    _, height, width, channels = q.shape
    tokens, dim = height * width, channels // heads
    scale = dim**-0.5 if given["scale"] is None else given["scale"]
    # Half precision cannot hold the sums over the tokens.
    query, key, value = (
        x.float().flatten(1, 2).unflatten(-1, (heads, dim)).transpose(1, 2) for x in (q, k, v)
    )  # (B, N, T, D)
    query, key = ((F.relu(x) if given["feature_map"] == "relu" else F.elu(x) + 1) for x in (query, key))
    if given["key_weights"] == "softmax":
        weights = tokens * (scale * key @ query.mean(2, keepdim=True).transpose(-2, -1)).softmax(2)
        key, value_mean = weights * key, (weights * value).mean(2, keepdim=True)
    else:
        value_mean = value.mean(2, keepdim=True)
    z = (query * key.mean(2, keepdim=True)).sum(-1, keepdim=True)
    if rope is not None:
        frequencies = torch.tensor(rope, device=q.device)
        rows, columns = (torch.arange(n, device=q.device)[:, None] * frequencies for n in (height, width))
        angles = torch.cat((rows.repeat_interleave(width, 0), columns.repeat(height, 1)), -1).repeat_interleave(2, -1)
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            across = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos + across * sin

        query, key = turn(query), turn(key)
    out = query @ (key.transpose(-2, -1) @ value / tokens)
    offset = given["normalization"] == "offset"
    z, out = (scale * z, scale * out) if offset else (z, out)
    denominator = (z + given["eps"]).clamp(min=given["denominator_min"] / tokens)
    out = out + out / denominator - z * value_mean if offset else out / denominator
    if given["temperature"] is not None:
        out = out * given["temperature"][:, None, None]
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width)).to(q.dtype)


PEERS = (Contender("plain", _plain),)
