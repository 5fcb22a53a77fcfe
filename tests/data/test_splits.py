"""The four splits are disjoint, stratified, and depend on the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.config import Fractions
from ev3_distill.data.splits import SPLITS, split_rows
from ev3_distill.errors import InputError

SEEDS = st.integers(0, 2**40)
LABELS = st.lists(st.integers(-1, 6), min_size=60, max_size=300).map(np.array)
FRACTIONS = st.tuples(*[st.integers(2, 9)] * 4).map(lambda w: Fractions(*(x / sum(w) for x in w)))


def shares_of(fractions, names):
    shares = np.array([getattr(fractions, name) for name in names])
    return shares / shares.sum()


def check_division(rows, labels, of, names, fractions):
    """Asserts that splits are disjoint, sorted and complete; sizes and counts of strata are within 1 of proportional."""
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
def test_splits_divide_every_stratum_proportionally(labels, seed, fractions):
    rows = split_rows(labels, None, seed=seed, fractions=fractions)
    assert tuple(rows) == SPLITS
    check_division(rows, labels, np.arange(len(labels)), SPLITS, fractions)


@settings(deadline=None, max_examples=60)
@given(LABELS, SEEDS, FRACTIONS, st.integers(1, 30))
def test_own_test_rows_are_the_test_split(labels, seed, fractions, size):
    test_rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:size])
    rows = split_rows(labels, test_rows, seed=seed, fractions=fractions)
    np.testing.assert_array_equal(rows["test"], test_rows)
    rest = np.setdiff1d(np.arange(len(labels)), test_rows)
    check_division(rows, labels, rest, SPLITS[:3], fractions)


@settings(deadline=None, max_examples=20)
@given(LABELS, SEEDS)
def test_splits_depend_on_the_seed_alone(labels, seed):
    first, again, other = (split_rows(labels, None, seed=s) for s in (seed, seed, seed + 1))
    for name in SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(not np.array_equal(first[name], other[name]) for name in SPLITS)


def test_two_strata_by_hand():
    rows = split_rows(np.repeat([0, 1], [20, 40]), None, seed=3)
    counts = {name: ((r < 20).sum(), (r >= 20).sum()) for name, r in rows.items()}
    assert counts == {"explore": (10, 20), "assess": (3, 6), "decide": (3, 6), "test": (4, 8)}


def test_strata_of_one_example_are_divided_at_random():
    splits = [split_rows(np.arange(1000), None, seed=s) for s in range(3)]
    assert {name: len(rows) for name, rows in splits[0].items()} == dict(zip(SPLITS, (500, 150, 150, 200), strict=True))
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
def test_too_few_examples_are_refused(n, test_rows, message):
    test_rows = None if test_rows is None else np.array(test_rows, int)
    with pytest.raises(InputError, match=message):
        split_rows(np.zeros(n, int), test_rows, seed=0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("n", "test_rows"), [(7, None), (8, [3, 4])])
def test_the_number_of_examples_named_by_the_error_suffices(n, test_rows, seed):
    rows = split_rows(np.arange(n) % 3, test_rows, seed=seed)
    assert min(len(r) for r in rows.values()) >= 1
    assert len(rows["explore"]) >= 2


def test_explore_has_at_least_two_examples():
    quarters = Fractions(0.25, 0.25, 0.25, 0.25)
    with pytest.raises(InputError, match=r"got 7 examples, too few for explore: give at least 8"):
        split_rows(np.zeros(7, int), None, seed=0, fractions=quarters)
    assert len(split_rows(np.zeros(8, int), None, seed=0, fractions=quarters)["explore"]) == 2


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must not be negative; got -1"):
        split_rows(np.arange(100) % 2, None, seed=-1)


def test_held_out_splits_have_a_maximum_size():
    labels = np.arange(60_000) % 10
    test_rows = np.arange(50_000, 60_000)
    rows = split_rows(labels, test_rows, seed=0)
    assert [len(rows[name]) for name in SPLITS] == [45_000, 2_500, 2_500, 10_000]
    assert (np.bincount(labels[rows["decide"]]) == 250).all()
    rows = split_rows(labels, test_rows, seed=0, fractions=Fractions(most=70))
    assert [len(rows[name]) for name in SPLITS] == [49_860, 70, 70, 10_000]
    rows = split_rows(labels, None, seed=0, fractions=Fractions(most=100))
    assert [len(rows[name]) for name in SPLITS] == [47_800, 100, 100, 12_000]


def test_strata_may_be_any_values():
    """A task may stratify by anything, such as ranges of a real target."""
    strata = np.repeat(["low", "middle", "high"], [20, 40, 60])
    rows = split_rows(strata, None, seed=0)
    counts = {name: [(strata[r] == value).sum() for value in ("low", "middle", "high")] for name, r in rows.items()}
    assert counts == {"explore": [10, 20, 30], "assess": [3, 6, 9], "decide": [3, 6, 9], "test": [4, 8, 12]}
