"""Reading text files and recognising kinds of files, for all tasks."""

from __future__ import annotations

import codecs
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.messages import UserError

# The errors that decoding a damaged file raises, in PIL and timm.
DECODING_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)
# Folders that macOS, Synology, Linux and Windows create among the files.
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}


def read_text(path: Path) -> str:
    """The text of a file from any editor: UTF-8, or UTF-16 with a byte order mark. Lines end in "\\n".

    Raises:
        UserError: The file can't be read, or is not text.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
            raise UserError(f"{path} can't be read (it is a pipe or a device): give a file.")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): correct that.") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 or UTF-16 ({error.reason} at byte {error.start}).") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text` that are not empty, without surrounding spaces."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file. See `read_text`.

    Raises:
        UserError: The file can't be read, or is not JSON.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, source: Any) -> Any:
    """The content of a JSON text that comes from `source`.

    Raises:
        UserError: The text is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{source} is not usable JSON: its lists are nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}.") from error


def read_classes(path: Path) -> list[str]:
    """The names in a text file with one class per line, in the order of the lines.

    Raises:
        UserError: The file can't be read, names no class, names a class twice, or is not a list of classes.
    """
    if path.suffix.lower() in (".json", ".pkl", ".pickle"):
        raise UserError(f"{path} is not a list of classes: give a text file with one class per line.")
    if not path.is_file():
        raise UserError(f"data.class_map={path} does not exist: give a text file with one class per line.")
    names = read_lines(path)
    if not names:
        raise UserError(f"{path} has to name one class per line, but it is empty.")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        raise UserError(f"{path} names the class {twice!r} twice: make the names unique.")
    return names


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was created by an operating system."""
    return name.startswith(".") or name in _OF_SYSTEMS


def is_text(path: str) -> bool:
    """Whether the file begins like text. Its name does not matter."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False  # reading it later raises the error
    printable = string.printable.encode()
    return bool(head) and all(byte in printable or byte >= 0x80 for byte in head) and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # the last character may be cut
    return True


def reason(error: BaseException) -> str:
    """The first line of the error that caused `error`, or of `error` itself."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__) or error
    text = str(cause).strip().splitlines()
    return text[0] if text else type(cause).__name__
