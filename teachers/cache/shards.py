"""Shard files: rows of one size with their ids, written atomically and verified when read for the first time.

A shard is a file NAME.rows, little-endian:

    magic 8 bytes | n uint64 | CRC-32 of ids and rows uint32 | ids int64 [n] | rows [n]

The checksum starts from the seed of the directory, so a shard that was copied from another directory is invalid. A shard
appears under its name only when it is complete and on disk, and it never changes. So a kill or a full disk leaves no partial
shard. Readers ignore a damaged shard: its rows count as missing, and the next writer deletes it. Readers take no lock; one
writer at a time holds the file `lock`.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import atomic_write, sync_directory

MAGIC = b"\x93EV3shrd"
HEADER = struct.Struct("<8sQI")
GAP = (
    1 << 13
)  # bytes between two rows that are read rather than skipped: a system call costs as much as copying about 8 kB
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLL_S = 0.1  # interval of attempts to take the lock


class ShardDirectory:
    """The shards of a directory, and the place of each row."""

    def __init__(self, directory: Path, *, rows: int, row_bytes: int, seed: bytes):
        """Opens the shards of an existing directory and verifies them.

        Args:
          directory: of the shards.
          rows: number of possible rows; ids are 0 to rows - 1.
          row_bytes: size of a row.
          seed: identifies the directory.
        """
        self._directory, self._row_bytes, self._seed = directory, row_bytes, zlib.crc32(seed)
        self._shard_of = np.full(rows, -1, np.int32)  # index into `_shards` by row; -1 for a missing row
        self._slot_of = np.zeros(rows, np.int64)  # place within the shard by row
        self._shards: list[tuple[Path, int]] = []  # valid shards, and their numbers of rows
        self._seen: set[str] = set()  # names of all shards looked at
        self._invalid: list[Path] = []
        self._damaged = 0  # rows in invalid shards
        self._holds_lock = False
        self._guard = threading.RLock()  # one thread may read while another writes
        self.refresh()

    @property
    def damaged(self) -> int:
        """Number of missing rows that were lost in damaged shards since the directory was opened."""
        return min(self._damaged, int((self._shard_of < 0).sum()))

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """The entries of `rows` [n] that are missing, in their order."""
        return rows[self._shard_of[rows] < 0]

    def refresh(self) -> None:
        """Opens the shards that appeared since the last call."""
        with self._guard:
            for path in sorted(self._directory.glob("*.rows")):
                if path.name not in self._seen:
                    self._open(path)

    def _open(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a writer has just deleted it, because it is damaged
            return
        self._seen.add(path.name)
        ids = self._verified_ids(content)
        if ids is None:
            self._invalid.append(path)
            self._damaged += max(len(content) - HEADER.size, 0) // (8 + self._row_bytes)
        else:
            self._register(path, ids)

    def _register(self, path: Path, ids: np.ndarray) -> None:
        self._slot_of[ids] = np.arange(len(ids))
        self._shard_of[ids] = len(self._shards)
        self._shards.append((path, len(ids)))

    def _verified_ids(self, content: bytes) -> np.ndarray | None:
        """The row ids of a shard; None if it is damaged or belongs to another directory."""
        if len(content) < HEADER.size:
            return None
        magic, count, checksum = HEADER.unpack_from(content)
        if magic != MAGIC or len(content) != HEADER.size + count * (8 + self._row_bytes):
            return None
        if zlib.crc32(memoryview(content)[HEADER.size :], self._seed) != checksum:
            return None
        ids = np.frombuffer(content, "<i8", count, HEADER.size)
        return None if ((ids < 0) | (ids >= len(self._shard_of))).any() else ids

    def read(self, rows: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Reads rows in the order in which they are stored.

        Args:
          rows: ids [n], none of them missing.
          most: largest number of rows to yield at once, at least 1.

        Yields:
          Positions [m] in `rows`, and the bytes of these rows as void [m].
        """
        shards, slots = self._shard_of[rows], self._slot_of[rows]
        order = np.lexsort((slots, shards))
        ends = np.flatnonzero(np.diff(shards[order], append=-1)) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            for first in range(start, end, most):
                group = order[first : min(first + most, end)]
                yield group, self._read_slots(int(shards[group[0]]), slots[group])

    def _read_slots(self, shard: int, slots: np.ndarray) -> np.ndarray:
        """The rows in these slots [m], in rising order, of a shard. Neighbors are read together."""
        path, count = self._shards[shard]
        row = np.dtype((np.void, self._row_bytes))
        rows = np.empty(len(slots), row)
        breaks = np.flatnonzero(np.diff(slots) > 1 + GAP // self._row_bytes) + 1
        try:
            with path.open("rb") as file:
                for first, last in itertools.pairwise([0, *breaks.tolist(), len(slots)]):
                    span = int(slots[last - 1] - slots[first]) + 1
                    file.seek(HEADER.size + 8 * count + self._row_bytes * int(slots[first]))
                    content = file.read(span * self._row_bytes)
                    rows[first:last] = np.frombuffer(content, row, span)[slots[first:last] - slots[first]]
        except (FileNotFoundError, ValueError) as error:  # ValueError: fewer than `span` rows
            raise InputError(
                f"a cache must not change while it is in use; {path} did ({summary(error)}): start again"
            ) from None
        return rows

    @contextlib.contextmanager
    def writing(self, *, done: Callable[[], bool], on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the lock of the directory while the block runs. The operating system releases it if the process dies.

        Args:
          done: whether nothing is left to write; polled while another process writes. If so, the block runs without the lock.
          on_wait: called once if another process holds the lock.

        Raises:
          InputError: the directory is not writable.
        """
        lock = self._open_lock()
        try:
            if self._acquire(lock, done, on_wait):
                self._clean_up()
                self._holds_lock = True
            yield
        finally:
            self._holds_lock = False
            fcntl.flock(lock, fcntl.LOCK_UN)  # explicitly: a child process may have inherited the descriptor
            os.close(lock)

    def _open_lock(self) -> int:
        try:
            return os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise InputError(
                f"new rows need a cache that is writable; got {self._directory} ({error.strerror}): name another directory in "
                "EV3_DISTILL_CACHE"
            ) from None

    def _acquire(self, lock: int, done: Callable[[], bool], on_wait: Callable[[], None]) -> bool:
        """Takes the lock, or returns False as soon as nothing is left to write."""
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not waited:
                    on_wait()
                waited = True
            self.refresh()
            if done():
                return False
            time.sleep(POLL_S)

    def _clean_up(self) -> None:
        """Deletes damaged shards and temporary files of killed writers."""
        with self._guard:
            self.refresh()
            for path in [*self._invalid, *self._directory.glob(".*.rows.*.tmp")]:
                path.unlink(missing_ok=True)
            self._invalid.clear()

    def append(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Writes one shard, completely or not at all. Needs the lock of `writing`.

        Args:
          ids: int64 [n].
          rows: [n], of `row_bytes` each.

        Raises:
          OSError: the disk is full or faulty.
        """
        assert self._holds_lock, "append needs the lock of `writing`"
        body = np.ascontiguousarray(ids, "<i8").tobytes() + np.ascontiguousarray(rows).tobytes()
        path = self._directory / f"{uuid.uuid4().hex}.rows"  # a name is never used again, even after a deletion
        with atomic_write(path) as file:
            file.write(HEADER.pack(MAGIC, len(ids), zlib.crc32(body, self._seed)))
            file.write(body)
        with self._guard:
            self._seen.add(path.name)
            self._register(path, ids)

    def sync(self) -> None:
        """Syncs the names of the shards to disk."""
        sync_directory(self._directory)
