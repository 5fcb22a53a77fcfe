"""Bounds of balanced accuracy and macro F1 cover the truth and are tighter than their alternatives."""

import math

import numpy as np
import pytest
from bound_checks import allowed, confidences
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, brentq, minimize

from ev3_distill.certify.bounds import (
    _greatest,
    balanced_lower,
    clopper_pearson_lower,
    macro_f1,
    macro_f1_lower,
)

# Balanced accuracy.


def chernoff(hits, labels, classes, b, confidence):
    """The log of the right side of balanced_lower's inequality, by a general optimizer without multipliers."""
    n = np.bincount(labels, minlength=classes)
    observed = np.mean(np.bincount(labels, weights=hits, minlength=classes) / n)
    bounds = []
    for t in np.geomspace(1, 3000, 60):
        tilt = np.expm1(t / (classes * n))
        answer = minimize(
            lambda p, tilt=tilt: -(n * np.log1p(p * tilt)).sum(),
            np.full(classes, b),
            bounds=[(0, 1)] * classes,
            constraints=[LinearConstraint(np.full(classes, 1 / classes), b, b)],
        )
        bounds.append(-answer.fun - t * observed)
    return min(bounds)


def test_balanced_agrees_with_a_search_over_all_accuracies():
    rng = np.random.default_rng(0)
    for sizes in ((20, 50, 200), (80, 80, 80)):
        labels = np.repeat([0, 1, 2], sizes)
        hits = (rng.random(len(labels)) < np.array([0.6, 0.8, 0.95])[labels]).astype(int)
        bound = balanced_lower(hits, labels, 3, confidence=0.95)
        assert chernoff(hits, labels, 3, bound - 0.002, 0.95) < math.log(0.05)
        assert chernoff(hits, labels, 3, bound + 0.002, 0.95) > math.log(0.05)


@pytest.mark.parametrize("n", [30, 1000, 20_000])
@pytest.mark.parametrize("confidence", [0.95, 0.999])
def test_balanced_of_one_class_inverts_the_divergence(n, confidence):
    """Chernoff's bound of a coin is the b for which n KL(k/n, b) = log(1 / alpha): the search finds it to 1e-9.

    Fewer zooms, or multipliers from a smaller range, miss it by 3e-9 and 1e-5. More of them only take longer.
    """
    for k in (1, n // 2, n - n // 20, n - 1):
        share = k / n

        def excess(b, share=share):
            divergence = share * math.log(share / b) + (1 - share) * math.log((1 - share) / (1 - b))
            return n * divergence + math.log(1 - confidence)

        exact = brentq(excess, 1e-12, share, xtol=1e-15)
        assert balanced_lower(np.arange(n) < k, np.zeros(n, int), 1, confidence=confidence) == pytest.approx(
            exact, abs=1e-9
        )
    every = balanced_lower(np.ones(n, int), np.zeros(n, int), 1, confidence=confidence)
    assert every == pytest.approx((1 - confidence) ** (1 / n), abs=1e-9)


def test_the_grid_search_ends_with_points_1e_8_apart():
    """A grid of 41 points and five finer ones, each over a twentieth of the range of the one before."""
    grids = []

    def peak(x):
        grids.append(x)
        return -((x - 0.3) ** 2)

    assert _greatest(peak, 0.0, 1.0) == pytest.approx(0, abs=1e-16)
    assert len(grids) == 6
    assert np.diff(grids[-1])[0] == pytest.approx(1 / 40 / 20**5, rel=1e-3)


def test_balanced_by_hand():
    ones, two = np.ones(30, int), np.repeat([0, 1], 15)
    # one class: Chernoff's bound of a coin that always hits is p^n = alpha
    assert balanced_lower(ones, 0 * two, 1, confidence=0.95) == pytest.approx(0.05 ** (1 / 30), abs=2e-3)
    assert balanced_lower(0 * ones, two, 2, confidence=0.95) == 0
    # a class without examples halves it
    seen = balanced_lower(ones, two, 2, confidence=0.95)
    assert balanced_lower(ones, two, 4, confidence=0.95) == pytest.approx(seen / 2, abs=1e-3)


@pytest.mark.parametrize("sizes", [(40,) * 5, (5, 5, 40, 100, 300), (1, 200)])
@pytest.mark.parametrize("kind", ["alike", "one bad", "nearly all right"])
def test_bound_of_balanced_accuracy_covers_the_truth(sizes, kind):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    truth = np.full(len(sizes), {"alike": 0.8, "one bad": 0.95, "nearly all right": 0.99}[kind])
    if kind == "one bad":
        truth[0] = 0.3
    bounds = [
        balanced_lower(rng.random(len(labels)) < truth[labels], labels, len(sizes), confidence=0.8) for _ in range(200)
    ]
    assert (np.array(bounds) > truth.mean()).sum() <= allowed(200, 0.2)


def test_balanced_is_tighter_than_its_alternatives():
    """The alternatives: Hoeffding's bound of the same sum, and the mean of the classes' exact bounds at level alpha / K."""
    rng = np.random.default_rng(0)
    for classes, each, p in ((10, 36, 0.95), (10, 1000, 0.95), (100, 20, 0.8), (2, 200, 0.9)):
        labels = np.repeat(np.arange(classes), each)
        hits = (rng.random(len(labels)) < p).astype(int)
        point, bound = hits.mean(), balanced_lower(hits, labels, classes, confidence=0.95)
        hoeffding = point - math.sqrt(math.log(20) / (2 * len(labels)))
        of_classes = np.mean(
            [clopper_pearson_lower(k, each, confidence=1 - 0.05 / classes) for k in np.bincount(labels[hits == 1])]
        )
        assert bound >= hoeffding
        assert bound >= of_classes - (0.01 if classes == 2 else 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=30), confidences, confidences)
def test_balanced_is_monotone(pairs, one, other):
    hits, labels = np.array(pairs).T
    low, high = sorted((one, other))
    bound = balanced_lower(hits, labels, 3, confidence=low)
    estimate = sum(hits[labels == k].mean() for k in np.unique(labels)) / 3
    assert 0 <= bound <= estimate + 1e-8
    assert balanced_lower(hits, labels, 3, confidence=high) <= bound + 1e-4
    assert balanced_lower(np.ones_like(hits), labels, 3, confidence=low) >= bound - 1e-4


# Macro F1.


def test_macro_f1_by_hand():
    labels, answers = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, -1])
    # class 0: 2 of 3; class 1: 1 of 3; class 2: 0 of 2; class 3: no example
    point = macro_f1(answers, labels, 4)
    assert point == pytest.approx((2 * 2 / 5 + 2 * 1 / 4 + 0 + 0) / 4)
    jaccard = [clopper_pearson_lower(k, n, confidence=1 - 0.1 / 4) for k, n in ((2, 3), (1, 3))]
    assert macro_f1_lower(answers, labels, 4, confidence=0.9) == pytest.approx(
        sum(2 * j / (1 + j) for j in jaccard) / 4
    )


def test_macro_f1_agrees_with_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    labels, answers = rng.integers(7, size=(2, 500))
    expected = f1_score(labels, answers, average="macro", labels=range(7), zero_division=0.0)
    assert macro_f1(answers, labels, 7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prior", [(0.25,) * 4, (0.9, 0.06, 0.03, 0.01)])
def test_bound_of_macro_f1_covers_the_truth_and_beats_hoeffding(prior):
    rng = np.random.default_rng(0)
    prior, right = np.array(prior), 0.85
    joint = right * np.diag(prior) + (1 - right) * prior[:, None] * (1 - np.eye(4)) / 3
    both, either = np.diag(joint), joint.sum(0) + joint.sum(1) - np.diag(joint)
    truth = np.mean(2 * both / (both + either))
    cells = rng.choice(16, p=joint.ravel(), size=(300, 400))
    bounds = np.array([macro_f1_lower(row % 4, row // 4, 4, confidence=0.8) for row in cells])
    assert (bounds > truth).sum() <= allowed(300, 0.2)

    labels, answers = cells[0] // 4, cells[0] % 4
    hoeffding = []
    for c in range(4):
        hit, n = ((labels == c) & (answers == c)).sum(), ((labels == c) | (answers == c)).sum()
        jaccard = max(hit / n - math.sqrt(math.log(4 / 0.2) / (2 * n)), 0) if n else 0
        hoeffding.append(2 * jaccard / (1 + jaccard))
    assert bounds[0] > np.mean(hoeffding)
