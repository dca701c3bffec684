"""mmdet's COCO data set and metric, with classes identified by name."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import DATASETS, METRICS
from pycocotools.cocoeval import COCOeval

from zoo.recipes.dense.annotations import normalise
from zoo.recipes.dense.formats import lvis
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
        content = read_json(Path(path))
        self.labelled: lvis.Labelled | None = None  # of LVIS
        if lvis.is_lvis(content):
            lvis.name_files(content)
        self.dataset = normalise(content, classes)
        if lvis.is_lvis(content):
            ids = {category["name"]: category["id"] for category in self.dataset["categories"]}
            self.labelled = lvis.labelled(content, {c["id"]: ids[str(c["name"])] for c in content["categories"]})
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints messages
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def evaluated(self, found: list[dict[str, Any]], kind: str, images: Sequence[int | str]) -> COCOeval:
        """The evaluation of detections in COCO's format on the images with these ids, by the rules of the data set."""
        found = lvis.limited(found) if self.labelled else found
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            # pycocotools can't load an empty list.
            results = self.loadRes(found) if found else COCO()
            if self.labelled:
                evaluation = lvis.LVISEval(self, results, kind, self.labelled)
            else:
                evaluation = COCOeval(self, results, kind)
            evaluation.params.imgIds = list(images)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation


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
        results = [result for result in results if result[1] is not None]
        if self._coco_api.labelled:
            return self._lvis_scores([found for _, found in results])
        with contextlib.redirect_stdout(io.StringIO()):
            scores = super().compute_metrics(results)
        if not scores:
            return {f"{kind}_{name}": 0.0 for kind in self.metrics for name in ("mAP", "mAP_50")}
        classes = self.dataset_meta["classes"]
        return scores | {"per_class": [scores.get(f"{name}_precision", math.nan) for name in classes]}

    def _lvis_scores(self, found: list[dict[str, Any]]) -> dict[str, float]:
        """The same scores, and those of rare, common and frequent categories, by the rules of LVIS."""
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
        scores: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            prefix = self.outfile_prefix or str(Path(scratch) / "results")
            files = self.results2json(found, prefix) if found else {}
            for kind in self.metrics:
                results = read_json(Path(files[kind])) if kind in files else []
                evaluation = self._coco_api.evaluated(results, kind, self.img_ids)
                scores |= {f"{kind}_{name}": value for name, value in evaluation.scores().items()}
                scores["per_class"] = evaluation.by_category()  # of masks, which come last, if they are scored
        return scores
