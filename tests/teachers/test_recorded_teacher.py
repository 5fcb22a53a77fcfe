import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.errors import InputError
from ev3_distill.teachers.kinds.recorded import load_logits, save_logits

LOGITS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "logits.npz", **arrays)
        return tmp_path / "logits.npz"

    return write


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 1000))
def test_saved_logits_come_back(tmp_path_factory, n, k, seed):
    path = tmp_path_factory.mktemp("logits") / "l.npz"
    logits = np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)
    save_logits(path, logits, "abc")
    loaded = load_logits(path, rows=n, fingerprint="abc")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, logits)


def test_saving_is_atomic_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "l.npz"
    save_logits(path, LOGITS, "old")
    save_logits(str(path), LOGITS + 1, "new")
    np.testing.assert_array_equal(load_logits(str(path), rows=10, fingerprint="new"), LOGITS + 1)
    assert list(tmp_path.iterdir()) == [path]


def test_failed_saving_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "l.npz"
    save_logits(path, LOGITS, "old")

    def fail(file, **arrays):
        file.write(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_logits(path, LOGITS + 1, "new")
    monkeypatch.undo()
    np.testing.assert_array_equal(load_logits(path, rows=10, fingerprint="old"), LOGITS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_any_numbers_become_float32(save, dtype):
    loaded = load_logits(save(logits=LOGITS.astype(dtype)), rows=10)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, LOGITS.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("test_rows", [[7, 8, 9], [0, 4, 9]])
def test_train_and_test_logits_take_their_rows(save, test_rows):
    rest = np.setdiff1d(np.arange(10), test_rows)
    path = save(train_logits=LOGITS[rest], test_logits=LOGITS[test_rows])
    loaded = load_logits(path, rows=10, test_rows=np.array(test_rows))
    np.testing.assert_array_equal(loaded, LOGITS)


def test_logits_of_all_rows_work_for_split_sources(save):
    loaded = load_logits(save(logits=LOGITS), rows=10, test_rows=np.arange(7, 10))
    np.testing.assert_array_equal(loaded, LOGITS)


def test_fingerprints_are_compared_if_both_exist(save):
    stale = save(logits=LOGITS, fingerprint="a" * 64)
    with pytest.raises(InputError, match=r"fingerprint bbbbbbbbbbbb; got aaaaaaaaaaaa: the logits are stale"):
        load_logits(stale, rows=10, fingerprint="b" * 64)
    load_logits(stale, rows=10, fingerprint="a" * 64)
    load_logits(stale, rows=10)
    load_logits(save(logits=LOGITS), rows=10, fingerprint="b" * 64)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"logits:FILE needs a file; got .*none\.npz, which does not exist"):
        load_logits(tmp_path / "none.npz", rows=10)


def test_unreadable_file(save, tmp_path):
    whole = save(logits=np.zeros((500, 3))).read_bytes()
    damaged = whole[:1000] + b"\1" * 8 + whole[1008:]
    np.save(tmp_path / "one.npy", LOGITS)
    for content in (b"", b"1.5,2.5\n", whole[:1000], damaged, (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(InputError, match="must be a complete npz file; got one that cannot be read"):
            load_logits(tmp_path / "broken.npz", rows=500)


INFINITE = LOGITS.copy()
INFINITE[6, 2] = np.inf
FAULTY_ARRAYS = {
    "missing": ({"outputs": LOGITS}, "must hold logits, or train_logits and test_logits; got outputs: rename"),
    "half": ({"train_logits": LOGITS}, "; got train_logits: rename"),
    "objects": ({"logits": np.array([[{}] * 3] * 10)}, "got Python objects in 'logits'"),
    "length": ({"logits": LOGITS[:9]}, "one row per example, 10; got 9: run the teacher"),
    "shape": ({"logits": LOGITS[:, :, None]}, r"must be numbers \[N, K\]; got float32 \[10, 3, 1\]"),
    "empty": ({"logits": LOGITS[:, :0]}, r"must be numbers \[N, K\]; got float32 \[10, 0\]"),
    "zero": (
        {"logits": np.where(np.eye(10, 3) > 0, 0, -np.inf)},
        r"nan or infinity in row 0: the logarithm of .* clip first",
    ),
    "text": ({"logits": LOGITS.astype(str)}, r"must be numbers \[N, K\]; got <U"),
    "infinite": ({"logits": INFINITE}, "logits must be finite; got nan or infinity in row 6"),
    "overflow": ({"logits": LOGITS.astype(float) * 1e300}, "nan or infinity in row 0"),
    "unsplit": ({"train_logits": LOGITS[:7], "test_logits": LOGITS[7:]}, "without a test part needs"),
}


@pytest.mark.parametrize("name", FAULTY_ARRAYS)
def test_faulty_arrays_are_refused(save, name):
    arrays, message = FAULTY_ARRAYS[name]
    with pytest.raises(InputError, match=message):
        load_logits(save(**arrays), rows=10)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (LOGITS[:6], LOGITS[7:], "train_logits must have one row per example, 7; got 6"),
        (LOGITS[:7], LOGITS[6:], "test_logits must have one row per example, 3; got 4"),
        (LOGITS[:7], INFINITE[6:9], "test_logits must be finite; got nan or infinity in row 0"),
    ],
)
def test_faulty_parts_are_refused(save, train, test, message):
    path = save(train_logits=train, test_logits=test)
    with pytest.raises(InputError, match=message):
        load_logits(path, rows=10, test_rows=np.arange(7, 10))
