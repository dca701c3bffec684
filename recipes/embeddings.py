"""The folder that `zoo-embed` writes: a table of features that grows by rows and survives any end of its process.

features.npy           the features, a row for each image; readable at any time
names.csv              the image of each row, with the size and the time of the file that was read
embed.json             what the features are: model, weights, preprocessing
features.parquet,      copies of the table in other formats, written at the end
features.safetensors
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TypedDict

import numpy as np

from zoo.messages import UserError, one_line
from zoo.recipes import atomic_files, reading
from zoo.recipes.inputs import as_text
from zoo.recipes.npy_rows import NpyRows

COLUMNS = ("row", "image", "bytes", "mtime_ns")
COPIES = ("parquet", "safetensors")
_CHUNK = 2**24  # bytes of features that are copied at a time


class State(NamedTuple):
    """The size of a file in bytes, and the time of its last change in nanoseconds."""

    bytes: int
    mtime_ns: int


def state_of(path: Path) -> State:
    """The state of a file; raises OSError if there is no such file."""
    status = os.stat(path)
    return State(status.st_size, status.st_mtime_ns)


class _Content(TypedDict):
    """The content of embed.json, which also has what `Table.describe` gets."""

    identity: dict[str, Any]
    shape: list[int]
    folder: str


@dataclass(slots=True)
class _Line:
    image: str
    state: State


class Table:
    """The features in a folder, which this process has locked; a context manager.

    A row of features is on the disk before its line in names.csv, and only rows with a line count. So a process that
    is killed loses the last batch at most, and leaves no row without a name and no name without a row.

    Args:
        folder: The folder.
        identity: What determines the features of an image; a folder has features of one kind.
        shape: The shape of the features of an image.

    Raises:
        UserError: The folder holds other features, or files that `zoo-embed` has not written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        self._about: dict[str, Any] = {"identity": identity, "shape": list(shape), "folder": os.getcwd()}
        known = self._check_same(identity, shape)
        self._lines = self._read_lines()
        if not known:
            self.describe({})  # first of all, as the other files are refused without it
        try:
            self._rows = NpyRows(folder / "features.npy", shape)
        except ValueError as error:
            raise UserError(f"{folder / 'features.npy'} can't be continued ({error}): {_OTHER}.") from error
        # What was being written when a process ended is dropped.
        del self._lines[len(self._rows) :]
        self._rows.truncate(len(self._lines))
        self._write_lines()
        self._csv = open(folder / "names.csv", "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._changed = False  # whether lines other than the last ones have changed
        self._places: dict[str, int] = {}
        for row, line in enumerate(self._lines):
            # A relative name is that of the folder in which the command ran, which may have moved together with it.
            self._places.setdefault(os.path.abspath(line.image), row)
            self._places.setdefault(os.path.abspath(os.path.join(self._about["folder"], line.image)), row)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._csv.close()
        self._rows.__exit__(kind, error, trace)
        if self._changed:
            self._write_lines()

    def __len__(self) -> int:
        return len(self._lines)

    def state(self, image: Path) -> State | None:
        """The state of the file from which the features of an image are; None if the table does not have it."""
        row = self._places.get(os.path.abspath(as_text(image)))
        return None if row is None else self._lines[row].state

    def add(self, images: Sequence[Path], states: Sequence[State], features: np.ndarray) -> None:
        """Add the features of images, or replace those that the table has.

        Args:
            images: n files.
            states: Their states before they were read.
            features: (n, *shape), float32.

        Raises:
            UserError: The files can't be written; what they had before is kept.
        """
        try:
            self._add(images, states, features)
        except OSError as error:
            raise UserError(
                f"could not write to {self.folder}: {error.strerror}; the features before are kept. Fix that and start "
                "the same command again."
            ) from error

    def _add(self, images: Sequence[Path], states: Sequence[State], features: np.ndarray) -> None:
        new = []
        for number, (image, state) in enumerate(zip(images, states, strict=True)):
            row = self._places.get(os.path.abspath(as_text(image)))
            if row is None:
                new.append(number)
            else:  # its line is written at the end: until then, it is one of a file that has changed
                self._rows.replace(row, features[number])
                self._lines[row].state, self._changed = state, True
        self._rows.append(features[new])
        writer = csv.writer(self._csv, lineterminator="\n")
        here = os.getcwd() == self._about["folder"]  # the one of the relative names
        for number in new:
            name = as_text(images[number] if here else os.path.abspath(images[number]))
            self._places[os.path.abspath(name)] = len(self._lines)
            writer.writerow([len(self._lines), name, *states[number]])
            self._lines.append(_Line(name, states[number]))
        self._csv.flush()

    def describe(self, about: dict[str, Any]) -> None:
        """Write embed.json, with `about` besides what the features are."""
        atomic_files.write_json(self.folder / "embed.json", {**about, "images": len(self), **self._about})

    def copy(self, format: str) -> None:
        """Write the whole table to features.parquet or features.safetensors, a part at a time.

        Parquet has the columns `image` and `features`, a list of as many numbers as an image has, and the metadata
        `shape`; safetensors has a tensor `features`, whose rows are those of names.csv.
        """
        with atomic_files.atomic(self.folder / f"features.{format}") as file:
            if format == "parquet":
                self._write_parquet(file)
            else:
                self._write_safetensors(file)

    def copies(self) -> list[str]:
        """The formats of which the folder has a copy of the table."""
        return [format for format in COPIES if (self.folder / f"features.{format}").exists()]

    # Reading what is there.

    def _check_same(self, identity: dict[str, Any], shape: tuple[int, ...]) -> bool:
        """Whether the folder has features, which are then of the same kind."""
        path = self.folder / "embed.json"
        found = reading.load(path, _Content)
        if found is None:
            there = [name for name in ("features.npy", "names.csv") if os.path.lexists(self.folder / name)]
            if there:
                raise UserError(f"{self.folder / there[0]} exists, but no embed.json says what it is: {_OTHER}.")
            return False
        for key, value in {**identity, "shape": list(shape)}.items():
            then = found["shape"] if key == "shape" else found["identity"].get(key)
            if then != value:
                if isinstance(then, dict) and isinstance(value, dict):
                    key = next(name for name in {**then, **value} if then.get(name) != value.get(name))
                    then, value = then.get(key), value.get(key)
                raise UserError(f"{self.folder} was written with {key}={_shown(then)}, not {_shown(value)}: {_OTHER}.")
        self._about["folder"] = found["folder"]
        return True

    def _read_lines(self) -> list[_Line]:
        path = self.folder / "names.csv"
        if not path.exists():
            return []
        text = path.read_bytes().decode("utf-8", "replace").rstrip("\0")  # which a power failure can leave
        lines: list[_Line] = []
        number = 0
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
            if rows and (not text.endswith("\n") or len(rows[-1]) != len(COLUMNS)):
                rows.pop()  # the process ended before it had written the whole line
            for number, row in enumerate(rows):
                if number == 0:
                    if tuple(row) != COLUMNS:
                        raise ValueError
                    continue
                place, name, size, time = row
                if int(place) != len(lines):
                    raise ValueError
                lines.append(_Line(name, State(int(size), int(time))))
        except (ValueError, csv.Error) as error:
            where = f"row {number - 1}" if number else "its first line"
            raise UserError(f"{path} is not as zoo-embed wrote it ({where}): restore it, or {_OTHER}.") from error
        return lines

    # Writing.

    def _write_lines(self) -> None:
        with atomic_files.atomic(self.folder / "names.csv") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((row, line.image, *line.state) for row, line in enumerate(self._lines))
            text.flush()
            text.detach()  # `atomic` closes the file

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rows in parts, each with the number of its first row."""
        values = np.load(self.folder / "features.npy", mmap_mode="r")
        size = max(1, _CHUNK // (4 * int(np.prod(self.shape))))
        for start in range(0, len(self), size):
            yield start, np.array(values[start : start + size])

    def _write_parquet(self, file: BinaryIO) -> None:
        import pyarrow
        from pyarrow import parquet

        numbers = pyarrow.list_(pyarrow.float32(), int(np.prod(self.shape)))
        schema = pyarrow.schema(
            [("image", pyarrow.string()), ("features", numbers)], {"shape": json.dumps(list(self.shape))}
        )
        with parquet.ParquetWriter(file, schema) as writer:
            for start, part in self._chunks():
                names = [line.image for line in self._lines[start : start + len(part)]]
                lists = pyarrow.FixedSizeListArray.from_arrays(part.reshape(-1), type=numbers)
                writer.write_table(pyarrow.table([pyarrow.array(names), lists], schema=schema))

    def _write_safetensors(self, file: BinaryIO) -> None:
        # The package would need the whole tensor in memory. A file is a JSON header with its length, and the numbers.
        size = 4 * len(self) * int(np.prod(self.shape))
        tensor = {"dtype": "F32", "shape": [len(self), *self.shape], "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"names": "names.csv"}, "features": tensor}).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        for _, part in self._chunks():
            file.write(part.astype("<f4", copy=False).data)


_OTHER = "choose another output folder"


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a hash
        return f"{value[:12]}..."
    return one_line(json.dumps(value, ensure_ascii=False))
