"""A data set of images and label PNGs with the same names, for mmseg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from zoo.recipes.dense.segmentation_data import pair_files
from zoo.recipes.dense.transforms import SkipsCorrupt


@DATASETS.register_module()
class PairedDataset(SkipsCorrupt, BaseSegDataset):
    """Images may have different extensions, while mmseg's own data sets take only one."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the pairs."""
        folders = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        common = {
            "reduce_zero_label": self.reduce_zero_label,
            "ignore_index": self.ignore_index,
            "num_classes": len(self.metainfo["classes"]),
        }
        return [
            dict(img_path=str(image), seg_map_path=str(label), seg_fields=[], **common)
            for image, label in pair_files(*folders)
        ]

    def exclude(self, sample: Any, idx: int) -> None:
        """Set all labels to `ignore_index`."""
        sample.gt_sem_seg.data.fill_(self.ignore_index)
