"""The known checkpoints, `manifest.json`, and what models cost, `counts.json`, as package data; read without torch."""

import json
from functools import cache
from importlib import resources
from typing import Any

__all__ = ["counts", "manifest"]


@cache
def manifest(family: str) -> tuple[dict[str, Any], ...]:
    """The known checkpoints of `family`, as the manifest has them, each with the facts its family shares."""
    shared = dict(_content("manifest.json")[family])
    return tuple({**shared, **entry} for entry in shared.pop("checkpoints"))


@cache
def counts() -> dict[str, dict[str, Any]]:
    """By model, with its tag where it has one: `family`, `input_size`, `parameters` and `multiply_adds`.

    They are of a classifier of 1000 classes and one image of (channels, height, width) `input_size`.
    """
    return _content("counts.json")


def _content(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
