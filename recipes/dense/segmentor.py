"""mmseg's segmentor, without the scores of all classes at the size of the image.

mmseg resizes the scores of all classes to the image before it compares them: 1.2 GB for a megapixel and 150 classes,
counting the copies. Here the scores stay at the resolution of the head, and a few classes at a time are resized and
compared with the best so far. The labels are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.mask2former_head import Mask2FormerHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from zoo.messages import UserError
from zoo.recipes.dense import views

_AT_ONCE = 2**25  # scores that are resized at once, 128 MiB

# The scores (K, H, W) of some classes at the size of a window, (H, W).
Scores = Callable[[slice, tuple[int, int]], Tensor]


@dataclass
class View:
    """The scores of one view of an image, computed for some classes at a time.

    Attributes:
        parts: The windows (top, left, bottom, right) with their scores.
        size: The height and width of the input, which includes padding.
        meta: mmseg's description of the view: padding, mirroring, and the size of the image.
        align_corners: How scores are resized.
    """

    parts: list[tuple[tuple[int, int, int, int], Scores]]
    size: tuple[int, int]
    meta: dict[str, Any]
    align_corners: bool

    def scores(self, classes: slice) -> Tensor:
        """The scores (K, H, W) of `classes` at the size of the image."""
        found = self._merged(classes)
        left, right, top, bottom = self.meta.get("img_padding_size", self.meta.get("padding_size", [0] * 4))
        found = found[:, top : self.size[0] - bottom, left : self.size[1] - right]
        if self.meta.get("flip"):
            found = found.flip(2 if self.meta["flip_direction"] == "horizontal" else 1)
        return _resize(found, self.meta["ori_shape"][:2], self.align_corners)

    def _merged(self, classes: slice) -> Tensor:
        """The scores (K, H, W) at the size of the input: the average of the windows at each pixel."""
        if len(self.parts) == 1:
            return self.parts[0][1](classes, self.size)
        total, count = None, None
        for (top, left, bottom, right), scores in self.parts:
            found = scores(classes, (bottom - top, right - left))
            if total is None:
                total, count = found.new_zeros(len(found), *self.size), found.new_zeros(self.size)
            total[:, top:bottom, left:right] += found
            count[top:bottom, left:right] += 1
        return total.div_(count)


@MODELS.register_module()
class Segmentor(EncoderDecoder):
    """A segmentor that predicts whole images or windows, and averages the views of an image if there are several.

    A prediction has the labels, `pred_sem_seg`, and no scores. `test_cfg` is mmseg's: in the mode slide, it has
    `crop_size` and `stride`.
    """

    takes_views = True

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """The labels of normalised images (B, 3, H, W); without data samples, as mmseg's."""
        if data_samples is None or self.out_channels == 1:
            return super().predict(inputs, data_samples)
        for sample, view in zip(data_samples, self._views(inputs, data_samples), strict=True):
            sample.pred_sem_seg = PixelData(data=self._labels([view]))
        return data_samples

    def val_step(self, data: dict[str, Any]) -> list[SegDataSample]:
        """As `test_step`."""
        return self.test_step(data)

    def test_step(self, data: dict[str, Any]) -> list[SegDataSample]:
        """The labels of a collated batch, of which each image may have several views.

        Raises:
            UserError: There are views, and the segmentor has only one output.
        """
        batches = views.batches(data)
        if len(batches) == 1:
            return super().test_step(batches[0])
        if self.out_channels == 1:
            raise UserError("eval.tta can't be used with a segmentor of one output: set eval.tta=none.")
        found = []
        for batch in batches:
            ready = self.data_preprocessor(batch, False)
            found.append(self._views(ready["inputs"], ready["data_samples"]))
        samples = batches[0]["data_samples"]
        for sample, several in zip(samples, zip(*found, strict=True), strict=True):
            sample.pred_sem_seg = PixelData(data=self._labels(several))
        return samples

    def _views(self, inputs: Tensor, samples: Sequence[SegDataSample]) -> list[View]:
        """A view for each image of a batch (B, 3, H, W)."""
        size = tuple(inputs.shape[2:])
        slides = self.test_cfg.mode == "slide"
        window, stride = (self.test_cfg.crop_size, self.test_cfg.stride) if slides else (size, size)
        found = [View([], size, sample.metainfo, self.align_corners) for sample in samples]
        for box in views.boxes(size, window, stride):
            top, left, bottom, right = box
            features = self.extract_feat(inputs[:, :, top:bottom, left:right])
            for view, scores in zip(found, self._head(features, samples, (bottom - top, right - left)), strict=True):
                view.parts.append((box, scores))
        return found

    def _head(self, features: Any, samples: Sequence[SegDataSample], size: tuple[int, int]) -> list[Scores]:
        """The scores of each image of a batch in a window of this size."""
        head, kind = self.decode_head, type(self.decode_head)
        if isinstance(head, Mask2FormerHead):
            classes, masks = head(features, list(samples))
            return [_Queries(c.softmax(-1)[..., :-1], m) for c, m in zip(classes[-1], masks[-1], strict=True)]
        if kind.predict is BaseDecodeHead.predict and kind.predict_by_feat is BaseDecodeHead.predict_by_feat:
            logits = head(features)  # which `predict` would resize
        else:
            metas = [sample.metainfo | {"img_shape": torch.Size(size)} for sample in samples]
            logits = head.predict(features, metas, self.test_cfg)
        return [self._resized(one) for one in logits]

    def _resized(self, logits: Tensor) -> Scores:
        return lambda classes, size: _resize(logits[classes], size, self.align_corners)

    def _labels(self, several: Sequence[View]) -> Tensor:
        """The best class (1, H, W) at each pixel of an image by the average of its views, int64.

        As in the official tests, the probabilities are averaged; the scores of Mask2Former, which are products of
        probabilities, as they are.
        """
        height, width = several[0].meta["ori_shape"][:2]
        pixels = max(height * width, *(view.size[0] * view.size[1] for view in several))
        chunks = list(_chunks(self.num_classes, max(1, _AT_ONCE // pixels)))
        normalise = len(several) > 1 and not isinstance(self.decode_head, Mask2FormerHead)
        totals = [_log_sum(view.scores(chunk) for chunk in chunks) if normalise else None for view in several]
        best = labels = None
        for chunk in chunks:
            average = None
            for view, total in zip(several, totals, strict=True):
                scores = view.scores(chunk) if total is None else view.scores(chunk).sub_(total).exp_()
                average = scores if average is None else average.add_(scores)
            highest, places = average.max(0)
            places += chunk.start
            if best is None:
                best, labels = highest, places
            else:
                better = highest > best
                best, labels = torch.where(better, highest, best), torch.where(better, places, labels)
        return labels[None]


class _Queries:
    """The scores of Mask2Former: of each query, the probabilities of the classes and of its mask."""

    def __init__(self, classes: Tensor, masks: Tensor):
        self.classes, self.masks = classes, masks  # (Q, K) and (Q, H, W)

    def __call__(self, classes: slice, size: tuple[int, int]) -> Tensor:
        masks = _resize(self.masks, size, align_corners=False).sigmoid()
        return torch.einsum("qc,qhw->chw", self.classes[:, classes], masks)


def _chunks(classes: int, step: int) -> Iterator[slice]:
    for start in range(0, classes, step):
        yield slice(start, min(start + step, classes))


def _resize(scores: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """A new tensor (K, height, width) from one of (K, H, W)."""
    return F.interpolate(scores[None], size=tuple(size), mode="bilinear", align_corners=align_corners)[0]


def _log_sum(chunks: Iterator[Tensor]) -> Tensor:
    """The logarithm (H, W) of the sum of the exponentials of all classes, which arrive in chunks (K, H, W)."""
    total = None
    for chunk in chunks:
        part = chunk.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    return total
