"""A data set of another format, converted to files that detection or segmentation reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.messages import UserError
from zoo.recipes import cache
from zoo.recipes.logs import log

DATA = "data.json"  # the converted file of a split
_VERSION = 1  # increase it when anything in the converted files changes
_USUAL = {"train2017": "train", "training": "train", "val2017": "val", "validation": "val"}  # of data=coco, data=ade20k


@dataclass
class Converted:
    """A converted data set.

    Attributes:
        source: What it was, for logs and reports.
        splits: The files by key, "train" and "val": COCO JSON, or JSON lists of pairs of an image and its labels.
        images: The folder that file names of images in COCO JSON are relative to.
        has_masks: Whether every object has a mask (detection).
        classes: The names of the classes in the order of the labels (segmentation).
        ignore_index: The label of pixels that do not count (segmentation).
    """

    source: str
    splits: Mapping[str, Path]
    images: Path
    has_masks: bool = False
    classes: list[str] | None = None
    ignore_index: int = 255


def convert(kind: str, root: Path, files: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """The folder in the cache with the converted files; `write` writes them, unless they exist.

    Args:
        kind: The format and what is made of it, for the name of the folder.
        root: The folder of the data.
        files: The files on which the result depends: if one has changed, the data are converted again.
        write: Writes the files into the folder that it gets, the same ones each time.

    Raises:
        UserError: The cache can't be written to, or `write` refuses the data.
    """
    state = hashlib.sha256(f"{_VERSION} {root.resolve()}".encode("utf-8", "surrogateescape"))
    for file in files:
        status = file.stat()
        state.update(f"\n{file} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", root.resolve().name)[:60]
    folder = cache.cache_folder() / "data" / f"{kind}-{name}-{state.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    log.info("Converting %s to %s (once).", root, folder)
    try:
        cache.publish(folder, write)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster
            raise UserError(
                f"{root} can't be converted in the cache, {folder.parent} ({error.strerror or error}): "
                "set XDG_CACHE_HOME to a folder with room."
            ) from error
    return folder


def split_name(split: str, known: Iterable[str], where: str) -> str:
    """The name of a split among those that the data set has; the usual names of COCO and ADE20K stand for its own.

    Args:
        split: `data.train_split` or `data.val_split`.
        known: The names of the data set's splits.
        where: What has them, for messages.

    Raises:
        UserError: There is no such split.
    """
    names = sorted(known)
    for name in (split, _USUAL.get(split, split)):
        if name in names:
            return name
    raise UserError(
        f"{where} has no split {split!r}, but {', '.join(names) or 'none'}: "
        "set data.train_split=<name> and data.val_split=<name>."
    )
