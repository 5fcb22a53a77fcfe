"""Evolution strategies: any optax optimizer follows the gradient that a population estimates.

References:
  Distributed evolution strategies using TPUs for meta-learning. arXiv 2201.00093.
  Salimans et al.: Evolution strategies as a scalable alternative to reinforcement learning. arXiv 1703.03864.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.evolution.population import Fitness, Population, PopulationStats, estimate_and_score, noise_of
from ev3_distill.runtime.distributed import Spread
from ev3_distill.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionConfig(Population):
    """Hyperparameters of an evolution strategy: those of its populations, and these.

    Attributes:
      sigma: standard deviation of the noise, or a schedule of it by generation.
      decay: weight decay per generation, as a fraction of the mean; decoupled from the gradient and its optimizer.
      elitism: whether the best member replaces the new mean if it scores higher, both on the member's data. Costs one more
        evaluation. Meant for fitness without noise: with noise, the best of many members is a lucky one.
    """

    decay: float = 0.0
    elitism: bool = False


class EvolutionState(NamedTuple):
    """State of an evolution strategy."""

    mean: PyTree  # parameters
    opt_state: PyTree
    generation: jax.Array  # int32


class Evolution(NamedTuple):
    """An (init, step) pair, like an optax transformation."""

    init: Callable[[PyTree], EvolutionState]  # parameters -> state
    step: Callable[[jax.Array, EvolutionState, Fitness], tuple[EvolutionState, PopulationStats]]
    # (key of the run, state, fitness) -> (state, statistics); call it within `shard_map` if it is spread over devices


def evolution(
    optimizer: optax.GradientTransformation, config: EvolutionConfig, *, spread: Spread | None = None
) -> Evolution:
    """An evolution strategy.

    Args:
      optimizer: any optax transformation. It gets the mean as parameters, so it may apply weight decay.
      config: hyperparameters.
      spread: over devices; None for a single device.
    """
    sigma = config.sigma
    schedule = sigma if callable(sigma) else lambda generation: sigma

    def init(params: PyTree) -> EvolutionState:
        return EvolutionState(params, optimizer.init(params), jnp.int32(0))

    def step(key: jax.Array, state: EvolutionState, fitness: Fitness) -> tuple[EvolutionState, PopulationStats]:
        key = jax.random.fold_in(key, state.generation)
        population = dataclasses.replace(config, sigma=schedule(state.generation))
        gradient, stats, scores = estimate_and_score(key, state.mean, fitness, population, spread=spread)
        descent = optax.tree.scale(-1, gradient)
        updates, opt_state = optimizer.update(descent, state.opt_state, state.mean)
        if config.decay:
            updates = jax.tree.map(lambda update, x: update - config.decay * x, updates, state.mean)
        mean = optax.apply_updates(state.mean, updates)
        if config.elitism:
            best, data_key = _best_member(key, state.mean, scores, population)
            own = fitness(mean, data_key)
            wins = stats.best > jnp.where(jnp.isfinite(own), own, -jnp.inf)
            mean = jax.tree.map(lambda member, moved: jnp.where(wins, member, moved), best, mean)
        return EvolutionState(mean, opt_state, state.generation + 1), stats

    return Evolution(init, step)


def _best_member(key: jax.Array, mean: PyTree, scores: jax.Array, population: Population) -> tuple[PyTree, jax.Array]:
    """The member with the highest fitness (the first of several) and the key of its data."""
    index = jnp.argmax(scores)
    pair, sign = index // 2, 1.0 - 2.0 * (index % 2)
    noise = noise_of(mean, population.rank)
    drawn = noise.draw(jax.random.fold_in(key, 2 * pair))
    step = noise.weigh(sign[None] * population.sigma, drawn[None])
    return jax.tree.map(jnp.add, mean, step), jax.random.fold_in(key, 2 * pair + 1)
