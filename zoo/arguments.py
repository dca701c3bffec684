"""The allowed ranges of the models' arguments. A mistake raises a one-sentence error before memory is allocated."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

from zoo.messages import did_you_mean, one_line

__all__ = [
    "as_tuple",
    "check",
    "check_choice",
    "check_halved",
    "check_name",
    "check_stages",
    "is_ep",
    "is_list",
    "is_number",
    "shown",
    "square",
]

T = TypeVar("T")

# The range of each argument, both ends included. If an argument has a value per stage, each value has to be in it.
WHOLE = {
    "in_chans": (1, 2**14),
    "num_classes": (0, 10**7),
    "stem_dim": (1, 2**14),
    "head_dim": (1, 2**14),
    "num_regions": (1, 2**10),
    "kernel_size": (1, 2**10),
    "window_size": (1, 2**10),
    "embed_dims": (1, 2**14),
    "depths": (1, 1000),
    "num_heads": (1, 2**14),
    "reduction_heads": (1, 2**14),
    "groups": (1, 2**14),
    "reduction_groups": (1, 2**14),
    "split_sizes": (1, 2**10),
    "split_size": (1, 2**10),
    "img_size": (32, 2**14),
    "agent_depths": (0, 1000),
    "agent_grid": (1, 2**7),
    "table_grid": (1, 2**7),
    "sr_ratios": (1, 2**10),
    "shared_heads": (0, 2**14),
    "routed_heads": (0, 2**14),
    "pretrain_size": (64, 2**14),
    "num_latents": (1, 2**14),
    "latent_depths": (1, 1000),
    "group_width": (1, 2**14),
    "hidden_dim": (1, 2**14),
}
REAL = {
    "mlp_ratio": (0, 100),
    "mlp_ratios": (0, 100),
    "alpha": (0, 1),
    "drop_rate": (0, 1),
    "proj_drop_rate": (0, 1),
    "drop_path_rate": (0, 1),
    "norm_eps": (0, 1),
    "norm_momentum": (0, 1),
    "layer_scale": (-1000, 1000),
    "layer_scale_init": (-1000, 1000),
}
OPTIONAL = ("layer_scale", "kernel_size", "hidden_dim")  # may be None
ONE_FOR_ALL = ("mlp_ratio", "window_size")  # may be a single number for all stages
CHOICES = {"global_pool": ("avg", "ep", ""), "output_norm": (True, False)}


def check(**settings: Any) -> None:
    """Raise ValueError unless each argument is a number or choice that WHOLE, REAL or CHOICES allow."""
    for name, value in settings.items():
        if name in CHOICES:
            if not (name == "global_pool" and is_ep(value)):
                check_choice(name, value, CHOICES[name])
        elif not (value is None and name in OPTIONAL) and not _fits(name, value):
            kind = "a whole number" if name in WHOLE else "a number"
            raise ValueError(f"Got {name}={shown(value)}; it has to be {kind} {_range(name)}.")


def check_halved(embed_dims: Sequence[int]) -> None:
    """Raise ValueError unless a stem with half of the first stage's channels has any."""
    if embed_dims[0] < 2:
        raise ValueError(
            f"Got {embed_dims=}; the first stage needs 2 channels or more, since the stem has half as many."
        )


def check_stages(**settings: Any) -> None:
    """Raise ValueError unless all settings are lists with one value per stage that WHOLE or REAL allow.

    A single `mlp_ratio` or `window_size` applies to all stages. The number of heads has to divide the channels of its
    stage, and MLPs need at least one hidden channel.
    """
    lists = {}
    for name, values in settings.items():
        if name in ONE_FOR_ALL and not is_list(values):
            check(**{name: values})
            continue
        if not is_list(values):
            raise ValueError(f"Got {name}={shown(values)}; give a list with one value per stage.")
        if name in (*WHOLE, *REAL) and not all(
            _fits(name, value) and isinstance(value, int | float)
            for value in values  # excludes NumPy's numbers
        ):
            kind = "whole numbers" if name in WHOLE else "numbers"
            raise ValueError(f"Got {name}={shown(values)}; it has to be {kind} {_range(name)}, one per stage.")
        lists[name] = values
    counts = {len(values) for values in lists.values()}
    if len(counts) != 1 or 0 in counts:
        listed = ", ".join(f"{len(values)} {name}={shown(values)}" for name, values in lists.items())
        raise ValueError(f"Got {listed}; give each of them one value per stage.")
    for i, dim in enumerate(dims := settings["embed_dims"]):
        if "num_heads" in settings and dim % settings["num_heads"][i]:
            raise ValueError(
                f"Got num_heads={shown(settings['num_heads'])} for embed_dims={shown(dims)}; heads have to divide "
                "their stage's channels."
            )
        for name in ("mlp_ratio", "mlp_ratios"):
            ratio = lists[name][i] if name in lists else settings.get(name, 1)
            if int(dim * ratio) < 1:
                raise ValueError(
                    f"Got {name} {ratio} for a stage of {dim} channels, which leaves no hidden channels: raise it."
                )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"Got {name}={shown(value)}; it has to be one of {', '.join(map(repr, choices))}.")


def is_ep(global_pool: Any) -> bool:
    """Whether a value of `global_pool` is "ep" (efficient probing), or "ep" with a number of queries, such as "ep8"."""
    return isinstance(global_pool, str) and re.fullmatch("ep([1-9][0-9]{0,4})?", global_pool) is not None


def check_name(name: str, value: Any, known: Iterable[str], owner: str) -> None:
    """Raise TypeError if `name` is not one of `known`, the arguments of `owner`. The message suggests a name."""
    known = list(known)
    if name not in known:
        hint = did_you_mean(name, known) or f"it takes {', '.join(known)}."
        raise TypeError(f"Got {name}={shown(value)}, which {owner} does not take; {hint}")


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a list, a tuple or another sequence of single values."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_tuple(value: T | Sequence[T], count: int) -> tuple[T, ...]:
    """Convert a list to a tuple, or repeat a single value `count` times."""
    single: Any = value
    return tuple(value) if is_list(value) else (single,) * count


def is_number(value: Any, least: float, most: float, whole: bool = True) -> bool:
    """Whether `value` is a number in this range, and an integer if `whole`."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    number: Any = value
    return bool(least <= number <= most)


def square(img_size: int | Sequence[int]) -> int:
    """The side of square images; timm's configurations give both sides.

    Raises:
        ValueError: The sides differ.
    """
    if is_list(img_size):
        if len(img_size) == 0 or any(side != img_size[0] for side in img_size):
            raise ValueError(
                f"Got {img_size=}; it has to be one side: the tables are made for square images, and fit all others."
            )
        return img_size[0]
    single: Any = img_size
    return single


def shown(value: Any) -> str:
    """`value` on one line and shortened, for messages."""
    return one_line(reprlib.repr(value))


def _fits(name: str, value: Any) -> bool:
    return is_number(value, *(WHOLE.get(name) or REAL[name]), whole=name in WHOLE)


def _range(name: str) -> str:
    least, most = WHOLE.get(name) or REAL[name]
    return f"from {least:,} to {most:,}"
