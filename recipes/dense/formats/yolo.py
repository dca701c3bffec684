"""YOLO's data sets: a YAML file that names the classes and the splits, and a text file of labels beside each image.

The YAML file (`data.yaml`) has `names`, `train`, `val` and perhaps `path`, as docs.ultralytics.com/datasets/detect
describes them. A split is a folder of images, a text file that lists images, or a list of these. The labels of
.../images/.../x.jpg are in .../labels/.../x.txt. A line is an object: the number of its class, then the centre, width
and height of a box, or the points of a polygon, all as shares of the image. Nothing in the YAML file is called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zoo.messages import UserError, one_line, similar_path
from zoo.recipes import atomic_files
from zoo.recipes.dense.annotations import find_twice
from zoo.recipes.dense.data_checks import check_all, read_size
from zoo.recipes.dense.formats.converted import DATA, Converted, convert, split_name
from zoo.recipes.dense.formats.look import load_yaml
from zoo.recipes.files import is_hidden, read_json, read_lines
from zoo.recipes.images import ENDINGS
from zoo.recipes.logs import log

_LEFT_OUT = "left_out.json"  # a file in the cache with the images that can't be read
_MASKS = "masks"  # a file in the cache that says that every object is a polygon
_OUTSIDE = 0.01  # shares of the image by which labels may lie outside, from rounding


def read_detection(file: Path, splits: dict[str, str], max_pixels: int) -> Converted:
    """The objects of a data set of YOLO; images without a label file have none.

    Args:
        file: The YAML file.
        splits: `data.train_split` and `data.val_split` by key, "train" and "val".
        max_pixels: Larger images count as corrupt.

    Raises:
        UserError: A file is missing or can't be used; the message names it and, of labels, the line.
    """
    content = load_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not the YAML file of a data set: it has to have names, train and val.")
    if "kpt_shape" in content:
        raise UserError(f"{file} is of a data set of poses (kpt_shape), which can't be used: boxes and polygons can.")
    names = _class_names(file, content)
    known = [key for key, value in content.items() if key in ("train", "val", "test", *splits.values()) and value]
    images = {
        key: (_images(file, content, split_name(split, map(str, known), str(file)))) for key, split in splits.items()
    }
    labels = {image: _label_file(image) for paths in images.values() for image in paths}
    for key, paths in images.items():
        if not any(labels[image].is_file() for image in paths):
            raise UserError(
                f"none of the {len(paths)} images of {splits[key]!r} in {file} has labels; those of {paths[0]} would "
                f"be in {labels[paths[0]]}: add the folder of labels."
            )

    def write(paths: list[Path], folder: Path) -> None:
        # Images that can't be read are named, and left out.
        found = check_all(lambda image: (image, read_size(image, max_pixels)), paths, f"images of {file}")
        items = [(image, size, _objects(labels[image], len(names))) for image, size in found]
        left_out = sorted(map(str, set(paths) - {image for image, _ in found}))
        atomic_files.write_text(folder / _LEFT_OUT, json.dumps(left_out))
        if all(len(values) > 4 for _, _, objects in items for _, values in objects):
            (folder / _MASKS).touch()
        atomic_files.write_text(folder / DATA, json.dumps(_coco(items, names)))

    folders = {}
    for key, paths in images.items():
        sources = [file, *paths, *(labels[image] for image in paths if labels[image].is_file())]
        folders[key] = convert(f"yolo-{key}", file.parent, sources, partial(write, paths))
        left_out = read_json(folders[key] / _LEFT_OUT)
        if left_out:
            log.warning("%d images of %s can't be read; the first is %s.", len(left_out), file, left_out[0])
    has_masks = all((folder / _MASKS).exists() for folder in folders.values())
    converted = {key: folder / DATA for key, folder in folders.items()}
    return Converted(f"YOLO ({file.name})", converted, file.parent, has_masks=has_masks)


def _class_names(file: Path, content: Mapping[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        numbers = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
        if set(numbers) != set(range(len(numbers))):
            raise UserError(f"{file} numbers its names {', '.join(map(str, numbers))}: they have to be 0, 1, 2, ...")
        names = [numbers[number] for number in range(len(numbers))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file} names no classes: it has to have names, a list such as [cat, dog].")
    for number, name in enumerate(names):
        if not isinstance(name, str | int | float) or isinstance(name, bool) or name == "":
            raise UserError(
                f"{file}: the name of class {number} is {one_line(repr(name), 60)} in YAML: write it in quotes."
            )
    twice = find_twice(map(str, names))
    if twice:
        raise UserError(f"{file} names the class {twice[0]!r} twice: make the names unique.")
    if isinstance(content.get("nc"), int) and content["nc"] != len(names):
        raise UserError(f"{file} has nc: {content['nc']}, but {len(names)} names: correct one of them.")
    return list(map(str, names))


def _images(file: Path, content: Mapping[str, Any], split: str) -> list[Path]:
    """The images of a split, each once, in the order of their paths.

    Raises:
        UserError: There are none, or what the YAML file names does not exist.
    """
    given = content[split]
    found: set[Path] = set()
    for name in given if isinstance(given, list) else [given]:
        if not isinstance(name, str):
            raise UserError(
                f"{file} has {split}: {one_line(repr(name), 60)}: it has to be a folder or a list of images."
            )
        path = _resolve(file, content, split, name)
        found.update(_folder(path) if path.is_dir() else _listed(path, file.parent))
    if not found:
        raise UserError(f"{file}: {split}: {given} has no images ({', '.join(sorted(ENDINGS))}): correct the path.")
    return sorted(found)


def _resolve(file: Path, content: Mapping[str, Any], split: str, name: str) -> Path:
    """The folder or list that the YAML file calls `name`: relative to `path`, which is relative to the file.

    Roboflow's files say ../train/images for train/images.
    """
    base = content.get("path")
    folders = [file.parent / base, file.parent.parent / base] if isinstance(base, str) and base else []
    tried = [folder / name for folder in (*folders, file.parent)]
    if name.startswith("../"):
        tried += [folder / name.removeprefix("../") for folder in (*folders, file.parent)]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        first = Path(os.path.normpath(tried[0]))
        raise UserError(f"{file} has {split}: {name}, but {first} does not exist{similar_path(first)}")
    return Path(os.path.abspath(found))


def _folder(folder: Path) -> Iterator[Path]:
    for parent, below, names in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not is_hidden(name)]
        yield from (
            Path(parent, name) for name in names if Path(name).suffix.lower() in ENDINGS and not is_hidden(name)
        )


def _listed(path: Path, base: Path) -> Iterator[Path]:
    """The images that a text file lists, one per line, absolute or relative to the list's folder or `base`."""
    if path.suffix.lower() != ".txt":
        raise UserError(f"{path} is neither a folder of images nor a text file that lists images: give one of these.")
    for line in read_lines(path):
        tried = [path.parent / line, base / line]
        image = next((item for item in tried if item.is_file()), None)
        if image is None:
            raise UserError(f"{path} lists {line}, but {tried[0]} does not exist: correct the list or add the image.")
        yield Path(os.path.normpath(image))


def _label_file(image: Path) -> Path:
    """The labels of an image: the last folder `images` in its path becomes `labels`; otherwise beside the image."""
    parts = list(image.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _objects(path: Path, classes: int) -> list[tuple[int, list[float]]]:
    """The class and the numbers behind it of each line of a label file; each line counts once.

    Raises:
        UserError: A line is not an object.
    """
    objects = []
    for line in dict.fromkeys(read_lines(path)) if path.is_file() else ():
        numbers = _numbers(line)
        if numbers is None or len(numbers) < 5 or len(numbers) % 2 == 0:
            what = "a class and the four numbers of a box, or the points of a polygon, are needed"
            raise UserError(f"{path} has the line {one_line(line, 80)!r}: {what}.")
        label, values = numbers[0], numbers[1:]
        if label not in range(classes):
            raise UserError(
                f"{path} has the class {label:g}, but there are {classes} names: they are 0 to {classes - 1}."
            )
        if not all(-_OUTSIDE <= value <= 1 + _OUTSIDE for value in values):
            raise UserError(
                f"{path} has the line {one_line(line, 80)!r}: positions are shares of the image's width and height, "
                "0 to 1, not pixels."
            )
        objects.append((int(label), values))
    return objects


def _numbers(line: str) -> list[float] | None:
    try:
        numbers = list(map(float, line.split()))
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _coco(items: list[tuple[Path, tuple[int, int], list[tuple[int, list[float]]]]], names: list[str]) -> dict[str, Any]:
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    for number, (image, (width, height), objects) in enumerate(items, 1):
        content["images"].append({"id": number, "file_name": str(image), "width": width, "height": height})
        for label, values in objects:
            item: dict[str, Any] = {}
            if len(values) == 4:
                x, y, w, h = values
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                item["area"] = box[2] * box[3]
            else:
                xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                turns = (xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))
                item["area"] = abs(sum(turns)) / 2
                item["segmentation"] = [[value for point in zip(xs, ys, strict=True) for value in point]]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": box,
                    "iscrowd": 0,
                    **item,
                }
            )
    return {**content, "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)]}
