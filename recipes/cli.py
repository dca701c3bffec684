"""Shared parts of the recipes' commands: help, checks of arguments, Hydra's grammar, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import commands
from zoo.commands import default_sigpipe, fail, versions
from zoo.messages import UserError, did_you_mean, nearest
from zoo.recipes import config, sweep
from zoo.recipes.errors import NoEffect, Stopped, of_the_system

CONF = str(Path(__file__).parent / "conf")

# Keys whose values are paths. They are taken literally, although = , [ ] { } and spaces mean something to Hydra.
PATHS = (
    *("run", "out", "pretrained", "data.root", "data.csv", "data.class_map", "data.train_ann", "data.val_ann"),
    *(f"imagenet.{item.name}" for item in dataclasses.fields(config.ImageNetConfig)),
    *("data.train_images", "data.val_images", "data.train_labels", "data.val_labels"),
)
_MOST_OPTIONS = 20  # the options of a group that a message lists

Keeps = Callable[[str], bool]


# Help.


def begin() -> None:
    """Start a command: escape printed characters that the terminal can't show, and answer --version."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if "--version" in sys.argv[1:]:
        print(versions())
        sys.exit(0)


def show_help(page: Callable[[], None], needs_words: bool) -> None:
    """Print the help and end the process if --help is given, or if a command that needs arguments has none.

    Args:
        page: Prints the help.
        needs_words: Whether the command needs arguments. Without them, the help goes to stderr and the exit code is 2.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        with default_sigpipe():
            page()
            sys.exit(0)
    if needs_words and not words:
        with redirect_stdout(sys.stderr):
            page()
        sys.exit(2)


def print_help(description: str, schema: type, origin: str, keeps: Keeps = lambda name: True) -> None:
    """Print the description, the groups and the keys of `schema`; or all recipes, if "recipe" is an argument.

    Args:
        description: The command's docstring.
        schema: A dataclass of config.py.
        origin: The end of the heading, which says what else sets the defaults.
        keeps: Whether a key or group is shown.
    """
    if "recipe" in sys.argv[1:]:
        print("\n".join(f"recipe={name}" for name in options("recipe")))
        return
    print(f"{description.strip()}\n\nGroups (group=option):")
    for group in filter(keeps, config.GROUPS):
        print_entry(f"{group}=", _recipes() if group == "recipe" else ", ".join(options(group)), 12)
    print(f"\nKeys with their defaults (key=value), {origin}:")
    section = ""
    for name, help, default in filter(lambda entry: keeps(entry[0]), defaults(schema)):
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            print()
        print_entry(f"{name}={default}", help, 34)
    print(
        "\n--cfg job prints the resulting values, -m runs every combination of comma-separated values,\n"
        "--version prints the installed versions."
    )


def print_entry(name: str, help: str, column: int) -> None:
    """Print a name and, from `column` on, its help, on one or more lines."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = textwrap.wrap(help, max(width - column - 2, 40), break_on_hyphens=False)
    if len(name) >= column:
        lines.insert(0, "")
    starts = [name, *[""] * len(lines)]
    print("\n".join(f"  {start:<{column}}{line}".rstrip() for start, line in zip(starts, lines, strict=False)))


def defaults(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of `schema` in dotted form, with its help text and its default as a user would type it."""
    values = schema()
    for item in dataclasses.fields(schema):
        value = getattr(values, item.name)
        if dataclasses.is_dataclass(value):
            yield from defaults(type(value), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.metadata["help"], _typed(value)


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _recipes() -> str:
    """The number of recipes of each kind."""
    names = options("recipe")
    kinds = sorted({name.partition("/")[0] for name in names})
    counts = (f"{kind}/<name> ({sum(name.startswith(f'{kind}/') for name in names)})" for kind in kinds)
    return f"{', '.join(counts)}; --help recipe lists them"


# Arguments.


def run(
    command: str,
    config_name: str,
    schema: type,
    job: Callable[[DictConfig], Any],
    words: Sequence[str] | None = None,
) -> None:
    """Check the arguments and call `job` with the configuration that they describe, or with each one of a sweep.

    In a sweep, the error of a job is printed, and the next job starts.

    Args:
        command: The name of the command, for messages.
        config_name: The file in `conf` that holds the defaults.
        schema: The dataclass of the configuration.
        job: What the command does.
        words: The arguments; those of this process if None.
    """
    given = sys.argv[1:] if words is None else words
    prepared = prepare(command, schema, given)
    rewrite_argv(prepared)

    def work(cfg: DictConfig) -> Any:
        with friendly_errors(command):
            try:
                OmegaConf.to_container(cfg, resolve=True)
            except OmegaConfBaseException as error:
                raise UserError(f"{line(error)}.") from error
            job_config = HydraConfig.get()
            if job_config.mode != RunMode.MULTIRUN:
                rewrite_argv(given)
                return job(cfg)
            try:
                folder = sweep.name_folder(cfg, prepared)
                while True:
                    rewrite_argv([*job_config.overrides.task, *folder])  # the arguments that resume this run alone
                    try:
                        return job(cfg)
                    except NoEffect as error:
                        if not sweep.has_effect(error, prepared):
                            raise
                        note = f"{error.key} has no effect with {error.other}={OmegaConf.select(cfg, error.other)}"
                        say(f"{note}: it is left out of this run of the sweep.", logging.INFO)
                        cfg = sweep.without(error.key, cfg)
            except Stopped:
                raise
            except SystemExit as ended:  # under torchrun, the first process reports the error, and goes on, too
                return ended
            except Exception as error:
                explained = error if isinstance(error, UserError) else of_the_system(error)
                if explained is None:
                    traceback.print_exc()
                else:
                    say(f"{command}: error: {explained}")
                sweep.discard_folder(cfg)
                return explained or error

    with hydra_errors(command):
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(work)()


def rewrite_argv(words: Sequence[str]) -> None:
    """Replace the arguments in `sys.argv`.

    Hydra reads `sys.argv`, and its Python API supports neither `-m` nor `--cfg`. So `sys.argv` first has to hold
    arguments in Hydra's grammar, and then the arguments that repeat the run, which `composition.command_line` records.
    """
    sys.argv[1:] = words


def prepare(command: str, schema: type, words: Sequence[str]) -> list[str]:
    """Check the arguments, and return them in Hydra's grammar."""
    parser = get_args_parser()
    parser.error = lambda message: fail(command, f"{message}; --help lists the keys.", 2)
    names = [name for name, help in config.keys(schema) if help]
    refuse_flags(command, words, [*names, *config.GROUPS], set(parser._option_string_actions) - {"--run", "-r"})
    arguments, rest = parser.parse_known_args(words)
    if sum(map(bool, (arguments.multirun, arguments.cfg, arguments.info, arguments.shell_completion))) > 1:
        fail(command, "-m, --cfg, --info and --shell-completion can't be combined: give one of them.")
    if arguments.resolve and not arguments.cfg:
        fail(command, "--resolve needs --cfg: --cfg job --resolve.")
    overrides = [word for word in words if word in {*arguments.overrides, *rest}]
    flags = [word for word in words if word not in overrides]  # which Hydra expects before or after all overrides
    _refuse_loose_words(command, overrides, names)
    literals = [literal(word, arguments.multirun) for word in overrides]
    return [*flags, *check_overrides(command, schema, literals, arguments.multirun)]


def refuse_flags(command: str, words: Sequence[str], names: Sequence[str], flags: Sequence[str] | set[str]) -> None:
    """End the process if an argument is `--key` or `--key=value`, and not one of `flags`."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if not word.startswith("-") or word.partition("=")[0] in flags:
            continue
        key, sign, value = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        leaves = [name for name in names if name.rpartition(".")[2] == key]
        [meant] = ([key] if key in names else leaves[:1] or nearest(key, names, cutoff=0.5)) or [None]
        if not meant or os.path.lexists(word):
            fail(command, f"there is no option {word}: settings are written key=value, and --help lists them.")
        takes_next = not sign and following and not following.startswith("-") and "=" not in following
        value = value if sign else following if takes_next else "true"
        fail(command, f"keys are written without dashes: write {_for_shell(f'{meant}={value}')} for {word}.")


def _refuse_loose_words(command: str, words: Sequence[str], names: Sequence[str]) -> None:
    """End the process if an argument is not of the form key=value."""
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("~") or ("=" in word and not os.path.isfile(f"{word}/config.yaml")):
            continue
        whole = f"{before} {word}"
        if "=" in before and os.path.lexists(before.partition("=")[2] + f" {word}"):
            hint = f"quote a value with spaces: {_for_shell(whole)}"
        elif os.path.isfile(f"{word}/config.yaml"):
            hint = f"did you mean {_for_shell(f'run={word}')}?"
        elif groups := [group for group in config.GROUPS if word in options(group)]:
            hint = f"did you mean {groups[0]}={word}?"
        elif word in names:
            hint = f"write {word}=<value>"
        else:
            hint = "--help lists the keys; a value with spaces has to be quoted"
        fail(command, f"{word!r} is not of the form key=value: {hint}{'' if hint.endswith('?') else '.'}")


def literal(word: str, sweep: bool = False) -> str:
    """The argument `word`, quoted if its value is a path that Hydra's grammar would read as something else.

    Args:
        word: An argument such as data.root=/data/a,b.
        sweep: Whether commas separate the values of several runs, unless a path with commas exists.
    """
    key, _, value = word.partition("=")
    if key.lstrip("+") not in PATHS or not value:
        return word
    value = home(value)
    if not os.path.lexists(value):
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if quoted or value.lower() in ("null", "true", "false") or (sweep and "," in value):
            return f"{key}={value}"
    with suppress(OverrideParseException):
        if OverridesParser.create().parse_overrides([f"{key}={value}"])[0].value() == value:
            return f"{key}={value}"
    return f"{key}={quote(value)}"


def home(path: str) -> str:
    """`path` with the home folder in place of a leading ~, which shells do not expand after =."""
    return os.path.expanduser(path) if path.startswith("~/") and not os.path.lexists(path) else path


def quote(value: str) -> str:
    """`value` as a string in Hydra's grammar, where only a backslash before a quote is an escape."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (f"\\{found[2]}" if found[2] else ""), value) + "'"


def _for_shell(word: str) -> str:
    """`word` as a user types it in a shell: within double quotes if it contains single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def check_overrides(command: str, schema: type, words: Sequence[str], sweep: bool = True) -> list[str]:
    """`checked_overrides` for a command: end the process with one line if it raises an error."""
    with commands.friendly_errors(command):
        return checked_overrides(schema, words, sweep)


def checked_overrides(schema: type, words: Sequence[str], sweep: bool = True) -> list[str]:
    """The overrides `words`, with ++ where Hydra needs it.

    Args:
        schema: The dataclass of the configuration.
        words: The overrides, in Hydra's grammar.
        sweep: Whether an override may give several values.

    Raises:
        UserError: One can't be read, or names neither a key of `schema` nor a configuration group. Hydra would refuse
            it too, but without a suggestion.
    """
    known = {name for name, _ in config.keys(schema)}
    checked = list(words)
    for position, word in enumerate(words):
        if "=" not in word:
            continue
        try:
            [override] = OverridesParser.create().parse_overrides([word])
        except OverrideParseException as error:
            key, _, value = word.partition("=")
            way = _for_shell(f"{key}={quote(value)}")
            raise UserError(f"{word} can't be read ({line(error)}): to pass it as a string, write {way}.") from error
        key = override.key_or_group
        if override.is_discrete_sweep() and not any(True for _ in override.sweep_string_iterator()):
            raise UserError(f"{word} gives no value.")
        if override.is_sweep_override() and not sweep and key in {*known, *config.GROUPS}:
            lists = f"for a list, write {_for_shell(f'{key}=[{override.get_value_string()}]')}; " if "," in word else ""
            raise UserError(f"{word} gives several values: {lists}to run them one after another, add -m.")
        if key in config.GROUPS:
            # Hydra checks other values, such as ranges and dictionaries.
            values = override.value().list if override.is_choice_sweep() else [override.value()]
            for option in values:
                if isinstance(option, str | int):
                    _check_option(key, str(option))
        elif any(f"{key}.".startswith(f"{free}.") for free in config.mappings(schema)):
            if override.type == OverrideType.CHANGE:
                # Hydra requires a prefix for keys that it does not know; ++ adds a key or replaces its value.
                checked[position] = f"++{word}"
        elif key.startswith("hydra") or key in known:
            continue
        else:
            guess = config.nearest_key(key, schema)
            group, _, _ = key.rpartition(".")
            names = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group)
            listing = f" {group or 'The top level'} has {', '.join(names)}." if names else ""
            hint = f": did you mean {guess}?" if guess else "."
            raise UserError(f"there is no key {key!r}{hint}{listing}")
    return checked


def _check_option(group: str, option: str) -> None:
    names = options(group)
    if option in names:
        return
    few = len(names) <= _MOST_OPTIONS
    listing = f"There are {', '.join(names)}." if few else f"--help {group} lists all {len(names)}."
    same = [name for name in names if name.rpartition("/")[2] == option.rpartition("/")[2]]  # in another folder
    hint = did_you_mean(option, same or names, count=1 if few else 5, cutoff=0 if same else 0.5, prefix=f"{group}=")
    raise UserError(" ".join(filter(None, (f"there is no {group}={option}:", hint, listing))))


def options(group: str) -> list[str]:
    """The names of the options of a configuration group."""
    folder = Path(CONF) / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


# Errors.


@contextmanager
def hydra_errors(command: str) -> Iterator[None]:
    """Print an error of Hydra or OmegaConf on one line, and end the process."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":  # the user asks for the traceback
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints several lines instead of raising the error
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        fail(command, line(error))
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def line(error: BaseException) -> str:
    """The first line of a Hydra error, and that of the OmegaConf error that caused it."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [(str(one).strip().splitlines() or [type(one).__name__])[0] for one in (error, cause) if one]
    return ": ".join(line.removeprefix("Error merging override ").rstrip(".") for line in lines)


def say(message: str, level: int = logging.ERROR) -> None:
    """Log a message. Before a run has started its log, which imports torch, print the message to stderr."""
    log = logging.getLogger("zoo")
    if not log.handlers:
        print(message, file=sys.stderr)
        return
    try:
        log.log(level, "%s", message)
    except MemoryError:
        os.write(2, f"{message}\n".encode())


@contextmanager
def friendly_errors(command: str) -> Iterator[None]:
    """End the process with one line instead of a traceback if the user can correct the error."""
    try:
        with commands.friendly_errors(command, explain=of_the_system, say=say):
            yield
    except Stopped as error:
        say(f"{command}: {error}", logging.WARNING)
        sys.exit(128 + error.signum)
