"""The wording that messages share, and the error that commands print. Only the standard library is imported."""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = [
    "OptionError",
    "UserError",
    "count_text",
    "did_you_mean",
    "first_few",
    "nearest",
    "one_line",
    "published_figures",
    "similar_path",
    "similarity",
    "size_text",
    "unknown_model",
]


class UserError(Exception):
    """A mistake that the user can correct, described in one sentence. Commands print it without a traceback."""

    exit_code = 1


class OptionError(UserError):
    """An option that is not allowed, or options that contradict each other."""

    exit_code = 2  # as argparse's


def one_line(message: object, limit: int | None = None) -> str:
    """`message` on one line and without its final period, so that it can be part of a sentence.

    Args:
        message: Usually an error. If it has no text, the name of its class is used.
        limit: The longest message that is not cut, in characters.
    """
    text = " ".join(str(message).split()).removesuffix(".") or type(message).__name__
    return text if limit is None or len(text) <= limit else f"{text[:limit].rstrip()} ..."


def similarity(word: str, other: str) -> float:
    """How similar two words are, from 0 to 1. Case is ignored."""
    return difflib.SequenceMatcher(None, word.casefold(), other.casefold()).ratio()


def nearest(word: str, words: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """At most `count` of `words` that resemble `word`, the most similar first. Case is ignored.

    Args:
        word: What the user wrote.
        words: What is allowed.
        count: The largest number of suggestions.
        cutoff: The smallest similarity, from 0 to 1, as `difflib.get_close_matches` measures it.
    """
    originals: dict[str, str] = {}
    for known in words:
        originals.setdefault(known.casefold(), known)
    return [originals[near] for near in difflib.get_close_matches(word.casefold(), originals, count, cutoff)]


def did_you_mean(word: str, words: Iterable[str], count: int = 1, cutoff: float = 0.6, prefix: str = "") -> str:
    """A question such as "did you mean lr?", or "" if none of `words` resembles `word`. See `nearest`.

    Args:
        word: What the user wrote.
        words: What is allowed.
        count: The largest number of suggestions.
        cutoff: The smallest similarity.
        prefix: Text in front of each suggestion, such as a folder or `data=`.
    """
    suggestions = [f"{prefix}{near}" for near in nearest(word, words, count, cutoff)]
    if not suggestions:
        return ""
    *others, last = suggestions
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def similar_path(path: Path) -> str:
    """The end of a sentence that says that `path` does not exist: what the user may have meant.

    It names the nearest entry beside the first part of `path` that does not exist.
    """
    parts = [*reversed(path.absolute().parents), path.absolute()]
    missing = next((part for part in parts if not os.path.exists(part)), None)
    if missing is None:  # it exists, but is not what was asked for
        return "."
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return "."
    suggestion = did_you_mean(missing.name, names, prefix=f"{missing.parent}{os.sep}")
    return f": {suggestion}" if suggestion else f": {missing.parent} has no {missing.name!r}."


def unknown_model(name: str, names: Iterable[str]) -> str:
    """The sentence for a model `name` that is not one of `names`."""
    lists = "zoo-models lists the models of zoo, timm.list_models() lists all."
    return f"there is no model {name!r}: {did_you_mean(name, names, cutoff=0.5) or lists}"


def first_few(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` of `items`, separated by commas, with "..." if there are more."""
    items = list(items)
    return ", ".join(map(str, items[:limit])) + (", ..." if len(items) > limit else "")


def count_text(number: int) -> str:
    """A number with three digits and its unit, such as 4.99 G."""
    power = next((power for power in (3, 2, 1) if number >= 1000**power), 0)
    return f"{number / 1000**power:.3g} {' KMG'[power]}".strip()


def size_text(sides: Iterable[int]) -> str:
    """The sides of an image or a window, such as "224x224"."""
    return "x".join(map(str, sides))


def published_figures(figures: Mapping[str, float | None], source: str | None) -> str:
    """Published figures in words, such as "49.8 mIoU at one scale, 50.8 at several with flips, the README's figures".

    Args:
        figures: Any of `top1`, `pq`, `box_ap`, `mask_ap`, `miou` and `miou_multi_scale`; None if it is not published.
        source: Where they are from, such as "README" or "paper (quoted from memory)".
    """
    one, several = figures.get("miou"), figures.get("miou_multi_scale")
    units = {"top1": "% top-1", "pq": "PQ", "box_ap": "box AP", "mask_ap": "mask AP"}
    words = [f"{figures[key]} {unit}" for key, unit in units.items() if figures.get(key)]
    if one and several:
        words += [f"{one} mIoU at one scale", f"{several} at several with flips"]
    elif one or several:
        words.append(f"{one} mIoU" if one else f"{several} mIoU at several scales with flips")
    if source:
        origin, space, qualifier = source.partition(" (")
        several_figures = sum(value is not None for value in figures.values()) > 1
        words.append(f"the {origin}'s figure{'s' * several_figures}{space}{qualifier}")
    return ", ".join(words)
