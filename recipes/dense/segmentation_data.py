"""Data for segmentation (label PNGs): found, checked and counted before training starts.

Labels that would silently teach wrong classes are refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.messages import UserError
from zoo.recipes import same_images
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.annotations import some
from zoo.recipes.dense.data_checks import (
    base_folder,
    check_all,
    check_folder,
    check_png_size,
    named_splits,
    read_png,
    read_size,
    shares,
)
from zoo.recipes.dense.formats import find
from zoo.recipes.files import SPLIT_FOLDERS, read_classes, read_json, read_text
from zoo.recipes.images import ENDINGS
from zoo.recipes.logs import log
from zoo.recipes.subsets import files_to_check

_LABELS = frozenset({".png"})
_MOST_LABELS = 2**16  # values of a PNG with 16 bits


@dataclass
class SegmentationSplit:
    """One split of a segmentation data set: images and label PNGs of the same names.

    Attributes:
        images: The folder of images.
        labels: The folder of labels, with one channel of 8 or 16 bits, or palette indices; or, if the data were
            converted, a JSON list of the images with their labels.
        classes: Names in the order of the labels.
        ignore_index: The label of ignored pixels.
        reduce_zero_label: Whether 0 in the files is ignored too, and the classes are 1, 2, ...
        num_images: The number of images with labels.
        pixels: The number of pixels of each class in the label files that were checked.
        num_checked: The number of label files that were checked.
    """

    images: Path
    labels: Path
    classes: list[str]
    ignore_index: int
    reduce_zero_label: bool
    num_images: int
    pixels: list[int]
    num_checked: int

    def dataset(self, pipeline: list[dict], training: bool) -> dict[str, Any]:
        """The configuration of mmseg's data set."""
        return {
            "type": "mmseg.PairedDataset",
            "data_prefix": {"img_path": str(self.images), "seg_map_path": str(self.labels)},
            "metainfo": {"classes": tuple(self.classes)},
            "reduce_zero_label": self.reduce_zero_label,
            "ignore_index": self.ignore_index,
            "test_mode": not training,
            "pipeline": pipeline,
        }

    def metrics(self, masks: bool = False) -> dict[str, Any]:
        """The configuration of the metric mIoU; `masks` only matters for detection."""
        return {"type": "mmseg.IoUMetric", "iou_metrics": ["mIoU"], "ignore_index": self.ignore_index}


@dataclass
class SegmentationData:
    """The splits of a segmentation data set; `train` is None if the data are only for evaluation."""

    train: SegmentationSplit | None
    val: SegmentationSplit
    classes: list[str]
    ignore_index: int
    reduce_zero_label: bool
    source: str = ""  # the format, if the data were converted

    def summary(self) -> list[str]:
        """Describe the format and each split in one line."""
        lines = [f"data: {self.source}"] if self.source else []
        return lines + [
            f"{name}: {split.num_images} images, pixels of {split.num_checked}: {shares(split.classes, split.pixels)}"
            for name, split in named_splits(self.train, self.val)
        ]


def open_segmentation(cfg: DataConfig, training: bool = True, classes: Sequence[str] | None = None) -> SegmentationData:
    """Open the folders of images and label PNGs that `cfg` names, or the digit scenes, and check them.

    Args:
        cfg: The configuration.
        training: Open both splits; otherwise only the validation split.
        classes: The class names in the order of the labels, which `data.class_map` or <root>/classes.txt have to match;
            None for those of these files or of `data.num_classes`.

    Raises:
        UserError: The data can't be used; the message names the file and what is wrong with it.
    """
    converted = find.segmentation(cfg, training)
    base = Path(cfg.root) if converted else base_folder(cfg, cfg.val_images)
    classes = _segmentation_classes(cfg, base, classes, converted.classes if converted else None)
    _check_ignore_index(cfg, len(classes))
    splits = [(cfg.val_split, "val", cfg.val_images, cfg.val_labels)]
    if training:
        splits.insert(0, (cfg.train_split, "train", cfg.train_images, cfg.train_labels))
    opened: list[SegmentationSplit] = []
    files: list[list[Path]] = []
    for split, key, given_images, given_labels in splits:
        if converted:
            images, labels = converted.images, converted.splits[key]
            found = read_pairs(labels)
        else:
            images = _split_folder(base, split, key, "images", given_images, ("images",))
            labels = _split_folder(base, split, key, "labels", given_labels, ("annotations", "labels"))
            found = pair_files(images, labels, strict=True)
        files.append([image for image, _ in found])
        chosen = files_to_check(found, cfg)
        counted = check_all(lambda pair: (pair[1], _count_labels(pair, cfg.max_pixels)), chosen, f"labels in {labels}")
        present = [counts for _, counts in counted]
        reduce = _reduces(cfg, labels, present, len(classes))
        pixels = _count_pixels(cfg, [label for label, _ in counted], present, classes, reduce)
        if present:
            whole = key == "train" and len(present) == len(found)
            _check_pixels(labels, pixels, present, classes, cfg.ignore_index, reduce, whole)
        opened.append(
            SegmentationSplit(images, labels, classes, cfg.ignore_index, reduce, len(found), pixels, len(present))
        )
    if training:
        same_images.check(cfg, *files)
    train, val = (opened[0], opened[1]) if training else (None, opened[0])
    source = converted.source if converted else ""
    return SegmentationData(train, val, classes, cfg.ignore_index, val.reduce_zero_label, source)


def _check_ignore_index(cfg: DataConfig, classes: int) -> None:
    index = cfg.ignore_index
    if classes >= _MOST_LABELS:
        raise UserError(f"the data has {classes} classes, but a PNG holds at most {_MOST_LABELS} labels.")
    if not 0 <= index < _MOST_LABELS:
        raise UserError(f"data.ignore_index={index} is not allowed: labels are 0 to {_MOST_LABELS - 1}.")
    if cfg.reduce_zero_label and index <= classes:
        raise UserError(
            f"data.ignore_index={index} can't be used with data.reduce_zero_label=true, where 0 is not a class and "
            f"1 to {classes} are classes: it has to be a higher label, for example {_MOST_LABELS - 1}."
        )
    if index == DataConfig.ignore_index < classes:
        raise UserError(
            f"data.ignore_index={index} is one of the {classes} classes: set it to a label that is not a class, "
            f"for example {_MOST_LABELS - 1}."
        )


def _segmentation_classes(
    cfg: DataConfig, base: Path, given: Sequence[str] | None, usual: list[str] | None
) -> list[str]:
    """The classes of the data, which have to be `given` if that is not None; `usual` are those of the format."""
    source = Path(cfg.class_map) if cfg.class_map else base / "classes.txt"
    names = _class_file(source) if cfg.class_map or source.is_file() else None
    if names and cfg.num_classes and cfg.num_classes != len(names):
        raise UserError(f"data.num_classes={cfg.num_classes}, but {source} has {len(names)} classes: leave it out.")
    if names is None and usual and cfg.num_classes in (None, len(usual)):
        source, names = base, usual
    if given is not None:
        _check_trained_classes(cfg, source, names, given)
        return list(given)
    names = names or _numbered_classes(cfg)
    if names is None:
        raise UserError(
            f"{base} does not name its classes: write {base / 'classes.txt'} with one name per line, in the order of "
            "the labels, or give data.class_map=<file> or data.num_classes=<number>."
        )
    if len(names) < 2:
        raise UserError(f"the data has {len(names)} class, {names[0]!r}: segmentation needs two or more.")
    return names


def _numbered_classes(cfg: DataConfig) -> list[str] | None:
    """`data.num_classes` classes: those of ADE20K if the settings are its own, otherwise numbers; None if not set."""
    if cfg.num_classes == 150 and cfg.reduce_zero_label:
        from mmseg.utils.class_names import ade_classes

        return [name.strip() for name in ade_classes()]
    return [str(label) for label in range(cfg.num_classes)] if cfg.num_classes else None


def _check_trained_classes(cfg: DataConfig, source: Path, names: Sequence[str] | None, trained: Sequence[str]) -> None:
    """Refuse data with other classes than those of the training."""
    number = len(names) if names else cfg.num_classes or len(trained)
    if number != len(trained):
        raise UserError(
            f"{source if names else 'data.num_classes'} says {number} classes, but the training had {len(trained)}: "
            "they have to be the same."
        )
    different = [i for i, (a, b) in enumerate(zip(names or trained, trained, strict=True)) if a != b]
    if different:
        first = different[0]
        raise UserError(
            f"{source} has other classes than the training, label {first} is {names[first]!r} and was "
            f"{trained[first]!r} ({len(different)} differ): names and order have to be the same."
        )


def _class_file(path: Path) -> list[str]:
    """Read a file of classes; an empty line is refused, since line numbers are labels and it would shift them."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")] if path.exists() else []
    if len(lines) > 1 and "" in lines:
        raise UserError(f"{path} has to name one class per line, but line {lines.index('') + 1} is empty.")
    return read_classes(path)


def _split_folder(base: Path, split: str, key: str, kind: str, given: str | None, parents: Sequence[str]) -> Path:
    names = SPLIT_FOLDERS.get(split, (split,))
    tried = [base / given] if given else [base / parent / name for parent in parents for name in names]
    if given:
        check_folder(f"data.{key}_{kind}", tried[0])
    found = next((folder for folder in tried if folder.is_dir()), None)
    if found is None:
        wanted = " or ".join(str(base / parent / split) for parent in parents)
        raise UserError(
            f"there are no {kind} of the split {split!r} in {wanted}: name the split with data.{key}_split=<name>, or "
            f"the folder with data.{key}_{kind}=<folder>."
        )
    return found


def read_pairs(path: Path) -> list[tuple[Path, Path]]:
    """The pairs of an image and its labels in a JSON list, which may name labels relative to its own folder."""
    return [(Path(image), path.parent / label) for image, label in read_json(path)]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return some(names) if names else "nothing"


def pair_files(images: Path, labels: Path, strict: bool = False) -> list[tuple[Path, Path]]:
    """Sorted pairs of images and label PNGs with the same paths below the two folders, extensions aside.

    Raises:
        UserError: Two images differ only in their extensions; or, if `strict`, an image has no label, or a folder has
            no files.
    """
    by_stem = _files(images, ENDINGS)
    labels_by_stem = _files(labels, _LABELS)
    both = sorted(by_stem.keys() & labels_by_stem.keys())
    if strict:
        for folder, files, endings in ((images, by_stem, ENDINGS), (labels, labels_by_stem, _LABELS)):
            if not files:
                raise UserError(
                    f"{folder} has no files that end in {', '.join(sorted(endings))}: it has {_listing(folder)}."
                )
        unlabelled = sorted(by_stem.keys() - labels_by_stem.keys())
        if unlabelled:
            first = by_stem[unlabelled[0]]
            raise UserError(
                f"{len(unlabelled)} of the {len(by_stem)} images in {images} have no label in {labels}; the first is "
                f"{first.relative_to(images)}, which needs {unlabelled[0]}.png: add labels or remove the images."
            )
        unused = sorted(labels_by_stem.keys() - by_stem.keys())
        if unused:
            log.warning("%s has %d labels without an image; the first is %s.png.", labels, len(unused), unused[0])
    return [(by_stem[stem], labels_by_stem[stem]) for stem in both]


def _files(folder: Path, endings: frozenset[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent, below, names in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in endings or name.startswith("."):
                continue
            path = Path(parent, name)
            key = path.relative_to(folder).with_name(stem).as_posix()
            if key in found:
                raise UserError(f"{found[key]} and {path} differ only in their extensions: remove one of them.")
            found[key] = path
    return found


def _count_labels(pair: tuple[Path, Path], max_pixels: int) -> Counter:
    """Count the pixels of each label; also checks that the label fits the image."""
    image, label = pair
    pixels = read_labels(label, image, read_size(image, max_pixels))
    if pixels.dtype == np.uint8:
        counts = np.bincount(pixels.ravel(), minlength=256)
        return Counter({int(value): int(counts[value]) for value in np.flatnonzero(counts)})
    return Counter(dict(zip(*(part.tolist() for part in np.unique(pixels, return_counts=True)), strict=True)))


def read_labels(label: str | Path, image: str | Path, size: tuple[int, int]) -> np.ndarray:
    """The labels in a PNG as they are stored: (H, W), uint8, or int32 if they have more bits.

    Args:
        label: The PNG.
        image: Its image, for messages.
        size: Width and height of the image, rotated by its EXIF orientation.

    Raises:
        CorruptFile: The label can't be read.
        UserError: It is not a label, or its size differs from the image's.
    """
    mode, pixels = read_png(label, size)
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise UserError(
            f"{label} has the mode {mode}, but a label has one channel of numbers, or a palette: "
            "write each pixel's class as a number (mode L)."
        )
    check_png_size(label, pixels, image, size)
    return pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.int32, copy=False)


def _reduces(cfg: DataConfig, folder: Path, present: Sequence[Counter], num_classes: int) -> bool:
    """Whether 0 is not a class: as configured, and not guessed, since a wrong guess shifts every class by one."""
    if cfg.reduce_zero_label is not None:
        return cfg.reduce_zero_label
    values = set().union(*present) - {cfg.ignore_index}
    if values and max(values) == num_classes:
        raise UserError(
            f"the labels in {folder} go up to {num_classes}, but {num_classes} classes have 0 to {num_classes - 1}: "
            "set data.reduce_zero_label=true if 0 is not a class and they count from 1, or name one more class."
        )
    return False


def _count_pixels(
    cfg: DataConfig, labels: Sequence[Path], present: Sequence[Counter], classes: Sequence[str], reduce: bool
) -> list[int]:
    first = int(reduce)
    allowed = {*range(first, len(classes) + first), cfg.ignore_index} | ({0} if reduce else set())
    wrong = [(label, sorted(counts.keys() - allowed)) for label, counts in zip(labels, present, strict=True)]
    wrong = [(label, values) for label, values in wrong if values]
    if wrong:
        label, values = wrong[0]
        more = f" ({len(wrong)} of {len(labels)} files have such labels)" if len(wrong) > 1 else ""
        remedy = "" if reduce else ", or data.reduce_zero_label=true if 0 is not a class"
        raise UserError(
            f"{label} has the label {values[-1]}{more}, but {len(classes)} classes have {first} to "
            f"{len(classes) + first - 1}, and {'0 and ' if reduce else ''}{cfg.ignore_index} do not count: correct "
            f"it, or set data.ignore_index=<label> for pixels that do not count, or data.num_classes{remedy}."
        )
    total = sum(present, Counter())
    ignored = {cfg.ignore_index} | ({0} if reduce else set())
    return [0 if label in ignored else total[label] for label in range(first, len(classes) + first)]


def _check_pixels(
    folder: Path,
    pixels: Sequence[int],
    present: Sequence[Counter],
    classes: Sequence[str],
    ignore_index: int,
    reduce: bool,
    all_training: bool,
) -> None:
    """Refuse labels with no class or, if they are `all_training` labels, a single one; warn of missing classes."""
    ignored = f"{'0 and ' if reduce else ''}{ignore_index}"
    if not any(pixels):
        raise UserError(
            f"no pixel in {folder} counts, because all labels are {ignored}: check data.ignore_index and the files."
        )
    without = [name for name, count in zip(classes, pixels, strict=True) if not count]
    if all_training and len(without) == len(classes) - 1:
        only = next(name for name, count in zip(classes, pixels, strict=True) if count)
        raise UserError(
            f"all pixels in {folder} that count are of one class, {only!r} ({ignored} does not count): there is "
            "nothing to learn; masks of 0 and 255 have to be written as 0 and 1."
        )
    if without:
        shift = not reduce and not any(0 in counts for counts in present)
        hint = "; where they count from 1, set data.reduce_zero_label=true" if shift else ""
        log.warning(
            "the labels in %s have no pixel of %d of the %d classes: %s%s.",
            folder,
            len(without),
            len(classes),
            some(without),
            hint,
        )
