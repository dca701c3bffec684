"""Any timm model, the zoo's or timm's own, as the backbone of MMDetection's and MMSegmentation's models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, TypeVar

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo import families
from zoo.freezing import frozen_modules, stages
from zoo.messages import UserError
from zoo.recipes.classify.model import build_model
from zoo.recipes.config import Config
from zoo.recipes.logs import log
from zoo.recipes.lr_factors import by_name, trained_names

T = TypeVar("T")
# Arguments that models take only without a classifier.
_FOR_FEATURES = ("output_norm", "pyramid")
_TASKS = ("detect", "segment")


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm model that returns the features of its stages: images (B, C, H, W) to a tuple of (B, channels, h, w).

    Args:
        model: The name of a model in timm.
        model_kwargs: Its keyword arguments, for example {"drop_path_rate": 0.2}.
        pretrained: False, True for the published weights, a checkpoint, or the folder of a `zoo-train` run.
        out_indices: The stages whose features are used, in increasing order; negative ones count from the end. None for
            the last four, or for all if there are fewer.
        output_norm: Whether each feature gets a LayerNorm. None for the default of the family's dense-prediction code;
            models of timm then get them if their classifier follows a LayerNorm.
        frozen_stages: The stem and this number of stages, as timm groups parameters, are not trained and stay in
            evaluation mode; -1 freezes nothing.
        norm_eval: Whether BatchNorm keeps its statistics in training.
        grad_checkpointing: Whether activations are recomputed instead of stored.
        task: "detect" or "segment" for the keyword arguments that the family's official code uses for this task, where
            `model_kwargs` does not give them. None for those of a classifier; a warning names what differs.
        channels: The channels that the rest of the model is made for, if they are to be checked.
        init_cfg: MMEngine's argument, without effect: timm initializes its models.

    Attributes:
        channels: The channels of each feature.
        reductions: The stride of each feature in pixels.
        mean, std: The statistics that images are normalized with, for values from 0 to 1.
        arguments: The arguments that build the same backbone without pretrained weights.

    Raises:
        UserError: There is no such model, keyword argument, weights, stage or task, or it has other `channels`.
    """

    def __init__(
        self,
        model: str,
        model_kwargs: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
        out_indices: Sequence[int] | None = None,
        output_norm: bool | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        task: str | None = None,
        channels: Sequence[int] | None = None,
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg)
        model_kwargs = _task_kwargs(model, task, dict(model_kwargs or {}))
        self.arguments: dict[str, Any] = {
            "model": model,
            "model_kwargs": model_kwargs,
            "out_indices": None if out_indices is None else list(out_indices),
            "output_norm": output_norm,
            "frozen_stages": frozen_stages,
            "norm_eval": norm_eval,
            "grad_checkpointing": grad_checkpointing,
            "task": task,
        }
        for key in ("features_only", "out_indices"):
            if key in model_kwargs:
                raise UserError(f"model_kwargs has {key!r}, which the backbone sets itself: see dense.out_indices.")
        classifier = self.classifier()
        taken = inspect.signature(type(classifier).__init__).parameters
        indices = _indices(model, classifier, out_indices)
        kwargs = model_kwargs | {"features_only": True, "out_indices": tuple(indices)}
        if "dynamic_img_size" in taken:  # otherwise, some of timm's Swins and ViTs take only one size
            kwargs.setdefault("dynamic_img_size", True)
        elif classifier.pretrained_cfg["fixed_input_size"]:
            log.warning("%s is made for images of one size: others may fail, or need certain multiples.", model)
        final = _final_norm(classifier)
        if "output_norm" in taken:  # models of the zoo know which features have them
            kwargs["output_norm"] = kwargs.get("output_norm", True) if output_norm is None else output_norm
            output_norm = False
        elif output_norm is None:
            output_norm = final is not None

        if isinstance(pretrained, str) and not type(classifier).__module__.startswith("zoo."):
            # timm loads any file into a feature extractor, even if nothing in it fits; a classifier is strict.
            self.body = _build(model, kwargs)
            weights = _build(model, model_kwargs, pretrained).state_dict()
            self.body.load_state_dict(self.by_own_names(weights, self.body.state_dict()))
        else:
            self.body = _build(model, kwargs, pretrained)
        info = self.body.feature_info
        self.channels: list[int] = info.channels()
        self.reductions: list[int] = info.reduction()
        if channels is not None and list(channels) != self.channels:
            raise UserError(
                f"channels={list(channels)}: the features of {model} have {self.channels} channels, so this list, and "
                "the in_channels of the neck or head, have to be these."
            )
        self.mean, self.std = (tuple(self.body.pretrained_cfg[key]) for key in ("mean", "std"))
        if len(set(self.reductions)) < len(indices):
            strides = ", ".join(map(str, self.reductions))
            log.warning("%s has features at strides %s: no pyramid for objects of all sizes.", model, strides)
        # Wrappers around `forward_intermediates` convert to NCHW themselves, and some have no `output_fmt`.
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        eps = 1e-5 if final is None else final.eps
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=eps) for dim in self.channels) if output_norm else None
        _drop_unused_norms(self.body, indices)
        if grad_checkpointing:
            _checkpoint(model, self.body)
        self._norm_eval = norm_eval
        self._frozen = self._freeze(classifier, frozen_stages)

    def classifier(self) -> nn.Module:
        """The whole model on the meta device, whose methods know its parameters by name."""
        kwargs = {name: value for name, value in self.arguments["model_kwargs"].items() if name not in _FOR_FEATURES}
        with torch.device("meta"):
            return _build(self.arguments["model"], kwargs)

    def layer_scales(self, layer_decay: float) -> dict[str, float]:
        """`layer_decay` to the power of each parameter's distance from the classifier, counted in timm's layers.

        The keys are names below the backbone. Parameters that the classifier does not have are left out.
        """
        model = self.classifier()
        if hasattr(model, "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        else:
            layers = auto_group_layers(model)
        scales = {name: layer_decay ** (max(layers.values()) - layer) for name, layer in layers.items()}
        return self._by_backbone_names(scales)

    def undecayed(self) -> set[str]:
        """The parameters, by their names below the backbone, that the model's `no_weight_decay` lists."""
        model = self.classifier()
        patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        listed = {name: any(fnmatch(name, pattern) for pattern in patterns) for name, _ in model.named_parameters()}
        return {name for name, found in self._by_backbone_names(listed).items() if found}

    def _by_backbone_names(self, values: Mapping[str, T]) -> dict[str, T]:
        names = [name for name, _ in self.body.named_parameters()]
        return {f"body.{name}": value for name, value in self.by_own_names(values, names).items()}

    @staticmethod
    def by_own_names(values: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
        """Return `values` of the whole model by the corresponding `names` in the feature extractor."""
        # timm's extractors wrap the model in a module, or flatten "stages.0" into "stages_0".
        flat = {name.replace(".", "_"): value for name, value in values.items()}
        found = {}
        for name in names:
            keys = (part.replace(".", "_") for part in (name, name.partition(".")[2]))
            key = next((key for key in keys if key in flat), None)
            if key is not None:
                found[name] = flat[key]
        return found

    def _freeze(self, classifier: nn.Module, count: int) -> list[nn.Module]:
        """Freeze the stem and `count` stages; returns the modules that are frozen completely."""
        if count < 0:
            return []
        name, groups = self.arguments["model"], stages(classifier)
        if groups is None:
            raise UserError(f"dense.frozen_stages={count}: {name} does not say what its stages are. Leave it at -1.")
        parameters = dict(self.body.named_parameters())
        groups = self.by_own_names(groups, parameters)
        last = max(groups.values())
        if count > last:
            raise UserError(
                f"dense.frozen_stages={count}: {name} has {last} stages, so it has to be from -1 to {last}."
            )
        for parameter, group in groups.items():
            if group <= count:
                parameters[parameter].requires_grad = False
        return frozen_modules(self.body)

    def init_weights(self) -> None:
        """Do nothing: timm has initialized the model, or loaded its weights."""

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set training mode, except for frozen modules, and for BatchNorms that keep their statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the features (B, channels, h, w) of images (B, C, H, W)."""
        features = self.body(x)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self.norms is not None:
            features = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        return tuple(features)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
    backbone_lr: float = 1.0,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model with a `TimmBackbone`, one per learning rate and weight decay.

    Args:
        model: A detector or segmentor with a `backbone`.
        lr: The learning rate of everything but the backbone, and of backbone parameters that a classifier lacks.
        weight_decay: The weight decay of parameters that are decayed.
        layer_decay: The factor of the learning rate from each layer of the backbone to the one before; None for 1.
        no_decay: Parameters with one of these in their name are not decayed; None for vectors, biases and the
            parameters that the backbone's `no_weight_decay` lists.
        backbone_lr: The factor of the learning rate for the whole backbone.
        lr_factors: Further factors, for parameters with one of these in their name.

    Raises:
        UserError: No trained parameter has a key of `lr_factors` in its name.
    """
    factors = by_name(trained_names(model), lr_factors or {})
    backbone = model.backbone
    scales = {} if layer_decay is None else backbone.layer_scales(layer_decay)
    undecayed = backbone.undecayed() if no_decay is None else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix("backbone.") if name.startswith("backbone.") else None
        if no_decay is None:
            free = parameter.ndim <= 1 or name.endswith(".bias") or own in undecayed
        else:
            free = any(word in name for word in no_decay)
        rate = lr * factors.get(name, 1.0)
        if own is not None:
            rate = rate * backbone_lr * scales.get(own, 1.0)
        groups.setdefault((rate, 0.0 if free else weight_decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _task_kwargs(model: str, task: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments `given`, and those of the family for `task`."""
    if task is not None:
        if task not in _TASKS:
            raise UserError(f"task={task!r} is not allowed: it has to be {' or '.join(_TASKS)}, or None.")
        return families.dense_kwargs(model, task) | given
    changed = {key for name in _TASKS for key in families.dense_kwargs(model, name)} - given.keys()
    if changed:
        log.warning(
            "The backbone %s has the %s of a classifier: give task=detect or task=segment for those that its family "
            "has for this task.",
            model,
            " and ".join(sorted(changed)),
        )
    return given


def _build(model: str, kwargs: Mapping[str, Any], pretrained: bool | str = False) -> nn.Module:
    return build_model(Config(model=model, model_kwargs=dict(kwargs), pretrained=pretrained), num_classes=None)


def _indices(name: str, model: nn.Module, out_indices: Sequence[int] | None) -> list[int]:
    """`out_indices`, or the last four stages of `model`."""
    count = len(getattr(model, "feature_info", None) or ())
    if not count:
        raise UserError(f"{name} gives no features, only classes: choose a model whose `feature_info` lists stages.")
    if out_indices is None:
        return list(range(max(count - 4, 0), count))
    indices = [index + count if index < 0 else index for index in out_indices]
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < count:
        raise UserError(
            f"dense.out_indices={list(out_indices)}: {name} has {count} stages, so it has to be increasing numbers "
            f"from 0 to {count - 1}."
        )
    return indices


def _final_norm(model: nn.Module) -> nn.LayerNorm | None:
    """The LayerNorm between the last stage and the classifier, under any of timm's names; None if there is none."""
    modules = dict(model.named_modules())
    found = (modules.get(name) for name in ("norm", "fc_norm", "head.norm"))
    return next((norm for norm in found if isinstance(norm, nn.LayerNorm)), None)


def _drop_unused_norms(body: nn.Module, indices: Sequence[int]) -> None:
    """Remove the norms of unused features: DDP fails on parameters without gradients."""
    norms = getattr(getattr(body, "model", None), "output_norms", None) or ()
    for i in set(range(len(norms))) - set(indices):
        norms[i] = nn.Identity()


def _checkpoint(name: str, body: nn.Module) -> None:
    holder = body if hasattr(body, "set_grad_checkpointing") else getattr(body, "model", None)
    try:
        holder.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{name} has no gradient checkpointing: leave trainer.grad_checkpointing at false.") from error
