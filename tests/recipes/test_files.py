"""Text and JSON files as other programs write them. Well under a second."""

import codecs

import pytest

from zoo.messages import UserError, similar_path
from zoo.recipes import files

TEXT = "chat\nélan\n\n猫 \n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["utf-8", "bom", "windows", "old mac", "utf-16", "utf-16 big end"],
)
def test_reads_the_texts_of_other_editors(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert files.read_text(path) == TEXT
    assert files.read_lines(path) == ["chat", "élan", "猫"]


def test_reads_json_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": [1, 2]}\r\n')
    assert files.read_json(path) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x93\x00\xff", "not text in UTF-8 or UTF-16"),
        (b'{"a": ', "is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read_json(path)
    assert str(path) in str(error.value)


def test_says_why_a_file_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        files.read_text(tmp_path / "none.txt")


def test_nothing_is_similar_to_a_path_that_exists(tmp_path):
    assert similar_path(tmp_path) == "."
