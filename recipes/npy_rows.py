"""A .npy file that grows row by row, for arrays that are larger than the memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np


class NpyRows:
    """A float32 array (N, *shape) in a .npy file to which rows are appended.

    The header counts the rows, and is written after them. So the file can be read at any time, even if the process that
    writes it is killed: `np.load(path, mmap_mode="r")`.

    Args:
        path: The file. If it exists, it is continued after the rows that are whole.
        shape: The shape of a row.

    Raises:
        ValueError: The file holds something else.
        OSError: It can't be read or written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.shape, self.count = shape, 0
        self._bytes = 4 * int(np.prod(shape))
        new = not path.exists() or not path.stat().st_size
        self._file = open(path, "w+b" if new else "r+b")  # noqa: SIM115
        if new:
            self._write_header()
            self._sync()
        else:
            if np.lib.format.read_magic(self._file) != (1, 0):
                raise ValueError("it is a .npy file of another version")
            found, _, dtype = np.lib.format.read_array_header_1_0(self._file)
            if found[1:] != shape or dtype != np.float32:
                raise ValueError(f"it has rows of the shape {found[1:]} and {dtype}, not {shape} and float32")
            whole = (os.fstat(self._file.fileno()).st_size - self._file.tell()) // self._bytes
            self.count = min(found[0], whole)  # a power failure may have left less than the header says
        self._start = self._file.tell()

    def __enter__(self) -> NpyRows:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.count

    def append(self, rows: np.ndarray) -> None:
        """Append rows (n, *shape); when this returns, they are on the disk."""
        self._write_at(self.count, rows)
        self.count += len(rows)
        self._write_header()
        self._sync()

    def replace(self, index: int, row: np.ndarray) -> None:
        """Overwrite a row."""
        self._write_at(index, row[None])
        self._sync()

    def truncate(self, count: int) -> None:
        """Keep the first `count` rows."""
        self.count = min(count, self.count)
        self._write_header()
        self._file.truncate(self._start + self.count * self._bytes)
        self._sync()

    def _write_at(self, index: int, rows: np.ndarray) -> None:
        self._file.seek(self._start + index * self._bytes)
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)

    def _write_header(self) -> None:
        # NumPy pads the header, so that its length does not depend on the number of rows.
        self._file.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
