"""COCO's panoptic PNGs: the id of each pixel's segment as a colour, red + 256 green + 65536 blue."""

from __future__ import annotations

import numpy as np

VOID = 0  # the id of pixels without a segment
MOST = 2**24  # ids that three bytes can hold


def to_rgb(ids: np.ndarray) -> np.ndarray:
    """The colours, uint8 (H, W, 3), of ids, integers (H, W)."""
    return np.stack([ids >> bits & 255 for bits in (0, 8, 16)], axis=-1).astype(np.uint8)


def from_rgb(pixels: np.ndarray) -> np.ndarray:
    """The ids, int32 (H, W), of colours, uint8 (H, W, 3 or more)."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue
