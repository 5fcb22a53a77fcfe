"""Exact hypergradients through several steps of an optimizer. Notation as in `problem.py`.

References:
  Franceschi et al., Forward and reverse gradient-based hyperparameter optimization. ICML 2017, arXiv 1703.01785.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ev3_distill.hypergrad.problem import HypergradientInfo, Problem
from ev3_distill.types import PyTree


def unrolled(
    key: jax.Array,
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    steps: int = 1,
) -> tuple[PyTree, HypergradientInfo]:
    """Exact for `steps` steps of the optimizer, reverse over reverse. Memory grows with the steps.

    Args:
      key: ignored.
      problem: parameters, hyperparameters and losses; the training loss is evaluated at inner steps from 0.
      optimizer: of the steps.
      opt_state: its state before them; None for a newly initialized one.
      steps: number of steps.

    Returns:
      (dV / dlambda, shaped like `hyper`, info).
    """
    final_loss = _final_loss(problem, optimizer=optimizer, opt_state=opt_state, steps=steps)
    val, (gradient, log_rate) = jax.value_and_grad(final_loss, (0, 1))(problem.hyper, 0.0)
    return gradient, HypergradientInfo(val, log_rate, jnp.int32(0), jnp.bool_(True))


def forward(
    key: jax.Array,
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None = None,
    steps: int = 1,
) -> tuple[PyTree, HypergradientInfo]:
    """Exact for `steps` steps of the optimizer, by forward tangents. Memory does not grow with the steps.

    Trains once per number in `hyper`, one after the other. Meant for few hyperparameters over a long horizon. Arguments as for
    `unrolled`.
    """
    final_loss = _final_loss(problem, optimizer=optimizer, opt_state=opt_state, steps=steps)
    flat, unravel = ravel_pytree((problem.hyper, jnp.zeros(())))

    def slope(tangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(lambda flat: final_loss(*unravel(flat)), (flat,), (tangent,))

    values, slopes = jax.lax.map(slope, jnp.eye(len(flat), dtype=flat.dtype))
    gradient, log_rate = unravel(slopes)
    return gradient, HypergradientInfo(values[0], log_rate, jnp.int32(0), jnp.bool_(True))


def _final_loss(
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree | None,
    steps: int,
) -> Callable[[PyTree, Any], jax.Array]:
    """(hyper, log of a factor on every step) -> V after the steps."""
    params, _, train_loss, val_loss = problem
    start = params, optimizer.init(params) if opt_state is None else opt_state

    def final_loss(hyper: PyTree, log_rate: Any) -> jax.Array:
        def advance(carry: tuple[PyTree, PyTree], t: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
            theta, state = carry
            updates, state = optimizer.update(jax.grad(train_loss)(theta, hyper, t), state, theta)
            return (optax.apply_updates(theta, optax.tree.scale(jnp.exp(log_rate), updates)), state), None

        return val_loss(jax.lax.scan(advance, start, jnp.arange(steps))[0][0])

    return final_loss
