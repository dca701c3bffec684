"""mmdet's COCO data set and metric, with classes identified by name."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import DATASETS, METRICS

from zoo.recipes.dense.annotations import normalise
from zoo.recipes.dense.transforms import MixesImages, SkipsCorrupt
from zoo.recipes.files import read_json


class NamedCoco(COCO):
    """COCO annotations after `normalise`.

    Args:
        path: The JSON, checked by `open_detection`.
        classes: Its class names in the order of the labels.
    """

    def __init__(self, path: str, classes: Sequence[str]):
        super().__init__()
        # pycocotools would open the file itself, in the system's encoding.
        self.dataset = normalise(read_json(Path(path)), classes)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints messages
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


@DATASETS.register_module()
class NamedCocoDataset(SkipsCorrupt, CocoDataset):
    """Labels are in the order of `metainfo["classes"]`, not of the file's list of categories."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the annotations."""
        self.COCOAPI = functools.partial(NamedCoco, classes=self.metainfo["classes"])
        return super().load_data_list()

    def filter_data(self) -> list[dict[str, Any]]:
        """In training, omit images without an object to learn."""
        if self.test_mode or not (self.filter_cfg or {}).get("filter_empty_gt"):
            return self.data_list
        return [item for item in self.data_list if not all(i["ignore_flag"] for i in item["instances"])]

    def exclude(self, sample: Any, idx: int) -> None:
        """Set the id of the corrupt image, by which the metric excludes it."""
        sample.set_metainfo({"img_id": self.get_data_info(idx)["img_id"]})


@DATASETS.register_module()
class MixedDataset(MixesImages, MultiImageMixDataset):
    """mmdet's wrapper that mixes images."""


@METRICS.register_module()
class NamedCocoMetric(CocoMetric):
    """COCO's metric, with the labels of predictions in the order of `classes`.

    Category ids in result files are those of the annotations if these have the classes in the same order.

    Args:
        ann_file: The COCO JSON.
        classes: Class names in the order of the labels.
        options: Further arguments of CocoMetric.
    """

    def __init__(self, ann_file: str, classes: Sequence[str], **options: Any):
        super().__init__(**options)
        self._coco_api = NamedCoco(ann_file, classes)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Store the predictions for a batch; for a corrupt image, store only its id."""
        for sample in data_samples:
            if sample.get("corrupt"):
                self.results.append(({"img_id": sample["img_id"]}, None))
            else:
                super().process(data_batch, [sample])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Score without pycocotools' printed tables. No predictions, for which mmdet has no scores, score 0.

        Objects in corrupt images do not count.

        `per_class` has the AP of each class, 0-1, of masks if they are scored; NaN if there is nothing to find.
        """
        corrupt = {truth["img_id"] for truth, found in results if found is None}
        self.img_ids = [number for number in self._coco_api.get_img_ids() if number not in corrupt]
        with contextlib.redirect_stdout(io.StringIO()):
            scores = super().compute_metrics([result for result in results if result[1] is not None])
        if not scores:
            return {f"{kind}_{name}": 0.0 for kind in self.metrics for name in ("mAP", "mAP_50")}
        classes = self.dataset_meta["classes"]
        return scores | {"per_class": [scores.get(f"{name}_precision", math.nan) for name in classes]}
