"""Data for detection (COCO JSON) and segmentation (label PNGs): found, checked and counted before training starts.

What the tools of COCO leave out or clip is left to them, and counted here; what would stop them half-way, or teach
wrong classes without a word, is refused.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.messages import similar_path
from zoo.recipes import distributed, scenes
from zoo.recipes.config import DataConfig
from zoo.recipes.corrupt import CorruptFile
from zoo.recipes.dense.annotations import category_names, count_boxes, load_annotations, some
from zoo.recipes.errors import RunError
from zoo.recipes.files import DECODING_ERRORS, SPLIT_FOLDERS, is_text, read_classes, read_text, reason
from zoo.recipes.images import ENDINGS, image_size
from zoo.recipes.logs import log
from zoo.recipes.progress import track

_LABELS = frozenset({".png"})
_MOST_LABELS = 2**16  # of the deepest PNGs


@dataclass
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        annotations: The COCO JSON.
        images: The folder that its file names start from.
        classes: Names in the order of the labels, whatever order the JSON lists them in.
        boxes: How many boxes each class has; those that nobody can learn and crowds are not counted.
        num_images: Images that are used: in training those with a box, in evaluation all.
        num_empty: Images without a box.
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
        """Boxes of all classes."""
        return sum(self.boxes)

    def dataset(self, pipeline: list[dict], training: bool) -> dict[str, Any]:
        """The configuration of mmdet's data set; training leaves out images without a box."""
        from zoo.recipes.dense import coco  # noqa: F401  registers the type

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
        """The configuration of COCO's scores, of boxes and with `masks` of masks too."""
        from zoo.recipes.dense import coco  # noqa: F401  registers the type

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
    """The splits of a detection data set; `train` is None where only evaluation is asked for."""

    train: DetectionSplit | None
    val: DetectionSplit
    classes: list[str]
    has_masks: bool

    def summary(self) -> list[str]:
        """A line on each split."""
        lines = []
        for name, split in _named(self.train, self.val):
            line = f"{name}: {split.num_boxes} boxes in {split.num_images} images"
            if split.num_empty:
                fate = "more without a box are left out" if split is self.train else "of them without a box"
                line += f", {split.num_empty} {fate}"
            lines.append(f"{line}: {_shares(split.classes, split.boxes)}")
        return lines


@dataclass
class SegmentationSplit:
    """One split of a segmentation data set: images and label PNGs of the same names.

    Attributes:
        images: The folder of images.
        labels: The folder of labels, one channel of numbers of 8 or 16 bits, or a palette's indices.
        classes: Names in the order of the labels.
        ignore_index: The label of pixels that do not count.
        reduce_zero_label: 0 in the files does not count either, and the classes are 1, 2, ... there.
        num_images: Images with labels.
        pixels: How many pixels each class has in the `num_checked` labels that were looked at.
        num_checked: How many those are.
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
        from zoo.recipes.dense import paired_dataset  # noqa: F401  registers the type

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
        """The configuration of mIoU; `masks` is detection's."""
        return {"type": "mmseg.IoUMetric", "iou_metrics": ["mIoU"], "ignore_index": self.ignore_index}


@dataclass
class SegmentationData:
    """The splits of a segmentation data set; `train` is None where only evaluation is asked for."""

    train: SegmentationSplit | None
    val: SegmentationSplit
    classes: list[str]
    ignore_index: int
    reduce_zero_label: bool

    def summary(self) -> list[str]:
        """A line on each split."""
        return [
            f"{name}: {split.num_images} images, pixels of {split.num_checked}: {_shares(split.classes, split.pixels)}"
            for name, split in _named(self.train, self.val)
        ]


def _named(train: Any, val: Any) -> Iterator[tuple[str, Any]]:
    if train is not None:
        yield "training", train
    yield "validation", val


def _shares(classes: Sequence[str], counts: Sequence[int], most: int = 12) -> str:
    total = sum(counts) or 1
    ranked = sorted(zip(classes, counts, strict=True), key=lambda pair: -pair[1])
    named = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in ranked[:most])
    return named + (f" and {len(ranked) - most} more" if len(ranked) > most else "")


# Detection.


def open_detection(
    cfg: DataConfig, training: bool = True, classes: Sequence[str] | None = None, masks: bool = False
) -> DetectionData:
    """Open the COCO JSON files that `cfg` names, or the digit scenes, and check them.

    Args:
        cfg: The configuration.
        training: Open both splits; otherwise the validation split alone.
        classes: The names that labels have to follow, in order; from `data.class_map` or the training JSON (the
            validation JSON where there is no training), in the order of its category ids, if None.
        masks: The method learns masks, so every object has to have one.

    Raises:
        RunError: the data can't be used; the message names the file and what is wrong with it.
    """
    base = _base(cfg, cfg.val_ann)
    splits = [(cfg.val_split, "val", cfg.val_ann, cfg.val_images)]
    if training:
        splits.insert(0, (cfg.train_split, "train", cfg.train_ann, cfg.train_images))
    classes = list(classes) if classes else read_classes(Path(cfg.class_map)) if cfg.class_map else None
    opened: list[DetectionSplit] = []
    files: list[set[str]] = []
    for split, key, given, images in splits:
        path = _annotation_file(base, split, key, given)
        content = load_annotations(path)
        names = category_names(path, content)
        if classes is None:
            classes = list(names.values())
        _check_same_classes(path, list(names.values()), classes)
        folder = _image_folder(base, split, key, images, path, [str(image["file_name"]) for image in content["images"]])
        _check_image_files(path, folder, content["images"], cfg)
        learnt = key == "train"
        boxes = count_boxes(path, content, names, classes, learnt, masks)
        files.append({os.path.join(os.path.realpath(folder), image["file_name"]) for image in content["images"]})
        total = len(content["images"])
        used, empty = boxes.images if learnt else total, total - boxes.images
        opened.append(DetectionSplit(path, folder, list(classes), boxes.by_class, used, empty, boxes.has_masks))
    if cfg.num_classes and cfg.num_classes != len(classes):
        raise RunError(
            f"data.num_classes={cfg.num_classes}, but {opened[0].annotations} has {len(classes)} classes: leave it out."
        )
    _note_shared(files)
    train, val = (opened[0], opened[1]) if training else (None, opened[0])
    return DetectionData(train, val, classes, all(split.has_masks for split in opened))


def _base(cfg: DataConfig, path: str | None) -> Path:
    if cfg.name == "digit_scenes":
        return scenes.ensure(Path(cfg.root) if cfg.root else None)
    if cfg.root is None:
        if path and os.path.isabs(path):
            return Path()
        raise RunError("data.root is not set: give the folder of the data, data.root=<folder>.")
    _check_folder("data.root", Path(cfg.root))
    return Path(cfg.root)


def _check_folder(key: str, folder: Path) -> None:
    if not folder.is_dir():
        wrong = "is a file, not a folder." if folder.exists() else f"does not exist{similar_path(folder)}"
        raise RunError(f"{key}={folder} {wrong}")


def _annotation_file(base: Path, split: str, key: str, given: str | None) -> Path:
    if given:
        path = base / given
        if path.is_dir():
            files = sorted(file.name for file in path.glob("*.json"))
            there = f"the file in it, for example {path / files[0]}" if files else "a COCO JSON"
            raise RunError(f"data.{key}_ann={path} is a folder: give {there}{_other_format(path)}.")
        if not path.is_file():
            raise RunError(f"data.{key}_ann={path} does not exist{similar_path(path)}")
        if path.suffix.lower() in (".txt", ".xml", ".yaml", ".yml"):
            raise RunError(
                f"data.{key}_ann={path} is no COCO JSON: labels of YOLO and VOC have to be converted to one."
            )
        return path
    names = SPLIT_FOLDERS.get(split, (split,))
    tried = [base / "annotations" / f"instances_{name}.json" for name in names]
    tried += [base / name / "_annotations.coco.json" for name in names]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise RunError(
            f"{base} has no annotations of the split {split!r} ({tried[0]} or {tried[len(names)]}): "
            f"name them with data.{key}_ann=<file>{_other_format(base)}."
        )
    return found


def _other_format(folder: Path) -> str:
    """What else a data set seems to be, for the end of a sentence."""
    if any((folder / name).is_dir() for name in ("labels", "train/labels")) or (folder / "data.yaml").is_file():
        return "; labels of YOLO, which seem to be there, have to be converted to COCO JSON"
    if any((folder / name).is_dir() for name in ("Annotations", "ImageSets")) or next(folder.glob("*.xml"), None):
        return "; annotations of VOC, which seem to be there, have to be converted to COCO JSON"
    return ""


def _check_same_classes(path: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    missing = [name for name in classes if name not in set(names)]
    unknown = [name for name in names if name not in set(classes)]
    if missing or unknown:
        close = difflib.get_close_matches(unknown[0], missing or classes, n=1) if unknown else []
        hint = f" (is {close[0]!r} meant?)" if close else ""
        parts = [f"{len(missing)} missing, {some(missing)}"] if missing else []
        parts += [f"{len(unknown)} unknown, {some(unknown)}{hint}"] if unknown else []
        raise RunError(
            f"{path} has other classes than the {len(classes)} of the training: {'; '.join(parts)}: "
            "its names have to be the same."
        )


def _image_folder(base: Path, split: str, key: str, given: str | None, annotations: Path, names: Sequence[str]) -> Path:
    if not names:
        raise RunError(f"{annotations} has no images: there is nothing to do.")
    if given:
        folder = base / given
        _check_folder(f"data.{key}_images", folder)
        return folder
    # A file of one's own says more than the split, which is the usual one then.
    folders = [annotations.stem, *SPLIT_FOLDERS.get(split, (split,)), *SPLIT_FOLDERS[key]]
    tried = [
        parent / name for parent in (base / "images", base, annotations.parent, annotations.parent / "images")
        for name in folders
    ]  # fmt: skip
    tried += [annotations.parent, base / "images", base]
    tried = [folder for folder in dict.fromkeys(tried) if folder.is_dir()]
    sample = _spread(names, 20)
    best = max(tried, key=lambda folder: sum(os.path.isfile(folder / name) for name in sample))
    if not any(os.path.isfile(best / name) for name in sample):
        raise RunError(
            f"the images of {annotations}, for example {names[0]}, are in none of {', '.join(map(str, tried))}: "
            f"give data.{key}_images=<folder>."
        )
    return best


def _check_image_files(path: Path, folder: Path, images: Sequence[Mapping[str, Any]], cfg: DataConfig) -> None:
    present: dict[Path, set[str]] = {}
    missing = []
    for image in images:
        file = folder / str(image["file_name"])
        if file.parent not in present:
            present[file.parent] = set(os.listdir(file.parent)) if file.parent.is_dir() else set()
        if file.name not in present[file.parent]:
            missing.append(file)
    if missing:
        raise RunError(
            f"{len(missing)} of the {len(images)} images of {path} do not exist, the first is {missing[0]}: "
            "add them, or remove them from the annotations."
        )
    chosen = {str(folder / str(image["file_name"])): image for image in _chosen(images, cfg)}

    def check(file: str) -> None:
        size, image = read_size(file, cfg.max_pixels), chosen[file]
        check_size(file, size, (image["width"], image["height"]), path)

    _checked(check, list(chosen), f"images of {path.name}")


def check_size(file: str, size: tuple[int, int], given: tuple[float, float], annotations: str | Path) -> None:
    """Refuse an image of another width and height than its annotations give."""
    if size != given:
        raise RunError(
            f"{file} is {size[0]}x{size[1]} pixels (turned as its EXIF data say), but {annotations} gives "
            f"{given[0]}x{given[1]}: the boxes would lie elsewhere."
        )


# Segmentation.


def open_segmentation(cfg: DataConfig, training: bool = True, classes: Sequence[str] | None = None) -> SegmentationData:
    """Open the folders of images and label PNGs that `cfg` names, or the digit scenes, and check them.

    Args:
        cfg: The configuration.
        training: Open both splits; otherwise the validation split alone.
        classes: The names of the labels in order; from `data.class_map`, <root>/classes.txt or `data.num_classes` if
            None, and compared with the former two otherwise.

    Raises:
        RunError: the data can't be used; the message names the file and what is wrong with it.
    """
    base = _base(cfg, cfg.val_images)
    classes = _segmentation_classes(cfg, base, classes)
    _check_ignore_index(cfg, len(classes))
    splits = [(cfg.val_split, "val", cfg.val_images, cfg.val_labels)]
    if training:
        splits.insert(0, (cfg.train_split, "train", cfg.train_images, cfg.train_labels))
    opened: list[SegmentationSplit] = []
    files: list[set[str]] = []
    for split, key, given_images, given_labels in splits:
        images = _split_folder(base, split, key, "images", given_images, ("images",))
        labels = _split_folder(base, split, key, "labels", given_labels, ("annotations", "labels"))
        found = pair_files(images, labels, strict=True)
        files.append({os.path.join(os.path.realpath(images), image.relative_to(images)) for image, _ in found})
        chosen = _chosen(found, cfg)
        counted = _checked(lambda pair: (pair[1], _count_labels(pair, cfg.max_pixels)), chosen, f"labels in {labels}")
        present = [counts for _, counts in counted]
        reduce = _reduces(cfg, labels, present, len(classes))
        pixels = _count_pixels(cfg, [label for label, _ in counted], present, classes, reduce)
        if present:
            whole = key == "train" and len(present) == len(found)
            _check_pixels(labels, pixels, present, classes, cfg.ignore_index, reduce, whole)
        opened.append(
            SegmentationSplit(images, labels, classes, cfg.ignore_index, reduce, len(found), pixels, len(present))
        )
    _note_shared(files)
    train, val = (opened[0], opened[1]) if training else (None, opened[0])
    return SegmentationData(train, val, classes, cfg.ignore_index, val.reduce_zero_label)


def _check_ignore_index(cfg: DataConfig, classes: int) -> None:
    index = cfg.ignore_index
    if classes >= _MOST_LABELS:
        raise RunError(f"the data has {classes} classes, but PNGs tell {_MOST_LABELS} labels apart at most.")
    if not 0 <= index < _MOST_LABELS:
        raise RunError(f"data.ignore_index={index} is not allowed: labels are 0 to {_MOST_LABELS - 1}.")
    if cfg.reduce_zero_label and index <= classes:
        raise RunError(
            f"data.ignore_index={index} can't be used with data.reduce_zero_label=true, where 0 is no class and "
            f"1 to {classes} are classes: it has to be a label above, for example {_MOST_LABELS - 1}."
        )
    if index == DataConfig.ignore_index < classes:
        raise RunError(
            f"data.ignore_index={index} is one of the {classes} classes: set it to a label that is none, for example "
            f"{_MOST_LABELS - 1}."
        )


def _segmentation_classes(cfg: DataConfig, base: Path, given: Sequence[str] | None) -> list[str]:
    names = None
    source = Path(cfg.class_map) if cfg.class_map else base / "classes.txt"
    if cfg.class_map or source.is_file():
        names = _class_file(source)
        if cfg.num_classes and cfg.num_classes != len(names):
            raise RunError(f"data.num_classes={cfg.num_classes}, but {source} has {len(names)} classes: leave it out.")
    if given is not None:
        number = len(names) if names else cfg.num_classes or len(given)
        different = [i for i, (a, b) in enumerate(zip(names or given, given, strict=False)) if a != b]
        if number != len(given):
            raise RunError(
                f"{source if names else 'data.num_classes'} says {number} classes, but the training had {len(given)}: "
                "they have to be the same."
            )
        if different:
            first = different[0]
            raise RunError(
                f"{source} has other classes than the training, label {first} is {names[first]!r} and was "
                f"{given[first]!r} ({len(different)} differ): names and order have to be the same."
            )
        return list(given)
    if names is None and cfg.num_classes == 150 and cfg.reduce_zero_label:
        from mmseg.utils.class_names import ade_classes

        names = [name.strip() for name in ade_classes()]
    if names is None and cfg.num_classes:
        names = [str(label) for label in range(cfg.num_classes)]
    if names is None:
        raise RunError(
            f"{base} does not tell its classes: write {base / 'classes.txt'} with one name a line, in the order of the "
            "labels, or give data.class_map=<file> or data.num_classes=<number>."
        )
    if len(names) < 2:
        raise RunError(f"the data has {len(names)} class, {names[0]!r}: segmentation needs two or more.")
    return names


def _class_file(path: Path) -> list[str]:
    """The classes of a file in which a line's number is the label: an empty one between others would shift those."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")] if path.exists() else []
    if len(lines) > 1 and "" in lines:
        raise RunError(f"{path} has to name one class per line, but line {lines.index('') + 1} is empty.")
    return read_classes(path)


def _split_folder(base: Path, split: str, key: str, kind: str, given: str | None, parents: Sequence[str]) -> Path:
    names = SPLIT_FOLDERS.get(split, (split,))
    tried = [base / given] if given else [base / parent / name for parent in parents for name in names]
    if given:
        _check_folder(f"data.{key}_{kind}", tried[0])
    found = next((folder for folder in tried if folder.is_dir()), None)
    if found is None:
        wanted = " or ".join(str(base / parent / split) for parent in parents)
        lists = base / "ImageSets" / "Segmentation"
        voc = (
            f"; the lists of VOC in {lists} are not read, each split needs folders of its own" if lists.is_dir() else ""
        )
        raise RunError(
            f"there are no {kind} of the split {split!r} in {wanted}: name the split with data.{key}_split=<name>, or "
            f"the folder with data.{key}_{kind}=<folder>{voc}."
        )
    return found


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return some(names) if names else "nothing"


def pair_files(images: Path, labels: Path, strict: bool = False) -> list[tuple[Path, Path]]:
    """Images and label PNGs of the same path below the two folders, endings apart, in the order of those paths.

    Raises:
        RunError: two images have the same path but for the ending; or, if `strict`, an image has no label, or nothing
            is there.
    """
    by_stem = _files(images, ENDINGS)
    labels_by_stem = _files(labels, _LABELS)
    both = sorted(by_stem.keys() & labels_by_stem.keys())
    if strict:
        for folder, files, endings in ((images, by_stem, ENDINGS), (labels, labels_by_stem, _LABELS)):
            if not files:
                raise RunError(
                    f"{folder} has no files that end in {', '.join(sorted(endings))}: it has {_listing(folder)}."
                )
        unlabelled = sorted(by_stem.keys() - labels_by_stem.keys())
        if unlabelled:
            first = by_stem[unlabelled[0]]
            raise RunError(
                f"{len(unlabelled)} of the {len(by_stem)} images in {images} have no label in {labels}, the first is "
                f"{first.relative_to(images)}, which needs {unlabelled[0]}.png: add labels or remove the images."
            )
        unused = sorted(labels_by_stem.keys() - by_stem.keys())
        if unused:
            log.warning("%s has %d labels without an image, the first is %s.png.", labels, len(unused), unused[0])
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
                raise RunError(f"{found[key]} and {path} differ in their endings only: remove one of them.")
            found[key] = path
    return found


def _count_labels(pair: tuple[Path, Path], max_pixels: int) -> Counter:
    """How many pixels have which label; also checks that the image belongs to it."""
    image, label = pair
    pixels = read_labels(label, image, read_size(image, max_pixels))
    if pixels.dtype == np.uint8:
        counts = np.bincount(pixels.ravel(), minlength=256)
        return Counter({int(value): int(counts[value]) for value in np.flatnonzero(counts)})
    return Counter(dict(zip(*(part.tolist() for part in np.unique(pixels, return_counts=True)), strict=True)))


def read_labels(label: str | Path, image: str | Path, size: tuple[int, int]) -> np.ndarray:
    """The labels in a PNG, as they are stored: (H, W), uint8, or int32 if they have more bits.

    Args:
        label: The PNG.
        image: The image that it belongs to, for messages.
        size: Width and height of that image, turned as its EXIF data say.

    Raises:
        CorruptFile: it can't be read.
        RunError: it is no label, or of another image.
    """
    try:
        with Image.open(label) as opened:
            mode = opened.mode
            pixels = np.array(opened)
    except DECODING_ERRORS as error:
        raise CorruptFile(label, reason(error)) from error
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise RunError(
            f"{label} has the mode {mode}, but a label has one channel of numbers, or a palette: "
            "write each pixel's class as a number (mode L)."
        )
    if pixels.shape != size[::-1]:
        raise RunError(
            f"{label} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but {image} is {size[0]}x{size[1]} (turned as its "
            "EXIF data say): they have to be of the same size."
        )
    return pixels.astype(np.uint8 if pixels.dtype.itemsize == 1 else np.int32, copy=False)


def _reduces(cfg: DataConfig, folder: Path, present: Sequence[Counter], num_classes: int) -> bool:
    """Whether 0 is no class: as configured; not guessed, since a wrong guess shifts every class by one."""
    if cfg.reduce_zero_label is not None:
        return cfg.reduce_zero_label
    values = set().union(*present) - {cfg.ignore_index}
    if values and max(values) == num_classes:
        raise RunError(
            f"the labels in {folder} go up to {num_classes}, but {num_classes} classes have 0 to {num_classes - 1}: "
            "set data.reduce_zero_label=true where 0 is no class and they count from 1, or name one class more."
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
        remedy = "" if reduce else ", or data.reduce_zero_label=true where 0 is no class"
        raise RunError(
            f"{label} has the label {values[-1]}{more}, but {len(classes)} classes have {first} to "
            f"{len(classes) + first - 1}, and {'0 and ' if reduce else ''}{cfg.ignore_index} do not count: mend "
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
    """Refuse labels that teach nothing; that they are all of one class is known where `all_training` ones are here."""
    ignored = f"{'0 and ' if reduce else ''}{ignore_index}"
    if not any(pixels):
        raise RunError(f"no pixel in {folder} counts, all labels are {ignored}: check data.ignore_index and the files.")
    without = [name for name, count in zip(classes, pixels, strict=True) if not count]
    if all_training and len(without) == len(classes) - 1:
        only = next(name for name, count in zip(classes, pixels, strict=True) if count)
        raise RunError(
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


# Both.


def _note_shared(files: Sequence[set[str]]) -> None:
    """Say that images of the training are validated on; VOC's lists of splits, for one, are not read."""
    shared = set.intersection(*files) if len(files) > 1 else None
    if shared:
        log.warning(
            "%d of the %d validation images are training images too, the first is %s: scores on them say nothing about "
            "other images.",
            len(shared),
            len(files[-1]),
            min(shared),
        )


def _chosen(items: Sequence[Any], cfg: DataConfig) -> list[Any]:
    """All items, or `data.check_files` of them, spread evenly."""
    return _spread(items, len(items) if cfg.check_files < 0 else cfg.check_files)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _checked(check: Callable[[Any], Any], items: Sequence[Any], description: str) -> list[Any]:
    """What `check` makes of the items, without those that are corrupt: these are counted here, skipped and named later.

    Text that is named like an image is another matter: an error page or a list, saved by mistake, spoils a whole data
    set.

    Raises:
        RunError: a file is text, or all are corrupt.
    """

    def tried(item: Any) -> Any:
        try:
            return check(item)
        except CorruptFile as error:
            return error

    with ThreadPool(min(8, distributed.cores())) as pool:  # decoding lets other threads run
        results = list(track(pool.imap(tried, items), len(items), description))
    corrupt = [result for result in results if isinstance(result, CorruptFile)]
    text = next((error.path for error in corrupt if is_text(error.path)), None)
    if text:
        raise RunError(f"{text} is text, not an image: remove or replace it.")
    if corrupt and len(corrupt) == len(items):
        raise RunError(f"none of the {len(items)} {description} can be read, the first is {corrupt[0]}.")
    if corrupt:
        log.warning(
            "%d of %d %s can't be read, the first is %s: they are skipped.",
            len(corrupt),
            len(items),
            description,
            corrupt[0],
        )
    return [result for result in results if not isinstance(result, CorruptFile)]


def read_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image as it is shown, turned as its EXIF data say.

    Raises:
        CorruptFile: it can't be read.
    """
    try:
        return image_size(path, max_pixels)
    except DECODING_ERRORS as error:
        raise CorruptFile(path, reason(error)) from error
