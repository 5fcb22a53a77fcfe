"""Each bound holds with its confidence for every distribution, and is tighter than its alternatives."""

import math

import numpy as np
import pytest
from bound_checks import allowed, confidences, counts, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import beta, binom, binomtest

from ev3_distill.certify.bounds import (
    balanced_lower,
    binomial_lower,
    clopper_pearson_interval,
    clopper_pearson_lower,
    clopper_pearson_upper,
    difference_upper,
    ece,
    ece_upper,
    macro_f1_lower,
    mcnemar_p_value,
    mean_lower,
    mean_upper,
    median_upper,
)
from ev3_distill.errors import InputError

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
