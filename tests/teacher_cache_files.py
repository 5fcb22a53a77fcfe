"""Stores of logits that are known beforehand: their teacher's are sines, of each example alone."""

import numpy as np

from ev3_distill.teachers.cache.output_store import Contents, LogitStore, collect

K = 5


def pixels_of(rows):
    return np.asarray(rows, np.float32)[:, None]


def teacher(inputs):
    """Logits of each example alone, bit by bit the same in any batch."""
    return {"logits": 10 * np.sin(inputs * np.arange(1, K + 1, dtype=np.float32))}


def right(rows):
    return teacher(pixels_of(rows))["logits"].astype(np.float32)


def contents(rows=200, **changes):
    return Contents(**{"teacher": "t" * 64, "data": "d" * 64, "rows": rows, "fields": {"logits": (K,)}} | changes)


class Counting:
    """A teacher that notes what it ran on."""

    def __init__(self, outputs=teacher):
        self._outputs, self.batches = outputs, []

    def __call__(self, inputs):
        self.batches.append(inputs[:, 0].astype(int).tolist())
        return self._outputs(inputs)

    @property
    def rows(self):
        return sorted(row for batch in self.batches for row in batch)


def filled(root, rows=200, batch_size=16, **changes):
    """A store with all its rows, closed; its log file."""
    with LogitStore(contents(rows, **changes), root=root) as store:
        collect(teacher, pixels_of, np.arange(rows), store, batch_size=batch_size)
    return store.directory / "rows.log"


def read_back(log, rows=200):
    """What a damaged file's store still has is right; gives what it misses, and what it tells of damage."""
    lines = []
    with LogitStore(contents(rows), root=log.parent.parent, warn=lines.append) as store:
        missing = store.missing(np.arange(rows))
        there = np.setdiff1d(np.arange(rows), missing)
        assert store.read(there)["logits"].tobytes() == right(there).tobytes()
        assert (
            (f"{store.damaged:,} rows of {store.directory} are damaged" in lines[0]) if store.damaged else lines == []
        )
    return missing.tolist(), store.damaged


def mend(log, missing, rows=200):
    """Exactly the missing rows are computed again; nothing is told of the damage thereafter."""
    counted = Counting()
    with LogitStore(contents(rows), root=log.parent.parent) as store:
        collect(counted, pixels_of, np.arange(rows), store, batch_size=16)
    assert counted.rows == missing
    assert read_back(log, rows) == ([], 0)


CHUNK = 32 + 16 * (8 + 4 * K)  # bytes of one with 16 rows
