"""Panoptic segmentation with mmdet: the data set, the reader of segments, the semantic output and the metrics."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.datasets.transforms import PackDetInputs
from mmdet.evaluation.metrics import CocoMetric
from mmdet.models import PanopticFPN
from mmdet.models.seg_heads import HeuristicFusionHead, MaskFormerFusionHead
from mmdet.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmdet.structures import INSTANCE_OFFSET, SampleList
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.evaluator import BaseMetric
from mmengine.structures import InstanceData, PixelData
from pycocotools import mask as coco_mask

from zoo.recipes.dense.confusion import class_scores, count_pairs, sum_pairs
from zoo.recipes.dense.panoptic_annotations import Picture, load_panoptic
from zoo.recipes.dense.panoptic_data import read_ids
from zoo.recipes.dense.panoptic_quality import Segment, count_matches, extent, found_segments, mean_quality
from zoo.recipes.dense.transforms import SkipsCorrupt


@DATASETS.register_module()
class SegmentsDataset(SkipsCorrupt, BaseDetDataset):
    """Images and their segments, in COCO's panoptic format.

    Labels are in the order of `metainfo["classes"]`: first the things, then the stuff.

    Args:
        ann_file: The JSON, checked by `open_panoptic`.
        labels: The folder of its PNGs.
        images: The folder of its images.
    """

    def __init__(self, *args: Any, labels: str, images: str, **options: Any):
        self.labels, self.images = Path(labels), Path(images)
        super().__init__(*args, **options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the annotations."""
        label = {name: place for place, name in enumerate(self.metainfo["classes"])}
        return [self._item(picture, label) for picture in load_panoptic(Path(self.ann_file)).pictures]

    def _item(self, picture: Picture, label: dict[str, int]) -> dict[str, Any]:
        return {
            "img_path": str(self.images / picture.image),
            "seg_map_path": str(self.labels / picture.labels),
            "img_id": picture.id,
            "width": picture.width,
            "height": picture.height,
            "num_classes": len(label),
            "num_things": self.metainfo["num_things"],
            "segments": [(number, label[name], crowd) for number, name, crowd in picture.segments],
            # For samplers that balance classes; the reader of images compares sizes if an item has this.
            "instances": [{"bbox_label": label[name]} for _, name, _ in picture.segments],
        }

    def exclude(self, sample: Any, idx: int) -> None:
        """Do nothing: the metrics leave out samples that replace corrupt images."""


@TRANSFORMS.register_module()
class LoadSegments(BaseTransform):
    """The segments of `seg_map_path`.

    It adds the boxes, labels, masks and crowd flags of things, as mmdet's transforms expect them; `gt_seg_map`, int32
    (H, W), the label of each pixel, or the number of classes where there is none; and `segment_ids`, int32 (H, W).
    """

    def transform(self, results: dict) -> dict:
        """Read the segments.

        Raises:
            CorruptFile: They can't be read.
            UserError: The file is not a panoptic PNG of the image's size.
        """
        height, width = results["ori_shape"]
        ids = read_ids(results["seg_map_path"], results["img_path"], (width, height))
        labels = np.full(ids.shape, results["num_classes"], np.int32)
        boxes, classes, masks, crowds = [], [], [], []
        for number, label, crowd in results["segments"]:
            mask = ids == number
            if not mask.any():
                continue
            labels[mask] = label
            if label < results["num_things"]:
                boxes.append(extent(mask))
                classes.append(label)
                masks.append(mask.astype(np.uint8))
                crowds.append(crowd)
        results["gt_bboxes"] = HorizontalBoxes(np.array(boxes, np.float32).reshape(-1, 4), dtype=torch.float32)
        results["gt_bboxes_labels"] = np.array(classes, np.int64)
        results["gt_masks"] = BitmapMasks(masks, height, width)
        results["gt_ignore_flags"] = np.array(crowds, bool)
        results["gt_seg_map"] = labels
        results["segment_ids"] = ids
        return results


@TRANSFORMS.register_module()
class PackSegments(PackDetInputs):
    """mmdet's PackDetInputs, which also packs the ids of true segments as `gt_panoptic_seg`, for evaluation."""

    def transform(self, results: dict) -> dict:
        """Pack an item."""
        packed = super().transform(results)
        if "segment_ids" in results:
            ids = torch.from_numpy(results["segment_ids"])
            packed["data_samples"].gt_panoptic_seg = PixelData(sem_seg=ids[None])
        return packed


@MODELS.register_module()
class PanopticFusionHead(MaskFormerFusionHead):
    """mmdet's MaskFormerFusionHead, which also predicts the class of each pixel as `semantic` (1, H, W).

    This is the semantic inference of MaskFormer (arXiv 2107.06278, section 3.4).
    """

    def panoptic_postprocess(self, mask_cls: torch.Tensor, mask_pred: torch.Tensor) -> PixelData:
        """The segments and classes of an image, from logits (queries, classes + 1) and (queries, H, W)."""
        found = super().panoptic_postprocess(mask_cls, mask_pred)
        scores, masks = mask_cls.softmax(-1)[:, :-1], mask_pred.sigmoid()
        found.semantic = torch.einsum("qc,qhw->chw", scores, masks).argmax(0, keepdim=True)
        return found


@MODELS.register_module()
class FusionByScore(HeuristicFusionHead):
    """mmdet's HeuristicFusionHead, which uses objects of a higher score than `test_cfg.score_thr`.

    It also predicts the class of each pixel as `semantic` (1, H, W): that of its segment, or the most likely stuff.
    """

    def _predict_single(self, mask_results: InstanceData, seg_preds: torch.Tensor, **options: Any) -> PixelData:
        used = mask_results[mask_results.scores > self.test_cfg.score_thr]
        found = super()._predict_single(used, seg_preds, **options)
        labels = found.sem_seg % INSTANCE_OFFSET
        if self.num_stuff_classes:
            stuff = self.num_things_classes + seg_preds[:-1].argmax(0, keepdim=True)
            labels = torch.where(labels < self.num_classes, labels, stuff)
        found.semantic = labels
        return found


@MODELS.register_module()
class PanopticFPNWithInstances(PanopticFPN):
    """mmdet's PanopticFPN (arXiv 1901.02446), which also returns the objects of all scores, as `pred_instances`."""

    def predict(self, batch_inputs: torch.Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """Add `pred_instances` and `pred_panoptic_seg` to the samples of a batch (B, 3, H, W)."""
        features = self.extract_feat(batch_inputs)
        proposals = self.rpn_head.predict(features, batch_data_samples, rescale=False)
        objects = self.roi_head.predict(features, proposals, batch_data_samples, rescale=rescale)
        stuff = self.semantic_head.predict(features, [sample.metainfo for sample in batch_data_samples], rescale)
        for sample, found in zip(batch_data_samples, objects, strict=True):
            sample.pred_instances = found
        return self.add_pred_to_datasample(batch_data_samples, self.panoptic_fusion_head.predict(objects, stuff))


@METRICS.register_module()
class PanopticQuality(BaseMetric):
    """PQ, SQ and RQ in percent, of all classes, things and stuff; and mIoU of the semantic output.

    `counts` has what `panoptic_quality.count_matches` returns, summed over the images; `confusion` is as that of the
    metric `Confusion`. Corrupt images do not count.
    """

    default_prefix = "panoptic"

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count the matches of a batch."""
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            if sample.get("corrupt"):
                continue
            true = sample["gt_panoptic_seg"]["sem_seg"][0].cpu().numpy()
            ids, segments = found_segments(sample["pred_panoptic_seg"]["sem_seg"][0].cpu().numpy(), classes)
            there = {number: Segment(label, crowd) for number, label, crowd in sample["segments"]}
            labels = sample["gt_sem_seg"]["sem_seg"].cpu()
            pairs = count_pairs(labels, sample["pred_panoptic_seg"]["semantic"].cpu(), classes, ignore_index=classes)
            self.results.append((count_matches(true, ids, there, segments, classes), pairs))

    def compute_metrics(self, results: list) -> dict[str, Any]:
        """Sum the counts of all images."""
        classes = len(self.dataset_meta["classes"])
        counts = sum((counts for counts, _ in results), np.zeros((4, classes)))
        confusion = sum_pairs([pairs for _, pairs in results], classes)
        known = [value for value in class_scores(confusion)["IoU"] if value is not None]
        return mean_quality(counts, self.dataset_meta["num_things"]) | {
            "mIoU": sum(known) / len(known) if known else math.nan,
            "counts": counts,
            "confusion": confusion,
        }


@METRICS.register_module()
class ThingsMetric(CocoMetric):
    """COCO's metric for things, whose true masks are those of the panoptic annotations.

    COCO's own AP has other masks, which may overlap.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Store the predictions and true things of a batch."""
        things = self.dataset_meta["num_things"]
        for sample in data_samples:
            if sample.get("corrupt"):
                continue
            ids = sample["gt_panoptic_seg"]["sem_seg"][0].cpu().numpy()
            instances = []
            for number, label, crowd in sample["segments"]:
                mask = ids == number
                if label < things and mask.any():
                    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                    box = list(extent(mask))
                    instances.append({"bbox": box, "bbox_label": label, "mask": code, "ignore_flag": int(crowd)})
            super().process(data_batch, [sample | {"instances": instances}])

    def compute_metrics(self, results: list) -> dict[str, Any]:
        """Score without pycocotools' printed tables. No predictions, for which mmdet has no scores, score 0.

        `per_class` has the AP of the masks of each class, 0-1; NaN if there is nothing to find.
        """
        if not any(truth["anns"] for truth, _ in results):
            return {}
        if not any(len(found["labels"]) for _, found in results):
            return {f"{kind}_{name}": 0.0 for kind in self.metrics for name in ("mAP", "mAP_50")}
        with contextlib.redirect_stdout(io.StringIO()):
            scores = super().compute_metrics(results)
        self._coco_api = self.cat_ids = self.img_ids = None  # with them, the next evaluation would not store its truth
        classes = self.dataset_meta["classes"]
        return scores | {"per_class": [scores.get(f"{name}_precision", math.nan) for name in classes]}
