"""Cache of rows that are expensive to compute: .npy files that all runs share.

Next to KEY.npy is KEY.json with the checksum of the rows and notes of the code that made them. A file that does not match its
checksum is made again.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ev3_distill.data.sources.dataset import ReadOptions
from ev3_distill.data.sources.row_file import Part, RowFile, in_chunks
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write, cache_root

Notes = dict[str, Any]


class RowWriter:
    """Writes a .npy file of an array [N, ...] whose N is known only at the end."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.reset()

    def reset(self) -> None:
        """Discards all rows."""
        self._file.seek(0)
        self._file.truncate()
        self._digest, self._header, self.rows = hashlib.sha256(), 0, 0
        self.row_shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Appends rows [n, ...]; all must have one shape and type."""
        rows = np.ascontiguousarray(rows)
        if not self._header:
            self.row_shape, self.dtype = rows.shape[1:], rows.dtype
            self._header = self._write_header()
        self._file.write(rows.data)
        self._digest.update(rows.data)
        self.rows += len(rows)

    def finish(self) -> Notes:
        """Writes N into the header; returns what a reader needs to check the rows."""
        self._file.seek(0)
        if self._write_header() != self._header:
            raise AssertionError("NumPy pads a header so that the first axis may grow")
        return {"sha256": self._digest.hexdigest(), "rows": self.rows}

    def _write_header(self) -> int:
        header = {"shape": (self.rows, *self.row_shape), "fortran_order": False, "descr": self.dtype.str}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def load_or_create(
    key: str, create: Callable[[RowWriter], Notes], options: ReadOptions
) -> tuple[np.ndarray | RowFile, Notes]:
    """Loads rows from the cache, and creates them first if they are missing or damaged.

    Args:
      key: hexadecimal; identifies everything that the rows depend on.
      create: writes the rows; returns notes that JSON can represent.
      options: whether the rows fit in memory, and how to warn of damage.

    Returns:
      The rows, in memory or on disk, and the notes.

    Raises:
      InputError: the cache cannot be written.
    """
    path = cache_root() / "decoded" / f"{key}.npy"
    cached = _load(path, options.memory)
    if cached is not None:
        return cached
    if path.exists():
        options.warn(f"{path} is damaged: creating it again")
    with _writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            writer = RowWriter(file)
            notes = {"notes": create(writer)} | writer.finish()
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(notes).encode())
    cached = _load(path, options.memory)
    if cached is None:
        raise InputError(f"{path} must hold what was written to it; got other bytes: check that disk")
    return cached


def _load(path: Path, memory: int) -> tuple[np.ndarray | RowFile, Notes] | None:
    """Loads the rows and notes of an intact file; None if it is missing, incomplete or changed."""
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        rows = row_file(path)
        return _verify(rows, content["sha256"], in_memory=rows.nbytes <= memory), content["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def row_file(path: Path) -> RowFile:
    """The rows of a .npy file in C order.

    Raises:
      OSError, ValueError: the file cannot be read as a .npy file.
    """
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return RowFile((Part(path, file.tell(), shape[0]),), shape[1:], dtype)


def _verify(rows: RowFile, sha256: str, *, in_memory: bool) -> np.ndarray | RowFile:
    """Reads all rows once and checks their checksum; returns them in memory or on disk."""
    array = np.empty(rows.shape, rows.dtype) if in_memory else None
    digest, done = hashlib.sha256(), 0
    for chunk in in_chunks(rows):
        digest.update(chunk.data)
        if array is not None:
            array[done : done + len(chunk)] = chunk
        done += len(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError("the rows do not match their checksum")
    return rows if array is None else array


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turns errors of a full or protected disk into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        raise InputError(
            f"decoded data are cached in {folder}, which needs free space and write permission; got {error.strerror}: free "
            "some space, or name another folder in the environment variable EV3_DISTILL_CACHE"
        ) from None
