"""Class folders and class lists as found in practice: which images are read, with which class. A few seconds."""

import os
import re
import tarfile
import unicodedata

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from zoo.messages import UserError
from zoo.recipes.classify.data import open_data
from zoo.recipes.classify.folders import ClassFolders
from zoo.recipes.config import DataConfig
from zoo.recipes.images import ENDINGS
from zoo.recipes.logs import log


@pytest.fixture
def write(tmp_path):
    """Write small images by their paths; returns the root."""

    def write(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, "PNG")
        return tmp_path / "data"

    return write


@pytest.fixture
def said(caplog, monkeypatch):
    """The log."""
    monkeypatch.setattr(log, "propagate", True)  # the run of another test has changed it
    with caplog.at_level("INFO"):
        yield caplog


def _open(root, **options):
    return open_data(DataConfig(root=str(root), **options), 0)


def _labels(dataset, root):
    """Labels by path."""
    return {os.path.relpath(path, root): label for path, label in dataset.reader.samples}


# Which images are of which class.


def test_nested_folders_belong_to_the_class_of_the_first_level(write, said):
    names = [f"{kind}/{place}/{i}.png" for kind in ("cat", "dog") for place in ("indoor", "outdoor") for i in range(3)]
    root = write(*(f"{split}/{name}" for split in ("train", "val") for name in names))
    data = _open(root)
    assert data.classes == ["cat", "dog"]
    for dataset, split in ((data.train, "train"), (data.val, "val")):
        assert _labels(dataset, root) == {f"{split}/{name}": int(name.startswith("dog")) for name in names}
    assert "12 images lie deeper than their class folders" in said.text


def test_nested_folders_are_held_out_by_class(write):
    data = _open(write(*(f"{kind}/{i}/{i}.png" for kind in ("cat", "dog") for i in range(10))))
    assert data.classes == ["cat", "dog"]
    assert sorted(data.train.reader.samples[i][1] for i in data.val_indices) == [0, 1]


HIDDEN = [".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_folders_are_no_classes(write, name):
    root = write("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", f"{name}/1.png", f"cat/{name}/1.png")
    data = _open(root)
    assert data.classes == ["cat", "dog"]
    assert len(data.train.reader.samples) == 4


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "._1.png", ".1.png", "notes.txt"])
def test_hidden_files_are_no_images(write, name):
    root = write("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", f"cat/{name}", name)
    assert set(_labels(_open(root).train, root)) == {"cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"}


def test_images_outside_of_class_folders_are_left_out_and_said(write, said):
    root = write("a.png", "b.JPG", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    assert _open(root).classes == ["cat", "dog"]
    assert "has 2 images outside of class folders, which are left out; the first is a.png" in said.text


def test_endings_in_any_case_and_of_all_kinds(write):
    root = write(*(f"{kind}/{i}{ending}" for kind in "ab" for i, ending in enumerate((*ENDINGS, ".JPG", ".Tiff"))))
    assert len(_open(root).train.reader.samples) == 2 * (len(ENDINGS) + 2)


@pytest.mark.parametrize("key", [".png;.gif", "png; GIF"])
def test_endings_are_chosen(write, key):
    root = write(*(f"{kind}/{name}" for kind in "ab" for name in ("1.png", "2.gif", "3.jpg", "4.PNG")))
    assert len(_open(root, input_key=key).train.reader.samples) == 6


def test_numbers_in_names_are_ordered_by_size(write):
    root = write(*(f"{number}/{i}.png" for number in (10, 9, 2, 100) for i in (10, 9)))
    data = _open(root)
    assert data.classes == ["2", "9", "10", "100"]
    assert list(_labels(data.train, root))[:3] == ["2/9.png", "2/10.png", "9/9.png"]


def test_flat_folders_are_read_in_the_order_of_timm(write):
    root = write(*(f"{kind}/{name}.png" for kind in ("n10", "N9", "é", "b 2", "b-10") for name in ("a10", "A9", "1")))
    folders = ClassFolders(root, ENDINGS)
    folders.label(list(folders.images))
    samples, index = find_images_and_targets(str(root))
    assert folders.samples == samples
    assert list(folders.images) == list(index)


def test_names_that_differ_in_case_are_two_classes_in_a_fixed_order(write):
    assert _open(write("b/1.png", "b/2.png", "B/1.png", "B/2.png", "a/1.png", "a/2.png")).classes == ["a", "B", "b"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_file_systems_write_differently_are_one_class(write, forms):
    train, val = (unicodedata.normalize(form, "café") for form in forms)
    root = write(*(f"train/{name}/{i}.png" for name in (train, "tea") for i in range(2)), f"val/{val}/1.png")
    data = _open(root)
    assert data.classes == [unicodedata.normalize("NFC", "café"), "tea"]
    assert list(_labels(data.val, root).values()) == [0]


def test_two_folders_of_one_class_are_refused(write):
    root = write(*(f"{unicodedata.normalize(form, 'café')}/1.png" for form in ("NFC", "NFD")), "tea/1.png")
    with pytest.raises(UserError, match="has two folders of the class 'café': put their images into one"):
        _open(root)


def test_validation_on_training_images_is_refused_unless_asked_for(write, said):
    root = write("train/cat/1.png", "train/dog/1.png", "val/cat/2.png")
    (root / "val" / "dog").symlink_to(root / "train" / "dog")
    with pytest.raises(
        UserError, match=r"1 of the 2 validation images are training images too.*data\.same_images=true"
    ):
        _open(root)
    _open(root, same_images=True)
    assert "1 of the 2 validation images are training images too" in said.text


def test_class_in_other_case_in_validation_is_named(write):
    root = write("train/X/1.png", "train/y/1.png", "val/x/1.png")
    with pytest.raises(UserError, match=r"that training does not have, 'x' \(did you mean 'X'\?\)"):
        _open(root)


def test_a_single_folder_of_class_folders_is_seen_through(write):
    root = write("pets/cat/1.png", "pets/dog/1.png")
    with pytest.raises(UserError, match=re.escape(f"are the folders in {root / 'pets'}, that is the root")):
        _open(root)


# Links, pipes and permissions.


def test_links_are_followed_and_loops_end(write, tmp_path):
    root = write("cat/1.png", "cat/deep/2.png", "dog/1.png", "dog/2.png")
    (root / "cat" / "loop").symlink_to(root / "cat", target_is_directory=True)
    (root / "cat" / "deep" / "up").symlink_to("..", target_is_directory=True)
    (root / "dog" / "self").symlink_to(root / "dog" / "self")
    (root / "emu").symlink_to(root / "dog", target_is_directory=True)
    (root / "dog" / "3.png").symlink_to(root / "cat" / "1.png")
    assert _labels(_open(root).train, root) == {
        "cat/1.png": 0,
        "cat/deep/2.png": 0,
        **dict.fromkeys(["dog/1.png", "dog/2.png", "dog/3.png"], 1),
        **dict.fromkeys(["emu/1.png", "emu/2.png", "emu/3.png"], 2),
    }


def test_link_to_nothing_is_an_image_to_be_named(write):
    root = write("cat/1.png", "dog/1.png")
    (root / "cat" / "2.png").symlink_to(root / "none.png")
    assert ClassFolders(root, ENDINGS).images["cat"] == [str(root / "cat" / name) for name in ("1.png", "2.png")]


def test_pipe_is_no_image(write):
    root = write("cat/1.png", "dog/1.png")
    os.mkfifo(root / "cat" / "2.png")
    assert ClassFolders(root, ENDINGS).images["cat"] == [str(root / "cat" / "1.png")]


@pytest.mark.parametrize("inside", ["cat", "cat/deep", "."])
def test_folder_that_can_not_be_read_is_named(write, monkeypatch, inside):
    root = write("cat/deep/1.png", "dog/1.png")
    scandir, locked = os.scandir, os.path.normpath(root / inside)

    def refuse(path):
        if os.path.normpath(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=re.escape(f"{locked} can't be read (Permission denied): fix that")):
        _open(root)


# Splits and classes of the same names.


def test_class_named_like_a_split(write, said):
    data = _open(write(*(f"{kind}/{i}.png" for kind in ("boat", "car", "train") for i in range(2))))
    assert data.classes == ["boat", "car", "train"]
    assert "train has no class folders, so it counts as a class" in said.text


def test_class_named_like_a_split_within_a_split(write):
    root = write(*(f"{split}/{kind}/1.png" for split in ("train", "val") for kind in ("boat", "train", "val")))
    data = _open(root)
    assert data.classes == ["boat", "train", "val"]
    assert len(data.train) == len(data.val) == 3


@pytest.mark.parametrize("other", ["val", "valid", "test"])
def test_splits_without_class_folders_are_no_classes(write, other):
    root = write("train/1.png", f"{other}/1.png", "notes/1.png")
    with pytest.raises(UserError, match="train has no class folders"):
        _open(root)


def test_root_is_a_split_on_demand(write):
    root = write(*(f"{kind}/deep/{i}.png" for kind in ("boat", "train") for i in range(2)))
    assert _open(root, train_split=".").classes == ["boat", "train"]


# Class lists.


@pytest.fixture
def three(write):
    return write(*(f"{kind}/{i}.png" for kind in ("cat", "dog", "emu") for i in range(3)))


TEXTS = {
    "windows": "\ufeffemu\r\ncat\r\ndog\r\n".encode(),
    "blank lines": b"\nemu\n\ncat\ndog\n\n\n",
    "spaces and tabs": b" emu \ncat\t\n\tdog",
    "utf-16": "emu\ncat\ndog".encode("utf-16"),
    "old mac": b"emu\rcat\rdog\r",
}


@pytest.mark.parametrize("text", TEXTS)
def test_class_lists_of_any_editor(three, tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_bytes(TEXTS[text])
    data = _open(three, class_map=str(path))
    assert data.classes == ["emu", "cat", "dog"]
    assert _labels(data.train, three)["cat/0.png"] == 1


def test_class_list_may_have_any_ending(three, tmp_path):
    (tmp_path / "pets.names").write_text("emu\ncat\ndog")
    assert _open(three, class_map=str(tmp_path / "pets.names")).classes == ["emu", "cat", "dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\ndog\ncat\n", "names the class 'cat' twice: make the names unique"),
        ("a.txt", b"\n \n", "has to name one class per line, but it is empty"),
        ("a.txt", b"cart\ndogs\n", r"has none of the 2 classes of data.class_map=.*a.txt: it has 'cat', 'dog', 'emu'"),
        ("a.txt", b"\x80\x04\x95\xff", "is not text in UTF-8 or UTF-16"),
        ("a.json", b'{"cat": 0}', "is not a list of classes: give a text file"),
        ("a.pkl", b"cos\nsystem\n(S'touch ran'\ntR.", "is not a list of classes: give a text file"),
    ],
    ids=["twice", "blank", "other classes", "binary", "json", "pickle"],
)
def test_what_is_no_class_list_is_refused(three, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _open(three, class_map=str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_classes_of_the_list_without_images_are_said(three, tmp_path, said):
    (tmp_path / "a.txt").write_text("cat\ndog\nemu\nfox\n")
    _open(three, class_map=str(tmp_path / "a.txt"))
    assert "has no images of 1 of the 4 classes: fox." in said.text


# Tar files.


def _tar(file, root, prefix=""):
    with tarfile.open(file, "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.add(path, f"{prefix}{path.relative_to(root)}")
    return file


NESTED = ("cat/indoor/1.png", "cat/2.png", "dog/outdoor/1.png", "dog/2.png", "cat/._2.png", "__MACOSX/cat/3.png")


@pytest.mark.parametrize("prefix", ["", "./", "pets/train/"])
def test_class_folders_in_a_tar_file(write, tmp_path, prefix):
    file = _tar(tmp_path / "a.tar", write(*NESTED), prefix)
    data = _open(file, name="tar")
    assert data.classes == ["cat", "dog"]
    stripped = prefix.removeprefix("./")
    assert dict(data.train.reader.samples) == {stripped + name: int("dog" in name) for name in NESTED[:4]}
    assert sorted(data.train.reader.samples[i][1] for i in data.val_indices) == [0, 1]


def test_tar_files_of_splits(write, tmp_path):
    root = write(*NESTED)
    for split in ("a", "b"):
        _tar(tmp_path / f"{split}.tar", root)
    data = _open(tmp_path, train_split="a.tar", val_split="b.tar")
    assert (data.classes, len(data.train), len(data.val)) == (["cat", "dog"], 4, 4)


def test_tar_file_with_a_tar_file_for_each_class(tmp_path):
    for name, colour in (("n1", 10), ("n2", 20)):
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (8, 8), colour).save(tmp_path / name / f"{name}_{i}.png")
        (tmp_path / "all").mkdir(exist_ok=True)
        _tar(tmp_path / "all" / f"{name}.tar", tmp_path / name)
    data = _open(_tar(tmp_path / "a.tar", tmp_path / "all"))
    assert data.classes == ["n1", "n2"]
    assert [(Image.open(file).getpixel((0, 0)), label) for file, label in data.train.reader] == [
        (10, 0),
        (10, 0),
        (20, 1),
        (20, 1),
    ]


@pytest.mark.parametrize("cut", [100, 4 * 512 + 100, -7])
def test_tar_file_that_ends_early_is_refused(write, tmp_path, cut):
    file = _tar(tmp_path / "a.tar", write("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a.tar can't be read as a tar file"):
        _open(file)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"data.zip is neither a folder of class folders nor a .tar file"):
        _open(tmp_path / "data.zip")
