"""The certificate: what may be claimed of the final student, from the sealed test split.

Every bound is about the population that the test split was drawn from, example by example and independently. It holds for a
student that was fixed before the split was opened, and says nothing about other populations. Where a few students were fixed,
each gets an equal part of the error probability (Bonferroni), so the bounds of all hold jointly and any of the students may
be delivered.

A certificate makes up to three statements, each with the certificate's confidence by itself: all claims hold jointly; the
accuracy on every class is at least what the table of classes says; the same for groups.

This module is pure statistics and knows no task: the caller hands in a bound for each metric.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ev3_distill.certify import bounds

__all__ = [
    "COVERED",
    "COVERED_GROUPS",
    "NOT_COVERED",
    "Bound",
    "Certificate",
    "Claim",
    "Table",
    "Units",
    "equal_shares",
    "fraction_bound",
    "make_certificate",
    "mean_bound",
    "median_bound",
    "part_bounds",
]

COVERED = (
    "Examples that come as those of the test split came: from the same source, with the same mix of classes, each independent "
    "of the others."
)
COVERED_GROUPS = (
    "Groups of examples that come as those of the test split came: from the same source, each group independent of the others. "
    "A metric is about an example drawn at random from a new group: large groups count no more than small ones."
)
NOT_COVERED = (
    "data from elsewhere: another source, another time, another camera, an adversary",
    "single examples, and classes or groups that no claim and no table names",
    "this student after a change of its weights, their precision or the preprocessing of its inputs",
    "a student that was selected by certificates on this split, except among the candidates that its certificate counts",
    "latency_ms: other machines, or the same machine under another load",
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """In the population, the metric is at least `lower_bound`, or at most `upper_bound`."""

    metric: str
    point: float  # on the split
    lower_bound: float | None  # at the claim's own level, see `make_certificate`
    n: int  # examples, or independent units where the certificate has any
    upper_bound: float | None = None  # in place of the lower bound, for a metric that is better when lower


Bound = Callable[[float], Claim]  # confidence of this claim alone -> the claim


@dataclasses.dataclass(frozen=True)
class Table:
    """Accuracies by class or by group that hold jointly with the given confidence, apart from all other claims."""

    of: str  # class or group
    confidence: float
    rows: tuple[tuple[str, float | None, float, int], ...]  # name, point, lower bound, examples

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("name", "point", "lower_bound", "n")
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"of": self.of, "metric": "accuracy", "confidence": self.confidence, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Units:
    """What is independent in a split whose examples are not."""

    of: str  # groups
    number: int
    examples: int  # that they consist of


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Claims that hold jointly with the given confidence, and tables that each hold by themselves."""

    confidence: float
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    reopened: int = 0  # how often the split had been opened before
    among: int = 1  # students for which the split was opened
    units: Units | None = None  # None: each example is independent of the others
    overlap: int = 0  # examples that the student has seen; above 0 claims have no bounds

    @property
    def covered(self) -> str:
        """The population that the claims are about."""
        return COVERED if self.units is None else COVERED_GROUPS

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"confidence", "claims": [{"metric", "point", "lower_bound" or "upper_bound", "n"}]}.

        `tables` (see Table), `reopened`, `among`, `units` (see Units) and `overlap` are present where there are tables, earlier
        openings, several students, groups as independent units, or examples that the student has seen.
        """
        claims = [
            {name: value for name, value in dataclasses.asdict(claim).items() if value is not None}
            for claim in self.claims
        ]
        tables = {"tables": [table.as_dict() for table in self.tables]} if self.tables else {}
        reopened = {"reopened": self.reopened} if self.reopened else {}
        among = {"among": self.among} if self.among > 1 else {}
        units = {"units": dataclasses.asdict(self.units)} if self.units else {}
        overlap = {"overlap": self.overlap} if self.overlap else {}
        return {"confidence": self.confidence, "claims": claims, **tables, **reopened, **among, **units, **overlap}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], metrics: Collection[str]) -> "Certificate":
        """The claims on these metrics in what `as_dict` returned, without tables."""
        claims = tuple(
            Claim(row["metric"], row["point"], row.get("lower_bound"), row["n"], row.get("upper_bound"))
            for row in content["claims"]
            if row["metric"] in metrics
        )
        units = Units(**content["units"]) if content.get("units") else None
        return cls(content["confidence"], claims, (), content.get("reopened", 0), content.get("among", 1), units)


def make_certificate(
    claims: Mapping[str, np.ndarray | Bound],
    *,
    confidence: float = 0.95,
    shares: Mapping[str, float] | None = None,
    among: int = 1,
) -> Certificate:
    """The certificate of one student.

    Each of m claims on each of k students gets the level (1 - confidence) / (k m). By Bonferroni's inequality all bounds then
    hold jointly with the given confidence, however metrics and students depend on each other.

    Args:
      claims: by metric, a bound: a function of the claim's own confidence. Or scores [N] of 0 and 1 on the sealed split, to
        claim the fraction of ones.
      confidence: of all claims jointly, in (0, 1).
      shares: each claim's part of the error probability 1 - confidence, at most 1 in total; equal by default.
      among: k, the number of students for which the split was opened.

    Raises:
      InputError: the split is empty, or confidence is out of range.
      ValueError: there is no metric, or scores are not a vector of zeros and ones.
    """
    if not claims:
        raise ValueError("a certificate needs at least one metric; got none: pass {name: scores}")
    shares = equal_shares(claims) if shares is None else shares
    made = []
    for metric, claim in claims.items():
        bound = claim if callable(claim) else fraction_bound(metric, claim)
        made.append(bound(1 - (1 - confidence) * shares[metric] / among))
    return Certificate(confidence, tuple(made), among=among)


def equal_shares(metrics: Mapping[str, Any] | Sequence[str]) -> dict[str, float]:
    """An equal part of the error probability for each claim."""
    return {metric: 1 / len(metrics) for metric in metrics}


def fraction_bound(metric: str, hits: np.ndarray) -> Bound:
    """A lower bound of the fraction of ones, by Clopper and Pearson.

    Args:
      metric: name of the claim.
      hits: [N] in {0, 1}.

    Raises:
      ValueError: `hits` is not a vector of zeros and ones.
    """
    hits = np.asarray(hits)
    if hits.ndim != 1 or not np.isin(hits, (0, 1)).all():
        raise ValueError(
            f"scores must be a vector of 0 and 1; got {metric} of shape {hits.shape} with {np.unique(hits)[:5]}: "
            "score each example as right (1) or wrong (0)"
        )
    n, k = len(hits), int(np.count_nonzero(hits))
    return lambda confidence: Claim(metric, k / max(n, 1), bounds.clopper_pearson_lower(k, n, confidence=confidence), n)


def mean_bound(metric: str, scores: np.ndarray, low: float, high: float, *, higher_is_better: bool = True) -> Bound:
    """A bound of the mean of bounded scores, by betting: a lower bound where higher is better, else an upper bound.

    Args:
      metric: name of the claim.
      scores: [N] in [low, high].
      low: smallest possible score.
      high: largest possible score.
      higher_is_better: which side to bound.
    """
    point, n = float(scores.mean()), len(scores)

    def bound(confidence: float) -> Claim:
        if higher_is_better:
            return Claim(metric, point, bounds.mean_lower(scores, low, high, confidence=confidence), n)
        return Claim(metric, point, None, n, upper_bound=bounds.mean_upper(scores, low, high, confidence=confidence))

    return bound


def median_bound(metric: str, values: np.ndarray) -> Bound:
    """An upper bound of the median of independent measurements [N], by order statistics."""
    point = float(np.median(values))

    def bound(confidence: float) -> Claim:
        upper = bounds.median_upper(values, confidence=confidence)
        return Claim(metric, point, None, len(values), upper_bound=upper)

    return bound


def part_bounds(hits: np.ndarray, parts: np.ndarray, count: int, *, confidence: float) -> list[tuple[int, int, float]]:
    """(hits, examples, lower bound) of each part, each bound with the given confidence; the bound is 0 without examples.

    Args:
      hits: [N] in {0, 1}.
      parts: [N] from 0, such as classes or groups; -1 for none.
      count: number of parts.
      confidence: of each bound alone.
    """
    inside = parts >= 0
    sizes = np.bincount(parts[inside], minlength=count)
    right = np.bincount(parts[inside & np.asarray(hits, bool)], minlength=count)
    return [
        (int(k), int(n), bounds.clopper_pearson_lower(int(k), int(n), confidence=confidence) if n else 0.0)
        for k, n in zip(right, sizes, strict=True)
    ]
