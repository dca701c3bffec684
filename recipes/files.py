"""Questions about files that every task asks."""

from __future__ import annotations

import codecs
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.recipes.errors import RunError

# What decoding a damaged file raises, PIL's and timm's ways included.
DECODING_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)
# Folders that macOS, Synology, Linux and Windows put among the files.
_OF_SYSTEMS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}


def read_text(path: Path) -> str:
    """The text of a file as any editor writes it: UTF-8 or UTF-16 by its byte order mark, lines ending in one newline.

    Raises:
        RunError: it can't be read, or is no text.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
            raise RunError(f"{path} can't be read (it is a pipe or a device): give a file.")
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror}): mend that.") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no text in UTF-8 or UTF-16 ({error.reason} at byte {error.start}).") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text` that are not empty, without the spaces around them."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file, whatever wrote it (`read_text`).

    Raises:
        RunError: it can't be read, or is not JSON.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, source: Any) -> Any:
    """The content of a JSON text that comes from `source`.

    Raises:
        RunError: it is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise RunError(f"{source} is not usable JSON: its lists are nested too deeply.") from None
    except ValueError as error:
        raise RunError(f"{source} is not JSON: {error}.") from error


def read_classes(path: Path) -> list[str]:
    """The names in a text file with one class a line, in its order.

    Raises:
        RunError: it can't be read, names no class or one twice, or is of another kind.
    """
    if path.suffix.lower() in (".json", ".pkl", ".pickle"):
        raise RunError(f"{path} is no list of classes: give a text file with one class a line.")
    if not path.is_file():
        raise RunError(f"data.class_map={path} does not exist: give a text file with one class a line.")
    names = read_lines(path)
    if not names:
        raise RunError(f"{path} has to name one class a line, but it is empty.")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        raise RunError(f"{path} names the class {twice!r} twice: make the names unique.")
    return names


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not meant for people: hidden, or put there by an operating system."""
    return name.startswith(".") or name in _OF_SYSTEMS


def is_text(path: str) -> bool:
    """Whether the file begins like a text, whatever its name says."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False  # unreadable is not text; reading it later will say so
    printable = string.printable.encode()
    return bool(head) and all(byte in printable or byte >= 0x80 for byte in head) and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # the last character may be cut
    return True


def reason(error: BaseException) -> str:
    """The first line of what `error` came from."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__) or error
    text = str(cause).strip().splitlines()
    return text[0] if text else type(cause).__name__
