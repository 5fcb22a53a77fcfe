"""Metrics: one row each. Guards, steering, bounds, the certificate and the report all read these rows.

A row names its functions as `MODULE:FUNCTION`; they are imported at first use. This module imports neither jax nor numpy,
because the command line reads it at every start.

To add a metric, add a row and a test. The row's functions stand in the folder of the task that the metric belongs to.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["METRICS", "GuardData", "Metric", "MetricQuery", "find_metric", "resolve", "steers"]

Reference = str | Callable[..., Any]  # MODULE:FUNCTION, or the function itself


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric, or a family of metrics that differ in one argument.

    Attributes:
      name: as a guard writes it. A family shows its argument in capitals, such as `topK_accuracy`.
      label: what a sentence calls it; `{argument}` stands for the argument of a family.
      pattern: regular expression of a family's names, with one group for the argument; empty where `name` is the only name.
      higher_is_better: a guard then asks for at least a number, else for at most one.
      low: smallest threshold that makes sense.
      high: largest threshold that makes sense.
      needs: what must be known: labels, teacher, groups, costs. Empty where neither examples nor a teacher are needed.
      unit: behind the number on screens. `%` shows a fraction as a percentage.
      bound: (MetricQuery, Outputs) -> function of the confidence that makes the claim. None where the value of a student is
        known exactly (`params`, `bytes`), or is measured by the caller (`latency_ms`).
      steering: (MetricQuery, threshold) -> Goal. None where training cannot change the metric.
      source: where a student's value comes from: `examples`, `timing`, or `size` (known exactly, so no claim is needed).
      check: (MetricQuery, GuardData) -> None; raises InputError where the data cannot answer the metric.
      exact: whether the bound is exact (Clopper and Pearson), rather than conservative.
      by_default: whether every certificate claims it where what it needs is known.
      balances_classes: whether rare classes weigh as much as common ones. A guard on it adds class-balanced arms.
      family: how many metrics share the row: `one`, `k` (K = 2, 3, ... without end) or `class` (one for each class).
      renewable: whether each opening of a sealed split may ask about something new: a function, costs, a measured time.
    """

    name: str
    label: str
    pattern: str = ""
    higher_is_better: bool = True
    low: float = 0.0
    high: float = 1.0
    needs: tuple[str, ...] = ("labels",)
    unit: str = "%"
    bound: Reference | None = None
    steering: Reference | None = None
    source: str = "examples"
    check: Reference | None = None
    exact: bool = False
    by_default: bool = False
    balances_classes: bool = False
    family: str = "one"
    renewable: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class MetricQuery:
    """A metric as a guard names it, with what its functions need to know beside outputs.

    Attributes:
      row: the metric.
      name: as the guard writes it.
      argument: of a family, such as K or the class; empty for a single metric.
      costs: [K, K], the cost of predicting a class (column) for an example of a class (row), for `cost`.
      class_names: of the K classes; empty where they are numbered.
    """

    row: Metric
    name: str
    argument: str = ""
    costs: Any = None
    class_names: Sequence[str] = ()

    @property
    def label(self) -> str:
        """What a sentence calls it."""
        return self.row.label.format(argument=self.argument)


@dataclasses.dataclass(frozen=True, eq=False)
class GuardData:
    """What is known of the data when a guard is checked, before anything is trained.

    Attributes:
      source: name of the data in errors.
      targets: [N, ...], with missing ones marked as in `tasks/base.py`.
      num_classes: that the student tells apart.
      class_names: of these; empty where they are numbered.
    """

    source: str
    targets: Any
    num_classes: int
    class_names: Sequence[str] = ()


_BOUNDS = "ev3_distill.tasks.classification.metric_bounds:"
_CHECKS = "ev3_distill.tasks.classification.metric_checks:"
_STEERING = "ev3_distill.tasks.classification.steering:"
_TOP = r"top([2-9]|[1-9]\d+)_accuracy"

ROWS = (
    Metric(
        "accuracy",
        "accuracy",
        bound=_BOUNDS + "accuracy",
        steering=_STEERING + "accuracy_goal",
        exact=True,
        by_default=True,
    ),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        bound=_BOUNDS + "balanced_accuracy",
        steering=_STEERING + "balanced_accuracy_goal",
        balances_classes=True,
    ),
    Metric(
        "worst_class_accuracy",
        "accuracy on its worst class",
        bound=_BOUNDS + "worst_class_accuracy",
        steering=_STEERING + "worst_class_goal",
        exact=True,
        balances_classes=True,
    ),
    Metric(
        "worst_group_accuracy",
        "accuracy on its worst group",
        needs=("labels", "groups"),
        bound=_BOUNDS + "worst_group_accuracy",
        steering=_STEERING + "worst_group_goal",
        exact=True,
    ),
    Metric(
        "macro_f1",
        "macro F1",
        bound=_BOUNDS + "macro_f1",
        steering=_STEERING + "macro_f1_goal",
        balances_classes=True,
    ),
    Metric(
        "agreement",
        "agreement with its teacher",
        needs=("teacher",),
        bound=_BOUNDS + "agreement",
        steering=_STEERING + "agreement_goal",
        exact=True,
        by_default=True,
    ),
    Metric(
        "drop(accuracy)",
        "less accuracy than its teacher",
        higher_is_better=False,
        low=-1.0,
        needs=("labels", "teacher"),
        bound=_BOUNDS + "accuracy_drop",
        steering=_STEERING + "accuracy_drop_goal",
        exact=True,
    ),
    Metric(
        "ece",
        "expected calibration error",
        higher_is_better=False,
        bound=_BOUNDS + "ece",
        steering=_STEERING + "ece_goal",
    ),
    Metric(
        "brier",
        "Brier score",
        higher_is_better=False,
        unit="",
        bound=_BOUNDS + "brier",
        steering=_STEERING + "brier_goal",
    ),
    Metric(
        "cost",
        "cost per example",
        higher_is_better=False,
        low=-math.inf,
        high=math.inf,
        needs=("labels", "costs"),
        unit="",
        bound=_BOUNDS + "cost",
        steering=_STEERING + "cost_goal",
        renewable=True,
    ),
    Metric(
        "params", "parameters", higher_is_better=False, low=1, high=math.inf, needs=(), unit="parameters", source="size"
    ),
    Metric("bytes", "bytes", higher_is_better=False, low=1, high=math.inf, needs=(), unit="bytes", source="size"),
    Metric(
        "latency_ms",
        "median latency on that machine",
        higher_is_better=False,
        high=math.inf,
        needs=(),
        unit="ms",
        source="timing",
        renewable=True,
    ),
    Metric(
        "topK_accuracy",
        "top-{argument} accuracy",
        pattern=_TOP,
        bound=_BOUNDS + "top_k_accuracy",
        steering=_STEERING + "top_k_goal",
        check=_CHECKS + "check_top_k",
        exact=True,
        family="k",
    ),
    Metric(
        "drop(topK_accuracy)",
        "less top-{argument} accuracy than its teacher",
        pattern=rf"drop\({_TOP}\)",
        higher_is_better=False,
        low=-1.0,
        needs=("labels", "teacher"),
        bound=_BOUNDS + "top_k_drop",
        check=_CHECKS + "check_top_k",
        exact=True,
        family="k",
    ),
    Metric(
        "precision(CLASS)",
        "precision on class {argument}",
        pattern=r"precision\((.+)\)",
        bound=_BOUNDS + "precision",
        steering=_STEERING + "precision_goal",
        check=_CHECKS + "check_class",
        exact=True,
        family="class",
    ),
    Metric(
        "recall(CLASS)",
        "recall on class {argument}",
        pattern=r"recall\((.+)\)",
        bound=_BOUNDS + "recall",
        steering=_STEERING + "recall_goal",
        check=_CHECKS + "check_class",
        exact=True,
        balances_classes=True,
        family="class",
    ),
    Metric(
        "MODULE:FUNCTION",
        "{argument}",
        pattern=r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)",
        bound=_BOUNDS + "user_metric",
        steering=_STEERING + "user_metric_goal",
        check=_CHECKS + "check_user_metric",
        renewable=True,
    ),
)

METRICS: dict[str, Metric] = {row.name: row for row in ROWS}


def find_metric(name: str, metrics: Mapping[str, Metric] | None = None) -> MetricQuery | None:
    """The metric of this name; None where there is none.

    Args:
      name: as a guard writes it.
      metrics: rows by name; all known ones by default.
    """
    rows = METRICS if metrics is None else metrics
    if name in rows and not rows[name].pattern:
        return MetricQuery(rows[name], name)
    for row in rows.values():
        if row.pattern and (match := re.fullmatch(row.pattern, name)):
            return MetricQuery(row, name, match[1].strip())
    return None


def steers(name: str) -> bool:
    """Whether training can steer toward a guard on this metric."""
    query = find_metric(name)
    return query is not None and query.row.steering is not None


def resolve(reference: Reference) -> Callable[..., Any]:
    """The function that a row names."""
    if callable(reference):
        return reference
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
