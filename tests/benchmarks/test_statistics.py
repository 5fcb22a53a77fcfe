"""Statistics of rows: they agree with scipy and published tables, and format as documented."""

import math

import numpy as np
import pytest
from scipy import stats

from ev3_distill.benchmarks import (
    statistics,
)


def test_mean_agrees_with_scipy():
    values = [3.0, 5.0, 4.0, 8.0, 5.0]
    found = statistics.mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.center == 5
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_paired_agrees_with_scipy():
    values, others = [3.0, 5.0, 4.0, 8.0], [2.0, 5.5, 1.0, 6.0]
    found = statistics.paired(values, others, confidence=0.9)
    expected = stats.ttest_rel(values, others).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.center == pytest.approx(1.375)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (10, 2, 9), (12, 3, 10), (20, 6, 15)],
)  # ranks by the published tables of 95 % intervals for a median
def test_median_lies_between_tabulated_order_statistics(n, low, high):
    found = statistics.median(list(np.random.default_rng(0).permutation(np.arange(1.0, n + 1))))
    assert found == (np.median(np.arange(1, n + 1)), low, high, n, 0.95)


def test_median_of_few_values_reports_the_confidence_of_the_range():
    assert statistics.median([2.0, 1.0, 9.0]) == (2, 1, 9, 3, 0.75)  # 1 - 2 / 2^3
    assert statistics.median([2.0, 4.0])[:3] == (3, 2, 4)


@pytest.mark.parametrize("estimate", [statistics.mean, statistics.median])
def test_one_value_has_no_interval(estimate):
    found = estimate([4.0])
    assert found.center == 4 and math.isnan(found.low) and math.isnan(found.high)
    assert statistics.spread(found, 1) == statistics.plus_minus(found, 1) == "4.0"


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_estimates_reject_empty_and_nonfinite_values(values):
    with pytest.raises(ValueError, match="at least one value, all finite"):
        statistics.mean(values)


def test_paired_rejects_different_lengths():
    with pytest.raises(ValueError, match="one length"):
        statistics.paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("center", "low", "high", "expected"),
    [
        (2, 1, 3, "held"),
        (2, 0.9, 3, "held, but the interval reaches below"),
        (0.9, 0.5, 1.1, "missed, but the interval reaches above"),
        (0.8, 0.7, 0.9, "missed"),
    ],
)
def test_verdict_compares_the_interval_with_the_target(center, low, high, expected):
    assert statistics.verdict(statistics.Interval(center, low, high, 9, 0.95), 1) == expected


def test_one_value_gets_no_verdict():
    """Neither above nor below the target: one seed says nothing about an interval."""
    for center in (0.5, 2.0):
        assert statistics.verdict(statistics.mean([center]), 1) == statistics.NO_VERDICT


def test_proportion_has_the_clopper_pearson_interval():
    found, expected = statistics.proportion(286, 300), stats.binomtest(286, 300).proportion_ci(0.95)
    assert found.center == 286 / 300
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert statistics.percent(found, 1) == "95.3 (92.3 to 97.4)"
    assert statistics.proportion(0, 10).low == 0 and statistics.proportion(10, 10).high == 1
    with pytest.raises(ValueError, match="got 11 of 10"):
        statistics.proportion(11, 10)


def test_number_formats():
    interval = statistics.Interval(1234.56, 1200, 1269.12, 9, 0.95)
    assert statistics.spread(interval, 0) == "1,235 (1,200 to 1,269)"
    assert statistics.plus_minus(interval, 1) == "1,234.6 ± 34.6"
    assert (statistics.number(-0.001, 2), statistics.number(-0.01, 2)) == ("0.00", "-0.01")
    assert statistics.markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
