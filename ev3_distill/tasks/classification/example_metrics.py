"""What each classification metric is, example by example: the one definition, for numpy and jax.numpy alike.

Logits with a nan or +inf, or with nothing but -inf, predict no class: they are never right and agree with no one. An argmax
takes the first class of a tie. `xp` is the array module, numpy by default.

References:
  G. W. Brier: Verification of forecasts expressed in terms of probability. Monthly Weather Review 78 (1), 1950.
"""

from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["agrees", "brier", "cost", "hit", "in_top_k", "predicted_class", "probabilities"]

Array = Any  # of numpy or jax


def predicted_class(logits: Array, *, xp: ModuleType = np) -> Array:
    """The class of the greatest logit [N]; -1 where the logits predict no class."""
    return xp.where(xp.isfinite(logits.max(-1)), xp.argmax(logits, -1), -1)


def hit(logits: Array, classes: Array, *, xp: ModuleType = np) -> Array:
    """Whether the prediction is the given class, [N] bool. A class of -1 is never predicted."""
    sound = xp.isfinite(logits.max(-1))  # argmax takes nan for the greatest, and would count it as right
    return (xp.argmax(logits, -1) == classes) & sound


def in_top_k(logits: Array, labels: Array, k: int, *, xp: ModuleType = np) -> Array:
    """Whether the label is among the k greatest logits, [N] bool; of a tie the first classes count."""
    own = xp.take_along_axis(logits, xp.maximum(labels, 0)[:, None], -1)
    tied_before = (logits == own) & (xp.arange(logits.shape[-1]) < labels[:, None])
    rank = ((logits > own) | tied_before).sum(-1)
    return (rank < k) & xp.isfinite(logits.max(-1)) & (labels >= 0)


def agrees(logits: Array, teacher_logits: Array, *, xp: ModuleType = np) -> Array:
    """Whether student and teacher predict the same class, [N] bool."""
    return hit(logits, predicted_class(teacher_logits, xp=xp), xp=xp)


def brier(probabilities: Array, labels: Array, *, xp: ModuleType = np) -> Array:
    """Half of Brier's sum of squares, sum_k (q_k - [k = y])^2 / 2, [N] in [0, 1].

    Args:
      probabilities: q [N, K].
      labels: y [N].
      xp: array module.
    """
    return xp.square(probabilities - (labels[:, None] == xp.arange(probabilities.shape[-1]))).sum(-1) / 2


def cost(logits: Array, labels: Array, costs: Array, *, xp: ModuleType = np) -> Array:
    """Cost of the predicted class, [N]; the greatest cost of the label's row where no class is predicted.

    Args:
      logits: [N, K].
      labels: [N]; the result has no meaning where a label is -1.
      costs: [K, K] of predicting a class (column) for an example of a class (row).
      xp: array module.
    """
    rows = xp.maximum(labels, 0)
    return xp.where(xp.isfinite(logits.max(-1)), costs[rows, xp.argmax(logits, -1)], costs.max(-1)[rows])


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax [N, K] in double precision (numpy); nan where the logits predict no class."""
    logits = np.where(predicted_class(logits)[:, None] >= 0, np.asarray(logits, np.float64), np.nan)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))
