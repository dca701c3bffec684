"""Pascal VOC: JPEGImages/ with Annotations/*.xml or SegmentationClass/*.png, and lists of the splits in ImageSets/.

Boxes become COCO's: VOC counts pixels from 1 and includes the last one. Objects marked as difficult become crowds
(`iscrowd`), as in MMDetection's converter: they are not learnt, and detections of them do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from zoo.messages import UserError
from zoo.recipes import atomic_files
from zoo.recipes.corrupt import CorruptFile
from zoo.recipes.dense.data_checks import read_size
from zoo.recipes.dense.formats.converted import DATA, Converted, convert, split_name
from zoo.recipes.files import read_lines
from zoo.recipes.images import ENDINGS
from zoo.recipes.progress import track

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_detection(root: Path, splits: dict[str, str], max_pixels: int) -> Converted:
    """The boxes of Annotations/*.xml.

    The classes are VOC's 20, or those of the annotations if they have others, in alphabetical order.

    Args:
        root: The folder of the data.
        splits: `data.train_split` and `data.val_split` by key, "train" and "val".
        max_pixels: Larger images, whose size the XML does not give, count as corrupt.

    Raises:
        UserError: A list, an image or an annotation is missing or can't be used.
    """
    lists = {key: _list(root, "Main", split) for key, split in splits.items()}
    # All lists are read, since the classes of a split alone may not be all classes.
    everything = sorted({name for path in (root / "ImageSets" / "Main").glob("*.txt") for name in _names(path)})
    wanted = {key: _names(path) for key, path in lists.items()}
    images = _files(root / "JPEGImages", ENDINGS)
    files = {name: root / "Annotations" / f"{name}.xml" for name in everything}
    used = sorted({name for names in wanted.values() for name in names})
    _refuse_missing(used, images, root / "JPEGImages", "image")
    _refuse_missing(used, {name: path for name, path in files.items() if path.is_file()}, root / "Annotations", "XML")

    present = [name for name in everything if files[name].is_file()]

    @cache  # for both splits
    def parsed() -> dict[str, tuple[tuple[int, int] | None, list[dict[str, Any]]]]:
        return {name: _objects(files[name]) for name in track(present, len(present), "annotations of VOC")}

    def write(names: list[str], folder: Path) -> None:
        found = {item["name"] for _, objects in parsed().values() for item in objects}
        classes = list(CLASSES) if found <= set(CLASSES) else sorted(found)
        content = _coco([(images[name], *parsed()[name]) for name in names], classes, max_pixels)
        atomic_files.write_text(folder / DATA, json.dumps(content))

    sources = [root / "JPEGImages", *(files[name] for name in present)]
    converted = {
        key: convert(f"voc-{path.stem}", root, [path, *sources], partial(write, wanted[key])) / DATA
        for key, path in lists.items()
    }
    source = f"Pascal VOC ({', '.join(f'ImageSets/Main/{path.name}' for path in lists.values())})"
    return Converted(source, converted, root / "JPEGImages")


def read_segmentation(root: Path, splits: dict[str, str]) -> Converted:
    """The labels of SegmentationClass/*.png: 0 is the background, and 255 is ignored.

    Args:
        root: The folder of the data.
        splits: `data.train_split` and `data.val_split` by key, "train" and "val".

    Raises:
        UserError: A list, an image or a label is missing.
    """
    lists = {key: _list(root, "Segmentation", split) for key, split in splits.items()}
    wanted = {key: _names(path) for key, path in lists.items()}
    images = _files(root / "JPEGImages", ENDINGS)
    labels = _files(root / "SegmentationClass", {".png"})
    used = sorted({name for names in wanted.values() for name in names})
    _refuse_missing(used, images, root / "JPEGImages", "image")
    _refuse_missing(used, labels, root / "SegmentationClass", "label")

    def write(names: list[str], folder: Path) -> None:
        pairs = [(str(images[name]), str(labels[name])) for name in names]
        atomic_files.write_text(folder / DATA, json.dumps(pairs))

    sources = [root / "JPEGImages", root / "SegmentationClass"]
    converted = {
        key: convert(f"voc-labels-{path.stem}", root, [path, *sources], partial(write, wanted[key])) / DATA
        for key, path in lists.items()
    }
    source = f"Pascal VOC ({', '.join(f'ImageSets/Segmentation/{path.name}' for path in lists.values())})"
    return Converted(source, converted, root, classes=["background", *CLASSES])


def _list(root: Path, kind: str, split: str) -> Path:
    folder = root / "ImageSets" / kind
    # Main also has lists of each class, <class>_<split>.txt.
    known = [path.stem for path in folder.glob("*.txt")] if folder.is_dir() else []
    whole = [name for name in known if name.rpartition("_")[2] not in known or "_" not in name]
    return folder / f"{split_name(split, whole, str(folder))}.txt"


def _names(path: Path) -> list[str]:
    """The names of images in a list; VOC's lists for single classes have a number behind each."""
    names = list(dict.fromkeys(line.split()[0] for line in read_lines(path)))
    if not names:
        raise UserError(f"{path} names no images: it has to have one name per line, without the extension.")
    return names


def _files(folder: Path, endings: Iterable[str]) -> dict[str, Path]:
    """The files in `folder` with these extensions, by their names without them."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, although Pascal VOC has it: unpack the whole data set.")
    endings = set(endings)
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings}


def _refuse_missing(names: list[str], present: dict[str, Path], folder: Path, what: str) -> None:
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} images in the lists have no {what} in {folder}; the first is "
            f"{missing[0]}: add it, or remove the name from the lists in ImageSets."
        )


def _objects(path: Path) -> tuple[tuple[int, int] | None, list[dict[str, Any]]]:
    """Width and height of the image, None if they are not given, and the objects in an XML file.

    Raises:
        UserError: It is not an annotation of VOC.
    """
    try:
        top = ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path} is not XML ({error}): correct or remove it.") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): correct that.") from error
    size = tuple(_number(path, top, f"size/{key}", 0) for key in ("width", "height"))
    objects = []
    for item in top.iter("object"):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{path} has an object without a name: add its class, <name>...</name>.")
        left, top_, right, bottom = (_number(path, item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
        objects.append(
            {
                "name": name,
                "bbox": [left - 1, top_ - 1, right - left + 1, bottom - top_ + 1],
                "iscrowd": int(bool(_number(path, item, "difficult", 0))),
            }
        )
    return ((int(size[0]), int(size[1])) if all(size) else None), objects


def _number(path: Path, item: ElementTree.Element, key: str, default: float | None = None) -> float:
    text = (item.findtext(key) or "").strip()
    if not text and default is not None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < 1e6:  # also true for NaN
        raise UserError(f"{path} has {key}={text!r}: it has to be a number of pixels.")
    return number


def _coco(
    items: Iterable[tuple[Path, tuple[int, int] | None, list[dict[str, Any]]]], classes: list[str], max_pixels: int
) -> dict[str, Any]:
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    ids = {name: number for number, name in enumerate(classes, 1)}
    for number, (image, size, objects) in enumerate(items, 1):
        if size is None:
            try:
                size = read_size(image, max_pixels)
            except CorruptFile as error:
                raise UserError(f"{error}, and its XML does not give its size: repair or remove it.") from error
        content["images"].append({"id": number, "file_name": image.name, "width": size[0], "height": size[1]})
        for item in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[item["name"]],
                    "bbox": item["bbox"],
                    "area": item["bbox"][2] * item["bbox"][3],
                    "iscrowd": item["iscrowd"],
                }
            )
    return {**content, "categories": [{"id": number, "name": name} for name, number in ids.items()]}
