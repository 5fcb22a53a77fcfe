"""Confidence bounds from a finite sample. Each holds for every distribution and every sample size.

A lower bound exceeds the true value with probability at most alpha = 1 - confidence; an upper bound falls below it with
probability at most alpha. No bound is asymptotic and none uses the bootstrap. Examples are independent draws from one
population, or from one population per class where a function takes the labels as given. Values are in the metric's own
units. All levels are one-sided.

References:
  C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits illustrated in the case of the binomial.
  Biometrika 26 (4), 1934.
  Q. McNemar: Note on the sampling error of the difference between correlated proportions or percentages.
  Psychometrika 12 (2), 1947.
  I. Waudby-Smith, A. Ramdas: Estimating means of bounded random variables by betting. JRSS B 86 (1), 2024, arXiv 2010.09686.
  H. Chernoff: A measure of asymptotic efficiency for tests of a hypothesis based on the sum of observations. 1952.
  C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger: On calibration of modern neural networks. 2017, arXiv 1706.04599.
"""

import math
from collections.abc import Callable

import numpy as np

from ev3_distill.errors import InputError

BISECTIONS = 32  # halvings of [0, 1]: bounds are accurate to 1e-9 and err on the conservative side
PRIOR_CENTER, PRIOR_WIDTH = 2.0, 1.5  # Cauchy prior over bets, in octaves above the smallest useful bet
ZOOMS, POINTS, LOG_MULTIPLIER = 6, 41, 8.0  # grid search for the best Chernoff bound


def clopper_pearson_lower(successes: int, n: int, *, confidence: float) -> float:
    """Exact one-sided lower bound of a binomial probability (Clopper and Pearson 1934).

    The bound is the p that solves P[Binomial(n, p) >= successes] = 1 - confidence, and 0 when successes = 0. Whatever the
    true p is, the bound is at most p with probability `confidence` or more.

    Args:
      successes: from 0 to n.
      n: independent trials, at least 1.
      confidence: of this bound alone, in (0, 1).

    Raises:
      InputError: n or confidence is out of range.
      ValueError: successes is out of range.
    """
    _check(n, confidence)
    return binomial_lower(successes, n, 1 - confidence)


def clopper_pearson_upper(successes: int, n: int, *, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial probability; see `clopper_pearson_lower`."""
    return 1 - clopper_pearson_lower(n - successes, n, confidence=confidence)


def clopper_pearson_interval(successes: int, n: int, *, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a binomial probability: both one-sided bounds at level (1 - confidence) / 2."""
    each = (1 + confidence) / 2
    lower = clopper_pearson_lower(successes, n, confidence=each)
    return lower, clopper_pearson_upper(successes, n, confidence=each)


def binomial_lower(successes: int, n: int, alpha: float) -> float:
    """`clopper_pearson_lower` at the level alpha, which may be so small that 1 - alpha rounds to 1.

    It is the alpha quantile of Beta(successes, n - successes + 1).
    """
    from scipy import special

    if not 0 <= successes <= n:
        raise ValueError(f"0 <= successes <= n must hold; got {successes} of {n}: count each example once")
    if successes == 0:
        return 0.0
    return float(special.betaincinv(successes, n - successes + 1, alpha))


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Exact one-sided p-value of "the candidate is right no more often than the champion" (McNemar 1947).

    Args:
      wins: examples that only the candidate gets right.
      losses: examples that only the champion gets right.

    Returns:
      P[Binomial(wins + losses, 1/2) >= wins]; 1 without wins.
    """
    from scipy import special

    return float(special.betainc(wins, losses + 1, 0.5)) if wins else 1.0


def difference_upper(losses: int, wins: int, n: int, *, confidence: float) -> float:
    """Upper bound of P(loss) - P(win) over paired examples: both probabilities are bounded at half of the level.

    Args:
      losses: examples of the first kind.
      wins: examples of the second kind.
      n: all examples.
      confidence: in (0, 1).
    """
    each = (1 + confidence) / 2
    return clopper_pearson_upper(losses, n, confidence=each) - clopper_pearson_lower(wins, n, confidence=each)


def mean_lower(x: np.ndarray, low: float, high: float, *, confidence: float) -> float:
    """Lower bound of the mean of a bounded random variable, by betting against each smaller mean.

    Let x be scaled to [0, 1]. A bettor who stakes the fraction c of a capital of 1 on each example, against the claim that
    the mean is at most m, ends with prod_i (1 - c + c x_i / m). The mixture over bets c that are fixed in advance,

        W(m) = sum_c w_c prod_i (1 - c + c x_i / m),     0 < c <= 1,   sum_c w_c = 1,

    is never negative and has expectation 1 where m is the mean, so it reaches 1 / alpha with probability at most alpha
    (Markov's inequality). W falls as m grows, and the bound is the smallest m that is not refuted in this way. The order of
    the examples does not matter. This is the capital process of Waudby-Smith and Ramdas (2024, section 4), but with bets
    that do not depend on the data.

    Args:
      x: [N] in [low, high], independent and identically distributed.
      low: smallest possible value.
      high: largest possible value.
      confidence: in (0, 1).

    Raises:
      InputError: there is no example, or confidence is out of range.
      ValueError: x is not a vector of numbers in [low, high].
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
        with np.errstate(divide="ignore"):  # a bet of the whole capital may lose it
            return _log_sum(weights + np.log1p(bets[:, None] * (values / m - 1)) @ counts)

    return low + (high - low) * _smallest_not_refuted(log_capital, confidence)


def mean_upper(x: np.ndarray, low: float, high: float, *, confidence: float) -> float:
    """Upper bound of the mean of a bounded random variable: `high` minus the `mean_lower` of `high - x`."""
    remainder = high - np.asarray(x, np.float64)
    return high - mean_lower(remainder, 0.0, high - low, confidence=confidence)


def balanced_lower(hits: np.ndarray, labels: np.ndarray, classes: int, *, confidence: float) -> float:
    """Lower bound of balanced accuracy, (1/K) sum_c p_c with p_c the accuracy on class c, given the labels.

    The estimate B = sum_i hit_i / (K n_{y_i}) is a weighted sum of Bernoulli variables. Chernoff's bound (1952), for the
    least favorable accuracies p whose mean is b, is

        P[B >= observed] <= min_{t > 0} e^{-t observed} max_{p: mean p = b} prod_c (1 - p_c + p_c e^{t / (K n_c)})^{n_c}.

    The bound is the largest b for which the right side is alpha or less. The maximum is a concave program; for every
    multiplier v > 0 it is at most e^{v K b} prod_c max_p (1 - p + p e^{t / (K n_c)})^{n_c} e^{-v p}. So each pair (t, v)
    refutes all b up to

        (log alpha + t observed - sum_c max_p (n_c log(1 - p + p e^{t / (K n_c)}) - v p)) / (K v),

    and the bound is the greatest of these that a search finds. It is valid wherever the search ends. (The pairs that refute
    a given b form a convex set, so there is a single maximum.)

    Args:
      hits: [N] in {0, 1}, independent given the labels.
      labels: [N] from 0 to K - 1.
      classes: K; a class without examples has the bound 0.
      confidence: in (0, 1).

    Raises:
      InputError: there is no example, or confidence is out of range.
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
        """The largest refuted b for each tilt t = e^{log_t} [T], with the best multiplier v."""
        t = np.exp(log_t)[:, None]
        x = t / n  # t here is t / K of the formula, so x is t / (K n_c)
        with np.errstate(over="ignore"):
            odds = 1 / np.expm1(x)

        def at(log_v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            v = t * np.exp(log_v)[:, None]
            p = np.clip(n / v - odds, 0, 1)
            growth = (n * (x + np.log(p + (1 - p) * np.exp(-x))) - v * p).sum(1)
            reached = math.log(1 - confidence) + classes * t[:, 0] * observed - growth
            return reached / v[:, 0], p.sum(1)  # K b; grows with v while the accuracies sum to more

        low, high = np.full(len(log_t), -LOG_MULTIPLIER), np.full(len(log_t), LOG_MULTIPLIER)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            bound, mass = at(middle)
            low, high = np.where(mass > bound, middle, low), np.where(mass > bound, high, middle)
        return np.maximum(at(low)[0], at(high)[0]) / classes

    # from a tilt that suits the largest variance to one that leaves only "always right" unrefuted
    tilts = math.log(0.05 * math.sqrt(n.min()) / classes), math.log(100 * n.max())
    return min(max(_greatest(refuted, *tilts), 0.0), observed)


def macro_f1_lower(predicted: np.ndarray, labels: np.ndarray, classes: int, *, confidence: float) -> float:
    """Lower bound of the mean over classes of F1.

    F1_c = 2 J_c / (1 + J_c), where the Jaccard index J_c = P(y = c and prediction = c | y = c or prediction = c) is the
    fraction of correct predictions among the examples that are of class c or predicted as c. Each J_c has its
    Clopper-Pearson bound at level alpha / K, so all K bounds hold jointly (Bonferroni); F1 grows with J.

    Args:
      predicted: [N] classes, -1 for no prediction.
      labels: [N] from 0 to K - 1.
      classes: K; a class that is neither a label nor a prediction has the bound 0.
      confidence: in (0, 1).

    Raises:
      InputError: there is no example, or confidence is out of range.
    """
    _check(len(labels), confidence)
    each = 1 - (1 - confidence) / classes
    total = 0.0
    for both, either in _overlaps(predicted, labels, classes):
        jaccard = clopper_pearson_lower(int(both), int(either), confidence=each) if either else 0.0
        total += 2 * jaccard / (1 + jaccard)
    return total / classes


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean over classes of F1 on the sample; 0 for a class that is neither a label nor a prediction."""
    return sum(2 * both / (both + either) for both, either in _overlaps(predicted, labels, classes) if either) / classes


def _overlaps(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[tuple[int, int]]:
    """Per class: |label and prediction| and |label or prediction|."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    both = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(predicted[predicted >= 0], minlength=classes) - both
    return list(zip(both.tolist(), either.tolist(), strict=True))


def ece(top_probability: np.ndarray, hits: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error on the sample; see `ece_upper`."""
    gaps = np.bincount(
        _bin_of(top_probability, bins), weights=np.asarray(hits, float) - top_probability, minlength=bins
    )
    return float(np.abs(gaps).sum() / max(len(top_probability), 1))


def ece_upper(top_probability: np.ndarray, hits: np.ndarray, *, bins: int = 15, confidence: float) -> float:
    """Upper bound of the expected calibration error, sum_b |E[(hit - q) 1{q in bin b}]|, in bins of equal width.

    For signs s_b in {-1, 1}, the mean of Y_s = s_{bin} (hit - q) is at most the error, and equals it for one s*, which
    depends on the population and not on the sample. It is therefore enough to bound the mean of Y_s for all s and to take
    the greatest bound, because s* is among them. For each s, `mean_lower` bets that 1 - Y_s exceeds 1 - m. For one bet c
    the capital is a product over bins, and each factor is smallest for one of its two signs, so

        sum_c w_c prod_b min_{s_b} prod_{i in b} (1 - c + c (1 - s_b d_i) / (1 - m)),     d = hit - q,

    is a lower bound of the capital for every s. An m that it refutes is refuted for every s.

    Args:
      top_probability: q [N] in [0, 1], the probability that the model gives to its prediction.
      hits: [N] in {0, 1}.
      bins: fixed in advance; bin b is (b / bins, (b + 1) / bins], as in Guo et al. (2017).
      confidence: in (0, 1).

    Raises:
      InputError: there is no example, or confidence is out of range.
      ValueError: a probability is out of range.
    """
    q = np.asarray(top_probability, np.float64)
    _check(len(q), confidence)
    if not ((q >= 0) & (q <= 1)).all():
        raise ValueError(
            "calibration needs probabilities in [0, 1]; got one outside: pass the softmax at the prediction"
        )
    order = np.argsort(_bin_of(q, bins), kind="stable")
    starts = np.flatnonzero(np.diff(_bin_of(q, bins)[order], prepend=-1))
    gaps = (np.asarray(hits, float) - q)[order]
    bets, weights = _bets(len(q), confidence)

    def log_capital(m: float) -> float:
        """Log capital against the claim that the mean of (1 - Y_s) / 2 is at most m, for the least favorable s."""
        with np.errstate(divide="ignore"):
            signs = [np.log1p(bets[:, None] * ((1 - s * gaps) / 2 / m - 1)) for s in (-1, 1)]
            of_bins = np.minimum(*(np.add.reduceat(logs, starts, axis=1) for logs in signs))
        return _log_sum(weights + of_bins.sum(axis=1))

    return 1 - 2 * _smallest_not_refuted(log_capital, confidence)


def median_upper(x: np.ndarray, *, confidence: float) -> float:
    """Upper bound of a median: the k-th smallest x, with the smallest k for which

        P[Binomial(n, 1/2) >= k] <= 1 - confidence.

    It lies below the median only if at least k examples do, and each does with probability at most 1/2. The bound is
    infinite where n is too small.

    Args:
      x: [N], independent and identically distributed.
      confidence: in (0, 1).

    Raises:
      InputError: there is no example, or confidence is out of range.
    """
    from scipy import special

    _check(len(x), confidence)
    k = np.arange(1, len(x) + 1)
    tails = special.betainc(k, len(x) - k + 1, 0.5)  # P[Binomial(n, p) >= k] = I_p(k, n - k + 1)
    enough = np.flatnonzero(tails <= 1 - confidence)
    return float(np.sort(x)[enough[0]]) if len(enough) else math.inf


def _check(n: int, confidence: float) -> None:
    if n < 1:
        raise InputError(f"a bound needs at least one example; got {n}: put more data into the test split")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, exclusive; got {confidence}: try 0.95")


def _bin_of(q: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(np.asarray(q, np.float64) * bins).astype(int) - 1, 0, bins - 1)


def _bets(n: int, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Bets c in (0, 1], [C], half an octave apart, and their log weights [C].

    Against a mean m with standard deviation s, the best bet is about u m / s with u = sqrt(2 log(1 / alpha) / n): u for a
    fair coin, 3 u for 90 % hits, and more for less variable data. Bets from u / 4 to 1 therefore suit everything but very
    rare hits. Not knowing the best bet costs about log 5 in log capital. The weights follow a Cauchy distribution over
    octaves.
    """
    unit = math.sqrt(-2 * math.log(1 - confidence) / n)
    last = math.log2(1 / unit)  # octaves from u to 1
    octaves = np.append(np.arange(min(-2, last - 1), last, 0.5), last)
    weights = 1 / (1 + ((octaves - PRIOR_CENTER) / PRIOR_WIDTH) ** 2)
    return np.minimum(unit * 2**octaves, 1.0), np.log(weights / weights.sum())


def _smallest_not_refuted(log_capital: Callable[[float], float], confidence: float) -> float:
    """The smallest m in [0, 1] against which the capital stays below 1 / alpha, rounded down; the capital falls with m."""
    threshold, low, high = -math.log(1 - confidence), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_capital(middle) >= threshold else (low, middle)
    return low


def _greatest(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The greatest value of a single-peaked function that grids around the best point so far find."""
    best = -math.inf
    for _ in range(ZOOMS):
        points = np.linspace(low, high, POINTS)
        values = function(points)
        at = int(np.argmax(values))
        best = max(best, float(values[at]))
        low, high = points[max(at - 1, 0)], points[min(at + 1, POINTS - 1)]
    return best


def _log_sum(logs: np.ndarray) -> float:
    """log sum exp."""
    top = float(logs.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(logs - top).sum()))
