"""Logits, run once: every row comes back right or counts as missing, whatever befell the process, the disk or the file."""

import errno
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.errors import InputError
from teachers import chunks, logits
from teachers.logits import Contents, LogitStore, collect, verify

K = 5
PRECISIONS = ("float32", "float16", "top2")


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


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logits, "CHUNK_ROWS", 16)


def filled(root, rows=200, batch_size=16, **changes):
    """A store with all its rows, closed; its log file."""
    with LogitStore(contents(rows, **changes), root=root) as store:
        collect(teacher, pixels_of, np.arange(rows), store, batch_size=batch_size)
    return store.directory / "rows.log"


# Collect and read.


def test_only_what_is_missing_is_computed(tmp_path):
    told, counted = [], Counting()
    with LogitStore(contents(), root=tmp_path) as store:
        collect(counted, pixels_of, [7, 3, 7, 9], store, batch_size=2, tell=lambda *x: told.append(x))
        assert counted.batches == [[7, 3], [9]]
        assert told == [(0, 3), (2, 3), (3, 3)]
        assert store.missing([9, 8, 3, 8, 1]).tolist() == [8, 1]
        collect(counted, pixels_of, np.arange(12), store, batch_size=100)
        assert counted.rows == list(range(12))
        collect(counted, pixels_of, np.arange(12), store, batch_size=100, tell=lambda *x: told.append(x))
        assert told[-1] == (12, 12)
        rows = np.array([11, 0, 3, 3, 7, 0])
        assert store.read(rows)["logits"].tobytes() == right(rows).tobytes()
        assert store.read([])["logits"].shape == (0, K)
        with pytest.raises(InputError, match=r"must be cached before .*; got 2 that are not in .*, the first 40: run"):
            store.read([3, 40, 41])
        for row in (-1, 200):
            with pytest.raises(InputError, match=f"rows of a data set of 200 are 0 to 199; got {row}: name others"):
                store.missing([3, row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_rows_of_a_large_store(precision, tmp_path, monkeypatch):
    """With blocks and gaps of all sizes, and features; against a store that is read row by row."""
    monkeypatch.setattr(chunks, "BLOCK", 1000)
    monkeypatch.setattr(logits, "BLOCK", 1000)
    monkeypatch.setattr(chunks, "GAP", 100)
    monkeypatch.setattr(logits, "CHUNK_ROWS", 37)
    fields = {"logits": (K,), "middle": (2, 3)}

    def outputs(inputs):
        return {**teacher(inputs), "middle": np.cos(inputs[:, :, None] * np.ones((2, 3), np.float32)), "unused": None}

    rng = np.random.default_rng(0)
    with LogitStore(contents(1000, fields=fields, precision=precision), root=tmp_path) as store:
        collect(outputs, pixels_of, rng.permutation(1000)[:900], store, batch_size=10)
        collect(outputs, pixels_of, np.arange(1000), store, batch_size=10)
        each = {i: store.read([i]) for i in range(1000)}
        for rows in (np.arange(1000), rng.permutation(1000), rng.integers(0, 1000, 300), np.arange(0, 1000, 7)):
            for name, array in store.read(rows).items():
                assert array.dtype == np.float32
                assert array.tobytes() == b"".join(each[int(i)][name].tobytes() for i in rows)
            assert all(4 * (K + 6) * len(at) <= chunks.BLOCK for at, _ in store._records(rows))  # once decoded
        np.testing.assert_allclose(each[5]["middle"], np.full((1, 2, 3), np.cos(5)), rtol=1e-3)


def test_meta_tells_in_plain_text_what_is_in_it(tmp_path):
    view = {"augment": "flip,crop=4", "seed": 0, "view": 3}
    given = contents(view=view, precision="top2", teacher_source="onnx:a.onnx", data_source="digits")
    with LogitStore(given, root=tmp_path) as store:
        assert store.directory.name == given.key()
    assert json.loads((store.directory / "meta.json").read_text()) == {
        **{"teacher": "t" * 64, "data": "d" * 64, "teacher_source": "onnx:a.onnx", "data_source": "digits"},
        **{"rows": 200, "fields": {"logits": [K]}, "num_classes": K, "view": view, "precision": "top2", "format": 1},
    }


def test_the_key_is_of_all_that_rows_depend_on(monkeypatch):
    one = contents()
    changes = [{"teacher": "T"}, {"data": "D"}, {"view": {"view": 1}}, {"view": {"view": 2}}, {"precision": "float16"}]
    keys = {one.key(), *(contents(**change).key() for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert contents(view={"b": 1, "a": 2}).key() == contents(view={"a": 2, "b": 1}).key()
    assert contents(teacher_source="x", data_source="y").key() == one.key()
    monkeypatch.setattr(logits, "FORMAT", 2)
    assert one.key() not in keys


def test_the_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    with LogitStore(contents()) as store:
        assert store.directory == tmp_path / "cache" / "logits" / contents().key()


# What a teacher may do wrong.


@pytest.mark.parametrize("batch_size", [1, 64, 1000])
def test_a_teacher_that_raises_at_example_7001(batch_size, tmp_path):
    def broken(inputs):
        if 7001 in inputs:
            raise RuntimeError("out\nof order")
        return teacher(inputs)

    counted = Counting(broken)
    with LogitStore(contents(8000), root=tmp_path) as store:
        says = "a teacher must give .*; got RuntimeError: out of order on row 7001: mend .* before is kept$"
        with pytest.raises(InputError, match=says):
            collect(counted, pixels_of, np.arange(8000), store, batch_size=batch_size)
        assert counted.batches[-1] == [7001]
        assert len(counted.batches) <= 7001 // batch_size + 2 + np.log2(batch_size) + 1
    mended = Counting()
    with LogitStore(contents(8000), root=tmp_path) as store:
        assert store.missing(np.arange(8000)).tolist() == list(range(7001, 8000))
        collect(mended, pixels_of, np.arange(8000), store, batch_size=batch_size)
        assert mended.rows == list(range(7001, 8000))
        assert store.read(np.arange(8000))["logits"].tobytes() == right(np.arange(8000)).tobytes()


def test_a_teacher_that_says_itself_what_is_wrong(tmp_path):
    def broken(inputs):
        if 41 in inputs:
            raise InputError("logits must be finite; got nan: check the teacher")
        return teacher(inputs)

    with LogitStore(contents(), root=tmp_path) as store:
        says = (
            r"^on row 41: logits must be finite; got nan: check the teacher \(what the teacher gave before is kept\)$"
        )
        with pytest.raises(InputError, match=says):
            collect(broken, pixels_of, np.arange(200), store, batch_size=64)
        assert store.missing(np.arange(200))[0] == 41


def test_a_teacher_that_fails_on_rows_together(tmp_path):
    def greedy(inputs):
        if len(inputs) > 4 and 70 in inputs:
            raise MemoryError("too large")
        return teacher(inputs)

    with LogitStore(contents(), root=tmp_path) as store:
        says = "MemoryError: too large on 8 rows together, 64 to 71, though on none of them alone: mend"
        with pytest.raises(InputError, match=says):
            collect(greedy, pixels_of, np.arange(200), store, batch_size=64)
        assert store.missing(np.arange(200)).tolist() == list(range(72, 200))
        collect(greedy, pixels_of, np.arange(200), store, batch_size=64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_row_that_is_not_finite_is_named(bad, precision, tmp_path):
    def broken(inputs):
        return {"logits": np.where(inputs == 41, bad, teacher(inputs)["logits"].astype(np.float64))}

    with LogitStore(contents(precision=precision), root=tmp_path) as store:
        with pytest.raises(InputError, match="logits must be finite; got nan or infinity in row 41: check the teacher"):
            collect(broken, pixels_of, np.arange(200), store, batch_size=32)
        assert store.missing(np.arange(200))[0] == 41


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"probabilities": np.zeros((8, K))}, "must give logits; got probabilities: mend"),
        ({"logits": np.zeros((8, K + 1))}, r"numbers \[8, 5\] for 8 examples; got float64 \[8, 6\]: mend"),
        ({"logits": np.zeros((1, K))}, r"got float64 \[1, 5\]"),
        ({"logits": np.full((8, K), "a")}, r"got <U1 \[8, 5\]"),
    ],
)
def test_outputs_of_another_form(outputs, says, tmp_path):
    with LogitStore(contents(), root=tmp_path) as store, pytest.raises(InputError, match=says):
        collect(lambda inputs: outputs, pixels_of, np.arange(8), store, batch_size=8)


def test_low_precision_outputs(tmp_path):
    import jax.numpy as jnp

    with LogitStore(contents(), root=tmp_path) as store:
        collect(lambda x: {"logits": jnp.ones((len(x), K), jnp.bfloat16)}, pixels_of, [1], store, batch_size=8)
        assert store.read([1])["logits"].tolist() == [[1.0] * K]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, InputError])
def test_an_interrupt_keeps_what_was_computed(kind, tmp_path):
    def pixels(rows):
        if 96 in rows:
            raise kind("corrupt image")
        return pixels_of(rows)

    with LogitStore(contents(), root=tmp_path) as store:
        with pytest.raises(kind, match="corrupt image"):
            collect(teacher, pixels, np.arange(200), store, batch_size=32)
        assert store.missing(np.arange(200))[0] == 96


def test_a_slow_teacher_loses_seconds_not_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "FLUSH_S", 0.0)
    with LogitStore(contents(), root=tmp_path) as store, LogitStore(contents(), root=tmp_path) as other:
        seen = []
        collect(
            teacher,
            pixels_of,
            range(40),
            store,
            batch_size=8,
            tell=lambda *x: seen.append(40 - len(other.missing(range(40)))),
        )
        assert seen == [0, 8, 16, 24, 32, 40]


# Spot checks.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_spot_check(precision, tmp_path):
    def drifted(by):
        return lambda inputs: {"logits": teacher(inputs)["logits"] * (1 + by)}

    rows = np.arange(200)
    with LogitStore(contents(precision=precision), root=tmp_path) as store:
        verify(teacher, pixels_of, store, rows, seed=0)  # nothing there to check
        collect(teacher, pixels_of, rows[:150], store, batch_size=50)
        counted = Counting(drifted(1e-6))
        verify(counted, pixels_of, store, rows, n=20, seed=0)
        assert len(set(counted.rows)) == 20
        assert max(counted.rows) < 150
        says = (
            r"what the teacher gives now, within 0.00\d+; got a difference of 0.0\d+ in row \d+: .* stale, delete .* or"
        )
        with pytest.raises(InputError, match=says):
            verify(drifted(0.02), pixels_of, store, rows, seed=0)
        verify(drifted(0.02), pixels_of, store, rows, seed=0, tolerance=0.05)
        with pytest.raises(InputError, match="got a difference of inf in row"):
            verify(lambda x: {"logits": teacher(x)["logits"] * np.nan}, pixels_of, store, rows)
        with pytest.raises(InputError, match="ZeroDivisionError"):
            verify(lambda x: 1 / 0, pixels_of, store, rows)


def test_a_spot_check_of_features_and_residual_mass(tmp_path):
    given = contents(precision="top2", fields={"logits": (K,), "f": (2,)})
    base = np.float32([5, 4, 1, 1, 0])

    def outputs(logits, f):
        return lambda x: {"logits": np.tile(np.float32(logits), (len(x), 1)), "f": np.full((len(x), 2), f, np.float32)}

    with LogitStore(given, root=tmp_path) as store:
        collect(outputs(base, 1.0), pixels_of, range(9), store, batch_size=4)
        verify(outputs(base, 1.0), pixels_of, store, range(9))
        verify(outputs([5, 4, 1, 0, 1], 1.0), pixels_of, store, range(9))  # the same mass elsewhere in the rest
        for wrong in (outputs(base, 1.1), outputs([5, 4, 3, 1, 0], 1.0), outputs([4, 5, 1, 1, 0], 1.0)):
            with pytest.raises(InputError, match="the cache is stale"):
                verify(wrong, pixels_of, store, range(9))


def test_a_near_tie_is_no_stale_cache(tmp_path):
    def outputs(by):
        return lambda x: {"logits": np.tile(np.float32([5, 2, 2 + by, 1, 0]), (len(x), 1))}

    with LogitStore(contents(precision="top2"), root=tmp_path) as store:
        collect(outputs(1e-6), pixels_of, range(9), store, batch_size=4)
        verify(outputs(-1e-6), pixels_of, store, range(9))


# Damage.


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


def damaged_in(content, chunk, how):
    at = chunk * CHUNK
    return {
        "magic": content[:at] + b"\0" + content[at + 1 :],
        "rows": content[: at + 8] + b"\xff" + content[at + 9 :],
        "length": content[: at + 22] + b"\x01" + content[at + 23 :],
        "checksum": content[: at + 24] + bytes([content[at + 24] ^ 1]) + content[at + 25 :],
        "id": content[: at + 40] + bytes([content[at + 40] ^ 1]) + content[at + 41 :],
        "value": content[: at + CHUNK - 1] + bytes([content[at + CHUNK - 1] ^ 0x80]) + content[at + CHUNK :],
        "zeros": content[:at] + bytes(CHUNK) + content[at + CHUNK :],
        "magic within": content[: at + 99] + chunks.MAGIC + content[at + 99 + len(chunks.MAGIC) :],
        "lost": content[: at + 50] + content[at + CHUNK - 50 :],
        "doubled": content[: at + 50] + content[at:],
        "two": content[: at + 50] + b"\xff" * CHUNK + content[at + CHUNK + 50 :],
    }[how]


HOWS = ("magic", "rows", "length", "checksum", "id", "value", "zeros", "magic within", "lost", "doubled", "two")


@pytest.mark.parametrize("block", [48, chunks.BLOCK])
@pytest.mark.parametrize("how", HOWS)
def test_a_chunk_damaged_in_the_middle_is_rebuilt(how, block, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK", block)
    log = filled(tmp_path)
    log.write_bytes(damaged_in(log.read_bytes(), 3, how))
    missing, damaged = read_back(log)
    expected = {"doubled": [], "two": list(range(48, 80))}.get(how, list(range(48, 64)))
    assert missing == expected
    assert damaged == {"lost": 2, "doubled": 0, "magic within": 14}.get(how, len(missing))  # as the bytes tell
    mend(log, missing)


def test_mended_damage_is_told_once(tmp_path, small_chunks):
    """Though other rows are still missing."""

    def some():
        with LogitStore(contents(), root=tmp_path) as store:
            collect(teacher, pixels_of, range(112), store, batch_size=16)
        return store.directory / "rows.log"

    log = some()
    log.write_bytes(damaged_in(log.read_bytes(), 3, "value"))
    assert read_back(log) == ([*range(48, 64), *range(112, 200)], 16)
    some()
    assert read_back(log) == (list(range(112, 200)), 0)


@pytest.mark.parametrize("how", ["magic", "checksum", "value", "zeros"])
def test_a_last_chunk_damaged(how, tmp_path, small_chunks):
    log = filled(tmp_path, rows=192)
    log.write_bytes(damaged_in(log.read_bytes(), 11, how))
    missing, damaged = read_back(log, 192)
    assert missing == list(range(176, 192))
    assert damaged == (16 if how == "value" else 0)  # without a header it looks like a torn tail
    mend(log, missing, 192)
    assert log.stat().st_size == 12 * CHUNK


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 6))
def test_bit_flips_never_give_wrong_values(seed, flips, tmp_path_factory):
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("flips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "CHUNK_ROWS", 16)
        log = filled(root)
    content = bytearray(log.read_bytes())
    for _ in range(flips):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    log.write_bytes(content)
    missing, _ = read_back(log)
    assert 0 <= len(missing) <= 16 * flips
    mend(log, missing)
    shutil.rmtree(root)


def test_a_tail_cut_anywhere(tmp_path, small_chunks):
    log = filled(tmp_path)
    content = log.read_bytes()
    for size in (*range(3 * CHUNK - 40, 3 * CHUNK + 60), CHUNK - 1, 31, 1, 0):
        log.write_bytes(content[:size])
        missing, damaged = read_back(log)
        assert missing == list(range(size // CHUNK * 16, 200))
        assert damaged == 0
        if size % 9 == 0:
            log.write_bytes(content[:size] + bytes(20 * CHUNK if size % 2 else 0))
            mend(log, missing)
            assert log.read_bytes() == content


def test_a_log_of_another_store_is_not_trusted(tmp_path):
    other = filled(tmp_path, view="other")
    with LogitStore(contents(), root=tmp_path) as store:
        pass
    shutil.copy(other, store.directory / "rows.log")
    assert read_back(store.directory / "rows.log")[0] == list(range(200))


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "x"), ("data", "x"), ("view", "x"), ("precision", "float16"), ("rows", 3), ("format", 0)],
)
def test_a_foreign_directory_is_refused(name, value, tmp_path):
    log = filled(tmp_path)
    path = log.parent / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    says = f"must hold logits of {name} .*; got {value}: the cache is stale or another's, delete that directory or name"
    with pytest.raises(InputError, match=says):
        LogitStore(contents(), root=tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="the cache is stale or another's"):
        LogitStore(contents(), root=tmp_path)


def test_other_fields_and_sources(tmp_path):
    filled(tmp_path, teacher_source="a", data_source="b")
    with pytest.raises(InputError, match=r"must hold logits of fields {'logits': \[6\]}; got {'logits': \[5\]}"):
        LogitStore(contents(fields={"logits": (6,)}), root=tmp_path)
    with LogitStore(contents(teacher_source="c"), root=tmp_path) as store:  # named otherwise, and the same
        assert not len(store.missing(range(200)))


def test_a_cut_while_in_use(tmp_path):
    log = filled(tmp_path)
    with LogitStore(contents(), root=tmp_path) as store:
        os.truncate(log, 1000)
        with pytest.raises(InputError, match=r"must not be cut while it is in use; .*rows.log was: start again"):
            store.read(range(200))


# Processes and threads.

SCRIPT = """
import errno, resource, sys, time, types
sys.modules["teachers"] = types.ModuleType("teachers")  # without the other teachers and jax: many processes start here
sys.modules["teachers"].__path__ = ["teachers"]
from pathlib import Path
import numpy as np
from teachers import chunks, logits
from teachers.logits import Contents, LogitStore, collect
logits.CHUNK_ROWS, chunks.POLL_S, root, K = 16, 0.02, Path(sys.argv[1]), 5
"""


def script(root, code):
    """A real process that has imported all and made ready, and waits for a line to go on."""
    known = "\n".join(map(inspect.getsource, (pixels_of, teacher, right, contents, Counting)))
    text = "\n".join((SCRIPT, known, "print('ready', flush=True); sys.stdin.readline()", textwrap.dedent(code)))
    process = subprocess.Popen(
        [sys.executable, "-c", text, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def go(*processes):
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def ended(process, code=0):
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return out


def test_kills_at_any_moment(tmp_path):
    """A process that is killed time and again ends with the very file of one that nobody disturbed."""
    code = """
    with LogitStore(contents(3000), root=root) as store:
        def slow(inputs):
            time.sleep(0.001)
            return teacher(inputs)
        collect(slow, pixels_of, np.arange(3000), store, batch_size=8)
    """
    rng, kills, log = np.random.default_rng(0), 0, tmp_path / contents(3000).key() / "rows.log"
    for _ in range(8):
        before = log.stat().st_size if log.exists() else 0
        process = script(tmp_path, code)
        go(process)
        while kills < 4 and process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        if kills < 4:
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if kills == 2:  # and in the middle of a write
                os.truncate(log, log.stat().st_size - 10)
        else:
            ended(process)
            break
    assert kills == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "CHUNK_ROWS", 16)
        whole = filled(tmp_path / "whole", 3000, batch_size=8)
    assert log.read_bytes() == whole.read_bytes()
    assert read_back(log, 3000) == ([], 0)


def test_two_processes_at_once_share_the_work(tmp_path):
    code = """
    counted, lines = Counting(), []
    def slow(inputs):
        time.sleep(0.002)
        return counted(inputs)
    with LogitStore(contents(800), root=root) as store:
        collect(slow, pixels_of, np.arange({rows}), store, batch_size=8, waiting=lines.append)
        assert store.read(np.arange({rows}))["logits"].tobytes() == right(np.arange({rows})).tobytes()
    print(len(counted.rows), len(set(counted.rows)), len(lines))
    """
    processes = [script(tmp_path, code.format(rows=rows)) for rows in ("0, 600", "200, 800", "100, 300")]
    go(*processes)
    told = [tuple(map(int, ended(process).split())) for process in processes]
    assert sum(rows for rows, _, _ in told) == 800  # none twice
    assert max(lines for _, _, lines in told) == 1
    log = tmp_path / contents(800).key() / "rows.log"
    assert read_back(log, 800) == ([], 0)


def test_waiting_is_told_and_ends_with_the_rows_or_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "POLL_S", 0.01)
    monkeypatch.setattr(logits, "CHUNK_ROWS", 8)
    code = """
    with LogitStore(contents(), root=root) as store:
        def stalls(inputs):
            if inputs[0, 0] == 16:
                print("stalls", flush=True)
                sys.stdin.read()
                time.sleep(60)
            return teacher(inputs)
        collect(stalls, pixels_of, np.arange(200), store, batch_size=8)
    """
    holder = script(tmp_path, code)
    go(holder)
    assert holder.stdout.readline() == "stalls\n"
    lines, counted = [], Counting()
    with LogitStore(contents(), root=tmp_path) as store:
        collect(counted, pixels_of, range(16), store, batch_size=8, waiting=lines.append)
        assert (counted.rows, lines) == ([], [])  # what the holder has appended is there for all
        threading.Timer(0.2, holder.kill).start()
        collect(counted, pixels_of, range(32), store, batch_size=8, waiting=lines.append)
    assert counted.rows == list(range(16, 32))
    assert lines == [f"another process runs this teacher for {store.directory}: waiting for it"]
    holder.communicate()


def test_a_thread_reads_while_another_collects(tmp_path, small_chunks):
    with LogitStore(contents(2000), root=tmp_path) as store:
        collector = threading.Thread(
            target=collect, args=(teacher, pixels_of, np.arange(2000), store), kwargs={"batch_size": 8}
        )
        collector.start()
        rng, reads = np.random.default_rng(0), 0
        while collector.is_alive() or not reads:
            rows = np.setdiff1d(rng.integers(0, 2000, 50), store.missing(np.arange(2000)))
            assert store.read(rows)["logits"].tobytes() == right(rows).tobytes()
            reads += 1
        collector.join()
        assert not len(store.missing(np.arange(2000)))
        assert store.damaged == 0


def test_memory_does_not_follow_the_size_of_the_file(tmp_path):
    """128 MB are written, verified and read; the process grows by less than a quarter of that."""
    code = """
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wide = contents(32_000, fields={"logits": (1000,)})
    def outputs(inputs):
        return {"logits": np.tile(inputs, (1, 1000))}
    logits.CHUNK_ROWS = 2048
    before = peak()
    with LogitStore(wide, root=root) as store:
        collect(outputs, pixels_of, np.arange(32_000), store, batch_size=256)
    with LogitStore(wide, root=root) as store:
        rng = np.random.default_rng(0)
        for rows in (*np.arange(32_000).reshape(-1, 500), *rng.integers(0, 32_000, (50, 100))):
            assert (store.read(rows)["logits"] == rows[:, None]).all()
    print(peak() - before)
    """
    process = script(tmp_path, code)
    go(process)
    grown = float(ended(process))
    assert (tmp_path / contents(fields={"logits": (1000,)}).key() / "rows.log").stat().st_size > 128e6
    assert grown < 40, f"{grown:.0f} MB"


# The disk.


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs; test_a_file_size_limit stands for it")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(90 << 10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logits, "CHUNK_ROWS", 64)
            with LogitStore(contents(2000), root=disk) as store:
                with pytest.raises(OSError, match="No space left on device") as caught:
                    collect(teacher, pixels_of, np.arange(2000), store, batch_size=64)
                assert caught.value.errno == errno.ENOSPC
                kept = 2000 - len(store.missing(np.arange(2000)))
                assert 64 <= kept < 2000
            log = store.directory / "rows.log"
            assert log.stat().st_size == kept // 64 * (32 + 64 * 28)
            assert read_back(log, 2000) == (list(range(kept, 2000)), 0)
            ballast.unlink()
            mend(log, list(range(kept, 2000)), 2000)
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(OSError, match="No space left on device"):
            LogitStore(contents(view="other"), root=disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_size_limit(tmp_path):
    """EFBIG in place of ENOSPC."""
    code = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with LogitStore(contents(2000), root=root) as store:
        try:
            collect(teacher, pixels_of, np.arange(2000), store, batch_size=8)
        except OSError as error:
            assert error.errno == errno.EFBIG
            print(2000 - len(store.missing(np.arange(2000))))
    """
    process = script(tmp_path, code)
    go(process)
    kept = int(ended(process))
    assert kept == 10_000 // CHUNK * 16
    log = tmp_path / contents(2000).key() / "rows.log"
    assert read_back(log, 2000) == (list(range(kept, 2000)), 0)
    mend(log, list(range(kept, 2000)), 2000)


def test_no_directory_to_write(tmp_path):
    (tmp_path / "file").write_text("mine")
    says = (
        r"needs a directory that it can make and write; got .* \(Not a directory\): name another by EV3_DISTILL_CACHE"
    )
    with pytest.raises(InputError, match=says):
        LogitStore(contents(), root=tmp_path / "file" / "logits")


def test_what_another_user_cached_can_be_read(tmp_path, monkeypatch):
    with LogitStore(contents(), root=tmp_path) as store:
        collect(teacher, pixels_of, range(50), store, batch_size=50)
    genuine = os.open

    def read_only(path, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return genuine(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with LogitStore(contents(), root=tmp_path) as store:
        assert store.read([3])["logits"].tobytes() == right([3]).tobytes()
        collect(teacher, pixels_of, range(50), store, batch_size=50)
        with pytest.raises(
            InputError, match=r"a cache that can be written; got .* \(Read-only file system\): name another"
        ):
            collect(teacher, pixels_of, range(51), store, batch_size=50)
