"""The picture of the attention patterns: computed from the modules that the models are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import biformer, cswin, gc_vit, litv2, maxvit, nat, van
from zoo.tools.look_attention import attention

SIDE = 28  # tokens: the second stage's map of 224 pixels
DIM = 32
QUERY = (11, 16)
CORNER = (26, 2)

# Colours and greys that stand out from white and from black.
BLUE, ORANGE, PINK, GREY = (47, 129, 247), (224, 125, 16), (232, 51, 126), (128, 128, 128)
CELL, GAP, SPACE = 14, 2, 40  # pixels: of a token, around it, between panels
TITLE, LINE = 50, 32  # sizes of letters in pixels; seen at half of that


@dataclass
class Panel:
    """One operator: its family and title; lines, the first says the first map in its colour; maps (h, w) of 0 to 1."""

    family: str
    title: str
    lines: tuple[str, str]
    one_map: bool
    maps: list[Tensor]
    queries: list[tuple[int, int]]


def panels() -> list[Panel]:
    """The operators on a map of 28 x 28 tokens, each with the keys of a query, the same one in all of them.

    Keys have 1 and all others 0. Of a large kernel each token has its number of paths through the two convolutions, as
    a part of the largest; of GC ViT the second map has the tokens that the query is made from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)  # it decides to which regions BiFormer's random tokens are routed
        tokens = torch.randn(1, SIDE, SIDE, DIM)
        neighbors = nat.NeighborhoodAttention(DIM, 2, 7, 1)
        dilated = nat.NeighborhoodAttention(DIM, 2, 7, 3)
        stripes = cswin.CrossShapedAttention(DIM, 2, 2)
        block, grid = (maxvit.WindowAttention(DIM, 2, (7, 7), layout) for layout in ("block", "grid"))
        routed = biformer.RoutedAttention(DIM, 2, 7, 4)
        window = gc_vit.WindowAttention(DIM, 2, 7, use_global_query=True)
        hilo = litv2.HiLoAttention(DIM, 16, 2, 0.5)
        kernel = van.LargeKernelAttention(DIM)
        query = gc_vit.GlobalQuery(DIM, 7, 2, pool=True)
        for module in (neighbors, dilated, block, grid, window):
            module.reset_parameters()
    for conv in (kernel.dw_conv, kernel.dw_dilated_conv):
        nn.init.ones_(conv.weight)

    def keys(module: nn.Module, at: tuple[int, int] = QUERY, *context: Tensor) -> list[Tensor]:
        return [(weights > 0).float() for weights in attention(module, (tokens, *context), [at])[0]]

    image = tokens.permute(0, 3, 1, 2).requires_grad_()
    queries = query(image)
    place = QUERY[0] % 7 * 7 + QUERY[1] % 7
    (sources,) = torch.autograd.grad(queries[0, place].sum(), image)
    sources = (sources[0].abs().sum(0) > 0).float()
    paths = attention(kernel, (image,), [QUERY])[0, 0]
    return [
        Panel(
            "nat",
            "NAT",
            ("7 × 7 around the token,", "moved inward at a rim"),
            False,
            [*keys(neighbors), *keys(neighbors, CORNER)],
            [QUERY, CORNER],
        ),
        Panel("nat", "DiNAT", ("7 × 7, every third token:", "dilated by 3"), True, keys(dilated), [QUERY]),
        Panel("cswin", "CSWin", ("half the heads: columns", "the other half: rows"), False, keys(stripes), [QUERY]),
        Panel(
            "maxvit",
            "MaxViT",
            ("a block of 7 × 7, then", "a grid of 7 × 7"),
            False,
            [*keys(block), *keys(grid)],
            [QUERY],
        ),
        Panel(
            "biformer",
            "BiFormer",
            ("4 regions out of 7 × 7,", "those that answer best"),
            True,
            keys(routed),
            [QUERY],
        ),
        Panel(
            "gc_vit",
            "GC ViT",
            ("keys: a window of 7 × 7", "queries: the whole map"),
            False,
            [*keys(window, QUERY, queries), 0.45 * sources],
            [QUERY],
        ),
        Panel(
            "litv2",
            "LITv2",
            ("Hi-Fi: a window of 2 × 2", "Lo-Fi: means of 2 × 2"),
            False,
            [*keys(hilo.hifi), *(0.45 * weights for weights in keys_of_means(hilo.lofi, tokens))],
            [QUERY],
        ),
        Panel(
            "van",
            "VAN",
            ("23 × 23 by two kernels:", "5 × 5, dilated 7 × 7"),
            True,
            [paths / paths.max()],
            [QUERY],
        ),
    ]


def keys_of_means(lofi: litv2.LoFiAttention, tokens: Tensor) -> list[Tensor]:
    """The means that Lo-Fi attends to, (h, w)."""
    return [(weights > 0).float() for weights in attention(lofi, (tokens, tokens), [QUERY])[0]]


def paint(panel: Panel) -> np.ndarray:
    """A panel's map as RGBA, (pixels, pixels, 4) uint8, CELL pixels a token, transparent between them."""
    image = np.zeros((SIDE * CELL, SIDE * CELL, 4), dtype=np.uint8)

    def fill(
        top: int, left: int, side: int, colour: tuple[int, int, int], alpha: float, margin: int = GAP // 2
    ) -> None:
        rows, columns = (slice(at * CELL + margin, (at + side) * CELL - margin) for at in (top, left))
        image[rows, columns] = (*colour, round(255 * alpha))

    for y in range(SIDE):
        for x in range(SIDE):
            fill(y, x, 1, GREY, 0.22)
    # The second map first: where both are, the first one is seen.
    for map_, colour in reversed(list(zip(panel.maps, (BLUE, ORANGE), strict=False))):
        side = SIDE // len(map_)
        for y, x in map_.nonzero().tolist():
            # The faintest key has to be told from a token that is none.
            fill(y * side, x * side, side, colour, 0.25 + 0.75 * map_[y, x].item())
    for y, x in panel.queries:
        fill(y, x, 1, PINK, 1, margin=-GAP)
    return image


def draw(path: Path, family: str | None = None) -> tuple[int, int]:
    """Draw the panels, of all families or of one, to a PNG with a transparent background; returns width and height."""
    from matplotlib.figure import Figure

    shown = [panel for panel in panels() if family in (None, panel.family)]
    columns, map_size = min(4, len(shown)), SIDE * CELL
    text = TITLE + 2 * LINE + 42
    rows = len(shown) // columns
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
            colour = BLUE if i == 0 or panel.one_map else ORANGE
            write(x, top + TITLE + 16 + i * (LINE + 8), line, LINE, colour)
        figure.figimage(paint(panel), xo=x, yo=height - top - text - map_size, origin="upper")
    figure.savefig(path, format="png", transparent=True)
    if family:  # one or two panels are shown as they are, eight at half of that
        width, height = width // 2, height // 2
        with Image.open(path) as image:
            image.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)
    return width, height
