"""Bounds from a finite sample that hold whatever the distribution is: each at most the truth (or at least it), but for the
probability 1 - confidence.

None is asymptotic, and none a bootstrap: they hold for every n. Examples are independent and come from one population, or
from one per class where a bound is given the labels. Metrics are in their own units; levels are one-sided.

References:
  C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits illustrated in the case of the binomial.
  Biometrika 26 (4), 1934.
  I. Waudby-Smith, A. Ramdas: Estimating means of bounded random variables by betting. JRSS B 86 (1), 2024, arXiv 2010.09686.
  H. Chernoff: A measure of asymptotic efficiency for tests of a hypothesis based on the sum of observations. 1952.
  C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger: On calibration of modern neural networks. 2017, arXiv 1706.04599.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from ev3_distill.errors import InputError

BISECTIONS = 32  # of [0, 1]: the bound is exact to 1e-9, on the safe side
USUAL, SPREAD = (
    2.0,
    1.5,
)  # octaves above the smallest sensible bet: where the best one mostly lies, and how widely around
ZOOMS, POINTS, MULTIPLIERS = 6, 41, 8.0  # of the search for the best Chernoff bound


def clopper_pearson_lower(successes: int, n: int, *, confidence: float) -> float:
    """Exact one-sided lower bound of a binomial probability (Clopper and Pearson 1934).

    The bound is the p that solves P[Binomial(n, p) >= successes] = 1 - confidence: the (1 - confidence) quantile of
    Beta(successes, n - successes + 1), and 0 when successes = 0. Whatever the true p is, the bound is at most p with
    probability `confidence` or more.

    Args:
      successes: from 0 to n.
      n: independent trials, at least 1.
      confidence: of this bound alone, in (0, 1).

    Raises:
      InputError: n or confidence is out of range.
      ValueError: successes is out of range.
    """
    _check(n, confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"0 <= successes <= n must hold; got {successes} of {n}: count each example once")
    if successes == 0:
        return 0.0
    return float(special.betaincinv(successes, n - successes + 1, 1 - confidence))


def mean_lower(x: np.ndarray, low: float, high: float, *, confidence: float) -> float:
    """Lower bound of the mean of a bounded random variable, by betting against each smaller mean.

    With x scaled to [0, 1], whoever holds that its mean is at most m must take bets that x is more: of a capital of 1, a
    share c of all that there is, again and again, becomes prod_i (1 - c + c x_i / m). The mean over bets c, fixed
    beforehand,

        W(m) = sum_c w_c prod_i (1 - c + c x_i / m),     0 < c <= 1,   sum_c w_c = 1,

    is never negative and, where m is the mean, 1 in expectation; so it reaches 1 / alpha with probability alpha at most
    (Markov). The bound is the smallest m that is not so refuted: W falls as m grows. The order of the examples plays no
    part. It is the capital of Waudby-Smith and Ramdas (2024, section 4), with bets that do not look at the data, in place
    of theirs, which look at the examples before.

    Args:
      x: [N] in [low, high], independent and alike.
      low: the least that x could be.
      high: the most.
      confidence: in (0, 1).

    Raises:
      InputError: no example, or confidence is out of range.
      ValueError: x is no vector of numbers in [low, high].
    """
    x = np.asarray(x, np.float64)
    _check(len(x), confidence)
    slack = 1e-9 * max(high - low, abs(low), abs(high))
    if x.ndim != 1 or not ((low - slack <= x) & (x <= high + slack)).all():
        raise ValueError(f"x must be a vector in [{low:g}, {high:g}]; got shape {x.shape}: name its true range")
    if high <= low:
        return low
    values, counts = np.unique(((x - low) / (high - low)).clip(0, 1), return_counts=True)
    bets, weights = _bets(len(x), confidence)

    def log_capital(m: float) -> float:
        with np.errstate(divide="ignore"):  # a bet of all that there is may lose it
            return _log_sum(weights + np.log1p(bets[:, None] * (values / m - 1)) @ counts)

    return low + (high - low) * _smallest_tenable(log_capital, confidence)


def mean_upper(x: np.ndarray, low: float, high: float, *, confidence: float) -> float:
    """Upper bound of the mean of a bounded random variable: `mean_lower` of what is left to `high`."""
    left = high - np.asarray(x, np.float64)
    return high - mean_lower(left, 0.0, high - low, confidence=confidence)


def balanced_lower(hits: np.ndarray, labels: np.ndarray, classes: int, *, confidence: float) -> float:
    """Lower bound of balanced accuracy, (1/K) sum_c p_c with p_c the accuracy on class c, given the labels.

    The estimate B = sum_i hit_i / (K n_{y_i}) is a weighted sum of coins. Chernoff (1952), with the worst accuracies p
    whose mean is b:

        P[B >= observed] <= min_{t > 0} e^{-t observed} max_{p: mean p = b} prod_c (1 - p_c + p_c e^{t / (K n_c)})^{n_c}.

    The bound is the largest b for which the right side is alpha or less. The maximum is a concave program; for every
    multiplier v > 0 it is at most e^{v K b} prod_c max_p (1 - p + p e^{t / (K n_c)})^{n_c} e^{-v p}. Each pair (t, v) so
    refutes all b up to

        (log alpha + t observed - sum_c max_p (n_c log(1 - p + p e^{t / (K n_c)}) - v p)) / (K v),

    and the greatest of these over a search is the bound: true wherever the search ends. (The pairs that refute a b are a
    convex set, so there is one greatest.)

    Args:
      hits: [N] in {0, 1}, independent given the labels.
      labels: [N] from 0 to K - 1.
      classes: K; the accuracy on one without examples is bounded by 0.
      confidence: in (0, 1).

    Raises:
      InputError: no example, or confidence is out of range.
    """
    _check(len(hits), confidence)
    n = np.bincount(labels, minlength=classes).astype(float)
    seen = n > 0
    right = np.bincount(labels, weights=np.asarray(hits, float), minlength=classes)[seen]
    n = n[seen]
    observed = float((right / n).sum() / classes)
    if observed == 0:
        return 0.0

    def refuted(log_t: np.ndarray) -> np.ndarray:
        """For tilts t = K e^{log_t} [T] with their best multipliers: all b up to this are refuted."""
        t = np.exp(log_t)[:, None]
        x = t / n  # t / (K n_c) of the formula
        with np.errstate(over="ignore"):
            odds = 1 / np.expm1(x)

        def at(log_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            v = t * np.exp(log_v)[:, None]
            p = np.clip(n / v - odds, 0, 1)
            growth = (n * (x + np.log(p + (1 - p) * np.exp(-x))) - v * p).sum(1)
            reached = math.log(1 - confidence) + classes * t[:, 0] * observed - growth
            return reached / v[:, 0], p.sum(1)  # K b; it grows with v while the worst accuracies sum to more

        low, high = np.full(len(log_t), -MULTIPLIERS), np.full(len(log_t), MULTIPLIERS)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            bound, mass = at(middle)
            low, high = np.where(mass > bound, middle, low), np.where(mass > bound, high, middle)
        return np.maximum(at(low)[0], at(high)[0]) / classes

    # from a tilt for the largest spread to one that lets nothing but "always right" stand
    tilts = math.log(0.05 * math.sqrt(n.min()) / classes), math.log(100 * n.max())
    return min(max(_greatest(refuted, *tilts), 0.0), observed)


def macro_f1_lower(said: np.ndarray, labels: np.ndarray, classes: int, *, confidence: float) -> float:
    """Lower bound of the mean over classes of F1.

    F1_c = 2 J_c / (1 + J_c), where the Jaccard index J_c = P(y = c and said = c | y = c or said = c) is the share of hits
    among the examples that are of class c or are said to be. Each J_c has its Clopper-Pearson bound at the level alpha / K,
    so all hold together (Bonferroni); F1 grows with J.

    Args:
      said: [N] classes, -1 for none.
      labels: [N] from 0 to K - 1.
      classes: K; the F1 of one that no example has, or is said to have, is bounded by 0.
      confidence: in (0, 1).

    Raises:
      InputError: no example, or confidence is out of range.
    """
    _check(len(labels), confidence)
    each = 1 - (1 - confidence) / classes
    total = 0.0
    for both, either in _overlaps(said, labels, classes):
        jaccard = clopper_pearson_lower(int(both), int(either), confidence=each) if either else 0.0
        total += 2 * jaccard / (1 + jaccard)
    return total / classes


def macro_f1(said: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The mean over classes of F1 on the examples themselves, 0 for a class that none has or is said to have."""
    return sum(2 * both / (both + either) for both, either in _overlaps(said, labels, classes) if either) / classes


def _overlaps(said: np.ndarray, labels: np.ndarray, classes: int) -> list[tuple[int, int]]:
    """By class: examples that are and are said to be of it, and examples that are or are said to be."""
    said, labels = np.asarray(said), np.asarray(labels)
    both = np.bincount(labels[said == labels], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(said[said >= 0], minlength=classes) - both
    return list(zip(both.tolist(), either.tolist(), strict=True))


def ece(sure: np.ndarray, hits: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error on the examples themselves, see `ece_upper`."""
    gaps = np.bincount(_bin_of(sure, bins), weights=np.asarray(hits, float) - sure, minlength=bins)
    return float(np.abs(gaps).sum() / max(len(sure), 1))


def ece_upper(sure: np.ndarray, hits: np.ndarray, *, bins: int = 15, confidence: float) -> float:
    """Upper bound of the expected calibration error, sum_b |E[(hit - sure) 1{sure in bin b}]|, of bins of equal width.

    With signs s_b in {-1, 1}, Y_s = s_{bin} (hit - sure) has a mean of at most the error, and of just the error for one s*,
    which the population fixes, not the sample. So it is enough to bound the mean of Y_s for all s and to take the greatest
    bound: that of s* is among them. `mean_lower` bets, for each s, that 1 - Y_s is more than 1 - m; for one bet c the
    capital is a product over bins, each least for one of its two signs, so

        sum_c w_c prod_b min_{s_b} prod_{i in b} (1 - c + c (1 - s_b d_i) / (1 - m)),     d = hit - sure,

    is a lower bound of the capital for every s, and the m that it refutes are refuted for every s.

    Args:
      sure: [N] in [0, 1], the probability that the model gives to what it says.
      hits: [N] in {0, 1}.
      bins: fixed beforehand; bin b is (b / bins, (b + 1) / bins], as of Guo et al. (2017).
      confidence: in (0, 1).

    Raises:
      InputError: no example, or confidence is out of range.
      ValueError: `sure` is out of range.
    """
    sure = np.asarray(sure, np.float64)
    _check(len(sure), confidence)
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError("confidences are probabilities; got one out of [0, 1]: give the softmax at what is said")
    order = np.argsort(_bin_of(sure, bins), kind="stable")
    starts = np.flatnonzero(np.diff(_bin_of(sure, bins)[order], prepend=-1))
    gaps = (np.asarray(hits, float) - sure)[order]
    bets, weights = _bets(len(sure), confidence)

    def log_capital(m: float) -> float:
        """Against the claim that the mean of (1 - Y_s) / 2 is at most m, for the worst s."""
        with np.errstate(divide="ignore"):
            signs = [np.log1p(bets[:, None] * ((1 - s * gaps) / 2 / m - 1)) for s in (-1, 1)]
            of_bins = np.minimum(*(np.add.reduceat(logs, starts, axis=1) for logs in signs))
        return _log_sum(weights + of_bins.sum(axis=1))

    return 1 - 2 * _smallest_tenable(log_capital, confidence)


def median_upper(x: np.ndarray, *, confidence: float) -> float:
    """Upper bound of a median by order statistics: the k-th smallest x, with the least k so that

        P[Binomial(n, 1/2) >= k] <= 1 - confidence;

    it is below the median only where k examples are, each with probability 1/2 at most. Infinite where n is too small.

    Args:
      x: [N], independent and alike.
      confidence: in (0, 1).

    Raises:
      InputError: no example, or confidence is out of range.
    """
    _check(len(x), confidence)
    k = np.arange(1, len(x) + 1)
    tails = special.betainc(k, len(x) - k + 1, 0.5)  # P[Binomial(n, p) >= k] = I_p(k, n - k + 1)
    enough = np.flatnonzero(tails <= 1 - confidence)
    return float(np.sort(x)[enough[0]]) if len(enough) else math.inf


def _check(n: int, confidence: float) -> None:
    if n < 1:
        raise InputError(f"a bound needs at least one example; got {n}: give the test split more data")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is a probability above 0 and below 1; got {confidence}: try 0.95")


def _bin_of(sure: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(np.asarray(sure, np.float64) * bins).astype(int) - 1, 0, bins - 1)


def _bets(n: int, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Bets c in (0, 1] [C], half an octave apart, and the logarithms of their weights [C].

    Against a mean m with a spread of s, the best bet is about u m / s, u = sqrt(2 log(1 / alpha) / n): u for a fair coin,
    3 u for 9 hits in 10, and more for what varies less. Bets from u / 4 to 1 so serve all but very rare hits, at a price
    of some log 5 in capital to those who do not know the best; weights are a Cauchy distribution's over octaves.
    """
    unit = math.sqrt(-2 * math.log(1 - confidence) / n)
    most = math.log2(1 / unit)  # octaves from u to 1
    octaves = np.append(np.arange(min(-2, most - 1), most, 0.5), most)
    weights = 1 / (1 + ((octaves - USUAL) / SPREAD) ** 2)
    return np.minimum(unit * 2**octaves, 1.0), np.log(weights / weights.sum())


def _smallest_tenable(log_capital: Callable[[float], float], confidence: float) -> float:
    """The least m in [0, 1] against which the capital stays below 1 / alpha, from below; the capital falls as m grows."""
    enough, low, high = -math.log(1 - confidence), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_capital(middle) >= enough else (low, middle)
    return low


def _greatest(of: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The greatest value found of a function with one peak, on grids that close in on the best so far."""
    best = -math.inf
    for _ in range(ZOOMS):
        points = np.linspace(low, high, POINTS)
        values = of(points)
        at = int(np.argmax(values))
        best = max(best, float(values[at]))
        low, high = points[max(at - 1, 0)], points[min(at + 1, POINTS - 1)]
    return best


def _log_sum(logs: np.ndarray) -> float:
    """log sum exp."""
    top = float(logs.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(logs - top).sum()))
