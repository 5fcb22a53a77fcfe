"""Guards: what must hold of the student that a run delivers, as `METRIC >= NUMBER` or `METRIC <= NUMBER`.

A guard is certified where the bound of the certificate lies on its side, not the point alone: so a guard that a student
breaks, in the population, is certified with no more than the certificate's probability of error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ev3_distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a guard may be about."""

    at_least: bool  # which side of a number it may be asked to lie on
    least: float  # the range of sensible numbers
    most: float
    needs: str  # labels, teacher, both or nothing


METRICS = {
    "accuracy": Metric(True, 0, 1, "labels"),
    "agreement": Metric(True, 0, 1, "teacher"),
    "worst_class_accuracy": Metric(True, 0, 1, "labels"),
    "drop(accuracy)": Metric(False, -1, 1, "labels and teacher"),
    "params": Metric(False, 1, math.inf, ""),
}
_GUARD = re.compile(r"\s*([a-z0-9_]+(?:\([a-z0-9_]+\))?)\s*(>=|<=)\s*(\S+)\s*")


@dataclasses.dataclass(frozen=True)
class Guard:
    """One guard, parsed; `str` writes it as it was meant."""

    metric: str
    threshold: float

    @property
    def about(self) -> Metric:
        """Of METRICS."""
        return METRICS[self.metric]

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.about.at_least else '<='} {self.threshold:.10g}"


def parse(text: str) -> Guard:
    """Reads a guard.

    Raises:
      InputError: not of that form, no such metric, the wrong side, or a number that always or never holds.
    """
    found = _GUARD.fullmatch(text)
    if found is None:
        raise InputError(
            f"a guard is METRIC >= NUMBER or METRIC <= NUMBER; got '{text}': write it like 'accuracy >= 0.9'"
        )
    name, side, number = found.groups()
    if name not in METRICS:
        raise InputError(f"a guard is about {', '.join(METRICS)}; got '{name}' in '{text}': name one of these")
    metric = METRICS[name]
    if (side == ">=") != metric.at_least:
        way = ">=" if metric.at_least else "<="
        raise InputError(f"a guard on {name} is a bound by {way}; got '{text}': write '{name} {way} {number}'")
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if not metric.least <= threshold <= metric.most or math.isinf(threshold):
        most = "" if math.isinf(metric.most) else f" and at most {metric.most:g}"
        raise InputError(
            f"a guard's number for {name} is at least {metric.least:g}{most}; got '{number}': mend '{text}'"
        )
    return Guard(name, threshold)


def judge(guards: Iterable[Guard], claims: Sequence[Any], *, params: int) -> list[dict[str, Any]]:
    """Which guards are certified.

    Args:
      guards: in their order.
      claims: of the certificate, `certificate.Claim`; one for each metric that a guard is about, but params.
      params: of the student, known without a bound.

    Returns:
      Plain data for JSON, one per guard: {"guard", "metric", "point", "bound", "certified"}.
    """
    by_metric = {claim.metric: claim for claim in claims}
    outcomes = []
    for guard in guards:
        point, bound = float(params), float(params)
        if guard.metric != "params":
            claim = by_metric[guard.metric]
            point, bound = claim.point, claim.lower_bound if guard.about.at_least else claim.upper_bound
        holds = bound >= guard.threshold if guard.about.at_least else bound <= guard.threshold
        outcomes.append(
            {"guard": str(guard), "metric": guard.metric, "point": point, "bound": bound, "certified": bool(holds)}
        )
    return outcomes
