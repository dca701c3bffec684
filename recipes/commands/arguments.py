"""The command lines of `zoo-predict` and `zoo-embed`: keys, images (files and folders), and the output folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.messages import UserError, did_you_mean
from zoo.recipes import cli
from zoo.recipes.config import EvalConfig


def keys_of(schema: type) -> list[str]:
    """The keys without a dot: the fields of `schema` but `overrides`, which holds the keys with one."""
    return [item.name for item in fields(schema) if item.name != "overrides"]


def parse(schema: type, words: Sequence[str], mappings: Sequence[str] = ()) -> tuple[Any, list[Path], Path]:
    """Parse the arguments of a command line into settings, images (files and folders) and the output folder.

    Args:
        schema: The dataclass of its settings, with a field `overrides` for the keys of `EvalConfig`.
        words: The arguments.
        mappings: Keys without a dot that are keys of `EvalConfig`, and mappings.

    Raises:
        UserError: An argument can't be used; the message says why.
    """
    keys, paths = [], []
    for word in words:
        key = word.partition("=")[0]
        if "=" not in word or os.path.lexists(word) or not all(part.isidentifier() for part in key.split(".")):
            paths.append(Path(word))
        else:
            keys.append(word)
    cfg = settings(schema, keys, mappings)
    if len(paths) < 2:
        raise UserError("give the images (files or folders) and then the output folder.")
    return cfg, paths[:-1], paths[-1]


def settings(schema: type, words: Sequence[str], mappings: Sequence[str] = ()) -> Any:
    """The settings that the arguments `words`, all of the form key=value, give. See `parse`."""
    cfg, keys = OmegaConf.structured(schema), keys_of(schema)
    for word in words:
        key, _, value = word.partition("=")
        if "." in key or key in mappings:
            cfg.overrides[key] = _value(word)
        elif key in keys:
            try:
                cfg[key] = None if value == "null" else cli.home(value)
            except OmegaConfBaseException as error:
                raise UserError(f"{word}: {str(error).splitlines()[0]}.") from error
        else:
            hint = did_you_mean(key, keys, cutoff=0.5)
            hint = f": {hint}" if hint else "."
            raise UserError(
                f"there is no key {key!r}{hint} There are {', '.join(keys)}, and those with a dot that --help lists; "
                f"for a file, write ./{word}."
            )
    if cfg.checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint={cfg.checkpoint} is not allowed: it has to be last or best.")
    return cfg


def _value(word: str) -> Any:
    """The value of an argument such as eval.window=[512,512], which is checked as by `zoo-eval`."""
    with suppress(OverrideParseException):  # reported below
        [override] = OverridesParser.create().parse_overrides([word])
        if override.is_sweep_override():
            key, _, value = word.partition("=")
            raise UserError(f"{word} gives several values: for a list, write {key}=[{value}].")
    cli.checked_overrides(EvalConfig, [word])
    return override.value()


def print_help(description: str, schema: type, keys: Sequence[str]) -> None:
    """Print the description, the keys of `schema`, and those `keys` of `EvalConfig` that affect the result.

    Args:
        description: The command's docstring.
        schema: The dataclass of the command's settings.
        keys: Names of keys, or of whole sections.
    """
    print(description.strip(), "\n\nKeys with their defaults (key=value):")
    for name, help, default in cli.defaults(schema):
        if name in keys_of(schema):
            cli.print_entry(f"{name}={default}", help, 34)
    print("\nKeys with the defaults of zoo-train, which the run replaces with its own:")
    section = ""
    for name, help, default in cli.defaults(EvalConfig):
        if name in keys:
            if name.rpartition(".")[0] != section:
                section = name.rpartition(".")[0]
                print()
            cli.print_entry(f"{name}={default}", help, 34)
