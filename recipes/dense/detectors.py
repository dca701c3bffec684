"""mmdet's detectors, which can also predict an image in windows and in several views, and merge the objects by NMS.

mmdet's DetTTAModel merges boxes alone. Here an object keeps the mask that was predicted with its box. The masks of
merged objects are RLE codes, as in COCO's result files, because those of a large photo would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import batched_nms
from mmdet.models import DINO, CascadeRCNN, Mask2Former, MaskRCNN, RetinaNet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torch import Tensor

from zoo.recipes.dense import views

_NMS = {"type": "nms", "iou_threshold": 0.5}  # for methods that have none: DINO and Mask2Former
_PART = 0.7  # a box that a window cuts off is dropped if another box of its class has this share of it
_BORDER = 1.0  # pixels from a window's border at which a box counts as cut off


@dataclass
class _Mask:
    """An object's mask: bool (h, w), whose corner is at `left` and `top` in an image of `size` (height, width)."""

    pixels: np.ndarray
    left: int
    top: int
    size: tuple[int, int]
    flip: str | None

    def encode(self, size: tuple[int, int]) -> dict[str, Any]:
        """The RLE code at the size of the image."""
        whole = np.zeros(self.size, np.uint8, order="F")
        high, wide = self.pixels.shape
        whole[self.top : self.top + high, self.left : self.left + wide] = self.pixels
        if self.size != size:
            resized = F.interpolate(torch.from_numpy(np.ascontiguousarray(whole))[None, None].float(), size,
                                    mode="bilinear", align_corners=False)  # fmt: skip
            whole = (resized[0, 0] >= 0.5).numpy().astype(np.uint8)
        if self.flip:
            whole = whole[:, ::-1] if self.flip == "horizontal" else whole[::-1]
        return coco_mask.encode(np.asfortranarray(whole))


@dataclass
class _Objects:
    """Objects of an image: boxes (N, 4), scores (N,), labels (N,), whether a window cuts them off (N,), and masks."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    cut: Tensor
    masks: list[_Mask] | None

    def __getitem__(self, chosen: Tensor) -> _Objects:
        """The objects with these numbers."""
        masks = None if self.masks is None else [self.masks[i] for i in chosen.tolist()]
        return _Objects(self.boxes[chosen], self.scores[chosen], self.labels[chosen], self.cut[chosen], masks)


class OfViews:
    """A mixin for detectors. `test_cfg` has `window` and `stride`, in pixels of the input, if windows are predicted."""

    takes_views = True

    def val_step(self, data: dict[str, Any]) -> list[DetDataSample]:
        """As `test_step`."""
        return self.test_step(data)

    def test_step(self, data: dict[str, Any]) -> list[DetDataSample]:
        """The objects in the images of a collated batch, of which each may have several views."""
        batches, window = views.batches(data), self.test_cfg.get("window")
        if len(batches) == 1 and not window:
            return super().test_step(batches[0])
        samples, found = batches[0]["data_samples"], []
        for batch in batches:
            for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
                found.append(self._of_view(image, sample, window, self.test_cfg.get("stride")))
        for number, sample in enumerate(samples):
            self._merge(sample, found[number :: len(samples)])
        return samples

    def _of_view(
        self, image: Tensor, sample: DetDataSample, window: Sequence[int] | None, stride: Sequence[int] | None
    ) -> list[_Objects]:
        """The objects in each window of an input (3, H, W)."""
        size = tuple(image.shape[-2:])
        parts = list(views.boxes(size, window, stride)) if window else [(0, 0, *size)]
        found = []
        for box in parts:
            top, left, bottom, right = box
            meta = dict(sample.metainfo)
            if len(parts) > 1:  # objects in pixels of the input
                part = (bottom - top, right - left)
                meta |= {"img_shape": part, "ori_shape": part, "scale_factor": (1.0, 1.0)}
            alone = {"inputs": [image[:, top:bottom, left:right]], "data_samples": [DetDataSample(metainfo=meta)]}
            [result] = super().test_step(alone)
            objects = self._objects(result.pred_instances, box if len(parts) > 1 else None, size, sample.metainfo)
            found.append(objects)
        return found

    @staticmethod
    def _objects(found: Any, box: Sequence[int] | None, size: tuple[int, int], meta: dict[str, Any]) -> _Objects:
        """The objects of one prediction, with boxes in pixels of the image.

        Args:
            found: mmdet's result for a window, in its pixels, or for the image if `box` is None.
            box: The window (top, left, bottom, right) in the input.
            size: The height and width of the input.
            meta: The view: `ori_shape`, `scale_factor`, `flip` and `flip_direction`.
        """
        whole, boxes = tuple(meta["ori_shape"][:2]), found.bboxes
        cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        flip = meta["flip_direction"] if meta.get("flip") else None
        top, left = 0, 0
        frame = whole
        if box is not None:
            (top, left, bottom, right), frame = box, size
            boxes = boxes + boxes.new_tensor([left, top, left, top])
            inner = [(0, left, left > 0), (1, top, top > 0), (2, right, right < size[1]), (3, bottom, bottom < size[0])]
            for side, border, inside in inner:
                if inside:
                    cut |= (boxes[:, side] - border).abs() <= _BORDER
            boxes = boxes / boxes.new_tensor(meta["scale_factor"]).repeat(2)
        masks = None
        if "masks" in found:
            masks = [_cropped(mask, left, top, frame, flip) for mask in found.masks]
        if flip:
            boxes = bbox_flip(boxes, whole, flip)
        return _Objects(boxes, found.scores, found.labels, cut, masks)

    def _merge(self, sample: DetDataSample, found: list[list[_Objects]]) -> None:
        """Set the objects of an image, from those of its views and their windows."""
        parts = [objects for view in found for objects in view]
        objects = _Objects(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels", "cut")),
            None if parts[0].masks is None else [mask for part in parts for mask in part.masks],
        )
        objects = objects[_whole(objects).nonzero().flatten()]
        test = self.test_cfg.get("rcnn", self.test_cfg)
        scores = objects.scores
        if len(scores):
            rated, kept = batched_nms(objects.boxes, scores, objects.labels, test.get("nms", _NMS))
            most = test.get("max_per_img", test.get("max_per_image", 100)) * max(map(len, found))
            objects, scores = objects[kept[:most]], rated[:most, -1]
        merged = InstanceData(bboxes=objects.boxes, scores=scores, labels=objects.labels)
        if objects.masks is not None:
            merged.masks = [mask.encode(tuple(sample.ori_shape[:2])) for mask in objects.masks]
        sample.pred_instances = merged


def _cropped(mask: Tensor, left: int, top: int, size: tuple[int, int], flip: str | None) -> _Mask:
    """A mask (H, W) whose corner is at `left` and `top`, without the empty rows and columns around the object."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return _Mask(np.zeros((0, 0), bool), 0, 0, size, flip)
    first, last, start, end = *rows[[0, -1]].tolist(), *columns[[0, -1]].tolist()
    pixels = mask[first : last + 1, start : end + 1].cpu().numpy().astype(bool)
    return _Mask(pixels, left + start, top + first, size, flip)


def _whole(objects: _Objects) -> Tensor:
    """Which objects are not part of another one, bool (N,): another window may see the whole of what one cuts off."""
    kept = torch.ones_like(objects.cut)
    for i in objects.cut.nonzero().flatten().tolist():
        box, others = objects.boxes[i], objects.boxes
        sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
        area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(1)
        larger = (areas > area) & (objects.labels == objects.labels[i]) & (objects.scores >= objects.scores[i] / 2)
        kept[i] = not bool((larger & (sides.prod(1) > _PART * area)).any())
    return kept


@MODELS.register_module()
class MaskRCNNOfViews(OfViews, MaskRCNN):
    """Mask R-CNN."""


@MODELS.register_module()
class CascadeRCNNOfViews(OfViews, CascadeRCNN):
    """Cascade R-CNN, with masks or without."""


@MODELS.register_module()
class RetinaNetOfViews(OfViews, RetinaNet):
    """RetinaNet."""


@MODELS.register_module()
class DINOOfViews(OfViews, DINO):
    """DINO."""


@MODELS.register_module()
class Mask2FormerOfViews(OfViews, Mask2Former):
    """Mask2Former for instances."""
