"""Guards: what must hold of the student that a run delivers, as `METRIC >= NUMBER` or `METRIC <= NUMBER`.

A guard is certified where the bound of the certificate lies on its side, not the point alone: so a guard that a student
breaks, in the population, is certified with no more than the certificate's probability of error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ev3_distill.errors import InputError


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a guard may be about."""

    at_least: bool  # which side of a number it may be asked to lie on
    least: float  # the range of sensible numbers
    most: float
    needs: str = "labels"  # and teacher, groups or costs; or nothing


METRICS = {
    "accuracy": Metric(True, 0, 1),
    "balanced_accuracy": Metric(True, 0, 1),
    "worst_class_accuracy": Metric(True, 0, 1),
    "worst_group_accuracy": Metric(True, 0, 1, "labels and groups"),
    "macro_f1": Metric(True, 0, 1),
    "agreement": Metric(True, 0, 1, "teacher"),
    "drop(accuracy)": Metric(False, -1, 1, "labels and teacher"),
    "ece": Metric(False, 0, 1),
    "brier": Metric(False, 0, 1),
    "cost": Metric(False, -math.inf, math.inf, "labels and costs"),
    "params": Metric(False, 1, math.inf, ""),
    "bytes": Metric(False, 1, math.inf, ""),
    "latency_ms": Metric(False, 0, math.inf, ""),
}
KNOWN = ("params", "bytes")  # of any student, without an example
TOP_K = re.compile(r"top([1-9]\d*)_accuracy")
DROP = re.compile(r"drop\((\w+)\)")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
FORMS = {  # metrics of which there are many, as an error shows them
    "topK_accuracy": Metric(True, 0, 1),
    "drop(topK_accuracy)": METRICS["drop(accuracy)"],
    "MODULE:FUNCTION": Metric(True, 0, 1),
}
_GUARD = re.compile(r"\s*([A-Za-z_][\w.]*(?::\w+|\(\w+\))?)\s*(>=|<=)\s*(\S+)\s*")


@dataclasses.dataclass(frozen=True)
class Guard:
    """One guard, parsed; `str` writes it as it was meant."""

    metric: str
    threshold: float

    @property
    def about(self) -> Metric:
        """What its metric is like."""
        found = metric_named(self.metric)
        if found is None:
            raise ValueError(f"a guard is about a metric; got '{self.metric}': parse it")
        return found

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.about.at_least else '<='} {self.threshold:.10g}"


def metric_named(name: str) -> Metric | None:
    """What a metric of this name is like; None where there is none."""
    return METRICS.get(name) or FORMS.get(form_of(name))


def form_of(name: str) -> str:
    """The metric itself, or for one of many the form that they share, see FORMS."""
    dropped = DROP.fullmatch(name)
    of = dropped[1] if dropped else name
    if (top := TOP_K.fullmatch(of)) and int(top[1]) >= 2:
        return "drop(topK_accuracy)" if dropped else "topK_accuracy"
    return "MODULE:FUNCTION" if FUNCTION.fullmatch(name) else name


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
    metric = _known(name, text)
    if (side == ">=") != metric.at_least:
        way = ">=" if metric.at_least else "<="
        raise InputError(f"a guard on {name} is a bound by {way}; got '{text}': write '{name} {way} {number}'")
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if not metric.least <= threshold <= metric.most or math.isinf(threshold):
        ends = ((metric.least, "at least"), (metric.most, "at most"))
        told = " and ".join(f"{side} {end:g}" for end, side in ends if not math.isinf(end)) or "finite"
        raise InputError(f"a guard's number for {name} is {told}; got '{number}': mend '{text}'")
    return Guard(name, threshold)


def _known(name: str, text: str) -> Metric:
    if name == "cross_entropy":
        raise InputError(
            "a guard needs a metric that can be bounded, and cross entropy has no limit: one example in a million may "
            f"decide its mean; got '{text}': guard brier, which lies in [0, 1]"
        )
    metric = metric_named(name)
    if metric is None:
        raise InputError(
            f"a guard is about {', '.join([*METRICS, *FORMS])}; got '{name}' in '{text}': name one of these"
        )
    return metric


def judge(guards: Iterable[Guard], claims: Sequence[Any], *, known: Mapping[str, float]) -> list[dict[str, Any]]:
    """Which guards are certified.

    Args:
      guards: in their order.
      claims: of the certificate, `claims.Claim`; one for each metric that a guard is about, but those of KNOWN.
      known: of the student, without a bound: its `params` and `bytes`.

    Returns:
      Plain data for JSON, one per guard: {"guard", "metric", "point", "bound", "certified"}.
    """
    by_metric = {claim.metric: claim for claim in claims}
    outcomes = []
    for guard in guards:
        if guard.metric in KNOWN:
            point = bound = float(known[guard.metric])
        else:
            claim = by_metric[guard.metric]
            point, bound = claim.point, claim.lower_bound if guard.about.at_least else claim.upper_bound
        holds = bound >= guard.threshold if guard.about.at_least else bound <= guard.threshold
        outcomes.append(
            {"guard": str(guard), "metric": guard.metric, "point": point, "bound": bound, "certified": bool(holds)}
        )
    return outcomes
