"""Goals: metrics that a run steers by, from the guards on them; in `core/prioritise.py` they take turns with the promise.

A metric of a whole split is linearised: an example's score is the metric plus the example's influence on it (Hampel 1974), so
that the mean over the split is the metric itself and the spread its standard error (the delta method). Lower-is-better metrics
are negated. Examples without a label (-1) count as in `objectives.py`: not at all.

Tests that a run stops by (`refuted`) are exact for shares of examples, and for the worst class one test per class at the full
level, all of which must succeed (Berger 1982); for the others normal. The certificate of the finished student, from the sealed
split, uses none of them: see `bounds.py`.

References:
  F. R. Hampel: The influence curve and its role in robust estimation. JASA 69, 1974.
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jax.scipy.stats import norm

from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.metric_bounds import function_named
from ev3_distill.types import MOST_GROUPS, Batch, Goal, Objective

BINS = 15  # of equal width, for the calibration error

Refuted = Callable[[jax.Array, Batch], jax.Array]
Focus = Callable[[jax.Array, Batch], jax.Array]


def goal(metric: str, threshold: float, *, costs: np.ndarray | None = None) -> Goal:
    """The goal that a metric lies at or above a threshold, or at or below it where lower is better.

    Args:
      metric: one that `steers`.
      threshold: in the metric's own units.
      costs: [K, K], for the metric cost: what it costs to say a class (column) of an example of a class (row).

    Raises:
      InputError: the metric is MODULE:FUNCTION, which is not there.
      ValueError: the metric is none that steers, or costs are missing.
    """
    if ":" in metric:
        return _own(metric, threshold, function_named(metric))
    if metric == "cost" and costs is not None:
        return _cost(metric, threshold, jnp.asarray(costs, jnp.float32))
    if not steers(metric) or metric == "cost":
        raise ValueError(
            f"a goal is about {', '.join(_METRICS)}, topK_accuracy, cost (with its table) or MODULE:FUNCTION; got "
            f"'{metric}': name one of these"
        )
    if metric.startswith("top"):
        return _share(metric, threshold, top(int(metric[3:].partition("_")[0])), example_scores.probability)
    return _METRICS[metric](metric, threshold)


def steers(metric: str) -> bool:
    """Whether a run can steer by the metric; size and speed, which training does not change, are no such metrics."""
    return (
        metric in (*_METRICS, "cost")
        or ":" in metric
        or (metric.endswith("_accuracy") and metric[:3] == "top" and metric[3:-9].isdigit())
    )


# Shares of examples.


def top(k: int) -> Objective:
    """Whether the label is among the k greatest logits, in {0, 1}; of a tie the first classes count.

    Args:
      k: at least 1.
    """

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        best = jax.lax.top_k(logits, min(k, logits.shape[-1]))[1]
        sound = jnp.isfinite(logits.max(-1))
        return ((best == split.labels[:, None]).any(-1) & sound).astype(jnp.float32)

    return objective


def _share(metric: str, threshold: float, score: Objective, smooth: Objective) -> Goal:
    def refuted(logits: jax.Array, split: Batch) -> jax.Array:
        hits = score(logits, split)
        return _tail(hits.sum(), jnp.float32(hits.shape[0]), threshold)

    return Goal(metric, threshold, score, smooth, _everything, _whole(score), shares=True, refuted=refuted)


def _agreement(metric: str, threshold: float) -> Goal:
    def smooth(logits: jax.Array, split: Batch) -> jax.Array:
        return example_scores.DEFAULT_SELECT(logits, split._replace(labels=jnp.argmax(split.teacher_logits, -1)))

    return _share(metric, threshold, example_scores.agreement, smooth)


def _drop(metric: str, threshold: float) -> Goal:
    """The teacher's accuracy less the student's, negated."""

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        return example_scores.accuracy(logits, split) - example_scores.accuracy(split.teacher_logits, split)

    return Goal(
        metric,
        -threshold,
        score,
        example_scores.DEFAULT_SELECT,
        _everything,
        _whole(example_scores.accuracy),
        shares=True,
        refuted=_normal(score, -threshold),
    )


# By class, or by group.

Strata = Callable[
    [jax.Array, Batch], tuple[jax.Array, int]
]  # (logits, split) -> [N] int32, -1 for none, and their number


def _classes(logits: jax.Array, split: Batch) -> tuple[jax.Array, int]:
    return split.labels, logits.shape[-1]


def _groups(logits: jax.Array, split: Batch) -> tuple[jax.Array, int]:
    """Groups whose number is bounded by MOST_GROUPS; a labelled example of none (-1) counts for none."""
    if isinstance(split.group, tuple):
        raise ValueError("worst_group_accuracy needs groups; the split has none: give the data a column `groups`")
    return jnp.where(split.labels >= 0, split.group, -1), MOST_GROUPS


def _worst(metric: str, threshold: float, strata: Strata) -> Goal:
    """The accuracy of the stratum in which it is lowest."""

    def focus(logits: jax.Array, split: Batch) -> jax.Array:
        share, count = _by(strata, example_scores.accuracy(logits, split), logits, split)
        return jnp.argmin(jnp.where(count > 0, share, jnp.inf)).astype(jnp.int32)

    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return example_scores.accuracy(logits, split) * (strata(logits, split)[0] == focus)

    def refuted(logits: jax.Array, split: Batch) -> jax.Array:
        share, count = _by(strata, example_scores.accuracy(logits, split), logits, split)
        tails = _tail(jnp.round(share * count), jnp.maximum(count, 1), threshold)
        empty = (
            1.0 if strata is _classes else 0.0
        )  # nothing is known of a class that is absent; MOST_GROUPS is no promise
        return jnp.where(count > 0, tails, empty).max()

    return Goal(
        metric,
        threshold,
        _of_worst(example_scores.accuracy, strata),
        _of_worst(example_scores.DEFAULT_SELECT, strata),
        focus,
        compared,
        shares=True,
        refuted=refuted,
    )


def _of_worst(scores: Objective, strata: Strata) -> Objective:
    """The least of the strata's mean scores, linearised: m_c + [in c] (N / n_c) (score - m_c), c that stratum."""

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        values = scores(logits, split)
        share, count = _by(strata, values, logits, split)
        worst = jnp.argmin(jnp.where(count > 0, share, jnp.inf))
        weight = (strata(logits, split)[0] == worst) * values.shape[0] / jnp.maximum(count[worst], 1)
        return share[worst] + weight * (values - share[worst])

    return objective


def _balanced(metric: str, threshold: float) -> Goal:
    score = _of_all_classes(example_scores.accuracy)
    return Goal(
        metric,
        threshold,
        score,
        _of_all_classes(example_scores.DEFAULT_SELECT),
        _everything,
        _evened,
        shares=False,
        refuted=_normal(score, threshold),
    )


def _of_all_classes(scores: Objective) -> Objective:
    """The mean of the classes' mean scores, over classes that are there, linearised."""

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        values = scores(logits, split)
        share, count = _by(_classes, values, logits, split)
        there = count > 0
        weight = jnp.where(there, values.shape[0] / jnp.maximum(count, 1), 0) / jnp.maximum(there.sum(), 1)
        own = jnp.maximum(split.labels, 0)
        mean = jnp.where(there, share, 0).sum() / jnp.maximum(there.sum(), 1)
        return mean + jnp.where(split.labels >= 0, weight[own] * (values - share[own]), 0)

    return objective


def _evened(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
    """Hits that weigh as much for each class, in [0, 1]: their mean is in proportion to the balanced accuracy."""
    hits = example_scores.accuracy(logits, split)
    _, count = _by(_classes, hits, logits, split)
    fewest = jnp.where(count > 0, count, jnp.inf).min()
    return hits * fewest / jnp.maximum(count, 1)[jnp.maximum(split.labels, 0)]


def macro_f1(logits: jax.Array, split: Batch) -> jax.Array:
    """The mean over classes of F1_c = 2 TP_c / (n_c + m_c), n_c examples of it, m_c predicted as it; linearised, [N].

    Classes that are neither there nor predicted are left out.
    """
    hits = example_scores.accuracy(logits, split)
    k, n = logits.shape[-1], hits.shape[0]
    labels = jax.nn.one_hot(split.labels, k)
    said = jax.nn.one_hot(jnp.argmax(logits, -1), k) * (split.labels >= 0)[:, None]
    both = labels.sum(0) + said.sum(0)
    there = both > 0
    f1 = jnp.where(there, 2 * (hits[:, None] * labels).sum(0) / jnp.maximum(both, 1), 0)
    influence = n / jnp.maximum(both, 1) * (2 * hits[:, None] * labels - f1 * (labels + said))
    return (f1.sum() + jnp.where(there, influence, 0).sum(-1)) / jnp.maximum(there.sum(), 1)


def _macro_f1(metric: str, threshold: float) -> Goal:
    """A promotion for it proves the balanced accuracy to be higher, F1 being no mean of scores."""
    refuted = _normal(macro_f1, threshold)
    smooth = _of_all_classes(example_scores.DEFAULT_SELECT)
    return Goal(metric, threshold, macro_f1, smooth, _everything, _evened, shares=False, refuted=refuted)


# Of probabilities.


def brier(logits: jax.Array, split: Batch) -> jax.Array:
    """The negated Brier score (1950), halved: -sum_k (q_k - [k = y])^2 / 2, in [-1, 0], nan for logits that are."""
    q = jax.nn.softmax(logits)
    squares = jnp.square(q - jax.nn.one_hot(split.labels, logits.shape[-1])).sum(-1) / 2
    return jnp.where(split.labels >= 0, -squares, 0.0)


def calibration(logits: jax.Array, split: Batch) -> jax.Array:
    """The negated expected calibration error in BINS bins of equal width (Guo et al. 2017, arXiv 1706.04599), linearised.

    ECE = sum_b |mean_i [i in b] (hit_i - q_i)|, q the greatest probability, so that an example's score is its own term with
    the sign of its bin's sum.
    """
    q = jax.nn.softmax(logits).max(-1)
    miss = jnp.where(split.labels >= 0, example_scores.accuracy(logits, split) - q, 0.0)
    own = jnp.clip(jnp.floor(q * BINS), 0, BINS - 1).astype(jnp.int32)
    sums = jax.ops.segment_sum(miss, own, BINS)
    return -jnp.sign(sums)[own] * miss


def _ece(metric: str, threshold: float) -> Goal:
    """A promotion for it proves the Brier score to be lower, of which the calibration error is a part."""
    return _negated(metric, threshold, calibration)


def _brier(metric: str, threshold: float) -> Goal:
    return _negated(metric, threshold, brier)


def _negated(metric: str, threshold: float, score: Objective) -> Goal:
    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return 1 + brier(logits, split)

    refuted = _normal(score, -threshold)
    return Goal(metric, -threshold, score, score, _everything, compared, shares=False, refuted=refuted)


# Of one's own.


def _cost(metric: str, threshold: float, costs: jax.Array) -> Goal:
    """The negated mean cost; what is smooth is the cost expected under the student's own probabilities."""
    least, span = costs.min(), jnp.maximum(costs.max() - costs.min(), 1e-12)

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        paid = costs[jnp.maximum(split.labels, 0), jnp.argmax(logits, -1)]
        worst = costs.max(axis=-1)[jnp.maximum(split.labels, 0)]
        return jnp.where(split.labels >= 0, -jnp.where(jnp.isfinite(logits.max(-1)), paid, worst), 0.0)

    def smooth(logits: jax.Array, split: Batch) -> jax.Array:
        expected = (jax.nn.softmax(logits) * costs[jnp.maximum(split.labels, 0)]).sum(-1)
        return jnp.where(split.labels >= 0, -expected, 0.0)

    def compared(logits: jax.Array, split: Batch, focus: jax.Array) -> jax.Array:
        return 1 - (-score(logits, split) - least) / span

    refuted = _normal(score, -threshold)
    return Goal(metric, -threshold, score, smooth, _everything, compared, shares=False, refuted=refuted)


def _own(metric: str, threshold: float, function: Callable[..., Any]) -> Goal:
    """A user's function of (logits [N, K], labels [N]) to scores [N] in [0, 1]; nan for logits that are not finite."""

    def on_host(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits, labels = np.asarray(logits), np.asarray(labels)
        sound = np.isfinite(logits).all(axis=1)
        scores = np.full(len(logits), np.nan, np.float32)
        if sound.any():
            scores[sound] = function(logits[sound], labels[sound])
        return scores

    def score(logits: jax.Array, split: Batch) -> jax.Array:
        shape = jax.ShapeDtypeStruct(split.labels.shape, jnp.float32)
        return jax.pure_callback(on_host, shape, logits, split.labels, vmap_method="sequential")

    refuted = _normal(score, threshold)
    return Goal(metric, threshold, score, score, _everything, _whole(score), shares=False, refuted=refuted)


_METRICS: dict[str, Callable[[str, float], Goal]] = {
    "accuracy": lambda metric, threshold: _share(
        metric, threshold, example_scores.accuracy, example_scores.DEFAULT_SELECT
    ),
    "agreement": _agreement,
    "balanced_accuracy": _balanced,
    "worst_class_accuracy": lambda metric, threshold: _worst(metric, threshold, _classes),
    "worst_group_accuracy": lambda metric, threshold: _worst(metric, threshold, _groups),
    "macro_f1": _macro_f1,
    "ece": _ece,
    "brier": _brier,
    "drop(accuracy)": _drop,
}


def _by(strata: Strata, values: jax.Array, logits: jax.Array, split: Batch) -> tuple[jax.Array, jax.Array]:
    """Each stratum's mean value and number of examples, both [C]."""
    own, many = strata(logits, split)
    own = jnp.where(own >= 0, own, many)
    count = jax.ops.segment_sum(jnp.ones_like(values), own, many + 1)[:many]
    return jax.ops.segment_sum(values, own, many + 1)[:many] / jnp.maximum(count, 1), count


def _everything(logits: jax.Array, split: Batch) -> jax.Array:
    """The focus of a metric on all examples."""
    return jnp.int32(0)


def _whole(score: Objective) -> Callable[[jax.Array, Batch, jax.Array], jax.Array]:
    return lambda logits, split, focus: score(logits, split)


def _tail(hits: jax.Array, n: jax.Array, share: float) -> jax.Array:
    """P(Bin(n, share) >= hits)."""
    if share <= 0:
        return jnp.zeros_like(hits)
    if share >= 1:
        return jnp.ones_like(hits)
    tail = betainc(jnp.maximum(hits, 1), n - jnp.maximum(hits, 1) + 1, jnp.float32(share))
    return jnp.where(hits > 0, tail, 1.0)


def _normal(score: Objective, least: float) -> Refuted:
    """That the mean score is below `least`, by its standard error, which is taken for no less than 1 / N."""

    def refuted(logits: jax.Array, split: Batch) -> jax.Array:
        values = score(logits, split)
        n = values.shape[0]
        se = jnp.maximum(values.std() / math.sqrt(max(n - 1, 1)), 1 / n)
        p_value = norm.sf((values.mean() - least) / se)
        return jnp.where(jnp.isnan(p_value), 1.0, p_value)

    return refuted
