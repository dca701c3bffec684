"""The values in `mm`, which a user gives to MMEngine: refused where zoo has a key for them or nothing reads them,
completed where Hydra can't hold them or they are tedious to write.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mmengine.config import Config as MMConfig
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from zoo.messages import UserError, did_you_mean, nearest
from zoo.recipes.logs import log

# Keys that a run sets itself, or that no command reads, and what to use in their place.
_REPLACED = {
    "cfg": "the keys below mm",
    "data_preprocessor": "mm.model.data_preprocessor",
    "default_scope": "task=<task>",
    "experiment_name": "run=<folder>",
    "launcher": "torchrun",
    "load_from": "pretrained=<checkpoint or run folder>",
    "log_level": "log.every=<updates>",
    "optim_wrapper.accumulative_counts": "trainer.effective_batch_size=<images>",
    "optim_wrapper.type": "trainer.amp=<none, bf16 or fp16>",
    "randomness": "seed=<number> and trainer.deterministic=true",
    "resume": "run=<folder>, which resumes the run in it",
    "test_cfg": "mm.val_cfg",
    "test_dataloader": "mm.val_dataloader",
    "test_evaluator": "mm.val_evaluator",
    "train_cfg.max_epochs": "trainer.epochs=<epochs>",
    "train_cfg.max_iters": "trainer.max_updates=<updates> or, with its schedule, dense.updates=<updates>",
    "train_cfg.val_interval": "trainer.eval_every=<epochs>",
    "train_dataloader.batch_size": "trainer.batch_size=<images>",
    "tta_model": "eval.tta=flip or multi_scale",
    "tta_pipeline": "eval.tta=flip or multi_scale",
    "work_dir": "run=<folder>",
}
_METRICS = {"detect": ("metric", ("bbox", "segm")), "segment": ("iou_metrics", ("mIoU", "mDice", "mFscore"))}
_MIXER = "MultiImageMixDataset"
_WRAPPERS = (_MIXER, "ClassBalancedDataset", "RepeatDataset")
_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr")
_WITHOUT_MASKS = ("Mosaic", "MixUp")  # steps of mmdet that mix images and boxes, and leave masks as they are


def check(mm: Mapping[str, Any], task: str) -> None:
    """Refuse what has no effect or a key of zoo, and what would leave a run without a score.

    Raises:
        UserError: The message names the key and what to use instead.
    """
    known = sorted(({*inspect.signature(Runner).parameters} - _REPLACED.keys()) - {"self"})
    for key, value in mm.items():
        nested = {f"{key}.{name}" for name in value} if isinstance(value, Mapping) else set()
        for name in (key, *sorted(nested)):
            if name in _REPLACED:
                raise UserError(f"mm.{name} can't be set: use {_REPLACED[name]} instead.")
        if key not in known:
            hint = did_you_mean(str(key), known, prefix="mm.") or f"it has to be one of {', '.join(known)}."
            raise UserError(f"mm.{key} has no effect, because MMEngine's Runner has no such argument: {hint}")
    evaluator, (option, scored) = mm.get("val_evaluator"), _METRICS.get(task, ("", ()))
    given = evaluator.get(option) if isinstance(evaluator, Mapping) else None
    names = [given] if isinstance(given, str) else list(given or scored)
    if scored and not set(names) & set(scored):
        raise UserError(
            f"mm.val_evaluator.{option}={given} gives none of the scores of task={task}: it has to include "
            f"{' or '.join(scored)}."
        )


def warn_misspelt(settings: Any, changes: Any, path: str = "mm.model") -> None:
    """Warn of names in the model's `train_cfg` and `test_cfg` that resemble one that is there.

    MMDetection and MMSegmentation ignore names there that they do not know, and take some that no configuration has.
    """
    if not isinstance(settings, Mapping) or not isinstance(changes, Mapping) or changes.get("_delete_"):
        return
    for key, value in changes.items():
        if key in settings:
            warn_misspelt(settings[key], value, f"{path}.{key}")
        elif ".train_cfg" in path or ".test_cfg" in path:
            meant = nearest(str(key), settings, cutoff=0.75)
            if meant:
                log.warning("%s.%s is not in the configuration: did you mean %s?", path, key, meant[0])


def override(settings: MMConfig, changes: dict[str, Any]) -> MMConfig:
    """`settings` with the changes that `mm` in the configuration makes."""
    try:
        settings.merge_from_dict(changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"mm={changes} does not fit the configuration of mmengine: {error}") from error
    return settings


def override_runner(settings: MMConfig, changes: dict[str, Any], scope: str, masks: bool) -> None:
    """Make the changes in `mm` to the configuration of MMEngine's Runner.

    Args:
        settings: The configuration; without `train_cfg`, the Runner only evaluates.
        changes: The content of `mm`.
        scope: Where the transforms are registered, `mmdet` or `mmseg`.
        masks: Whether masks are trained.

    Raises:
        UserError: The changes do not fit.
    """
    left_out = {"model"} if "train_cfg" in settings else {"model", *_TRAINING}
    changes = {key: value for key, value in changes.items() if key not in left_out}
    loader = changes.get("train_dataloader")
    if isinstance(loader, dict) and _kind(loader.get("dataset")) in _WRAPPERS:
        dataset = wrap(settings.train_dataloader.dataset.to_dict(), loader["dataset"], masks)
        changes["train_dataloader"] = {**loader, "dataset": {**dataset, "_delete_": True}}
    override(settings, changes)
    if changes:
        for name in ("train_dataloader", "val_dataloader"):
            set_tuples(settings.get(name), scope)


def _kind(settings: Any) -> str:
    """The registered name in a configuration, without its scope."""
    return str(settings.get("type", "")).rpartition(".")[2] if isinstance(settings, Mapping) else ""


def wrap(dataset: dict[str, Any], change: Mapping[str, Any], masks: bool) -> dict[str, Any]:
    """The configuration `dataset` with `change`, which may wrap it.

    A wrapper without a data set of its own gets `dataset`. The pipeline of a wrapper that mixes images follows the
    steps that load them; the other steps of `dataset` follow, unless the wrapper's pipeline ends with one that packs.

    Args:
        dataset: The configuration of the data set of a run.
        change: What `mm` says about it.
        masks: Whether masks are trained.

    Raises:
        UserError: A step that mixes images can't mix masks.
    """
    kind = _kind(change)
    if kind not in _WRAPPERS:
        return override(MMConfig(dict(dataset=dataset)), {"dataset": dict(change)}).dataset.to_dict()
    inner = wrap(dataset, change.get("dataset", {}), masks)
    result = {**change, "dataset": inner}
    result.pop("_delete_", None)
    if kind != _MIXER:
        return result
    result["type"] = f"{dataset['type'].partition('.')[0]}.MixedDataset"
    steps = [dict(step) for step in change.get("pipeline", ())]
    wrong = [step["type"] for step in steps if masks and _kind(step) in _WITHOUT_MASKS]
    if wrong:
        raise UserError(f"{wrong[0]} can't be used with masks, which it does not mix: set dense.masks=false.")
    loads = inner
    while "dataset" in loads:
        loads = loads["dataset"]
    pipeline = loads["pipeline"]
    if pipeline == dataset["pipeline"]:
        first = next(i for i, step in enumerate(pipeline) if not _kind(step).startswith("Load"))
        loads["pipeline"] = pipeline[:first]
        if not steps or not _kind(steps[-1]).startswith("Pack"):
            steps += pipeline[first:]
    result["pipeline"] = steps
    return result


def set_tuples(settings: Any, scope: str) -> None:
    """Turn lists into tuples, which Hydra does not have, where a step of a pipeline wants them.

    Args:
        settings: Any part of a configuration of MMEngine; the steps in it are changed.
        scope: The registry in which the steps are found, `mmdet` or `mmseg`.
    """
    with TRANSFORMS.switch_scope_and_registry(scope) as registry:
        _set_tuples(settings, registry)


def _set_tuples(settings: Any, registry: Any) -> None:
    if isinstance(settings, list | tuple):
        for part in settings:
            _set_tuples(part, registry)
        return
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in ("pipeline", "transforms"):
            for step in _steps(value):
                _set_arguments(step, registry)
        _set_tuples(value, registry)


def _steps(value: Any) -> list[dict[str, Any]]:
    """The steps of a pipeline, or of alternative ones."""
    if isinstance(value, dict):
        return [value]
    return [step for part in value for step in _steps(part)] if isinstance(value, list | tuple) else []


def _set_arguments(step: dict[str, Any], registry: Any) -> None:
    transform = registry.get(step["type"]) if isinstance(step.get("type"), str) else None
    if transform is None:
        return
    for name, parameter in inspect.signature(transform).parameters.items():
        if isinstance(step.get(name), list):
            step[name] = _as_wanted(step[name], parameter)


def _as_wanted(value: list[Any], parameter: inspect.Parameter) -> Any:
    """`value` as a tuple, or as a list of tuples, if that is the type of `parameter`: some steps tell them apart."""
    kinds = _kinds(parameter.annotation)
    if any(isinstance(item, list) for item in value):
        wanted = any(_is_tuple(part) for kind in kinds for item in get_args(kind) for part in _kinds(item))
        return [tuple(item) if isinstance(item, list) else item for item in value] if wanted else value
    untyped = parameter.annotation is parameter.empty and isinstance(parameter.default, tuple)
    return tuple(value) if untyped or any(map(_is_tuple, kinds)) else value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the only type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_tuple(annotation: Any) -> bool:
    return annotation is tuple or get_origin(annotation) is tuple
