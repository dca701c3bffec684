"""The images of a command line: which are found, how they are named, and what is left out. A second."""

import os

import pytest
from PIL import Image

from zoo.messages import UserError
from zoo.recipes.inputs import Inputs, as_text, shown


def save(path, size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100).save(path)
    return path


def names(inputs):
    return [str(item.name) for item in inputs.found]


def read(inputs):
    return [item.path.name for item, _ in inputs.read(3, 2_000_000, lambda: None)]


def test_folder_and_those_below_it(tmp_path):
    for name in ("b.png", "a.JPG", "more/a.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert names(Inputs([tmp_path / "in"], tmp_path / "out")) == ["a.JPG", "b.png", "more/a.png"]


def test_same_name_in_two_places(tmp_path):
    paths = [save(tmp_path / name) for name in ("a.png", "x/a.png", "y/a.png", "z/a.jpg", "A.PNG")]
    assert names(Inputs(paths, tmp_path / "out")) == ["a.png", "a_png.png", "a_png_2.png", "a_jpg.jpg", "A_PNG_3.PNG"]


def test_folder_that_is_named_like_a_picture(tmp_path):
    for name in ("x.jpg", "x.png/a.png"):
        save(tmp_path / "in" / name)
    assert names(Inputs([tmp_path / "in"], tmp_path / "out")) == ["x_jpg.jpg", "x.png/a.png"]


def test_folder_that_is_named_like_that_of_the_labels(tmp_path):
    save(tmp_path / "in" / "labels" / "a.png")
    assert names(Inputs([tmp_path / "in"], tmp_path / "out")) == ["labels_/a.png"]


def test_longest_name_leaves_room_for_an_ending(tmp_path):
    save(tmp_path / ("ж" * 125 + ".png"))
    [name] = names(Inputs([tmp_path], tmp_path / "out"))
    assert name == "ж" * 100 + ".png"


def test_output_folder_is_left_out(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "out" / "a.png")
    assert names(Inputs([tmp_path], tmp_path / "out")) == ["a.png"]


def test_links_to_folders_are_not_followed(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(Inputs([tmp_path], tmp_path / "out")) == ["a.png"]


ODD = {
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere.png"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("quota exceeded"),
    "cut": lambda path: path.write_bytes(save(path, (64, 64)).read_bytes()[:90]),
    "wide": lambda path: save(path, (60000, 1)),
    "high": lambda path: save(path, (1, 60000)),
    "large": lambda path: save(path, (2001, 1000), "1"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
def test_odd_file_is_named_and_the_rest_goes_on(tmp_path, caplog, kind, named):
    odd, fine = tmp_path / "a.png", save(tmp_path / "b.png")
    ODD[kind](odd)
    inputs = Inputs([odd, fine] if named else [tmp_path], tmp_path / "out")
    with caplog.at_level("WARNING", "zoo"):
        assert read(inputs) == ["b.png"]
    assert inputs.unread == [odd]
    with pytest.raises(UserError, match=r"^1 of 2 files can't be read as images, beginning with .*a\.png\.$"):
        inputs.conclude()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3000, 20)])
def test_small_and_long_images_are_read(tmp_path, size):
    inputs = Inputs([save(tmp_path / "a.png", size)], tmp_path / "out")
    [(_, image)] = inputs.read(3, 10**8, lambda: None)
    assert image.size == size


def test_folder_that_is_named_like_an_image_is_a_folder(tmp_path):
    save(tmp_path / "in" / "x.jpg" / "a.png")
    assert read(Inputs([tmp_path / "in"], tmp_path / "out")) == ["a.png"]


def test_name_that_is_no_unicode(tmp_path):
    path = save(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    [(item, _)] = Inputs([tmp_path], tmp_path / "out").read(3, 10**8, lambda: None)
    assert item.path == path
    assert as_text(item.name) == r"\udcff.png"


def test_name_for_people_is_one_line():
    assert shown("a\nb\x1b[31m Фото.png") == r"a\nb\x1b[31m Фото.png"


def test_every_image_advances_the_bar(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("")
    steps = []
    list(Inputs([tmp_path], tmp_path / "out").read(3, 10**8, lambda: steps.append(1)))
    assert len(steps) == 2


def test_nothing_left_out_says_nothing(tmp_path):
    inputs = Inputs([save(tmp_path / "a.png")], tmp_path / "out")
    assert read(inputs) == ["a.png"]
    inputs.conclude()


def test_path_that_does_not_exist(tmp_path):
    save(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match=r"photo does not exist: did you mean .*photos\? Give images or folders"):
        Inputs([tmp_path / "photo"], tmp_path / "out")


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match=r"the folder .* has no images \(.*\.jpg"):
        Inputs([tmp_path], tmp_path / "out")
