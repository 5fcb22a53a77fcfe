"""Ranges of hyperparameters, and the outer optimizer that tunes them.

A space is a pytree of bijections, one per hyperparameter, from unconstrained numbers to the hyperparameter's range: a positive
temperature, mixing weights on the simplex, a rate in log space. The outer optimizer (optax) updates the unconstrained numbers,
so no hyperparameter leaves its range. What a run reports or passes on is their exponential moving average.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.types import PyTree

__all__ = [
    "FREE", "LOG", "POSITIVE", "SIMPLEX", "UNIT_INTERVAL", "Bijection", "OuterState", "averaged_values", "constrain",
    "outer_init", "outer_step", "unconstrain",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Bijection:
    """A map between unconstrained numbers and a hyperparameter's range."""

    forward: Callable[[jax.Array], jax.Array]  # unconstrained -> in range
    inverse: Callable[[jax.Array], jax.Array]  # in range -> unconstrained


def _log_ratios(x: jax.Array) -> jax.Array:
    return jnp.log(x[..., :-1]) - jnp.log(x[..., -1:])


def _softmax_with_zero(free: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.concatenate([free, jnp.zeros_like(free[..., :1])], -1))


FREE = Bijection(lambda x: x, lambda x: x)  # any number
POSITIVE = Bijection(jax.nn.softplus, lambda x: x + jnp.log(-jnp.expm1(-x)))  # above 0; additive far from 0
LOG = Bijection(jnp.exp, jnp.log)  # above 0; multiplicative: learning rates, weight decay
UNIT_INTERVAL = Bijection(jax.nn.sigmoid, jax.scipy.special.logit)  # in (0, 1)
SIMPLEX = Bijection(_softmax_with_zero, _log_ratios)  # M positive numbers with sum 1, from M - 1 unconstrained ones


def constrain(space: PyTree, free: PyTree) -> PyTree:
    """Hyperparameters from unconstrained numbers; `space` has a bijection where `free` has an array."""
    return jax.tree.map(lambda bijection, x: bijection.forward(x), space, free)


def unconstrain(space: PyTree, hyper: PyTree) -> PyTree:
    """Unconstrained numbers from hyperparameters, as arrays."""
    return jax.tree.map(lambda bijection, x: bijection.inverse(jnp.asarray(x, jnp.result_type(float))), space, hyper)


class OuterState(NamedTuple):
    """State of hyperparameters that are being tuned."""

    free: PyTree  # unconstrained numbers
    average: PyTree  # their exponential moving average
    opt_state: PyTree
    steps: jax.Array  # int32, outer steps taken; rejected ones are not counted


def outer_init(space: PyTree, hyper: PyTree, optimizer: optax.GradientTransformation) -> OuterState:
    """The state before the first outer step."""
    free = unconstrain(space, hyper)
    return OuterState(free, free, optimizer.init(free), jnp.int32(0))


def outer_step(
    state: OuterState,
    gradient: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    valid: jax.Array | bool = True,
    decay: jax.Array | float = 0.9,
) -> OuterState:
    """Take one step of the outer optimizer.

    Args:
      state: before the step.
      gradient: hypergradient in the unconstrained numbers. A non-finite one leaves the state unchanged.
      optimizer: the one given to `outer_init`.
      valid: whether the gradient may be used, such as `HypergradientInfo.finite`; if not, the state is unchanged.
      decay: of the average, in [0, 1); 0 makes it the last iterate.
    """
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.free)
    free = optax.apply_updates(state.free, updates)
    average = jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, state.average, free)
    after = OuterState(free, average, opt_state, state.steps + 1)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, free))]).all()
    return jax.tree.map(lambda new, old: jnp.where(valid & finite, new, old), after, state)


def averaged_values(space: PyTree, state: OuterState) -> PyTree:
    """Hyperparameters at the average of the unconstrained numbers."""
    return constrain(space, state.average)
