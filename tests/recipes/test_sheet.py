"""Sheets of pictures: places and sizes of pictures, and reading a sheet. A second."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from zoo.recipes import sheet
from zoo.recipes.sheet import Tile


def picture(width=100, height=100, color="blue"):
    return Image.new("RGB", (width, height), color)


def content(**changes):
    """The description that a sheet contains."""
    tile = {"box": [0, 0, 5, 5], "caption": "a", "wrong": False}
    return {"title": "", "group": 1, "tiles": [tile], "legend": []} | changes


def save(path, text):
    """A picture of 10 x 10 pixels with the description `text`."""
    about = PngImagePlugin.PngInfo()
    about.add_itxt("zoo sheet", text)
    picture(10, 10).save(path, pnginfo=about)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sheet.png"


def test_what_was_written_is_read(path):
    groups = [[Tile(picture(color="blue"), "found"), Tile(picture(color="red"), "true", wrong=True)]] * 3
    sheet.write(path, groups, title="A title.", legend=[("sky", "#0000ff")], columns=4, width=50)
    found = sheet.read(path)
    assert (found.title, found.legend) == ("A title.", [("sky", "#0000ff")])
    assert [[(tile.caption, tile.wrong) for tile in group] for group in found.groups] == [
        [("found", False), ("true", True)]
    ] * 3
    for group in found.groups:
        assert [tile.picture.getcolors() for tile in group] == [[(2500, (0, 0, 255))], [(2500, (255, 0, 0))]]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (8, 1), (9, 2), (32, 4)])
def test_a_sheet_has_as_many_rows_as_it_needs(path, count, rows):
    sheet.write(path, [[Tile(picture(), "a")]] * count, width=100)
    with Image.open(path) as drawn:
        assert drawn.width <= 8 * 112 + 12
        assert drawn.height < rows * 150 + 20


def test_low_pictures_leave_no_gaps(path):
    sheet.write(path, [[Tile(picture(300, 60), "a")]] * 4, columns=2, width=300)
    blue = (np.asarray(Image.open(path)) == (0, 0, 255)).all(-1).any(1)
    gaps = np.diff(np.flatnonzero(np.diff(blue.astype(int))))
    assert gaps.tolist() == [60, gaps[1], 60]
    assert gaps[1] < 40


def test_high_and_small_pictures_fit(path):
    sheet.write(path, [[Tile(picture(10, 1000), "a")], [Tile(picture(8, 8), "b")]], width=100)
    sizes = [group[0].picture.size for group in sheet.read(path).groups]
    assert sizes == [(2, 200), (100, 100)]


def test_long_captions_stay_in_their_columns(path):
    sheet.write(path, [[Tile(picture(), "Wort " * 30)], [Tile(picture(), "ohneleerzeichen" * 30)]], width=100)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[:, 113:123] == 255).all()
    assert (pixels[:, -11:] == 255).all()
    assert sheet.read(path).groups[0][0].caption.split() == ["Wort"] * 30


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "{}", "null"),
        json.dumps(content(tiles=[{"box": [0, 0, 11, 5], "caption": "a", "wrong": False}])),
        json.dumps(content(tiles=[{"box": [0, 0, 10**9, 10**9], "caption": "a", "wrong": False}])),
        json.dumps(content(tiles=[{"box": [-1, 0, 5, 5], "caption": "a", "wrong": False}])),
        json.dumps(content(tiles=[{"box": [0, 0, 5], "caption": "a", "wrong": False}])),
        json.dumps(content(group=0)),
        json.dumps(content(legend=[["a"]])),
    ],
)
def test_other_descriptions_are_none(path, text):
    assert sheet.read(save(path, text)) is None


def test_a_description_by_hand_is_read(path):
    assert sheet.read(save(path, json.dumps(content()))).groups[0][0].picture.size == (5, 5)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x89PNG"])
def test_other_files_are_none(path, damage):
    sheet.write(path, [[Tile(picture(), "a")]])
    path.write_bytes(damage(path.read_bytes()))
    assert sheet.read(path) is None
