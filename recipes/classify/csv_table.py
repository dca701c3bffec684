"""CSV files that name images with their labels and splits, for `data=csv`."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from zoo.messages import UserError, did_you_mean, first_few, nearest, similar_path
from zoo.recipes import early
from zoo.recipes.classify.folders import class_name, natural_key
from zoo.recipes.config import DataConfig
from zoo.recipes.files import SPLIT_FOLDERS, read_text
from zoo.recipes.images import ENDINGS
from zoo.recipes.logs import log

_DELIMITERS = ",;\t|"
_SEPARATORS = "|;,"  # of the labels in a cell
_UNUSED_SPLITS = ("test", "testing")


@dataclass(frozen=True)
class Row:
    """A row of a table: its first line, the path of its image, its labels, and its split as it is written."""

    line: int
    path: str
    labels: tuple[str, ...]
    split: str | None


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file. No image is in two rows of a split.

    Attributes:
        path: The CSV file.
        root: The folder in which relative paths begin.
        multi_label: Whether an image has any number of labels, and not exactly one.
        has_splits: Whether there is a column of splits.
        rows: The rows, in their order.
    """

    path: Path
    root: Path
    multi_label: bool
    has_splits: bool
    rows: list[Row]


class CsvImages(Reader):
    """A reader of the images in rows of a table, for timm's ImageDataset.

    Attributes:
        root: The folder in which relative paths begin.
        samples: Paths with labels, in the order of the rows: the index of a class, or a tuple of them.
    """

    def __init__(self, table: Table, rows: Sequence[Row], classes: Sequence[str]):
        super().__init__()
        self.root = str(table.root)
        index = {class_name(name): i for i, name in enumerate(classes)}
        found = [(row.path, tuple(sorted(index[name] for name in row.labels if name in index))) for row in rows]
        self.samples: list[tuple[str, int | tuple[int, ...]]]
        if table.multi_label:
            self.samples = list(found)
        else:  # a class map may leave classes out
            self.samples = [(path, labels[0]) for path, labels in found if labels]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | tuple[int, ...]]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


def read_table(cfg: DataConfig) -> Table:
    """Read the CSV file that `data.csv` names, and check it.

    Raises:
        UserError: It can't be used; the message names the file, the line, and what to do.
    """
    early.check_csv(cfg.csv)
    path = Path(cfg.csv)
    root = Path(cfg.root) if cfg.root else path.parent
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder: give the one in which the paths in {path} begin.")
    header, records = _records(path, cfg)
    file_column = _column(path, header, cfg.file_column, "file_column")
    label_column, several = _label_column(path, header, cfg)
    split_column = None
    if cfg.split_column and (cfg.split_column != "split" or _places(header, "split")):
        split_column = _column(path, header, cfg.split_column, "split_column")
    separator = _separator(path, records, label_column, cfg) if several else None
    rows = []
    for line, cells in records:
        if not cells[file_column]:
            raise UserError(f"{path}, line {line}: the cell of {header[file_column]!r} is empty: name an image.")
        split = cells[split_column] if split_column is not None else None
        if split == "":
            raise UserError(f"{path}, line {line}: the cell of {header[split_column]!r} is empty: name a split.")
        labels = _labels(path, line, cells[label_column], separator) if several else (class_name(cells[label_column]),)
        if not several and not labels[0]:
            raise UserError(
                f"{path}, line {line}: the cell of {header[label_column]!r} is empty: an image needs a label; images "
                "with none or several need a column 'labels', or data.multi_label=true."
            )
        rows.append(Row(line, _place(root, cells[file_column]), labels, split))
    if not rows:
        raise UserError(f"{path} has a header but no rows: add a row for each image.")
    _check_files_exist(path, root, rows)
    return Table(path, root, several, split_column is not None, _without_duplicates(path, rows, several))


def rows_of_splits(table: Table, cfg: DataConfig) -> tuple[list[Row], list[Row]]:
    """The rows of the training split and of the validation split; all rows are for training if there are no splits.

    Raises:
        UserError: A split is unknown; the message names the line.
    """
    if not table.has_splits:
        return table.rows, []
    known = {name: _split_names(name) for name in (cfg.train_split, cfg.val_split)}
    parts: dict[str, list[Row]] = {cfg.train_split: [], cfg.val_split: []}
    unused: Counter[str] = Counter()
    for row in table.rows:
        # The same split can be for both, if data.same_images allows it.
        chosen = [name for name, names in known.items() if row.split.casefold() in names]
        for name in chosen:
            parts[name].append(row)
        if (
            not chosen
            and row.split.casefold() not in _UNUSED_SPLITS
            and not any(row.split.casefold() in _split_names(name) for name in SPLIT_FOLDERS)
        ):
            raise UserError(
                f"{table.path}, line {row.line}: the split {row.split!r} is unknown: write {cfg.train_split!r}, "
                f"{cfg.val_split!r} or 'test', or name your splits with data.train_split=<name> data.val_split=<name>."
            )
        unused[row.split] += not chosen
    for name, count in unused.items():
        if count:
            log.info("%s: the %d images of the split %r are not used.", table.path, count, name)
    return parts[cfg.train_split], parts[cfg.val_split]


def class_names(rows: Sequence[Row]) -> list[str]:
    """The names of the classes in rows, in natural order (a2 before a10)."""
    return sorted({name for row in rows for name in row.labels}, key=natural_key)


def check_known(table: Table, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Refuse labels that are not in `names`.

    Raises:
        UserError: There is one; the message names its line.
    """
    known = {class_name(name) for name in names}
    unknown = [(row.line, label) for row in rows for label in row.labels if label not in known]
    if unknown:
        line, label = unknown[0]
        close, count = nearest(label, names), len({label for _, label in unknown})
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        more = f", the first of {count} unknown ones" if count > 1 else ""
        raise UserError(
            f"{table.path}, line {line}: the label {label!r} is not one of the {len(names)} training classes"
            f"{hint}{more}: use their names, or list the classes with data.class_map=<file>."
        )


def no_rows(table: Table, split: str, key: str) -> UserError:
    """The error for a table that has splits, but no row of the one that `data.<key>` names."""
    found = list(dict.fromkeys(row.split for row in table.rows if row.split))
    hint = did_you_mean(split, found) or f"it has {first_few(map(repr, found))}."
    return UserError(f"{table.path} has no row of the split {split!r} (data.{key}): {hint}")


# Reading the file.


def _records(path: Path, cfg: DataConfig) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the other lines with their numbers; cells have no spaces around them."""
    if path.is_dir():
        raise UserError(f"data.csv={path} is a folder: give a CSV file.")
    text, first = read_text(path), 0
    delimiter = None
    if told := re.match(r"sep=(.)\n", text):  # a line for Excel
        delimiter, text, first = told[1], text[told.end() :], 1
    if not text.strip():
        raise UserError(f"{path} is empty: its first line has to name the columns, for example file,label.")
    delimiter = delimiter or _delimiter(text, cfg)
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    records = []
    start = 1
    try:
        for cells in reader:
            line, start = first + start, reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = cells
                continue
            if len(cells) < len(header) or any(cells[len(header) :]):
                raise UserError(
                    f"{path}, line {line}, has {_counted(len(cells), 'cell')}, but the header has "
                    f"{_counted(len(header), 'column')}: leave no cell out, and put one that contains "
                    f"{_shown(delimiter)} in double quotes."
                )
            records.append((line, cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {first + start}, can't be read ({error}): check its quotes.") from error
    return header, records


def _delimiter(text: str, cfg: DataConfig) -> str:
    """The delimiter with which the first line has the column of files, or else the most columns."""
    line = next(line for line in text.split("\n") if line.strip())
    headers = {mark: _cells(line, mark) for mark in _DELIMITERS}
    return max(_DELIMITERS, key=lambda mark: (bool(_places(headers[mark], cfg.file_column)), len(headers[mark])))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:
        return []


def _places(header: Sequence[str], name: str) -> list[int]:
    """The columns of this name; in other letters' case, if there is none."""
    exact = [i for i, cell in enumerate(header) if cell == name]
    return exact or [i for i, cell in enumerate(header) if cell.casefold() == name.casefold()]


def _column(path: Path, header: Sequence[str], name: str, key: str) -> int:
    places = _places(header, name)
    if len(places) > 1:
        raise UserError(f"{path}, line 1: {len(places)} columns are named {name!r}: give each its own name.")
    if not places:
        _refuse_missing_header(path, header)
        raise UserError(
            f"{path}, line 1: there is no column {name!r}, but {first_few(map(repr, header), 20)}: name yours with "
            f"data.{key}=<name>."
        )
    return places[0]


def _refuse_missing_header(path: Path, header: Sequence[str]) -> None:
    if any(os.path.splitext(cell)[1].lower() in ENDINGS for cell in header):
        raise UserError(
            f"{path}, line 1, names an image, and no columns: put a header before it, for example file,label or "
            "file,label,split."
        )


def _label_column(path: Path, header: Sequence[str], cfg: DataConfig) -> tuple[int, bool]:
    """The column of labels, and whether its cells hold several."""
    if cfg.label_column:
        place = _column(path, header, cfg.label_column, "label_column")
    else:
        found = [name for name in ("label", "labels") if _places(header, name)]
        if len(found) > 1:
            raise UserError(
                f"{path}, line 1: there are columns 'label' and 'labels': choose one with data.label_column=<name>."
            )
        place = _column(path, header, (found or ["label"])[0], "label_column")
    several = header[place].casefold() == "labels" if cfg.multi_label is None else cfg.multi_label
    return place, several


def _separator(path: Path, records: Sequence[tuple[int, list[str]]], column: int, cfg: DataConfig) -> str | None:
    """What separates the labels in a cell; None if each cell is one label."""
    if cfg.label_separator:
        return cfg.label_separator
    where = {mark: next((line for line, cells in records if mark in cells[column]), 0) for mark in _SEPARATORS}
    found = [mark for mark in _SEPARATORS if where[mark]]
    if len(found) > 1:
        lines = " and ".join(f"{mark!r} (line {where[mark]})" for mark in found)
        raise UserError(
            f"{path}: the labels contain {lines}: say what separates them with data.label_separator=<text>."
        )
    spaced = next((cells[column] for _, cells in records if " " in cells[column]), None)
    if spaced and not found:
        log.info(
            "%s: no label is separated from another by |, ; or a comma, so %r is one label; if spaces separate labels, "
            "set data.label_separator=' '.",
            path,
            spaced,
        )
    return found[0] if found else None


def _labels(path: Path, line: int, cell: str, separator: str | None) -> tuple[str, ...]:
    if cell.startswith("[") and cell.endswith("]"):
        raise UserError(f"{path}, line {line}: the labels {cell} are a list: write them as text, for example cat|dog.")
    parts = cell.split(separator) if separator else [cell]
    return tuple(dict.fromkeys(name for name in map(class_name, parts) if name))


def _place(root: Path, cell: str) -> str:
    path = os.path.join(root, cell)
    if "\\" in cell and not os.path.lexists(path):  # from Windows
        path = os.path.join(root, cell.replace("\\", "/"))
    return os.path.normpath(path)


# Checks.


def _check_files_exist(path: Path, root: Path, rows: Sequence[Row]) -> None:
    missing = [row for row in rows if not os.path.isfile(row.path)]
    if not missing:
        return
    row = missing[0]
    what = f"{row.path} is not a file" if os.path.exists(row.path) else f"{row.path} does not exist"
    stem = next((row.path + ending for ending in sorted(ENDINGS) if os.path.exists(row.path + ending)), None)
    hint = f": did you mean {stem}?" if stem else similar_path(Path(row.path))
    more = ""
    if len(missing) > 1:
        more = f" {len(missing)} of {len(rows)} files are missing; relative paths begin in {root} (data.root)."
    raise UserError(f"{path}, line {row.line}: {what}{hint}{more}")


def _without_duplicates(path: Path, rows: Sequence[Row], several: bool) -> list[Row]:
    """The rows without repetitions; of images with several labels, all rows of one are joined.

    Raises:
        UserError: Two rows give an image different labels.
    """
    kept: dict[tuple[str, str | None], Row] = {}
    joined, repeated = 0, []
    for row in rows:
        key = row.path, row.split
        before = kept.setdefault(key, row)
        if before is row:
            continue
        if set(row.labels) <= set(before.labels):
            repeated.append((row.line, before.line))
        elif several:
            kept[key] = Row(before.line, before.path, (*before.labels, *row.labels), before.split)
            joined += 1
        else:
            raise UserError(
                f"{path}, line {row.line}: {row.path} is {row.labels[0]!r} here and {before.labels[0]!r} in line "
                f"{before.line}: keep one of them; for several labels of an image, use a column 'labels'."
            )
    if repeated:
        line, before_line = repeated[0]
        what = f"line {line} repeats line {before_line}"
        log.warning("%s: %s left out: %s.", path, _counted(len(repeated), "duplicate row"), what)
    if joined:
        log.info("%s: %d rows add labels to images of earlier rows.", path, joined)
    return list(kept.values())


def _split_names(name: str) -> tuple[str, ...]:
    """The names under which a split is known, in lower case."""
    return SPLIT_FOLDERS.get(name, (name.casefold(),))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _shown(delimiter: str) -> str:
    return "tabs" if delimiter == "\t" else repr(delimiter)
