"""COCO's panoptic annotations: a JSON that lists the segments of each image, read and checked.

{"images": [{"id", "file_name", "width", "height"}],
 "annotations": [{"image_id", "file_name": <PNG>, "segments_info": [{"id", "category_id", "iscrowd"}]}],
 "categories": [{"id", "name", "isthing"}]}

ADE20K as Mask2Former prepares it, and Cityscapes as cityscapesscripts.preparation.createPanopticImgs does, have the
same format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.messages import UserError
from zoo.recipes.dense.annotations import ID, TEXT, check_fields, find_twice
from zoo.recipes.files import read_json
from zoo.recipes.segment_ids import MOST

# cityscapesscripts writes <city>_<number>_<number>_gtFine_leftImg8bit.png for <city>/..._leftImg8bit.png.
_CITYSCAPES = "_gtFine_leftImg8bit.png"

_FIELDS = {
    "annotations": {
        "image_id": ID,
        "file_name": TEXT,
        "segments_info": (lambda value: isinstance(value, list), "a list"),
    },
    "categories": {
        "id": (lambda value: type(value) is int, "a whole number"),
        "name": ID,
        "isthing": (lambda value: value in (0, 1), "1 for things or 0 for stuff"),
    },
}


@dataclass
class Picture:
    """An image and its segments.

    Attributes:
        id: The image's id.
        image: The image file, relative to its folder.
        labels: The PNG of the ids of its segments, relative to its folder.
        width: The width in pixels.
        height: The height in pixels.
        segments: (id, name of the class, whether it is a crowd) of each segment.
    """

    id: int | str
    image: str
    labels: str
    width: int
    height: int
    segments: list[tuple[int, str, bool]]


@dataclass
class Panoptic:
    """The content of a file: the names of things and of stuff, each in the order of their ids, and the images."""

    things: list[str]
    stuff: list[str]
    pictures: list[Picture]


def load_panoptic(path: Path) -> Panoptic:
    """Read and check a panoptic JSON; the PNGs are not opened.

    Raises:
        UserError: It can't be read, is not a panoptic JSON, or has an entry that can't be used.
    """
    content = read_json(path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict) and "segments_info" not in first and "bbox" in first:
        raise UserError(
            f"{path} has COCO's instances, without segments_info: task=detect uses them; task=panoptic needs the "
            "panoptic JSON, with a PNG of segments for each image."
        )
    check_fields(path, content, _FIELDS, "panoptic annotations")
    things, stuff = _classes(path, content["categories"])
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    seen: set[int | str] = set()
    pictures = []
    for annotation in content["annotations"]:
        number = annotation["image_id"]
        if number not in images:
            raise UserError(f"{path}: an annotation has image_id={number!r}, which is not among its images: add it.")
        if number in seen:
            raise UserError(f"{path} has several annotations of image {number!r}: an image has one, with all segments.")
        seen.add(number)
        image = images[number]
        segments = _segments(f"{path}: image {number!r}", annotation["segments_info"], names)
        size = int(image["width"]), int(image["height"])
        pictures.append(Picture(number, _image_file(image), annotation["file_name"], *size, segments))
    without = [number for number in images if number not in seen]
    if without:
        raise UserError(
            f"{path} has no annotation of {len(without)} of its {len(images)} images; the first is {without[0]!r}: "
            "add them, or remove the images."
        )
    if not any(picture.segments for picture in pictures):
        raise UserError(f"{path} has no segments: there is nothing to learn or to score.")
    return Panoptic(things, stuff, pictures)


def _classes(path: Path, categories: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The names of things and of stuff."""
    if not categories:
        raise UserError(f"{path} has no categories: it needs one for every class.")
    for key in ("id", "name"):
        twice = find_twice(str(category[key]) for category in categories)
        if twice:
            raise UserError(f"{path} has several categories with {key}={twice[0]}: make them unique.")
    ranked = sorted(categories, key=lambda category: category["id"])
    kinds = [[str(category["name"]) for category in ranked if category["isthing"] == kind] for kind in (1, 0)]
    if not kinds[0]:
        raise UserError(f"{path} has no things (isthing=1): task=segment is for data with stuff alone.")
    return kinds[0], kinds[1]


def _segments(where: str, segments: Sequence[Any], names: Mapping[int, str]) -> list[tuple[int, str, bool]]:
    """The segments of an image; `where` names it in messages."""
    found = []
    for segment in segments:
        number, category = (segment.get(key) if isinstance(segment, dict) else None for key in ("id", "category_id"))
        if type(number) is not int or not 0 < number < MOST:
            raise UserError(f"{where} has a segment with id={number!r}: ids are whole numbers, 1 to {MOST - 1}.")
        if type(category) is not int or category not in names:
            ids = ", ".join(map(str, [*names][:10])) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"{where} has a segment with category_id={category!r}, which is not among the categories: the ids are "
                f"{ids}."
            )
        found.append((number, names[category], bool(segment.get("iscrowd"))))
    twice = find_twice(number for number, _, _ in found)
    if twice:
        raise UserError(f"{where} has several segments with id={twice[0]}: make the ids of an image unique.")
    return found


def _image_file(image: Mapping[str, Any]) -> str:
    """The file of an image, in the folder of its city if it is one of Cityscapes."""
    name = image["file_name"]
    if not name.endswith(_CITYSCAPES):
        return name
    stem = name.removesuffix(_CITYSCAPES)
    return f"{stem.partition('_')[0]}/{stem}_leftImg8bit.png"
