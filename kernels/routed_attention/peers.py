"""Routed attention without `zoo.kernels`: the keys and values of the routes are gathered.

Letters: B images, T tokens of a region, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.peers import Arguments, Contender, sdpa, softmax
from zoo.kernels.windows import partition, unpartition

# Operations of the backward pass, relative to those of the forward pass: five matrix products to two.
BACKWARD_FLOPS = 2.5


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward."""
    _, height, width, _ = arguments["k"].shape
    return 4 * arguments["routes"].shape[2] * (height * width // arguments["regions"] ** 2)


def _gather(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    q, regions, heads = given["q"], given["regions"], given["num_heads"]

    def cut(x: Tensor) -> Tensor:
        return partition(x, (x.shape[1] // regions, x.shape[2] // regions), "block")  # (B, regions, T, C)

    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    key, value = (cut(given[name])[image, given["routes"]].flatten(2, 3) for name in ("k", "v"))
    query, key, value = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (cut(q), key, value))
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query, key, value, None, scale).transpose(1, 2).flatten(-2).unflatten(0, (-1, regions**2))
    size = (q.shape[1] // regions, q.shape[2] // regions)
    return unpartition(out, size, tuple(q.shape[1:3]), "block")


PEERS = (
    Contender("gather, sdpa", partial(_gather, sdpa)),
    Contender("gather, softmax", partial(_gather, softmax)),
)
