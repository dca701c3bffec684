"""Translation of the official names and shapes of tensors to ours.

A family's `KEY_MAP` is a list of regular expressions with their replacements. All of them are applied in order to every
key. A replacement of None drops the tensor. A name such as `qkv[0].weight` is that of a part: `join_parts` joins
`qkv[0].weight`, `qkv[1].weight`, ... to `qkv.weight`.

If our names depend on more than one official name, such as on the number of blocks, `KEY_MAP` is a function of all
names that returns such a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.checkpoint_files import first_names

__all__ = [
    "KeyMap",
    "adapt_shape",
    "classifier_weight",
    "first_weights",
    "is_classifier",
    "is_counter",
    "is_final",
    "is_part",
    "join_parts",
    "our_shape",
    "remap",
    "resize_table",
]

Rules = Iterable[tuple[str, str | None]]
KeyMap = Rules | Callable[[Iterable[str]], Rules]


def remap(state_dict: Mapping[str, Tensor], key_map: KeyMap, *, unique: bool = True) -> dict[str, Tensor]:
    """Rename the tensors of `state_dict` according to `key_map`.

    If two keys get the same name, the first tensor is kept unless `unique`: the names may be those of another family.

    Raises:
        ValueError: Two keys get the same name, and `unique` is set.
    """
    renamed: dict[str, Tensor] = {}
    rules = key_map(state_dict) if callable(key_map) else key_map
    for key, value in state_dict.items():
        name = _rename(key, rules)
        if name in renamed and unique:
            raise ValueError(
                f"Two tensors of the checkpoint are called {first_names([name])} in our naming: it mixes two models."
            )
        if name is not None:
            renamed.setdefault(name, value)
    return renamed


def _rename(key: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        if replacement is not None:
            key = re.sub(pattern, replacement, key)
        elif re.search(pattern, key):
            return None
    return key


def join_parts(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the parts `x[0].y`, `x[1].y`, ... of each tensor `x.y` concatenated along the first dimension.

    If a part is missing, or has another form than the others, they are left as they are.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        groups.setdefault(re.sub(r"\[\d\]", "", key), {})[key] = value
    joined: dict[str, Tensor] = {}
    for key, parts in groups.items():
        names = sorted(parts)
        numbers = [found[1] for name in names if (found := re.search(r"\[(\d)\]", name))]
        whole = numbers and numbers == [str(i) for i in range(len(names))]
        if whole and len({parts[name].shape[1:] for name in names}) == 1 and parts[names[0]].ndim:
            joined[key] = torch.cat([parts[name] for name in names])
        else:
            joined |= parts
    return joined


def adapt_shape(key: str, value: Tensor, shape: torch.Size, mode: str) -> Tensor:
    """Convert `value` to the `shape` of the model's tensor. If that is impossible, `value` is returned unchanged.

    Relative-position tables, whose names end in "bias_table", are resized in the interpolation `mode` to (N, h, w). The
    form ((2 wh - 1)(2 ww - 1), N) of Swin's code is accepted too. Weights of 1 x 1 convolutions become those of linear
    layers, and vice versa. Of five dimensions, the first is dropped if it is 1: models with more than four can't be
    channels-last.
    """
    if key.endswith("bias_table"):
        form = our_shape(key, value)
        if len(form) != 3 or form[0] != shape[0]:
            return value
        table = value.T.reshape(form) if value.ndim == 2 else value
        return table if table.shape == shape else resize_table(table, (shape[1], shape[2]), mode)
    if len(shape) == 2 and _linear_shape(value) == shape:
        return value.flatten(1)
    if len(shape) == 4 and value.ndim == 2 and (*value.shape, 1, 1) == shape:
        return value[:, :, None, None]
    if value.ndim == 5 and our_shape(key, value) == shape:
        return value[0]
    return value


def classifier_weight(tensors: Mapping[str, Tensor], cfg_classifier: str | Sequence[str] | None) -> Tensor | None:
    """The weight (classes, channels) of the classifier, or of the last linear layer inside it; see `is_classifier`."""
    classifier = next(iter(_classifier_modules(cfg_classifier)), "")
    inside = sorted(key for key, value in tensors.items() if is_part(key, classifier) and value.ndim == 2)
    name = f"{classifier}.weight"
    return tensors.get(name if name in tensors else (inside or [""])[-1])


def first_weights(first_conv: str | Sequence[str] | None) -> list[str]:
    """The names of the weights that read the images, given `first_conv` of a pretrained configuration."""
    convs = [first_conv] if isinstance(first_conv, str) else first_conv or ()
    return [f"{conv}.weight" for conv in convs]


def resize_table(table: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A relative-position table (N, h, w) interpolated to (N, *size), as if its entries were pixels."""
    return F.interpolate(table[None], size=size, mode=mode, align_corners=False)[0]


def our_shape(key: str, value: Tensor) -> torch.Size:
    """The shape that a tensor has in our models: (N, h, w) for a table of Swin's form, (C', C) for a 1 x 1 convolution.

    The convolution may be one of maps or of sequences. A table (1, ...) of five dimensions loses the first. All others
    keep their shape.
    """
    if value.ndim == 5 and value.shape[0] == 1:
        return value.shape[1:]
    if key.endswith("bias_table"):
        side = math.isqrt(value.shape[0]) if value.ndim == 2 else 0
        return torch.Size((value.shape[1], side, side)) if side and side**2 == value.shape[0] else value.shape
    return _linear_shape(value)


def _linear_shape(value: Tensor) -> torch.Size:
    return value.shape[:2] if value.ndim in (3, 4) and set(value.shape[2:]) == {1} else value.shape


def is_counter(key: str) -> bool:
    """Whether the tensor counts the batches of a batch norm. Many files lack these, and torch fills them in."""
    return key.endswith("num_batches_tracked")


def is_final(key: str) -> bool:
    """Whether the tensor belongs to a module between the last stage and the classifier."""
    return is_part(key, "norm") or is_part(key, "pre_logits")


def is_part(key: str, module: str | None) -> bool:
    """Whether the tensor belongs to the module of that name, or to a submodule of it."""
    return module is not None and key.startswith(f"{module}.")


def is_classifier(key: str, classifier: str | Sequence[str] | None) -> bool:
    """Whether the tensor belongs to the classifier, given `classifier` of a pretrained configuration."""
    return any(is_part(key, module) for module in _classifier_modules(classifier))


def _classifier_modules(classifier: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of modules, given `classifier` of a pretrained configuration: "head" for ("head.cls", "head.dist")."""
    if classifier is None or isinstance(classifier, str):
        return (classifier,) if classifier else ()
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in classifier))
