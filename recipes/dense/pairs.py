"""mmseg's reader for images and label PNGs that share their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from zoo.recipes.dense.data import pair_files


@DATASETS.register_module()
class PairedDataset(BaseSegDataset):
    """Images of any ending, mixed ones too: mmseg by itself takes one."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the pairs."""
        folders = (Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path"))
        common = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            dict(img_path=str(image), seg_map_path=str(label), seg_fields=[], **common)
            for image, label in pair_files(*folders)
        ]
