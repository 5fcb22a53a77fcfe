"""A log of chunks: rows of one size in an append-only file that survives kills, torn writes, bit rot and full disks.

A chunk is a header of 32 bytes, the ids of its n rows (int64), and the rows; all little-endian:

    magic 8 bytes | n uint64 | bytes of ids and rows uint64 | CRC-32 of ids and rows uint32 | CRC-32 of the above uint32

Both checksums start from the log's seed, so that a chunk of another log is no chunk of this one. Only what passes its
checksum is ever read. What does not is skipped byte by byte up to the next sound chunk; at the end of the file it is a
torn tail, which the next writer cuts.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ev3_distill.errors import InputError

MAGIC = b"\x93EV3rows"
HEADER = struct.Struct("<8sQQII")
BLOCK = 1 << 20  # bytes read at once
GAP = 1 << 13  # bytes that are read along rather than skipped: a call costs as much as copying some 8 kB
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLL_S = 0.1  # between two looks at a lock that another process holds


class _Header(NamedTuple):
    rows: int
    length: int
    checksum: int


class ChunkLog:
    """The file, and where in it each row lies. Readers take no lock; one writer at a time does."""

    def __init__(self, path: Path, *, rows: int, row_bytes: int, seed: bytes):
        """Opens or makes a log and verifies it.

        Args:
          path: of the file.
          rows: that there may be, ids 0 to rows - 1.
          row_bytes: of each.
          seed: what tells this log's chunks from another's.

        Raises:
          OSError: it cannot be made or read.
        """
        self._path, self._row_bytes, self._seed = path, row_bytes, zlib.crc32(seed)
        self._offset = np.full(rows, -1, np.int64)  # of each row in the file; -1: not there
        self._end = 0  # of the last sound chunk
        self._damaged = self._tail_damaged = 0  # rows before the end, and in whole chunks after it
        self._spans: list[tuple[int, int]] = []  # damaged bytes before the end
        self._writes = self._unsynced = False
        self._guard = threading.RLock()  # a thread may read while another collects
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._file = os.open(path, os.O_RDONLY)  # what another user cached can still be read
        self.refresh()

    def close(self) -> None:
        """Syncs what was written and closes the file."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1

    @property
    def damaged(self) -> int:
        """Rows found in damaged chunks since the log was opened, at most as many as are missing; no torn tail counts."""
        return min(self._damaged + self._tail_damaged, int((self._offset < 0).sum()))

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` [n] that are not there, in their order."""
        return rows[self._offset[rows] < 0]

    def refresh(self) -> None:
        """Takes in what has been appended since, by this or another process."""
        with self._guard:
            self._scan(self._end, os.fstat(self._file).st_size)

    def _scan(self, position: int, end: int) -> None:
        skipped = self._tail_damaged = 0  # rows since the last sound chunk; of these, in whole chunks
        while position < end:
            header = self._header(position, end)
            ids = self._sound_ids(header, position)
            if header is not None and ids is not None:
                self._take_in(ids, header, position, skipped)
                position, skipped = self._end, 0
            else:
                following = self._next_magic(position + 1, end)
                rows = max(following - position - HEADER.size, 0) // (8 + self._row_bytes)
                skipped, self._tail_damaged = skipped + rows, self._tail_damaged + (rows if header else 0)
                position = following

    def _take_in(self, ids: np.ndarray, header: _Header, position: int, skipped: int) -> None:
        """A sound chunk at `position`; what lies between it and the one before is damaged."""
        self._offset[ids] = position + HEADER.size + ids.nbytes + self._row_bytes * np.arange(len(ids))
        if position > self._end:
            self._spans.append((self._end, position))
        self._damaged, self._tail_damaged = self._damaged + skipped, 0
        self._end = position + HEADER.size + header.length

    def _header(self, position: int, end: int) -> _Header | None:
        """That of a chunk which ends within the file."""
        raw = os.pread(self._file, HEADER.size, position)
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            return None
        _, rows, length, checksum, own = HEADER.unpack(raw)
        fits = length == rows * (8 + self._row_bytes) or not rows  # none: a span that `_seal` gave up
        if own != zlib.crc32(raw[:-4], self._seed) or not fits or position + HEADER.size + length > end:
            return None
        return _Header(rows, length, checksum)

    def _sound_ids(self, header: _Header | None, position: int) -> np.ndarray | None:
        """The row ids of a chunk if all of it passes its checksum; reads block by block."""
        if header is None:
            return None
        start = position + HEADER.size
        raw = os.pread(self._file, 8 * header.rows, start)
        left = header.length - len(raw)
        if self._checksum(start + len(raw), left, zlib.crc32(raw, self._seed)) != header.checksum:
            return None
        ids = np.frombuffer(raw, "<i8")
        return None if ((ids < 0) | (ids >= len(self._offset))).any() else ids

    def _checksum(self, position: int, length: int, checksum: int) -> int:
        """Carries a checksum on over bytes of the file, block by block."""
        buffer = memoryview(bytearray(min(BLOCK, length)))
        while length and (got := os.preadv(self._file, [buffer[:length]], position)):
            checksum = zlib.crc32(buffer[:got], checksum)
            position, length = position + got, length - got
        return checksum

    def _next_magic(self, position: int, end: int) -> int:
        """Where the next chunk may begin, or the end."""
        while position < end:
            block = os.pread(self._file, BLOCK, position)
            if (found := block.find(MAGIC)) >= 0:
                return position + found
            if len(block) < len(MAGIC):
                return end
            position += len(block) - len(MAGIC) + 1
        return end

    def read(self, rows: np.ndarray, each: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows in the order in which they lie on disk, with little memory beyond a block.

        Args:
          rows: ids [n] that are there.
          each: rows at once, m; fewer where they fill a block.

        Yields:
          positions [m] in `rows`, and the bytes of these rows as void [m].
        """
        order = np.argsort(self._offset[rows], kind="stable")
        each = max(min(each, BLOCK // self._row_bytes), 1)
        for start in range(0, len(order), each):
            group = order[start : start + each]
            yield group, self._gathered(self._offset[rows[group]])

    def _gathered(self, offsets: np.ndarray) -> np.ndarray:
        """The rows at these rising offsets [m]: neighbours by one call."""
        void = np.dtype((np.void, self._row_bytes))
        rows = np.empty(len(offsets), void)
        apart = np.diff(offsets) > self._row_bytes + GAP
        apart |= np.diff((offsets - offsets[0]) // BLOCK) > 0
        breaks = [0, *(np.flatnonzero(apart) + 1).tolist(), len(offsets)]
        for first, last in itertools.pairwise(breaks):
            start = int(offsets[first])
            span = self._bytes(start, int(offsets[last - 1]) - start + self._row_bytes)
            at_any_byte = np.ndarray(len(span) - self._row_bytes + 1, void, span, strides=(1,))
            rows[first:last] = at_any_byte[offsets[first:last] - start]
        return rows

    def _bytes(self, position: int, count: int) -> bytes:
        read = os.pread(self._file, count, position)
        while len(read) < count:
            if not (more := os.pread(self._file, count - len(read), position + len(read))):
                raise InputError(f"a cache must not be cut while it is in use; {self._path} was: start again")
            read += more
        return read

    @contextlib.contextmanager
    def writing(self, *, done: Callable[[], bool], waiting: Callable[[], None]) -> Iterator[None]:
        """Holds the log for one writer, with all that is in it taken in; the operating system frees it in any case.

        Args:
          done: whether there is nothing left to write; asked while another writes. Then nothing is held.
          waiting: called once if another holds it.

        Raises:
          InputError: this process may not write it.
        """
        lock = self._lock()
        try:
            if self._locked(lock, done, waiting):
                self._cut_tail()
                self._seal()
                self._writes = True
            yield
        finally:
            self._writes = False
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child process of the teacher may hold the descriptor
            os.close(lock)

    def _lock(self) -> int:
        """A descriptor to lock: of another file than the log, whose descriptor child processes share, lock and all."""
        try:
            os.close(os.open(self._path, os.O_RDWR))
            return os.open(self._path.with_name("lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise InputError(
                f"rows are added to a cache that can be written; got {self._path.parent} ({error.strerror}): "
                "name another by EV3_DISTILL_CACHE"
            ) from None

    def _cut_tail(self) -> None:
        """Removes what follows the last sound chunk, looking once more: a chunk that others may have read stays."""
        with self._guard:
            self.refresh()
            os.ftruncate(self._file, self._end)
            self._damaged, self._tail_damaged = self._damaged + self._tail_damaged, 0

    def _seal(self) -> None:
        """Makes damaged spans chunks of no rows, so that the damage is told once."""
        for start, stop in self._spans:
            if stop - start >= HEADER.size:
                length = stop - start - HEADER.size
                checksum = self._checksum(start + HEADER.size, length, self._seed)
                _write(self._file, (self._packed(_Header(0, length, checksum)),), start)
        self._spans = []

    def _packed(self, header: _Header) -> bytes:
        head = HEADER.pack(MAGIC, *header, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head, self._seed))

    def _locked(self, lock: int, done: Callable[[], bool], waiting: Callable[[], None]) -> bool:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
            self.refresh()
            if done():
                return False
            time.sleep(POLL_S)

    def append(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Appends one chunk, wholly or not at all; within `writing`.

        Args:
          ids: int64 [n].
          rows: [n], of `row_bytes` each.

        Raises:
          OSError: no room on the disk, and other faults of it.
        """
        assert self._writes, "append needs the lock of `writing`"
        body = np.ascontiguousarray(ids, "<i8").tobytes() + np.ascontiguousarray(rows).tobytes()
        header = _Header(len(ids), len(body), zlib.crc32(body, self._seed))
        with self._guard:
            self.refresh()  # takes in what an interrupt may have kept from being noted
            try:
                _write(self._file, (self._packed(header), body), self._end)
            except BaseException:
                self._cut_tail()
                raise
            self._unsynced = True
            self._take_in(ids, header, self._end, 0)

    def sync(self) -> None:
        """Forces what was appended to the disk."""
        if self._unsynced:
            os.fsync(self._file)
            self._unsynced = False


def _write(file: int, parts: tuple[bytes, ...], position: int) -> None:
    for part in parts:
        left = memoryview(part)
        while left:
            written = os.pwrite(file, left, position)
            left, position = left[written:], position + written
