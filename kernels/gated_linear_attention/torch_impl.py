"""Gated linear attention in PyTorch, fast on CPUs: matrix products over chunks of tokens.

A block of tokens is made of two halves. A later half attends to an earlier one across their border, so the decay of a
pair of tokens is the product of two decays: of the key up to the border, and of the query from there. Both are products
of gates, at most 1, whatever the gates are; the quotients of other chunked forms would overflow. Blocks are merged in
this way from single tokens to chunks, and the states of chunks from chunk to chunk, so that all loops have as many
steps as the numbers have bits. The reverse direction has the same blocks, with the halves in the other order.

Letters: B images, T tokens, N heads, K channels of a key, V channels of a value, G = B N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks, dispatch

CHUNK = 16  # tokens
# Numbers of the queries that are computed at once in inference; a head of 8192 tokens has as many.
PART = 1 << 17
OPEN_CHUNK = 64  # if the number of tokens is symbolic


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, *, scale: float
) -> Tensor:
    """See `op.gated_linear_attention`, which checks the arguments."""
    batch, tokens, num_heads, channels = checks.sizes(q)
    if _all_at_once(q) or batch * num_heads * tokens * channels <= PART:
        return _attention(q, k, v, log_gates, reverse_log_gates, scale=scale)
    heads = max(1, min(num_heads, PART // (tokens * channels)))
    images = max(1, PART // (tokens * channels * num_heads))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for image in range(0, batch, images):
        for head in range(0, num_heads, heads):
            part = (slice(image, image + images), slice(None), slice(head, head + heads))
            reverse = None if reverse_log_gates is None else reverse_log_gates[part]
            out[part] = _attention(q[part], k[part], v[part], log_gates[part], reverse, scale=scale)
    return out


def _all_at_once(q: Tensor) -> bool:
    """Whether the images and heads share one graph, or aren't computed on a CPU, whose cache a part fits in."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or dispatch.transformed()
    return traced or torch.is_grad_enabled() or q.device.type != "cpu"


def _attention(
    q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, *, scale: float
) -> Tensor:
    """The attention of some images and heads."""
    _, tokens, num_heads, _ = checks.sizes(q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    symbolic = _symbolic(tokens)
    if symbolic:
        # torch.export treats a single chunk as another case, so there are two or more.
        length, per_group, count = OPEN_CHUNK, 1, (tokens + 2 * OPEN_CHUNK - 1) // OPEN_CHUNK
    else:
        length, per_group = CHUNK, _chunks_per_group(-(-tokens // CHUNK))
        count = -(-tokens // (CHUNK * per_group)) * per_group

    def chunks(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if symbolic or count * length != tokens:
            x = F.pad(x, (0, 0, 0, 0, 0, count * length - tokens))
        return x.transpose(1, 2).flatten(0, 1).unflatten(1, (count, length)).flatten(0, 1).contiguous()  # (X, length, )

    query, key, value = scale * chunks(q), chunks(k), chunks(v)
    logs = [chunks(x) for x in (log_gates, reverse_log_gates) if x is not None]
    # What a token attends to in its block: at first itself, in each direction.
    weights = (len(logs) * (query * key).sum(-1))[..., None, None]  # (X, blocks, size, size)
    scans = [(query * gate, key, gate) for gate in (x.exp() for x in logs)]
    size = 1
    while size < length:
        merged = [_merge(*scan, size, reverse) for scan, reverse in zip(scans, (False, True), strict=False)]
        scans = [scan for _, scan in merged]
        below = merged[0][0]
        above = merged[1][0] if len(merged) == 2 else torch.zeros_like(below)
        first, second = weights.unflatten(1, (-1, 2)).unbind(2)
        weights = torch.cat((torch.cat((first, above), -1), torch.cat((below, second), -1)), -2)
        size *= 2

    out = weights.squeeze(1) @ value
    for i, (query, key, decay) in enumerate(scans):
        states = (key.mT @ value).unflatten(0, (-1, count))  # (G, chunks, K, V)
        if symbolic:
            before = _weighted_before(states, logs[i].sum(1).unflatten(0, (-1, count)), reverse=i == 1)
        else:
            grouped, decays = (
                x.unflatten(0, (-1, count // per_group, per_group)) for x in (states.flatten(0, 1), decay.mT)
            )
            before = _states_before(grouped, decays, reverse=i == 1).flatten(1, 2)
        out = torch.baddbmm(out, query, before.flatten(0, 1))
    out = out.unflatten(0, (-1, count)).flatten(1, 2)
    if symbolic:  # torch.export would have to prove that a slice is not contiguous
        out = out.index_select(1, torch.arange(tokens, device=out.device))
    else:
        out = out[:, :tokens]
    return out.unflatten(0, (-1, num_heads)).transpose(1, 2).to(q.dtype)


def _symbolic(size: int) -> bool:
    """Whether the program that is traced now is for more than one value of `size`."""
    if isinstance(size, int) and not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)


def _chunks_per_group(chunks: int) -> int:
    """A power of two, up to 16, that leaves the last group nearly full."""
    count = 16
    while 8 * (-chunks % count) > chunks:
        count //= 2
    return count


def _merge(
    query: Tensor, key: Tensor, decay: Tensor, size: int, reverse: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Merge pairs of blocks: the weights of the earlier block's tokens for the later block's, and the larger blocks.

    Args:
        query: (X, length, K), each query decayed from before its block up to its token.
        key: (X, length, K), each key decayed from its token up to the end of its block.
        decay: (X, length / size, K), of all of a block.
        size: The tokens of a block.
        reverse: Whether the second block of a pair is the earlier one.
    """
    query, key = (x.unflatten(1, (-1, 2, size)) for x in (query, key))
    first, second = decay.unflatten(1, (-1, 2)).unbind(2)
    earlier, later = (1, 0) if reverse else (0, 1)
    rows, columns = query[:, :, later], key[:, :, earlier]
    weights = (rows * columns).sum(-1, keepdim=True) if size == 1 else rows @ columns.mT
    same = torch.ones_like(first)
    query = query * torch.stack((second, same) if reverse else (same, first), 2)[..., None, :]
    key = key * torch.stack((same, first) if reverse else (second, same), 2)[..., None, :]
    return weights, (query.flatten(1, 3), key.flatten(1, 3), first * second)


def _states_before(states: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The sum of all earlier chunks' `states`, decayed, for each chunk.

    Args:
        states: (G, groups, chunks, K, V), of each chunk alone, at its end. The chunks of a group are a power of two.
        decay: (G, groups, chunks, K, 1), of all of a chunk.
        reverse: Whether chunks are earlier the later they come.
    """
    if states.shape[2] == 1:
        return _groups_before(states, decay, reverse)
    (first, second), (first_decay, second_decay) = (x.unflatten(2, (-1, 2)).unbind(3) for x in (states, decay))
    if reverse:
        first, second, first_decay, second_decay = second, first, second_decay, first_decay
    both = torch.addcmul(second, second_decay, first)
    before = _states_before(both, first_decay * second_decay, reverse)
    between = torch.addcmul(first, first_decay, before)
    return torch.stack((between, before) if reverse else (before, between), 3).flatten(2, 3)


def _groups_before(states: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The same for groups of one chunk each: the sums of 1, 2, 4, ... earlier ones."""
    groups, distance = states.shape[1], 1
    states, decay = (_earlier(x, 1, reverse) for x in (states, decay))
    while distance + 1 < groups:
        states = torch.addcmul(states, decay, _earlier(states, distance, reverse))
        decay = decay * _earlier(decay, distance, reverse)
        distance *= 2
    return states


def _earlier(x: Tensor, distance: int, reverse: bool) -> Tensor:
    """For each group, x (G, groups, ...) of the one that is `distance` groups earlier, or 0."""
    around = (0, distance) if reverse else (distance, 0)
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, *around))
    return padded[:, distance:] if reverse else padded[:, : x.shape[1]]


def _weighted_before(states: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    """The same for a symbolic number of chunks, (G, chunks, K, V), with the weights of all pairs of chunks.

    `log_decay` (G, chunks, K) is summed up in float64: its differences would lose their digits.
    """
    chunk = torch.arange(states.shape[1], device=states.device)
    log_decay = log_decay.double().clamp(min=-800)  # -inf - -inf would be NaN
    through = log_decay.cumsum(1)
    before = through - log_decay
    if reverse:
        between, earlier = before[:, None] - through[:, :, None], chunk[:, None] < chunk
    else:
        between, earlier = before[:, :, None] - through[:, None], chunk[:, None] > chunk
    weights = between.masked_fill(~earlier[None, :, :, None], -torch.inf).exp().to(states.dtype)
    return (weights.permute(0, 3, 1, 2) @ states.transpose(1, 2)).transpose(1, 2)
