"""Estimates with intervals over the rows of a suite, and their text in tables."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ev3_distill.certify.bounds import clopper_pearson_interval

CONFIDENCE = 0.95
NO_VERDICT = "no verdict, one value has no interval"


class Interval(NamedTuple):
    """An estimate and its interval; both ends are NaN if there is one value, which does not show the spread."""

    center: float
    low: float
    high: float
    n: int  # number of values
    confidence: float  # level of the interval


def mean(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean with Student's t interval."""
    x = _checked(values)
    center = float(x.mean())
    if len(x) == 1:
        return Interval(center, math.nan, math.nan, 1, confidence)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(center, center - half, center + half, len(x), confidence)


def paired(values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of the paired differences values - others, with Student's t interval."""
    x, y = _checked(values), _checked(others)
    if len(x) != len(y):
        raise ValueError(f"pairs need two sequences of one length; got {len(x)} and {len(y)}: pair them by seed")
    return mean(list(x - y), confidence=confidence)


def welch(values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The difference of the means of two unpaired samples of at least two values, with Welch's t interval (1947)."""
    x, y = _checked(values), _checked(others)
    center, n = float(x.mean() - y.mean()), len(x) + len(y)
    if not x.var() and not y.var():
        return Interval(center, center, center, n, confidence)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(confidence)
    return Interval(center, float(interval.low), float(interval.high), n, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), which control the family-wise error rate.

    The k-th smallest of m p-values is multiplied by m - k + 1; adjusted values never decrease in that order. Rejecting those
    of at most alpha makes a false rejection with probability at most alpha.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = adjusted[i] = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def median(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The median with a distribution-free interval between two order statistics.

    The k-th smallest and the k-th largest of n values enclose the median with probability 1 - 2 P(Bin(n, 1/2) < k). The
    interval has the largest k for which that is at least `confidence`. Fewer than six values cannot reach 0.95: the interval
    is then the range, and its `confidence` is that of the range.
    """
    x = np.sort(_checked(values))
    n = len(x)
    coverage = 1 - 2 * stats.binom.cdf(np.arange((n + 1) // 2), n, 0.5)  # for k = 1, 2, ...
    k = max(int((coverage >= confidence).sum()), 1)
    if n == 1:
        return Interval(float(x[0]), math.nan, math.nan, 1, 0.0)
    reached = confidence if coverage[k - 1] >= confidence else float(coverage[k - 1])
    return Interval(float(np.median(x)), float(x[k - 1]), float(x[n - k]), n, reached)


def proportion(count: int, trials: int) -> Interval:
    """A proportion with its exact two-sided interval (Clopper and Pearson 1934)."""
    if not 0 <= count <= trials or trials < 1:
        raise ValueError(
            f"a proportion counts 0 to `trials` of at least one trial; got {count} of {trials}: fix the rows"
        )
    low, high = clopper_pearson_interval(count, trials, confidence=CONFIDENCE)
    return Interval(count / trials, low, high, trials, CONFIDENCE)


def verdict(estimate: Interval, target: float) -> str:
    """Whether an estimate reaches a target from above, and whether its whole interval does.

    An estimate of one value has no interval, so it gets no verdict.
    """
    if math.isnan(estimate.low):
        return NO_VERDICT
    if estimate.center >= target:
        return "held" if estimate.low >= target else "held, but the interval reaches below"
    return "missed" if estimate.high < target else "missed, but the interval reaches above"


def spread(estimate: Interval, digits: int) -> str:
    """`center (low to high)`, or the center alone if there is no interval."""
    if math.isnan(estimate.low):
        return number(estimate.center, digits)
    return f"{number(estimate.center, digits)} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"


def percent(estimate: Interval, digits: int) -> str:
    """`center (low to high)` in percent."""
    in_percent = estimate._replace(center=100 * estimate.center, low=100 * estimate.low, high=100 * estimate.high)
    return spread(in_percent, digits)


def plus_minus(estimate: Interval, digits: int) -> str:
    """`center ± half width` of a symmetric interval, or the center alone if there is none."""
    if math.isnan(estimate.low):
        return number(estimate.center, digits)
    return f"{number(estimate.center, digits)} ± {number((estimate.high - estimate.low) / 2, digits)}"


def number(x: float, digits: int) -> str:
    """A number with thousands separators and no negative zero."""
    text = f"{x:,.{digits}f}"
    return text[1:] if text.startswith("-") and float(text.replace(",", "")) == 0 else text


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with a left-aligned first column and right-aligned others."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Escapes a text, which may hold a user's name, so that it stays in its cell."""
    return " ".join(text.split("\n")).replace("|", "\\|")


def _checked(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"an estimate needs at least one value, all finite; got {list(values)}: fix the rows")
    return x
