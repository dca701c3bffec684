"""Deterministic weights and inputs, and the comparison with the outputs of an official implementation.

`goldens/<model>.json` holds summaries of a classifier's outputs in float64, `goldens/<model>.<task>.json` those of a
backbone for the task "detect" or "segment": shape, mean, standard deviation and up to 256 values at evenly spaced flat
indices. A tensor of the weights depends on its official key and shape alone.

`official/<family>.json.xz` holds the names and shapes of the official state dicts, and their numbers of parameters, by
our names; a model whose tag changes its shapes has the tag.
"""

import json
import lzma
import math
import re
import zlib
from functools import cache
from pathlib import Path

import torch

_TABLE = re.compile(r"(bias_table|rpb|pos_embed|position_embed|relative_position|pos_emb|rel_height|rel_width)")
_SCALE = re.compile(r"(layer_?scale|gamma\d*$|ls\d?$)")

FOLDER = Path(__file__).parent
Shapes = dict[str, tuple[int, ...]]


def classifiers() -> list[str]:
    """The models that have a golden."""
    return sorted(path.stem for path in (FOLDER / "goldens").glob("*.json") if "." not in path.stem)


def backbones() -> list[tuple[str, str]]:
    """The models and tasks that have a golden of dense prediction."""
    return sorted(tuple(path.stem.split(".")) for path in (FOLDER / "goldens").glob("*.*.json"))


def read(model: str, task: str | None = None) -> dict:
    """The golden of a model as a classifier, or for a task."""
    return json.loads((FOLDER / "goldens" / f"{model}{f'.{task}' if task else ''}.json").read_text())


@cache
def official() -> dict[str, dict]:
    """By model: `keys`, the shapes of the official state dict by name, and `params_M`."""
    paths = sorted((FOLDER / "official").glob("*.json.xz"))
    return {name: entry for path in paths for name, entry in json.loads(lzma.decompress(path.read_bytes())).items()}


def official_weights(model: str, record: dict | None = None) -> dict[str, torch.Tensor]:
    """The weights that a golden was made with; the usual ones without a record."""
    record = record or {}
    if "keys" in record:
        shapes = {key: tuple(shape) for key, (shape, _) in record["keys"].items()}
    else:
        shapes = {key: tuple(shape) for key, shape in official()[model]["keys"].items()}
    found = weights(shapes, record.get("gain", {}))
    return {key: value for key, value in found.items() if key not in record.get("kept", ())}


def weights(shapes: Shapes, gain: dict[str, float]) -> dict[str, torch.Tensor]:
    """A state dict with official keys. Tensors whose key ends in a name of `gain` are multiplied by its factor."""
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
