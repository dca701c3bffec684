"""Transforms that load images and labels for mmdet and mmseg, with the reader that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from zoo.messages import UserError
from zoo.recipes.corrupt import CorruptFile
from zoo.recipes.dense import views
from zoo.recipes.dense.data_checks import check_size
from zoo.recipes.dense.segmentation_data import read_labels
from zoo.recipes.errors import of_the_system
from zoo.recipes.files import DECODING_ERRORS, reason
from zoo.recipes.images import MAX_PIXELS, open_image

_MOST = 1000  # items that are tried in place of a corrupt image


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """The image of `img_path` as `img`, uint8 (H, W, 3) in the order blue, green, red, upright.

    Args:
        max_pixels: Images of more pixels count as corrupt.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        """Read the image.

        Raises:
            CorruptFile: It can't be read.
            UserError: Its size differs from the one in its annotations.
        """
        path = results["img_path"]
        try:
            image = open_image(path, max_pixels=self.max_pixels)
        except DECODING_ERRORS as error:
            if of_the_system(error):  # the image is not the cause
                raise
            raise CorruptFile(path, reason(error)) from error
        if "instances" in results:
            check_size(path, image.size, (results["width"], results["height"]), "the annotation file")
        pixels = mmcv.rgb2bgr(np.asarray(image))
        return results | {"img": pixels, "img_shape": pixels.shape[:2], "ori_shape": pixels.shape[:2]}


@TRANSFORMS.register_module()
class LoadLabels(BaseTransform):
    """The labels of `seg_map_path` as `gt_seg_map` (H, W), for any number of classes: mmseg itself reads 8 bits."""

    def transform(self, results: dict) -> dict:
        """Read the labels.

        Raises:
            CorruptFile: They can't be read.
            UserError: The file has no labels, labels of another size, or a label that is not a class.
        """
        height, width = results["ori_shape"]
        path, ignored, reduce = results["seg_map_path"], results["ignore_index"], results["reduce_zero_label"]
        labels = read_labels(path, results["img_path"], (width, height))
        if reduce:
            if ignored > 255:
                labels = labels.astype(np.int32)
            void = (labels == 0) | (labels == ignored)
            labels = labels - 1
            labels[void] = ignored
        most = int(labels.max(where=labels != ignored, initial=0))
        if most >= results["num_classes"]:
            raise UserError(
                f"{path} has the label {most + reduce}, but there are {results['num_classes']} classes: correct it; "
                "data.check_files=-1 looks at all files before training."
            )
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results


class SkipsCorrupt:
    """A mixin for MMEngine's data sets that replaces an item that can't be read by the next good one.

    The sample of the replacement holds the names of the corrupt items as `corrupt`. In evaluation, it does not count.

    Attributes:
        corrupt: The names for items that are not packed into samples, because `MixesImages` does this.
    """

    corrupt: Sequence[str] = ()

    def prepare_data(self, idx: int) -> Any:
        """Load and transform an item.

        Raises:
            UserError: Too many items in a row can't be read.
        """
        corrupt: list[str] = []
        for attempt in range(min(len(self), _MOST)):
            try:
                item = super().prepare_data((idx + attempt) % len(self) if attempt else idx)
            except CorruptFile as error:
                corrupt.append(str(error))
                continue
            if corrupt and item is not None and "data_samples" not in item:
                self.corrupt = [*self.corrupt, *corrupt]
            elif corrupt and item is not None:
                samples = item["data_samples"]
                for sample in samples if isinstance(samples, list) else [samples]:  # one for each view
                    sample.set_metainfo({"corrupt": corrupt})
                    if self.test_mode:
                        self.exclude(sample, idx)
            return item
        raise UserError(f"{len(corrupt)} corrupt images in a row; the first is {corrupt[0]}: check the data.")

    def exclude(self, sample: Any, idx: int) -> None:
        """Exclude `sample`, which replaces the item `idx`, from the scores."""
        raise NotImplementedError


class MixesImages:
    """A mixin for MultiImageMixDataset, so that a sample names the corrupt images among those it is mixed from."""

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Load, mix and transform an item."""
        item = super().__getitem__(idx)
        dataset = self.dataset
        while hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        if getattr(dataset, "corrupt", ()):
            item["data_samples"].set_metainfo({"corrupt": list(dataset.corrupt)})
            dataset.corrupt = ()
        return item


def corrupt_names(data_batch: dict[str, Any]) -> list[str]:
    """The names of the images of a batch that could not be read."""
    samples = views.batches(data_batch)[0]["data_samples"]
    return [name for sample in samples for name in sample.get("corrupt", ())]
