"""Attention of a single query, for loops in the tests of the operators; slow, and independent of zoo.kernels."""

import math


def attend(query, keys, values, logits_added, scale):
    """Attention of one query (D,) to lists of keys and values (D,)."""
    logits = [scale * float(query @ key) + added for key, added in zip(keys, logits_added, strict=True)]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def heads(x, num_heads, parts):
    """(B, H, W, parts N D) -> parts times (B, H, W, N, D)."""
    return x.reshape(*x.shape[:-1], parts, num_heads, -1).unbind(-3)
