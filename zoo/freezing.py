"""Freezing of a model's first stages: they are not trained, and stay in evaluation mode."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn

from zoo.messages import UserError

__all__ = ["freeze", "frozen_modules", "keep_frozen", "stages"]

_BACKBONE = "backbone"  # all but the head


def stages(model: Any) -> dict[str, int] | None:
    """The stage of each parameter of a classifier, as timm groups them; None if the model does not say.

    0 is the stem with its embeddings, the stages count from 1, and the largest number is what follows them.
    """
    try:
        return group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    except (AssertionError, AttributeError, NotImplementedError):  # some have groups of layers, but not of stages
        return None


def freeze(model: nn.Module, name: str, what: str, option: str = "trainer.freeze=") -> str:
    """Freeze parameters of a classifier.

    Args:
        model: The classifier.
        name: Its name, for messages.
        what: The number of stages to freeze with the stem; or "backbone" for all but the head, which is the classifier,
            and what comes before it but belongs to no stage.
        option: How the user gives `what`, for messages.

    Returns:
        What is frozen, in words.

    Raises:
        UserError: The model does not say what its stages are, or has fewer.
    """
    of = stages(model)
    if what == _BACKBONE:
        chosen, words = {key for key, _ in model.named_parameters()} - _head(model, of), "all but the head"
    elif of is None:
        raise UserError(
            f"{option}{what}: {name} does not say what its stages are: give {option}{_BACKBONE}, which freezes all but "
            "the head, or leave it out."
        )
    else:
        count, last = int(what), max(of.values()) - 1
        if count > last:
            raise UserError(
                f"{option}{what}: {name} has {last} stages, so it has to be from 0 (the stem alone) to {last}, or "
                f"{_BACKBONE} (all but the head)."
            )
        chosen = {key for key, stage in of.items() if stage <= count}
        words = f"the stem and {count} of {last} stages" if count else f"the stem, and none of {last} stages"
    for key, parameter in model.named_parameters():
        if key in chosen:
            parameter.requires_grad = False
    return words


def _head(model: Any, of: dict[str, int] | None) -> set[str]:
    """The parameters of the classifier, and of the norm or pooling before it that belong to no stage."""
    found = model.get_classifier()
    classifiers = found if isinstance(found, list | tuple) else [found]
    own = {id(parameter) for module in classifiers for parameter in module.parameters()}
    # timm joins the last block of a few models with the head.
    inside = tuple(f"{info['module']}." for info in getattr(model, "feature_info", None) or () if "module" in info)
    last = max(of.values()) if of else None
    return {
        key
        for key, parameter in model.named_parameters()
        if id(parameter) in own or (of and of[key] == last and not key.startswith(inside))
    }


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that have parameters and are frozen completely."""
    owned = ((module, list(module.parameters())) for module in model.modules())
    return [module for module, own in owned if own and not any(parameter.requires_grad for parameter in own)]


def keep_frozen(model: nn.Module) -> nn.Module:
    """Set the frozen modules of a model in training mode to evaluation mode: no drop path, and fixed BatchNorm."""
    for module in frozen_modules(model):
        module.eval()
    return model
