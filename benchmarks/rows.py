"""Statistics over a suite's rows, and how its table shows them. Every figure comes with an interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and the interval around it; its ends are nan where one value tells nothing of the spread."""

    center: float
    low: float
    high: float
    n: int  # values behind it
    confidence: float  # of the interval


def mean(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean, with Student's t interval."""
    x = _checked(values)
    center = float(x.mean())
    if len(x) == 1:
        return Interval(center, math.nan, math.nan, 1, confidence)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(center, center - half, center + half, len(x), confidence)


def paired(values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of values - others, pair by pair, with Student's t interval."""
    x, y = _checked(values), _checked(others)
    if len(x) != len(y):
        raise ValueError(f"pairs need two sequences of one length; got {len(x)} and {len(y)}: pair them by seed")
    return mean(list(x - y), confidence=confidence)


def welch(values: Sequence[float], others: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of values less that of others, which are no pairs, with the t interval of Welch (1947); at least two of each."""
    x, y = _checked(values), _checked(others)
    center, n = float(x.mean() - y.mean()), len(x) + len(y)
    if not x.var() and not y.var():
        return Interval(center, center, center, n, confidence)
    found = stats.ttest_ind(x, y, equal_var=False).confidence_interval(confidence)
    return Interval(center, float(found.low), float(found.high), n, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: what is at most alpha is rejected where at most alpha of all families have a false rejection.

    The k-th smallest of m is multiplied by m - k + 1, and is no smaller than the one before (Holm 1979).
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = adjusted[i] = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def median(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The median, between two order statistics, whatever the distribution.

    The k-th smallest and the k-th greatest of n values enclose the median with probability 1 - 2 P(Bin(n, 1/2) < k); k is
    the greatest for which that is at least `confidence`. Below six values none is enough for 0.95: the interval is then
    the range, and its `confidence` the smaller one that the range has.
    """
    x = np.sort(_checked(values))
    n = len(x)
    coverage = 1 - 2 * stats.binom.cdf(np.arange((n + 1) // 2), n, 0.5)  # of k = 1, 2, ...
    k = max(int((coverage >= confidence).sum()), 1)
    if n == 1:
        return Interval(float(x[0]), math.nan, math.nan, 1, 0.0)
    reached = confidence if coverage[k - 1] >= confidence else float(coverage[k - 1])
    return Interval(float(np.median(x)), float(x[k - 1]), float(x[n - k]), n, reached)


def share(count: int, of: int) -> Interval:
    """A share of `of` trials, with its exact two-sided interval (Clopper and Pearson 1934)."""
    if not 0 <= count <= of or of < 1:
        raise ValueError(f"a share counts 0 to `of` of at least one trial; got {count} of {of}: mend the rows")
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if count == 0 else float(stats.beta.ppf(tail, count, of - count + 1))
    high = 1.0 if count == of else float(stats.beta.ppf(1 - tail, count + 1, of - count))
    return Interval(count / of, low, high, of, CONFIDENCE)


def verdict(estimate: Interval, target: float) -> str:
    """What an estimate says of a target that it should reach from above."""
    if estimate.center >= target:
        return "held" if estimate.low >= target else "held, but the interval reaches below"
    return "missed" if estimate.high < target else "missed, but the interval reaches above"


def spread(estimate: Interval, digits: int) -> str:
    """`center (low to high)`, or the center alone."""
    if math.isnan(estimate.low):
        return number(estimate.center, digits)
    return f"{number(estimate.center, digits)} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"


def percent(estimate: Interval, digits: int) -> str:
    """`center (low to high)` in percent."""
    in_percent = estimate._replace(center=100 * estimate.center, low=100 * estimate.low, high=100 * estimate.high)
    return spread(in_percent, digits)


def plus_minus(estimate: Interval, digits: int) -> str:
    """`center ± half width`, or the center alone; for a symmetric interval."""
    if math.isnan(estimate.low):
        return number(estimate.center, digits)
    return f"{number(estimate.center, digits)} ± {number((estimate.high - estimate.low) / 2, digits)}"


def number(x: float, digits: int) -> str:
    """A number with separated thousands, and no minus before a zero."""
    text = f"{x:,.{digits}f}"
    return text[1:] if text.startswith("-") and float(text.replace(",", "")) == 0 else text


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A text that does not end its cell: it may hold a name of the user's."""
    return " ".join(text.split("\n")).replace("|", "\\|")


def _checked(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"an estimate needs at least one value, all finite; got {list(values)}: mend the rows")
    return x
