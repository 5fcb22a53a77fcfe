"""Metrics of a whole split as per-example scores, so that the core can compare students by them.

A metric that is no mean over examples is linearized: an example's score is the metric plus the example's influence on it
(Hampel 1974). The mean over the split is then the metric itself, and the spread gives its standard error (the delta method).
Lower-is-better metrics are negated. An example without a label (-1) has no influence.

Shapes: logits [N, K]; every function of (logits, split) returns [N].

References:
  F. R. Hampel: The influence curve and its role in robust estimation. JASA 69, 1974.
  C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger: On calibration of modern neural networks. 2017, arXiv 1706.04599.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ev3_distill.tasks.classification import example_metrics, example_scores
from ev3_distill.types import MOST_GROUPS, Batch, Objective

__all__ = [
    "BINS",
    "Strata",
    "balanced_hits",
    "calibration",
    "classes",
    "groups",
    "macro_f1",
    "mean_over_classes",
    "means_by_stratum",
    "of_stratum",
    "precision",
    "soft_precision",
    "worst_stratum",
]

BINS = 15  # of equal width, for the calibration error

Strata = Callable[[jax.Array, Batch], tuple[jax.Array, int]]  # (logits, split) -> [N] int32, -1 for none; their number


def classes(logits: jax.Array, split: Batch) -> tuple[jax.Array, int]:
    """Each example's class, and K."""
    return split.targets, logits.shape[-1]


def groups(logits: jax.Array, split: Batch) -> tuple[jax.Array, int]:
    """Each labeled example's group, and MOST_GROUPS, an upper limit of their number."""
    if isinstance(split.group, tuple):
        raise ValueError("worst_group_accuracy needs groups; the split has none: give the data a column `groups`")
    return jnp.where(split.targets >= 0, split.group, -1), MOST_GROUPS


def means_by_stratum(strata: Strata, values: jax.Array, logits: jax.Array, split: Batch) -> tuple[jax.Array, jax.Array]:
    """Each stratum's mean value and number of examples, both [C]; the mean of an empty stratum is 0."""
    own, many = strata(logits, split)
    own = jnp.where(own >= 0, own, many)
    count = jax.ops.segment_sum(jnp.ones_like(values), own, many + 1)[:many]
    return jax.ops.segment_sum(values, own, many + 1)[:many] / jnp.maximum(count, 1), count


def worst_stratum(scores: Objective, strata: Strata) -> Objective:
    """The smallest of the strata's mean scores, linearized: m_c + [in c] (N / n_c) (score - m_c), c the worst stratum."""

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        values = scores(logits, split)
        share, count = means_by_stratum(strata, values, logits, split)
        worst = jnp.argmin(jnp.where(count > 0, share, jnp.inf))
        weight = (strata(logits, split)[0] == worst) * values.shape[0] / jnp.maximum(count[worst], 1)
        return share[worst] + weight * (values - share[worst])

    return objective


def of_stratum(scores: Objective, strata: Strata, index: int) -> Objective:
    """The mean score m of one stratum, linearized: m + [in it] (N / n) (score - m); 0 where it is empty."""

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        values = scores(logits, split)
        share, count = means_by_stratum(strata, values, logits, split)
        weight = (strata(logits, split)[0] == index) * values.shape[0] / jnp.maximum(count[index], 1)
        return share[index] + weight * (values - share[index])

    return objective


def mean_over_classes(scores: Objective) -> Objective:
    """The mean of the classes' mean scores, over the classes with examples, linearized."""

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        values = scores(logits, split)
        share, count = means_by_stratum(classes, values, logits, split)
        present = count > 0
        weight = jnp.where(present, values.shape[0] / jnp.maximum(count, 1), 0) / jnp.maximum(present.sum(), 1)
        own = jnp.maximum(split.targets, 0)
        mean = jnp.where(present, share, 0).sum() / jnp.maximum(present.sum(), 1)
        return mean + jnp.where(split.targets >= 0, weight[own] * (values - share[own]), 0)

    return objective


def balanced_hits(logits: jax.Array, split: Batch) -> jax.Array:
    """Hits weighted equally for each class, in [0, 1]; their mean is proportional to the balanced accuracy."""
    hits = example_scores.accuracy(logits, split)
    _, count = means_by_stratum(classes, hits, logits, split)
    fewest = jnp.where(count > 0, count, jnp.inf).min()
    return hits * fewest / jnp.maximum(count, 1)[jnp.maximum(split.targets, 0)]


def macro_f1(logits: jax.Array, split: Batch) -> jax.Array:
    """The mean over classes of F1_c = 2 TP_c / (n_c + m_c), linearized; n_c examples of class c, m_c predicted as it.

    Classes that are neither labels nor predictions are left out.
    """
    hits = example_scores.accuracy(logits, split)
    k, n = logits.shape[-1], hits.shape[0]
    labels = jax.nn.one_hot(split.targets, k)
    predicted = jax.nn.one_hot(jnp.argmax(logits, -1), k) * (split.targets >= 0)[:, None]
    both = labels.sum(0) + predicted.sum(0)
    present = both > 0
    f1 = jnp.where(present, 2 * (hits[:, None] * labels).sum(0) / jnp.maximum(both, 1), 0)
    influence = n / jnp.maximum(both, 1) * (2 * hits[:, None] * labels - f1 * (labels + predicted))
    return (f1.sum() + jnp.where(present, influence, 0).sum(-1)) / jnp.maximum(present.sum(), 1)


def calibration(logits: jax.Array, split: Batch) -> jax.Array:
    """The negated expected calibration error in BINS bins of equal width (Guo et al. 2017), linearized.

    ECE = sum_b |mean_i [i in b] (hit_i - q_i)|, q the greatest probability. An example's score is its own term with the sign
    of its bin's sum. Bins are [b / BINS, (b + 1) / BINS); those of the certificate are closed on the other side.
    """
    q = jax.nn.softmax(logits).max(-1)
    gap = jnp.where(split.targets >= 0, example_scores.accuracy(logits, split) - q, 0.0)
    own = jnp.clip(jnp.floor(q * BINS), 0, BINS - 1).astype(jnp.int32)
    sums = jax.ops.segment_sum(gap, own, BINS)
    return -jnp.sign(sums)[own] * gap


def precision(logits: jax.Array, split: Batch, index: int) -> jax.Array:
    """The precision p = TP / M of a class, linearized: p + [predicted] (N / M) ([label] - p); 0 where it is never predicted."""
    predicted = example_metrics.hit(logits, jnp.int32(index), xp=jnp) & (split.targets >= 0)
    return _ratio(predicted.astype(jnp.float32), split.targets == index)


def soft_precision(logits: jax.Array, split: Batch, index: int) -> jax.Array:
    """A smooth precision: examples count as predicted by their probability of the class instead of by argmax."""
    weight = jnp.where(split.targets >= 0, jax.nn.softmax(logits)[:, index], 0.0)
    return _ratio(weight, split.targets == index)


def _ratio(weight: jax.Array, right: jax.Array) -> jax.Array:
    """sum_i w_i [right_i] / sum_i w_i, linearized."""
    total = weight.sum()
    safe = jnp.where(total > 0, total, 1.0)
    value = (weight * right).sum() / safe
    return value + weight.shape[0] / safe * weight * (right - value)
