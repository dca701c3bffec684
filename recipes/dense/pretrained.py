"""Starting from a whole detector or segmentor: `pretrained=<run folder or checkpoint>`.

The file may be that of a run (`model.safetensors`, `best.safetensors`, `last.pt`), or have the layout of MMDetection 2
and 3 or MMSegmentation 0 and 1: `backbone.` with the names of the authors' code, `neck.`, `roi_head.`, ... The family's
`checkpoint_filter_fn` converts the backbone. Every tensor is loaded, or named in the log, or the file is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import Tensor, nn

from zoo import families
from zoo.checkpoints import check_values, first_names, read, remap, unwrap_whole
from zoo.key_maps import is_counter
from zoo.messages import UserError, first_few, one_line
from zoo.opening import weights_file
from zoo.recipes import reading
from zoo.recipes.dense.model import build_model
from zoo.recipes.files import parse_json

# The methods by the tensors that only they have, the first that fits; the task is any of the first element.
_METHODS = (
    (("panoptic",), "panoptic_fpn", r"semantic_head\.conv_logits\."),
    (("detect",), "cascade_mask_rcnn", r"roi_head\.bbox_head\.0\."),
    (("detect",), "mask_rcnn", r"roi_head\.bbox_head\.fc_cls\."),
    (("detect",), "retinanet", r"bbox_head\.retina_cls\."),
    (("detect",), "dino", r"dn_query_generator\."),
    (("detect", "panoptic"), "mask2former", r"panoptic_head\.pixel_decoder\."),
    (("segment",), "mask2former", r"decode_head\.pixel_decoder\."),
    (("segment",), "upernet", r"decode_head\.psp_modules\."),
    (("segment",), "semantic_fpn", r"decode_head\.scale_heads\."),
)
# Parts that a detector or segmentor may lack: masks need data with masks, and the auxiliary head is for training.
_OPTIONAL = ("roi_head.mask_head.", "auxiliary_head.")
# The same if only the backbone is loaded.
_FEATURE_NORMS = ("backbone.norms.", "backbone.body.model.output_norms.")
# Mask2Former's layers in MMDetection 2 -> in MMDetection 3. The queries attend to the pixels first, then to each other.
_RENAMED = (
    (r"(\.transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(\.transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(\.pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(_decoder(?:\.encoder)?\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
)
# The layers with outputs for each class -> how many outputs for "none of the classes" follow.
_CLASS_OUTPUTS = {
    "fc_cls": 1,
    "cls_embed": 1,
    **dict.fromkeys(("fc_reg", "retina_cls", "conv_logits", "conv_seg", "cls_branches", "label_embedding"), 0),
}


@dataclass
class Whole:
    """The checkpoint of a whole detector or segmentor.

    Attributes:
        path: The file.
        tensors: Its tensors, by names such as `backbone....`, `neck....`, `roi_head....`.
        classes: The names of its classes in the order of the labels; None if the file does not name them.
        own: Whether `zoo-train` wrote it, so that the names are those of the model here.
    """

    path: Path
    tensors: dict[str, Tensor]
    classes: list[str] | None
    own: bool


def build_pretrained(
    cfg: DictConfig, classes: Sequence[str], device: torch.device, pretrained: bool | str
) -> tuple[nn.Module, list[str]]:
    """`build_model` with the weights of a backbone or of a whole detector or segmentor, and what to log about these.

    Raises:
        UserError: It can't be built, or the weights do not fit.
    """
    whole = open_whole(cfg, pretrained)
    model = build_model(cfg, classes, device, pretrained if whole is None else False)
    return model, [] if whole is None else [load_whole(whole, model, cfg, classes)]


def open_whole(cfg: DictConfig, pretrained: Any) -> Whole | None:
    """The detector or segmentor that `pretrained` names; None for a backbone's own weights.

    Raises:
        UserError: The file can't be read, or it belongs to another method or model than `cfg`.
    """
    if not isinstance(pretrained, str):
        return None
    path = weights_file(Path(pretrained))
    try:
        checkpoint = read(path)
        tensors = unwrap_whole(checkpoint)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be read as a checkpoint: {one_line(error, 600)}.") from error
    if any(key.startswith("sem_seg_head.") for key in tensors):
        raise UserError(
            f"{path} is a file of Detectron2 (it has {first_names(k for k in tensors if k.startswith('sem_seg'))}), "
            "which can't be loaded: give one of MMDetection, MMSegmentation or zoo-train, or a backbone's own weights."
        )
    heads = [key for key in tensors if key.partition(".")[0].endswith("_head")]
    if not heads or not any(key.startswith("backbone.") for key in tensors):
        return None
    model, classes = _described(path, checkpoint)
    _check_method(cfg, path, tensors)
    if model is not None and model != cfg.model:
        raise UserError(f"{path} is of a run with model={model}, not {cfg.model}: set model={model}.")
    return Whole(path, tensors, classes, own=any(key.startswith("backbone.body.") for key in tensors))


def _described(path: Path, checkpoint: Mapping[str, Any]) -> tuple[str | None, list[str] | None]:
    """The model's name, if `zoo-train` wrote the file, and the names of the classes."""
    identity, meta = checkpoint.get("identity"), checkpoint.get("meta")
    found: Any = None
    model: Any = None
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        model, text = metadata.get("model"), metadata.get("classes")
        found = parse_json(text, path) if text else None
    elif isinstance(identity, Mapping):  # last.pt
        model, found = identity.get("model"), identity.get("classes")
    elif isinstance(meta, Mapping):  # of MMEngine, or of MMCV before it
        described = meta.get("dataset_meta")
        described = described if isinstance(described, Mapping) else meta
        found = described.get("classes", described.get("CLASSES"))
    named = isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found)
    classes = list(found) if named and len(set(found)) == len(found) else None
    return (model if isinstance(model, str) else None), classes


def _check_method(cfg: DictConfig, path: Path, tensors: Mapping[str, Tensor]) -> None:
    fits = ((tasks, method) for tasks, method, form in _METHODS if any(re.match(form, key) for key in tensors))
    tasks, method = next(fits, ((), ""))
    if not cfg.dense.pretrained_heads or (cfg.task in tasks and method == cfg.dense.method):
        return
    alone = "or take its backbone alone with dense.pretrained_heads=false"
    if not method:
        heads = sorted({key.partition(".")[0] for key in tensors if not key.startswith("backbone.")})
        raise UserError(f"{path} is of no method of zoo-train (it has {', '.join(heads)}): give another file, {alone}.")
    task = f"task={tasks[0]} " if cfg.task not in tasks else ""
    raise UserError(f"{path} looks like {method}, not {cfg.dense.method}: set {task}dense.method={method}, {alone}.")


def load_whole(whole: Whole, model: nn.Module, cfg: DictConfig, classes: Sequence[str], complete: bool = False) -> str:
    """Load `whole` into `model`, which finds `classes`, and say what is left out and what starts anew.

    Outputs for classes that the file has under the same name are kept; those for others start anew.

    Args:
        whole: The checkpoint.
        model: A detector or segmentor without weights.
        cfg: The configuration of `model`.
        classes: The names of its classes, in the order of the labels.
        complete: Refuse a file without all that predictions need, since nothing is trained.

    Raises:
        UserError: The file does not fit.
    """
    model.init_weights()  # the Runner does this once, so that it does not undo the loading
    want = model.state_dict()
    rest = {key: value for key, value in whole.tensors.items() if not key.startswith("backbone.")}
    backbone = {key: value for key, value in whole.tensors.items() if key not in rest}
    given = backbone if whole.own else _convert_backbone(whole.path, backbone, model.backbone, cfg)
    left_out, anew = [], []
    optional = _OPTIONAL
    if cfg.dense.pretrained_heads:
        given |= remap(rest, _RENAMED, unique=False)
    else:
        left_out.append(f"{_parts(rest)} (dense.pretrained_heads=false)")
        anew.append(_parts(key for key in want if not key.startswith("backbone.")))
        want = {key: value for key, value in want.items() if key.startswith("backbone.")}
        optional = _FEATURE_NORMS
    for part in optional:
        ours, theirs = ([key for key in keys if key.startswith(part)] for keys in (want, given))
        name = part.rstrip(".").rpartition(".")[2]
        if theirs and not ours:
            given = {key: value for key, value in given.items() if key not in theirs}
            left_out.append(f"{name}, which this model does not have")
        elif ours and not theirs:
            want = {key: value for key, value in want.items() if key not in ours}
            if not (complete and name == "auxiliary_head"):
                anew.append(f"{name}, which the file does not have")
    given, kept, outputs = _match_classes(given, want, whole.classes, list(classes))
    anew += [outputs] if outputs else []
    _check_fit(whole, given, want, cfg)
    if complete and anew:
        raise UserError(f"{whole.path} can't be evaluated: it lacks {' and '.join(anew)}: {_remedy(whole.path, cfg)}.")
    model.load_state_dict(given, strict=False)
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    notes += [f"new: {', '.join(anew)}"] if anew else []
    notes += [kept] if kept else []
    return f"{whole.path}: {'; '.join([f'{len(given)} tensors are loaded', *notes])}."


def _parts(names: Iterable[str]) -> str:
    """The parts of a detector or segmentor that the tensors belong to."""
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))


def _convert_backbone(
    path: Path, tensors: Mapping[str, Tensor], backbone: nn.Module, cfg: DictConfig
) -> dict[str, Tensor]:
    """The tensors of an official backbone by their names here."""
    tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    family = families.family_of(cfg.model)
    if family is None:
        found = backbone.by_own_names(tensors, backbone.body.state_dict())
        used = {id(value) for value in found.values()}
        named = {f"backbone.body.{key}": value for key, value in found.items()}
        return named | {f"backbone.{key}": value for key, value in tensors.items() if id(value) not in used}
    model = backbone.body.model
    mine = {key for key in model.state_dict() if key.startswith("output_norms.")}
    theirs = {key: name for key in tensors for name in remap({key: tensors[key]}, family.KEY_MAP, unique=False)}
    theirs = {key: name for key, name in theirs.items() if name.startswith("output_norms.")}
    if bool(mine) != bool(theirs) and cfg.dense.pretrained_heads:
        has, value = ("has no", "false") if mine else ("has a", "true")
        raise UserError(f"{path} {has} LayerNorm on each feature of its backbone: set dense.output_norm={value}.")
    # The norms of features that the method does not use.
    unused = [key for key, name in theirs.items() if name not in mine]
    try:
        converted = family.checkpoint_filter_fn({key: tensors[key] for key in tensors if key not in unused}, model)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the backbone of {path} can't be used: {one_line(error, 600)}. See model=.") from error
    return {f"backbone.body.model.{key}": value for key, value in converted.items()}


def _match_classes(
    given: Mapping[str, Tensor], want: Mapping[str, Tensor], theirs: list[str] | None, ours: list[str]
) -> tuple[dict[str, Tensor], str, str]:
    """`given` with the outputs of each class moved to those of its name in `ours`; what is kept and new, in words."""
    layers = [key for key in given if key in want and _class_layer(key)]
    if not layers:
        return dict(given), "", ""
    same = theirs is None and all(given[key].shape == want[key].shape for key in layers)
    moved, kept_names = {}, set()
    for key in layers:
        mine = _names_of(key, want, ours)
        other = theirs and _names_of(key, given, theirs)
        if other:
            places = [(label, other.index(name)) for label, name in enumerate(mine) if name in other]
        else:
            places = [(i, i) for i in range(len(mine) if same else 0)]
        kept_names.update(mine[label] for label, _ in places)
        moved[key] = _move_classes(key, want[key], given[key], places, len(mine), other and len(other))
    given = dict(given) | {key: value for key, value in moved.items() if value is not None}
    new = [name for name in ours if name not in kept_names]
    kept = outputs = ""
    if theirs is None:
        kept = "it does not name its classes" + ("" if new else ", which are taken to be these in the same order")
    elif not new and len(theirs) > len(ours):
        kept = f"of its {len(theirs)} classes, {len(ours)} are kept"
    if new:
        known = f"; the file has {first_few(theirs, 3)}" if theirs else ""
        outputs = f"the outputs for {len(new)} of {len(ours)} classes ({first_few(new, 3)}{known})"
    return given, kept, outputs


def _names_of(key: str, tensors: Mapping[str, Tensor], names: list[str]) -> list[str]:
    """Those of the `names` of all classes that a layer of the model with `tensors` has outputs for.

    In a Panoptic FPN, the heads of objects have the things, and the semantic head has the stuff.
    """
    stuff = tensors.get("semantic_head.conv_logits.bias")
    if stuff is None:
        return names
    things = len(names) - (len(stuff) - 1)  # the last output is for all things
    return names[things:] if key.startswith("semantic_head.") else names[:things]


def _class_layer(key: str) -> str | None:
    """The layer with outputs for each class that a tensor belongs to; None if it belongs to another."""
    return next((name for name in key.split(".") if name in _CLASS_OUTPUTS), None)


def _move_classes(
    key: str, mine: Tensor, other: Tensor, places: Sequence[tuple[int, int]], count: int, other_count: int | None
) -> Tensor | None:
    """`mine` (rows, ...) with the rows of `other` of the same class, and those for none of the classes.

    Args:
        key: The tensor's name.
        mine: The tensor of the model, of `count` classes.
        other: The tensor of the file, of `other_count` classes; None if that is to be found out.
        places: The numbers of each class that both have, in the model and in the file.
        count: The number of classes of the model.
        other_count: The number of classes of the file.

    Returns:
        None if the rows are not those of classes, for example the box that all classes share.
    """
    layer = _class_layer(key)
    none = 1 if key.startswith("semantic_head.") else _CLASS_OUTPUTS[layer]
    after = 4 if layer == "fc_reg" else 1  # the four sides of the box of each class
    before, left = divmod(mine.shape[0] - none, count * after)  # RetinaNet has a row for each class of each anchor
    if left or not before:
        return None
    other_count = other_count or (other.shape[0] - none) // (before * after)
    if other.shape[1:] != mine.shape[1:] or other.shape[0] != before * other_count * after + none:
        return None
    result = mine.clone()
    rows = result[: mine.shape[0] - none].view(before, count, after, *mine.shape[1:])
    others = other[: other.shape[0] - none].reshape(before, other_count, after, *mine.shape[1:]).to(mine.dtype)
    for place, source in places:
        rows[:, place] = others[:, source]
    if none:
        result[-none:] = other[-none:].to(mine.dtype)
    return result


def _check_fit(whole: Whole, given: Mapping[str, Tensor], want: Mapping[str, Tensor], cfg: DictConfig) -> None:
    """Raise UserError unless `given` has the names and shapes of `want`, and finite values."""
    missing = [key for key in want if key not in given and not is_counter(key)]
    unexpected = [key for key in given if key not in want]
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(want[key].shape)}"
        for key, value in given.items()
        if key in want and value.shape != want[key].shape
    ]
    counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    faults = "; ".join(f"{len(keys)} {what} ({first_names(keys)})" for what, keys in counts if keys)
    if faults:
        raise UserError(
            f"{whole.path} does not fit {cfg.dense.method} on {cfg.model}: {faults}: {_remedy(whole.path, cfg)}."
        )
    try:
        check_values(given)
    except ValueError as error:
        raise UserError(f"{whole.path} can't be used: {one_line(error, 600)}.") from error


def _remedy(path: Path, cfg: DictConfig) -> str:
    """What to set so that a file fits: the settings of its run, if it is in a run folder."""
    keys = ("model_kwargs", "dense.small", "dense.out_indices", "dense.output_norm", "mm.model")
    if os.path.isfile(path.parent / "config.yaml"):
        trained = reading.load_config(path.parent)
        values = {key: (OmegaConf.select(trained, key), OmegaConf.select(cfg, key)) for key in keys}
        differ = [f"{key}={theirs} (not {ours})" for key, (theirs, ours) in values.items() if theirs != ours]
        if differ:
            return f"set what its run was trained with, {', '.join(differ)}"
    return f"set what it was trained with ({', '.join(keys)})"
