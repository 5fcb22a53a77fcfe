"""Steering goals: guards that training follows. In `core/prioritise.py` they take turns with the promise.

Each `*_goal` function is named by a row of `tasks/metrics.py` and takes (query, threshold). A goal's scores are those of
`example_scores.py` and `split_scores.py`.

A promotion for a goal proves what the goal's `hypothesis` says. For most metrics that is the metric itself. Where it is
another mean (macro F1, precision, calibration error), the hypothesis says so, and a promotion also requires that the metric
is no lower on decide. For the worst class or group, see `core/paired_tests.least_mean`.

The tests that may end a run early (`p_value`) are exact for fractions of examples. For the worst class there is one test per
class, each at the full level, and all must succeed (Berger 1982). The others use a normal approximation. The certificate of
the finished student comes from the sealed split and uses none of these tests, see `metric_bounds.py`.

References:
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jax.scipy.stats import norm

from ev3_distill.tasks.classification import example_metrics, example_scores, split_scores
from ev3_distill.tasks.classification.metric_checks import class_index
from ev3_distill.tasks.classification.user_metrics import function_named
from ev3_distill.tasks.metrics import METRICS, MetricQuery, find_metric, resolve
from ev3_distill.types import Batch, Goal, Objective

__all__ = ["goal"]

Test = Callable[[jax.Array, Batch], jax.Array]  # (logits [N, K], split) -> p-value


def goal(metric: str, threshold: float, *, costs: np.ndarray | None = None, class_names: Sequence[str] = ()) -> Goal:
    """The goal that a metric is at least a threshold, or at most where lower is better.

    Args:
      metric: as a guard writes it.
      threshold: in the metric's own units.
      costs: [K, K] of predicting a class (column) for an example of a class (row), for the metric `cost`.
      class_names: of the K classes, for metrics of one class; empty where classes are numbered.

    Raises:
      InputError: the metric is MODULE:FUNCTION and cannot be imported, or names an unknown class.
      ValueError: training cannot steer by the metric, or costs are missing.
    """
    query = find_metric(metric)
    if query is None or query.row.steering is None or ("costs" in query.row.needs and costs is None):
        names = ", ".join(name for name, row in METRICS.items() if row.steering is not None)
        raise ValueError(f"a goal needs one of the metrics {names} (cost with its table); got '{metric}': name one")
    make_goal = resolve(query.row.steering)
    steering: Goal = make_goal(MetricQuery(query.row, metric, query.argument, costs, class_names), threshold)
    return steering


# Fractions of examples.


def accuracy_goal(query: MetricQuery, threshold: float) -> Goal:
    """Accuracy."""
    return _fraction(query.name, threshold, example_scores.accuracy, example_scores.DEFAULT_SELECT)


def top_k_goal(query: MetricQuery, threshold: float) -> Goal:
    """Top-K accuracy."""
    return _fraction(query.name, threshold, example_scores.top_k(int(query.argument)), example_scores.probability)


def agreement_goal(query: MetricQuery, threshold: float) -> Goal:
    """Agreement with the teacher."""

    def smooth(logits: jax.Array, split: Batch) -> jax.Array:
        return example_scores.DEFAULT_SELECT(logits, split._replace(targets=jnp.argmax(split.teacher["logits"], -1)))

    return _fraction(query.name, threshold, example_scores.agreement, smooth)


def _fraction(metric: str, threshold: float, score: Objective, smooth: Objective) -> Goal:
    def p_value(logits: jax.Array, split: Batch) -> jax.Array:
        hits = score(logits, split)
        return _binomial_tail(hits.sum(), jnp.float32(hits.shape[0]), threshold)

    return Goal(
        metric,
        threshold,
        score,
        smooth,
        _no_focus,
        _any_focus(score),
        binary=True,
        p_value=p_value,
        hypothesis=_higher(metric),
    )


def accuracy_drop_goal(query: MetricQuery, threshold: float) -> Goal:
    """The teacher's accuracy minus the student's, negated."""

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        return example_scores.accuracy(logits, split) - example_scores.accuracy(split.teacher["logits"], split)

    return Goal(
        query.name,
        -threshold,
        score,
        example_scores.DEFAULT_SELECT,
        _no_focus,
        _any_focus(example_scores.accuracy),
        binary=True,
        p_value=_normal_test(score, -threshold),
        hypothesis=_lower(query.name),
    )


# By class, or by group.


def worst_class_goal(query: MetricQuery, threshold: float) -> Goal:
    """The lowest accuracy on any class. Nothing is proven without examples of a class."""
    return _worst(query.name, threshold, "class", split_scores.classes, p_value_of_empty=1.0)


def worst_group_goal(query: MetricQuery, threshold: float) -> Goal:
    """The lowest accuracy on any group. Numbers without examples are no groups."""
    return _worst(query.name, threshold, "group", split_scores.groups, p_value_of_empty=0.0)


def _worst(metric: str, threshold: float, of: str, strata: split_scores.Strata, *, p_value_of_empty: float) -> Goal:
    def focus(logits: jax.Array, split: Batch) -> jax.Array:
        hits = example_scores.accuracy(logits, split)
        share, count = split_scores.means_by_stratum(strata, hits, logits, split)
        return jnp.argmin(jnp.where(count > 0, share, jnp.inf)).astype(jnp.int32)

    def p_value(logits: jax.Array, split: Batch) -> jax.Array:
        hits = example_scores.accuracy(logits, split)
        share, count = split_scores.means_by_stratum(strata, hits, logits, split)
        tails = _binomial_tail(jnp.round(share * count), jnp.maximum(count, 1), threshold)
        return jnp.where(count > 0, tails, p_value_of_empty).max()

    return Goal(
        metric,
        threshold,
        split_scores.worst_stratum(example_scores.accuracy, strata),
        split_scores.worst_stratum(example_scores.DEFAULT_SELECT, strata),
        focus,
        _any_focus(example_scores.accuracy),
        binary=True,
        p_value=p_value,
        hypothesis=f"the accuracy on every {of} is higher than the champion's on {of} {{focus}}",
        strata=strata,
    )


def balanced_accuracy_goal(query: MetricQuery, threshold: float) -> Goal:
    """The mean over classes of the accuracy."""
    score = split_scores.mean_over_classes(example_scores.accuracy)
    smooth = split_scores.mean_over_classes(example_scores.DEFAULT_SELECT)
    return _balanced(query.name, threshold, score, smooth, _higher(query.name))


def macro_f1_goal(query: MetricQuery, threshold: float) -> Goal:
    """Macro F1. A promotion proves that the balanced accuracy is higher, because F1 is no mean of scores."""
    smooth = split_scores.mean_over_classes(example_scores.DEFAULT_SELECT)
    hypothesis = _higher("balanced accuracy", instead_of=query.name)
    return _balanced(query.name, threshold, split_scores.macro_f1, smooth, hypothesis)


def _balanced(metric: str, threshold: float, score: Objective, smooth: Objective, hypothesis: str) -> Goal:
    compared, p_value = _any_focus(split_scores.balanced_hits), _normal_test(score, threshold)
    return Goal(
        metric,
        threshold,
        score,
        smooth,
        _no_focus,
        compared,
        binary=False,
        p_value=p_value,
        hypothesis=hypothesis,
    )


def recall_goal(query: MetricQuery, threshold: float) -> Goal:
    """The recall of one class."""

    def focus(logits: jax.Array, split: Batch) -> jax.Array:
        return jnp.int32(class_index(query, logits.shape[-1]))

    def of_class(scores: Objective) -> Objective:
        def objective(logits: jax.Array, split: Batch) -> jax.Array:
            index = class_index(query, logits.shape[-1])
            return split_scores.of_stratum(scores, split_scores.classes, index)(logits, split)

        return objective

    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return example_scores.accuracy(logits, split) * (split.targets == focus)

    def p_value(logits: jax.Array, split: Batch) -> jax.Array:
        own = split.targets == focus(logits, split)
        return _fraction_test(example_scores.accuracy(logits, split) * own, own, threshold)

    return Goal(
        query.name,
        threshold,
        of_class(example_scores.accuracy),
        of_class(example_scores.DEFAULT_SELECT),
        focus,
        compared,
        binary=True,
        p_value=p_value,
        hypothesis=_higher(query.name),
    )


def precision_goal(query: MetricQuery, threshold: float) -> Goal:
    """The precision of one class.

    Precision is no mean of scores, so a promotion proves that the mean of [predicted] ([label] - threshold) is higher: it is
    above 0 just where the precision is above the threshold.
    """

    def predicted(logits: jax.Array, split: Batch) -> jax.Array:
        index = class_index(query, logits.shape[-1])
        return example_metrics.hit(logits, jnp.int32(index), xp=jnp) & (split.targets >= 0)

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        return split_scores.precision(logits, split, class_index(query, logits.shape[-1]))

    def smooth(logits: jax.Array, split: Batch) -> jax.Array:
        return split_scores.soft_precision(logits, split, class_index(query, logits.shape[-1]))

    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return jnp.where(predicted(logits, split), example_scores.accuracy(logits, split), threshold)

    def p_value(logits: jax.Array, split: Batch) -> jax.Array:
        members = predicted(logits, split)
        return _fraction_test(example_scores.accuracy(logits, split) * members, members, threshold)

    return Goal(
        query.name,
        threshold,
        score,
        smooth,
        _no_focus,
        compared,
        binary=False,
        p_value=p_value,
        hypothesis=_higher(f"mean of [predicted] ([label] - {threshold:g})", instead_of=query.name),
    )


def _fraction_test(hits: jax.Array, members: jax.Array, threshold: float) -> jax.Array:
    """The exact p-value of "the fraction of hits among members is below the threshold", given their number; 1 for none."""
    n = members.sum().astype(jnp.float32)
    return jnp.where(n > 0, _binomial_tail(hits.sum(), jnp.maximum(n, 1), threshold), 1.0)


# Of probabilities.


def ece_goal(query: MetricQuery, threshold: float) -> Goal:
    """Calibration error. A promotion proves that the Brier score, which contains it, is lower."""
    return _probabilistic(query.name, threshold, split_scores.calibration, _lower("Brier score", instead_of=query.name))


def brier_goal(query: MetricQuery, threshold: float) -> Goal:
    """Brier score."""
    return _probabilistic(query.name, threshold, example_scores.brier, _lower(query.name))


def _probabilistic(metric: str, threshold: float, score: Objective, hypothesis: str) -> Goal:
    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return 1 + example_scores.brier(logits, split)

    return Goal(
        metric,
        -threshold,
        score,
        score,
        _no_focus,
        compared,
        binary=False,
        p_value=_normal_test(score, -threshold),
        hypothesis=hypothesis,
    )


# What users bring.


def cost_goal(query: MetricQuery, threshold: float) -> Goal:
    """The mean cost, negated. The smooth score is the expected cost under the student's own probabilities."""
    costs = jnp.asarray(query.costs, jnp.float32)
    least, span = costs.min(), jnp.maximum(costs.max() - costs.min(), 1e-12)

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        return jnp.where(split.targets >= 0, -example_metrics.cost(logits, split.targets, costs, xp=jnp), 0.0)

    def smooth(logits: jax.Array, split: Batch) -> jax.Array:
        expected = (jax.nn.softmax(logits) * costs[jnp.maximum(split.targets, 0)]).sum(-1)
        return jnp.where(split.targets >= 0, -expected, 0.0)

    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return 1 - (-score(logits, split) - least) / span

    return Goal(
        query.name,
        -threshold,
        score,
        smooth,
        _no_focus,
        compared,
        binary=False,
        p_value=_normal_test(score, -threshold),
        hypothesis=_lower(query.name),
    )


def user_metric_goal(query: MetricQuery, threshold: float) -> Goal:
    """A user's function of (logits [N, K], labels [N]) to scores [N] in [0, 1]; nan for logits that are not finite."""
    function: Callable[..., Any] = function_named(query.name)

    def on_host(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits, labels = np.asarray(logits), np.asarray(labels)
        finite = np.isfinite(logits).all(axis=1)
        scores = np.full(len(logits), np.nan, np.float32)
        if finite.any():
            scores[finite] = function(logits[finite], labels[finite])
        return scores

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        shape = jax.ShapeDtypeStruct(split.targets.shape, jnp.float32)
        return jax.pure_callback(on_host, shape, logits, split.targets, vmap_method="sequential")

    return Goal(
        query.name,
        threshold,
        score,
        score,
        _no_focus,
        _any_focus(score),
        binary=False,
        p_value=_normal_test(score, threshold),
        hypothesis=_higher(query.name),
    )


# Parts of goals.


def _higher(what: str, *, instead_of: str = "", than: str = "higher") -> str:
    """The hypothesis that a mean is higher; `instead_of` names the metric if the mean is another one."""
    proxy = f"; {instead_of} itself is not tested" if instead_of else ""
    return f"the {what} is {than} than the champion's{proxy}"


def _lower(what: str, *, instead_of: str = "") -> str:
    return _higher(what, instead_of=instead_of, than="lower")


def _no_focus(logits: jax.Array, split: Batch) -> jax.Array:
    """The focus of a metric of all examples."""
    return jnp.int32(0)


def _any_focus(score: Objective) -> Callable[[jax.Array, Batch, jax.Array], jax.Array]:
    return lambda logits, split, focus: score(logits, split)


def _binomial_tail(hits: jax.Array, n: jax.Array, share: float) -> jax.Array:
    """P(Bin(n, share) >= hits)."""
    if share <= 0:
        return jnp.zeros_like(hits)
    if share >= 1:
        return jnp.ones_like(hits)
    tail = betainc(jnp.maximum(hits, 1), n - jnp.maximum(hits, 1) + 1, jnp.float32(share))
    return jnp.where(hits > 0, tail, 1.0)


def _normal_test(score: Objective, least: float) -> Test:
    """The test of "the mean score is below `least`", by its standard error, which counts as at least 1 / N."""

    def p_value(logits: jax.Array, split: Batch) -> jax.Array:
        values = score(logits, split)
        n = values.shape[0]
        se = jnp.maximum(values.std() / math.sqrt(max(n - 1, 1)), 1 / n)
        tail = norm.sf((values.mean() - least) / se)
        return jnp.where(jnp.isnan(tail), 1.0, tail)

    return p_value
