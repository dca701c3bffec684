"""Predictions drawn on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.font_manager import findfont  # ships DejaVu Sans
from mmengine.dataset import pseudo_collate
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from zoo.recipes.runs import atomic

# Smaller pictures are enlarged to this many pixels, so that names can be read.
_READABLE = 384
SCORE = 0.5
_BACKGROUND = "background"
_MOST_NAMES = 36  # that a legend has room for


def colors(count: int) -> list[tuple[int, int, int]]:
    """As many colours that differ as far as hue and brightness allow."""
    hues = [(i * 0.618034) % 1 for i in range(count)]  # the golden ratio spreads any number evenly
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
    masks: torch.Tensor | None = None,
) -> Image.Image:
    """Draw objects on an RGB image.

    Args:
        image: Of width W and height H.
        boxes: (N, 4): left, top, right, bottom, in pixels.
        labels: (N,), integers.
        classes: The names of the labels.
        scores: (N,), 0-1; not written if None.
        masks: (N, H, W), bool; not drawn if None.
    """
    palette = [colors(len(classes))[label] for label in labels.tolist()]
    factor = max(1.0, _READABLE / min(image.size))
    pixels = pil_to_tensor(image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC))
    if not len(labels):
        return to_pil_image(pixels)
    if masks is not None:
        enlarged = torch.nn.functional.interpolate(masks[None].float(), size=pixels.shape[1:], mode="nearest")[0] > 0.5
        pixels = draw_segmentation_masks(pixels, enlarged, alpha=0.4, colors=palette)
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {100 * score:.0f} %" for name, score in zip(names, scores.tolist(), strict=True)]
    return to_pil_image(
        draw_bounding_boxes(
            pixels, boxes.cpu() * factor, names, palette, width=2, label_colors=["black"] * len(names),
            label_background_colors=palette, fill_labels=True, font=findfont("DejaVu Sans"), font_size=14,
        )
    )  # fmt: skip


def draw_labels(image: Image.Image, labels: torch.Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw the classes of pixels, (H, W) integers, on an RGB image.

    What is no class (255), or one named background, stays as it is.
    """
    factor = max(1.0, _READABLE / min(image.size))
    pixels = pil_to_tensor(image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC))
    enlarged = torch.nn.functional.interpolate(labels[None, None].float(), size=pixels.shape[1:], mode="nearest")[0, 0]
    present = [i for i in labels.unique().tolist() if i < len(classes) and classes[i] != _BACKGROUND]
    if not present:
        return to_pil_image(pixels)
    masks, palette = torch.stack([enlarged == i for i in present]), colors(len(classes))
    return to_pil_image(draw_segmentation_masks(pixels, masks, alpha=0.6, colors=[palette[i] for i in present]))


def draw_sample(image: Image.Image, sample: Any, classes: Sequence[str], score: float = SCORE) -> Image.Image:
    """Draw what a model found: `sample` is mmdet's or mmseg's result for `image`."""
    if "pred_sem_seg" in sample:
        return draw_labels(image, sample.pred_sem_seg.data[0].cpu(), classes)
    found = sample.pred_instances
    found = found[found.scores >= score].cpu()
    masks = torch.as_tensor(found.masks).bool() if "masks" in found else None
    return draw_objects(image, found.bboxes, found.labels, classes, found.scores, masks)


def draw_truth(image: Image.Image, sample: Any, classes: Sequence[str]) -> Image.Image:
    """Draw what is there, from the annotations in `sample`."""
    if "gt_sem_seg" in sample:
        return draw_labels(image, sample.gt_sem_seg.data[0], classes)
    there = sample.gt_instances
    masks = torch.as_tensor(there.masks.to_ndarray()).bool() if "masks" in there else None
    boxes = getattr(there.bboxes, "tensor", there.bboxes)
    return draw_objects(image, boxes, there.labels, classes, None, masks)


@torch.no_grad()
def draw_samples(path: Path, model: torch.nn.Module, dataset: Any, classes: Sequence[str], columns: int = 4) -> None:
    """Draw two rows of validation images, evenly spread, with what the model finds; below each what is there."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    model.eval()
    count = min(2 * columns, len(dataset))
    rows = 2 * -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout="constrained", dpi=100)
    axes = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
    for axis in axes.flat:
        axis.axis("off")
    for number in range(count):
        item = dataset[number * len(dataset) // count]
        [result] = model.test_step(pseudo_collate([item]))
        image = open_image(Path(item["data_samples"].img_path))
        row, column = 2 * (number // columns), number % columns
        for offset, title, drawn in (
            (0, "found", draw_sample(image, result, classes)),
            (1, "true", draw_truth(image, item["data_samples"], classes)),
        ):
            axes[row + offset, column].imshow(np.asarray(drawn))
            axes[row + offset, column].set_title(title, fontsize=9)
        segments = "pred_sem_seg" in result
    if segments and len(classes) <= _MOST_NAMES:
        drawn = [
            (name, color) for name, color in zip(classes, colors(len(classes)), strict=True) if name != _BACKGROUND
        ]
        patches = [Patch(color=[c / 255 for c in color], label=name) for name, color in drawn]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 12), fontsize=9)
    with atomic(path) as file:
        figure.savefig(file, format="png")


def open_image(path: Path) -> Image.Image:
    """The image as RGB, turned as its EXIF data say, which MMCV does too."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
