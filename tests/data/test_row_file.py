"""RowFile: an array on disk that is indexed like a NumPy array."""

import os
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.data.sources.row_file import Part, RowFile, in_chunks
from ev3_distill.errors import InputError

ROOT = Path(__file__).parents[2]


def on_disk(folder, array, cuts=(), before=b"12345"):
    """A RowFile of an array cut into parts, each in its own file after some other bytes."""
    parts = []
    for i, piece in enumerate(np.split(array, cuts)):
        path = Path(folder) / f"{i}.bin"
        path.write_bytes(before + piece.tobytes())
        parts.append(Part(path, len(before), len(piece)))
    return RowFile(tuple(parts), array.shape[1:], array.dtype)


def numbers(n=50, shape=(3, 2), dtype=np.float32):
    return np.random.default_rng(0).integers(0, 100, (n, *shape)).astype(dtype)


ARRAY = numbers()
INDICES = st.lists(st.integers(-50, 49), max_size=80).map(lambda rows: np.array(rows, np.int64))
SLICES = st.builds(slice, *[st.none() | st.integers(-70, 70)] * 2, st.none() | st.integers(1, 9) | st.integers(-9, -1))
MASKS = st.lists(st.booleans(), min_size=50, max_size=50).map(np.array)


@settings(deadline=None, max_examples=150)
@given(INDICES | SLICES | MASKS | st.integers(-50, 49), st.lists(st.integers(0, 50), max_size=3).map(sorted))
def test_indexing_equals_that_of_numpy(key, cuts):
    with tempfile.TemporaryDirectory() as folder:
        rows_read = on_disk(folder, ARRAY, cuts)[key]
    assert type(rows_read) is np.ndarray
    assert rows_read.dtype == ARRAY.dtype
    np.testing.assert_array_equal(rows_read, ARRAY[key])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3, 2)])
def test_shapes_and_types_are_kept(tmp_path, shape, dtype):
    array = numbers(20, shape, dtype)
    rows = on_disk(tmp_path, array, [7])
    assert (rows.shape, rows.dtype, rows.ndim, rows.nbytes, len(rows)) == (
        array.shape, array.dtype, array.ndim, array.nbytes, 20,
    )  # fmt: skip
    np.testing.assert_array_equal(rows[[19, 0, 19, 7, 6, 8]], array[[19, 0, 19, 7, 6, 8]])
    np.testing.assert_array_equal(rows[np.array([[3, 4], [19, 3]])], array[[[3, 4], [19, 3]]])
    np.testing.assert_array_equal(np.asarray(rows), array)
    assert rows[[]].shape == (0, *shape)


@pytest.mark.parametrize("key", [50, -51, [3, 50], [-51], np.array([1.0]), np.ones(49, bool), "a"])
def test_missing_rows_raise_an_index_error(tmp_path, key):
    with pytest.raises(IndexError):
        on_disk(tmp_path, ARRAY)[key]


def test_reads_return_copies(tmp_path):
    rows = on_disk(tmp_path, ARRAY)
    rows[:][:] = 0
    np.testing.assert_array_equal(rows[:], ARRAY)


def test_neighboring_rows_are_read_at_once(tmp_path, monkeypatch):
    rows, reads, pread = on_disk(tmp_path, ARRAY), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args[1:]) or pread(*args))
    np.testing.assert_array_equal(rows[[9, 8, 30, 7, 8]], ARRAY[[9, 8, 30, 7, 8]])
    row = ARRAY[0].nbytes
    assert reads == [(3 * row, 5 + 7 * row), (row, 5 + 30 * row)]


def test_chunks_cover_all_rows_in_order(tmp_path):
    rows = on_disk(tmp_path, ARRAY, [7, 20])
    for array in (rows, ARRAY):
        chunks = list(in_chunks(array, chunk_bytes=5 * ARRAY[0].nbytes + 3))
        assert [len(chunk) for chunk in chunks] == [5] * 10
        np.testing.assert_array_equal(np.concatenate(chunks), ARRAY)
    assert [len(chunk) for chunk in in_chunks(rows, chunk_bytes=1)] == [1] * 50
    assert list(in_chunks(ARRAY[:0])) == []


def test_threads_share_a_file_and_it_can_be_pickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = on_disk("", ARRAY, [30])
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 50, 20) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for key, rows_read in zip(keys, pool.map(rows.__getitem__, keys), strict=True):
            np.testing.assert_array_equal(rows_read, ARRAY[key])
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[:], ARRAY)


def test_files_are_closed_with_the_last_reference(tmp_path):
    before = len(os.listdir("/dev/fd"))
    rows = on_disk(tmp_path, ARRAY, [10])
    assert len(os.listdir("/dev/fd")) == before + 2
    del rows
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_is_too_short_is_an_error(tmp_path):
    rows = on_disk(tmp_path, ARRAY)
    os.truncate(tmp_path / "0.bin", 100)
    with pytest.raises(InputError, match=r"0.bin must not change while it is read; got a shorter file: run again"):
        rows[:]
    with pytest.raises(InputError, match="got a shorter file"):
        RowFile(rows.parts, rows.shape[1:], rows.dtype)


def test_a_deleted_file_stays_readable(tmp_path):
    rows = on_disk(tmp_path, ARRAY)
    (tmp_path / "0.bin").unlink()
    np.testing.assert_array_equal(rows[3:5], ARRAY[3:5])


def test_reading_needs_little_memory(tmp_path):
    """Reading 300 MB, sequentially and at random, raises the peak of resident memory by less than 50 MB."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    code = f"""
import resource, numpy as np
from pathlib import Path
from ev3_distill.data.sources.row_file import Part, RowFile, in_chunks
rows = RowFile((Part(Path({str(path)!r}), 0, 100_000),), (3 << 10,), np.dtype(np.uint8))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows[[1, 2]]; before = peak()
for chunk in in_chunks(rows): pass
rng = np.random.default_rng(0)
for _ in range(100): rows[rng.integers(0, 100_000, 512)]
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 50 << 10
