"""The four tasks of the commands: the packages that hold their code, and their scores."""

from __future__ import annotations

import importlib
from types import ModuleType

from zoo.messages import UserError

# Each package has modules `train`, `evaluate`, `predict` and `preview` with functions of these names.
TASKS = {
    "classify": "zoo.recipes.classify",
    "detect": "zoo.recipes.dense",
    "segment": "zoo.recipes.dense",
    "panoptic": "zoo.recipes.dense",
}
# The titles of the scores, which are in percent. The first score that a run has decides which epoch is the best.
SCORES = {
    "classify": {
        **{"top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced accuracy"},
        **{"mAP": "mAP", "F1": "F1", "F1_micro": "micro F1"},  # of several labels per image
    },
    "detect": {
        **{"mask_AP": "mask AP", "mask_AP50": "mask AP50", "bbox_AP": "box AP", "bbox_AP50": "box AP50"},
        # Of LVIS: rare, common and frequent categories.
        **{f"{kind}_AP{f}": f"{title} AP{f}" for kind, title in (("mask", "mask"), ("bbox", "box")) for f in "rcf"},
    },
    "segment": {"mIoU": "mIoU", "mAcc": "mean accuracy", "aAcc": "pixel accuracy"},
    "panoptic": {
        **{
            f"{name}{part}": f"{name}{part.replace('_', ' of ')}"
            for part in ("", "_things", "_stuff")
            for name in ("PQ", "SQ", "RQ")
        },
        **{
            "mask_AP": "mask AP",
            "mask_AP50": "mask AP50",
            "bbox_AP": "box AP",
            "bbox_AP50": "box AP50",
            "mIoU": "mIoU",
        },
    },
}


def load(task: str, module: str) -> ModuleType:
    """Prepare the package of `task` and import one of its modules: `train`, `evaluate`, `predict`, `preview`, ...

    Raises:
        UserError: There is no such task, or its packages are not installed.
    """
    if task not in TASKS:
        raise UserError(f"task={task} is not allowed: it has to be {', '.join(TASKS)}.")
    importlib.import_module(TASKS[task]).prepare(task)
    return importlib.import_module(f"{TASKS[task]}.{module}")
