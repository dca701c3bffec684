"""The figures of zoo-look except patterns: keys, rollout and class activation on a picture; receptive fields."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from zoo.tools.look_attention import Keys, extent
from zoo.tools.look_picture import Picture

HEAT = "plasma"
PANEL, WIDE, BAR = 2.4, 4.0, 0.55  # inches of 120 pixels: a panel of many, a panel of two, a colour bar
FIELD_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


def draw_keys(path: Path, keys: Sequence[Keys], picture: Picture, pixel: tuple[int, int], title: str) -> None:
    """Draw the keys of a pixel over the picture: a column per stage, a row per kind of attention."""
    stages = sorted({found.stage for found in keys})
    columns = [[found for found in keys if found.stage == stage] for stage in stages]
    grid = _grid(max(map(len, columns)), len(columns), picture.original, title, bars=len(columns), lines=3)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, shown in enumerate(columns):
        for axes, found in zip(grid[:, column], shown, strict=False):
            _show(axes, _pale(picture.pixels), picture.size)
            positive = np.ma.masked_less_equal(found.weights.numpy(), 0)
            height, width = (side * found.pixels for side in positive.shape)
            image = axes.imshow(
                positive, cmap=HEAT, vmin=0, alpha=0.8, extent=(0, width, height, 0), interpolation="nearest"
            )
            _bounds(axes, picture)
            bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, format=_percent)
            bar.ax.tick_params(labelsize=6)
            _mark(axes, pixel)
            padding = f", {100 * found.padding:.0f} % on padding" if found.padding > 0.005 else ""
            number = int(positive.count())
            counted = f"{number} key{'s' * (number > 1)}{padding}"
            axes.set_title(f"stage {found.stage}, block {found.block}\n{found.kind}\n{counted}", fontsize=7.5)
    _save(path, grid)


def draw_heat(
    path: Path,
    heat: np.ndarray,
    picture: Picture,
    titles: Sequence[str],
    title: str,
    scale: str,
    pixel: tuple[int, int] | None = None,
    cell: int | None = None,
) -> None:
    """Draw the picture, and beside it the picture under a map.

    Args:
        path: The file to write.
        heat: The map (H, W). Its colours range from 0 to the largest value.
        picture: The picture.
        titles: The titles of the two panels.
        title: The title of the figure.
        scale: What the colours mean.
        pixel: A pixel to mark, in pixels of the model's input.
        cell: The side of a cell of the map, in pixels of the model's input. The last cells may be cut. If None, the map
            is smooth and as large as the picture.
    """
    grid = _grid(1, 2, picture.original, title, WIDE)
    for axes, caption in zip(grid.flat, titles, strict=True):
        axes.set_axis_off()
        _show(axes, picture.pixels, picture.size)
        axes.set_title(caption, fontsize=9)
        if pixel is not None:
            _mark(axes, pixel)
    size = tuple(side * cell for side in heat.shape) if cell else picture.size
    image = _show(axes, heat, size, cmap=HEAT, vmin=0, alpha=0.6, interpolation="nearest" if cell else "bilinear")
    for axes in grid.flat:
        _bounds(axes, picture)
    _shared_bar(grid, image, scale)
    _save(path, grid)


def draw_field(path: Path, fields: Sequence[Tensor], title: str) -> None:
    """Draw a panel per stage. A pixel is brighter if it has more influence on the central feature."""
    grid = _grid(1, len(fields), fields[0].shape, f"{title}; the axes count pixels, brightness is the square root")
    for stage, (axes, field) in enumerate(zip(grid.flat, fields, strict=True), 1):
        shares = field / field.max()
        image = axes.imshow(shares, cmap=HEAT, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
        axes.set_title(
            f"stage {stage}: half of it within {extent(field, 0.5)} pixels,\n95 % within {extent(field, 0.95)}",
            fontsize=8,
        )
        axes.tick_params(labelsize=6)
    _shared_bar(grid, image, "influence, of the stage's largest", ticks=FIELD_TICKS)
    _save(path, grid)


def _grid(
    rows: int, columns: int, shape: Sequence[int], title: str, panel: float = PANEL, bars: int = 1, lines: int = 2
) -> np.ndarray:
    """Axes (rows, columns) in a figure with a title.

    Args:
        rows: The number of rows.
        columns: The number of columns.
        shape: Height and width of the pictures, for their aspect ratio.
        title: The title of the figure.
        panel: The width of a panel in inches.
        bars: The number of colour bars side by side.
        lines: The lines of text above each picture.
    """
    ratio = min(max(shape[0] / shape[1], 0.4), 2.5)
    width = columns * panel + bars * BAR
    titles = textwrap.wrap(title, int(width * 13))
    height = rows * (panel * ratio + 0.16 * lines) + 0.18 * len(titles) + 0.1
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle("\n".join(titles), fontsize=9)
    return figure.subplots(rows, columns, squeeze=False)


def _shared_bar(grid: np.ndarray, image: AxesImage, label: str, ticks: Sequence[float] | None = None) -> None:
    """Add one colour bar for a row of pictures, so that these keep the same size."""
    bar = image.figure.colorbar(image, ax=grid[0].tolist(), shrink=0.9, pad=0.01, format=_percent, ticks=ticks)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _save(path: Path, grid: np.ndarray) -> None:
    """Write the figure without empty margins."""
    grid.flat[0].figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.08)


def _show(axes: Axes, pixels: np.ndarray, size: tuple[int, int], **options: Any) -> AxesImage:
    """Show pixels in the coordinates of the model's input, whose height and width are `size`."""
    return axes.imshow(pixels, extent=(0, size[1], size[0], 0), **options)


def _bounds(axes: Axes, picture: Picture) -> None:
    """Limit the axes to the picture, with the aspect ratio of the file."""
    height, width = picture.size
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect(picture.original[0] / picture.original[1] * width / height)


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.3g} %"


def _pale(pixels: np.ndarray) -> np.ndarray:
    """The picture in light grey, on which colours stand out."""
    grey = pixels.mean(2, keepdims=True).repeat(3, 2)
    return (255 - (255 - grey) * 0.6).astype(np.uint8)


def _mark(axes: Axes, pixel: tuple[int, int]) -> None:
    place = ([pixel[1] + 0.5], [pixel[0] + 0.5])
    axes.plot(*place, marker="o", markersize=5, markerfacecolor="#00d26a", markeredgecolor="black", markeredgewidth=0.8)
