"""The scores of each task, and how they are called in reports and tables."""

# Scores in percent -> their names for people. The first one that a run has decides which of its epochs is the best.
SCORES = {
    "classify": {"top1": "top-1", "top5": "top-5"},
    "detect": {"mask_AP": "mask AP", "mask_AP50": "mask AP50", "bbox_AP": "box AP", "bbox_AP50": "box AP50"},
    "segment": {"mIoU": "mIoU", "mAcc": "mean accuracy", "aAcc": "pixel accuracy"},
}
