"""Learning rates of single parameters: `optim.lr_factors`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn

from zoo.messages import UserError, did_you_mean, first_few

_TO_MIN_LR = ("cosine", "tanh", "poly", "wsd")  # schedules that end at schedule.min_lr


def checked(cfg: DictConfig, lr: float) -> dict[str, float]:
    """`optim.lr_factors` of a configuration whose learning rate is `lr`.

    Raises:
        UserError: A factor makes a rate that the schedule would raise, not lower.
    """
    factors = dict(cfg.optim.lr_factors)
    lowest, schedule = cfg.schedule.min_lr, cfg.schedule.sched
    for key, factor in factors.items():
        if schedule in _TO_MIN_LR and lr * factor < lowest * (1 - 1e-9):
            raise UserError(
                f"optim.lr_factors: {factor:g} for {key!r} makes a learning rate of {lr * factor:g}, but the schedule "
                f"ends at schedule.min_lr={lowest:g}: lower that, or raise the factor."
            )
    return factors


def trained_names(model: nn.Module) -> list[str]:
    """The names of the parameters of `model` that are not frozen."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def by_name(names: Iterable[str], factors: Mapping[str, float]) -> dict[str, float]:
    """The factor of each of `names` that contains a key of `factors`. Of several keys, the longest one counts.

    Raises:
        UserError: No name contains one of the keys.
    """
    names = list(names)
    for key in factors:
        if not any(key in name for name in names):
            parts = dict.fromkeys(part for name in names for part in _parts(name, key.count(".") + 1))
            hint = did_you_mean(key, parts, count=3, cutoff=0.4) or f"names are {first_few(names, 3)}"
            raise UserError(f"optim.lr_factors has {key!r}, but no trained parameter has that in its name: {hint}")
    found = {}
    for name in names:
        keys = [key for key in factors if key in name]
        if keys:
            found[name] = factors[max(keys, key=len)]
    return found


def _parts(name: str, length: int) -> Iterator[str]:
    """The parts of a dotted name, `length` at a time, without those that contain a number."""
    words = name.split(".")
    for start in range(len(words) - length + 1):
        chosen = words[start : start + length]
        if not any(word.isdigit() for word in chosen):
            yield ".".join(chosen)


def split(
    groups: Iterable[dict[str, Any]], model: nn.Module, lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`groups` of the parameters of `model`, split by their factors of `lr`; those without a factor get no `lr`."""
    names = by_name(trained_names(model), factors)
    of = {id(parameter): names.get(name) for name, parameter in model.named_parameters()}
    result = []
    for group in groups:
        parts: dict[float | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(of[id(parameter)], []).append(parameter)
        for factor, parameters in parts.items():
            result.append(group | {"params": parameters} | ({} if factor is None else {"lr": lr * factor}))
    return result
