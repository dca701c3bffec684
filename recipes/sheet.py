"""Sheets of pictures with captions: a PNG that stores the place of each picture, so that reports can cut it out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from zoo.recipes.atomic_files import atomic

_KEY = "zoo sheet"  # the key of the text chunk in the PNG
_GAP, _LINE, _SIZE = 12, 18, 13  # pixels: gap between pictures, line height, font size
_MOST_LINES = 2  # of a caption on the sheet; a report shows all of it
_MOST_TILES = 200  # that `read` returns
_WRONG = "#c01c28"


@dataclass(frozen=True)
class Tile:
    """A picture (RGB) with its caption, in red if it shows a mistake."""

    picture: Image.Image
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Sheet:
    """The content of a sheet: a title, groups of tiles that belong together, and a legend of names and "#rrggbb"."""

    title: str
    groups: list[list[Tile]]
    legend: list[tuple[str, str]]


def write(
    path: Path,
    groups: Sequence[Sequence[Tile]],
    *,
    title: str = "",
    legend: Sequence[tuple[str, str]] = (),
    columns: int = 8,
    width: int = 168,
) -> None:
    """Draw tiles in rows; the tiles of a group are side by side.

    Args:
        path: The PNG to write, atomically.
        groups: One or more groups, which have the same number of tiles.
        title: A line above the tiles.
        legend: Names and colours, "#rrggbb", below the tiles.
        columns: Tiles in a row, a multiple of the tiles in a group.
        width: The width of a tile in pixels; pictures are resized to it and keep their aspect ratio.
    """
    tiles = [tile for group in groups for tile in group]
    columns = min(columns, len(tiles))
    whole = columns * (width + _GAP) + _GAP
    pictures = [_fitted(tile.picture, width) for tile in tiles]
    captions = [_wrapped(tile.caption, width, _MOST_LINES) for tile in tiles]
    head = _wrapped(title, whole - 2 * _GAP)

    places, top = [], _GAP + len(head) * _LINE + (_GAP if head else 0)
    for first in range(0, len(tiles), columns):
        row = range(first, min(first + columns, len(tiles)))
        below = top + max(len(captions[i]) for i in row) * _LINE + 2
        places += [(_GAP + (i - first) * (width + _GAP), top, below) for i in row]
        top = below + max(pictures[i].height for i in row) + _GAP

    entries, left = [], _GAP
    for name, colour in legend:
        needed = 20 + int(_font().getlength(name)) + _GAP
        if left + needed > whole and left > _GAP:
            left, top = _GAP, top + _LINE
        entries.append((left, top, name, colour))
        left += needed
    sheet = Image.new("RGB", (whole, top + (_LINE + _GAP if legend else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(head):
        draw.text((_GAP, _GAP + number * _LINE), line, "black", _font())
    for tile, picture, caption, (x, y, below) in zip(tiles, pictures, captions, places, strict=True):
        for number, line in enumerate(caption):
            draw.text((x, y + number * _LINE), line, _WRONG if tile.wrong else "black", _font())
        sheet.paste(picture, (x, below))
    for x, y, name, colour in entries:
        draw.rectangle((x, y + 2, x + 12, y + 14), colour)
        draw.text((x + 18, y), name, "black", _font())

    content = {
        "title": title,
        "group": len(groups[0]),
        "tiles": [
            {"box": [x, below, x + picture.width, below + picture.height], "caption": tile.caption, "wrong": tile.wrong}
            for tile, picture, (x, _, below) in zip(tiles, pictures, places, strict=True)
        ],
        "legend": list(legend),
    }
    about = PngInfo()
    about.add_itxt(_KEY, json.dumps(content), zip=True)
    with atomic(path) as file:
        sheet.save(file, format="png", pnginfo=about)


def read(path: Path) -> Sheet | None:
    """Read a sheet that `write` drew; None if the file is anything else."""
    try:
        with Image.open(path) as image:
            image.load()
        content = json.loads(image.text[_KEY])
        tiles = [
            Tile(_cropped(image, *tile["box"]), str(tile["caption"]), tile["wrong"] is True)
            for tile in content["tiles"][:_MOST_TILES]
        ]
        step = content["group"]
        groups = [tiles[i : i + step] for i in range(0, len(tiles), step)]
        return Sheet(str(content["title"]), groups, [(str(name), str(colour)) for name, colour in content["legend"]])
    except Exception:  # the file may come from anyone: decoders can raise any error, and keys may be missing
        return None


def _cropped(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise ValueError("outside")  # Pillow would allocate a picture of any size
    return image.crop((left, top, right, bottom))


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    """`picture` resized to the width of a tile, but at most twice as high as wide."""
    return ImageOps.contain(picture.convert("RGB"), (width, 2 * width))


@cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont  # ships DejaVu Sans

    return ImageFont.truetype(findfont("DejaVu Sans"), _SIZE)


def _wrapped(text: str, width: int, most: int = 100) -> list[str]:
    """Break `text` into at most `most` lines of at most `width` pixels; an ellipsis replaces what does not fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, width) for line in lines]


def _cut(line: str, width: int) -> str:
    if _font().getlength(line) <= width:
        return line
    line = line[: width // 2]  # no letter is narrower than 2 pixels
    while line and _font().getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
