"""Panoptic digit scenes: handwritten digits on patterned ground, as files in COCO's panoptic format.

images/{train,val,test}/*.png               RGB, 128x128
annotations/panoptic_{train,val,test}.json  COCO: the segments of each image; things are the digits, stuff the patterns
annotations/panoptic_{...}/*.png            the id of each pixel's segment, as red + 256 green + 65536 blue
annotations/instances_{...}.json            COCO: the digits alone

The ground of an image has two or three regions of different patterns. Digits are drawn over it as in
`zoo.recipes.scenes`, but larger, since a panoptic score counts only segments that overlap with their prediction in more
than half of their union. Every pixel belongs to a segment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.recipes import scenes
from zoo.recipes.progress import track
from zoo.recipes.scenes import SCENES, SIZE
from zoo.recipes.segment_ids import to_rgb

PATTERNS = ("plain", "stripes", "checks", "dots")
CATEGORIES = [
    *({"id": digit + 1, "name": str(digit), "isthing": 1} for digit in range(10)),
    *({"id": 11 + place, "name": name, "isthing": 0} for place, name in enumerate(PATTERNS)),
]

_HEIGHTS = (28, 56)


def ensure(root: Path | None) -> Path:
    """`zoo.recipes.scenes.ensure` for the panoptic scenes."""
    return scenes.ensure(root, scenes.PANOPTIC, _write)


def _write(folder: Path) -> None:
    for split in SCENES:
        for kind in ("images", "annotations"):
            (folder / kind / (split if kind == "images" else f"panoptic_{split}")).mkdir(parents=True)
    wanted = [(split, number) for split, count in SCENES.items() for number in range(count)]
    images: dict[str, list[dict[str, Any]]] = {split: [] for split in SCENES}
    segments: dict[str, list[dict[str, Any]]] = {split: [] for split in SCENES}
    objects: dict[str, list[dict[str, Any]]] = {split: [] for split in SCENES}
    for split, number in track(wanted, len(wanted), "panoptic digit scenes"):
        name = f"{number:04d}.png"
        image, digits, masks, ground = draw(split, number)
        Image.fromarray(image).save(folder / "images" / split / name, compress_level=4)
        ids, info = _segments(digits, masks, ground)
        Image.fromarray(to_rgb(ids)).save(folder / "annotations" / f"panoptic_{split}" / name)
        images[split].append({"id": number + 1, "file_name": name, "width": SIZE, "height": SIZE})
        segments[split].append({"image_id": number + 1, "file_name": name, "segments_info": info})
        for digit, mask in zip(digits, masks, strict=True):
            identity = {"id": len(objects[split]) + 1, "image_id": number + 1, "category_id": digit + 1}
            objects[split].append({**identity, **scenes.describe(mask)})
    for split in SCENES:
        things = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]]
        for kind, items, categories in (("panoptic", segments, CATEGORIES), ("instances", objects, things)):
            content = {"images": images[split], "annotations": items[split], "categories": categories}
            (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def draw(split: str, number: int) -> tuple[np.ndarray, list[int], list[np.ndarray], np.ndarray]:
    """Draw scene `number` of a split; it does not depend on what was drawn before.

    Returns:
        The image, uint8 (128, 128, 3); the digits, 0 to 9, from the bottom to the top; the visible mask of each, bool
        (128, 128); and for each pixel the place of its ground in `PATTERNS`, int (128, 128).
    """
    rng = np.random.default_rng([17, tuple(SCENES).index(split), number])
    image, ground = _ground(rng)
    lightness = scenes.lightness_of(image.mean((0, 1)))
    digits, masks = scenes.place_digits(rng, image, lightness, scenes.pools()[split], _HEIGHTS)
    return np.clip(image, 0, 255).astype(np.uint8), digits, masks, ground


def _ground(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ground of an image, float (128, 128, 3), and its patterns, int (128, 128).

    Each region is nearest to one of two or three points that surround the middle, with a wavy border.
    """
    patterns = rng.permutation(len(PATTERNS))[: int(rng.integers(2, 4))]
    first = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    waves = 40 * (scenes.draw_clouds(rng) - 0.5), 40 * (scenes.draw_clouds(rng) - 0.5)
    distances = []
    for i in range(len(patterns)):
        angle, reach = first + 2 * np.pi * i / len(patterns), rng.uniform(25, 50)
        y, x = SIZE / 2 + reach * np.sin(angle), SIZE / 2 + reach * np.cos(angle)
        distances.append(np.hypot(rows + waves[0] - y, columns + waves[1] - x))
    regions = np.argmin(distances, axis=0)
    base = rng.uniform(60, 195, 3)
    image = np.zeros((SIZE, SIZE, 3))
    for i, pattern in enumerate(patterns):
        here = regions == i
        light = base + rng.uniform(-25, 25, 3)
        contrast = rng.uniform(25, 40) * rng.choice((-1, 1)) + rng.uniform(-10, 10, 3)
        image[here] = (light + (_pattern(rng, PATTERNS[pattern])[..., None] - 0.5) * contrast)[here]
    image += rng.normal(0, rng.uniform(1, 5), (SIZE, SIZE, 1))
    return image, patterns[regions]


def _pattern(rng: np.random.Generator, name: str) -> np.ndarray:
    """A pattern of values 0 to 1, float (128, 128), at a random angle, of a random size."""
    period, angle = rng.uniform(7, 13), rng.uniform(0, np.pi)
    rows, columns = np.mgrid[:SIZE, :SIZE] + rng.uniform(0, period, (2, 1, 1))
    across = (columns * np.cos(angle) + rows * np.sin(angle)) / period
    down = (rows * np.cos(angle) - columns * np.sin(angle)) / period
    if name == "plain":
        return np.clip(scenes.draw_clouds(rng), 0, 1)
    if name == "stripes":
        return 0.5 + 0.5 * np.sin(2 * np.pi * across)
    if name == "checks":
        return (np.floor(2 * across) + np.floor(2 * down)) % 2
    return (np.hypot(across % 1 - 0.5, down % 1 - 0.5) < 0.3).astype(float)


def _segments(
    digits: list[int], masks: list[np.ndarray], ground: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The ids of the pixels, int (128, 128), and what COCO says about each segment."""
    ids = 11 + ground
    for place, mask in enumerate(masks):
        ids[mask] = 1000 * (digits[place] + 1) + place
    categories = {1000 * (digit + 1) + place: digit + 1 for place, digit in enumerate(digits)}
    info = []
    for number in np.unique(ids).tolist():
        rows, columns = (np.flatnonzero((ids == number).any(axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        info.append(
            {
                "id": number,
                "category_id": categories.get(number, number),
                "iscrowd": 0,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int((ids == number).sum()),
            }
        )
    return ids, info
