"""The scores of detection, semantic and panoptic segmentation: MMEngine's names, and those in the files of a run."""

from __future__ import annotations

import math
from typing import Any

from zoo.messages import UserError
from zoo.recipes.dense.confusion import class_scores
from zoo.recipes.dense.panoptic_quality import class_quality

# MMEngine's names of the scores -> ours, in percent. The first score that a run has decides which epoch is the best.
SCORES = {
    "panoptic/PQ": "PQ",
    "panoptic/SQ": "SQ",
    "panoptic/RQ": "RQ",
    "panoptic/PQ_things": "PQ_things",
    "panoptic/SQ_things": "SQ_things",
    "panoptic/RQ_things": "RQ_things",
    "panoptic/PQ_stuff": "PQ_stuff",
    "panoptic/SQ_stuff": "SQ_stuff",
    "panoptic/RQ_stuff": "RQ_stuff",
    "coco/segm_mAP": "mask_AP",
    "coco/segm_mAP_50": "mask_AP50",
    "coco/bbox_mAP": "bbox_AP",
    "coco/bbox_mAP_50": "bbox_AP50",
    # Of LVIS: rare, common and frequent categories.
    **{f"coco/{kind}_mAP_{f}": f"{ours}_AP{f}" for kind, ours in (("segm", "mask"), ("bbox", "bbox")) for f in "rcf"},
    "panoptic/mIoU": "mIoU",
    "mIoU": "mIoU",
    "mAcc": "mAcc",
    "aAcc": "aAcc",
}


def scores(metrics: dict[str, Any] | None) -> dict[str, float]:
    """MMEngine's metrics under our names, in percent, without COCO's -1, which means that there is nothing to find.

    Args:
        metrics: The result of an evaluation; None for none.

    Raises:
        UserError: The evaluation has none of these scores.
    """
    if metrics is None:
        return {}
    if not metrics.keys() & SCORES.keys():
        raise UserError(
            f"the evaluation gives {', '.join(map(repr, metrics)) or 'nothing'}, which is none of the scores that are "
            "reported: correct mm.val_evaluator."
        )
    found = {}
    for name, ours in SCORES.items():
        if name in metrics and metrics[name] >= 0:
            # COCO's metrics are fractions; those of segmentation are percentages.
            found[ours] = float(metrics[name]) * (100 if name.startswith("coco/") else 1)
    return found


def score_title(name: str) -> str:
    """The title of a score in the log."""
    for word, shown in (("bbox_", "box "), ("mask_", "mask "), ("_things", " of things"), ("_stuff", " of stuff")):
        name = name.replace(word, shown)
    return name


def panoptic_table(metrics: dict[str, Any]) -> dict[str, list[float | None]]:
    """The scores of each class of a panoptic evaluation in percent; None if there is nothing to find."""
    table = class_quality(metrics["panoptic/counts"])
    table["IoU"] = class_scores(metrics["panoptic/confusion"])["IoU"]
    found = metrics.get("coco/per_class", [math.nan] * len(table["PQ"]))
    return table | {"mask_AP": [None if math.isnan(value) else 100 * value for value in found]}
