"""Facts about models, looked up by a model's name. The file of each family defines its own.

The file of a family, `zoo/<family>.py`, may define:

- `dense_kwargs(variant, task)`: the keywords that the official code uses to build a variant for dense prediction;
- `tag_kwargs(tag)`: the keywords that the published weights of a tag need;
- `feature_side(variant, side, reduction)`: how the layers round the side of a feature map;
- `timm_name(variant)`: the name of the same architecture in timm;
- `patterns(tokens, place)`: the family's panels in `zoo-look patterns`; see `zoo.attention_maps`.

The functions of this module take a model's name. They call the function of its family. They return a default if the
family does not define the function, or if the model is one of timm's own.
"""

import importlib
from types import ModuleType
from typing import Any

import timm
from timm.models import split_model_name_tag

__all__ = ["dense_kwargs", "family_of", "feature_side", "load", "tag_kwargs", "timm_name"]


def load(family: str) -> ModuleType:
    """The module of a family, by a name from `zoo.FAMILIES`."""
    return importlib.import_module(f"zoo.{family}")


def family_of(model: str) -> ModuleType | None:
    """The module of the family of `model`, a name with or without a tag; None if it is not a model of zoo.

    Names with a source, such as "hf-hub:owner/repository", belong to no family.
    """
    variant, _ = split_model_name_tag(model)
    if ":" in model or not timm.is_model(variant):
        return None
    module = timm.model_entrypoint(variant).__module__
    return importlib.import_module(module) if module.startswith("zoo.") else None


def dense_kwargs(model: str, task: str) -> dict[str, Any]:
    """Keywords that the family's official code uses for detection ("detect") or segmentation ("segment").

    The dictionary is empty if that code changes nothing, for the small test models of most families, and for models of
    timm.
    """
    function = getattr(family_of(model), "dense_kwargs", None)
    return function(split_model_name_tag(model)[0], task) if function else {}


def tag_kwargs(model: str) -> dict[str, Any]:
    """Keywords that the published weights of `model`, a name with its tag, need; usually none."""
    function = getattr(family_of(model), "tag_kwargs", None)
    return function(split_model_name_tag(model)[1]) if function else {}


def feature_side(model: str, side: int, reduction: int) -> int:
    """The side of a feature map of stride `reduction` for images of `side` pixels: rounded up in most families."""
    function = getattr(family_of(model), "feature_side", None)
    return function(split_model_name_tag(model)[0], side, reduction) if function else -(-side // reduction)


def timm_name(model: str) -> str | None:
    """The name of the same architecture in timm; None if timm does not have it."""
    function = getattr(family_of(model), "timm_name", None)
    return function(split_model_name_tag(model)[0]) if function else None
