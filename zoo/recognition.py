"""Which models a state dict may belong to, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import timm
import torch
from torch import Tensor

import zoo
from zoo import manifest
from zoo.families import tag_kwargs
from zoo.key_maps import is_classifier, is_counter, is_final, is_part, join_parts, our_shape, remap

__all__ = ["closest_models", "suggest_model"]


def closest_models(state_dict: Mapping[str, Tensor]) -> tuple[list[str], float]:
    """The models that share the most tensors (name and shape) with an unwrapped state dict, and the share.

    The share is relative to the larger of the two, without classifiers. Several models have the same share if shapes
    can't tell them apart (a NAT and its DiNAT). A model whose tag changes its shapes is named with the tag. The shapes
    are read from `zoo.manifest.shapes`; a model that is not in there yet is built, which takes time but no memory.
    """
    shares: dict[str, float] = {}
    for family in zoo.FAMILIES:
        renamed = join_parts(remap(state_dict, import_module(f"zoo.{family}").KEY_MAP, unique=False))
        given = {key: our_shape(key, value) for key, value in renamed.items()}
        known = {name: _share(given, name) for name in timm.list_models(module=family)}
        best = max(known, key=known.__getitem__)
        if 0.1 < known[best] < 1:
            tagged = {name: _share(given, name) for name in timm.list_pretrained(f"{best}.*")}
            known |= {name: share for name, share in tagged.items() if share > known[best]}
        shares |= known
    most = max(shares.values())
    return [name for name, share in shares.items() if share == most > 0], most


def suggest_model(state_dict: Mapping[str, Tensor], name: str) -> str:
    """A sentence that says which model an unwrapped state dict looks like, if it does not fit the model `name`."""
    names, share = closest_models(state_dict)
    if not names or share < 0.1:
        return "It does not look like a model of zoo: check which family the file belongs to."
    best = names[0]
    if best == name:
        return f"{share:.0%} of it is {name}: the file is incomplete or altered."
    if share < 1:
        return f"It looks most like {best} ({share:.0%} of the tensors agree)."
    return f"It looks like {best}: create that model instead."


def _share(shapes: Mapping[str, torch.Size], name: str) -> float:
    want, classifier = _model_shapes(name)
    given = {key for key in shapes if not is_classifier(key, classifier) and not is_counter(key)}
    if any(is_part(key, "output_norms") for key in given):  # a backbone for dense prediction may have no final norm
        given = {key for key in given if not is_part(key, "output_norms")}
        want = {key: shape for key, shape in want.items() if not is_final(key) or key in given}
    return sum(shapes[key] == want.get(key) for key in given) / max(len(want), len(given), 1)


@cache
def _model_shapes(name: str) -> tuple[dict[str, torch.Size], str | tuple[str, ...]]:
    """The shapes of a model's tensors without its classifier, and the classifier's name."""
    row = name if tag_kwargs(name) else name.partition(".")[0]
    known = manifest.shapes().get(row)
    found = built_shapes(row) if known is None else {key: torch.Size(shape) for key, shape in known.items()}
    cfg: Any = timm.get_pretrained_cfg(name)
    return found, cfg.classifier


def built_shapes(name: str) -> dict[str, torch.Size]:
    """The shapes of the tensors of a model without classifier, as the table of `zoo.manifest.shapes` has them."""
    model = timm.create_model(name, device="meta", num_classes=0)
    return {key: our_shape(key, value) for key, value in model.state_dict().items() if not is_counter(key)}
