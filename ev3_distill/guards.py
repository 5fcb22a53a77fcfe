"""Guards: what must hold of the delivered student, as `METRIC >= NUMBER` or `METRIC <= NUMBER`.

A guard is certified where the certificate's bound satisfies it; the value on the test split alone is not enough. If a student
breaks a guard in the population, the guard is certified with at most the certificate's probability of error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ev3_distill.errors import InputError
from ev3_distill.tasks.metrics import METRICS, Metric, find_metric

_GUARD = re.compile(r"\s*([A-Za-z_][\w.]*(?::\w+|\(.+\))?)\s*(>=|<=)\s*(\S+)\s*")


@dataclasses.dataclass(frozen=True)
class Guard:
    """A parsed guard; `str` gives its text.

    Attributes:
      metric: name, as the guard writes it.
      threshold: in the metric's own units.
      metrics: rows by name that `metric` refers to; all known ones by default.
    """

    metric: str
    threshold: float
    metrics: Mapping[str, Metric] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def row(self) -> Metric:
        """The metric's row."""
        query = find_metric(self.metric, self.metrics)
        if query is None:
            raise ValueError(f"a guard needs a known metric; got '{self.metric}': make guards by parse()")
        return query.row

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.row.higher_is_better else '<='} {self.threshold:.10g}"


def help_text() -> str:
    """The help of the option --guard, with every metric."""
    at_least, at_most = (
        ", ".join(row.name for row in METRICS.values() if row.higher_is_better == higher) for higher in (True, False)
    )
    return (
        "Requirement on the student, such as 'accuracy >= 0.9'; may be repeated. Exit code 3 if the certificate does not "
        f"prove it. At least (>=): {at_least} (your own). At most (<=): {at_most}. CLASS is the name or number of a class; "
        "drop is relative to the teacher."
    )


def parse(text: str, metrics: Mapping[str, Metric] | None = None) -> Guard:
    """Parses a guard.

    Args:
      text: of the guard.
      metrics: rows by name that a guard may be about; all known ones by default.

    Raises:
      InputError: the text is no guard, the metric is unknown, the comparison points the wrong way, or the number is out of
        the metric's range, so that the guard would always or never hold.
    """
    match = _GUARD.fullmatch(text)
    if match is None:
        raise InputError(
            f"a guard is METRIC >= NUMBER or METRIC <= NUMBER; got '{text}': write it like 'accuracy >= 0.9'"
        )
    name, comparison, number = match.groups()
    row = _row(name, text, METRICS if metrics is None else metrics)
    right_way = ">=" if row.higher_is_better else "<="
    if comparison != right_way:
        raise InputError(
            f"a guard on {name} compares by {right_way}; got '{text}': write '{name} {right_way} {number}'"
        )
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if not row.low <= threshold <= row.high or math.isinf(threshold):
        ends = ((row.low, "at least"), (row.high, "at most"))
        rule = " and ".join(f"{side} {end:g}" for end, side in ends if not math.isinf(end)) or "finite"
        raise InputError(f"a guard's number for {name} must be {rule}; got '{number}': fix '{text}'")
    return Guard(name, threshold, metrics)


def _row(name: str, text: str, metrics: Mapping[str, Metric]) -> Metric:
    """The row of a metric that a guard names."""
    if name == "cross_entropy":
        raise InputError(
            "a guard needs a metric that can be bounded, and cross entropy is unbounded: one example in a million may "
            f"dominate its mean; got '{text}': guard brier, which lies in [0, 1]"
        )
    query = find_metric(name, metrics)
    if query is None:
        raise InputError(
            f"a guard needs a known metric ({', '.join(metrics)}); got '{name}' in '{text}': use one of these"
        )
    return query.row


def evaluate_guards(
    guards: Iterable[Guard], claims: Sequence[Any], *, sizes: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Decides which guards are certified.

    Args:
      guards: in the order of the result.
      claims: the certificate's (`certify.certificate.Claim`), one for each guarded metric that is no size.
      sizes: the student's `params` and `bytes`.

    Returns:
      Plain data for JSON, one per guard: {"guard", "metric", "point", "bound", "certified"}.
    """
    by_metric = {claim.metric: claim for claim in claims}
    outcomes = []
    for guard in guards:
        row = guard.row
        if row.source == "size":
            point = bound = float(sizes[guard.metric])
        else:
            claim = by_metric[guard.metric]
            point, bound = claim.point, claim.lower_bound if row.higher_is_better else claim.upper_bound
        certified = bound >= guard.threshold if row.higher_is_better else bound <= guard.threshold
        outcomes.append(
            {"guard": str(guard), "metric": guard.metric, "point": point, "bound": bound, "certified": bool(certified)}
        )
    return outcomes
