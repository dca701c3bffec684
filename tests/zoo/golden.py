"""Deterministic weights and inputs, and the comparison with what an official implementation made of them.

`goldens/*.json` hold summaries of its outputs in float64: shape, mean, standard deviation and up to 256 values at
evenly spaced flat indices. A tensor of the weights depends on its official key and shape alone.
"""

import json
import math
import re
import zlib
from pathlib import Path

import torch

_TABLE = re.compile(r"(bias_table|rpb|pos_embed|position_embed|relative_position|pos_emb|rel_height|rel_width)")
_SCALE = re.compile(r"(layer_?scale|gamma\d*$|ls\d?$)")

Shapes = dict[str, tuple[int, ...]]


def read(name: str) -> dict:
    return json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())


def weights(shapes: Shapes, gain: dict[str, float]) -> dict[str, torch.Tensor]:
    """A state dict with official keys; tensors whose key ends in a name of `gain` are multiplied by its factor."""
    state_dict = {key: _tensor(key, shape) for key, shape in shapes.items()}
    for key, tensor in state_dict.items():
        tensor *= math.prod(factor for name, factor in gain.items() if key.endswith(name))
    return state_dict


def image(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def difference(output: torch.Tensor, want: dict) -> float:
    """Largest deviation from a stored summary, relative to its standard deviation; inf for another shape or a NaN."""
    if list(output.shape) != want["shape"] or not output.isfinite().all():
        return math.inf
    flat = output.detach().double().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64).round().long()
    values = (flat[index] - torch.tensor(want["values"], dtype=torch.float64)).abs().max().item()
    mean = abs(flat.mean().item() - want["mean"])
    std = abs(flat.std(unbiased=False).item() - want["std"])
    return max(values, mean, std) / max(want["std"], 1e-12)


def _tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    draw = torch.randn(shape, generator=generator, dtype=torch.float64)
    if leaf == "running_var":
        return 0.5 + draw.abs() * 0.5
    if leaf == "running_mean":
        return 0.1 * draw
    if _TABLE.search(key):
        return 0.5 * draw
    if _SCALE.search(key):
        return 0.5 + 0.1 * draw
    if len(shape) >= 2 and max(shape[1:]) * min(shape) > 1:
        return draw / math.sqrt(math.prod(shape[1:]))
    if leaf == "weight":
        return 1.0 + 0.1 * draw
    return 0.1 * draw
