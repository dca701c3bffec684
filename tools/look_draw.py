"""The figures of zoo-look but the patterns: keys, rollout and class activation over a picture; receptive fields."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from zoo.tools.look_attention import Keys, extent

HEAT = "plasma"
PANEL = 2.9  # inches; 120 pixels each


def draw_keys(path: Path, keys: Sequence[Keys], pixels: np.ndarray, pixel: tuple[int, int], title: str) -> None:
    """A column per stage, a row per kind of attention: the picture, and the keys of the pixel in their strength."""
    stages = sorted({found.stage for found in keys})
    columns = [[found for found in keys if found.stage == stage] for stage in stages]
    grid = _grid(max(map(len, columns)), len(columns), pixels.shape, title, share=0.82)  # the rest: colour bars
    for axes in grid.flat:
        axes.set_axis_off()
    for column, shown in enumerate(columns):
        for axes, found in zip(grid[:, column], shown, strict=False):
            _picture(axes, _pale(pixels))
            positive = np.ma.masked_less_equal(found.weights.numpy(), 0)
            height, width = (side * found.pixels for side in positive.shape)
            image = axes.imshow(
                positive, cmap=HEAT, vmin=0, alpha=0.8, extent=(0, width, height, 0), interpolation="nearest"
            )
            _bounds(axes, pixels)
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, format=lambda value, _: f"{100 * value:.3g} %")
            bar.ax.tick_params(labelsize=6)
            _mark(axes, pixel)
            padding = f", {100 * found.padding:.0f} % on padding" if found.padding > 0.005 else ""
            number = int(positive.count())
            counted = f"{number} key{'s' * (number > 1)}{padding}"
            axes.set_title(f"stage {found.stage}, block {found.block}\n{found.kind}\n{counted}", fontsize=7.5)
    grid.flat[0].figure.savefig(path, format="png")


def draw_heat(path: Path, heat: np.ndarray, pixels: np.ndarray, titles: Sequence[str], title: str, pixel=None) -> None:
    """The picture, and beside it the same under a map (H, W) of any size, from 0 to its largest value."""
    grid = _grid(1, 2, pixels.shape, title)
    for axes, caption in zip(grid.flat, titles, strict=True):
        axes.set_axis_off()
        _picture(axes, pixels)
        axes.set_title(caption, fontsize=8)
        if pixel is not None:
            _mark(axes, pixel)
    axes = grid.flat[1]
    height, width = pixels.shape[:2]
    axes.imshow(heat, cmap=HEAT, vmin=0, alpha=0.6, extent=(0, width, height, 0), interpolation="nearest")
    _bounds(axes, pixels)
    axes.figure.savefig(path, format="png")


def draw_field(path: Path, fields: Sequence[Tensor], title: str) -> None:
    """A panel per stage, brighter where a pixel has more influence on the central feature."""
    grid = _grid(1, len(fields), fields[0].shape, title)
    for stage, (axes, field) in enumerate(zip(grid.flat, fields, strict=True), 1):
        axes.imshow(field, cmap=HEAT, norm=PowerNorm(0.5, vmin=0, vmax=field.max().item()), interpolation="nearest")
        axes.set_title(
            f"stage {stage}: half of it within {extent(field, 0.5)} pixels,\n95 % within {extent(field, 0.95)}",
            fontsize=8,
        )
        axes.tick_params(labelsize=6)
    grid.flat[0].figure.savefig(path, format="png")


def _grid(rows: int, columns: int, shape: Sequence[int], title: str, share: float = 1) -> np.ndarray:
    """Axes (rows, columns) for pictures of this shape, height and width, under a title; `share` is their width's."""
    ratio = min(max(shape[0] / shape[1], 0.4), 2.5)
    width = max(columns * PANEL, 4)
    lines = textwrap.wrap(title, int(width * 13))
    figure = Figure(
        figsize=(width, rows * (PANEL * ratio * share + 0.5) + 0.18 * len(lines) + 0.15), dpi=120, layout="constrained"
    )
    figure.suptitle("\n".join(lines), fontsize=9)
    return figure.subplots(rows, columns, squeeze=False)


def _picture(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))


def _bounds(axes: Axes, pixels: np.ndarray) -> None:
    """Cut off what tokens have beyond the picture."""
    axes.set_xlim(0, pixels.shape[1])
    axes.set_ylim(pixels.shape[0], 0)


def _pale(pixels: np.ndarray) -> np.ndarray:
    """Grey and lighter, so that a few colours on top of it stand out."""
    grey = pixels.mean(2, keepdims=True).repeat(3, 2)
    return (255 - (255 - grey) * 0.6).astype(np.uint8)


def _mark(axes: Axes, pixel: tuple[int, int]) -> None:
    place = ([pixel[1] + 0.5], [pixel[0] + 0.5])
    axes.plot(*place, marker="o", markersize=5, markerfacecolor="#00d26a", markeredgecolor="black", markeredgewidth=0.8)
