"""Settings of a program as the arguments of a command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from zoo.messages import UserError, one_line
from zoo.recipes import cli, config


def words(settings: Mapping[str, Any] | None, schema: type) -> list[str]:
    """The arguments key=value that stand for `settings`, as a user would type them.

    Args:
        settings: The values of keys in dotted form and the options of groups, in the order of a command line.
        schema: The dataclass of the command's configuration.

    Raises:
        UserError: They are not such settings.
    """
    if settings is None:
        return []
    if not isinstance(settings, Mapping):
        given = one_line(repr(settings), 60)
        raise UserError(f'settings={given} is not a mapping: write {{"model": "van_b0", "trainer.epochs": 3}}.')
    sections = {name for name, help in config.keys(schema) if not help} | {*config.GROUPS} - {"task", "recipe"}
    found = []
    for key, value in settings.items():
        if not isinstance(key, str) or "=" in key or key.startswith(("-", "~", "hydra")):
            raise UserError(f'{key!r} is not a key: write the keys of the command line, such as "trainer.epochs".')
        if key in sections and isinstance(value, Mapping):
            name = next(iter(value), "name")
            raise UserError(f"{key} can't be a mapping: write its keys with dots, such as {f'{key}.{name}'!r}.")
        found.append(f"{key}={_argument(key, value)}")
    return found


def _argument(key: str, value: Any) -> str:
    """`value` as a user would type it after key=."""
    if not isinstance(value, str | os.PathLike):
        return _text(key, value)
    text = os.fsdecode(value)
    if key in (*cli.PATHS, *config.GROUPS):  # which are taken literally
        return text
    with suppress(OverrideParseException):
        if OverridesParser.create().parse_overrides([f"{key}={text}"])[0].value() == text:
            return text
    return cli.quote(text)


def _text(key: str, value: Any) -> str:
    """`value` in Hydra's grammar."""
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str | os.PathLike):
        return cli.quote(os.fsdecode(value))
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{_text(key, item)}' for name, item in value.items())}}}"
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return f"[{','.join(_text(key, item) for item in value)}]"
    raise UserError(
        f"{key}={one_line(repr(value), 60)} is not allowed: a setting is None, a truth value, a number, a string, a "
        "path, a list or a mapping of these."
    )
