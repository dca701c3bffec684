"""Checks of COCO's annotations before COCO's tools read them.

pycocotools trusts what it reads: a polygon with a NaN coordinate takes all memory, and a mask whose runs do not fill
the image is read beyond its end. Annotations that the tools leave out or clip are only counted. Those on which the
tools would fail, or which would silently teach wrong classes or masks, are refused.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.messages import UserError
from zoo.recipes.dense.formats import lvis
from zoo.recipes.files import read_json
from zoo.recipes.logs import log

_MAX_SIDE = 100_000  # pixels of an image's side
_REACH = 10  # limit of a coordinate, in longer sides of its image: anything beyond is a mistake
_RUNS_LIMIT = 2**31  # pixels of an image: COCO's tools count in 32 bits


def _is_number(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_text(value: Any) -> bool:
    """Whether a file or a class can have this name; JSON may contain half a surrogate pair, which is not text."""
    return isinstance(value, str) and value != "" and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


def _is_id(value: Any) -> bool:
    return _is_number(value) or _is_text(value)


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= _MAX_SIDE and value % 1 == 0


_Field = tuple[Callable[[Any], bool], str]
_Fields = Mapping[str, Mapping[str, _Field]]
ID: _Field = (_is_id, "a whole number or a string")
TEXT: _Field = (_is_text, "a string")
# The fields that COCO's tools need.
_IMAGES: Mapping[str, _Field] = {
    "id": ID,
    "file_name": TEXT,
    "width": (_is_side, f"a whole number of pixels, 1 to {_MAX_SIDE}"),
    "height": (_is_side, f"a whole number of pixels, 1 to {_MAX_SIDE}"),
}
_FIELDS: _Fields = {
    "annotations": {
        "image_id": ID,
        "category_id": (_is_number, "a whole number"),
        "bbox": (lambda value: isinstance(value, list), "a list"),
    },
    "categories": {"id": (_is_number, "a whole number"), "name": (_is_id, "a string or a whole number")},
}


@dataclass
class Boxes:
    """The boxes of a file.

    Attributes:
        by_class: The number of boxes of each class, without crowds and unusable boxes.
        images: The number of images with such a box.
        has_masks: Whether every object has a mask.
    """

    by_class: list[int]
    images: int
    has_masks: bool


def load_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO JSON, after a check of the fields that COCO's tools need.

    Raises:
        UserError: It can't be read, is not a COCO JSON, or a field is missing or of the wrong type.
    """
    content = read_json(path)
    items = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(items, list) and items and isinstance(items[0], dict) and "segments_info" in items[0]:
        raise UserError(
            f"{path} has COCO's panoptic annotations (segments_info): use task=panoptic, or give COCO's instances."
        )
    if isinstance(content, dict) and isinstance(content.get("images"), list) and lvis.is_lvis(content):
        lvis.name_files(content)
    check_fields(path, content, _FIELDS, "COCO annotations")
    if lvis.is_lvis(content):
        lvis.check(path, content)
    return content


def check_fields(path: Path, content: Any, fields: _Fields, format: str) -> None:
    """Check that `content`, of the file `path`, has these fields besides those of images.

    Args:
        path: The file, for messages.
        content: Its content.
        fields: For each list, the check and the description of the values of each key.
        format: The name of the format, for messages.

    Raises:
        UserError: A list or a field is missing or of the wrong type, or ids of images can't be used.
    """
    fields = {"images": _IMAGES, **fields}
    lacking = [kind for kind in fields if not isinstance(content, dict) or not isinstance(content.get(kind), list)]
    if lacking:
        raise UserError(f"{path} has no list of {' or '.join(lacking)}: {format} have {', '.join(fields)}.")
    for kind, keys in fields.items():
        for place, item in enumerate(content[kind]):
            for key, (fine, allowed) in keys.items():
                value = item.get(key) if isinstance(item, dict) else None
                if not fine(value):
                    raise UserError(
                        f"{path}: number {place} of its {kind} has {key}={_short(value)}: it has to be {allowed}."
                    )
    ids = [image["id"] for image in content["images"]]
    if len({type(number) for number in ids}) > 1:
        text = next(number for number in ids if isinstance(number, str))
        raise UserError(f"{path} has image ids of both kinds, numbers and strings such as {text!r}: use one.")
    twice = find_twice(ids)
    if twice:
        raise UserError(
            f"{path} uses {len(twice)} image ids more than once; the first is {twice[0]}: make them unique."
        )
    large = next((image for image in content["images"] if image["width"] * image["height"] >= _RUNS_LIMIT), None)
    if large:
        raise UserError(
            f"{path}: image {large['id']} has {large['width']}x{large['height']} pixels, but COCO's tools can't "
            f"count {_RUNS_LIMIT} or more: cut it into parts."
        )


def find_twice(items: Iterable[Any]) -> list[Any]:
    """The items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]


def some(items: Sequence[Any], most: int = 5) -> str:
    """The first of `items`, for messages."""
    return ", ".join(map(repr, items[:most])) + (", ..." if len(items) > most else "")


def _short(value: Any) -> str:
    """A short representation of any value."""
    return reprlib.repr(value)


def category_names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """The names of the categories by id, in the order of the ids.

    Raises:
        UserError: There are none, or ids or names are not unique.
    """
    categories = content["categories"]
    if not categories:
        raise UserError(f"{path} has no categories: it needs one for every class.")
    twice = find_twice(category["id"] for category in categories)
    if twice:
        raise UserError(f"{path} uses the category id {twice[0]} more than once: make the ids unique.")
    twice = find_twice(str(category["name"]) for category in categories)
    if twice:
        ids = [category["id"] for category in categories if str(category["name"]) == twice[0]]
        raise UserError(
            f"{path} has {len(ids)} categories named {twice[0]!r} (ids {', '.join(map(str, ids))}): "
            "remove those that no box has, or rename them."
        )
    return {c["id"]: str(c["name"]) for c in sorted(categories, key=lambda category: category["id"])}


@dataclass
class _Findings:
    """The findings in the annotations of a file; the lists hold names of annotations, for messages."""

    by_class: list[int]  # boxes to learn
    full: set[Any] = field(default_factory=set)  # ids of images with such a box
    crowds: int = 0
    without_image: list[str] = field(default_factory=list)
    without_category: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    maskless: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)  # with polygons that are left out


def count_boxes(
    path: Path,
    content: Mapping[str, Any],
    names: Mapping[int, str],
    classes: Sequence[str],
    training: bool,
    masks: bool,
) -> Boxes:
    """Check and count the annotations of `content`, which `load_annotations` returned.

    Args:
        path: The file, for messages.
        content: The file's content.
        names: The names of its categories by id.
        classes: The same names in the order of the labels.
        training: The boxes are for training; otherwise predictions are scored against them.
        masks: The method learns masks, so every object has to have one.

    Raises:
        UserError: An annotation can't be used, or there are none.
    """
    found = _examine(path, content, names, classes)
    _refuse(path, found, names, training, masks)
    _warn(path, found, content, classes, masks)
    return Boxes(found.by_class, len(found.full), not found.maskless)


def _examine(path: Path, content: Mapping[str, Any], names: Mapping[int, str], classes: Sequence[str]) -> _Findings:
    """Sort the annotations by what is wrong with them.

    Raises:
        UserError: An annotation has a value that COCO's tools can't read.
    """
    images = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    label = {number: classes.index(name) for number, name in names.items()}
    found = _Findings([0] * len(classes))
    for place, annotation in enumerate(content["annotations"]):
        number = annotation.get("id")
        name = f"annotation {number}" if _is_id(number) else f"annotation number {place}"
        size = images.get(annotation["image_id"])
        if size is None:
            found.without_image.append(f"{name} with image_id {_short(annotation['image_id'])}")
        elif annotation["category_id"] not in label:
            found.without_category.append(f"{name} with category_id {annotation['category_id']!r}")
        elif fault := _fault(annotation, *size):
            raise UserError(f"{path}: {name} has {fault}.")
        elif not _is_usable(annotation, *size):
            found.unusable.append(name)
        else:
            _examine_mask(found, name, annotation, *size)
            if annotation.get("iscrowd"):
                found.crowds += 1
            else:
                found.by_class[label[annotation["category_id"]]] += 1
                found.full.add(annotation["image_id"])
    return found


def _examine_mask(found: _Findings, name: str, annotation: Mapping[str, Any], width: int, height: int) -> None:
    """Note what is wrong with the extent and the mask of a usable annotation."""
    x, y, w, h = annotation["bbox"]
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:  # boxes rounded up to a pixel are common
        found.outside.append(name)
    segmentation = annotation.get("segmentation")
    if fault := _mask_fault(segmentation, width, height):
        found.maskless.append(f"{name} ({fault})")
    elif isinstance(segmentation, list) and not all(map(_encloses, segmentation)):
        found.shortened.append(name)


def _refuse(path: Path, found: _Findings, names: Mapping[int, str], training: bool, masks: bool) -> None:
    """Raise UserError for annotations that training or scoring can't use."""
    if found.without_image:
        raise UserError(
            f"{path}: {len(found.without_image)} annotations name an image that is not among its images; the first is "
            f"{found.without_image[0]}: remove them or add the images."
        )
    if found.without_category:
        ids = f"{', '.join(map(str, [*names][:10]))}{', ...' if len(names) > 10 else ''}"
        raise UserError(
            f"{path}: {len(found.without_category)} annotations have a category that is not among its categories; the "
            f"first is {found.without_category[0]}: the ids are {ids}."
        )
    if not found.full:
        purpose = "learn from" if training else "score predictions by"
        raise UserError(
            f"{path} has no boxes to {purpose}: every image is empty, or all boxes are crowds or without area."
        )
    if masks and found.maskless:
        raise UserError(
            f"{path}: {len(found.maskless)} objects have no mask (a polygon, or RLE that fills the image); the first "
            f"is {found.maskless[0]}: correct segmentation, or find boxes alone with dense.masks=false."
        )


def _warn(path: Path, found: _Findings, content: Mapping[str, Any], classes: Sequence[str], masks: bool) -> None:
    """Log what is left out, clipped or counted twice."""
    repeated = find_twice(number for a in content["annotations"] if _is_id(number := a.get("id")))
    kinds = (
        (
            found.unusable,
            "%s has %d boxes of less than a pixel within their image or marked `ignore`; the first is %s: training "
            "leaves them out, but COCO's scores count them as missed.",
        ),
        (found.outside, "%s has %d boxes that reach outside their image; the first is %s: they are clipped."),
        (
            found.shortened if masks else [],
            "%s has %d masks with polygons of fewer than three points or half a point; the first is %s: those polygons "
            "are left out.",
        ),
        (
            repeated,
            "%s uses %d annotation ids more than once; the first is %s: all of them count, even if the objects are "
            "the same.",
        ),
    )
    for items, text in kinds:
        if items:
            log.warning(text, path, len(items), items[0])
    if found.crowds:
        log.info("%s has %d crowds (iscrowd): no objects to learn; detections of them are ignored.", path, found.crowds)
    without = [name for name, count in zip(classes, found.by_class, strict=True) if not count]
    if without:
        log.warning("%s has no box of %d of the %d classes: %s.", path, len(without), len(classes), some(without))


def _fault(annotation: Mapping[str, Any], image_width: int, image_height: int) -> str | None:
    """What is wrong with an annotation other than its mask; None if nothing is."""
    box, area = annotation["bbox"], annotation.get("area")
    limit = _REACH * max(image_width, image_height)
    if len(box) != 4 or not all(type(value) in (int, float) and value == value for value in box):
        return f"bbox={_short(box)}: four numbers x, y, width, height are needed"
    if not all(-limit <= value <= limit for value in box):
        return f"bbox={_short(box)}, far from its image of {image_width}x{image_height} pixels"
    if area is not None and not (type(area) in (int, float) and -(limit**2) <= area <= limit**2):
        return f"area={_short(area)}: a number of pixels is needed, or none at all"
    for flag in ("iscrowd", "ignore"):
        if annotation.get(flag) not in (0, 1, None):
            return f"{flag}={_short(annotation[flag])}: 0 or 1 is needed, or none at all"
    return None


def _is_usable(annotation: Mapping[str, Any], image_width: int, image_height: int) -> bool:
    """Whether mmdet's CocoDataset keeps the annotation."""
    x, y, width, height = annotation["bbox"]
    inside = min(x + width, image_width) > max(x, 0) and min(y + height, image_height) > max(y, 0)
    area = annotation.get("area")
    return inside and width >= 1 and height >= 1 and (area is None or area > 0) and not annotation.get("ignore")


def _mask_fault(segmentation: Any, width: int, height: int) -> str | None:
    """Why `segmentation` is not a mask of an image of `width` x `height` pixels; None if it is one."""
    if isinstance(segmentation, dict):
        return _runs_fault(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        return f"segmentation={_short(segmentation)}"
    limit = _REACH * max(width, height)
    for polygon in segmentation:
        if not isinstance(polygon, list):
            return f"segmentation={_short(segmentation)} is not a list of polygons [x, y, x, y, ...]"
        if not set(map(type, polygon)) <= {int, float}:
            wrong = next(value for value in polygon if type(value) not in (int, float))
            return f"a polygon has {_short(wrong)} in place of a number"
        # The sum is NaN if a number is; min and max may miss it.
        if polygon and not (-limit <= min(polygon) and max(polygon) <= limit and not math.isnan(sum(polygon))):
            wrong = next(value for value in polygon if not -limit <= value <= limit)
            return f"a polygon has {_short(wrong)}, far from its image of {width}x{height} pixels"
    if not any(map(_encloses, segmentation)):
        return f"segmentation={_short(segmentation)}: a polygon has three points or more"
    return None


def _encloses(polygon: list[float]) -> bool:
    """Whether mmdet's LoadAnnotations keeps the polygon."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def _runs_fault(mask: Mapping[str, Any], width: int, height: int) -> str | None:
    """Why a run-length encoding (RLE) is not a mask of the image; None if it is one."""
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width] or set(map(type, size)) != {int}:
        return f"its RLE has size={_short(size)}, but the image has height {height} and width {width}"
    if isinstance(counts, str):
        runs = _decode_runs(counts)
        if runs is None:
            return f"the string of its RLE can't be decoded, counts={_short(counts)}"
        least, total = int(runs.min()), int(runs.sum())
    elif isinstance(counts, list) and counts and set(map(type, counts)) == {int}:
        least, total = min(counts), sum(counts)
    else:
        return f"its RLE has counts={_short(counts)}: whole numbers or a compressed string are needed"
    if least < 0:
        return f"its RLE has a run of {least} pixels"
    if total != width * height:
        return f"the runs of its RLE have {_short(total)} pixels, but the image has {width * height}"
    return None


def _decode_runs(text: str) -> np.ndarray | None:
    """The runs of COCO's compressed RLE, int64 (N,); None if the text is not one.

    Each character has 5 bits of a number, the lowest first, and a bit that says whether more follow; the last one has
    the sign. From the fourth number on, numbers are differences from the last but one.
    """
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return None
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= (codes[ends] >> 4 & 1) << 5 * lengths
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


def normalise(content: Mapping[str, Any], classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Normalize checked annotations, so that COCO's tools number the classes in the order of `classes`.

    mmdet numbers classes in the order of a file's list of categories, and pycocotools in the order of their ids; both
    become the order of `classes`. If the ids have that order already, they do not change. Absent fields get their
    defaults, and unused fields are left out. Annotations get new ids, since 0 means "not found" to pycocotools. A
    segmentation that is not a mask, which is allowed for unusable boxes and if masks are not used, becomes the box.
    """
    by_name = {str(category["name"]): category["id"] for category in content["categories"]}
    ids = dict(zip((by_name[name] for name in classes), sorted(by_name.values()), strict=True))
    images = [
        {"id": i["id"], "file_name": i["file_name"], "width": int(i["width"]), "height": int(i["height"])}
        for i in content["images"]
    ]
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    annotations = []
    for number, annotation in enumerate(content["annotations"], 1):
        x, y, width, height = annotation["bbox"]
        segmentation, area = annotation.get("segmentation"), annotation.get("area")
        if _mask_fault(segmentation, *sizes[annotation["image_id"]]):
            segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        elif isinstance(segmentation, list):
            segmentation = list(filter(_encloses, segmentation))
        annotations.append(
            {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": ids[annotation["category_id"]],
                "bbox": annotation["bbox"],
                "area": width * height if area is None else area,
                "iscrowd": int(annotation.get("iscrowd") or 0),
                "ignore": int(annotation.get("ignore") or 0),
                "segmentation": segmentation,
            }
        )
    categories = [{"id": ids[by_name[name]], "name": name} for name in classes]
    return {"images": images, "annotations": annotations, "categories": categories}
