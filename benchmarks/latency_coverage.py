"""Whether bounds of `latency_ms` hold as often as promised: once, and when a user measures until the bound looks best.

Pass times are simulated, because no machine has a known median: log-normal, and one pass in twenty several times as slow, in
units of their true median.
"""

import functools
from typing import Any

import numpy as np

from ev3_distill.certify.certificate import make_certificate, median_bound
from ev3_distill.runtime.timing import PASSES
from ev3_distill.training.sealed_split import claimable_metrics, shares_when_reopened

METRIC = "latency_ms"
ONCE, ON_RECORD, OFF_RECORD = (
    METRIC,
    f"{METRIC}, lowest of ten reopened bounds",
    f"{METRIC}, lowest of ten bounds without correction",
)
TIMES = 10
SPREAD, SLOW, FACTOR = 0.1, 0.05, 5.0  # standard deviation of the logarithm; fraction and factor of slow passes


def pass_times(count: int, rng: np.random.Generator) -> np.ndarray:
    """Independent times of passes [count]."""
    slow = np.where(rng.random(count) < SLOW, FACTOR, 1.0)
    return np.asarray(np.exp(rng.normal(0.0, SPREAD, count)) * slow)


@functools.cache
def true_median() -> float:
    """The median of the times, by bisection of their distribution function."""
    from scipy.stats import norm

    low, high = 0.5, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 - SLOW) * norm.cdf(np.log(middle) / SPREAD) + SLOW * norm.cdf(np.log(middle / FACTOR) / SPREAD)
        low, high = (middle, high) if below < 0.5 else (low, middle)
    return low


def latency_claims(rng: np.random.Generator, *, confidence: float) -> list[dict[str, Any]]:
    """Upper bounds of the median as a fraction of the true one: of one measurement, and the lowest of ten."""
    measured = [pass_times(PASSES, rng) / true_median() for _ in range(1 + TIMES)]
    shares = [
        shares_when_reopened([METRIC], j, family=claimable_metrics(), num_classes=10)[METRIC]
        for j in range(1, 1 + TIMES)
    ]
    first, *again = measured
    bounds = {
        ONCE: _upper(first, 1.0, confidence),
        ON_RECORD: min(_upper(times, share, confidence) for times, share in zip(again, shares, strict=True)),
        OFF_RECORD: min(_upper(times, 1.0, confidence) for times in again),
    }
    return [{"metric": name, "upper_bound": bound, "truth": 1.0} for name, bound in bounds.items()]


def _upper(times: np.ndarray, share: float, confidence: float) -> float:
    """The bound that a certificate states for these times."""
    certificate = make_certificate({METRIC: median_bound(METRIC, times)}, confidence=confidence, shares={METRIC: share})
    bound = certificate.claims[0].upper_bound
    return float("inf") if bound is None else bound
