"""Arguments of random calls; most values are valid, because a call with a single invalid one is rejected."""

import torch

NUMBERS = (1, 1, 2, 2, 3, 4, 0, -1, True, 1.5, None, (1, 2), (2,), "2")
HEADS = (1, 2, 2, 2, 3, 0, -1, 1.0)
SCALES = (None, None, 0.3, 0, -1.0, 1e4, float("nan"), float("inf"), "1")
SIDES = (1, 2, 4, 4, 6, 6, 12, 17, 0)
TYPES = (torch.float64,) * 6 + (torch.float32, torch.int64)


def tensor(rng, *sizes):
    """A tensor of normal numbers; rarely of a wrong shape or dtype, rarely None."""
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    if rng.random() < 0.05:
        sizes = sizes[: rng.randrange(len(sizes) + 1)]
    if rng.random() < 0.05 and sizes:
        sizes = (*sizes[:-1], rng.choice((0, 1, 5)))
    return None if rng.random() < 0.02 else torch.randn(sizes, generator=g, dtype=torch.float64).to(rng.choice(TYPES))


def mask(rng, *sizes):
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    return rng.choice((None, torch.rand(sizes, generator=g) < rng.choice((0.0, 0.5, 1.0))))


def size(rng):
    """Batch, rows and columns of a map."""
    return rng.choice((0, 1, 2)), rng.choice(SIDES), rng.choice(SIDES)


def attention(rng):
    """Tensors and options of attention within one map."""
    sizes = size(rng)
    tensors = {"qkv": tensor(rng, *sizes, rng.choice((12, 12, 12, 24, 8, 0))), "key_mask": mask(rng, *sizes)}
    return tensors, {"num_heads": rng.choice(HEADS), "scale": rng.choice(SCALES)}


def bias_table(rng, side):
    """A bias table for windows or kernels of `side` if that is an int, or nothing."""
    if rng.random() < 0.5 and isinstance(side, int):
        return {"bias_table": tensor(rng, 2, *(max(0, 2 * side - 1),) * 2)}
    return {}
