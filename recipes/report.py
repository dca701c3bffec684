"""zoo-report: write the report of a run, or compare several runs.

zoo-report runs/<folder>                           write its report.html again, from the files in the folder
zoo-report runs/<folder>/eval                      do the same for the output of zoo-eval
zoo-report runs/a runs/b -o comparison.html        compare scores, curves, settings and classes on one page

zoo-train and zoo-eval write report.html when they are done. The pages need no network and run no scripts.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from zoo.messages import UserError, count_text, size_text
from zoo.recipes import cli, config, reading, sheet
from zoo.recipes.atomic_files import write_text
from zoo.recipes.composition import composed, flat
from zoo.recipes.logs import log, start_log
from zoo.recipes.reading import REPORT
from zoo.recipes.tasks import SCORES

if TYPE_CHECKING:
    from PIL.Image import Image

_GENERATOR = '<meta name="generator" content="zoo-report">'
_CLASS_SCORES = {
    **{"AP": "AP", "F1": "F1"},
    **{"top1": "top-1", "PQ": "PQ", "SQ": "SQ", "RQ": "RQ", "IoU": "IoU", "accuracy": "accuracy"},
    **SCORES["detect"],
}
_TASKS = {
    "classify": "classification",
    "detect": "detection",
    "segment": "segmentation",
    "panoptic": "panoptic segmentation",
}
_PICTURES = {  # file -> title and note
    "reliability.png": (
        "Reliability diagram",
        "Bars: the share that is right, of the images whose predicted class has a probability in the bin. The dots are "
        "at the mean probability of the bin: in a calibrated model, they are on the dotted line. Red lines are the "
        "differences.",
    ),
    "precision_recall.png": ("Precision over recall", "For each class, at an IoU of 0.5."),
    "predictions.png": ("Sample predictions", ""),
    "corruptions.png": ("The corruptions", ""),
    "attention.png": ("Attention of the probe", ""),
    "exits.png": (
        "Early exit",
        "Accuracy over the cost of an image. A number is the exit that all images take. Thresholds are in eval.json.",
    ),
}
# Pictures whose tiles can be as narrow as a thumbnail.
_NARROW = ("corruptions.png", "attention.png")
# The figures of an evaluation without which a picture in its folder is an earlier one's.
_FIGURES = {"reliability.png": "calibration", "corruptions.png": "corruptions", "exits.png": "early_exit"}
_PARTS = ("waiting for images", "forward", "backward", "optimizer", "rest")
_PUBLISHED = {  # keys of `published` -> titles
    "top1": "top-1",
    "pq": "PQ",
    "mask_ap": "mask AP",
    "box_ap": "box AP",
    "miou": "mIoU",
    "miou_multi_scale": "mIoU, several scales",
}
_OWN = ("run", "resume")  # keys that do not affect what is trained
_WIDE = 820  # pixels; a picture that is narrower is not enlarged
_MOST_CELLS = 40  # classes in a confusion matrix
_MOST_ROWS = 20  # classes in the order of the data; if there are more, the worst come first
_FEW_IMAGES, _FEW_OF_A_CLASS = 100, 10  # a score on fewer says little
_VALIDATION = (  # settings that identify the validation images
    *("data.name", "data.root", "data.csv", "data.val_split", "data.val_ann", "data.val_images", "data.val_labels"),
    *("data.class_map", "data.val_num_samples", "data.reduce_zero_label"),
)


@dataclass
class Record:
    """The content of a folder that zoo-train or zoo-eval wrote.

    Attributes:
        path: The folder.
        task: `classify`, `detect`, `segment` or `panoptic`.
        evaluation: Whether zoo-eval wrote it.
        settings: Values by dotted key.
        recipe: The settings before the user's changes; empty if they are not known.
        recipe_name: The task and recipe that were chosen on the command line, such as "recipe=imagenet/van_b0".
        facts: The content of start.json or, for an evaluation, eval.json.
        history: A record per epoch or evaluation.
        summary: The content of summary.json; None if the run did not end.
        classes: The content of classes.json; None if there was no evaluation.
    """

    path: Path
    task: str
    evaluation: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_name: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    classes: dict[str, Any] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """The latest scores, in percent, by name."""
        if self.evaluation or self.summary:
            found = (self.facts if self.evaluation else self.summary)["metrics"]
        else:
            evaluated = [
                record for record in self.history if any(f"val_{name}" in record for name in SCORES[self.task])
            ]
            found = {key.removeprefix("val_"): value for key, value in (evaluated or [{}])[-1].items()}
        names = [name for name in SCORES[self.task] if found.get(name) is not None]
        # With five classes, the right one is always among the first five.
        return {
            name: found[name]
            for name in names
            if name != "top5" or self.class_names is None or len(self.class_names) > 5
        }

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, if they are known."""
        found = (self.classes or self.summary or {}).get("classes")
        return found if isinstance(found, list) else None  # a classifier's summary has their number

    @property
    def images(self) -> int | None:
        """The number of images that the scores are computed on, if it is known."""
        if self.evaluation:
            return self.facts["metrics"].get("images") or (self.facts.get("data") or {}).get("images")
        counts = self.classes["counts"] if self.classes and self.classes["unit"] == "images" else ()
        return (self.summary or {}).get("val_images") or sum(counts) or None

    @property
    def main(self) -> str | None:
        """The name of the score that decides which epoch is the best."""
        return next(iter(self.scores), None)

    @property
    def best(self) -> tuple[float, float] | None:
        """The best value of the main score, and its epoch."""
        found = [(r[f"val_{self.main}"], r["epoch"]) for r in self.history if r.get(f"val_{self.main}") is not None]
        return max(found, key=lambda item: (item[0], -item[1]), default=None)

    @property
    def probe(self) -> str:
        """The kind of a probe of frozen features; empty if the whole model was trained."""
        kind = self.settings.get("probe.kind")
        return kind if kind in config.PROBES and kind != "none" and not self.evaluation else ""

    @property
    def model(self) -> str:
        """The model, with the method if it is the backbone of a detector or segmentor."""
        settings = self.facts if self.evaluation else self.settings
        method = self.facts.get("method") if self.evaluation else self.settings.get("dense.method")
        return f"{method} on {settings['model']}" if method and self.task != "classify" else str(settings["model"])


# Reading.


def read(path: Path) -> Record:
    """Read the folder `path`.

    Raises:
        UserError: It is not the folder of a run or an evaluation, or a file in it can't be read.
    """
    if os.path.exists(path / "config.yaml"):
        settings = OmegaConf.to_container(reading.load_config(path), resolve=True)
        task = settings.get("task", "classify")
        start = reading.load(path / "start.json", reading.Start) or {}
        chosen = start.get("recipe") or {"chosen": f"task={task}", "settings": composed((f"task={task}",))}
        return Record(
            path,
            task,
            settings=dict(flat(settings)),
            recipe=dict(flat(chosen["settings"])),
            recipe_name=chosen["chosen"],
            facts=start,
            history=reading.load_history(path),
            summary=reading.load(path / "summary.json", reading.Summary),
            classes=reading.load_classes(path),
        )
    facts = reading.load(path / "eval.json", reading.Evaluation)
    if facts is None:
        raise UserError(
            f"{path} is not the folder of a run or an evaluation: it has neither config.yaml nor eval.json."
        )
    if facts.get("task", "classify") not in SCORES:
        raise UserError(f"{path / 'eval.json'} is not what zoo writes: its task is unknown.")
    settings = {key: facts[key] for key in ("model", "method", "weights", "data") if key in facts}
    return Record(
        path,
        facts.get("task", "classify"),
        evaluation=True,
        settings=dict(flat(settings)),
        facts=facts,
        classes=reading.load_classes(path),
    )


# Pages.


def page(record: Record) -> str:
    """The HTML of a run or an evaluation."""
    sections, left_out = _made(
        tiles=("figures", lambda: _tiles(record)),
        charts=("curves", lambda: _charts([record])),
        rates=("learning rates", lambda: _rates(record)),
        classes=("classes", lambda: _class_table(record)),
        matrix=("confusion matrix", lambda: _matrix(record)),
        corruptions=("corruptions", lambda: _corruptions(record)),
        imagenet=("ImageNet's variants", lambda: _imagenet(record)),
        pictures=("pictures", lambda: _pictures(record)),
        steps=("parts of an update", lambda: _steps(record)),
        data=("data", lambda: _data(record)),
        changes=("differences from the recipe", lambda: _changes(record)),
        facts=("command and versions", lambda: _facts(record)),
        notes=("notes", lambda: _notes(record)),
    )
    sections["notes"] = left_out + sections["notes"]
    sections["configuration"] = yaml.safe_dump(record.settings, sort_keys=False, allow_unicode=True)
    parts = record.path.absolute().parts[-2 if record.evaluation else -1 :]
    if record.evaluation:
        made = f"Evaluation of {_TASKS[record.task]}"
    elif record.probe:
        made = f"Frozen features, {config.PROBES[record.probe]}"
    else:
        made = f"Training for {_TASKS[record.task]}"
    return _render("run", record=record, folder="/".join(parts), made=made, **sections)


def comparison(records: Sequence[Record]) -> str:
    """The HTML of several runs side by side.

    Raises:
        UserError: They are of different tasks.
    """
    tasks = {record.task: record for record in records}
    if len(tasks) > 1:
        which = " and ".join(f"{record.path} is task={task}" for task, record in tasks.items())
        raise UserError(f"runs of different tasks have no scores in common ({which}): compare one task at a time.")
    sections, left_out = _made(
        scores=("scores", lambda: _score_table(records)),
        differences=("data", lambda: _data_differences(records)),
        charts=("curves", lambda: _charts(records)),
        changes=("settings", lambda: _setting_table(records)),
        classes=("classes", lambda: _class_differences(records)),
        robustness=("robustness", lambda: _robustness_table(records)),
        steps=("parts of an update", lambda: _step_table(records)),
    )
    return _render("comparison", records=records, task=_TASKS[records[0].task], notes=left_out, **sections)


def _made(**parts: tuple[str, Callable[[], Any]]) -> tuple[dict[str, Any], list[str]]:
    """The content of the parts of a page, and a note on the parts that are left out because files are damaged."""
    made, left_out = {}, []
    for key, (name, make) in parts.items():
        try:
            made[key] = make()
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
            made[key] = []
            left_out.append(name)
    note = f"Files are damaged or incomplete. The parts that need them are left out: {', '.join(left_out)}."
    return made, [note] * bool(left_out)


def write(path: Path) -> Path:
    """Write the report of the folder `path` into it, and return its path.

    Raises:
        UserError: It is not the folder of a run or an evaluation, or it can't be written to.
    """
    write_text(path / REPORT, page(read(path)))
    return path / REPORT


def write_or_warn(path: Path) -> None:
    """Write the report of a run that has just ended; an error is logged, since it must not make the run fail."""
    try:
        log.info("Report: %s", write(path))
    except Exception as error:
        log.warning("The report could not be written (%s); `zoo-report %s` tries again.", error, path)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "value": _value}
    return environment.get_template("report.html.j2")


def _render(kind: str, **content: Any) -> str:
    import zoo

    written = time.strftime("%Y-%m-%d %H:%M")
    return _template().render(kind=kind, generator=_GENERATOR, written=written, version=zoo.__version__, **content)


# Parts of a page: plain values for the template.


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """Key figures: label, figure, small print."""
    names = SCORES[record.task]
    images = f"of {_counted(record.images, 'image')}" if record.images else ""
    if (record.facts.get("top1_interval") or ()) and record.evaluation:
        low, high = record.facts["top1_interval"]
        images += f"; 95 % interval: {low:.2f} to {high:.2f} %"
    tiles = [
        (names[name], _percent(value, record.task), images if name == record.main else "")
        for name, value in record.scores.items()
    ]
    if record.best:
        value, epoch = record.best
        tiles.insert(1, (f"best {names[record.main]}", _percent(value, record.task), f"epoch {_number(epoch)}"))
    # The figures of a recipe are those of its model: they do not apply to another model=... on the command line.
    if record.settings.get("published.model") == record.settings["model"]:
        source = record.settings.get("published.source") or ""
        figures = ((name, record.settings.get(f"published.{key}")) for key, name in _PUBLISHED.items())
        tiles += [(f"published {name}", _percent(value, record.task), source) for name, value in figures if value]
    tiles += _calibration_tiles(record)
    summary = record.summary or {}
    params = summary.get("params") or record.facts.get("params")
    if params:
        trained = summary.get("trained_params", params)
        note = f"{trained / 1e6:.2f} M trained, the others frozen" if trained < params else ""
        tiles.append(("parameters", f"{params / 1e6:.2f} M", note))
    if summary.get("multiply_adds"):
        size = f"for an image of {size_text(summary['image_size'])}" if summary.get("image_size") else ""
        tiles.append(("multiply-adds", count_text(summary["multiply_adds"]), size))
    seconds = summary.get("seconds") or (record.history[-1].get("seconds") if record.history else None)
    if seconds:
        tiles.append(("time", _duration(seconds), ""))
    speeds = [r["images_per_second"] for r in record.history if r.get("images_per_second")]
    if speeds:
        tiles.append(("training images/s", f"{sorted(speeds)[len(speeds) // 2]:.3g}", "median"))
    return tiles


def _calibration_tiles(record: Record) -> list[tuple[str, str, str]]:
    found = record.facts.get("calibration") if record.evaluation else None
    if not found:
        return []
    whole, before, after = found["all"], found["before"], found["after"]
    tiles = [("calibration error", f"{whole['ece']:.2f} %", f"ECE, {found['bins']} bins; Brier {whole['brier']:.4f}")]
    if found["temperature"] and before and after:
        others = f"{found['images'] - found['fitted_on']} images that it is not fitted on"
        change = f"ECE {before['ece']:.2f} -> {after['ece']:.2f} % on {others}"
        if after["nll"] > before["nll"]:
            change += f", but loss {before['nll']:.4f} -> {after['nll']:.4f}: do not use it"
        tiles.append(("temperature", f"{found['temperature']:.3g}", change))
    return tiles


def _facts(record: Record) -> list[tuple[str, str]]:
    """Further facts, in small print."""
    given = {**record.facts, **(record.summary or {})}
    facts = [(name, str(given[name])) for name in ("command", "weights", "device") if given.get(name)]
    if given.get("processes", 1) > 1:
        facts.append(("processes", str(given["processes"])))
    if record.settings.get("seed") is not None:
        facts.append(("seed", str(record.settings["seed"])))
    if given.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in given["versions"].items())))
    return [("folder", str(record.path)), *facts]


def _notes(record: Record) -> list[str]:
    """Caveats about the figures."""
    notes = []
    if not record.evaluation and record.summary is None:
        last = record.history[-1] if record.history else None
        where = f"the figures are those after update {last['update']}" if last else "it has not been evaluated yet"
        notes.append(f"This run has not ended: {where}.")
    if early := (record.summary or {}).get("stopped_early"):
        notes.append(early)
    if record.probe and record.settings.get("pretrained") is False:
        notes.append("The model has random weights: the probe says what its architecture alone can do.")
    if record.images and record.images < _FEW_IMAGES:
        one = f": one image is worth {100 / record.images:.2g} points" if "top1" in record.scores else ""
        notes.append(
            f"The scores are from only {_counted(record.images, 'image')}{one}. Small differences may be due to chance."
        )
    skipped = sum(r.get("skipped_updates") or 0 for r in record.history)
    if skipped:
        notes.append(f"{skipped} updates were skipped because their loss was not finite.")
    corrupt = (record.summary or {}).get("corrupt_images") or record.facts.get("corrupt_images")
    if corrupt:
        names = ", ".join(map(str, corrupt[:5])) + (", ..." if len(corrupt) > 5 else "")
        notes.append(f"Corrupt images were left out, {len(corrupt)} of them: {names}")
    return notes


def _data(record: Record) -> list[str]:
    """Lines that describe the data."""
    if record.evaluation:
        data = record.facts.get("data") or {}
        lines = [f"{key}: {value}" for key, value in data.items() if value not in (None, "")]
        if record.facts["metrics"].get("images"):
            lines.append(f"images: {record.facts['metrics']['images']}")
    else:
        names = [
            f"{key}: {record.settings[key]}"
            for key in ("data.name", "data.csv", "data.root")
            if record.settings.get(key)
        ]
        summary = record.summary or {}
        counts = [("training", "train_images"), ("validation", "val_images")]
        plain = [f"{label}: {summary[key]} images" for label, key in counts if key in summary]
        lines = names + (record.facts.get("data") or plain)
    if record.classes:
        classes = record.classes["classes"]
        most = 30
        listed = ", ".join(map(str, classes[:most])) + (", ..." if len(classes) > most else "")
        lines.append(f"{len(classes)} classes: {listed}")
    return lines


def _changes(record: Record) -> list[tuple[str, Any, Any]]:
    """Settings that differ from the recipe: key, value, the recipe's value."""
    if not record.recipe:
        return []
    keys = dict.fromkeys([*record.settings, *record.recipe])
    return [
        (key, record.settings.get(key), record.recipe.get(key))
        for key in keys
        if _is_known(key, [record.settings, record.recipe]) and record.settings.get(key) != record.recipe.get(key)
    ]


def _is_known(key: str, settings: Sequence[dict[str, Any]]) -> bool:
    """Whether `key` can be compared: its value is unknown if a folder of an older version lacks it."""
    named_by_users = key.startswith(tuple(f"{name}." for name in config.mappings()))
    decides = key not in _OWN and not key.startswith("published.")
    return decides and (named_by_users or all(key in values for values in settings))


def _pictures(record: Record) -> list[dict[str, Any]]:
    """Pictures with title and note: the tiles of a sheet in groups, or the whole file."""
    found, folder = [], record.path
    for name, (title, note) in _PICTURES.items():
        earlier = record.evaluation and name in _FIGURES and _FIGURES[name] not in record.facts
        if (folder / name).exists() and not earlier:
            parts = sheet.read(folder / name)
            groups = [
                [
                    {"source": _source(_png(tile.picture)), "caption": tile.caption, "wrong": tile.wrong}
                    for tile in group
                ]
                for group in (parts.groups if parts else [])
            ]
            content = (folder / name).read_bytes()
            whole = "" if parts else _source(content)
            legend = [entry for entry in (parts.legend if parts else []) if re.fullmatch("#[0-9a-f]{6}", entry[1])]
            found.append(
                {
                    "title": title,
                    "note": parts.title if parts else note,
                    "source": whole,
                    "narrow": name in _NARROW,
                    "small": int.from_bytes(content[16:20]) < _WIDE,  # the width in the header of a PNG
                    "groups": groups,
                    "legend": legend,
                }
            )
    return found


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _class_table(record: Record) -> dict[str, Any] | None:
    """The scores of each class."""
    names = _in_order(record.classes["scores"]) if record.classes else []
    if not names:
        return None
    table = record.classes
    first = table["scores"][names[0]]
    rows = [
        {
            "name": name,
            "count": table["counts"][i],
            "scores": [_percent(table["scores"][score][i], record.task) for score in names],
            "bar": f"{first[i] or 0:.1f}",
        }
        for i, name in enumerate(table["classes"])
    ]
    worst_first = len(rows) > _MOST_ROWS
    if worst_first:
        order = sorted(range(len(rows)), key=lambda i: math.inf if first[i] is None else first[i])
        rows = [rows[i] for i in order]
    return {
        "columns": [_CLASS_SCORES[name] for name in names],
        "unit": table["unit"],
        "rows": rows,
        "worst_first": worst_first,
        "few": sum(0 < row["count"] < _FEW_OF_A_CLASS for row in rows),
    }


def _in_order(names: Iterable[str]) -> list[str]:
    """The names of the scores of classes, the main one first."""
    given = set(names)
    return [name for name in _CLASS_SCORES if name in given]


def _rates(record: Record) -> dict[str, Any] | None:
    """The learning rates that a probe tried, with their scores on held-out training images."""
    about = (record.summary or {}).get("probe") or {}
    if not about.get("rates"):
        return None
    rows = [
        (
            _number(rate["lr"]),
            _percent(rate["held_out_top1"]),
            rate["held_out_top1"] or 0,
            rate["lr"] == about["chosen"],
        )
        for rate in about["rates"]
    ]
    return {"rows": rows, "images": about["held_out_images"]}


def _matrix(record: Record) -> dict[str, Any] | None:
    """The confusion matrix, of the most confused classes if there are many, and the most frequent mistakes."""
    if not record.classes or not record.classes["confusion"]:
        return None
    names, unit = record.classes["classes"], record.classes["unit"]
    cells = {(row, column): count for row, column, count in record.classes["confusion"]}
    totals = [0] * len(names)
    mistakes = [0] * len(names)
    for (row, column), count in cells.items():
        totals[row] += count
        if row != column:
            mistakes[row] += count
            mistakes[column] += count
    shown = list(range(len(names)))
    if len(names) > _MOST_CELLS:
        shown = sorted(sorted(shown, key=lambda i: -mistakes[i])[:_MOST_CELLS])
    rows = []
    for row in shown:
        line = []
        for column in shown:
            count = cells.get((row, column), 0)
            share = count / totals[row] if totals[row] else 0.0
            text = "" if not count else "<1" if share < 0.01 else f"{100 * share:.0f}"
            hint = f"{names[row]} predicted as {names[column]}: {count:,} of {totals[row]:,} {unit}" if count else ""
            line.append({"share": round(share, 3), "text": text, "hint": hint, "right": row == column})
        rows.append({"name": names[row], "cells": line})
    # Pixels are weighted by the share of their class: otherwise the background, which has the most, would come first.
    weight = [total if unit == "pixels" else 1 for total in totals]
    wrong = sorted(
        ((n, r, c) for (r, c), n in cells.items() if r != c), key=lambda item: (-item[0] / weight[item[1]], item)
    )
    return {
        "names": [names[i] for i in shown],
        "rows": rows,
        "of": len(names),
        "unit": unit,
        "numbers": len(shown) <= _MOST_ROWS,
        "mistakes": [(names[r], names[c], f"{n:,} of {totals[r]:,}", n / totals[r]) for n, r, c in wrong[:8]],
    }


def _corruptions(record: Record) -> dict[str, Any] | None:
    """The accuracy of a classifier on images with each corruption, by severity."""
    found = record.facts.get("corruptions") if record.evaluation else None
    if not found:
        return None
    rows = [(name, [*row, sum(row) / len(row)]) for name, row in found["top1"].items()]
    columns = [*(f"{severity}" for severity in found["severities"]), "mean"]
    means = [sum(column) / len(rows) for column in zip(*(row for _, row in rows), strict=True)]
    return {**found, "columns": columns, "rows": [*rows, ("mean", means)], "size": size_text(found["image_size"])}


def _imagenet(record: Record) -> dict[str, Any] | None:
    """The accuracies on data sets for ImageNet classifiers, and the errors on ImageNet-C."""
    found = record.facts.get("imagenet") if record.evaluation else None
    if not found:
        return None
    rows = [
        (row["title"], row["images"], row["top1"], *row["top1_interval"]) for key, row in found.items() if key != "c"
    ]
    return {"rows": rows, "c": found.get("c")}


def _robustness(record: Record) -> dict[str, float]:
    """The figures of an evaluation of robustness, in percent, by name."""
    figures = {}
    if found := record.facts.get("corruptions"):
        figures |= {"without corruption": found["clean"]}
        figures |= {name: sum(row) / len(row) for name, row in found["top1"].items()}
        figures |= {"mean of the corruptions": found["mean"], "the mean as a share of the first": found["relative"]}
    for key, row in (record.facts.get("imagenet") or {}).items():
        figures |= {"ImageNet-C: mCE, lower is better": row["mce"]} if key == "c" else {row["title"]: row["top1"]}
    return figures


def _robustness_table(records: Sequence[Record]) -> list[tuple[str, list[tuple[float, float | None]]]]:
    """The figures of robustness that all evaluations have, with the differences from the first."""
    found = [_robustness(record) if record.evaluation else {} for record in records]
    common = [name for name in found[0] if all(name in figures for figures in found)]
    return [
        (name, [(f[name], None if i == 0 else f[name] - found[0][name]) for i, f in enumerate(found)])
        for name in common
    ]


def _steps(record: Record) -> dict[str, Any] | None:
    """The mean milliseconds of the parts of an update, the slowest first."""
    timed = [r["step_seconds"] for r in record.history if (r.get("step_seconds") or {}).get("updates")]
    if not timed or not any(r.get(part) for r in timed for part in _PARTS):
        return None
    updates = sum(r["updates"] for r in timed)
    seconds = {part: sum(r.get(part, 0.0) for r in timed) for part in _PARTS}
    total = sum(seconds.values())
    parts = [
        {
            "name": part,
            "ms": 1000 * seconds[part] / updates,
            "share": seconds[part] / total,
            "color": _PARTS.index(part),
        }
        for part in sorted(_PARTS, key=lambda part: -seconds[part])
    ]
    return {"updates": updates, "ms": 1000 * total / updates, "parts": parts}


# Comparisons.


def _score_table(records: Sequence[Record]) -> dict[str, Any]:
    """The latest scores of each run; the best of each column is marked, unless the data differ."""
    names = [name for name in SCORES[records[0].task] if any(name in record.scores for record in records)]
    columns = [[record.scores.get(name) for record in records] for name in names]
    best = [max((value for value in column if value is not None), default=None) for column in columns]
    if _data_differences(records):
        best = [None] * len(columns)
    rows = []
    for i, record in enumerate(records):
        summary = record.summary or {}
        params = summary.get("params") or record.facts.get("params")
        seconds = summary.get("seconds") or (record.history[-1].get("seconds") if record.history else None)
        scores = [
            (column[i], column[i] is not None and column[i] == top) for column, top in zip(columns, best, strict=True)
        ]
        best_epoch = (
            f"{_percent(record.best[0], record.task)} in epoch {_number(record.best[1])}" if record.best else ""
        )
        rows.append(
            {
                "model": record.model,
                "images": f"{record.images:,}" if record.images else "",
                "scores": [(_percent(value, record.task), mark) for value, mark in scores],
                "best": best_epoch,
                "params": f"{params / 1e6:.2f} M" if params else "",
                "time": _duration(seconds) if seconds else "",
                "state": "evaluation" if record.evaluation else "ended" if record.summary else "not ended",
            }
        )
    return {"columns": [SCORES[records[0].task][name] for name in names], "rows": rows}


def _data_differences(records: Sequence[Record]) -> list[str]:
    """The differences between the data on which the runs were scored."""
    found = [f"{key}: {' / '.join(map(_value, values))}" for key, values in _validation(records) if _differ(values)]
    images = [record.images for record in records if record.images]
    if _differ(images):
        found.append(f"validation images: {' / '.join(f'{count:,}' for count in images)}")
    for key, name in (("severities", "severities of the corruptions"), ("seed", "seed of the corruptions")):
        values = [record.facts["corruptions"][key] for record in records if record.facts.get("corruptions")]
        if _differ(values):
            found.append(f"{name}: {' / '.join(map(str, values))}")
    if _differ([record.class_names for record in records if record.class_names]):
        found.append("the classes")
    return found


def _validation(records: Sequence[Record]) -> Iterator[tuple[str, list[Any]]]:
    """The settings that identify the validation images, as far as all runs have them, with resolved paths."""
    for key in _VALIDATION:
        if all(key in record.settings for record in records):
            values = [record.settings[key] for record in records]
            yield key, [os.path.abspath(v) if key == "data.root" and isinstance(v, str) else v for v in values]


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _setting_table(records: Sequence[Record]) -> list[tuple[str, list[Any]]]:
    """The settings that differ between the runs."""
    settings = [record.settings for record in records]
    keys = dict.fromkeys(key for values in settings for key in values if _is_known(key, settings))
    rows = [(key, [values.get(key) for values in settings]) for key in keys]
    return [(key, values) for key, values in rows if _differ(values)]


def _class_differences(records: Sequence[Record]) -> dict[str, Any] | None:
    """The main score of each class in each run, with the difference from the first; the largest spread first."""
    tables = [record.classes for record in records]
    if not all(tables):
        return None
    names = _in_order(name for name in tables[0]["scores"] if all(name in table["scores"] for table in tables))
    common = [c for c in tables[0]["classes"] if all(c in table["classes"] for table in tables)]
    if not names or not common:
        return None
    found = [dict(zip(table["classes"], table["scores"][names[0]], strict=True)) for table in tables]
    rows = []
    for name in common:
        values = [scores[name] for scores in found]
        known = [value for value in values if value is not None]
        spread = max(known) - min(known) if known else 0.0
        first = values[0]
        cells = [(v, None if i == 0 or v is None or first is None else v - first) for i, v in enumerate(values)]
        rows.append((spread, name, cells))
    rows.sort(key=lambda row: -row[0])
    return {"score": _CLASS_SCORES[names[0]], "rows": rows}


def _step_table(records: Sequence[Record]) -> list[tuple[str, list[float | None]]]:
    """Mean milliseconds of each part of an update in each run."""
    found = [_steps(record) for record in records]
    if not any(found):
        return []
    times = [
        {part["name"]: part["ms"] for part in steps["parts"]} | {"in all": steps["ms"]} if steps else {}
        for steps in found
    ]
    return [(part, [values.get(part) for values in times]) for part in (*_PARTS, "in all")]


# Charts. The template draws them as SVG.

_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


def _charts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Curves over the epochs: one chart has several curves of one run, or one curve per run."""
    task = records[0].task
    scores = [name for name in SCORES[task] if any(f"val_{name}" in r for record in records for r in record.history)]
    wanted: list[tuple[str, list[tuple[str, str]]]]
    if len(records) > 1:
        keys = [("training loss", "train_loss"), ("validation loss", "val_loss")]
        keys += [(f"{SCORES[task][name]} (validation)", f"val_{name}") for name in scores[:1]]
        keys += [("learning rate", "lr")]
        charts = [(title, [(str(record.path), key, record) for record in records]) for title, key in keys]
    else:
        record = records[0]
        parts = [key for key in (record.history or [{}])[-1] if key.startswith("train_") and "loss" in key]
        wanted = [("loss", [("training", "train_loss"), ("validation", "val_loss")])]
        if task == "classify" and "mAP" not in scores:
            wanted.append(("top-1", [("training", "train_top1"), ("validation", "val_top1")]))
        else:
            wanted.append(("scores (validation)", [(SCORES[task][name], f"val_{name}") for name in scores]))
        if len(parts) > 2:
            named = [(key.removeprefix("train_").replace(".", " "), key) for key in parts if key != "train_loss"]
            wanted.append(("parts of the training loss", named))
        wanted += [("learning rate", [("", "lr")]), ("training images per second", [("", "images_per_second")])]
        charts = [(title, [(label, key, record) for label, key in lines]) for title, lines in wanted]
    percentages = {f"{split}_{name}" for split in ("train", "val") for name in SCORES[task]}
    drawn = (
        _chart(
            title,
            [(label, _points(record, key)) for label, key, record in lines],
            percent=all(key in percentages for _, key, _ in lines),
            from_zero=any(key == "images_per_second" for _, key, _ in lines),
        )
        for title, lines in charts
    )
    return [chart for chart in drawn if chart]


def _points(record: Record, key: str) -> list[tuple[float, float]]:
    """The points (epoch, value) of a curve."""
    return [(r["epoch"], r[key]) for r in record.history if isinstance(r.get(key), int | float)]


def _chart(
    title: str, lines: Sequence[tuple[str, list[tuple[float, float]]]], percent: bool = False, from_zero: bool = False
) -> dict[str, Any] | None:
    """A chart of `lines`, which are labels with points; None if there are no points."""
    given = [(label, points, number) for number, (label, points) in enumerate(lines) if points]
    if not given:
        return None
    xs = [x for _, points, _ in given for x, _ in points]
    ys = [y for _, points, _ in given for _, y in points]
    # A range of epochs around a single point shows which epoch it is, and that it is not a flat curve.
    x_low, x_high = (min(xs), max(xs)) if len(set(xs)) > 1 else (0, max(xs) or 1)
    x_ticks = _epochs(x_low, x_high)
    margin = 0.02 * (x_high - x_low)  # keeps dots away from the labels
    x_low, x_high = x_low - margin, x_high + margin
    y_ticks = _heights(0 if from_zero else min(ys), max(ys), 100 if percent else math.inf)
    unit = " %" if percent else ""
    y_low, y_high = y_ticks[0], y_ticks[-1]
    across = (_WIDTH - _LEFT - _RIGHT) / (x_high - x_low)
    up = (_HEIGHT - _TOP - _BOTTOM) / (y_high - y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + (x - x_low) * across, 1), round(_HEIGHT - _BOTTOM - (y - y_low) * up, 1)

    step = y_ticks[1] - y_ticks[0]
    drawn = []
    for label, points, number in given:
        places = [place(*point) for point in points]
        dots = [
            {"x": x, "y": y, "hint": f"epoch {_number(p[0])}: {_number(p[1])}{unit}"}
            for (x, y), p in zip(places, points, strict=True)
        ]
        path = " ".join(f"{x},{y}" for x, y in places)
        alone = f"{_number(points[0][1])}{unit}" if len(points) == 1 else ""
        drawn.append(
            {"label": label, "color": number % 8, "dashed": number >= 8, "path": path, "dots": dots, "alone": alone}
        )
    below = -math.inf  # single points may be close to each other, and their values below one another
    for line in sorted((line for line in drawn if line["alone"]), key=lambda line: line["dots"][0]["y"]):
        line["value_y"] = below = max(line["dots"][0]["y"] + 4, below + 16)
    return {
        "title": title,
        "size": (_WIDTH, _HEIGHT),
        "frame": (_LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM),
        "x_ticks": [(place(x, y_low)[0], _number(x)) for x in x_ticks],
        "y_ticks": [(place(x_low, y)[1], _tick(y, step) + unit) for y in y_ticks],
        "lines": drawn,
        "many": max(len(line["dots"]) for line in drawn) > 40,
    }


def _epochs(low: float, high: float) -> list[float]:
    """Ticks at whole epochs, or at fractions if there are fewer than two whole epochs."""
    from matplotlib.ticker import MaxNLocator

    if math.floor(high) <= math.ceil(low):
        return [x for x in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= x <= high]
    apart = next(n * 10**k for k in range(20) for n in (1, 2, 5) if (high - low) / (n * 10**k) <= 7)
    return [apart * i for i in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def _heights(low: float, high: float, most: float = math.inf) -> list[float]:
    """Ticks from below `low` to above `high`; they start at 0, unless all values are far from it and differ.

    No tick is above `most`, which no value exceeds.
    """
    from matplotlib.ticker import MaxNLocator

    alike = high - low <= 1e-3 * max(abs(low), abs(high))
    if low >= 0 and (alike or low <= 0.7 * high):
        low, high = 0.0, high or 1.0
    elif alike:
        low, high = 1.1 * low, 0.9 * high
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks if tick <= most]


def _tick(value: float, step: float) -> str:
    """The label of a tick, with enough digits to differ from its neighbours."""
    if abs(value) < step / 1e6:
        return "0"
    if step < 1e-3 or abs(value) >= 1e5:
        digits = math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9) + (not _is_round(step))
        return f"{value:.{max(0, digits)}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(0, math.ceil(-math.log10(step) - 1e-9) + (not _is_round(step)))}f}"


def _is_round(step: float) -> bool:
    """Whether one digit is enough for `step`."""
    lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
    return math.isclose(lead, round(lead))


# Formatting of values.


def _percent(value: float | None, task: str = "classify") -> str:
    """A score in percent: one decimal for COCO's scores and mIoU, as is customary, and two for accuracy."""
    return "-" if value is None else f"{value:.2f} %" if task == "classify" else f"{value:.1f}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _value(value: Any) -> str:
    """A setting as it is written on a command line."""
    return "not set" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


# The command.


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="zoo-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run or an evaluation")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE",
        help=f"page to write; default: <folder>/{REPORT}, or comparison.html for several folders",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the page."""
    cli.begin()
    cli.show_help(parser().print_help, needs_words=arguments is None)
    options = parser().parse_args(arguments)
    with cli.friendly_errors("zoo-report"):
        print(make(options.folders, options.out))


def make(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page of one folder, or of several side by side, and return its path.

    Raises:
        UserError: The folders can't be read or compared, or `out` can't be written.
    """
    start_log(None, True)
    folders = list(dict.fromkeys(folders))
    records = [read(folder) for folder in folders]
    out = out or (folders[0] / REPORT if len(folders) == 1 else Path("comparison.html"))
    _check_out(out)
    write_text(out, page(records[0]) if len(records) == 1 else comparison(records))
    return out


def _check_out(path: Path) -> None:
    """Refuse a path that can't be written, or a file that zoo-report did not write."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file, -o {path / 'comparison.html'}.")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: create it, or give another file with -o.")
    if path.exists():
        with open(path, "rb") as file:
            head = file.read(2000)
        if _GENERATOR.encode() not in head:
            raise UserError(f"{path} exists and is not a page of zoo-report: give another file with -o.")


if __name__ == "__main__":
    main()
