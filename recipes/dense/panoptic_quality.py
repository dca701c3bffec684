"""Panoptic quality (Kirillov et al. 2019, arXiv 1801.00868, section 4.1), on arrays of segment ids.

A predicted and a true segment of one class match if their intersection over union (IoU) is above 0.5; at most one pair
per segment can. Of each class,

    PQ = SQ x RQ,   SQ = mean IoU of the matches,   RQ = matches / (matches + (unmatched found + unmatched true) / 2)

and the figures of a data set are means over the classes that occur in it or are found. As in COCO's definition:

- Pixels without a true segment (void) do not count in unions. A predicted segment is not wrong if it has no match, but
  most of it is void, or in a crowd of its class.
- Crowds are not to be found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.recipes.segment_ids import VOID

OFFSET = 1000  # mmdet's INSTANCEOFFSET


@dataclass(frozen=True)
class Segment:
    """What is known about a segment, besides its pixels.

    Attributes:
        label: The label of its class.
        crowd: Whether it is a crowd, which has several objects.
    """

    label: int
    crowd: bool = False


def found_segments(ids: np.ndarray, classes: int) -> tuple[np.ndarray, dict[int, Segment]]:
    """The ids and segments that mmdet predicts.

    Args:
        ids: mmdet's numbers (H, W): the label, plus 1000 times the number of the thing.
        classes: The number of classes, which is also the label of pixels without a segment.

    Returns:
        Ids from 1, int32 (H, W), `VOID` where there is no segment; and the segments by id.
    """
    numbers, places = np.unique(ids, return_inverse=True)
    labels = numbers % OFFSET
    new = np.where(labels < classes, np.cumsum(labels < classes), VOID)
    segments = {int(number): Segment(int(label)) for number, label in zip(new, labels, strict=True) if number != VOID}
    return new[places].reshape(ids.shape).astype(np.int32), segments


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask (H, W), bool, that is not empty; right and bottom are excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def count_matches(
    true: np.ndarray,
    found: np.ndarray,
    true_segments: Mapping[int, Segment],
    found_segments: Mapping[int, Segment],
    classes: int,
) -> np.ndarray:
    """The counts of an image: (4, classes), float64: sum of the IoUs of matches, matches, wrong and missed segments.

    Args:
        true: The ids of the true segments, integers (H, W), `VOID` where there is none.
        found: The ids of the predicted segments, likewise.
        true_segments: The true segments by id; other ids in `true` are void.
        found_segments: The predicted segments by id; other ids in `found` are void.
        classes: The number of classes.
    """
    areas: dict[tuple[int, int], int] = {}
    width = int(found.max()) + 1
    pairs, counts = np.unique(true.astype(np.int64) * width + found, return_counts=True)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        a, b = divmod(pair, width)
        key = (a if a in true_segments else VOID, b if b in found_segments else VOID)
        areas[key] = areas.get(key, 0) + count
    true_areas, found_areas = dict.fromkeys(true_segments, 0), dict.fromkeys(found_segments, 0)
    for (a, b), count in areas.items():
        if a in true_areas:
            true_areas[a] += count
        if b in found_areas:
            found_areas[b] += count
    result = np.zeros((4, classes))
    matched_true, matched_found = set(), set()
    for (a, b), shared in areas.items():
        if a not in true_segments or b not in found_segments:
            continue
        one, other = true_segments[a], found_segments[b]
        if one.crowd or one.label != other.label:
            continue
        union = true_areas[a] + found_areas[b] - shared - areas.get((VOID, b), 0)
        if shared / union > 0.5:
            result[:2, one.label] += shared / union, 1
            matched_true.add(a)
            matched_found.add(b)
    for b, segment in found_segments.items():
        if b in matched_found or not found_areas[b]:
            continue
        crowds = [a for a, other in true_segments.items() if other.crowd and other.label == segment.label]
        excused = areas.get((VOID, b), 0) + sum(areas.get((a, b), 0) for a in crowds)
        if excused / found_areas[b] <= 0.5:
            result[2, segment.label] += 1
    for a, segment in true_segments.items():
        if a not in matched_true and not segment.crowd and true_areas[a]:
            result[3, segment.label] += 1
    return result


def class_quality(counts: np.ndarray) -> dict[str, list[float | None]]:
    """PQ, SQ and RQ of each class in percent from summed counts, (4, classes); None if there is nothing to find."""
    scores: dict[str, list[float | None]] = {"PQ": [], "SQ": [], "RQ": []}
    for iou, matches, wrong, missed in counts.T.tolist():
        relevant = matches + (wrong + missed) / 2
        quality, recognition = (iou / matches if matches else 0.0), (matches / relevant if relevant else 0.0)
        values = (quality * recognition, quality, recognition)
        for name, value in zip(scores, values, strict=True):
            scores[name].append(100 * value if relevant else None)
    return scores


def mean_quality(counts: np.ndarray, things: int) -> dict[str, float]:
    """PQ, SQ and RQ in percent: of all classes, of the first `things` (`PQ_things`, ...) and of the others (stuff).

    A mean over no class is left out.
    """
    scores = class_quality(counts)
    parts = {"": slice(None), "_things": slice(things), "_stuff": slice(things, None)}
    means = {}
    for part, labels in parts.items():
        for name, values in scores.items():
            known = _known(values[labels])
            if known:
                means[name + part] = sum(known) / len(known)
    return means


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
