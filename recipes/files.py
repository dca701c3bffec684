"""Questions about files that every task asks."""

from __future__ import annotations

import difflib
import string
from pathlib import Path

from PIL import Image

# What decoding a damaged file raises, PIL's and timm's ways included.
DECODING_ERRORS = (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError)
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}


def similar_path(path: Path) -> str:
    """What the user may have meant: the nearest name beside the first part of `path` that does not exist."""
    missing = next(p for p in [*reversed(path.absolute().parents), path.absolute()] if not p.exists())
    try:
        names = [p.name for p in missing.parent.iterdir()]
    except OSError:
        return "."
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f": did you mean {missing.parent / close[0]}?" if close else f": {missing.parent} has no {missing.name!r}."


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
    cause = error.__cause__ or error.__context__ or error
    text = str(cause).strip().splitlines()
    return text[0] if text else type(cause).__name__
