"""Data for panoptic segmentation (COCO's panoptic JSON and PNGs): found, checked and counted before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.messages import UserError, similar_path
from zoo.recipes import same_images
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.annotations import some
from zoo.recipes.dense.data_checks import (
    base_folder,
    check_all,
    check_exist,
    check_folder,
    check_png_size,
    check_size,
    named_splits,
    read_png,
    read_size,
    shares,
)
from zoo.recipes.dense.detection_data import check_same_classes, image_folder
from zoo.recipes.dense.panoptic_annotations import Panoptic, Picture, load_panoptic
from zoo.recipes.dense.panoptic_quality import OFFSET
from zoo.recipes.files import SPLIT_FOLDERS, read_classes
from zoo.recipes.logs import log
from zoo.recipes.segment_ids import VOID, from_rgb
from zoo.recipes.subsets import files_to_check

# The panoptic JSON of a split, below data.root; the folder of its PNGs has the same name.
_LAYOUTS = {
    "COCO": "annotations/panoptic_{}.json",
    "ADE20K": "ade20k_panoptic_{}.json",
    "Cityscapes": "gtFine/cityscapes_panoptic_{}.json",
}


@dataclass
class PanopticSplit:
    """One split of a panoptic data set.

    Attributes:
        annotations: The panoptic JSON.
        labels: The folder of its PNGs.
        images: The folder of its images.
        classes: Names in the order of the labels: things, then stuff.
        num_things: The number of things among them.
        segments: The number of segments of each class, without crowds.
        num_images: The number of images.
    """

    annotations: Path
    labels: Path
    images: Path
    classes: list[str]
    num_things: int
    segments: list[int]
    num_images: int

    def dataset(self, pipeline: list[dict], training: bool) -> dict[str, Any]:
        """The configuration of the data set."""
        return {
            "type": "mmdet.SegmentsDataset",
            "ann_file": str(self.annotations),
            "labels": str(self.labels),
            "images": str(self.images),
            "metainfo": {"classes": tuple(self.classes), "num_things": self.num_things},
            "test_mode": not training,
            "pipeline": pipeline,
        }

    def metrics(self, masks: bool) -> list[dict[str, Any]]:
        """The configuration of the metrics: PQ and mIoU, and AP of things; `masks` only matters for detection."""
        return [
            {"type": "mmdet.PanopticQuality"},
            {"type": "mmdet.ThingsMetric", "metric": ["bbox", "segm"], "classwise": True},
        ]


@dataclass
class PanopticData:
    """The splits of a panoptic data set; `train` is None if the data are only for evaluation.

    `source` is empty: all files are in one format, and are read as they are.
    """

    train: PanopticSplit | None
    val: PanopticSplit
    classes: list[str]
    num_things: int
    source: str = ""

    def summary(self) -> list[str]:
        """Describe each split in one line."""
        lines = []
        for name, split in named_splits(self.train, self.val):
            things = sum(split.segments[: split.num_things])
            lines.append(
                f"{name}: {split.num_images} images with {things} things and {sum(split.segments) - things} segments "
                f"of stuff: {shares(split.classes, split.segments)}"
            )
        return lines


def open_panoptic(
    cfg: DataConfig, training: bool = True, classes: Sequence[str] | None = None, num_things: int | None = None
) -> PanopticData:
    """Open the panoptic JSON files that `cfg` names, or the digit scenes, and check them.

    Args:
        cfg: The configuration.
        training: Open both splits; otherwise only the validation split.
        classes: The class names in the order of the labels, things first; None for those of `data.class_map` or of the
            training JSON (the validation JSON if there is no training), in the order of its category ids.
        num_things: The number of things among `classes`; None for that of the JSON.

    Raises:
        UserError: The data can't be used; the message names the file and what is wrong with it.
    """
    base = base_folder(cfg, cfg.val_ann)
    splits = [(cfg.val_split, "val", cfg.val_ann, cfg.val_images, cfg.val_labels)]
    if training:
        splits.insert(0, (cfg.train_split, "train", cfg.train_ann, cfg.train_images, cfg.train_labels))
    classes = list(classes) if classes else read_classes(Path(cfg.class_map)) if cfg.class_map else None
    opened: list[PanopticSplit] = []
    files: list[list[Path]] = []
    for split, key, given, images, given_labels in splits:
        path = _annotation_file(base, split, key, given)
        content = load_panoptic(path)
        names = [*content.things, *content.stuff]
        if classes is None:
            classes = names
        if num_things is None:
            num_things = len(content.things)
        check_same_classes(path, names, classes)
        if len(names) >= OFFSET:
            raise UserError(f"{path} has {len(names)} classes, but mmdet's panoptic models have {OFFSET - 1} at most.")
        _check_same_things(path, content, classes, num_things)
        folder = image_folder(base, split, key, images, path, [picture.image for picture in content.pictures])
        labels = _labels_folder(base, key, given_labels, path)
        _check_files(path, folder, labels, content.pictures, cfg)
        counts = Counter(name for p in content.pictures for _, name, crowd in p.segments if not crowd)
        files.append([folder / picture.image for picture in content.pictures])
        segments = [counts[name] for name in classes]
        without = [name for name in classes if not counts[name]]
        if without:
            log.warning(
                "%s has no segment of %d of the %d classes: %s.", path, len(without), len(classes), some(without)
            )
        opened.append(PanopticSplit(path, labels, folder, classes, num_things, segments, len(content.pictures)))
    if cfg.num_classes and cfg.num_classes != len(classes):
        raise UserError(
            f"data.num_classes={cfg.num_classes}, but {opened[0].annotations} has {len(classes)} classes: leave it out."
        )
    if training:
        same_images.check(cfg, *files)
    train, val = (opened[0], opened[1]) if training else (None, opened[0])
    return PanopticData(train, val, classes, num_things)


def _check_same_things(path: Path, content: Panoptic, classes: Sequence[str], num_things: int) -> None:
    things = classes[:num_things]
    other = [name for name in classes if (name in content.things) != (name in things)]
    if other:
        kinds = ("a thing", "stuff") if other[0] in content.things else ("stuff", "a thing")
        raise UserError(
            f"{path} says that {other[0]!r} is {kinds[0]} (isthing), but for the model it is {kinds[1]}"
            f"{f' ({len(other)} classes differ)' if len(other) > 1 else ''}: things come first among the classes, and "
            "isthing has to be the same in all files."
        )


def _annotation_file(base: Path, split: str, key: str, given: str | None) -> Path:
    if given:
        path = base / given
        if path.is_dir():
            raise UserError(
                f"data.{key}_ann={path} is a folder: give the panoptic JSON; the folder of its PNGs is "
                f"data.{key}_labels."
            )
        if not path.is_file():
            raise UserError(f"data.{key}_ann={path} does not exist{similar_path(path)}")
        return path
    names = SPLIT_FOLDERS.get(split, (split,))
    tried = [base / layout.format(name) for layout in _LAYOUTS.values() for name in names]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        places = ", ".join(f"{layout.format(split)} ({name})" for name, layout in _LAYOUTS.items())
        raise UserError(
            f"{base} has no panoptic annotations of the split {split!r}: none of {places}. Name the file with "
            f"data.{key}_ann=<file>{_hint(base, names)}."
        )
    return found


def _hint(base: Path, names: Sequence[str]) -> str:
    """What the data set has instead, to end a message."""
    if any((base / "annotations" / f"instances_{name}.json").is_file() for name in names):
        return "; it has COCO's instances, which task=detect uses"
    if (base / "gtFine").is_dir():
        return "; `python -m cityscapesscripts.preparation.createPanopticImgs` makes those of Cityscapes"
    if (base / "annotations").is_dir() and not list((base / "annotations").glob("*.json")):
        return "; it has label PNGs, which task=segment uses"
    return ""


def _labels_folder(base: Path, key: str, given: str | None, annotations: Path) -> Path:
    folder = base / given if given else annotations.with_suffix("")
    if given:
        check_folder(f"data.{key}_labels", folder)
    elif not folder.is_dir():
        raise UserError(
            f"the PNGs of {annotations} are not in {folder}: name their folder, data.{key}_labels=<folder>."
        )
    return folder


def _check_files(path: Path, images: Path, labels: Path, pictures: Sequence[Picture], cfg: DataConfig) -> None:
    """Check that all files exist, and look into `data.check_files` of them."""
    check_exist(images, [picture.image for picture in pictures], "images", path)
    check_exist(labels, [picture.labels for picture in pictures], "PNGs", path)
    chosen = {str(images / picture.image): picture for picture in files_to_check(pictures, cfg)}
    absent = check_all(
        lambda file: _check_picture(path, file, labels, chosen[file], cfg.max_pixels),
        list(chosen),
        f"images of {path.name}",
    )
    absent = [name for name in absent if name]
    if absent:
        log.warning(
            "%s has segments without a pixel in their PNG in %d of %d images; the first is %s: they do not count.",
            path,
            len(absent),
            len(chosen),
            absent[0],
        )


def _check_picture(path: Path, file: str, labels: Path, picture: Picture, max_pixels: int) -> str | None:
    """Check an image and its PNG, and return the PNG's name if a segment has no pixel.

    Raises:
        CorruptFile: A file can't be read.
        UserError: They do not belong together, or the PNG has a segment that the JSON does not have.
    """
    size = read_size(file, max_pixels)
    check_size(file, size, (picture.width, picture.height), path)
    present = set(np.unique(read_ids(labels / picture.labels, file, size)).tolist()) - {VOID}
    known = {number for number, _, _ in picture.segments}
    unknown = sorted(present - known)
    if unknown:
        raise UserError(
            f"{labels / picture.labels} has pixels of the segment {unknown[0]} ({len(unknown)} of its {len(present)} "
            f"segments are unknown), which {path} does not list for image {picture.id!r}: correct one of them."
        )
    return picture.labels if known - present else None


def read_ids(label: str | Path, image: str | Path, size: tuple[int, int]) -> np.ndarray:
    """The ids of segments in a panoptic PNG, int32 (H, W): red + 256 green + 65536 blue; 0 is no segment.

    Args:
        label: The PNG.
        image: Its image, for messages.
        size: Width and height of the image, rotated by its EXIF orientation.

    Raises:
        CorruptFile: The PNG can't be read.
        UserError: It has no colours, or its size differs from the image's.
    """
    mode, pixels = read_png(label, size)
    if mode not in ("RGB", "RGBA"):
        raise UserError(
            f"{label} has the mode {mode}, but a panoptic PNG is RGB, with the segment's id as red + 256 green + 65536 "
            "blue; task=segment uses PNGs of classes."
        )
    check_png_size(label, pixels, image, size)
    return from_rgb(pixels)
