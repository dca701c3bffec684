"""LVIS v1: COCO's JSON with `coco_url` in place of `file_name`, and scores for images that are only partly labelled.

An image of LVIS (arXiv 1908.03195, section 3) is labelled for some of the categories: those with objects in it, and
those in `neg_category_ids`, which are not in it. Detections of other categories do not count. Of the categories in
`not_exhaustive_category_ids`, not all objects are labelled, so detections that match no object do not count either. Of
an image, 300 detections count. Apart from this, AP is COCO's. The package `lvis` (0.5.3) computes the same, but needs
numpy 1.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from zoo.messages import UserError

MOST = 300  # detections of an image
FREQUENCIES = ("r", "c", "f")  # rare: in up to 10 training images; common: in up to 100; frequent: in more


def is_lvis(content: Mapping[str, Any]) -> bool:
    """Whether a JSON with lists of images and categories is of LVIS."""
    images = content["images"]
    return bool(images) and isinstance(images[0], dict) and "neg_category_ids" in images[0]


def name_files(content: dict[str, Any]) -> None:
    """Add the missing file names: the last two parts of `coco_url`, for example train2017/000000000009.jpg."""
    for image in content["images"]:
        if isinstance(image, dict) and isinstance(url := image.get("coco_url"), str):
            image.setdefault("file_name", "/".join(url.split("/")[-2:]))


def check(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse images whose lists of categories can't be read; `path` is the file, for messages.

    Raises:
        UserError: The message names the image.
    """
    for image in content["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            value = image.get(key)
            if not isinstance(value, list) or not set(map(type, value)) <= {int}:
                raise UserError(
                    f"{path}: image {image['id']} has {key}={value!r:.60}: LVIS has a list of numbers there."
                )


@dataclass
class Labelled:
    """What the images of LVIS are labelled for.

    Attributes:
        absent: The categories that are known not to be in an image, by the image's id.
        partial: The categories of which not all objects in an image are labelled, by the image's id.
        frequency: The frequency of each category by its id, one of `FREQUENCIES`; without those that have none.
    """

    absent: dict[Any, set[int]]
    partial: dict[Any, set[int]]
    frequency: dict[int, str]


def labelled(content: Mapping[str, Any], ids: Mapping[int, int]) -> Labelled:
    """What the images in the JSON are labelled for; `ids` gives the new id of each category."""

    def listed(key: str) -> dict[Any, set[int]]:
        return {image["id"]: {ids[n] for n in image.get(key) or () if n in ids} for image in content["images"]}

    frequency = {ids[c["id"]]: c["frequency"] for c in content["categories"] if c.get("frequency") in FREQUENCIES}
    return Labelled(listed("neg_category_ids"), listed("not_exhaustive_category_ids"), frequency)


def limited(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `MOST` results of each image with the highest scores."""
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [
        result
        for found in by_image.values()
        for result in sorted(found, key=lambda result: result["score"], reverse=True)[:MOST]
    ]


class LVISEval(COCOeval):
    """COCO's evaluation of all areas together, with the rules of LVIS.

    Args:
        truth: The annotations.
        found: The detections, after `limited`.
        kind: bbox or segm.
        known: What the images are labelled for.
    """

    def __init__(self, truth: COCO, found: COCO, kind: str, known: Labelled):
        super().__init__(truth, found, kind)
        self.known = known
        self.params.maxDets = [MOST]
        self.params.areaRng, self.params.areaRngLbl = self.params.areaRng[:1], self.params.areaRngLbl[:1]

    def evaluate(self) -> None:
        """Evaluate the pairs of an image and a category that have an object or a detection; the others are None."""
        params = self.params
        params.imgIds, params.catIds = sorted(set(params.imgIds)), sorted(set(params.catIds))
        self._prepare()
        absent = self.known.absent
        self._dts = defaultdict(
            list,
            {(i, c): found for (i, c), found in self._dts.items() if (i, c) in self._gts or c in absent[i]},
        )
        pairs = self._gts.keys() | self._dts.keys()
        self.ious = {pair: self.computeIoU(*pair) for pair in pairs}
        rows, columns = ({number: place for place, number in enumerate(ids)} for ids in (params.catIds, params.imgIds))
        self.evalImgs = [None] * (len(rows) * len(columns))
        for image, category in pairs:
            found = self.evaluateImg(image, category, params.areaRng[0], MOST)
            if found and category in self.known.partial[image]:
                found["dtIgnore"] = found["dtIgnore"] | (found["dtMatches"] == 0)
            self.evalImgs[rows[category] * len(columns) + columns[image]] = found
        self._paramsEval = copy.deepcopy(params)

    def scores(self) -> dict[str, float]:
        """AP, AP50, and AP of rare, common and frequent categories, 0-1; -1 if there is nothing to find."""
        precision = self.eval["precision"][..., 0, 0]  # thresholds, recalls, categories
        groups = [self.known.frequency.get(number) for number in self.params.catIds]
        parts = {"mAP": precision, "mAP_50": precision[:1]}
        parts |= {f"mAP_{name}": precision[..., [group == name for group in groups]] for name in FREQUENCIES}
        return {name: _mean(part) for name, part in parts.items()}

    def by_category(self) -> list[float]:
        """AP of each category, 0-1, in the order of their ids; NaN if there is nothing to find."""
        precision = self.eval["precision"][..., 0, 0]
        means = [_mean(precision[..., place]) for place in range(precision.shape[-1])]
        return [mean if mean >= 0 else float("nan") for mean in means]


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0
