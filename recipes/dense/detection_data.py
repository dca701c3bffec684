"""Data for detection (COCO JSON): found, checked and counted before training starts.

Annotations that COCO's tools leave out or clip are only counted. Those on which the tools would fail, or which would
silently teach wrong classes, are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.messages import UserError, nearest, similar_path
from zoo.recipes import same_images
from zoo.recipes.config import DataConfig
from zoo.recipes.dense.annotations import category_names, count_boxes, load_annotations, some
from zoo.recipes.dense.data_checks import (
    base_folder,
    check_all,
    check_exist,
    check_folder,
    check_size,
    named_splits,
    read_size,
    shares,
)
from zoo.recipes.dense.formats import find, lvis
from zoo.recipes.files import SPLIT_FOLDERS, read_classes
from zoo.recipes.subsets import evenly_spread, files_to_check

_OTHERS = ", or, for data of YOLO or Pascal VOC, only data.root=<folder>"


@dataclass
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        annotations: The COCO JSON.
        images: The folder that its file names are relative to.
        classes: Names in the order of the labels, which may differ from their order in the JSON.
        boxes: The number of boxes of each class, without crowds and unusable boxes.
        num_images: The number of images that are used: those with a box in training, all of them in evaluation.
        num_empty: The number of images without a box.
        has_masks: Whether every object has a mask.
    """

    annotations: Path
    images: Path
    classes: list[str]
    boxes: list[int]
    num_images: int
    num_empty: int
    has_masks: bool

    @property
    def num_boxes(self) -> int:
        """The number of boxes of all classes."""
        return sum(self.boxes)

    def dataset(self, pipeline: list[dict], training: bool) -> dict[str, Any]:
        """The configuration of mmdet's data set; training omits images without a box."""
        return {
            "type": "mmdet.NamedCocoDataset",
            "ann_file": str(self.annotations),
            "data_prefix": {"img": str(self.images)},
            "metainfo": {"classes": tuple(self.classes)},
            "filter_cfg": {"filter_empty_gt": True} if training else None,
            "test_mode": not training,
            "pipeline": pipeline,
        }

    def metrics(self, masks: bool) -> dict[str, Any]:
        """The configuration of COCO's metric for boxes and, with `masks`, for masks too."""
        metric = ["bbox", "segm"] if masks else ["bbox"]
        return {
            "type": "mmdet.NamedCocoMetric",
            "ann_file": str(self.annotations),
            "classes": self.classes,
            "metric": metric,
            "classwise": True,
        }


@dataclass
class DetectionData:
    """The splits of a detection data set; `train` is None if the data are only for evaluation."""

    train: DetectionSplit | None
    val: DetectionSplit
    classes: list[str]
    has_masks: bool
    source: str = ""  # the format, if it is not COCO's

    def summary(self) -> list[str]:
        """Describe the format and each split in one line."""
        lines = [f"data: {self.source}"] if self.source else []
        for name, split in named_splits(self.train, self.val):
            line = f"{name}: {split.num_boxes} boxes in {split.num_images} images"
            if split.num_empty:
                fate = "more without a box are left out" if split is self.train else "of them without a box"
                line += f", {split.num_empty} {fate}"
            lines.append(f"{line}: {shares(split.classes, split.boxes)}")
        return lines


def open_detection(
    cfg: DataConfig, training: bool = True, classes: Sequence[str] | None = None, masks: bool = False
) -> DetectionData:
    """Open the COCO JSON files that `cfg` names, or the digit scenes, and check them.

    Args:
        cfg: The configuration.
        training: Open both splits; otherwise only the validation split.
        classes: The class names in the order of the labels; None for those of `data.class_map` or of the training JSON
            (the validation JSON if there is no training), in the order of its category ids.
        masks: The method learns masks, so every object has to have one.

    Raises:
        UserError: The data can't be used; the message names the file and what is wrong with it.
    """
    found = find.detection(cfg, training, masks)
    source = found.source if found else ""
    base = Path() if found else base_folder(cfg, cfg.val_ann)
    splits = [(cfg.val_split, "val", cfg.val_ann, cfg.val_images)]
    if training:
        splits.insert(0, (cfg.train_split, "train", cfg.train_ann, cfg.train_images))
    if found:
        splits = [(split, key, str(found.splits[key]), str(found.images)) for split, key, _, _ in splits]
    classes = list(classes) if classes else read_classes(Path(cfg.class_map)) if cfg.class_map else None
    opened: list[DetectionSplit] = []
    files: list[list[Path]] = []
    for split, key, given, images in splits:
        path = _annotation_file(base, split, key, given)
        content = load_annotations(path)
        names = category_names(path, content)
        if lvis.is_lvis(content):
            source = "LVIS"
        if classes is None:
            classes = list(names.values())
        check_same_classes(path, list(names.values()), classes)
        folder = image_folder(base, split, key, images, path, [str(image["file_name"]) for image in content["images"]])
        _check_image_files(path, folder, content["images"], cfg)
        learnt = key == "train"
        boxes = count_boxes(path, content, names, classes, learnt, masks)
        files.append([folder / str(image["file_name"]) for image in content["images"]])
        total = len(content["images"])
        used, empty = boxes.images if learnt else total, total - boxes.images
        opened.append(DetectionSplit(path, folder, list(classes), boxes.by_class, used, empty, boxes.has_masks))
    if cfg.num_classes and cfg.num_classes != len(classes):
        raise UserError(
            f"data.num_classes={cfg.num_classes}, but {opened[0].annotations} has {len(classes)} classes: leave it out."
        )
    if training:
        same_images.check(cfg, *files)
    train, val = (opened[0], opened[1]) if training else (None, opened[0])
    has_masks = all(split.has_masks for split in opened)
    return DetectionData(train, val, classes, has_masks, source)


def _annotation_file(base: Path, split: str, key: str, given: str | None) -> Path:
    if given:
        path = base / given
        if path.is_dir():
            files = sorted(file.name for file in path.glob("*.json"))
            there = f"the file in it, for example {path / files[0]}" if files else f"a COCO JSON{_OTHERS}"
            raise UserError(f"data.{key}_ann={path} is a folder: give {there}.")
        if not path.is_file():
            raise UserError(f"data.{key}_ann={path} does not exist{similar_path(path)}")
        if path.suffix.lower() in (".txt", ".xml", ".yaml", ".yml"):
            raise UserError(f"data.{key}_ann={path} is not a COCO JSON: give one{_OTHERS}.")
        return path
    names = SPLIT_FOLDERS.get(split, (split,))
    tried = [base / "annotations" / f"instances_{name}.json" for name in names]
    tried += [base / name / "_annotations.coco.json" for name in names]
    tried += [parent / f"lvis_v1_{key}.json" for parent in (base / "annotations", base)]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{base} has no annotations of the split {split!r} ({tried[0]} or {tried[len(names)]}): "
            f"name them with data.{key}_ann=<file>."
        )
    return found


def check_same_classes(path: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse the `names` of a file that are not the `classes` of the training, in any order."""
    missing = [name for name in classes if name not in set(names)]
    unknown = [name for name in names if name not in set(classes)]
    if missing or unknown:
        close = nearest(unknown[0], missing or classes) if unknown else []
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        parts = [f"{len(missing)} missing, {some(missing)}"] if missing else []
        parts += [f"{len(unknown)} unknown, {some(unknown)}{hint}"] if unknown else []
        raise UserError(
            f"{path} has other classes than the {len(classes)} training classes: {'; '.join(parts)}: "
            "its names have to be the same."
        )


def image_folder(base: Path, split: str, key: str, given: str | None, annotations: Path, names: Sequence[str]) -> Path:
    """The folder of the images of a split, which `given` or the usual places below `base` tell.

    Args:
        base: The root of the data.
        split: The name of the split.
        key: `train` or `val`, for the keys in messages.
        given: The folder that the user gave, if any.
        annotations: The JSON.
        names: The file names of its images.

    Raises:
        UserError: There are no images, or not in these places.
    """
    if not names:
        raise UserError(f"{annotations} has no images: there is nothing to do.")
    if given:
        folder = base / given
        check_folder(f"data.{key}_images", folder)
        return folder
    # The name of an annotation file that the user gives says more than the split, which then has its default name.
    folders = [annotations.stem, *SPLIT_FOLDERS.get(split, (split,)), *SPLIT_FOLDERS[key]]
    tried = [
        parent / name for parent in (base / "images", base, annotations.parent, annotations.parent / "images")
        for name in folders
    ]  # fmt: skip
    tried += [base / "leftImg8bit" / name for name in folders]  # Cityscapes
    tried += [annotations.parent, base / "images", base]
    tried = [folder for folder in dict.fromkeys(tried) if folder.is_dir()]
    sample = evenly_spread(names, 20)
    best = max(tried, key=lambda folder: sum(os.path.isfile(folder / name) for name in sample))
    if not any(os.path.isfile(best / name) for name in sample):
        raise UserError(
            f"the images of {annotations}, for example {names[0]}, are in none of {', '.join(map(str, tried))}: "
            f"give data.{key}_images=<folder>."
        )
    return best


def _check_image_files(path: Path, folder: Path, images: Sequence[Mapping[str, Any]], cfg: DataConfig) -> None:
    check_exist(folder, [str(image["file_name"]) for image in images], "images", path)
    chosen = {str(folder / str(image["file_name"])): image for image in files_to_check(images, cfg)}

    def check(file: str) -> None:
        size, image = read_size(file, cfg.max_pixels), chosen[file]
        check_size(file, size, (image["width"], image["height"]), path)

    check_all(check, list(chosen), f"images of {path.name}")
