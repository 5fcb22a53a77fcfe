"""The certificate promises exactly what binomial sums allow, and never more."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from ev3_distill.certificate import ByClass, Certificate, Claim, Drop, certify, clopper_pearson_lower
from ev3_distill.errors import InputError

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)


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


def test_certify_shares_the_level_among_the_claims():
    right, agreed = np.repeat([1, 0], [90, 10]), np.repeat([True, False], [97, 3])
    certificate = certify({"accuracy": right, "agreement": agreed}, confidence=0.9)
    assert certificate == Certificate(
        0.9,
        (
            Claim("accuracy", 0.9, clopper_pearson_lower(90, 100, confidence=0.95), 100),
            Claim("agreement", 0.97, clopper_pearson_lower(97, 100, confidence=0.95), 100),
        ),
    )
    alone = certify({"accuracy": right}, confidence=0.9).claims[0]
    assert alone.lower_bound == pytest.approx(clopper_pearson_lower(90, 100, confidence=0.9), rel=1e-12)
    assert alone.lower_bound > certificate.claims[0].lower_bound


def test_joint_coverage_of_exclusive_metrics():
    # An example is right for at most one of two metrics: far from independent, all outcomes enumerable.
    n, confidence, each = 12, 0.8, 0.9
    bounds = np.array([clopper_pearson_lower(k, n, confidence=each) for k in range(n + 1)])
    for p in np.linspace(0.01, 0.49, 25):
        first = np.arange(n + 1)
        held = 0.0
        for k in first[bounds <= p]:
            second = np.arange(n - k + 1)
            held += binom.pmf(k, n, p) * binom.pmf(second, n - k, p / (1 - p))[bounds[second] <= p].sum()
        assert held >= confidence


def test_as_dict_is_json():
    data = certify({"accuracy": np.ones(20, np.float32)}).as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["confidence"] == 0.95
    assert data["claims"] == [
        {"metric": "accuracy", "point": 1.0, "lower_bound": pytest.approx(0.05 ** (1 / 20)), "n": 20}
    ]


@pytest.mark.parametrize("score", [[0.5, 1], [2, 0], [np.nan, 1], [[0, 1], [1, 1]], 1])
def test_rejects_scores_that_are_not_zeros_and_ones(score):
    with pytest.raises(ValueError, match="vector of 0 and 1"):
        certify({"accuracy": np.array(score)})


def test_rejects_what_gives_no_bound():
    with pytest.raises(InputError, match="at least one example"):
        certify({"accuracy": np.zeros(0)})
    with pytest.raises(ValueError, match="at least one metric"):
        certify({})
    for confidence in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="confidence is a probability"):
            clopper_pearson_lower(1, 2, confidence=confidence)
    for successes in (-1, 3):
        with pytest.raises(ValueError, match="successes"):
            clopper_pearson_lower(successes, 2, confidence=0.9)


def test_the_worst_class_by_hand():
    scores, labels = np.repeat([1, 0, 1, 0], [9, 1, 15, 5]), np.repeat([0, 1], [10, 20])
    claim = certify({"worst": ByClass(scores, labels, 2)}, confidence=0.9).claims[0]
    assert claim.point == 0.75
    assert claim.n == 10
    of_classes = [clopper_pearson_lower(k, n, confidence=0.9) for k, n in ((9, 10), (15, 20))]
    assert claim.lower_bound == min(of_classes)
    absent = certify({"worst": ByClass(scores, labels, 3)}).claims[0]
    assert (absent.point, absent.lower_bound, absent.n) == (0.75, 0, 0)


def test_the_worst_class_is_covered():
    """Ten classes, the worst of 80 %: the bound is above that in no more than 5 % of splits, however close the others are."""
    rng = np.random.default_rng(0)
    for others in (0.8, 0.82, 0.99):
        truth = np.array([0.8, *[others] * 9])
        labels = np.repeat(np.arange(10), 60)
        bounds = [
            certify({"worst": ByClass(rng.random(600) < truth[labels], labels, 10)}).claims[0].lower_bound
            for _ in range(400)
        ]
        assert (np.array(bounds) > 0.8).mean() <= 0.08  # 0.05 and 2.8 standard errors


def test_the_drop_by_hand_and_its_coverage():
    teacher, student = np.repeat([1, 1, 0, 0], [80, 10, 4, 6]), np.repeat([1, 0, 1, 0], [80, 10, 4, 6])
    claim = certify({"drop": Drop(teacher, student)}, confidence=0.9).claims[0]
    assert claim.point == pytest.approx(0.06)
    assert claim.lower_bound is None
    lost = binomtest(10, 100, alternative="less").proportion_ci(0.95, method="exact").high
    won = binomtest(4, 100, alternative="greater").proportion_ci(0.95, method="exact").low
    assert claim.upper_bound == pytest.approx(lost - won, rel=1e-6)
    rng = np.random.default_rng(0)
    draws = rng.choice(4, p=[0.85, 0.07, 0.03, 0.05], size=(400, 500))  # both right, lost, won, both wrong
    bounds = [certify({"drop": Drop(row <= 1, row % 2 == 0)}).claims[0].upper_bound for row in draws]
    assert (np.array(bounds) < 0.04).mean() <= 0.08


def test_upper_bounds_stand_in_the_json_in_their_place():
    claims = certify({"drop": Drop(np.ones(10), np.ones(10))}).as_dict()["claims"]
    assert set(claims[0]) == {"metric", "point", "upper_bound", "n"}
