"""Detectors and segmentors of runs as functions from images to tensors, for `zoo-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead, MaskFormerHead, RetinaHead, RPNHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers import pool_to_bins
from zoo.messages import UserError
from zoo.opening import OpenModel
from zoo.recipes import config
from zoo.recipes.dense import evaluate


def open_run(folder: Path, checkpoint: str) -> tuple[OpenModel, list[str], dict[str, Any]]:
    """Open the detector or segmentor of a run for the exporters.

    Args:
        folder: The run folder.
        checkpoint: Which weights to load: `last` or `best`.

    Returns:
        The model, the names of its outputs, and the facts that a user of the exported file needs. The model takes
        images (B, 3, H, W) and returns a tensor or a tuple of tensors; see `Segmentor`, `BoxDetector` and `Proposals`.

    Raises:
        UserError: The run can't be read, or its method can't be exported.
    """
    settings = config.defaults(config.EvalConfig)
    settings.run, settings.checkpoint = str(folder), checkpoint
    model, cfg, classes, _ = evaluate.from_run(settings)
    model.eval()
    exported = _exportable(model, cfg, folder)
    prepared, dense = model.data_preprocessor, cfg.dense
    divisor = dense.size_divisor
    short = min(dense.scales[-1], dense.max_size)
    side = -(-short // divisor) * divisor
    opening = {
        "input_size": (3, side, side),
        **{name: tuple((getattr(prepared, name).flatten() / 255).tolist()) for name in ("mean", "std")},
        "interpolation": "bilinear",
    }
    facts = {
        "task": cfg.task,
        "method": dense.method,
        "backbone": cfg.model,
        "classes": classes,
        "short_side": dense.scales[-1],
        "max_size": dense.max_size,
        "size_divisor": divisor,
        **exported.facts,
    }
    if cfg.task == "segment":
        facts |= {"ignore_index": cfg.data.ignore_index, "test_divisor": dense.test_divisor}
    opened = OpenModel(exported, folder.resolve().name, f"its {checkpoint} weights", opening, False)
    return opened, exported.outputs, facts


def _exportable(model: nn.Module, cfg: DictConfig, folder: Path) -> Segmentor | BoxDetector | Proposals:
    """The part of `model` that the exporters can take. What it is decides, since `mm` can change any part of it."""
    if cfg.task == "segment" and not isinstance(model.decode_head, MaskFormerHead):
        return Segmentor(model)
    if isinstance(model, SingleStageDetector) and isinstance(getattr(model, "bbox_head", None), RetinaHead):
        return BoxDetector(model)
    if isinstance(model, TwoStageDetector) and isinstance(getattr(model, "rpn_head", None), RPNHead):
        return Proposals(model)
    raise UserError(
        f"{folder} is a run of {cfg.dense.method}, whose deformable attention the exporters can't follow: upernet, "
        "semantic_fpn and retinanet can be exported, and mask_rcnn, cascade_mask_rcnn and panoptic_fpn up to their "
        "proposals."
    )


class Segmentor(nn.Module):
    """A segmentor: images (B, 3, H, W), normalized, to logits (B, classes, H, W).

    The logits are resized to the size of the images, as for predictions, so that their argmax is the label map.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.outputs = ["logits"]
        self.facts: dict[str, Any] = {}
        _open_sizes(model.decode_head)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits = self.model(images, mode="tensor")
        return F.interpolate(
            logits, size=images.shape[2:], mode="bilinear", align_corners=self.model.decode_head.align_corners
        )


class BoxDetector(nn.Module):
    """A detector of one stage with anchors: images (B, 3, H, W), normalized, to scores and boxes of all A anchors.

    The scores (B, A, classes) are from 0 to 1. The boxes (B, A, 4) are left, top, right, bottom in pixels of the
    images. Non-maximum suppression is left to the user of the file.
    """

    def __init__(self, model: SingleStageDetector):
        super().__init__()
        self.model = model
        self.outputs = ["scores", "boxes"]
        test = model.bbox_head.test_cfg
        self.facts = {
            "outside": "NMS",
            "score_threshold": test.score_thr,
            "iou_threshold": test.nms.get("iou_threshold"),
            "max_per_image": test.max_per_img,
        }

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and the boxes."""
        return _scores_and_boxes(self.model.bbox_head, self.model.extract_feat(images), images)


class Proposals(nn.Module):
    """A detector of two stages up to its proposals: images (B, 3, H, W), normalized, to all that its RoI heads need.

    The objectness (B, A) of the A anchors is from 0 to 1; the proposals (B, A, 4) are left, top, right, bottom in
    pixels of the images; and features_0, ... (B, C, h, w) are the neck's maps, from the largest to the smallest.
    Non-maximum suppression and the RoI heads are left to the user of the file.
    """

    def __init__(self, model: TwoStageDetector):
        super().__init__()
        self.model = model
        extractor = model.roi_head.bbox_roi_extractor
        self.strides = (extractor[0] if isinstance(extractor, nn.ModuleList) else extractor).featmap_strides
        self.outputs = ["objectness", "proposals", *(f"features_{i}" for i in range(len(self.strides)))]
        test = model.rpn_head.test_cfg
        self.facts = {
            "outside": "NMS and the RoI heads",
            "iou_threshold": test.nms.get("iou_threshold"),
            "max_per_image": test.max_per_img,
            "feature_strides": list(self.strides),
        }

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the objectness, the proposals and the maps."""
        features = self.model.extract_feat(images)
        scores, boxes = _scores_and_boxes(self.model.rpn_head, features, images)
        return scores.flatten(1), boxes, *features[: len(self.strides)]


def _scores_and_boxes(head: AnchorHead, features: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (B, A, classes) and boxes (B, A, 4) of the anchors of all levels, as mmdet has them before NMS."""
    logits, deltas = head(features)
    anchors = head.prior_generator.grid_priors([x.shape[2:] for x in logits], images.dtype, images.device)
    batch = images.shape[0]
    scores, boxes = [], []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        level = level_logits.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels)
        scores.append(level.sigmoid() if head.use_sigmoid_cls else level.softmax(-1)[..., :-1])
        flat = level_deltas.permute(0, 2, 3, 1).reshape(-1, 4)
        decoded = head.bbox_coder.decode(level_anchors.repeat(batch, 1), flat, max_shape=images.shape[2:])
        boxes.append(decoded.reshape(batch, -1, 4))
    return torch.cat(scores, 1), torch.cat(boxes, 1)


class _Pool(nn.Module):
    """`nn.AdaptiveAvgPool2d` to `side` x `side` values, which ONNX has for maps of one size only."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return pool_to_bins(x, ((self.side, self.side), (self.side, self.side)))


class _Upsample(nn.Module):
    """mmseg's `Upsample` by a whole factor: its own sizes are those of a map of one size once they are exported."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None):
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        size = (height * self.factor, width * self.factor)
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def _open_sizes(model: nn.Module) -> None:
    """Replace the layers of a segmentor that the exporters fix to one size of maps by others with the same results."""
    from mmseg.models.utils import Upsample

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
                setattr(module, name, _Pool(child.output_size))
            elif isinstance(child, Upsample) and not child.size and child.scale_factor in (2, 4, 8):
                setattr(module, name, _Upsample(int(child.scale_factor), child.mode, child.align_corners))
