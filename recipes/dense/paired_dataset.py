"""A data set of images and label PNGs with the same names, for mmseg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.registry import DATASETS
from PIL import Image

from zoo.recipes.dense.segmentation_data import pair_files, read_pairs
from zoo.recipes.dense.transforms import MixesImages, SkipsCorrupt
from zoo.recipes.files import DECODING_ERRORS


@DATASETS.register_module()
class PairedDataset(SkipsCorrupt, BaseSegDataset):
    """Images may have different extensions, while mmseg's own data sets take only one."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._present: dict[str, list[int]] = {}  # labels by file: ClassBalancedDataset asks twice
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the pairs."""
        images, labels = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        common = {
            "reduce_zero_label": self.reduce_zero_label,
            "ignore_index": self.ignore_index,
            "num_classes": len(self.metainfo["classes"]),
        }
        pairs = read_pairs(labels) if labels.is_file() else pair_files(images, labels)
        return [dict(img_path=str(image), seg_map_path=str(label), seg_fields=[], **common) for image, label in pairs]

    def exclude(self, sample: Any, idx: int) -> None:
        """Set all labels to `ignore_index`."""
        sample.gt_sem_seg.data.fill_(self.ignore_index)

    def get_cat_ids(self, idx: int) -> list[int]:
        """The labels in the PNG of an image, by which ClassBalancedDataset repeats images; none if it is corrupt."""
        path = self.get_data_info(idx)["seg_map_path"]
        ignored = {self.ignore_index} | ({0} if self.reduce_zero_label else set())
        if path not in self._present:
            try:
                with Image.open(path) as image:
                    self._present[path] = sorted({*np.unique(np.array(image)).tolist()} - ignored)
            except DECODING_ERRORS:
                self._present[path] = []
        return self._present[path]


@DATASETS.register_module()
class MixedDataset(MixesImages, MultiImageMixDataset):
    """mmseg's wrapper that mixes images."""
