"""Flow attention without `zoo.kernels`: the formula, one operation after the other.

Letters: B images, H, W map, N heads, D head dim, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.peers import Arguments, Contender

# Operations of the backward pass, relative to those of the forward pass: four matrix products to two.
BACKWARD_FLOPS = 2.0


def flops(arguments: Arguments) -> int:
    """Operations per element of the output, forward: two matrix products, and four products with a vector."""
    return 4 * int(arguments["q"].shape[-1]) // int(arguments["num_heads"]) + 8


def _plain(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    _, height, width, _ = q.shape
    # Half precision cannot hold the sums over the tokens.
    query, key, value = (x.float().flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    query, key = query.sigmoid(), key.sigmoid()  # (B, N, T, D)

    def flow(x: Tensor, total: Tensor) -> Tensor:
        return ((x + eps) * (total[:, :, None] + eps)).sum(-1) + eps

    incoming, outgoing = flow(query, key.sum(2)), flow(key, query.sum(2))
    received = flow(query, (key / outgoing[..., None]).sum(2))
    sent = flow(key, (query / incoming[..., None]).sum(2)).clamp(-1, 1)
    value = value * (sent.softmax(-1) * (height * width))[..., None]
    out = (query / incoming[..., None]) @ (key.transpose(-2, -1) @ value) * received.sigmoid()[..., None]
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width)).to(q.dtype)


PEERS = (Contender("plain", _plain),)
