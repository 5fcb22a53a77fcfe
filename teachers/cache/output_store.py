"""Logits, run once: a teacher's outputs on rows of a data set, kept by content and shared between runs.

A store is a directory, named by the SHA-256 of what its rows depend on:

    meta.json   that content in plain text
    rows.log    the rows, see teachers.chunks and teachers.encoding
    lock        held by the process that runs the teacher

A row once appended is never changed. A kill loses at most the chunk in the making, some seconds of work.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import atomic_write, cache_root
from ev3_distill.teachers.cache.append_log import BLOCK, FULL_DISK, ChunkLog
from ev3_distill.teachers.cache.codec import Encoding

FORMAT = 1
CHUNK_ROWS = 2048
CHUNK_BYTES = 8 << 20  # rows with large features go into chunks of fewer
FLUSH_S = 5.0  # a slow teacher's rows are appended at least this often, in smaller chunks
SYNC_S = 5.0  # between two syncs; a crash of the machine loses no more

Outputs = Mapping[str, np.ndarray]
TeacherOutputs = Callable[[np.ndarray], Outputs]  # inputs [B, ...] -> logits [B, K], features [B, ...]
PixelsOf = Callable[[np.ndarray], np.ndarray]  # rows [B] -> inputs [B, ...]
Tell = Callable[[int, int], None]  # rows done, rows in all


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the rows of a store are."""

    teacher: str  # digest of all that its outputs depend on
    data: str  # fingerprint of the data set
    rows: int  # of the data set
    fields: Mapping[str, tuple[int, ...]]  # shape of one row: logits (K,), any other is a feature
    view: Any = "clean"  # plain data that name the pixels, such as {"augment": "flip,crop=4", "seed": 0, "view": 3}
    precision: str = "float32"  # or float16, or top<k>
    teacher_source: str = ""  # as the user named them: told, but no part of the identity
    data_source: str = ""

    def key(self) -> str:
        """The SHA-256 of teacher, data, view, precision and the format, in hexadecimal."""
        parts = {"teacher": self.teacher, "data": self.data, "view": self.view, "precision": self.precision}
        text = json.dumps({**parts, "format": FORMAT}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def meta(self) -> dict[str, Any]:
        """All of it as plain data."""
        fields = {name: list(shape) for name, shape in self.fields.items()}
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {**given, "fields": fields, "num_classes": fields["logits"][0], "format": FORMAT}
        return dict(json.loads(json.dumps(plain)))


class LogitStore:
    """The cached rows of one teacher on one view of a data set. A context manager."""

    def __init__(self, contents: Contents, *, root: Path | None = None, warn: Callable[[str], None] | None = None):
        """Opens a store, made where there is none, and verifies all that it holds.

        Args:
          contents: what it must hold.
          root: of all stores; by default `logits` in the cache.
          warn: gets a line if rows are damaged; they count as missing.

        Raises:
          InputError: it holds something else, or cannot be made or read.
          OSError: the disk is full.
        """
        self.contents, self.encoding = contents, Encoding(contents.precision, contents.fields)
        self.directory = (root or cache_root() / "logits") / contents.key()
        self._warn, self._warned, self._synced = warn, 0, time.monotonic()
        try:
            self._check_meta()
            self._log = ChunkLog(
                self.directory / "rows.log",
                rows=contents.rows,
                row_bytes=self.encoding.dtype.itemsize,
                seed=contents.key().encode(),
            )
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise InputError(
                f"a cache needs a directory that it can make and write; got {self.directory} ({error.strerror}): "
                "name another by EV3_DISTILL_CACHE"
            ) from None
        self._tell_damage()

    def _check_meta(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path, wanted = self.directory / "meta.json", self.contents.meta()
        if not path.exists():
            with atomic_write(path) as file:
                file.write(json.dumps(wanted, indent=1).encode() + b"\n")
            return
        try:
            found = json.loads(path.read_bytes())
            differ = [name for name in wanted if found.get(name) != wanted[name]]
        except (ValueError, AttributeError):
            found, differ = {}, ["what can be read"]
        differ = [name for name in differ if not name.endswith("_source")]
        if differ:
            name = differ[0]
            raise InputError(
                f"{self.directory} must hold logits of {name} {wanted.get(name, '')}; got {found.get(name)}: the cache is "
                "stale or another's, delete that directory or name another by EV3_DISTILL_CACHE"
            )

    def __enter__(self) -> "LogitStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Syncs what was appended, and closes the files."""
        self._log.close()

    @property
    def damaged(self) -> int:
        """Rows that were lost to damage, as found since the store was opened; they count as missing."""
        return self._log.damaged

    def _tell_damage(self) -> None:
        if self._warn is not None and self.damaged > self._warned:
            self._warn(
                f"{self.damaged - self._warned:,} rows of {self.directory} are damaged: the teacher runs on them anew"
            )
        self._warned = max(self._warned, self.damaged)

    def missing(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Those of `rows` that are not cached yet, each once, in their order; looks at what other processes appended.

        Raises:
          InputError: a row that the data set does not have.
        """
        rows = self._ids(rows)
        missing = self._log.missing(rows)
        if len(missing):
            self._log.refresh()
            missing = self._log.missing(rows)
        return missing[np.sort(np.unique(missing, return_index=True)[1])]

    def _ids(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        ids = np.asarray(rows, np.int64).reshape(-1)
        outside = (ids < 0) | (ids >= self.contents.rows)
        if outside.any():
            raise InputError(
                f"rows of a data set of {self.contents.rows} are 0 to {self.contents.rows - 1}; "
                f"got {ids[outside.argmax()]}: name others"
            )
        return ids

    def read(self, rows: np.ndarray | Sequence[int]) -> dict[str, np.ndarray]:
        """The outputs on rows, in any order and with repeats.

        Args:
          rows: [n].

        Returns:
          By field, [n, ...] float32.

        Raises:
          InputError: a row is not cached.
        """
        rows = self._ids(rows)
        out = {name: np.empty((len(rows), *shape), np.float32) for name, shape in self.encoding.fields.items()}
        for positions, records in self._records(rows):
            for name, values in self.encoding.decode(records).items():
                out[name][positions] = values
        return out

    def _records(self, rows: np.ndarray) -> Any:
        if len(missing := self.missing(rows)):
            raise InputError(
                f"rows must be cached before they are read; got {len(missing)} that are not in {self.directory}, the "
                f"first {missing[0]}: run the teacher on them first"
            )
        dense = 4 * sum(math.prod(shape) for shape in self.encoding.fields.values())  # bytes of a row once decoded
        for positions, void in self._log.read(rows, BLOCK // dense):
            yield positions, void.view(self.encoding.dtype)

    def _append(self, rows: np.ndarray, records: np.ndarray) -> None:
        self._log.append(rows, records)
        if time.monotonic() - self._synced >= SYNC_S:
            self._log.sync()
            self._synced = time.monotonic()


class _Pending:
    """Records that wait to become a chunk."""

    def __init__(self, store: LogitStore):
        self._store = store
        self._limit = max(min(CHUNK_ROWS, CHUNK_BYTES // store.encoding.dtype.itemsize), 1)
        self._clear()

    def _clear(self) -> None:
        self._rows: list[np.ndarray] = []
        self._records: list[np.ndarray] = []
        self._flushed = time.monotonic()

    def add(self, rows: np.ndarray, outputs: Outputs) -> None:
        """Takes the outputs on `rows` [b], those before a faulty one in any case.

        Raises:
          InputError: outputs of another form, or a row of which no record can be made.
        """
        encoding = self._store.encoding
        arrays = encoding.arrays(outputs, len(rows))
        fault = encoding.fault(arrays)
        kept = len(rows) if fault is None else fault[0]
        if kept:
            self._rows.append(rows[:kept])
            self._records.append(encoding.encode({name: array[:kept] for name, array in arrays.items()}))
        if fault is not None:
            raise InputError(f"{fault[1]} in row {rows[kept]}: check the teacher and its input scale")
        if sum(map(len, self._rows)) >= self._limit or time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Makes them a chunk, or drops them if that fails."""
        rows, records = self._rows, self._records
        self._clear()
        if rows:
            self._store._append(np.concatenate(rows), np.concatenate(records))


def collect(
    teacher_outputs: TeacherOutputs,
    pixels_of: PixelsOf,
    rows: np.ndarray | Sequence[int],
    store: LogitStore,
    *,
    batch_size: int,
    tell: Tell | None = None,
    waiting: Callable[[str], None] | None = None,
) -> None:
    """Runs a teacher on those rows that a store does not have yet.

    Whatever ends it, what the teacher gave before is kept, and the next call goes on from there.

    Args:
      teacher_outputs: inputs [b, ...] to logits [b, K] and features [b, ...].
      pixels_of: rows [b] to these inputs.
      rows: [n] of the data set.
      store: gets the outputs.
      batch_size: b; the last batch may be smaller.
      tell: gets the number of distinct `rows` that the store has, and of all, before and after each batch.
      waiting: gets a line if another process runs the teacher for this store: this one waits for it.

    Raises:
      InputError: the teacher fails on a row, or gives something else than finite numbers of the store's shapes.
      OSError: the disk is full, and other faults of it.
    """
    total = len(np.unique(np.asarray(rows)))
    tell = tell or (lambda done, total: None)
    line = f"another process runs this teacher for {store.directory}: waiting for it"
    if not len(store.missing(rows)):
        tell(total, total)
        return
    with store._log.writing(
        done=lambda: not len(store.missing(rows)), waiting=lambda: waiting(line) if waiting else None
    ):
        store._tell_damage()
        todo = store.missing(rows)
        done = total - len(todo)
        tell(done, total)
        pending = _Pending(store)
        try:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                _run(teacher_outputs, pixels_of(batch), batch, pending.add)
                tell(done + start + len(batch), total)
        finally:
            pending.flush()


def _run(
    teacher_outputs: TeacherOutputs,
    inputs: np.ndarray,
    rows: np.ndarray,
    keep: Callable[[np.ndarray, Outputs], None],
) -> None:
    """Runs the teacher on one batch; where it fails, on parts of it, to keep what it can and name the row at fault."""
    try:
        outputs = teacher_outputs(inputs)
    except Exception as raised:
        error, failed = raised, (0, len(rows))
    else:
        keep(rows, outputs)
        return
    first, last = failed
    while first < last and (last - first > 1 or (first, last) != failed):
        middle = (first + last + 1) // 2
        try:
            outputs = teacher_outputs(inputs[first:middle])
        except Exception as raised:
            error, failed, last = raised, (first, middle), middle
        else:
            keep(rows[first:middle], outputs)
            first = middle
    raise _blame(error, rows[slice(*failed)]) from error


def _blame(error: Exception, rows: np.ndarray) -> InputError:
    """The error of a teacher that fails on one row, or on several only when they come together."""
    where = f"row {rows[0]}"
    if len(rows) > 1:
        where = f"{len(rows)} rows together, {rows[0]} to {rows[-1]}, though on none of them alone"
    if isinstance(error, InputError):
        return InputError(f"on {where}: {error} (what the teacher gave before is kept)")
    reason = summary(error)
    return InputError(
        f"a teacher must give outputs on every example; got {reason} on {where}: fix the teacher or its input; "
        "what it gave before is kept"
    )


def verify(
    teacher_outputs: TeacherOutputs,
    pixels_of: PixelsOf,
    store: LogitStore,
    rows: np.ndarray | Sequence[int],
    *,
    n: int = 16,
    tolerance: float | None = None,
    seed: int | None = None,
) -> None:
    """Runs the teacher again on a few cached rows and compares: a teacher may depend on what its digest cannot see.

    Args:
      teacher_outputs: as of `collect`.
      pixels_of: as of `collect`.
      store: to check.
      rows: to draw from; those that are not cached are left out.
      n: rows to draw.
      tolerance: of the largest difference within a row, relative to the row's largest magnitude; by default
        1e-4 in float32, 2e-3 in float16 and top k, where the residual mass is compared too.
      seed: of the draw; by default another one each time.

    Raises:
      InputError: a row differs, or the teacher fails.
    """
    cached = np.setdiff1d(np.asarray(rows, np.int64), store.missing(rows))
    if not min(n, len(cached)):
        return
    drawn = np.sort(np.random.default_rng(seed).choice(cached, min(n, len(cached)), replace=False))
    arrays: dict[str, np.ndarray] = {}
    _run(
        teacher_outputs,
        pixels_of(drawn),
        drawn,
        lambda rows, given: arrays.update(store.encoding.arrays(given, len(rows))),
    )
    tolerance = store.encoding.tolerance if tolerance is None else tolerance
    for positions, records in store._records(drawn):
        found = store.encoding.difference(records, {name: array[positions] for name, array in arrays.items()})
        if found.max() > tolerance:
            raise InputError(
                f"cached logits must be what the teacher gives now, within {tolerance:g}; got a difference of "
                f"{found.max():.2g} in row {drawn[positions[found.argmax()]]}: the cache is stale, delete {store.directory}"
                " or name another by EV3_DISTILL_CACHE"
            )
