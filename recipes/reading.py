"""Reading the files of a run folder, which may come from anyone: plain values of the types that the commands write.

Nothing in such a file is resolved, called or followed; anything unexpected is refused in one sentence.
"""

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Required, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader  # numbers such as 1e-6 as OmegaConf writes them
from omegaconf.errors import OmegaConfBaseException

from zoo.messages import UserError
from zoo.recipes.config import Config, defaults
from zoo.recipes.files import parse_json, read_json, read_text
from zoo.recipes.tasks import TASKS

REPORT = "report.html"  # the report of a run or an evaluation, in its folder

_DEEPEST = 40  # levels in a config.yaml
_LARGEST = 200_000  # bytes in a config.yaml
_NAMES = {float: "a number", int: "a whole number", str: "a string", list: "a list", dict: "a mapping"}


class Epoch(TypedDict, total=False):
    """A line of metrics.jsonl, which also has scores and losses."""

    epoch: Required[float]
    update: Required[float]
    skipped_updates: float | None
    step_seconds: dict[str, float] | None


class Rate(TypedDict):
    """A learning rate that a probe tried."""

    lr: float
    held_out_top1: float | None


class Probe(TypedDict, total=False):
    """How a probe was made; `chosen` is one of its learning rates."""

    kind: Required[str]
    k: float
    rates: list[Rate]
    chosen: float
    held_out_images: float


class Summary(TypedDict, total=False):
    """The content of summary.json."""

    metrics: Required[dict[str, float | None]]
    params: float
    trained_params: float
    multiply_adds: float | None
    image_size: list[int]
    seconds: float | None
    processes: int
    train_images: int
    val_images: int
    versions: dict[str, str]
    corrupt_images: list[str]
    stopped_early: str | None
    probe: Probe


class _Recipe(TypedDict):
    chosen: str
    settings: dict[str, Any]


class Start(TypedDict, total=False):
    """The content of start.json."""

    recipe: _Recipe | None
    data: list[str]
    params: float
    processes: int


class _Calibration(TypedDict):
    """The part of classify.calibration.Calibration that is shown."""

    bins: int
    images: int
    all: dict[str, Any]
    temperature: float | None
    reason: str | None
    fitted_on: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Corruptions(TypedDict):
    """Accuracies in percent.

    `top1` has one for each severity of each corruption; `mean` is the mean of all of them, and `relative` its share of
    the accuracy `clean` on the images as they are. `image_size` is that of the images that were corrupted.
    """

    severities: list[int]
    seed: int
    image_size: list[int]
    images: int
    clean: float
    top1: dict[str, list[float]]
    mean: float
    relative: float


class Evaluation(TypedDict, total=False):
    """The content of eval.json."""

    task: str
    model: Required[str]
    method: str
    metrics: Required[dict[str, float | None]]
    data: dict[str, Any]
    corrupt_images: list[str]
    top1_interval: list[float]
    calibration: _Calibration
    corruptions: Corruptions
    imagenet: dict[str, dict[str, Any]]


class _Progress(TypedDict, total=False):
    update: Required[int]
    finished: bool
    nonfinite: int
    seconds: float
    epoch: int
    samples: int


class _Identity(TypedDict, total=False):
    classes: list[str]


class Checkpoint(TypedDict, total=False):
    """The content of last.pt without the state of the training."""

    progress: Required[_Progress]
    history: Required[list[dict[str, Any]]]
    best: Required[dict[str, Any]]
    identity: Required[_Identity]
    config: Required[dict[str, Any]]
    wandb: str | None


class Classes(TypedDict):
    """The content of classes.json."""

    classes: list[str]
    scores: dict[str, list[float | None]]
    counts: list[float]
    unit: str
    confusion: list[list[int]] | None


def load_config(folder: Path) -> DictConfig:
    """The configuration of a run, in which `${...}` is plain text.

    Raises:
        UserError: `folder` is not a run folder, or its config.yaml has anything but plain values for known keys.
    """
    path = folder / "config.yaml"
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{folder} is not the folder of a run: it {what}.")
    if not os.path.exists(path):
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml.")
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path} has more than {_LARGEST:,} bytes: it is not the configuration of a run.")
    text = read_text(path)
    try:
        _check_plain(path, text)
        content = OmegaConf.create(_literal(yaml.load(text, Loader=get_yaml_loader())))
        if not isinstance(content, DictConfig):
            raise UserError(f"{path} is not the configuration of a run: it names no task and model.")
        known = OmegaConf.merge(defaults(Config), _known(content, Config))
        OmegaConf.to_container(known, resolve=True)  # refuses a string where a number is needed
        if known.task not in TASKS or not content.get("model"):
            raise UserError(f"{path} is not the configuration of a run: it names no task and model.")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        where = re.search(r"full_key: (\S+)", str(error))
        reason = lines[0].rstrip(".")[:200] + (f" at {where[1]}" if where else "")
        raise UserError(f"{path} is not the configuration of a run ({reason}).") from error
    return content


def _check_plain(path: Path, text: str) -> None:
    """Refuse YAML other than nested lists and mappings of plain values."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(f"{path} repeats parts by name (&, *): a run's configuration has plain values only.")
        if getattr(event, "tag", None):
            raise UserError(f"{path} has the YAML tag {event.tag}: a run's configuration has plain values only.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UserError(f"{path} is nested more than {_DEEPEST} levels deep: it is not the configuration of a run.")


def _literal(value: Any) -> Any:
    """`value` with every `${` escaped, so that OmegaConf reads it as text."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _known(content: DictConfig, schema: type) -> dict[str, Any]:
    """The part of `content` whose keys are in `schema`: a run of another version may have other keys."""
    found = {}
    for item in fields(schema):
        if item.name in content:
            value = content._get_node(item.name)
            section = item.default_factory if is_dataclass(item.default_factory) else None
            found[item.name] = _known(value, section) if section and isinstance(value, DictConfig) else value
    return found


def load(path: Path, kind: type) -> Any:
    """The content of a JSON file; None if there is no such file. Numbers that are not finite become None.

    Args:
        path: The file.
        kind: The type of its content, from this module.

    Raises:
        UserError: It can't be read, or its content is of another type.
    """
    return check(_finite(read_json(path)), kind, path) if os.path.exists(path) else None


def load_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; empty if there is no such file.

    Raises:
        UserError: It can't be read, or its content is of another type.
    """
    path, found = folder / "metrics.jsonl", []
    for number, line in enumerate(read_text(path).split("\n") if os.path.exists(path) else (), 1):
        if line.strip():
            source = f"{path}, line {number},"
            record = check(_finite(parse_json(line, source)), Epoch, source)
            found.append(check(record, dict[str, float | dict[str, float] | None], source))
    return found


def load_classes(folder: Path) -> Classes | None:
    """The content of classes.json, whose lists fit together; None if there is no such file.

    Raises:
        UserError: It can't be read, or its content is of another type.
    """
    found = load(folder / "classes.json", Classes)
    if found:
        number = len(found["classes"])
        columns = [found["counts"], *found["scores"].values()]
        cells = found["confusion"] or []
        known = (len(cell) == 3 and max(cell[:2]) < number and min(cell[:2]) >= 0 < cell[2] for cell in cells)
        if any(len(column) != number for column in columns) or not all(known):
            raise UserError(f"{folder / 'classes.json'} is not what zoo writes: its lists do not fit its classes.")
    return found


def check(content: Any, kind: type, source: Any) -> Any:
    """Return `content` if it is of the type `kind`.

    Raises:
        UserError: It is not; the message begins with `source`.
    """
    if wrong := _misfit(content, kind, ""):
        raise UserError(f"{source} is not what zoo writes: {wrong}; repair it, or delete it to continue without it.")
    return content


def _finite(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        return None  # too deep to be written by zoo
    if isinstance(value, dict):
        return {key: _finite(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, depth + 1) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if abs(value) < 1e100 else None  # comparisons with NaN are false
    return value


def _misfit(value: Any, kind: Any, where: str) -> str | None:
    """Say which part of `value` is not of the type `kind`; None if every part is."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is UnionType:
        found = [_misfit(value, argument, where) for argument in arguments]
        return None if None in found else found[0]
    plain = dict if is_typeddict(kind) else origin or kind
    fits = isinstance(value, int | float if plain is float else plain) and isinstance(value, bool) == (plain is bool)
    if not fits:
        return f"{where or 'the whole'} is {_shown(value)} and has to be {_NAMES.get(plain, plain.__name__)}"
    parts: list[tuple[Any, Any, str]] = []
    if is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - value.keys()):
            return f"{where or 'the whole'} has no {missing[0]!r}"
        hints = get_type_hints(kind)
        parts = [(value[name], hints[name], name) for name in hints if name in value]
    elif plain is dict:
        parts = [(item, arguments[1], name) for name, item in value.items()]
    elif plain is list:
        parts = [(item, arguments[0], str(index)) for index, item in enumerate(value)]
    return next((w for item, part, name in parts if (w := _misfit(item, part, f"{where}.{name}".lstrip(".")))), None)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."
