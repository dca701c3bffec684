"""Loading of MMEngine's checkpoints without running code from the file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint

from zoo.messages import UserError, one_line


def _statistic(owner: Any, name: str) -> Any:
    """The only use of `getattr` that the curves of a run need: their statistics."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r}")
    return getattr(HistoryBuffer, name)


_SAFE = [
    *(allowed for allowed in checkpoint.get_torch_safe_globals() if allowed is not getattr),
    (_statistic, "builtins.getattr"),
]


def refuse_unpickling() -> None:
    """Patch the loaders of MMEngine to refuse checkpoints that hold more than tensors and plain values.

    By default, MMEngine unpickles files that torch refuses, and everything that it downloads, which runs any code that
    the file names. It also lets a file call `getattr`, which gives access to all modules.

    A refused file raises UserError. Calling this again changes nothing.
    """
    checkpoint._safe_torch_load = _load
    checkpoint.load_url = _download


def _load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """`torch.load` of tensors, plain values, and the NumPy arrays and curves of a run of MMEngine."""
    with _errors(file if isinstance(file, str | os.PathLike) else "the checkpoint"):
        return torch.load(file, map_location=map_location, weights_only=True)


def _download(url: str, **options: Any) -> Any:
    with _errors(url):
        return torch.hub.load_state_dict_from_url(url, **options | {"weights_only": True})


@contextmanager
def _errors(source: Any) -> Iterator[None]:
    try:
        with torch.serialization.safe_globals(_SAFE):
            yield
    except pickle.UnpicklingError as error:
        # torch first gives advice on how to unpickle the file anyway; the reason follows.
        reason = _short(str(error).rpartition("WeightsUnpickler error: ")[2])
        raise UserError(
            f"{source} can't be loaded without running code that it contains ({reason}): give a file with tensors."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{source} can't be read as a checkpoint ({_short(error)}): give another file.") from error


def _short(reason: Any) -> str:
    return one_line(reason, 200).partition(". ")[0] if str(reason) else "incomplete"
