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

from zoo.recipes.classify.model import build_model
from zoo.recipes.config import Config
from zoo.recipes.errors import RunError
from zoo.recipes.logs import log

T = TypeVar("T")


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm model that gives its stages' features: images (B, C, H, W) to a tuple of (B, channels, h, w).

    Args:
        model: any name that timm knows.
        model_kwargs: its keywords, for example {"drop_path_rate": 0.2}.
        pretrained: False, True for the published weights, a checkpoint, or the folder of a `zoo-train` run.
        out_indices: stages whose features are used, rising, negative ones from the end; the last four if None, or all
            if there are fewer.
        output_norm: a LayerNorm on each feature. None for what the family's dense-prediction code has; other models get
            them if their classifier follows a LayerNorm.
        frozen_stages: the stem and so many stages, as timm groups their parameters, are not trained and stay in
            evaluation mode; -1 for none.
        norm_eval: BatchNorm keeps its statistics in training.
        grad_checkpointing: recompute instead of keeping activations.
        init_cfg: mmengine's, without effect: timm initialises its models.

    Attributes:
        channels: of each feature.
        reductions: stride of each feature, in pixels.
        mean, std: of the model's images, for values from 0 to 1.
        arguments: what builds the same backbone again, without pretrained weights.

    Raises:
        RunError: no such model, keyword, weights or stages.
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
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg)
        model_kwargs = dict(model_kwargs or {})
        self.arguments: dict[str, Any] = {
            "model": model,
            "model_kwargs": model_kwargs,
            "out_indices": None if out_indices is None else list(out_indices),
            "output_norm": output_norm,
            "frozen_stages": frozen_stages,
            "norm_eval": norm_eval,
            "grad_checkpointing": grad_checkpointing,
        }
        for key in ("features_only", "out_indices"):
            if key in model_kwargs:
                raise RunError(f"model_kwargs has {key!r}, which the backbone sets itself: see dense.out_indices.")
        classifier = self.classifier()
        taken = inspect.signature(type(classifier).__init__).parameters
        indices = _indices(model, classifier, out_indices)
        kwargs = model_kwargs | {"features_only": True, "out_indices": tuple(indices)}
        if "dynamic_img_size" in taken:  # Swin's and ViT's that take one size only otherwise
            kwargs.setdefault("dynamic_img_size", True)
        elif classifier.pretrained_cfg["fixed_input_size"]:
            log.warning("%s is made for images of one size: others may fail, or need certain multiples.", model)
        final = _final_norm(classifier)
        if "output_norm" in taken:  # ours know where they have them
            kwargs["output_norm"] = kwargs.get("output_norm", True) if output_norm is None else output_norm
            output_norm = False
        elif output_norm is None:
            output_norm = final is not None

        if isinstance(pretrained, str) and not type(classifier).__module__.startswith("zoo."):
            # timm lets a feature extractor take any file, in part or not at all; a classifier has to fit.
            self.body = _build(model, kwargs)
            weights = _build(model, model_kwargs, pretrained).state_dict()
            self.body.load_state_dict(self._by_own_names(weights, self.body.state_dict()))
        else:
            self.body = _build(model, kwargs, pretrained)
        info = self.body.feature_info
        self.channels: list[int] = info.channels()
        self.reductions: list[int] = info.reduction()
        self.mean, self.std = (tuple(self.body.pretrained_cfg[key]) for key in ("mean", "std"))
        if len(set(self.reductions)) < len(indices):
            strides = ", ".join(map(str, self.reductions))
            log.warning("%s has features at strides %s: no pyramid for objects of all sizes.", model, strides)
        # Wrappers around `forward_intermediates` ask for NCHW themselves, and some wrappers do not say.
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        eps = 1e-5 if final is None else final.eps
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=eps) for dim in self.channels) if output_norm else None
        _drop_unused_norms(self.body, indices)
        if grad_checkpointing:
            _checkpoint(model, self.body)
        self._norm_eval = norm_eval
        self._frozen = self._freeze(classifier, frozen_stages)

    def classifier(self) -> nn.Module:
        """The whole model, with the names that its own methods know but without memory for its parameters."""
        kwargs = {key: value for key, value in self.arguments["model_kwargs"].items() if key != "output_norm"}
        with torch.device("meta"):
            return _build(self.arguments["model"], kwargs)

    def layer_scales(self, layer_decay: float) -> dict[str, float]:
        """`layer_decay` to the power of each parameter's distance from the classifier, in timm's layers of the model.

        By names below the backbone. Parameters that a classifier does not have are as new as it, and left out.
        """
        model = self.classifier()
        if hasattr(model, "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        else:
            layers = auto_group_layers(model)
        scales = {name: layer_decay ** (max(layers.values()) - layer) for name, layer in layers.items()}
        return self._by_backbone_names(scales)

    def undecayed(self) -> set[str]:
        """Names, below the backbone, of the parameters that the model's own `no_weight_decay` lists."""
        model = self.classifier()
        patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        listed = {name: any(fnmatch(name, pattern) for pattern in patterns) for name, _ in model.named_parameters()}
        return {name for name, found in self._by_backbone_names(listed).items() if found}

    def _by_backbone_names(self, values: Mapping[str, T]) -> dict[str, T]:
        names = [name for name, _ in self.body.named_parameters()]
        return {f"body.{name}": value for name, value in self._by_own_names(values, names).items()}

    @staticmethod
    def _by_own_names(values: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
        """`values` of a whole model by those `names` of the feature extractor that stand for the same."""
        # timm's extractors put a module around the model, or flatten "stages.0" into "stages_0".
        flat = {name.replace(".", "_"): value for name, value in values.items()}
        found = {}
        for name in names:
            keys = (part.replace(".", "_") for part in (name, name.partition(".")[2]))
            key = next((key for key in keys if key in flat), None)
            if key is not None:
                found[name] = flat[key]
        return found

    def _freeze(self, classifier: nn.Module, stages: int) -> list[nn.Module]:
        """Freeze the stem and `stages` stages; the modules that are frozen altogether."""
        if stages < 0:
            return []
        name = self.arguments["model"]
        if not hasattr(classifier, "group_matcher"):
            raise RunError(f"dense.frozen_stages={stages}: {name} does not say what its stages are, leave it at -1.")
        groups = group_parameters(classifier, classifier.group_matcher(coarse=True), reverse=True)
        parameters = dict(self.body.named_parameters())
        groups = self._by_own_names(groups, parameters)
        last = max(groups.values())
        if stages > last:
            raise RunError(
                f"dense.frozen_stages={stages}: {name} has {last} stages, so it has to be from -1 to {last}."
            )
        for parameter, group in groups.items():
            if group <= stages:
                parameters[parameter].requires_grad = False
        owned = ((module, list(module.parameters())) for module in self.body.modules())
        return [module for module, own in owned if own and not any(parameter.requires_grad for parameter in own)]

    def init_weights(self) -> None:
        """Nothing: timm has initialised the model, or loaded its weights."""

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode for all but what is frozen, and the BatchNorms if they keep their statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to features (B, channels, h, w)."""
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
) -> list[dict[str, Any]]:
    """Parameter groups, one for each pair of learning rate and weight decay, of a model on a `TimmBackbone`.

    Args:
        model: detector or segmentor, its backbone under `backbone`.
        lr: learning rate of all but the backbone, and of its parameters that a classifier does not have.
        weight_decay: of the parameters that are decayed.
        layer_decay: factor of the learning rate from each of the backbone's layers to the one before; none if None.
        no_decay: parameters with one of these in their name are not decayed; if None, vectors, biases and what the
            backbone's `no_weight_decay` lists are not.
        backbone_lr: factor of the learning rate for the whole backbone.
    """
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
        rate = lr if own is None else lr * backbone_lr * scales.get(own, 1.0)
        groups.setdefault((rate, 0.0 if free else weight_decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _build(model: str, kwargs: Mapping[str, Any], pretrained: bool | str = False) -> nn.Module:
    return build_model(Config(model=model, model_kwargs=dict(kwargs), pretrained=pretrained), num_classes=None)


def _indices(name: str, model: nn.Module, out_indices: Sequence[int] | None) -> list[int]:
    """`out_indices`, or the last four stages of `model`."""
    count = len(getattr(model, "feature_info", None) or ())
    if not count:
        raise RunError(f"{name} gives no features, only classes: choose a model whose `feature_info` lists stages.")
    if out_indices is None:
        return list(range(max(count - 4, 0), count))
    indices = [index + count if index < 0 else index for index in out_indices]
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < count:
        raise RunError(
            f"dense.out_indices={list(out_indices)}: {name} has {count} stages, so it has to be rising numbers from 0 "
            f"to {count - 1}."
        )
    return indices


def _final_norm(model: nn.Module) -> nn.LayerNorm | None:
    """The LayerNorm between the last stage and the classifier, wherever timm's models have it."""
    modules = dict(model.named_modules())
    found = (modules.get(name) for name in ("norm", "fc_norm", "head.norm"))
    return next((norm for norm in found if isinstance(norm, nn.LayerNorm)), None)


def _drop_unused_norms(body: nn.Module, indices: Sequence[int]) -> None:
    """Remove the norms of features that nobody asked for: parameters without gradients would stop DDP."""
    norms = getattr(getattr(body, "model", None), "output_norms", None) or ()
    for i in set(range(len(norms))) - set(indices):
        norms[i] = nn.Identity()


def _checkpoint(name: str, body: nn.Module) -> None:
    holder = body if hasattr(body, "set_grad_checkpointing") else getattr(body, "model", None)
    try:
        holder.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"{name} has no gradient checkpointing: leave trainer.grad_checkpointing at false.") from error
