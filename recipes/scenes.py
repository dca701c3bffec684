"""Digit scenes: handwritten digits on textured backgrounds, as files in the formats of COCO and ADE20K.

images/{train,val,test}/*.png         RGB, 128x128
annotations/instances_{...}.json      COCO: boxes, areas, polygons or, for digits with holes, RLE
labels/{train,val,test}/*.png         0 background, 1 to 10 the digits "0" to "9"; every pixel counts
classes.txt                           the names of 0 to 10

A pixel belongs to the topmost digit that covers at least half of it; boxes and areas are those of the visible part. The
digits are scikit-learn's: the training scenes have those of the training split of `Digits`, val has one half of the
others, and test has the other half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from zoo.messages import UserError
from zoo.recipes import cache as cached
from zoo.recipes.digits import Digits
from zoo.recipes.logs import log
from zoo.recipes.progress import track

SIZE = 128
SCENES = {"train": 600, "val": 150, "test": 150}
CLASSES = ("background", *"0123456789")
VERSION = "digit scenes 1\n"  # increase the number when anything in the files changes
PANOPTIC = "panoptic digit scenes 1\n"  # the same for zoo.recipes.panoptic_scenes

_MAX_DIGITS = 5
_HEIGHTS = (16, 48)
_MAX_OVERLAP = 0.15  # of the smaller box
_INK = 0.4  # share of the full ink above which a pixel belongs to the digit


def cache_folder(version: str = VERSION) -> Path:
    """The default folder of the scenes of this version, beside torch's cache."""
    return cached.cache_folder() / version.strip().replace(" scenes ", "_scenes-").replace(" ", "_")


def ensure(root: Path | None, version: str = VERSION, write: Callable[[Path], None] | None = None) -> Path:
    """Write the scenes unless they exist, and return their folder.

    The bytes are the same every time. The folder appears complete, in one step: several processes may call this at the
    same time, and one that is killed leaves nothing behind that would be used.

    Args:
        root: The folder: a new one, an empty one, or one with the scenes; None for `cache_folder(version)`.
        version: The kind of scenes.
        write: Writes all files but VERSION into a folder; None for those of this module.

    Raises:
        UserError: The folder has other content, or can't be written to.
    """
    folder = Path(root if root is not None else cache_folder(version)).absolute().resolve()
    if _is_complete(folder, version):
        return folder
    log.info("Writing %d digit scenes to %s (once).", sum(SCENES.values()), folder)

    def complete(temporary: Path) -> None:
        (write or _write)(temporary)
        (temporary / "VERSION").write_text(version)

    try:
        cached.publish(folder, complete)
    except OSError as error:
        if _is_complete(folder, version):  # another process was faster
            return folder
        raise UserError(
            f"the digit scenes can't be written to {folder} ({error.strerror or error}): "
            "choose another folder with data.root=<folder>."
        ) from error
    return folder


def _is_complete(folder: Path, wanted: str) -> bool:
    try:
        content = sorted(os.listdir(folder))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"data.root={folder} can't be used for the digit scenes ({error.strerror}): give a new folder."
        ) from error
    if _has_version(folder, wanted):
        return True
    if content:
        names = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
        raise UserError(
            f"data.root={folder} has other content ({names}) than these digit scenes: "
            "give a new or empty folder, or leave data.root out to use the cache; for data of your own, add data=coco "
            "(task=detect) or data=masks (task=segment)."
        )
    return False


def _has_version(folder: Path, version: str) -> bool:
    file = folder / "VERSION"
    return file.is_file() and file.read_bytes() == version.encode()


def _write(folder: Path) -> None:
    scenes = [(split, number) for split, count in SCENES.items() for number in range(count)]
    for kind in ("images", "labels"):
        for split in SCENES:
            (folder / kind / split).mkdir(parents=True)
    files = {split: {"images": [], "annotations": []} for split in SCENES}
    for split, number in track(scenes, len(scenes), "digit scenes"):
        name = f"{number:04d}.png"
        image, digits, masks = draw(split, number)
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for digit, mask in zip(digits, masks, strict=True):
            labels[mask] = digit + 1
        # Noise hardly compresses, so a higher level only costs time.
        Image.fromarray(image).save(folder / "images" / split / name, compress_level=4)
        Image.fromarray(labels).save(folder / "labels" / split / name)
        content = files[split]
        content["images"].append({"id": number + 1, "file_name": name, "width": SIZE, "height": SIZE})
        for digit, mask in zip(digits, masks, strict=True):
            identity = {"id": len(content["annotations"]) + 1, "image_id": number + 1, "category_id": digit + 1}
            content["annotations"].append({**identity, **describe(mask)})
    (folder / "annotations").mkdir()
    for split, content in files.items():
        content["categories"] = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def describe(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and segmentation of a mask (H, W), bool, in COCO's format; polygons if they give exactly the mask."""
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    polygons = outlines(mask)
    if coco.merge(coco.frPyObjects(polygons, *mask.shape)) == rle:
        segmentation = polygons
    else:
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return {
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def outlines(mask: np.ndarray) -> list[list[int]]:
    """The outlines of a mask (H, W), bool, along the edges of pixels, as lists x, y, x, y, ...; also of holes."""
    padded = np.pad(mask, 1)
    follows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # The edges between inside and outside, directed so that the inside is on the right.
    for (dy, dx), (y0, x0), (y1, x1) in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    ):
        edges = padded & ~np.roll(padded, (-dy, -dx), (0, 1))
        for y, x in np.argwhere(edges[1:-1, 1:-1]).tolist():
            follows.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    polygons = []
    while follows:
        start = here = next(iter(follows))
        before, polygon = None, []
        while before is None or here != start:
            ends = follows[here]
            # Where two pixels touch at a corner, a turn to the right stays on the same pixel.
            right = len(ends) > 1 and before is not None and _turns_right(before, here, ends[1])
            after = ends.pop(1 if right else 0)
            if not ends:
                del follows[here]
            if before is None or (after[0] - here[0], after[1] - here[1]) != (here[0] - before[0], here[1] - before[1]):
                polygon += here
            before, here = here, after
        polygons.append(polygon)
    return polygons


def _turns_right(before: tuple[int, int], here: tuple[int, int], after: tuple[int, int]) -> bool:
    a, b = (here[0] - before[0], here[1] - before[1]), (after[0] - here[0], after[1] - here[1])
    return a[0] * b[1] - a[1] * b[0] > 0  # the vertical axis points down


@cache
def pools() -> dict[str, list[tuple[Image.Image, int]]]:
    """The digits of each split: images of 32x32 pixels, mode L, with labels."""
    train, held_out = ([*zip(d.images, map(int, d.targets), strict=True)] for d in (Digits(True), Digits(False)))
    held_out.sort(key=lambda pair: pair[1])  # alternate, so that both halves have the same number of each digit
    return {"train": train, "val": held_out[::2], "test": held_out[1::2]}


def draw(split: str, number: int) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Draw scene `number` of a split; it does not depend on what was drawn before.

    Returns:
        The image, uint8 (128, 128, 3); the digits, 0 to 9, from the bottom to the top; and the visible mask of each,
        bool (128, 128).
    """
    rng = np.random.default_rng([tuple(SCENES).index(split), number])
    image, lightness = _background(rng)
    digits, masks = place_digits(rng, image, lightness, pools()[split], _HEIGHTS)
    return np.clip(image, 0, 255).astype(np.uint8), digits, masks


def place_digits(
    rng: np.random.Generator,
    image: np.ndarray,
    lightness: float,
    pool: Sequence[tuple[Image.Image, int]],
    heights: tuple[int, int],
) -> tuple[list[int], list[np.ndarray]]:
    """Draw random digits from `pool` on `image`, float (128, 128, 3), of a mean `lightness`; see `draw` for the result.

    Args:
        rng: The source of all random numbers.
        image: The background, which is changed.
        lightness: Its mean lightness, from which the colours of the digits differ.
        pool: Digits and their labels.
        heights: The smallest and the largest height of a digit in pixels.
    """
    digits: list[int] = []
    masks: list[np.ndarray] = []
    boxes: list[tuple[int, int, int, int]] = []
    colours: list[np.ndarray] = []
    wanted = int(rng.integers(1, _MAX_DIGITS + 1))
    for _ in range(20 * wanted):
        if len(digits) == wanted:
            break
        source, digit = pool[rng.integers(len(pool))]
        ink = _scale(source, int(rng.integers(heights[0], heights[1] + 1)))
        height, width = ink.shape
        x, y = (int(rng.integers(0, SIZE - extent + 1)) for extent in (width, height))
        box = (x, y, x + width, y + height)
        colour = _colour(rng, lightness, colours)
        if any(_overlap(box, other) > _MAX_OVERLAP for other in boxes):
            continue
        here = np.s_[y : y + height, x : x + width]
        cover = np.clip((ink - _INK) * height / 10 + 0.5, 0, 1)[..., None]  # edges are about one pixel wide
        image[here] = image[here] * (1 - cover) + colour * cover
        mask = np.zeros((SIZE, SIZE), bool)
        mask[here] = ink >= _INK
        masks = [*(below & ~mask for below in masks), mask]
        digits.append(digit)
        boxes.append(box)
        colours.append(colour)
    return digits, masks


def _scale(source: Image.Image, height: int) -> np.ndarray:
    """The ink of a digit, 0 to 1, scaled so that the part above `_INK` is `height` pixels high."""
    padded = Image.new("L", (40, 40))
    padded.paste(source, (4, 4))
    ink = np.asarray(padded)
    top, bottom = np.flatnonzero((ink >= _INK * 255).any(1))[[0, -1]]
    side = round(40 * height / (bottom - top + 1))
    ink = np.asarray(padded.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    rows, columns = np.flatnonzero((ink >= _INK).any(1)), np.flatnonzero((ink >= _INK).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _background(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A texture, float (128, 128, 3), of clouds, stripes and grain in two colours, and its mean lightness."""
    clouds = draw_clouds(rng)
    across, down = rng.uniform(-0.5, 0.5, 2)
    stripes = np.sin(across * np.arange(SIZE) + down * np.arange(SIZE)[:, None] + 4 * clouds)
    mix = np.clip(clouds + rng.uniform(0, 0.25) * stripes, 0, 1)[..., None]
    base = rng.uniform(40, 215, 3)
    other = np.clip(base + rng.uniform(-60, 60, 3), 0, 255)
    image = base * (1 - mix) + other * mix + rng.normal(0, rng.uniform(1, 7), (SIZE, SIZE, 1))
    return image, lightness_of(image.mean((0, 1)))


def draw_clouds(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of about 0 to 1, float (128, 128)."""
    clouds = np.zeros((SIZE, SIZE))
    for cells in (2, 5, 12):
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        clouds += np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64) / 3
    return clouds


def _colour(rng: np.random.Generator, background: float, others: list[np.ndarray]) -> np.ndarray:
    """A colour that differs from the background in lightness; of eight candidates, the one least like the `others`."""
    if background > 127:
        choices = rng.uniform(0, 1, (8, 3)) * (background - 85)
    else:
        choices = 255 - rng.uniform(0, 1, (8, 3)) * (255 - background - 85)
    return max(choices, key=lambda c: min((float(abs(c - other).sum()) for other in others), default=0))


def lightness_of(colour: np.ndarray) -> float:
    """The lightness of a colour (3,), 0 to 255."""
    return float((colour * (0.299, 0.587, 0.114)).sum())


class DigitCrops(Dataset):
    """Crops of the single digits of the digit scenes; for training, also the plain digits.

    Args:
        root: The folder of the scenes, which are written there if necessary, or of panoptic ones; None for the cache.
        training: Whether to use the split train; otherwise val.
    """

    classes = Digits.classes

    def __init__(self, root: str | None, training: bool):
        split = "train" if training else "val"
        folder = Path(root) if root and _has_version(Path(root), PANOPTIC) else ensure(Path(root) if root else None)
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        images = {
            image["id"]: Image.open(folder / "images" / split / image["file_name"]) for image in content["images"]
        }
        self.samples = [
            (_around(images[item["image_id"]], item["bbox"]), item["category_id"] - 1)
            for item in content["annotations"]
        ]
        if training:
            self.samples += list(Digits(True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.samples[index]


def _around(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The square around a box (left, top, width, height), 1.5 times as large as its longer side."""
    left, top, width, height = box
    half = 0.75 * max(width, height)
    x, y = left + width / 2, top + height / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
