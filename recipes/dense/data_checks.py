"""Checks that detection and segmentation data have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.messages import UserError, similar_path
from zoo.recipes import distributed, panoptic_scenes, scenes
from zoo.recipes.config import DataConfig
from zoo.recipes.corrupt import CorruptFile
from zoo.recipes.files import DECODING_ERRORS, is_text, reason
from zoo.recipes.images import MAX_PIXELS, image_size, pixel_limit
from zoo.recipes.logs import log
from zoo.recipes.progress import track


def named_splits(train: Any, val: Any) -> Iterator[tuple[str, Any]]:
    """Yield the existing splits with their names in messages."""
    if train is not None:
        yield "training", train
    yield "validation", val


def shares(classes: Sequence[str], counts: Sequence[int], most: int = 12) -> str:
    """Each class's share of `counts` in percent, the most frequent classes first."""
    total = sum(counts) or 1
    ranked = sorted(zip(classes, counts, strict=True), key=lambda pair: -pair[1])
    named = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in ranked[:most])
    return named + (f" and {len(ranked) - most} more" if len(ranked) > most else "")


def base_folder(cfg: DataConfig, path: str | None) -> Path:
    """The folder that relative paths of the data start from; the digit scenes are written there if necessary.

    Args:
        cfg: The configuration.
        path: A path of the data: if it exists without a root, all are absolute or relative to the current folder.

    Raises:
        UserError: `data.root` is not set, or is not a folder.
    """
    own = {"digit_scenes": scenes.ensure, "panoptic_digit_scenes": panoptic_scenes.ensure}
    if cfg.name in own:
        return own[cfg.name](Path(cfg.root) if cfg.root else None)
    if cfg.root is None:
        if path and (os.path.isabs(path) or os.path.exists(path)):
            return Path()
        raise UserError("data.root is not set: give the folder of the data, data.root=<folder>.")
    check_folder("data.root", Path(cfg.root))
    return Path(cfg.root)


def check_folder(key: str, folder: Path) -> None:
    """Refuse a path that is not a folder; `key` names the setting."""
    if not folder.is_dir():
        wrong = "is a file, not a folder." if folder.exists() else f"does not exist{similar_path(folder)}"
        raise UserError(f"{key}={folder} {wrong}")


def check_exist(folder: Path, names: Sequence[str], what: str, annotations: Path) -> None:
    """Refuse `annotations` of files that are not in `folder`; `what` is their kind in the message."""
    present: dict[Path, set[str]] = {}
    missing = []
    for name in names:
        file = folder / name
        if file.parent not in present:
            present[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        if file.name not in present[file.parent]:
            missing.append(file)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} {what} of {annotations} do not exist; the first is {missing[0]}: "
            "add them, or remove them from the annotations."
        )


def check_size(file: str, size: tuple[int, int], given: tuple[float, float], annotations: str | Path) -> None:
    """Refuse an image whose width and height differ from those in its annotations."""
    if size != given:
        raise UserError(
            f"{file} is {size[0]}x{size[1]} pixels (rotated by its EXIF data), but {annotations} gives "
            f"{given[0]}x{given[1]}: the boxes would lie elsewhere."
        )


def check_all(check: Callable[[Any], Any], items: Sequence[Any], description: str) -> list[Any]:
    """Call `check` on the items, and return its results; corrupt files, which have none, are counted in a warning.

    Text files named like images are refused: error pages or lists, saved by mistake, spoil a whole data set.

    Raises:
        UserError: A file is text, or all files are corrupt.
    """

    def tried(item: Any) -> Any:
        try:
            return check(item)
        except CorruptFile as error:
            return error

    with ThreadPool(min(8, distributed.cores())) as pool:  # decoding releases the GIL
        results = list(track(pool.imap(tried, items), len(items), description))
    corrupt = [result for result in results if isinstance(result, CorruptFile)]
    text = next((error.path for error in corrupt if is_text(error.path)), None)
    if text:
        raise UserError(f"{text} is text, not an image: remove or replace it.")
    if corrupt and len(corrupt) == len(items):
        raise UserError(f"none of the {len(items)} {description} can be read; the first is {corrupt[0]}.")
    if corrupt:
        log.warning(
            "%d of %d %s can't be read; the first is %s: they are skipped.",
            len(corrupt),
            len(items),
            description,
            corrupt[0],
        )
    return [result for result in results if not isinstance(result, CorruptFile)]


def read_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image, rotated by its EXIF orientation.

    Raises:
        CorruptFile: It can't be read.
    """
    try:
        return image_size(path, max_pixels)
    except DECODING_ERRORS as error:
        raise CorruptFile(path, reason(error)) from error


def read_png(label: str | Path, size: tuple[int, int]) -> tuple[str, np.ndarray]:
    """Pillow's mode and the pixels, (H, W) or (H, W, channels), of the PNG of an image of width and height `size`.

    Raises:
        CorruptFile: It can't be read.
    """
    try:
        with pixel_limit(max(MAX_PIXELS, math.prod(size))), Image.open(label) as opened:
            return opened.mode, np.array(opened)
    except DECODING_ERRORS as error:
        raise CorruptFile(label, reason(error)) from error


def check_png_size(label: str | Path, pixels: np.ndarray, image: str | Path, size: tuple[int, int]) -> None:
    """Refuse the pixels (H, W, ...) of the PNG of an image that has another width and height."""
    if pixels.shape[:2] != size[::-1]:
        raise UserError(
            f"{label} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but {image} is {size[0]}x{size[1]} (rotated by "
            "its EXIF data): they have to be of the same size."
        )
