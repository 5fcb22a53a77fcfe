"""The four splits are disjoint, depend on the seed alone, and the sealed one is a simple random sample."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.certify.bounds import clopper_pearson_lower, mcnemar_p_value
from ev3_distill.config import Compress, Fractions
from ev3_distill.config_file import read_config, read_run_config
from ev3_distill.data import Dataset, splits_of
from ev3_distill.data.splits import SPLITS, split_rows, split_rows_jointly
from ev3_distill.errors import InputError

SEEDS = st.integers(0, 2**40)
LABELS = st.lists(st.integers(-1, 6), min_size=60, max_size=300).map(np.array)
FRACTIONS = st.tuples(*[st.integers(2, 9)] * 4).map(lambda w: Fractions(*(x / sum(w) for x in w)))


def shares_of(fractions, names):
    shares = np.array([getattr(fractions, name) for name in names])
    return shares / shares.sum()


def check_division(rows, labels, of, names, fractions):
    """Asserts that splits are disjoint, sorted and complete, and that sizes are within 1 of proportional."""
    together = np.concatenate([rows[name] for name in names])
    np.testing.assert_array_equal(np.sort(together), of)
    for name, share in zip(names, shares_of(fractions, names), strict=True):
        assert (np.diff(rows[name]) > 0).all()
        assert abs(len(rows[name]) - share * len(of)) < 1 + 1e-6


def check_strata(rows, labels, names, shares=None):
    """Asserts that the counts of every stratum are within 1 of proportional to shares, by default to sizes."""
    together = np.concatenate([rows[name] for name in names])
    shares = [len(rows[name]) / len(together) for name in names] if shares is None else shares
    for name, share in zip(names, shares, strict=True):
        for label in np.unique(labels):
            due = share * (labels[together] == label).sum()
            assert abs((labels[rows[name]] == label).sum() - due) <= 1 + 1e-6


@settings(deadline=None, max_examples=60)
@given(LABELS, SEEDS, FRACTIONS)
def test_splits_have_the_configured_sizes(labels, seed, fractions):
    rows = split_rows(labels, None, seed=seed, fractions=fractions)
    assert tuple(rows) == SPLITS
    check_division(rows, labels, np.arange(len(labels)), SPLITS, fractions)
    check_strata(rows, labels, ("explore", "assess"))


@settings(deadline=None, max_examples=60)
@given(LABELS, SEEDS, FRACTIONS, st.integers(1, 30))
def test_own_test_rows_are_the_test_split(labels, seed, fractions, size):
    test_rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:size])
    rows = split_rows(labels, test_rows, seed=seed, fractions=fractions)
    assert tuple(rows) == SPLITS
    np.testing.assert_array_equal(rows["test"], test_rows)
    rest = np.setdiff1d(np.arange(len(labels)), test_rows)
    check_division(rows, labels, rest, SPLITS[:3], fractions)
    check_strata(rows, labels, ("explore", "assess"))


@settings(deadline=None, max_examples=30)
@given(LABELS, SEEDS, FRACTIONS)
def test_older_runs_are_divided_by_their_own_method(labels, seed, fractions):
    rows = split_rows_jointly(labels, None, seed=seed, fractions=fractions)
    check_division(rows, labels, np.arange(len(labels)), SPLITS, fractions)
    check_strata(rows, labels, SPLITS, shares_of(fractions, SPLITS))


@pytest.mark.parametrize(
    ("labels", "test_rows", "options", "digest"),
    [
        (np.arange(1000) % 7, None, {"seed": 3}, "3a144e21f147b688"),
        (
            np.arange(300) % 4,
            np.arange(40, 90),
            {"seed": 5, "fractions": Fractions(0.4, 0.2, 0.1, 0.3)},
            "36b698fbefebf89c",
        ),
    ],
)
def test_the_splits_of_older_runs_never_change(labels, test_rows, options, digest):
    rows = split_rows_jointly(labels, test_rows, **options)
    content = b"".join(rows[name].astype("<i8").tobytes() for name in SPLITS)
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_a_run_without_the_key_is_divided_as_older_versions_did(tmp_path):
    (tmp_path / "config.toml").write_text("seed = 7\n")
    data = Dataset(np.zeros((100, 2), np.float32), (np.arange(100) % 5).astype(np.int32), 5, (), None, "", "")
    for config, divide in (
        (read_run_config(Compress, tmp_path), split_rows_jointly),
        (read_config(Compress, tmp_path / "config.toml"), split_rows),  # a new run with the options of that file
    ):
        expected = divide(data.labels, None, seed=7)
        for name, rows in splits_of(config, data).items():
            np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.parametrize(("classes", "share"), [(10, 0.2), (10, 0.7), (100, 0.4)])
def test_a_student_of_the_prior_is_promised_too_much_in_at_most_one_run_in_twenty(classes, share):
    """Labels are noise, and the student predicts the most common class of explore: its accuracy is 1 / classes."""
    rest, rng, n, runs = 1 - share, np.random.default_rng(0), 1000, 600
    fractions = Fractions(0.4 * rest, 0.2 * rest, 0.4 * rest, share, most=n)
    wrong, promoted = 0, 0
    for seed in range(runs):
        labels = rng.integers(0, classes, n)
        rows = split_rows(labels, None, seed=seed, fractions=fractions)
        seen = np.bincount(labels[rows["explore"]], minlength=classes)
        hits = labels[rows["test"]] == seen.argmax()
        wrong += clopper_pearson_lower(int(hits.sum()), len(hits), confidence=0.95) > 1 / classes
        wins, losses = ((labels[rows["decide"]] == c).sum() for c in (seen.argmax(), seen.argmin()))
        promoted += mcnemar_p_value(int(wins), int(losses)) <= 0.05
    assert wrong <= 45  # of 600 runs; at 5 % more would occur 4 times in 1,000
    assert promoted <= 45


@settings(deadline=None, max_examples=20)
@given(LABELS, SEEDS)
def test_splits_depend_on_the_seed_alone(labels, seed):
    first, again, other = (split_rows(labels, None, seed=s) for s in (seed, seed, seed + 1))
    for name in SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(not np.array_equal(first[name], other[name]) for name in SPLITS)


def test_two_strata_by_hand():
    rows = split_rows(
        np.repeat([0, 1], [20, 40]), np.arange(0, 60, 5), seed=3, fractions=Fractions(0.5, 0.25, 0.125, 0.125)
    )
    decide = (rows["decide"] < 20).sum()  # of 16 and 32
    explore, assess = ((rows[name] < 20).sum() for name in ("explore", "assess"))
    assert [len(rows[name]) for name in SPLITS] == [27, 14, 7, 12]
    assert explore + assess == 16 - decide
    assert abs(explore - 27 / 41 * (16 - decide)) <= 1


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
    assert abs(np.bincount(labels[rows["assess"]]) - 250).max() < 5
    rows = split_rows(labels, test_rows, seed=0, fractions=Fractions(most=70))
    assert [len(rows[name]) for name in SPLITS] == [49_860, 70, 70, 10_000]
    rows = split_rows(labels, None, seed=0, fractions=Fractions(most=100))
    assert [len(rows[name]) for name in SPLITS] == [47_800, 100, 100, 12_000]


def test_strata_may_be_any_values():
    """A task may stratify by anything, such as ranges of a real target."""
    strata = np.repeat(["low", "middle", "high"], [20, 40, 60])
    rows = split_rows(strata, None, seed=0)
    for value in ("low", "middle", "high"):
        explore, assess = ((strata[rows[name]] == value).sum() for name in ("explore", "assess"))
        assert abs(assess - (explore + assess) * 18 / 78) <= 1
