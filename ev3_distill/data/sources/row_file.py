"""An array on disk whose rows are read on access.

Uses `os.pread` rather than a memory map: pages that were read do not count as resident memory, so a memory limit holds.
"""

import dataclasses
import itertools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError

_CHUNK = 8 << 20  # bytes read at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive rows in a file."""

    path: Path
    offset: int  # of the first row, in bytes
    rows: int


class RowFile:
    """An array [N, ...] on disk, in C order; indexing reads rows.

    Takes the indices that NumPy takes on the first axis: an integer, a slice, integers [B] in any order, or booleans [N].
    Threads may share it. It can be pickled; the copy opens the files itself.
    """

    def __init__(self, parts: tuple[Part, ...], row_shape: tuple[int, ...], dtype: np.dtype):
        """Opens the files.

        Args:
          parts: of the rows, in order; at least one.
          row_shape: of one row, [...].
          dtype: of the numbers on disk.

        Raises:
          InputError: a file is too short for its rows.
        """
        self.parts = tuple(dataclasses.replace(part, path=part.path.absolute()) for part in parts)
        self.dtype = np.dtype(dtype)
        self.shape = (sum(part.rows for part in parts), *row_shape)
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        self._files = [_open(self, part.path) for part in parts]
        self._ends = list(itertools.accumulate(part.rows for part in parts))
        for part, file in zip(parts, self._files, strict=True):
            if os.fstat(file).st_size < part.offset + part.rows * self._row_bytes:
                raise _too_short(part.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parts, self.shape[1:], self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes, including that of the rows."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return len(self) * self._row_bytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows on disk cannot become an array without a copy")
        return self[:] if dtype is None else self[:].astype(dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._slice(start, max(start, stop))
            key = np.arange(start, stop, step)
        rows = self._row_numbers(np.asarray(key))
        return self._gather(rows.ravel()).reshape(*rows.shape, *self.shape[1:])

    def _row_numbers(self, key: np.ndarray) -> np.ndarray:
        """Converts an index, which may have negative numbers or booleans, to row numbers from 0 to N-1."""
        if key.dtype == bool and key.shape == self.shape[:1]:
            return np.flatnonzero(key)
        if key.size and key.dtype.kind not in "iu":
            raise IndexError(f"an index is integers, a slice or booleans [{len(self)}]; got {key.dtype} {key.shape}")
        rows = key.astype(np.int64)
        if key.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows[(rows < -len(self)) | (rows >= len(self))][0]} of {len(self)} rows")
        return np.where(rows < 0, rows + len(self), rows)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Reads neighboring rows at once, in the order of the file, and returns rows in the requested order."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not out.size:
            return out
        content, size = _bytes_of(out), self._row_bytes
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        jumps = np.flatnonzero(np.diff(ascending) > 1) + 1
        for low, high in itertools.pairwise([0, *jumps.tolist(), len(rows)]):
            first = int(ascending[low])
            if high == low + 1:
                place = int(order[low]) * size
                self._read(first, content[place : place + size])
            else:
                block = self._slice(first, int(ascending[high - 1]) + 1)
                out[order[low:high]] = block[ascending[low:high] - first]
        return out

    def _slice(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        if out.size:
            self._read(start, _bytes_of(out))
        return out

    def _read(self, row: int, out: memoryview) -> None:
        """Fills a buffer with the rows from `row` on, across parts."""
        for part, file, end in zip(self.parts, self._files, self._ends, strict=True):
            if row < end and out.nbytes:
                size = min(out.nbytes, (end - row) * self._row_bytes)
                _fill(file, part.offset + (row - end + part.rows) * self._row_bytes, out[:size], part.path)
                out, row = out[size:], end


def in_chunks(array: np.ndarray | RowFile, chunk_bytes: int = _CHUNK) -> Iterator[np.ndarray]:
    """Yields consecutive rows of an array [N, ...], a few MB at a time."""
    rows = max(1, chunk_bytes * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _open(owner: object, path: Path) -> int:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    weakref.finalize(owner, os.close, file)
    return file


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.data.cast("B")


def _fill(file: int, offset: int, out: memoryview, path: Path) -> None:
    done = 0
    while done < out.nbytes:
        piece = os.pread(file, min(out.nbytes - done, _CHUNK), offset + done)
        if not piece:
            raise _too_short(path)
        out[done : done + len(piece)] = piece
        done += len(piece)


def _too_short(path: Path) -> InputError:
    return InputError(f"{path} must not change while it is read; got a shorter file: run again")
