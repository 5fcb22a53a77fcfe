"""Cached teacher outputs: each teacher runs once on each view of each example, and all runs share the outputs.

A store is a directory that is named by the SHA-256 of everything its rows depend on:

    meta.json    those dependencies in plain text
    NAME.rows    the rows, in shards; see `shards.py` and `codec.py`
    lock         held by the process that runs the teacher

A stored row never changes. A kill loses at most the rows of the shard in progress, some seconds of work.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import atomic_write, cache_root
from ev3_distill.teachers.cache.codec import CODECS
from ev3_distill.teachers.cache.shards import FULL_DISK, ShardDirectory

FORMAT = 2  # part of the key: outputs in another format are computed again
SHARD_ROWS = 2048  # most rows of a shard
SHARD_BYTES = 8 << 20  # most bytes of a shard; with large features it has fewer rows
FLUSH_S = 5.0  # longest time that rows stay in memory; a slow teacher fills smaller shards
READ_BYTES = 1 << 20  # most bytes of decoded rows in memory besides the result
SPOT_CHECK_ROWS = 16  # cached rows that the teacher computes again when a store is opened

Outputs = Mapping[str, np.ndarray]
TeacherOutputs = Callable[[np.ndarray], Outputs]  # inputs [B, ...] -> arrays [B, ...] by name
InputsOf = Callable[[np.ndarray], np.ndarray]  # rows [B] -> inputs [B, ...]
OnProgress = Callable[[int, int], None]  # rows done, rows in total


@dataclasses.dataclass(frozen=True)
class Contents:
    """Identity of a store: whose outputs it holds, on which inputs, in which precision.

    Attributes:
      teacher: digest of everything the teacher's outputs depend on.
      data: fingerprint of the data set.
      rows: examples in the data set.
      fields: shape of one example's output by name.
      view: plain data that identify the inputs, such as {"augment": "flip,crop=4", "seed": 0, "view": 3}.
      precision: of the stored outputs, as the codec defines it.
      codec: name of a codec in `codec.py`.
      teacher_source: the teacher as the user named it; for information, not part of the key.
      data_source: the data set as the user named it; likewise.
    """

    teacher: str
    data: str
    rows: int
    fields: Mapping[str, tuple[int, ...]]
    view: Any = "clean"
    precision: str = "float32"
    codec: str = "logits"
    teacher_source: str = ""
    data_source: str = ""

    def key(self) -> str:
        """SHA-256 of teacher, data, view, precision, codec and format, in hexadecimal."""
        parts = {name: getattr(self, name) for name in ("teacher", "data", "view", "precision", "codec")}
        text = json.dumps({**parts, "format": FORMAT}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def meta(self) -> dict[str, Any]:
        """All attributes as plain data."""
        fields = {name: list(shape) for name, shape in self.fields.items()}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {**values, "fields": fields, "format": FORMAT}
        return dict(json.loads(json.dumps(plain)))


class OutputStore:
    """Cached outputs of one teacher on one view of a data set. A context manager."""

    def __init__(self, contents: Contents, *, root: Path | None = None, warn: Callable[[str], None] | None = None):
        """Opens or creates a store and verifies its rows.

        Args:
          contents: identity of the store.
          root: directory of all stores; by default `logits` in the cache.
          warn: called with a message if rows are damaged. They count as missing.

        Raises:
          InputError: the directory belongs to another store, or cannot be created or read.
          OSError: the disk is full.
        """
        self.contents, self.codec = contents, CODECS[contents.codec](contents.precision, contents.fields)
        self.directory = (root or cache_root() / "logits") / contents.key()
        self._warn, self._reported_damage = warn, 0
        try:
            self._check_meta()
            self._shards = ShardDirectory(
                self.directory,
                rows=contents.rows,
                row_bytes=self.codec.dtype.itemsize,
                seed=contents.key().encode(),
            )
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise InputError(
                f"a cache needs a directory that it can create and write; got {self.directory} ({error.strerror}): "
                "name another in EV3_DISTILL_CACHE"
            ) from None
        self._report_damage()

    def _check_meta(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path, expected = self.directory / "meta.json", self.contents.meta()
        if not path.exists():
            with atomic_write(path) as file:
                file.write(json.dumps(expected, indent=1).encode() + b"\n")
            return
        try:
            meta = json.loads(path.read_bytes())
            different = [name for name in expected if meta.get(name) != expected[name]]
        except (ValueError, AttributeError):
            meta, different = {}, ["teacher"]
        different = [name for name in different if not name.endswith("_source")]
        if different:
            name = different[0]
            raise InputError(
                f"{self.directory} must hold outputs with {name} {expected[name]}; got {meta.get(name)}: the cache is stale or "
                "was changed, delete that directory or name another in EV3_DISTILL_CACHE"
            )

    def __enter__(self) -> "OutputStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Syncs the store to disk."""
        self._shards.sync()

    @property
    def damaged(self) -> int:
        """Number of rows lost to damage, as far as it was noticed since the store was opened. They count as missing."""
        return self._shards.damaged

    def _report_damage(self) -> None:
        if self._warn is not None and self.damaged > self._reported_damage:
            count = self.damaged - self._reported_damage
            self._warn(f"{count:,} rows of {self.directory} are damaged: the teacher runs on them again")
        self._reported_damage = max(self._reported_damage, self.damaged)

    def missing(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """The rows that are not cached, each once, in their order. Includes what other processes have cached meanwhile.

        Raises:
          InputError: the data set has no such row.
        """
        rows = self._ids(rows)
        missing = self._shards.missing(rows)
        if len(missing):
            self._shards.refresh()
            missing = self._shards.missing(rows)
        return missing[np.sort(np.unique(missing, return_index=True)[1])]

    def occur(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Which rows of the data set are among these, a mask [N]: for millions of rows far faster than `numpy.unique`.

        Raises:
          InputError: the data set has no such row.
        """
        occurs = np.zeros(self.contents.rows, bool)
        occurs[self._ids(rows)] = True
        return occurs

    def _ids(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        ids = np.asarray(rows, np.int64).reshape(-1)
        outside = (ids < 0) | (ids >= self.contents.rows)
        if outside.any():
            raise InputError(
                f"rows of a data set of {self.contents.rows} are 0 to {self.contents.rows - 1}; "
                f"got {ids[outside.argmax()]}: give rows of the data set"
            )
        return ids

    def read(self, rows: np.ndarray | Sequence[int]) -> dict[str, np.ndarray]:
        """Reads outputs.

        Args:
          rows: [n], in any order; a row may occur more than once.

        Returns:
          Arrays [n, ...] float32 by name.

        Raises:
          InputError: a row is not cached.
        """
        rows = self._ids(rows)
        out = {name: np.empty((len(rows), *shape), np.float32) for name, shape in self.codec.fields.items()}
        for positions, records in self._records(rows):
            for name, values in self.codec.decode(records).items():
                out[name][positions] = values
        return out

    def _records(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if len(missing := self.missing(rows)):
            raise InputError(
                f"rows must be cached before they are read; got {len(missing)} that are not in {self.directory}, the first "
                f"is {missing[0]}: run the teacher on them first"
            )
        row_bytes = 4 * sum(math.prod(shape) for shape in self.codec.fields.values())  # of a decoded row
        for positions, void in self._shards.read(rows, max(READ_BYTES // row_bytes, 1)):
            yield positions, void.view(self.codec.dtype)


class _Pending:
    """Records that wait to be written as a shard."""

    def __init__(self, store: OutputStore):
        self._store = store
        self._limit = max(min(SHARD_ROWS, SHARD_BYTES // store.codec.dtype.itemsize), 1)
        self._clear()

    def _clear(self) -> None:
        self._rows: list[np.ndarray] = []
        self._records: list[np.ndarray] = []
        self._flushed = time.monotonic()

    def add(self, rows: np.ndarray, outputs: Outputs) -> None:
        """Adds the outputs on `rows` [b]; if one of them cannot be stored, those before it.

        Raises:
          InputError: outputs have a wrong shape or type, or a row cannot be stored.
        """
        codec = self._store.codec
        arrays = codec.arrays(outputs, len(rows))
        fault = codec.fault(arrays)
        valid = len(rows) if fault is None else fault[0]
        if valid:
            self._rows.append(rows[:valid])
            self._records.append(codec.encode({name: array[:valid] for name, array in arrays.items()}))
        if fault is not None:
            raise InputError(f"{fault[1]} in row {rows[valid]}: check the teacher and the scale of its inputs")
        if sum(map(len, self._rows)) >= self._limit or time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes the records as a shard; drops them if that fails."""
        rows, records = self._rows, self._records
        self._clear()
        if rows:
            self._store._shards.append(np.concatenate(rows), np.concatenate(records))


def collect(
    teacher_outputs: TeacherOutputs,
    inputs_of: InputsOf,
    rows: np.ndarray | Sequence[int],
    store: OutputStore,
    *,
    batch_size: int,
    on_progress: OnProgress | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Runs a teacher on the rows that a store lacks, and stores the outputs.

    However it ends, the outputs computed so far are stored, and the next call continues from there.

    Args:
      teacher_outputs: inputs [b, ...] -> arrays [b, ...] by name.
      inputs_of: rows [b] -> inputs [b, ...].
      rows: [n] of the data set.
      store: receives the outputs.
      batch_size: b; the last batch may be smaller.
      on_progress: called before and after each batch with the number of distinct `rows` that are stored and their total.
      on_wait: called with a message if another process runs the teacher for this store; then this one waits for it.

    Raises:
      InputError: the teacher fails on a row, or its outputs are not finite numbers of the store's shapes.
      OSError: the disk is full or faulty.
    """
    total = int(store.occur(rows).sum())
    on_progress = on_progress or (lambda done, total: None)
    message = f"another process runs this teacher for {store.directory}: waiting for it"
    if not len(store.missing(rows)):
        on_progress(total, total)
        return
    with store._shards.writing(
        done=lambda: not len(store.missing(rows)), on_wait=lambda: on_wait(message) if on_wait else None
    ):
        store._report_damage()
        todo = store.missing(rows)
        done = total - len(todo)
        on_progress(done, total)
        pending = _Pending(store)
        try:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                _run(teacher_outputs, inputs_of(batch), batch, pending.add)
                on_progress(done + start + len(batch), total)
        finally:
            pending.flush()


def _run(
    teacher_outputs: TeacherOutputs,
    inputs: np.ndarray,
    rows: np.ndarray,
    add: Callable[[np.ndarray, Outputs], None],
) -> None:
    """Runs the teacher on a batch. If it fails, bisects the batch to store what succeeds and to name the faulty row."""
    try:
        outputs = teacher_outputs(inputs)
    except Exception as raised:
        error, failed = raised, (0, len(rows))
    else:
        add(rows, outputs)
        return
    first, last = failed
    while first < last and (last - first > 1 or (first, last) != failed):
        middle = (first + last + 1) // 2
        try:
            outputs = teacher_outputs(inputs[first:middle])
        except Exception as raised:
            error, failed, last = raised, (first, middle), middle
        else:
            add(rows[first:middle], outputs)
            first = middle
    raise _blame(error, rows[slice(*failed)]) from error


def _blame(error: Exception, rows: np.ndarray) -> InputError:
    """The error for a teacher that fails on one row, or on several rows only when they are in one batch."""
    where = f"row {rows[0]}"
    if len(rows) > 1:
        where = f"{len(rows)} rows together, {rows[0]} to {rows[-1]}, but on none of them alone"
    if isinstance(error, InputError):
        return InputError(f"on {where}: {error} (outputs computed before are stored)")
    return InputError(
        f"a teacher must return outputs for every example; got {summary(error)} on {where}: fix the teacher or its input; "
        "outputs computed before are stored"
    )


def spot_check(
    teacher_outputs: TeacherOutputs,
    inputs_of: InputsOf,
    store: OutputStore,
    rows: np.ndarray | Sequence[int],
    *,
    n: int = SPOT_CHECK_ROWS,
    tolerance: float | None = None,
    seed: int | None = None,
) -> None:
    """Runs the teacher again on a few cached rows and compares, because its digest cannot cover everything it depends on.

    Args:
      teacher_outputs: as in `collect`.
      inputs_of: as in `collect`.
      store: the store to check.
      rows: rows to draw from; those that are not cached are ignored.
      n: number of rows to draw.
      tolerance: for the largest difference within a row, relative to the row's largest magnitude. The default is 1e-4 for
        float32, and 2e-3 for float16 and top<k>, where the residual mass is compared too.
      seed: of the draw; by default a new one for each call.

    Raises:
      InputError: a row differs, or the teacher fails.
    """
    is_cached = store.occur(rows)
    is_cached[store.missing(rows)] = False
    cached = np.flatnonzero(is_cached)
    if not min(n, len(cached)):
        return
    drawn = np.sort(np.random.default_rng(seed).choice(cached, min(n, len(cached)), replace=False))
    arrays: dict[str, np.ndarray] = {}
    _run(
        teacher_outputs,
        inputs_of(drawn),
        drawn,
        lambda rows, outputs: arrays.update(store.codec.arrays(outputs, len(rows))),
    )
    tolerance = store.codec.tolerance if tolerance is None else tolerance
    for positions, records in store._records(drawn):
        difference = store.codec.difference(records, {name: array[positions] for name, array in arrays.items()})
        if difference.max() > tolerance:
            raise InputError(
                f"cached outputs must equal the teacher's outputs now, within {tolerance:g}; got a difference of "
                f"{difference.max():.2g} in row {drawn[positions[difference.argmax()]]}: the cache is stale, delete "
                f"{store.directory} or name another in EV3_DISTILL_CACHE"
            )
