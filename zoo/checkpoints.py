"""Published weights: the public functions of the modules that deal with them, and the conversion of a checkpoint.

`zoo.facts` turns the manifest into timm's configurations, `zoo.pretrained` decides where weights come from,
`zoo.checkpoint_files` reads files, `zoo.key_maps` renames and reshapes tensors, and `zoo.recognition` says which model
a file belongs to.

A family's `checkpoint_filter_fn` is one call of `convert`. timm calls it for `pretrained=True`, for
`pretrained_cfg_overlay=dict(file=...)` and for `pretrained_cfg_overlay=dict(state_dict=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.checkpoint_files import FLOATS, check_values, first_names, other_tensors, read, unwrap, unwrap_whole
from zoo.facts import default_cfgs
from zoo.key_maps import (
    KeyMap,
    adapt_shape,
    first_weights,
    is_classifier,
    is_counter,
    is_final,
    is_part,
    join_parts,
    remap,
    resize_table,
)
from zoo.manifest import manifest
from zoo.pretrained import check_network, file_overlay, published_cfg
from zoo.recognition import closest_models, suggest_model

__all__ = [
    "check_network",
    "check_values",
    "closest_models",
    "convert",
    "default_cfgs",
    "file_overlay",
    "first_names",
    "manifest",
    "other_tensors",
    "published_cfg",
    "read",
    "remap",
    "resize_table",
    "unwrap",
    "unwrap_whole",
]


def convert(
    checkpoint: Mapping[str, Any], model: nn.Module, key_map: KeyMap, resize: str = "bicubic"
) -> dict[str, Tensor]:
    """Convert `checkpoint`, with official names or ours, wrapped or not, to a state dict that `model` can load.

    Relative-position tables, whose names end in "bias_table", are resized to the model's windows in the interpolation
    mode `resize` ("bicubic" or "bilinear"). They may have the form ((2 wh - 1)(2 ww - 1), N) of Swin's code. Weights of
    1 x 1 convolutions become those of linear layers if the model has linear layers there.

    timm adapts the rest after this function. It drops the classifier's weights if the model's number of classes differs
    from that in `pretrained_cfg`, and adapts the first convolution if the number of input channels differs.

    Raises:
        ValueError: The file holds no tensors, a name twice, or values that are NaN or infinite.
        RuntimeError: A tensor is missing, unexpected or of another shape. The message says which model the file looks
            like.
    """
    want = model.state_dict()
    tensors = unwrap(checkpoint)
    given = join_parts(remap(tensors, key_map))
    state_dict = {
        key: adapt_shape(key, value, want[key].shape, resize) if key in want else value for key, value in given.items()
    }
    state_dict = _match_output_norms(state_dict, want)
    left_to_timm = _replaced_classifier(state_dict, want, model)
    state_dict = {key: value for key, value in state_dict.items() if key not in left_to_timm}
    wanted = {key: value for key, value in want.items() if key not in left_to_timm}
    _check_fit(state_dict, wanted, getattr(model, "pretrained_cfg", {}), type(model).__name__, tensors)
    for key, value in given.items():
        if key in want and want[key].is_floating_point() and value.dtype not in FLOATS:
            raise ValueError(f"The checkpoint's {key} is of {value.dtype}: save the weights as float32.")
    if not all(value.is_meta for value in want.values()):  # a model on the meta device loads no values
        check_values(given)
    return state_dict


def _match_output_norms(state_dict: dict[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit a file with norms of each output (dense prediction) to a model without them, and vice versa.

    Features before the norms do not depend on them. A model without output norms ignores those of the file, and keeps
    its own final norm if such a file lacks it. A model with output norms has no final norm, so it ignores that of the
    file. It keeps its own output norms if the file has none.
    """
    ours, theirs = ({key for key in keys if is_part(key, "output_norms")} for keys in (want, state_dict))
    final = {key for key in want.keys() | state_dict.keys() if is_final(key)}
    if theirs and not ours:
        kept = {key: value for key, value in state_dict.items() if key not in theirs}
        return {key: want[key] for key in final & want.keys()} | kept
    if ours:
        kept = {key: value for key, value in state_dict.items() if key not in final - want.keys()}
        return kept if theirs else {key: want[key] for key in ours} | kept
    return state_dict


def _replaced_classifier(state_dict: Mapping[str, Tensor], want: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the classifier's tensors if the model can't take the file's: it has none, or one of another size."""
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    classifier = {key for key in want.keys() | state_dict.keys() if is_classifier(key, cfg.get("classifier"))}
    same_size = model.num_classes == cfg.get("num_classes", model.num_classes)
    return set() if classifier & want.keys() and same_size else classifier


def _check_fit(
    state_dict: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    cfg: Mapping[str, Any],
    class_name: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise RuntimeError unless `state_dict` has the names and shapes of `want`; `tensors` is the file's content."""
    missing = [key for key in want if key not in state_dict and not is_counter(key)]
    unexpected = [key for key in state_dict if key not in want]
    firsts = first_weights(cfg.get("first_conv"))
    reshaped = [
        key
        for key, value in state_dict.items()
        if key in want and not _shapes_agree(value.shape, want[key].shape, any_channels=key in firsts)
    ]
    if not (missing or unexpected or reshaped):
        return
    shapes = [f"{key} {tuple(state_dict[key].shape)} for {tuple(want[key].shape)}" for key in reshaped]
    counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    faults = "; ".join(f"{len(keys)} {what} ({first_names(keys)})" for what, keys in counts if keys)
    name = cfg.get("architecture", class_name)
    if all(is_classifier(key, cfg.get("classifier")) for key in (*missing, *unexpected, *reshaped)):
        advice = (
            "The rest fits: use features_only=True or num_classes=0, or say how many classes the file has (0 without "
            "a classifier) with pretrained_cfg_overlay=dict(num_classes=...), and the model gets a new classifier."
        )
    else:
        advice = suggest_model(tensors, name)
    raise RuntimeError(f"The checkpoint does not fit {name}: {faults}. {advice}")


def _shapes_agree(have: torch.Size, want: torch.Size, any_channels: bool) -> bool:
    """Whether shapes are equal, except for the input channels of a convolution if `any_channels`."""
    if any_channels:
        return len(have) == len(want) and (have[0], *have[2:]) == (want[0], *want[2:])
    return have == want
