"""The checkpoints that a run resumes from: last.pt, and previous.pt before it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from zoo.messages import UserError
from zoo.recipes import reading
from zoo.recipes.atomic_files import atomic
from zoo.recipes.errors import of_the_system


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, atomically; the old file becomes previous.pt.

    After the first call there is always a whole checkpoint, and after the second one also the one before it. On the
    disk, they take twice the size of a checkpoint, and three times while one is being written.
    """
    with atomic(path, before=path.with_name("previous.pt")) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. No code in the file is executed.

    Raises:
        UserError: The file is missing, damaged (even a single bit) or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch ignores the checksums; checking them makes loading take 1.5 times as long
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: is {path.parent} the folder of a run?") from None
    except Exception as error:  # zipfile and torch raise many kinds of errors for damaged files
        system = of_the_system(error)
        if system:
            raise UserError(f"the checkpoint {path} can't be read: {system}") from error
        reason = (str(error).strip().splitlines() or ["incomplete"])[0].rstrip(".")
        raise UserError(f"the checkpoint {path} can't be read ({reason}): delete it, or start another run.") from error
    if not isinstance(state, dict) or not reading.Checkpoint.__required_keys__ <= state.keys():
        raise UserError(f"{path} is not a checkpoint of zoo-train: give the folder of a run.")
    return reading.check(state, reading.Checkpoint, path)


def last_checkpoint(folder: Path) -> tuple[dict[str, Any], Path, str]:
    """The last whole checkpoint of a run, its file, and what is wrong with last.pt if it is another file.

    Raises:
        UserError: There is no whole checkpoint.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    try:
        return load_checkpoint(last), last, ""
    except UserError as error:
        try:
            state = load_checkpoint(previous)
        except UserError as other:
            raise (other if previous.exists() and not last.exists() else error) from None
        wrong = str(error).partition(":")[0] if last.exists() else f"{last} is missing"
        return state, previous, f"{wrong[0].upper()}{wrong[1:]}: {previous}, the checkpoint before it, is used."


def set_aside(last: Path) -> None:
    """Rename a damaged checkpoint to damaged.pt, so that it never replaces a whole previous.pt.

    Raises:
        UserError: It can't be renamed.
    """
    if last.exists():
        try:
            last.replace(last.with_name("damaged.pt"))
        except OSError as error:
            raise UserError(f"the damaged {last} can't be renamed ({error.strerror}): move it away.") from error


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` has a checkpoint, whole or damaged."""
    return (folder / "last.pt").exists() or (folder / "previous.pt").exists()
