"""The optimizer of detection and segmentation, which skips updates whose loss is not finite."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.optim import create_optimizer_v2
from torch import nn

from zoo.messages import UserError
from zoo.recipes import distributed
from zoo.recipes.dense.backbone import param_groups
from zoo.recipes.timing import StepTimes


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Any optimizer of timm, on parameter groups with timm's layer-wise decay of the backbone.

    Args:
        optim_wrapper_cfg: The wrapper's configuration; `optimizer` has timm's name as `type`, `lr`, `weight_decay`.
        paramwise_cfg: The arguments `layer_decay`, `no_decay`, `backbone_lr`, `lr_factors` of `param_groups`.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
        self.wrapper, self.paramwise = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})
        self.optimizer = dict(self.wrapper.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The wrapper for `model`, which may be wrapped for several processes."""
        settings = dict(self.optimizer)
        name, lr, weight_decay = settings.pop("type"), settings["lr"], settings["weight_decay"]
        groups = param_groups(getattr(model, "module", model), lr=lr, weight_decay=weight_decay, **self.paramwise)
        try:
            optimizer = create_optimizer_v2(groups, opt=name, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"the optimizer can't be created from optim={self.optimizer}: {error}") from error
        return OPTIM_WRAPPERS.build(dict(self.wrapper, optimizer=optimizer))


class _SkipBadLoss:
    """A mixin that skips an update in all processes if the loss of one of them is not finite.

    Attributes:
        stepped: Whether the last update was not skipped.
        times: Measures the parts of an update, if given.
    """

    stepped = True
    times: StepTimes | None = None
    _bad = False

    def update_params(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of `loss` and, with the last loss of an update, step the optimizer."""
        finite = bool(torch.isfinite(loss.detach()))
        self._bad = self._bad or bool(distributed.total([float(not finite)], loss.device)[0])
        self._lap("forward")
        if not self._bad:
            super().update_params(loss, *args, **kwargs)
        else:
            self._inner_count += 1
        if self.should_update():
            self.stepped = not self._bad
            if self._bad:
                self.zero_grad()
            self._bad = False

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Add the gradients of `loss`."""
        super().backward(loss, **kwargs)
        self._lap("backward")

    def step(self, **kwargs: Any) -> None:
        """Step the optimizer."""
        super().step(**kwargs)
        self._lap("optimizer")

    def _lap(self, part: str) -> None:
        if self.times:
            self.times.lap(part)


@OPTIM_WRAPPERS.register_module()
class SkipBadLossOptimWrapper(_SkipBadLoss, OptimWrapper):
    """An OptimWrapper of MMEngine that skips updates whose loss is not finite."""


@OPTIM_WRAPPERS.register_module()
class SkipBadLossAmpOptimWrapper(_SkipBadLoss, AmpOptimWrapper):
    """An AmpOptimWrapper of MMEngine that skips updates whose loss is not finite."""
