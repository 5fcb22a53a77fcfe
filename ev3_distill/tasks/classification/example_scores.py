"""Objectives `(logits [N, K], split) -> score [N]`: one float32 score per example, higher is better.

They score students for selection and promotion, not for gradients, and ignore the split's weights. Where an objective needs a
label and there is none (-1), the score is 0 whatever the logits, so paired comparisons ignore that example. Logits with a nan
or +inf, or with nothing but -inf, never win: accuracy and agreement score 0, the others nan. An argmax takes the first class
of a tie.
"""

import math

import jax
import jax.numpy as jnp

from ev3_distill.tasks.classification import example_metrics
from ev3_distill.types import Batch, Objective

__all__ = [
    "DEFAULT_SELECT",
    "OBJECTIVES",
    "accuracy",
    "agreement",
    "brier",
    "log_likelihood",
    "margin",
    "probability",
    "top_k",
]


def accuracy(logits: jax.Array, split: Batch) -> jax.Array:
    """Whether the label is the first of the greatest logits, in {0, 1}.

    Args:
      logits: [N, K], the student's.
      split: the examples; its targets [N] are used.

    Returns:
      The scores [N].
    """
    return example_metrics.hit(logits, split.targets, xp=jnp).astype(jnp.float32)


def agreement(logits: jax.Array, split: Batch) -> jax.Array:
    """Whether student and teacher predict the same class, each the first of its greatest logits, in {0, 1}.

    Args:
      logits: [N, K], the student's.
      split: the examples; the teacher's logits [N, K] are used, targets are not.

    Returns:
      The scores [N].
    """
    return example_metrics.agrees(logits, split.teacher["logits"], xp=jnp).astype(jnp.float32)


def top_k(k: int) -> Objective:
    """Whether the label is among the k greatest logits, in {0, 1}; of a tie the first classes count.

    Args:
      k: at least 1.
    """

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        return example_metrics.in_top_k(logits, split.targets, k, xp=jnp).astype(jnp.float32)

    return objective


def log_likelihood(logits: jax.Array, split: Batch) -> jax.Array:
    """The log-softmax at the label, in nats, at most 0.

    Args:
      logits: [N, K], the student's.
      split: the examples; its targets [N] are used.

    Returns:
      The scores [N].
    """
    return _at_label(jax.nn.log_softmax(logits), split.targets)


def probability(logits: jax.Array, split: Batch) -> jax.Array:
    """The softmax at the label, in [0, 1].

    Args:
      logits: [N, K], the student's.
      split: the examples; its targets [N] are used.

    Returns:
      The scores [N].
    """
    return _at_label(jax.nn.softmax(logits), split.targets)


def brier(logits: jax.Array, split: Batch) -> jax.Array:
    """Half of Brier's score (1950), negated: -sum_k (q_k - [k = y])^2 / 2, in [-1, 0].

    Args:
      logits: [N, K], the student's.
      split: the examples; its targets [N] are used.

    Returns:
      The scores [N].
    """
    squares = example_metrics.brier(jax.nn.softmax(logits), split.targets, xp=jnp)
    return jnp.where(split.targets >= 0, -squares, 0.0)


def margin(*, sharpness: float = 1.5) -> Objective:
    """A smooth accuracy that ignores the scale of the logits: sigmoid(sharpness (z_y - max_{k != y} z_k)), in [0, 1].

    z is the z-score of an example's logits over its classes, with the population standard deviation. Flat logits have z = 0
    and score 1/2, as does any tie for the first place. With two classes z is -1 or 1, so the score only tells right from
    wrong.

    Args:
      sharpness: slope of the sigmoid per standard deviation of the logits, above 0; accuracy is the limit of infinity.

    Returns:
      The objective; it uses the split's targets.
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be finite and above 0; got {sharpness}: for a sharp step use accuracy")

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        logits = logits - logits.max(-1, keepdims=True)
        span = -logits.min(-1, keepdims=True)  # squares of values scaled by it neither overflow nor underflow
        values = logits / jnp.where(span == 0, 1.0, span)
        std = jnp.sqrt(jnp.where(span == 0, 1.0, values.var(-1, keepdims=True)))[:, 0]
        is_label = jnp.arange(logits.shape[-1]) == split.targets[:, None]
        best_other = jnp.where(is_label, -jnp.inf, values).max(-1)
        lead = (_at_label(values, split.targets) - best_other) / std
        return jnp.where(split.targets >= 0, jax.nn.sigmoid(sharpness * lead), 0.0)

    return objective


OBJECTIVES: dict[str, Objective] = {
    "accuracy": accuracy,
    "agreement": agreement,
    "log_likelihood": log_likelihood,
    "probability": probability,
    "margin": margin(),
}

DEFAULT_SELECT: Objective = OBJECTIVES["margin"]


def _at_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    at_label = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], -1)[:, 0]
    return jnp.where(labels >= 0, at_label, 0.0)
