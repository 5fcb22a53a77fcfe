"""Objectives, `(logits [N, K], split) -> score [N]`: one float32 score per example, higher is better.

They score for selection and promotion, not for gradients; the split's weights play no part. Where an objective asks for
a label and there is none (-1), the score is 0 whatever the logits, so paired comparisons ignore that example. Logits
with nan or +inf, or with nothing but -inf, never win: accuracy and agreement score 0, the others nan. An argmax takes
the first class of a tie.
"""

import math

import jax
import jax.numpy as jnp

from ev3_distill.types import Batch, Objective

__all__ = ["DEFAULT_SELECT", "OBJECTIVES", "accuracy", "agreement", "log_likelihood", "margin", "probability"]


def accuracy(logits: jax.Array, split: Batch) -> jax.Array:
    """Whether the label is the first of the greatest logits, in {0, 1}.

    Args:
      logits: [N, K], the student's.
      split: the examples; its labels [N] are used.

    Returns:
      The scores [N].
    """
    return _hit(logits, split.labels)


def agreement(logits: jax.Array, split: Batch) -> jax.Array:
    """Whether student and teacher choose the same class, each the first of its greatest logits, in {0, 1}.

    Args:
      logits: [N, K], the student's.
      split: the examples; its teacher_logits [N, K] are used, labels are not.

    Returns:
      The scores [N].
    """
    return _hit(logits, jnp.argmax(split.teacher_logits, -1))


def log_likelihood(logits: jax.Array, split: Batch) -> jax.Array:
    """The log-softmax at the label, in nats, at most 0.

    Args:
      logits: [N, K], the student's.
      split: the examples; its labels [N] are used.

    Returns:
      The scores [N].
    """
    return _at_label(jax.nn.log_softmax(logits), split.labels)


def probability(logits: jax.Array, split: Batch) -> jax.Array:
    """The softmax at the label, in [0, 1].

    Args:
      logits: [N, K], the student's.
      split: the examples; its labels [N] are used.

    Returns:
      The scores [N].
    """
    return _at_label(jax.nn.softmax(logits), split.labels)


def margin(*, sharpness: float = 1.5) -> Objective:
    """A smooth accuracy that ignores the scale of the logits: sigmoid(sharpness (z_y - max_{k != y} z_k)), in [0, 1].

    z is the z-score of an example's logits over its classes, population std; flat logits have z = 0 and score 1/2, as
    does any tie for the first place. With two classes z is -1 or 1, so the score only tells right from wrong.

    Args:
      sharpness: slope of the sigmoid per standard deviation of the logits, above 0; accuracy is the limit of infinity.

    Returns:
      The objective; it uses the split's labels.
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be finite and above 0; got {sharpness}: for a sharp step use accuracy")

    def objective(logits: jax.Array, split: Batch) -> jax.Array:
        logits = logits - logits.max(-1, keepdims=True)
        span = -logits.min(-1, keepdims=True)  # scaled by it, squares neither overflow nor vanish, whatever the scale
        values = logits / jnp.where(span == 0, 1.0, span)
        std = jnp.sqrt(jnp.where(span == 0, 1.0, values.var(-1, keepdims=True)))[:, 0]
        is_label = jnp.arange(logits.shape[-1]) == split.labels[:, None]
        best_other = jnp.where(is_label, -jnp.inf, values).max(-1)
        lead = (_at_label(values, split.labels) - best_other) / std
        return jnp.where(split.labels >= 0, jax.nn.sigmoid(sharpness * lead), 0.0)

    return objective


OBJECTIVES: dict[str, Objective] = {
    "accuracy": accuracy,
    "agreement": agreement,
    "log_likelihood": log_likelihood,
    "probability": probability,
    "margin": margin(),
}

DEFAULT_SELECT: Objective = OBJECTIVES["margin"]


def _hit(logits: jax.Array, classes: jax.Array) -> jax.Array:
    # argmax takes nan for the greatest, and so would call it right
    sound = jnp.isfinite(logits.max(-1))
    return ((jnp.argmax(logits, -1) == classes) & sound).astype(jnp.float32)


def _at_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    at_label = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], -1)[:, 0]
    return jnp.where(labels >= 0, at_label, 0.0)
