"""The certificate: what may be promised of the final student, from the sealed test split.

Every claim is about shares of examples, and its bound is for the population that the test split was drawn from, example by
example, independently. It holds for one student, fixed before the split was opened, and says nothing of other populations.

References:
  C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits illustrated in the case of the binomial.
  Biometrika 26 (4), 1934.
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Claim:
    """One promise: in the population, the metric is at least `lower_bound`, or at most `upper_bound`."""

    metric: str
    point: float  # on the test split
    lower_bound: float | None  # at the claim's own level, see certify
    n: int  # examples
    upper_bound: float | None = None  # of a metric that is better when lower, in the place of the other


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Claims that hold all together with the given confidence."""

    confidence: float
    claims: tuple[Claim, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"confidence", "claims": [{"metric", "point", "lower_bound" or "upper_bound", "n"}]}."""
        claims = [
            {name: value for name, value in dataclasses.asdict(claim).items() if value is not None}
            for claim in self.claims
        ]
        return {"confidence": self.confidence, "claims": claims}


class ByClass(NamedTuple):
    """What a claim about the worst class stands on."""

    scores: np.ndarray  # [N] 0 or 1
    labels: np.ndarray  # [N] of the examples, from 0
    classes: int  # K


class Drop(NamedTuple):
    """What a claim about the loss against a teacher stands on, paired."""

    reference: np.ndarray  # [N] 0 or 1, the teacher's
    scores: np.ndarray  # [N] 0 or 1


Sample = np.ndarray | ByClass | Drop


def samples(
    metrics: Iterable[str],
    *,
    right: np.ndarray,
    labels: np.ndarray,
    classes: int,
    agreed: np.ndarray | None = None,
    teacher_right: np.ndarray | None = None,
) -> dict[str, Sample]:
    """What claims of these names stand on, see `certify`.

    Args:
      metrics: accuracy, agreement, worst_class_accuracy or drop(accuracy), each once or more often.
      right: [N] whether the student is.
      labels: [N].
      classes: K.
      agreed: [N] whether it says what its teacher does.
      teacher_right: [N].
    """
    of: dict[str, Any] = {
        "accuracy": right,
        "agreement": agreed,
        "worst_class_accuracy": ByClass(right, labels, classes),
        "drop(accuracy)": None if teacher_right is None else Drop(teacher_right, right),
    }
    return {name: of[name] for name in dict.fromkeys(metrics)}


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


def certify(scores: Mapping[str, Sample], *, confidence: float = 0.95) -> Certificate:
    """The certificate of one student.

    Each of m claims gets the level (1 - confidence) / m, so that by Bonferroni's inequality all m bounds hold together
    with the given confidence, however the metrics depend on each other.

    - A share of examples: Clopper and Pearson's bound.
    - The worst class: the least of the classes' bounds, each at the claim's own level. No correction over classes is due:
      the bound exceeds the truth only where that of the truly worst class does (an intersection-union test, Berger 1982).
      A class without examples bounds it by 0. `point` is over the classes that have examples, n the fewest of a class.
    - The drop against a reference, P(reference right, student wrong) - P(student right, reference wrong): the upper bound of
      the first less the lower bound of the second, each at half of the claim's level.

    Args:
      scores: metric name -> 0 or 1 per example, [N], on the sealed split, or what else a claim stands on.
      confidence: of all claims together, in (0, 1).

    Raises:
      InputError: the split is empty or confidence is out of range.
      ValueError: no metric, or scores that are not a vector of zeros and ones.
    """
    if not scores:
        raise ValueError("a certificate needs at least one metric; got none: pass {name: scores}")
    each = 1 - (1 - confidence) / len(scores)
    return Certificate(confidence, tuple(_claim(metric, score, each) for metric, score in scores.items()))


def _claim(metric: str, sample: Sample, confidence: float) -> Claim:
    if isinstance(sample, ByClass):
        return _worst_class(metric, sample, confidence)
    if isinstance(sample, Drop):
        return _drop(metric, sample, confidence)
    score = _checked(metric, sample)
    n, successes = len(score), int(np.count_nonzero(score))
    return Claim(metric, successes / max(n, 1), clopper_pearson_lower(successes, n, confidence=confidence), n)


def _worst_class(metric: str, sample: ByClass, confidence: float) -> Claim:
    score = _checked(metric, sample.scores)
    found = [score[sample.labels == k] for k in range(sample.classes)]
    counts = [(int(np.count_nonzero(of_class)), len(of_class)) for of_class in found]
    bounds = [clopper_pearson_lower(k, n, confidence=confidence) if n else 0.0 for k, n in counts]
    return Claim(metric, min((k / n for k, n in counts if n), default=0.0), min(bounds), min(n for _, n in counts))


def _drop(metric: str, sample: Drop, confidence: float) -> Claim:
    reference, score = (_checked(metric, of).astype(bool) for of in sample)
    n, each = len(score), (1 + confidence) / 2
    lost, won = int((reference & ~score).sum()), int((score & ~reference).sum())
    upper = 1 - clopper_pearson_lower(n - lost, n, confidence=each)
    lower = clopper_pearson_lower(won, n, confidence=each)
    return Claim(metric, (lost - won) / n, None, n, upper_bound=upper - lower)


def _checked(metric: str, score: np.ndarray) -> np.ndarray:
    score = np.asarray(score)
    if score.ndim != 1 or not np.isin(score, (0, 1)).all():
        raise ValueError(
            f"scores must be a vector of 0 and 1; got {metric} of shape {score.shape} with {np.unique(score)[:5]}: "
            "score each example as right (1) or wrong (0)"
        )
    return score
