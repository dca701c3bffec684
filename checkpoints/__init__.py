"""The known checkpoints, the costs of models and the published figures of recipes, as package data without torch."""

import json
import lzma
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["about", "counts", "dense_counts", "examples", "families", "manifest", "recipes", "shapes"]

# The fields that describe the family itself, not its checkpoints.
_OF_THE_FAMILY = ("names", "attends_to", "examples", "measured")


@cache
def families() -> tuple[str, ...]:
    """The sorted names of the families, which are also the names of their modules in `zoo`."""
    return tuple(sorted(_content("manifest.json")))


def about(family: str) -> dict[str, Any]:
    """What the manifest says about `family` itself; the fields are in `checkpoints/README.md`."""
    return {key: value for key, value in _content("manifest.json")[family].items() if key in _OF_THE_FAMILY}


def examples(family: str) -> tuple[str, ...]:
    """The models that represent `family` in benchmarks and documents, the default first."""
    return tuple(about(family)["examples"])


@cache
def manifest(family: str) -> tuple[dict[str, Any], ...]:
    """The known checkpoints of `family` as in the manifest, each with the facts that they all share."""
    shared = {key: value for key, value in _content("manifest.json")[family].items() if key not in _OF_THE_FAMILY}
    return tuple({**shared, **entry} for entry in shared.pop("checkpoints"))


@cache
def counts() -> dict[str, dict[str, Any]]:
    """By name (with the tag, if any), each model's `family`, `input_size`, `parameters` and `multiply_adds`.

    They are counted for a classifier of 1000 classes and one image of `input_size`, (channels, height, width).
    """
    return _content("counts.json")


@cache
def dense_counts() -> dict[str, dict[str, Any]]:
    """By recipe: `method`, `size` (height, width), and the `parameters` and `multiply_adds` of the whole model."""
    return _content("dense_counts.json")


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """The published figures of the recipes, by name, each with its `model` and `source`."""
    return _content("recipes.json")


@cache
def shapes() -> dict[str, dict[str, list[int]]]:
    """The shapes of the tensors of each model by their names, without the classifier and the counters of batch norms.

    1 x 1 convolutions have the shape of a linear layer. A model whose tag changes its tensors has a row with the tag.
    """
    table = resources.files(__package__).joinpath("shapes.json.xz").read_bytes()
    return json.loads(lzma.decompress(table))


@cache
def _content(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
