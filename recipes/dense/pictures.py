"""Pictures of predictions and annotations of detectors and segmentors."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.font_manager import findfont  # ships DejaVu Sans
from mmengine.dataset import pseudo_collate
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from zoo.recipes import images, sheet
from zoo.recipes.dense import views
from zoo.recipes.dense.panoptic_quality import found_segments
from zoo.recipes.sheet import Tile
from zoo.recipes.subsets import evenly_spread

# Smaller pictures are enlarged to this many pixels, so that names can be read.
_READABLE = 384
_WIDTH = 320  # pixels, of a picture in the sheet of samples
SCORE = 0.5
_BACKGROUND = "background"
_MOST_NAMES = 36  # names for which a legend has room


def colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colours that differ in hue and brightness as much as possible."""
    hues = [(i * 0.618034) % 1 for i in range(count)]  # the golden ratio spreads any number of hues evenly
    return [
        tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, 1.0 if i % 2 == 0 else 0.75))
        for i, hue in enumerate(hues)
    ]


def draw_objects(
    image: Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    scores: torch.Tensor | None = None,
    masks: Iterable[torch.Tensor] | None = None,
    width: int | None = None,
) -> Image.Image:
    """Draw objects on an RGB image.

    Args:
        image: An image of width W and height H.
        boxes: (N, 4): left, top, right, bottom, in pixels.
        labels: (N,), integers.
        classes: The names of the labels.
        scores: (N,), 0-1; not written if None.
        masks: N masks (H, W), bool; not drawn if None.
        width: The width of the result; None for the image's own, or a larger one for a small image.
    """
    palette = [colors(len(classes))[label] for label in labels.tolist()]
    factor, pixels = _resized(image, width)
    if not len(labels):
        return to_pil_image(pixels)
    if masks is not None:
        painted, taken = pixels.clone(), torch.zeros(pixels.shape[1:], dtype=torch.bool)
        for mask, colour in zip(masks, palette, strict=True):  # one by one: all of a large photo's need gigabytes
            enlarged = torch.nn.functional.interpolate(mask[None, None].float(), size=pixels.shape[1:])[0, 0] > 0.5
            painted[:, enlarged] = torch.tensor(colour, dtype=torch.uint8)[:, None]
            painted[:, enlarged & taken] = 0  # where objects overlap
            taken |= enlarged
        pixels = _blended(pixels, painted, 0.4)
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {100 * score:.0f} %" for name, score in zip(names, scores.tolist(), strict=True)]
    picture = to_pil_image(pixels)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 250))
    font = ImageFont.truetype(findfont("DejaVu Sans:bold"), max(14, round(min(picture.size) / 40)))
    # All boxes are drawn before the first label, so that no box crosses a label.
    places = (boxes.cpu() * factor).tolist()
    for box, colour in zip(places, palette, strict=True):
        draw.rectangle(_upright(box), outline=colour, width=line)
    for box, name, colour in zip(places, names, palette, strict=True):
        _label(draw, box, name, colour, font)
    return picture


def _upright(box: Sequence[float]) -> tuple[float, float, float, float]:
    """The box with sorted corners: Pillow refuses others, which detectors sometimes predict."""
    left, top, right, bottom = box
    return left, top, max(left, right), max(top, bottom)


def _label(
    draw: ImageDraw.ImageDraw, box: Sequence[float], text: str, colour: tuple[int, int, int], font: ImageFont.ImageFont
) -> None:
    """Write the label of a box: above it, or below if there is no room, or at its top; always inside the picture."""
    left, top, _, bottom = box
    width, height = draw.im.size
    wide, high = font.getlength(text) + 6, sum(font.getmetrics()) + 2
    y = top - high if top >= high else bottom if bottom + high <= height else top
    x, y = max(0, min(left, width - wide)), max(0, min(y, height - high))
    draw.rectangle((x, y, x + wide, y + high), colour)
    draw.text((x + 3, y + 1), text, _readable_on(colour), font)


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Black on light colours, white on dark and on saturated ones."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _resized(image: Image.Image, width: int | None) -> tuple[float, torch.Tensor]:
    """The scale at which the image is drawn, and the scaled image, (3, H, W)."""
    factor = width / image.width if width else max(1.0, _READABLE / min(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    return factor, pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))


def draw_labels(
    image: Image.Image, labels: torch.Tensor, classes: Sequence[str], width: int | None = None
) -> Image.Image:
    """Draw the classes of pixels, (H, W) integers, on an RGB image; `width` is as in `draw_objects`.

    Pixels without a class (255), and those of a class named background, are not drawn over.
    """
    _, pixels = _resized(image, width)
    enlarged = torch.nn.functional.interpolate(labels[None, None].float(), size=pixels.shape[1:], mode="nearest")[0, 0]
    present = [i for i in labels.unique().tolist() if i < len(classes) and classes[i] != _BACKGROUND]
    painted, palette = pixels.clone(), colors(len(classes))
    for label in present:
        painted[:, enlarged == label] = torch.tensor(palette[label], dtype=torch.uint8)[:, None]
    return to_pil_image(_blended(pixels, painted, 0.6))


def _blended(below: torch.Tensor, above: torch.Tensor, alpha: float) -> torch.Tensor:
    """Two pictures (3, H, W), uint8, of which the upper one has the opacity `alpha`."""
    return (below * (1 - alpha) + above * alpha).to(torch.uint8)


def draw_segments(
    image: Image.Image, ids: np.ndarray, labels: Mapping[int, int], classes: Sequence[str], width: int | None = None
) -> Image.Image:
    """Draw segments on an RGB image: each in the colour of its class, with its border and its name.

    Args:
        image: An image of width W and height H.
        ids: The ids of the segments, integers (H, W).
        labels: The label of each segment by id; pixels with other ids are not drawn over.
        classes: The names of the labels.
        width: As in `draw_objects`.
    """
    _, pixels = _resized(image, width)
    if not labels:
        return to_pil_image(pixels)
    enlarged = cv2.resize(ids, pixels.shape[:0:-1], interpolation=cv2.INTER_NEAREST)
    masks = [enlarged == number for number in labels]
    palette = [colors(len(classes))[label] for label in labels.values()]
    painted = pixels.clone()
    for mask, colour in zip(masks, palette, strict=True):
        painted[:, torch.from_numpy(mask)] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    drawn = _blended(pixels, painted, 0.45)
    border = np.zeros(enlarged.shape, bool)
    border[1:] |= enlarged[1:] != enlarged[:-1]
    border[:, 1:] |= enlarged[:, 1:] != enlarged[:, :-1]
    drawn[:, torch.from_numpy(border)] = 255
    picture = to_pil_image(drawn)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(findfont("DejaVu Sans:bold"), max(14, round(min(picture.size) / 40)))
    for mask, label, colour in zip(masks, labels.values(), palette, strict=True):
        inside = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(inside.argmax(), inside.shape)  # the point that is farthest from the border
        wide, high = font.getlength(classes[label]) + 6, sum(font.getmetrics()) + 2
        _label(draw, (x - wide / 2, y + high / 2, x, y), classes[label], colour, font)
    return picture


def draw_sample(
    image: Image.Image, sample: Any, classes: Sequence[str], score: float = SCORE, width: int | None = None
) -> Image.Image:
    """Draw predictions: `sample` is the result of mmdet or mmseg for `image`."""
    if "pred_panoptic_seg" in sample:
        ids, segments = found_segments(sample.pred_panoptic_seg.sem_seg[0].cpu().numpy(), len(classes))
        return draw_segments(image, ids, {key: segment.label for key, segment in segments.items()}, classes, width)
    if "pred_sem_seg" in sample:
        return draw_labels(image, sample.pred_sem_seg.data[0].cpu(), classes, width)
    found = sample.pred_instances
    found = found[found.scores >= score].cpu()
    masks = map(as_mask, found.masks) if "masks" in found else None
    return draw_objects(image, found.bboxes, found.labels, classes, found.scores, masks, width)


def as_mask(mask: Any) -> torch.Tensor:
    """A mask (H, W), bool, from an array, or from the RLE code that merged objects have."""
    return torch.as_tensor(coco_mask.decode(mask) if isinstance(mask, dict) else mask).bool()


def draw_truth(image: Image.Image, sample: Any, classes: Sequence[str], width: int | None = None) -> Image.Image:
    """Draw the annotations in `sample`."""
    if "gt_panoptic_seg" in sample:
        labels = {number: label for number, label, _ in sample.segments}
        return draw_segments(image, sample.gt_panoptic_seg.sem_seg[0].numpy(), labels, classes, width)
    if "gt_sem_seg" in sample:
        return draw_labels(image, sample.gt_sem_seg.data[0], classes, width)
    there = sample.gt_instances
    masks = torch.as_tensor(there.masks.to_ndarray()).bool() if "masks" in there else None
    boxes = getattr(there.bboxes, "tensor", there.bboxes)
    return draw_objects(image, boxes, there.labels, classes, None, masks, width)


@torch.no_grad()
def draw_samples(path: Path, model: torch.nn.Module, dataset: Any, classes: Sequence[str], most: int = 8) -> None:
    """Draw at most `most` validation images, evenly spread, with their predictions and, beside them, annotations."""
    model.eval()
    numbers = evenly_spread(range(len(dataset)), most)
    pairs = []
    for number in numbers:
        item = dataset[number]
        [result] = model.test_step(pseudo_collate([item]))
        sample = views.batches(pseudo_collate([item]))[0]["data_samples"][0]
        image = images.open_image(sample.img_path, max_pixels=2**40)  # the data set has checked its size
        found = draw_sample(image, result, classes, width=_WIDTH)
        true = draw_truth(image, sample, classes, width=_WIDTH)
        pairs.append([Tile(found, "found"), Tile(true, "true")])
    title = f"{len(numbers)} of {len(dataset)} validation images: predictions, each beside its annotations."
    names = legend(classes) if "pred_sem_seg" in result else []
    sheet.write(path, pairs, title=title, legend=names, columns=4, width=_WIDTH)


def legend(classes: Sequence[str]) -> list[tuple[str, str]]:
    """The classes with the colours, "#rrggbb", of their pixels; empty if there are too many."""
    named = zip(classes, colors(len(classes)), strict=True) if len(classes) <= _MOST_NAMES else ()
    return [(name, "#{:02x}{:02x}{:02x}".format(*colour)) for name, colour in named if name != _BACKGROUND]
