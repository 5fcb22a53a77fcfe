import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill import data
from ev3_distill.config import Fractions
from ev3_distill.errors import InputError

FOLDER = Path(os.environ.get("EV3_DISTILL_DATA", Path(__file__).parents[1] / "../shared/data"))
SEEDS = st.integers(0, 2**40)
LABELS = st.lists(st.integers(-1, 6), min_size=60, max_size=300).map(np.array)
FRACTIONS = st.tuples(*[st.integers(2, 9)] * 4).map(lambda w: Fractions(*(x / sum(w) for x in w)))


# Splits.


def shares_of(fractions, names):
    shares = np.array([getattr(fractions, name) for name in names])
    return shares / shares.sum()


def check_division(rows, labels, of, names, fractions):
    """Disjoint, sorted, together `of`; sizes below 1 and class counts at most 1 from proportional."""
    together = np.concatenate([rows[name] for name in names])
    np.testing.assert_array_equal(np.sort(together), of)
    for name, share in zip(names, shares_of(fractions, names), strict=True):
        assert (np.diff(rows[name]) > 0).all()
        assert abs(len(rows[name]) - share * len(of)) < 1 + 1e-6
        for label in np.unique(labels):
            due = share * (labels[of] == label).sum()
            assert abs((labels[rows[name]] == label).sum() - due) <= 1 + 1e-6


@settings(deadline=None, max_examples=60)
@given(LABELS, SEEDS, FRACTIONS)
def test_splits_divide_every_class(labels, seed, fractions):
    rows = data.split_rows(labels, None, seed=seed, fractions=fractions)
    assert tuple(rows) == data.SPLITS
    check_division(rows, labels, np.arange(len(labels)), data.SPLITS, fractions)


@settings(deadline=None, max_examples=60)
@given(LABELS, SEEDS, FRACTIONS, st.integers(1, 30))
def test_own_test_rows_are_the_test_split(labels, seed, fractions, size):
    test_rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:size])
    rows = data.split_rows(labels, test_rows, seed=seed, fractions=fractions)
    np.testing.assert_array_equal(rows["test"], test_rows)
    rest = np.setdiff1d(np.arange(len(labels)), test_rows)
    check_division(rows, labels, rest, data.SPLITS[:3], fractions)


@settings(deadline=None, max_examples=20)
@given(LABELS, SEEDS)
def test_splits_follow_the_seed_alone(labels, seed):
    first, again, other = (data.split_rows(labels, None, seed=s) for s in (seed, seed, seed + 1))
    for name in data.SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(not np.array_equal(first[name], other[name]) for name in data.SPLITS)


def test_class_of_ten_by_hand():
    rows = data.split_rows(np.repeat([0, 1], [20, 40]), None, seed=3)
    counts = {name: ((r < 20).sum(), (r >= 20).sum()) for name, r in rows.items()}
    assert counts == {"explore": (10, 20), "assess": (3, 6), "decide": (3, 6), "test": (4, 8)}


def test_classes_of_one_example_are_spread():
    splits = [data.split_rows(np.arange(1000), None, seed=s) for s in range(3)]
    assert {name: len(rows) for name, rows in splits[0].items()} == dict(
        zip(data.SPLITS, (500, 150, 150, 200), strict=True)
    )
    # Which class goes where is random too: two seeds share about a fifth of their test rows.
    assert 10 < len(np.intersect1d(splits[0]["test"], splits[1]["test"])) < 90
    assert 30 < (splits[0]["test"] < 300).sum() < 90


@pytest.mark.parametrize(
    ("n", "test_rows", "message"),
    [
        (4, None, r"got 4 examples, too few for (assess|decide): give at least 7"),
        (1, None, r"explore needs at least 2 .*got 1 examples.* give at least 7"),
        (5, [3, 4], r"got 3 examples beside 2 for test, .*: give at least 6 and 1 for test"),
        (40, [], r"got 40 examples beside 0 for test, too few for test"),
        (4, [0, 1, 2, 3], r"got 0 examples beside 4 for test, .*explore and assess and decide"),
    ],
)
def test_too_few_examples(n, test_rows, message):
    test_rows = None if test_rows is None else np.array(test_rows, int)
    with pytest.raises(InputError, match=message):
        data.split_rows(np.zeros(n, int), test_rows, seed=0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("n", "test_rows"), [(7, None), (8, [3, 4])])
def test_the_number_that_errors_ask_for_suffices(n, test_rows, seed):
    rows = data.split_rows(np.arange(n) % 3, test_rows, seed=seed)
    assert min(len(r) for r in rows.values()) >= 1
    assert len(rows["explore"]) >= 2


def test_negative_seed():
    with pytest.raises(InputError, match="seed must not be negative; got -1"):
        data.split_rows(np.arange(100) % 2, None, seed=-1)


# Splitting a data set into batches.


def test_split_carries_examples_by_index():
    digits = data.load_data("digits")
    logits = np.random.default_rng(0).normal(size=(1797, 10)).astype(np.float32)
    pools, test = data.split(digits, logits, seed=0)
    rows = data.split_rows(digits.labels, None, seed=0)
    for name, batch in zip(data.SPLITS, (*pools[:3], test), strict=True):
        assert all(isinstance(leaf, jax.Array) for leaf in batch)
        assert (batch.labels.dtype, batch.index.dtype, batch.weight.dtype) == (jnp.int32, jnp.int32, jnp.float32)
        np.testing.assert_array_equal(batch.index, rows[name])
        np.testing.assert_array_equal(batch.inputs, digits.inputs[rows[name]])
        np.testing.assert_array_equal(batch.labels, digits.labels[rows[name]])
        np.testing.assert_array_equal(batch.teacher_logits, logits[rows[name]])
        np.testing.assert_array_equal(batch.weight, np.ones(len(rows[name])))
    assert sorted(pools.order.base.tolist()) == list(range(len(rows["explore"])))


def test_split_refuses_foreign_or_broken_logits():
    digits = data.load_data("digits")
    with pytest.raises(InputError, match=r"\[1797, 10\]; got \[1797, 9\]"):
        data.split(digits, np.zeros((1797, 9), np.float32), seed=0)
    logits = np.zeros((1797, 10), np.float32)
    logits[41, 3] = np.nan
    with pytest.raises(InputError, match="must be finite; got nan or infinity in row 41"):
        data.split(digits, logits, seed=0)


# The order of batches.


def epochs_of(n, batch_size, seed, *, first=0, count=1):
    """Rows of epochs, [count, batches, batch_size]."""
    m = max(n // batch_size, 1)
    steps = jnp.arange(first * m, (first + count) * m)
    rows = jax.vmap(functools.partial(data.rows, batch_size=batch_size), in_axes=(None, 0))
    return np.asarray(jax.jit(rows)(data.order(n, seed), steps)).reshape(count, m, batch_size)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.integers(1, 130), SEEDS, st.integers(0, 5000))
def test_an_epoch_visits_a_row_at_most_once(n, batch_size, seed, first):
    epochs = epochs_of(n, batch_size, seed, first=first, count=3)
    assert epochs.dtype == np.int32
    assert epochs.min() >= 0
    assert epochs.max() < n
    for epoch in epochs:
        visits = np.bincount(epoch.ravel(), minlength=n)
        if batch_size <= n:
            assert visits.max() == 1
            assert visits.sum() == n // batch_size * batch_size
        else:  # one batch that goes round the rows
            assert visits.max() - visits.min() <= 1


@pytest.mark.parametrize("n", [65_537, 1_200_000, 10_000_000])
def test_no_overflow(n):
    # A product that wraps at 2**32 would send two positions to one row.
    epochs = epochs_of(n, 1000, 1, first=70, count=2)
    for epoch in epochs:
        visits = np.bincount(epoch.ravel(), minlength=n)
        assert visits.max() == 1
        assert visits.sum() == n // 1000 * 1000
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("n", [*range(1, 200), 65_536, 1_200_000, 2**30, 2**31 - 1])
def test_multipliers_keep_their_bounds(n):
    multipliers = data._multipliers(n, np.random.default_rng(0)).tolist()
    assert 1 <= len(multipliers) <= 64
    assert len(set(multipliers)) == len(multipliers)
    for a in multipliers:
        assert np.gcd(a, n) == 1
        assert a >= 1
        assert a * (n - 1) + (n - 1) < 2**32


def test_epochs_regroup_like_true_reshuffling():
    n, batch_size, count = 900, 64, 64
    together = {}
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(n)[: n // 64 * 64].reshape(-1, 64) for _ in range(count)])
    ordered = epochs_of(n, batch_size, 0, count=count)
    for name, epochs in {"order": ordered, "shuffle": shuffled}.items():
        member = np.zeros((n, epochs.shape[0] * epochs.shape[1]), np.float32)
        for i, batch in enumerate(epochs.reshape(-1, batch_size)):
            member[batch, i] = 1
        together[name] = (member @ member.T)[np.triu_indices(n, 1)]  # in how many batches a pair meets
    assert together["order"].mean() == together["shuffle"].mean()
    assert 0.8 < together["order"].std() / together["shuffle"].std() < 1.1


def test_what_an_epoch_leaves_out_changes():
    n, batch_size = 100, 48
    epochs = epochs_of(n, batch_size, 0, count=200)
    visits = np.bincount(epochs.ravel(), minlength=n)
    assert visits.min() > 180  # 192 expected; one that is always left out would have 0


def test_order_follows_seed_and_step_alone():
    first, again, other = (epochs_of(500, 32, seed, count=4) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(np.sort(first[0]), np.sort(first[1]))


def test_rows_under_jit_and_loop_equal_eager_ones():
    order = data.order(50, 5)
    rows = functools.partial(data.rows, batch_size=8)

    @jax.jit
    def loop(order, first):
        def body(i, seen):
            return seen.at[i].set(rows(order, first + i))

        return jax.lax.fori_loop(0, 20, body, jnp.zeros((20, 8), jnp.int32))

    eager = np.stack([rows(order, jnp.int32(step)) for step in range(13, 33)])
    np.testing.assert_array_equal(loop(order, jnp.int32(13)), eager)
    np.testing.assert_array_equal(np.stack([rows(order, step) for step in range(13, 16)]), eager[:3])


def test_orders_of_one_size_share_a_program():
    compiled = jax.jit(functools.partial(data.rows, batch_size=8)).lower(data.order(50, 0), np.int32(0)).compile()
    assert not np.array_equal(compiled(data.order(50, 1), np.int32(3)), compiled(data.order(50, 2), np.int32(3)))


@pytest.mark.parametrize("n", [0, 2**31])
def test_order_needs_rows(n):
    with pytest.raises(InputError, match=f"an order needs 1 to .* rows; got {n}"):
        data.order(n, 0)


# Sources.


def save(folder, **arrays):
    np.savez(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


def example_arrays(n=12, shape=(4, 3)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *shape)).astype(np.uint8), np.arange(n, dtype=np.uint8) % 3


def test_digits():
    digits = data.load_data("digits")
    assert digits.inputs.shape == (1797, 8, 8, 1)
    assert (digits.inputs.dtype, digits.labels.dtype) == (np.float32, np.int32)
    assert (digits.inputs.min(), digits.inputs.max()) == (0, 1)
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.num_classes, digits.class_names) == (10, tuple("0123456789"))
    assert digits.test_rows is None
    assert (digits.source, digits.fingerprint) == ("digits", data.load_data("digits").fingerprint)


@pytest.mark.parametrize(("x", "y"), [("inputs", "labels"), ("image", "label")])
def test_npz(tmp_path, x, y):
    inputs, labels = example_arrays()
    source = save(tmp_path, **{x: inputs, y: labels})
    dataset = data.load_data(source)
    assert dataset.inputs.shape == (12, 4, 3, 1)
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(dataset.inputs[..., 0], inputs.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(dataset.labels, labels)
    assert (dataset.num_classes, dataset.class_names) == (3, ("0", "1", "2"))
    assert (dataset.source, dataset.test_rows) == (source, None)


@pytest.mark.parametrize(("x", "y"), [("inputs", "labels"), ("image", "label")])
def test_npz_already_split(tmp_path, x, y):
    inputs, labels = example_arrays()
    parts = {f"train_{x}": inputs[:8], f"train_{y}": labels[:8], f"test_{x}": inputs[8:], f"test_{y}": labels[8:]}
    dataset = data.load_data(save(tmp_path, **parts))
    np.testing.assert_array_equal(dataset.test_rows, [8, 9, 10, 11])
    np.testing.assert_array_equal(dataset.inputs[..., 0], inputs.astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(dataset.labels, labels)
    _, test = data.split(dataset, np.zeros((12, 3), np.float32), seed=0)
    np.testing.assert_array_equal(test.index, [8, 9, 10, 11])


@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
def test_other_shapes_and_numbers_stay(tmp_path, shape, dtype):
    inputs = np.arange(12 * np.prod(shape)).reshape(12, *shape).astype(dtype)
    dataset = data.load_data(save(tmp_path, inputs=inputs, labels=np.arange(12) % 2))
    assert dataset.inputs.dtype == np.float32
    np.testing.assert_array_equal(dataset.inputs, inputs)


def test_class_names(tmp_path):
    inputs, labels = example_arrays()
    dataset = data.load_data(save(tmp_path, inputs=inputs, labels=labels, class_names=["ant", "bee", "cat", "dog"]))
    assert (dataset.num_classes, dataset.class_names) == (4, ("ant", "bee", "cat", "dog"))


def test_other_arrays_are_not_read(tmp_path):
    inputs, labels = example_arrays()
    data.load_data(save(tmp_path, inputs=inputs, labels=labels, notes=np.array([{}], object)))


def test_fingerprint_tells_contents_apart(tmp_path):
    inputs, labels = example_arrays()
    other_inputs, other_labels = inputs.copy(), labels.copy()
    other_inputs[5, 2, 1] ^= 1
    other_labels[5] = 1 - other_labels[5] % 2
    halves = {"train_image": inputs[:6], "train_label": labels[:6], "test_image": inputs[6:], "test_label": labels[6:]}
    contents = [
        {"inputs": inputs, "labels": labels},
        {"inputs": inputs.reshape(12, 3, 4), "labels": labels},
        {"inputs": other_inputs, "labels": labels},
        {"inputs": inputs, "labels": other_labels},
        halves,
    ]
    prints = [data.load_data(save(tmp_path, **arrays)).fingerprint for arrays in contents]
    assert len(set(prints)) == len(prints)
    assert data.load_data(save(tmp_path, image=inputs, label=labels.astype(np.int64))).fingerprint == prints[0]


def test_mnist():
    path = FOLDER / "mnist.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set EV3_DISTILL_DATA to a folder that has it")
    mnist = data.load_data(f"npz:{path}")
    assert mnist.inputs.shape == (70_000, 28, 28, 1)
    assert (mnist.inputs.min(), mnist.inputs.max(), mnist.num_classes) == (0, 1, 10)
    rows = data.split_rows(mnist.labels, mnist.test_rows, seed=0)
    assert [len(rows[name]) for name in data.SPLITS] == [37_500, 11_250, 11_250, 10_000]
    np.testing.assert_array_equal(rows["test"], np.arange(60_000, 70_000))


# Bad sources.


@pytest.mark.parametrize("source", ["mnist", "npz:", "npz", "digits:8", "", "csv:a.csv", "set.npz"])
def test_unknown_source(source):
    with pytest.raises(InputError, match="a data source is digits or npz:FILE; got '"):
        data.load_data(source)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(InputError, match="missing or no file: check the path"):
            data.load_data(f"npz:{path}")


def test_unreadable_file(tmp_path):
    inputs, labels = example_arrays(n=400)
    np.savez_compressed(tmp_path / "whole.npz", inputs=inputs, labels=labels)
    whole = (tmp_path / "whole.npz").read_bytes()
    middle = len(whole) // 2
    np.save(tmp_path / "one.npy", inputs)
    broken = {
        "empty": b"",
        "text": b"label,pixel\n1,2\n",
        "truncated": whole[:middle],
        "damaged": whole[:middle] + b"\0" * 64 + whole[middle + 64 :],
        "npy": (tmp_path / "one.npy").read_bytes(),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"must be a whole npz file; got one that cannot be read"):
            data.load_data(f"npz:{tmp_path / name}")


IMAGES, CLASSES = example_arrays()
NAN = np.zeros((12, 4), np.float32)
NAN[7, 1] = np.nan
BAD_ARRAYS = {
    "no arrays": ({}, "got no array: rename or add"),
    "other arrays": ({"x": IMAGES, "y": CLASSES}, "must hold inputs and labels .*; got x, y: rename or add"),
    "no labels": ({"inputs": IMAGES}, "; got inputs: rename"),
    "no test part": ({"train_image": IMAGES, "train_label": CLASSES}, "; got train_image, train_label: rename"),
    "objects": ({"inputs": IMAGES, "labels": np.array([{}] * 12)}, "got Python objects in 'labels'"),
    "lengths": ({"inputs": IMAGES, "labels": CLASSES[:11]}, r"same length .*; got \[12, 4, 3\] and \[11\]"),
    "one-hot": ({"inputs": IMAGES, "labels": np.eye(12, dtype=int)}, r"one number per example; got .* and \[12, 12\]"),
    "float labels": ({"image": IMAGES, "label": CLASSES * 1.0}, "label must be integers; got float64"),
    "bool labels": ({"image": IMAGES, "label": CLASSES > 1}, "label must be integers; got bool"),
    "negative": ({"inputs": IMAGES, "labels": CLASSES.astype(int) - 1}, "must not be negative; got -1 in row 0"),
    "beyond names": (
        {"inputs": IMAGES, "labels": CLASSES, "class_names": ["a", "b"]},
        "below the number of class_names, 2; got 2 in row 2",
    ),
    "huge label": ({"inputs": IMAGES, "labels": CLASSES * np.uint64(2**62)}, f"got label {2**63} among 12 examples"),
    "names are numbers": (
        {"inputs": IMAGES, "labels": CLASSES, "class_names": np.arange(3)},
        r"class_names must be text \[K\]; got int64 \[3\]",
    ),
    "one class": ({"inputs": IMAGES, "labels": CLASSES * 0 + 3}, "at least 2 classes must occur; got label 3 alone"),
    "nan": ({"inputs": NAN, "labels": CLASSES}, "inputs must be finite; got nan or infinity in row 7"),
    "overflow": ({"inputs": np.eye(12) * 1e300, "labels": CLASSES}, "nan or infinity in row 0"),
    "no examples": ({"inputs": IMAGES[:0], "labels": CLASSES[:0]}, r"at least one example; got shape \[0, 4, 3\]"),
    "numbers": ({"inputs": np.arange(12), "labels": CLASSES}, r"inputs must be numbers .*; got int64 \[12\]"),
    "text": ({"inputs": np.full((12, 2), "a"), "labels": CLASSES}, "inputs must be numbers .*; got <U1"),
    "two shapes": (
        {"train_image": IMAGES, "train_label": CLASSES, "test_image": IMAGES[:, 1:], "test_label": CLASSES},
        r"must have one shape; got .*\(4, 3, 1\).*\(3, 3, 1\)",
    ),
    "empty test part": (
        {"train_image": IMAGES, "train_label": CLASSES, "test_image": IMAGES[:0], "test_label": CLASSES[:0]},
        "test_image must hold at least one example",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(tmp_path, name):
    arrays, message = BAD_ARRAYS[name]
    with pytest.raises(InputError, match=message):
        data.load_data(save(tmp_path, **arrays))
