"""Rows that cost time to make, made once: kept as .npy files in the cache that all runs share.

Beside KEY.npy lies KEY.json: the checksum of its rows, and notes of whoever made them. A file that does not match is made
anew.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ev3_distill.data.sources.dataset import Reading
from ev3_distill.data.sources.row_file import Part, RowFile, in_chunks
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write, cache_root

Notes = dict[str, Any]


class RowWriter:
    """Writes an array [N, ...] whose N is known at the end."""

    def __init__(self, file: BinaryIO):
        """Begins a .npy file."""
        self._file = file
        self.begin()

    def begin(self) -> None:
        """Drops all rows, if there are any."""
        self._file.seek(0)
        self._file.truncate()
        self._digest, self._header, self.rows = hashlib.sha256(), 0, 0
        self.row_shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Appends rows [n, ...], all of one shape and type."""
        rows = np.ascontiguousarray(rows)
        if not self._header:
            self.row_shape, self.dtype = rows.shape[1:], rows.dtype
            self._header = self._write_header()
        self._file.write(rows.data)
        self._digest.update(rows.data)
        self.rows += len(rows)

    def finish(self) -> Notes:
        """Puts N into the header; returns what a reader needs to check the rows."""
        self._file.seek(0)
        if self._write_header() != self._header:
            raise AssertionError("NumPy leaves room in a header for a longer first axis")
        return {"sha256": self._digest.hexdigest(), "rows": self.rows}

    def _write_header(self) -> int:
        about = {"shape": (self.rows, *self.row_shape), "fortran_order": False, "descr": self.dtype.str}
        np.lib.format.write_array_header_1_0(self._file, about)
        return self._file.tell()


def cached(key: str, make: Callable[[RowWriter], Notes], reading: Reading) -> tuple[np.ndarray | RowFile, Notes]:
    """Rows from the cache, made if they are not there or damaged.

    Args:
      key: hexadecimal; names all that the rows follow from.
      make: writes the rows, returns notes that JSON can hold.
      reading: where the rows shall be, and who hears of damage.

    Returns:
      The rows, in memory or on disk, and the notes.

    Raises:
      InputError: the cache cannot be written.
    """
    path = cache_root() / "decoded" / f"{key}.npy"
    found = _read(path, reading.memory)
    if found is not None:
        return found
    if path.exists():
        reading.warn(f"{path} is damaged: made anew")
    with _room_on_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            writer = RowWriter(file)
            notes = {"notes": make(writer)} | writer.finish()
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(notes).encode())
    found = _read(path, reading.memory)
    if found is None:
        raise InputError(f"{path} must hold what was written to it; got other bytes: check that disk")
    return found


def _read(path: Path, memory: int) -> tuple[np.ndarray | RowFile, Notes] | None:
    """The rows and notes of a file that is whole."""
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        rows = row_file(path)
        return _checked(rows, about["sha256"], in_memory=rows.nbytes <= memory), about["notes"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut short or changed
        return None


def row_file(path: Path) -> RowFile:
    """The rows of a .npy file in C order.

    Raises:
      OSError, ValueError: it cannot be read as one.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return RowFile((Part(path, file.tell(), shape[0]),), shape[1:], dtype)


def _checked(rows: RowFile, sha256: str, *, in_memory: bool) -> np.ndarray | RowFile:
    """The rows, read once from end to end."""
    kept = np.empty(rows.shape, rows.dtype) if in_memory else None
    digest, done = hashlib.sha256(), 0
    for chunk in in_chunks(rows):
        digest.update(chunk.data)
        if kept is not None:
            kept[done : done + len(chunk)] = chunk
        done += len(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError("the rows do not match their checksum")
    return rows if kept is None else kept


@contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        raise InputError(
            f"decoded data are kept in {folder}, which needs room and leave to write; got {error.strerror}: free some, or "
            "name another folder in the environment variable EV3_DISTILL_CACHE"
        ) from None
