"""What the command-line entry points share: overrides checked early, errors in one sentence."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import OverrideParseException

from zoo.recipes import config
from zoo.recipes.errors import RunError, Stopped

CONF = str(Path(__file__).parent / "conf")


def fail(command: str, message: str) -> NoReturn:
    """End the process with one line on stderr."""
    print(f"{command}: error: {message}", file=sys.stderr)
    sys.exit(1)


def show_help(description: str, schema: type) -> None:
    """If the command line asks for help, print the description, the groups and every key of `schema`, and end."""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` reads a part
    print(f"{description.strip()}\n\nGroups (group=option):")
    for group in config.GROUPS:
        print(f"  {group + '=':<12}{', '.join(_options(group))}")
    print("\nKeys (key=value):")
    for name, help in config.keys(schema):
        if help:
            print(f"  {name + '=':<30}{help}")
    print("\n--cfg job shows the values that result, -m runs every combination of comma-separated values.")
    sys.exit(0)


def check_overrides(command: str, schema: type) -> None:
    """End the process if an override on the command line names no key of `schema` and no configuration group.

    Hydra would refuse it too, but without saying what may have been meant.
    """
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except OverrideParseException:
        return  # Hydra says where
    known = {name for name, _ in config.keys(schema)}
    for override in overrides:
        key = override.key_or_group
        if key in config.GROUPS:
            # A value that is no list of names (a range, a dictionary) is Hydra's to judge.
            options = override.value().list if override.is_choice_sweep() else [override.value()]
            for option in options:
                if isinstance(option, str):
                    _check_option(command, key, option)
        elif key.partition(".")[0] in _free(schema):
            if override.type == OverrideType.CHANGE:
                # Hydra wants a sign at keys that it does not know; ++ suits new ones and those that are there.
                sys.argv[sys.argv.index(override.input_line)] = f"++{override.input_line}"
        elif key.startswith("hydra") or key in known:
            continue
        else:
            guess = config.nearest_key(key, schema)
            group, _, _ = key.rpartition(".")
            names = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group)
            listing = f" {group or 'The top level'} has {', '.join(names)}." if names else ""
            hint = f": did you mean {guess}?" if guess else "."
            fail(command, f"there is no key {key!r}{hint}{listing}")


def _free(schema: type) -> list[str]:
    """Keys whose value is a mapping with names of the user's own."""
    return [field.name for field in dataclasses.fields(schema) if str(field.type).startswith("dict")]


def _check_option(command: str, group: str, option: str) -> None:
    options = _options(group)
    if option not in options:
        guess = config.nearest(option, options)
        hint = f"did you mean {group}={guess}? " if guess else ""
        fail(command, f"there is no {group}={option}: {hint}There are {', '.join(options)}.")


def _options(group: str) -> list[str]:
    folder = Path(CONF) / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


@contextmanager
def friendly_errors(command: str) -> Iterator[None]:
    """Print what the user can mend in one line, without a traceback, and end the process."""
    from zoo.recipes import distributed  # with torch, which help and misspelt keys need not wait for
    from zoo.recipes.runs import log

    try:
        yield
    except RunError as error:
        log.error("%s: error: %s", command, error)
        sys.exit(1)
    except Stopped as error:
        log.warning("%s: %s", command, error)
        sys.exit(128 + error.signum)
    except KeyboardInterrupt:
        log.error("%s: interrupted", command)
        sys.exit(128 + signal.SIGINT)
    finally:
        distributed.leave()
