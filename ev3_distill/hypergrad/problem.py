"""The problem that every hypergradient method solves, and what a method reports.

Notation: theta are a student's parameters, P numbers; lambda its hyperparameters; l(theta, lambda, t) the training loss of
step t, with gradient g in theta; V(theta) the loss on held-out examples. The hypergradient is dV(theta') / dlambda, where
theta' is what training steps from theta lead to. Its unit is that of V over that of lambda.

Losses are functions of their arguments alone. Batches, keys for dropout and augmentation, and BatchNorm statistics are fixed
inside them, and statistics that a training pass updates are dropped. Perturbed copies of the parameters therefore share random
numbers and leave no trace. `student_losses` builds such losses for a student.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.types import PyTree

TrainLoss = Callable[
    [PyTree, PyTree, Any], jax.Array
]  # (params, hyper, inner step) -> scalar; step 0 in one-step methods
ValLoss = Callable[[PyTree], jax.Array]  # params -> scalar


class Problem(NamedTuple):
    """Where a hypergradient is wanted, and of which losses."""

    params: PyTree  # theta, floating arrays
    hyper: PyTree  # lambda, floating arrays
    train_loss: TrainLoss  # l; a hyperparameter that it ignores gets exactly 0
    val_loss: ValLoss  # V


class HypergradientInfo(NamedTuple):
    """What a method reports beside the hypergradient, scalars."""

    val_loss: jax.Array  # where the validation gradient was computed
    log_rate: (
        jax.Array
    )  # dV / dlog eta for a factor eta on the optimizer's steps; nan if the method does not compute it
    discarded: jax.Array  # int32, perturbed copies that were not finite
    finite: jax.Array  # bool; if false, the hypergradient returned is 0


def dot(one: PyTree, other: PyTree) -> jax.Array:
    """Inner product of two trees."""
    parts = jax.tree.map(jnp.vdot, one, other)
    return jnp.stack(jax.tree.leaves(parts)).sum()


def is_finite(tree: PyTree) -> jax.Array:
    """Whether all leaves are finite, bool."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def finite_copies(values_K: jax.Array, slopes: PyTree) -> jax.Array:
    """Which of K copies have a finite loss and finite slopes (leaves [K, ...]), [K] bool."""
    rows = [jnp.isfinite(leaf).reshape(len(values_K), -1).all(1) for leaf in jax.tree.leaves(slopes)]
    return jnp.stack([jnp.isfinite(values_K), *rows]).all(0)
