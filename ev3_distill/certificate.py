"""The certificate: what may be promised of the final student, from the sealed test split.

Every claim is a share of examples, and its bound is for the population that the test split was drawn from, example by
example, independently. It holds for one student, fixed before the split was opened, and says nothing of other
populations or of single classes.

References:
  C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits illustrated in the case of the binomial.
  Biometrika 26 (4), 1934.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ev3_distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Claim:
    """One promise: in the population, the metric is at least `lower_bound`."""

    metric: str
    point: float  # the share on the test split
    lower_bound: float  # at the claim's own level, see certify
    n: int  # examples


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Claims that hold all together with the given confidence."""

    confidence: float
    claims: tuple[Claim, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"confidence", "claims": [{"metric", "point", "lower_bound", "n"}]}."""
        return {"confidence": self.confidence, "claims": [dataclasses.asdict(claim) for claim in self.claims]}


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
    from scipy.stats import beta

    if n < 1:
        raise InputError(f"a bound needs at least one example; got {n}: give the test split more data")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is a probability above 0 and below 1; got {confidence}: try 0.95")
    if not 0 <= successes <= n:
        raise ValueError(f"0 <= successes <= n must hold; got {successes} of {n}: count each example once")
    if successes == 0:
        return 0.0
    return float(beta.ppf(1 - confidence, successes, n - successes + 1))


def certify(scores: Mapping[str, np.ndarray], *, confidence: float = 0.95) -> Certificate:
    """The certificate of one student.

    Each of m claims gets the level (1 - confidence) / m, so that by Bonferroni's inequality all m bounds hold together
    with the given confidence, however the metrics depend on each other.

    Args:
      scores: metric name -> 0 or 1 per example, [N], on the sealed split.
      confidence: of all claims together, in (0, 1).

    Raises:
      InputError: the split is empty or confidence is out of range.
      ValueError: no metric, or scores that are not a vector of zeros and ones.
    """
    if not scores:
        raise ValueError("a certificate needs at least one metric; got none: pass {name: scores}")
    each = 1 - (1 - confidence) / len(scores)
    return Certificate(confidence, tuple(_claim(metric, score, each) for metric, score in scores.items()))


def _claim(metric: str, score: np.ndarray, confidence: float) -> Claim:
    score = np.asarray(score)
    if score.ndim != 1 or not np.isin(score, (0, 1)).all():
        raise ValueError(
            f"scores must be a vector of 0 and 1; got {metric} of shape {score.shape} with {np.unique(score)[:5]}: "
            "score each example as right (1) or wrong (0)"
        )
    n, successes = len(score), int(np.count_nonzero(score))
    bound = clopper_pearson_lower(successes, n, confidence=confidence)
    return Claim(metric, successes / n, bound, n)
