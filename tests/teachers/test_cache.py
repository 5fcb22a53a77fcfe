"""Logits, run once: what is missing is computed and comes back right, whatever the teacher does."""

import json

import numpy as np
import pytest
from teacher_cache_files import Counting, K, contents, pixels_of, right, teacher

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import append_log, output_store
from ev3_distill.teachers.cache.output_store import LogitStore, collect, verify

PRECISIONS = ("float32", "float16", "top2")


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
    monkeypatch.setattr(append_log, "BLOCK", 1000)
    monkeypatch.setattr(output_store, "BLOCK", 1000)
    monkeypatch.setattr(append_log, "GAP", 100)
    monkeypatch.setattr(output_store, "CHUNK_ROWS", 37)
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
            assert all(4 * (K + 6) * len(at) <= append_log.BLOCK for at, _ in store._records(rows))  # once decoded
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
    monkeypatch.setattr(output_store, "FORMAT", 2)
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
        says = "a teacher must give .*; got RuntimeError: out on row 7001: fix .* before is kept$"
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
        says = "MemoryError: too large on 8 rows together, 64 to 71, though on none of them alone: fix"
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
    monkeypatch.setattr(output_store, "FLUSH_S", 0.0)
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
