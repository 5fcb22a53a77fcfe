"""Each bound holds with its confidence for every distribution, and is tighter than its alternatives."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, brentq, minimize
from scipy.stats import beta, binom, binomtest

from ev3_distill.certify.bounds import (
    _greatest,
    balanced_lower,
    binomial_lower,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    difference_upper,
    ece,
    ece_upper,
    macro_f1,
    macro_f1_lower,
    mcnemar_p_value,
    mean_lower,
    mean_upper,
    median_upper,
)
from ev3_distill.errors import InputError

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)
samples = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)


def allowed(trials, risk):
    """The largest number of failures that is consistent with this error probability at a level of 0.001."""
    return binom.isf(0.001, trials, risk)


# Clopper and Pearson.


@pytest.mark.parametrize(("successes", "n", "confidence"), [(1, 5, 0.9), (95, 100, 0.95), (9412, 10000, 0.975)])
def test_bound_agrees_with_scipy(successes, n, confidence):
    bound = clopper_pearson_lower(successes, n, confidence=confidence)
    assert bound == pytest.approx(beta.isf(confidence, successes, n - successes + 1), rel=1e-9)
    interval = binomtest(successes, n, alternative="greater").proportion_ci(confidence, method="exact")
    assert bound == pytest.approx(interval.low, rel=1e-6)


def test_hand_computed_edges():
    assert clopper_pearson_lower(0, 7, confidence=0.95) == 0
    assert clopper_pearson_lower(7, 7, confidence=0.95) == pytest.approx(0.05 ** (1 / 7), rel=1e-12)
    assert clopper_pearson_lower(1, 1, confidence=0.9) == pytest.approx(0.1, rel=1e-12)
    # 1 of 2: P[X >= 1] = 1 - (1 - p)^2 = 0.19 at p = 0.1
    assert clopper_pearson_lower(1, 2, confidence=0.81) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 8), (8, 8), (286, 300)])
def test_upper_bound_and_interval_agree_with_scipy(successes, n):
    upper = binomtest(successes, n, alternative="less").proportion_ci(0.9, method="exact").high
    assert clopper_pearson_upper(successes, n, confidence=0.9) == pytest.approx(upper, rel=1e-6)
    both = binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson_interval(successes, n, confidence=0.95) == pytest.approx((both.low, both.high), rel=1e-6)


def test_level_may_be_smaller_than_double_precision_tells_from_zero():
    assert 0 < binomial_lower(60, 60, 1e-25) == pytest.approx(1e-25 ** (1 / 60), rel=1e-9)
    assert binomial_lower(0, 0, 0.05) == 0


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 3), (1, 0), (8, 2), (40, 40)])
def test_mcnemar_is_the_exact_binomial_test(wins, losses):
    expected = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    assert mcnemar_p_value(wins, losses) == pytest.approx(expected)


def test_difference_is_bounded_by_the_bounds_of_its_parts():
    upper = binomtest(10, 100, alternative="less").proportion_ci(0.95, method="exact").high
    lower = binomtest(4, 100, alternative="greater").proportion_ci(0.95, method="exact").low
    assert difference_upper(10, 4, 100, confidence=0.9) == pytest.approx(upper - lower, rel=1e-6)


@given(counts, confidences)
def test_bound_solves_its_equation(count, confidence):
    successes, n = count
    bound = clopper_pearson_lower(successes, n, confidence=confidence)
    assert 0 <= bound <= successes / n
    if successes:
        assert binom.sf(successes - 1, n, bound) == pytest.approx(1 - confidence, rel=1e-6)


@given(counts, confidences, confidences)
def test_bound_is_monotone(count, one, other):
    successes, n = count
    low, high = sorted((one, other))
    bound = clopper_pearson_lower(successes, n, confidence=low)
    assert clopper_pearson_lower(successes, n, confidence=high) <= bound + 1e-12
    assert clopper_pearson_lower(successes, n + 1, confidence=low) <= bound + 1e-12
    assert clopper_pearson_lower(successes + 1, n + 1, confidence=low) >= bound - 1e-12


@pytest.mark.parametrize("n", [1, 2, 10, 57])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_coverage_is_never_below_the_confidence(n, confidence):
    successes = np.arange(n + 1)
    bounds = np.array([clopper_pearson_lower(k, n, confidence=confidence) for k in successes])

    def coverage(p):
        return binom.pmf(successes, n, p)[bounds <= p].sum()

    grid = np.concatenate([np.linspace(0, 1, 1001), bounds + 1e-9, bounds[1:] - 1e-9])
    assert min(coverage(p) for p in grid if 0 <= p <= 1) >= confidence - 1e-9
    # and the bound is no lower than it must be: just below each bound the coverage is the confidence
    assert [coverage(p - 1e-9) for p in bounds[1:]] == pytest.approx([confidence] * n, abs=1e-6)


def test_no_examples_and_invalid_confidences_are_rejected():
    for confidence in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="confidence must lie between 0 and 1"):
            clopper_pearson_lower(1, 2, confidence=confidence)
    for successes in (-1, 3):
        with pytest.raises(ValueError, match="successes"):
            clopper_pearson_lower(successes, 2, confidence=0.9)
    none = np.zeros(0, int)
    for bound in (
        lambda: mean_lower(none, 0, 1, confidence=0.9),
        lambda: balanced_lower(none, none, 2, confidence=0.9),
        lambda: macro_f1_lower(none, none, 2, confidence=0.9),
        lambda: ece_upper(none, none, confidence=0.9),
        lambda: median_upper(none, confidence=0.9),
    ):
        with pytest.raises(InputError, match="at least one example"):
            bound()


# The mean of what is bounded, by betting.

NASTY = {  # draws [trials, n] in [0, 1], and their mean
    "fair coin": (lambda rng, size: rng.random(size) < 0.5, 0.5),
    "rare failures": (lambda rng, size: rng.random(size) < 0.97, 0.97),
    "rare hits": (lambda rng, size: rng.random(size) < 0.03, 0.03),
    "nearly constant": (lambda rng, size: 0.3 + 0.001 * rng.random(size), 0.3005),
    "uniform": (lambda rng, size: rng.random(size), 0.5),
    "one in a thousand is 0": (lambda rng, size: 0.9 * (rng.random(size) < 0.999), 0.8991),
    "skewed": (lambda rng, size: rng.beta(0.05, 0.5, size), 1 / 11),
    "three points": (lambda rng, size: rng.choice([0.0, 0.5, 1.0], size=size, p=[0.1, 0.8, 0.1]), 0.5),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("n", [1, 20, 300])
def test_bound_of_the_mean_covers_the_truth(name, n):
    draw, mean = NASTY[name]
    draws = draw(np.random.default_rng(n), (400, n)).astype(float)
    lower = np.array([mean_lower(x, 0, 1, confidence=0.8) for x in draws])
    upper = np.array([mean_upper(x, 0, 1, confidence=0.8) for x in draws])
    assert (lower > mean).sum() <= allowed(400, 0.2)
    assert (upper < mean).sum() <= allowed(400, 0.2)
    assert (lower <= draws.mean(1)).all() and (draws.mean(1) <= upper).all()


def test_bound_of_the_mean_by_hand():
    assert mean_lower(np.zeros(9), 0, 1, confidence=0.95) == 0
    assert mean_upper(np.ones(9), 0, 1, confidence=0.95) == 1
    assert mean_lower(np.full(3, 7.0), 7, 7, confidence=0.95) == 7
    # one example of 1: the capital is sum_c w_c (1 - c + c / m), a weighted mean of bets c of (1 - c) + c / m, and 1 / alpha
    # where m = c / (1 / alpha - 1 + c), which lies between 0 and the bound of Clopper and Pearson, alpha
    assert 0 < mean_lower(np.ones(1), 0, 1, confidence=0.95) <= 0.05
    # ranges are no more than a scale
    x = np.random.default_rng(0).random(30)
    bound = mean_lower(x, 0, 1, confidence=0.9)
    assert mean_lower(5 * x - 2, -2, 3, confidence=0.9) == pytest.approx(5 * bound - 2, abs=1e-8)
    assert mean_upper(-x, -1, 0, confidence=0.9) == pytest.approx(-bound, abs=1e-8)
    for bad in ([0.5, 1.1], [np.nan, 0.5], [[0.5]]):
        with pytest.raises(ValueError, match="vector in"):
            mean_lower(np.array(bad), 0, 1, confidence=0.9)


def test_bisection_rounds_the_bound_down_to_32_bits():
    from ev3_distill.certify.bounds import _bets

    x, alpha = np.array([0.2, 0.9, 1.0, 0.7]), 0.1
    bets, logs = _bets(4, 1 - alpha)

    def excess(m):
        capital = (1 - bets[:, None] + bets[:, None] * x / m).prod(1)
        return float(np.exp(logs) @ capital) - 1 / alpha

    exact = brentq(excess, 1e-6, 1, xtol=1e-15)
    bound = mean_lower(x, 0, 1, confidence=1 - alpha)
    assert (bound * 2**32).is_integer()
    assert 0 <= exact - bound <= 2**-32 + 1e-14


def test_capital_is_a_fair_game():
    """At the true mean the capital has expectation 1, by enumeration of all samples of coins."""
    from ev3_distill.certify.bounds import _bets

    for n, p, confidence in ((4, 0.3, 0.9), (9, 0.9, 0.99), (1, 0.5, 0.5)):
        bets, weights = _bets(n, confidence)
        assert (bets > 0).all() and (bets <= 1).all() and np.exp(weights).sum() == pytest.approx(1)
        hits = np.arange(n + 1)
        capital = ((1 - bets + bets / p) ** hits[:, None] * (1 - bets) ** (n - hits[:, None])) @ np.exp(weights)
        assert binom.pmf(hits, n, p) @ capital == pytest.approx(1)
        # and where it says so, the bound refutes p
        for k in hits:
            x = np.repeat([1.0, 0.0], [k, n - k])
            assert (mean_lower(x, 0, 1, confidence=confidence) > p) == (capital[k] > 1 / (1 - confidence))


@pytest.mark.parametrize("n", [50, 500, 5000, 50000])
def test_betting_is_tighter_than_hoeffding_and_not_far_from_exact(n):
    rng = np.random.default_rng(0)
    hoeffding = math.sqrt(math.log(20) / (2 * n))
    for p, most in ((0.5, 1.35), (0.9, 1.0), (0.98, 0.75)):  # Hoeffding's bound suits the fair coin
        k = round(p * n)
        x = np.repeat([1.0, 0.0], [k, n - k])
        width = k / n - mean_lower(x, 0, 1, confidence=0.95)
        exact = k / n - clopper_pearson_lower(k, n, confidence=0.95)
        assert width < 1.95 * exact, (p, width / exact)
        assert width < most * hoeffding, (p, width / hoeffding)
    calm = 0.05 + 0.02 * rng.random(n)
    assert mean_upper(calm, 0, 1, confidence=0.95) - calm.mean() < 0.4 * hoeffding


@settings(max_examples=40, deadline=None)
@given(samples, st.floats(0, 1), confidences, confidences)
def test_bound_of_the_mean_is_monotone(x, more, one, other):
    low, high = sorted((one, other))
    bound = mean_lower(x, 0, 1, confidence=low)
    assert 0 <= bound <= x.mean() + 1e-8
    raised = np.maximum(x, more)
    assert mean_lower(raised, 0, 1, confidence=low) >= bound - 1e-9
    assert mean_lower(x[::-1], 0, 1, confidence=low) == pytest.approx(bound, abs=1e-8)
    assert mean_lower(x, 0, 1, confidence=high) <= x.mean() + 1e-8


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


# Calibration.


def calibrated(rng, size, bias):
    """Confidences in (0.5, 1), and hits whose probability is lower by `bias` (a function of the confidence)."""
    sure = 0.5 + 0.5 * rng.random(size) ** 0.5
    return sure, rng.random(size) < np.clip(sure - bias(sure), 0, 1)


BIASES = {
    "calibrated": lambda sure: 0 * sure,
    "overconfident": lambda sure: 0.1 + 0 * sure,
    "both ways": lambda sure: np.where(sure > 0.8, 0.08, -0.08),
}


def truth_of(bias, bins=15):
    sure, _ = calibrated(np.random.default_rng(1), 2_000_000, bias)
    at = np.ceil(sure * bins).astype(int) - 1
    return np.abs(np.bincount(at, weights=bias(sure), minlength=bins)).sum() / len(sure)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("n", [30, 400])
def test_bound_of_the_calibration_error_covers_the_truth(name, n):
    truth, rng = truth_of(BIASES[name]), np.random.default_rng(0)
    bounds = [ece_upper(*calibrated(rng, n, BIASES[name]), confidence=0.8) for _ in range(200)]
    assert (np.array(bounds) < truth).sum() <= allowed(200, 0.2)


def test_calibration_error_by_hand():
    sure, hits = np.array([0.9, 0.9, 0.95, 0.6]), np.array([1, 0, 1, 1])
    # bins of a fifteenth: (0.867, 0.933] holds two with a gap of -0.8, (0.933, 1] one of 0.05, (0.533, 0.6] one of 0.4
    assert ece(sure, hits) == pytest.approx((0.8 + 0.05 + 0.4) / 4)
    assert ece(sure, hits, bins=1) == pytest.approx(0.35 / 4)
    # bins of one sign each: the bound is that of the mean gap with these signs
    assert ece_upper(np.full(50, 0.9), np.zeros(50), confidence=0.9) == pytest.approx(
        mean_upper(np.full(50, 0.9), -1, 1, confidence=0.9), abs=1e-8
    )
    with pytest.raises(ValueError, match="probabilities"):
        ece_upper(np.array([1.5]), np.ones(1), confidence=0.9)


def test_calibration_bound_is_the_worst_over_all_signs():
    """None of all 2^bins signs gives a larger bound, and the largest is near."""
    rng = np.random.default_rng(0)
    sure, hits = calibrated(rng, 80, BIASES["both ways"])
    at, bound = np.ceil(sure * 4).astype(int) - 1, ece_upper(sure, hits, bins=4, confidence=0.9)
    bounds = [
        mean_upper(np.array(signs)[at] * (hits - sure), -1, 1, confidence=0.9)
        for signs in np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    ]
    assert max(bounds) - 1e-9 <= bound <= max(bounds) + 0.02


def test_calibration_bound_is_tighter_than_hoeffding_over_all_signs():
    """The alternative: for each of 2^15 signs Hoeffding's bound of a mean in [-1, 1], by Bonferroni."""
    for n in (400, 5000):
        sure, hits = calibrated(np.random.default_rng(0), n, BIASES["overconfident"])
        hoeffding = ece(sure, hits) + 2 * math.sqrt((math.log(20) + 15 * math.log(2)) / (2 * n))
        bound = ece_upper(sure, hits, confidence=0.95)
        assert ece(sure, hits) < bound < hoeffding - 0.4 * (hoeffding - ece(sure, hits))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30), confidences)
def test_calibration_bound_lies_above_the_point(pairs, confidence):
    sure, hits = np.array(pairs).T
    assert ece(sure, hits) - 1e-9 <= ece_upper(sure, hits, confidence=confidence) <= 1 + 1e-8


# The median.


def test_median_by_hand():
    # of 5: P[Binomial(5, 1/2) >= 5] = 1 / 32, >= 4 is 6 / 32
    x = np.array([3.0, 1, 5, 2, 4])
    assert median_upper(x, confidence=0.96) == 5
    assert median_upper(x, confidence=0.8) == 4
    assert median_upper(x, confidence=0.97) == math.inf
    assert median_upper(np.full(101, 7.0), confidence=0.95) == 7


def test_bound_of_the_median_covers_the_truth():
    rng = np.random.default_rng(0)
    for draws, truth in (
        (rng.lognormal(size=(2000, 101)), 1.0),
        (rng.choice([1.0, 2.0], size=(2000, 101)), 1.0),  # half of it lies at the median
        (rng.choice([1.0, 2.0, 3.0], p=[0.4, 0.2, 0.4], size=(2000, 101)), 2.0),
    ):
        bounds = np.array([median_upper(x, confidence=0.9) for x in draws])
        assert (bounds < truth).sum() <= allowed(2000, 0.1)
    # and no looser than it must be: 101 continuous examples leave 0.9 to 0.93 to the 58th smallest
    failed = (np.array([median_upper(x, confidence=0.9) for x in rng.random((2000, 101))]) < 0.5).mean()
    assert 0.04 < failed < 0.13


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), confidences, confidences)
def test_bound_of_the_median_is_monotone(x, one, other):
    low, high = sorted((one, other))
    x = np.array(x)
    assert np.median(x) <= median_upper(x, confidence=low) + 1e-9 or len(x) < 3
    assert median_upper(x, confidence=low) <= median_upper(x, confidence=high)
    assert median_upper(x + 1, confidence=low) >= median_upper(x, confidence=low)
