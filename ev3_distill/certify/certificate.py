"""The certificate: what may be promised of the final student, from the sealed test split.

Every bound is for the population that the test split was drawn from, example by example, independently. It holds for one
student, fixed before the split was opened, and says nothing of other populations. Where a few students were fixed then, each
has its share of the error probability (Bonferroni): so the bounds of all hold together, and any of them may be delivered.

There are up to three statements, each with the certificate's confidence by itself: that all claims hold together; that the
accuracy on every class is at least what the table of classes says; the same of groups.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.guards import FORMS, KNOWN, METRICS, TOP_K, form_of
from ev3_distill.tasks.classification.metric_bounds import Bound, Claim, Outputs, by_part, claims_of, in_top, share

__all__ = [
    "COVERED",
    "NOT_COVERED",
    "Certificate",
    "Claim",
    "Outputs",
    "Table",
    "accuracy_by",
    "claims_of",
    "clopper_pearson_lower",
    "make_certificate",
    "shares_of",
    "shares_when_reopened",
]  # fmt: skip

COVERED = (
    "Examples that come as those of the test split came: the same source, the same mix of classes, one independent of the "
    "other."
)
NOT_COVERED = (
    "data from elsewhere: another source, another time, another camera, an adversary",
    "single examples, and classes or groups that no claim and no table names",
    "this student once its weights, their precision or its inputs' preparation are changed",
    "a student that was chosen by certificates on this split, but among the candidates that its own counts",
    "latency_ms: other machines, or this one under another load",
)
ASKED = tuple(name for name in (*METRICS, *FORMS) if name not in KNOWN)  # what a reopened split may be asked about
ANEW = ("cost", "latency_ms", "MODULE:FUNCTION")  # what each opening may fill with something new


@dataclasses.dataclass(frozen=True)
class Table:
    """Accuracies by class or by group that all hold together with the given confidence, apart from all other claims."""

    of: str  # class or group
    confidence: float
    rows: tuple[tuple[str, float | None, float, int], ...]  # name, point, lower bound, examples

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("name", "point", "lower_bound", "n")
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"of": self.of, "metric": "accuracy", "confidence": self.confidence, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Claims that hold all together with the given confidence, and tables that do so each by itself."""

    confidence: float
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    reopened: int = 0  # how often the split had been opened before
    among: int = 1  # students for which it was opened

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {"confidence", "claims": [{"metric", "point", "lower_bound" or "upper_bound", "n"}]}.

        Where there are any, `tables`, see Table, `reopened` and, above 1, `among` stand beside these.
        """
        claims = [
            {name: value for name, value in dataclasses.asdict(claim).items() if value is not None}
            for claim in self.claims
        ]
        tables = {"tables": [table.as_dict() for table in self.tables]} if self.tables else {}
        reopened = {"reopened": self.reopened} if self.reopened else {}
        among = {"among": self.among} if self.among > 1 else {}
        return {"confidence": self.confidence, "claims": claims, **tables, **reopened, **among}


def make_certificate(
    claims: Mapping[str, np.ndarray | Bound],
    *,
    confidence: float = 0.95,
    shares: Mapping[str, float] | None = None,
    among: int = 1,
) -> Certificate:
    """The certificate of one student.

    Each of m claims on each of k students gets the level (1 - confidence) / (k m), so that by Bonferroni's inequality all
    bounds hold together with the given confidence, however metrics and students depend on each other.

    Args:
      claims: by metric, as from `claims_of`: functions of their own confidence. Or a score per example, [N] of 0 and 1 on
        the sealed split, for the share of ones.
      confidence: of all claims together, in (0, 1).
      shares: of the error probability 1 - confidence that the claims get, 1 in all at most; alike by default.
      among: k, students for which the split was opened.

    Raises:
      InputError: the split is empty or confidence is out of range.
      ValueError: no metric, or scores that are not a vector of zeros and ones.
    """
    if not claims:
        raise ValueError("a certificate needs at least one metric; got none: pass {name: scores}")
    shares = shares_of(claims) if shares is None else shares
    made = []
    for metric, claim in claims.items():
        bound = claim if callable(claim) else share(metric, claim)
        made.append(bound(1 - (1 - confidence) * shares[metric] / among))
    return Certificate(confidence, tuple(made), among=among)


def shares_of(metrics: Mapping[str, Any] | Sequence[str]) -> dict[str, float]:
    """The same share of the error probability for each of these claims."""
    return {metric: 1 / len(metrics) for metric in metrics}


def shares_when_reopened(metrics: Sequence[str], reopened: int) -> dict[str, float]:
    """Shares of the error probability for claims that may have been chosen after the split was opened.

    Who has seen the first certificate may choose the next claims by it. So the family is all that could ever be asked: each
    metric of ASKED gets an equal share, whichever are asked; of that top-K accuracies get 1 / (K (K - 1)) for K = 2, 3, ...;
    and what an opening may fill with something new (a function, costs, a measured time) 1 / (j (j + 1)) in the j-th, shared
    out evenly among functions. All these shares sum to 1 at most, so all certificates of reopened splits hold together with
    the confidence, however they were chosen; those with functions or costs where these were written without the split.

    Args:
      metrics: asked for.
      reopened: j, how often the split had been opened before, at least 1.
    """
    functions = sum(form_of(metric) == "MODULE:FUNCTION" for metric in metrics)

    def of(metric: str) -> float:
        form = form_of(metric)
        part = 1 / len(ASKED)
        if top := TOP_K.search(metric) if form in FORMS and form not in ANEW else None:
            part /= int(top[1]) * (int(top[1]) - 1)
        if form in ANEW:
            part /= reopened * (reopened + 1) * (functions if form == "MODULE:FUNCTION" else 1)
        return part

    return {metric: of(metric) for metric in metrics}


class Parts(NamedTuple):
    """How a split falls into classes or groups."""

    of: str  # class or group
    members: np.ndarray  # [N] from 0, the part of each example; -1 for none
    names: Sequence[str]


def accuracy_by(outputs: Outputs, parts: Parts, *, confidence: float, among: int = 1) -> Table:
    """The accuracy on each part, with bounds that all hold together with the given confidence.

    Each of K parts has Clopper and Pearson's bound at the level (1 - confidence) / K (Bonferroni), for each of the students for
    which the split was opened. One without examples has no point, and the bound 0.

    Args:
      outputs: of the sealed split, [N].
      parts: classes or groups of the same examples.
      confidence: of the table as a whole, in (0, 1).
      among: students for which the split was opened.
    """
    labelled = np.where(outputs.labels >= 0, parts.members, -1)
    hits = in_top(outputs.logits, outputs.labels, 1)
    each = 1 - (1 - confidence) / len(parts.names) / among
    found = by_part(hits, labelled, len(parts.names), confidence=each)
    rows = [(name, k / n if n else None, bound, n) for name, (k, n, bound) in zip(parts.names, found, strict=True)]
    return Table(parts.of, confidence, tuple(rows))
