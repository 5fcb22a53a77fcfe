"""The cache of teacher outputs: missing rows are computed, stored and read back, even if the teacher fails."""

import json

import numpy as np
import pytest
from teacher_cache_files import CountingTeacher, K, contents, expected_logits, inputs_of, teacher

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import output_store, shards
from ev3_distill.teachers.cache.output_store import OutputStore, collect, spot_check

PRECISIONS = ("float32", "float16", "top2")


# Collect and read.


def test_only_what_is_missing_is_computed(tmp_path):
    progress, counted = [], CountingTeacher()
    with OutputStore(contents(), root=tmp_path) as store:
        collect(counted, inputs_of, [7, 3, 7, 9], store, batch_size=2, on_progress=lambda *x: progress.append(x))
        assert counted.batches == [[7, 3], [9]]
        assert progress == [(0, 3), (2, 3), (3, 3)]
        assert store.missing([9, 8, 3, 8, 1]).tolist() == [8, 1]
        collect(counted, inputs_of, np.arange(12), store, batch_size=100)
        assert counted.rows == list(range(12))
        collect(counted, inputs_of, np.arange(12), store, batch_size=100, on_progress=lambda *x: progress.append(x))
        assert progress[-1] == (12, 12)
        rows = np.array([11, 0, 3, 3, 7, 0])
        assert store.read(rows)["logits"].tobytes() == expected_logits(rows).tobytes()
        assert store.read([])["logits"].shape == (0, K)
        with pytest.raises(
            InputError, match=r"must be cached before .*; got 2 that are not in .*, the first is 40: run"
        ):
            store.read([3, 40, 41])
        for row in (-1, 200):
            with pytest.raises(InputError, match=f"rows of a data set of 200 are 0 to 199; got {row}: give rows of"):
                store.missing([3, row])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_read_in_any_order(precision, tmp_path, monkeypatch):
    """With small reads, gaps and features; compared with reading row by row."""
    monkeypatch.setattr(output_store, "READ_BYTES", 1000)
    monkeypatch.setattr(shards, "GAP", 100)
    monkeypatch.setattr(output_store, "SHARD_ROWS", 37)
    fields = {"logits": (K,), "middle": (2, 3)}

    def outputs(inputs):
        return {**teacher(inputs), "middle": np.cos(inputs[:, :, None] * np.ones((2, 3), np.float32)), "unused": None}

    rng = np.random.default_rng(0)
    with OutputStore(contents(1000, fields=fields, precision=precision), root=tmp_path) as store:
        collect(outputs, inputs_of, rng.permutation(1000)[:900], store, batch_size=10)
        collect(outputs, inputs_of, np.arange(1000), store, batch_size=10)
        each = {i: store.read([i]) for i in range(1000)}
        for rows in (np.arange(1000), rng.permutation(1000), rng.integers(0, 1000, 300), np.arange(0, 1000, 7)):
            for name, array in store.read(rows).items():
                assert array.dtype == np.float32
                assert array.tobytes() == b"".join(each[int(i)][name].tobytes() for i in rows)
            assert all(4 * (K + 6) * len(at) <= 1000 for at, _ in store._records(rows))
        np.testing.assert_allclose(each[5]["middle"], np.full((1, 2, 3), np.cos(5)), rtol=1e-3)


def test_meta_json_describes_the_store(tmp_path):
    view = {"augment": "flip,crop=4", "seed": 0, "view": 3}
    described = contents(view=view, precision="top2", teacher_source="onnx:a.onnx", data_source="digits")
    with OutputStore(described, root=tmp_path) as store:
        assert store.directory.name == described.key()
    assert json.loads((store.directory / "meta.json").read_text()) == {
        **{"teacher": "t" * 64, "data": "d" * 64, "teacher_source": "onnx:a.onnx", "data_source": "digits"},
        **{"rows": 200, "fields": {"logits": [K]}, "codec": "logits", "view": view, "precision": "top2", "format": 2},
    }


def test_the_key_covers_everything_that_rows_depend_on(monkeypatch):
    one = contents()
    changes = [{"teacher": "T"}, {"data": "D"}, {"view": {"view": 1}}, {"view": {"view": 2}}, {"precision": "float16"}]
    keys = {one.key(), *(contents(**change).key() for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert contents(view={"b": 1, "a": 2}).key() == contents(view={"a": 2, "b": 1}).key()
    assert contents(teacher_source="x", data_source="y").key() == one.key()
    monkeypatch.setattr(output_store, "FORMAT", 3)
    assert one.key() not in keys


def test_the_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    with OutputStore(contents()) as store:
        assert store.directory == tmp_path / "cache" / "logits" / contents().key()


# Faulty teachers.


@pytest.mark.parametrize("batch_size", [1, 64, 1000])
def test_a_teacher_that_raises_at_example_7001(batch_size, tmp_path):
    def broken(inputs):
        if 7001 in inputs:
            raise RuntimeError("out\nof order")
        return teacher(inputs)

    counted = CountingTeacher(broken)
    with OutputStore(contents(8000), root=tmp_path) as store:
        message = "a teacher must return .*; got RuntimeError: out on row 7001: fix .* before are stored$"
        with pytest.raises(InputError, match=message):
            collect(counted, inputs_of, np.arange(8000), store, batch_size=batch_size)
        assert counted.batches[-1] == [7001]
        assert len(counted.batches) <= 7001 // batch_size + 2 + np.log2(batch_size) + 1
    repaired = CountingTeacher()
    with OutputStore(contents(8000), root=tmp_path) as store:
        assert store.missing(np.arange(8000)).tolist() == list(range(7001, 8000))
        collect(repaired, inputs_of, np.arange(8000), store, batch_size=batch_size)
        assert repaired.rows == list(range(7001, 8000))
        assert store.read(np.arange(8000))["logits"].tobytes() == expected_logits(np.arange(8000)).tobytes()


def test_the_own_error_of_a_teacher_is_kept(tmp_path):
    def broken(inputs):
        if 41 in inputs:
            raise InputError("logits must be finite; got nan: check the teacher")
        return teacher(inputs)

    with OutputStore(contents(), root=tmp_path) as store:
        message = (
            r"^on row 41: logits must be finite; got nan: check the teacher \(outputs computed before are stored\)$"
        )
        with pytest.raises(InputError, match=message):
            collect(broken, inputs_of, np.arange(200), store, batch_size=64)
        assert store.missing(np.arange(200))[0] == 41


def test_a_teacher_that_fails_on_large_batches_only(tmp_path):
    def greedy(inputs):
        if len(inputs) > 4 and 70 in inputs:
            raise MemoryError("too large")
        return teacher(inputs)

    with OutputStore(contents(), root=tmp_path) as store:
        message = "MemoryError: too large on 8 rows together, 64 to 71, but on none of them alone: fix"
        with pytest.raises(InputError, match=message):
            collect(greedy, inputs_of, np.arange(200), store, batch_size=64)
        assert store.missing(np.arange(200)).tolist() == list(range(72, 200))
        collect(greedy, inputs_of, np.arange(200), store, batch_size=64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_error_names_the_row_that_is_not_finite(bad, precision, tmp_path):
    def broken(inputs):
        return {"logits": np.where(inputs == 41, bad, teacher(inputs)["logits"].astype(np.float64))}

    with OutputStore(contents(precision=precision), root=tmp_path) as store:
        with pytest.raises(InputError, match="logits must be finite; got nan or infinity in row 41: check the teacher"):
            collect(broken, inputs_of, np.arange(200), store, batch_size=32)
        assert store.missing(np.arange(200))[0] == 41


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"probabilities": np.zeros((8, K))}, "must return logits; got probabilities: fix"),
        ({"logits": np.zeros((8, K + 1))}, r"numbers \[8, 5\] for 8 examples; got float64 \[8, 6\]: fix"),
        ({"logits": np.zeros((1, K))}, r"got float64 \[1, 5\]"),
        ({"logits": np.full((8, K), "a")}, r"got <U1 \[8, 5\]"),
    ],
)
def test_outputs_of_a_wrong_form_are_refused(outputs, message, tmp_path):
    with OutputStore(contents(), root=tmp_path) as store, pytest.raises(InputError, match=message):
        collect(lambda inputs: outputs, inputs_of, np.arange(8), store, batch_size=8)


def test_bfloat16_outputs_are_accepted(tmp_path):
    import jax.numpy as jnp

    with OutputStore(contents(), root=tmp_path) as store:
        collect(lambda x: {"logits": jnp.ones((len(x), K), jnp.bfloat16)}, inputs_of, [1], store, batch_size=8)
        assert store.read([1])["logits"].tolist() == [[1.0] * K]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, InputError])
def test_an_interrupt_keeps_computed_rows(kind, tmp_path):
    def pixels(rows):
        if 96 in rows:
            raise kind("corrupt image")
        return inputs_of(rows)

    with OutputStore(contents(), root=tmp_path) as store:
        with pytest.raises(kind, match="corrupt image"):
            collect(teacher, pixels, np.arange(200), store, batch_size=32)
        assert store.missing(np.arange(200))[0] == 96


def test_a_slow_teacher_stores_its_rows_every_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(output_store, "FLUSH_S", 0.0)
    with OutputStore(contents(), root=tmp_path) as store, OutputStore(contents(), root=tmp_path) as other:
        seen = []
        collect(
            teacher,
            inputs_of,
            range(40),
            store,
            batch_size=8,
            on_progress=lambda *x: seen.append(40 - len(other.missing(range(40)))),
        )
        assert seen == [0, 8, 16, 24, 32, 40]


# Spot checks.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_spot_check_finds_drift(precision, tmp_path):
    def drifted(by):
        return lambda inputs: {"logits": teacher(inputs)["logits"] * (1 + by)}

    rows = np.arange(200)
    with OutputStore(contents(precision=precision), root=tmp_path) as store:
        spot_check(teacher, inputs_of, store, rows, seed=0)  # nothing there to check
        collect(teacher, inputs_of, rows[:150], store, batch_size=50)
        counted = CountingTeacher(drifted(1e-6))
        spot_check(counted, inputs_of, store, rows, n=20, seed=0)
        assert len(set(counted.rows)) == 20
        assert max(counted.rows) < 150
        message = (
            r"teacher's outputs now, within 0.00\d+; got a difference of 0.0\d+ in row \d+: .* stale, delete .* or"
        )
        with pytest.raises(InputError, match=message):
            spot_check(drifted(0.02), inputs_of, store, rows, seed=0)
        spot_check(drifted(0.02), inputs_of, store, rows, seed=0, tolerance=0.05)
        with pytest.raises(InputError, match="got a difference of inf in row"):
            spot_check(lambda x: {"logits": teacher(x)["logits"] * np.nan}, inputs_of, store, rows)
        with pytest.raises(InputError, match="ZeroDivisionError"):
            spot_check(lambda x: 1 / 0, inputs_of, store, rows)


def test_a_spot_check_of_features_and_residual_mass(tmp_path):
    described = contents(precision="top2", fields={"logits": (K,), "f": (2,)})
    base = np.float32([5, 4, 1, 1, 0])

    def outputs(logits, f):
        return lambda x: {"logits": np.tile(np.float32(logits), (len(x), 1)), "f": np.full((len(x), 2), f, np.float32)}

    with OutputStore(described, root=tmp_path) as store:
        collect(outputs(base, 1.0), inputs_of, range(9), store, batch_size=4)
        spot_check(outputs(base, 1.0), inputs_of, store, range(9))
        spot_check(outputs([5, 4, 1, 0, 1], 1.0), inputs_of, store, range(9))  # the same mass elsewhere in the rest
        for wrong in (outputs(base, 1.1), outputs([5, 4, 3, 1, 0], 1.0), outputs([4, 5, 1, 1, 0], 1.0)):
            with pytest.raises(InputError, match="the cache is stale"):
                spot_check(wrong, inputs_of, store, range(9))


def test_a_near_tie_does_not_make_a_cache_stale(tmp_path):
    def outputs(by):
        return lambda x: {"logits": np.tile(np.float32([5, 2, 2 + by, 1, 0]), (len(x), 1))}

    with OutputStore(contents(precision="top2"), root=tmp_path) as store:
        collect(outputs(1e-6), inputs_of, range(9), store, batch_size=4)
        spot_check(outputs(-1e-6), inputs_of, store, range(9))


@pytest.mark.parametrize(
    ("precision", "accepted", "refused"),
    [("float32", 7e-5, 1.4e-4), ("float16", 1.5e-3, 2.8e-3), ("top2", 1.5e-3, 2.8e-3)],
)
def test_the_tolerance_of_a_spot_check(precision, accepted, refused, tmp_path):
    """It is 1e-4 in float32 and 2e-3 elsewhere, relative to the largest magnitude of a row."""

    def outputs(drift):
        return lambda x: {"logits": np.tile(np.float32([4, 2, 0, 1, 3]) * np.float32(1 + drift), (len(x), 1))}

    with OutputStore(contents(precision=precision), root=tmp_path) as store:
        collect(outputs(0.0), inputs_of, range(9), store, batch_size=4)
        spot_check(outputs(accepted), inputs_of, store, range(9))
        with pytest.raises(InputError, match="the cache is stale"):
            spot_check(outputs(refused), inputs_of, store, range(9))


def test_a_spot_check_runs_the_teacher_on_sixteen_rows(tmp_path):
    with OutputStore(contents(), root=tmp_path) as store:
        collect(teacher, inputs_of, range(200), store, batch_size=100)
        counting = CountingTeacher()
        spot_check(counting, inputs_of, store, range(200))
    assert len(set(counting.rows)) == 16


def test_rows_are_stored_at_the_latest_after_five_seconds(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(output_store.time, "monotonic", lambda: now[0])
    with OutputStore(contents(), root=tmp_path) as store, OutputStore(contents(), root=tmp_path) as other:
        stored = []

        def progress(done, total):
            now[0] += 2.0
            stored.append(200 - len(other.missing(range(200))))

        collect(teacher, inputs_of, range(40), store, batch_size=8, on_progress=progress)
    assert stored == [0, 0, 0, 0, 32, 32]


def test_a_shard_has_at_most_2048_rows_and_8_mib(tmp_path):
    wide = {"logits": (K,), "feature": (4096,)}  # 16 kB a row

    def outputs(inputs):
        return {**teacher(inputs), "feature": np.zeros((len(inputs), 4096), np.float32)}

    for described, run, largest in ((contents(5000), teacher, 2048), (contents(700, fields=wide), outputs, 511)):
        with OutputStore(described, root=tmp_path / str(largest)) as store:
            collect(run, inputs_of, range(described.rows), store, batch_size=1)
            row_bytes = 8 + store.codec.dtype.itemsize
        sizes = [(path.stat().st_size - shards.HEADER.size) // row_bytes for path in store.directory.glob("*.rows")]
        assert max(sizes) == largest
        assert sum(sizes) == described.rows
