"""The picture of the attention patterns, computed by the attention modules of the models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zoo import FAMILIES
from zoo.attention_maps import Pattern
from zoo.families import load

SIDE = 28  # tokens along a side: the map of the second stage for 224 pixels
DIM = 32
QUERY = (11, 16)
SEED = 7  # decides which regions the random tokens are routed to

# Visible on white and on black.
BLUE, ORANGE, PINK, GREY = (47, 129, 247), (224, 125, 16), (232, 51, 126), (128, 128, 128)
CELL, GAP, SPACE = 14, 2, 40  # pixels: the side of a token, the gap around it, the space between panels
TITLE, LINE = 50, 32  # font sizes in pixels; the picture is shown at half its size


def panels(families: Iterable[str] = FAMILIES) -> list[Pattern]:
    """The patterns of the families, for one token of a map of 28 x 28 random tokens."""
    found: list[Pattern] = []
    for family in families:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            tokens = torch.randn(1, SIDE, SIDE, DIM)
            found += load(family).patterns(tokens, QUERY)
    return found


def paint(panel: Pattern) -> np.ndarray:
    """A panel as RGBA (pixels, pixels, 4), uint8. A token has CELL pixels, and the gaps are transparent."""
    image = np.zeros((SIDE * CELL, SIDE * CELL, 4), dtype=np.uint8)

    def fill(
        top: int, left: int, side: int, colour: tuple[int, int, int], alpha: float, margin: int = GAP // 2
    ) -> None:
        rows, columns = (slice(at * CELL + margin, (at + side) * CELL - margin) for at in (top, left))
        image[rows, columns] = (*colour, round(255 * alpha))

    for y in range(SIDE):
        for x in range(SIDE):
            fill(y, x, 1, GREY, 0.22)
    # The second map first, so that the first covers it.
    for map_, colour in reversed(list(zip(panel.maps, (BLUE, ORANGE), strict=False))):
        side = SIDE // len(map_)
        for y, x in map_.nonzero().tolist():
            # The faintest key has to differ from a token that is not a key.
            fill(y * side, x * side, side, colour, 0.25 + 0.75 * map_[y, x].item())
    for y, x in panel.queries:
        fill(y, x, 1, PINK, 1, margin=-GAP)
    return image


def draw(path: Path, family: str | None = None) -> tuple[int, int]:
    """Draw the panels of all families, or of one, to a PNG with a transparent background. Returns width and height."""
    from matplotlib.figure import Figure

    shown = panels(FAMILIES if family is None else (family,))
    columns, map_size = min(4, len(shown)), SIDE * CELL
    text = TITLE + 2 * LINE + 42
    rows = math.ceil(len(shown) / columns)
    width = columns * map_size + (columns - 1) * SPACE + 8
    height = rows * (map_size + text) + (rows - 1) * SPACE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    def write(x: int, top: int, content: str, size: int, colour: tuple[int, ...], weight: str = "normal") -> None:
        colour = tuple(value / 255 for value in colour)
        place = {"ha": "left", "va": "top", "fontsize": size * 0.72, "color": colour, "weight": weight}
        figure.text(x / width, 1 - top / height, content, **place)

    for number, panel in enumerate(shown):
        row, column = divmod(number, columns)
        x, top = 4 + column * (map_size + SPACE), row * (map_size + text + SPACE)
        write(x, top + 6, panel.title, TITLE, GREY, "bold")
        for i, line in enumerate(panel.lines):
            colour = BLUE if i == 0 or len(panel.maps) == 1 else ORANGE
            write(x, top + TITLE + 16 + i * (LINE + 8), line, LINE, colour)
        figure.figimage(paint(panel), xo=x, yo=height - top - text - map_size, origin="upper")
    figure.savefig(path, format="png", transparent=True)
    if family:  # one or two panels are shown at full size, all of them at half size
        width, height = width // 2, height // 2
        with Image.open(path) as image:
            image.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)
    return width, height
