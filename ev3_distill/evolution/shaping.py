"""Fitness shaping: turn the fitness of a population [n, 2] into utility differences u_i+ - u_i- [n].

Fitness is -inf for members without a finite one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Shaping = Callable[[jax.Array], jax.Array]  # fitness [n, 2] -> u+ - u- [n]


def ranks(scores: jax.Array) -> jax.Array:
    """Differences of ranks, scaled to [-1/2, 1/2]. Ties get their mean rank, so a pair of equal members contributes 0."""
    ordered = jnp.sort(scores.reshape(-1))

    def twice_difference(pair: jax.Array) -> jax.Array:
        below = jnp.searchsorted(ordered, pair) + jnp.searchsorted(ordered, pair, side="right")
        return below[0] - below[1]

    differences = jax.lax.map(twice_difference, scores, batch_size=4096)
    return differences / (2 * jnp.maximum(ordered.size - 1, 1))


def fitness_differences(scores: jax.Array) -> jax.Array:
    """Differences of the raw fitness. Any offset that both members of a pair share cancels."""
    filled = _fill_failed(scores)
    return filled[:, 0] - filled[:, 1]


def z_scores(scores: jax.Array) -> jax.Array:
    """Differences in units of the population's standard deviation; 0 if all members are equal."""
    std = _fill_failed(scores).std()
    return jnp.where(std > 0, fitness_differences(scores) / jnp.where(std > 0, std, 1), 0)


def _fill_failed(scores: jax.Array) -> jax.Array:
    """Replace -inf by the lowest finite fitness."""
    finite = jnp.isfinite(scores)
    worst = jnp.where(finite.any(), jnp.where(finite, scores, jnp.inf).min(), 0)
    return jnp.where(finite, scores, worst)


SHAPINGS: dict[str, Shaping] = {"rank": ranks, "centered": fitness_differences, "z-score": z_scores}
