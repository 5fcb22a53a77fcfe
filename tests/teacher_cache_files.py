"""Stores of teacher outputs with known content: the teacher returns sines, computed for each example alone."""

import numpy as np

from ev3_distill.teachers.cache.output_store import Contents, OutputStore, collect
from ev3_distill.teachers.cache.shards import HEADER

K = 5
SHARD_BYTES = HEADER.size + 16 * (8 + 4 * K)  # of a shard with 16 rows


def inputs_of(rows):
    return np.asarray(rows, np.float32)[:, None]


def teacher(inputs):
    """Logits that do not depend on the batch, to the bit."""
    return {"logits": 10 * np.sin(inputs * np.arange(1, K + 1, dtype=np.float32))}


def expected_logits(rows):
    return teacher(inputs_of(rows))["logits"].astype(np.float32)


def contents(rows=200, **changes):
    return Contents(**{"teacher": "t" * 64, "data": "d" * 64, "rows": rows, "fields": {"logits": (K,)}} | changes)


class CountingTeacher:
    """A teacher that records the rows of each batch."""

    def __init__(self, outputs=teacher):
        self._outputs, self.batches = outputs, []

    def __call__(self, inputs):
        self.batches.append(inputs[:, 0].astype(int).tolist())
        return self._outputs(inputs)

    @property
    def rows(self):
        return sorted(row for batch in self.batches for row in batch)


def filled_store(root, rows=200, batch_size=16, **changes):
    """Fills a store with all its rows and returns its directory."""
    with OutputStore(contents(rows, **changes), root=root) as store:
        collect(teacher, inputs_of, np.arange(rows), store, batch_size=batch_size)
    return store.directory


def shards_in(directory):
    """The shard files of a store in the order of their first row."""
    first_row = {path: path.read_bytes()[HEADER.size : HEADER.size + 8] for path in directory.glob("*.rows")}
    return sorted(first_row, key=lambda path: int.from_bytes(first_row[path], "little"))


def read_back(directory, rows=200):
    """Asserts that all rows which a store still has are right; returns the missing rows and the number of damaged ones."""
    messages = []
    with OutputStore(contents(rows), root=directory.parent, warn=messages.append) as store:
        missing = store.missing(np.arange(rows))
        stored = np.setdiff1d(np.arange(rows), missing)
        assert store.read(stored)["logits"].tobytes() == expected_logits(stored).tobytes()
        assert [f"{store.damaged:,} rows of {store.directory} are damaged" in line for line in messages] == (
            [True] if store.damaged else []
        )
    return missing.tolist(), store.damaged


def assert_repaired(directory, missing, rows=200):
    """Asserts that exactly the missing rows are computed again, and that no damage is reported afterwards."""
    counting = CountingTeacher()
    with OutputStore(contents(rows), root=directory.parent) as store:
        collect(counting, inputs_of, np.arange(rows), store, batch_size=16)
    assert counting.rows == missing
    assert read_back(directory, rows) == ([], 0)
