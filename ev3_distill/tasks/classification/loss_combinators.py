"""Losses made from other losses: mixtures, class balancing, scores as losses, and another teacher."""

import jax
import jax.numpy as jnp

from ev3_distill.tasks.classification.loss_terms import Scalar, check_factor, labeled_weight, weighted_mean
from ev3_distill.types import Batch, Loss, Objective

__all__ = ["balanced", "mix", "negated", "taught_by"]


def mix(*weighted: tuple[Scalar, Loss]) -> Loss:
    """A weighted sum of losses: sum_j w_j loss_j.

    Args:
      *weighted: at least one pair (w_j, loss_j), w_j at least 0.

    Returns:
      The loss.

    References:
      Hinton et al., Distilling the knowledge in a neural network, 2015, section 2 (cross_entropy and kd).
    """
    if not weighted:
        raise ValueError("mix needs at least one pair (weight, loss); got none: try mix((1.0, kd()))")
    for position, (factor, _) in enumerate(weighted):
        check_factor(f"weight {position} of mix", factor)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        first, *rest = (factor * part(logits, batch) for factor, part in weighted)
        return sum(rest, start=first)

    return loss


def balanced(loss: Loss, *, power: float = 1.0) -> Loss:
    """The loss with equal weight for every class: an example's weight is divided by its class's weight in the batch.

    In expectation this weights each class by the inverse of its frequency, which need not be known. Examples without a label
    keep their weight. A power below 1 leaves more weight to common classes, and hurts calibration less, because rare classes
    are predicted too often under full balancing.

    Args:
      loss: any loss on logits.
      power: of the class's weight; 1 balances fully, 1/2 half way, 0 not at all.

    Returns:
      The loss.

    References:
      King and Zeng, Logistic regression in rare events data, 2001, section 4.2 (weighting by class).
    """

    def by_class(logits: jax.Array, batch: Batch) -> jax.Array:
        same = (batch.targets[:, None] == batch.targets) & (batch.targets >= 0)
        of_class = (same * batch.weight).sum(-1)
        share = jnp.where(of_class > 0, batch.weight / jnp.where(of_class > 0, of_class, 1.0) ** power, 0.0)
        return loss(logits, batch._replace(weight=jnp.where(batch.targets >= 0, share, batch.weight)))

    return by_class


def negated(objective: Objective) -> Loss:
    """An objective as a loss: its negated mean over labeled examples, in the score's units.

    Args:
      objective: one with a gradient, such as `example_scores.brier`.
    """

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        return -weighted_mean(objective(logits, batch), labeled_weight(batch))

    return loss


def taught_by(loss: Loss, feature: str, *, share: float = 1.0) -> Loss:
    """The loss under another teacher, whose logits are a feature: z = (1 - share) z_teacher + share z_feature.

    Args:
      loss: any loss on logits.
      feature: name of the other teacher's logits in `Batch.teacher`, [B, K].
      share: weight of the other teacher; 1 for it alone, 1/2 for the ensemble of both.
    """

    def under_other(logits: jax.Array, batch: Batch) -> jax.Array:
        mixed = (1 - share) * batch.teacher["logits"] + share * batch.teacher[feature]
        return loss(logits, batch._replace(teacher={**batch.teacher, "logits": mixed}))

    return under_other
