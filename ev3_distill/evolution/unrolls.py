"""Noise-reuse evolution strategies (NRES): online gradient estimates along an unrolled computation.

A learner, a simulation or a recurrent network is unrolled for `horizon` steps. The estimate is of the gradient of the mean loss
of these steps, smoothed over the parameters, and does not wait for the end of an unroll. Each antithetic pair carries the two
states of its own episode and advances by `window` steps per estimate. Its noise is drawn once per episode and reused in every
window, from a key that is determined by pair and episode. For pairs spread evenly over the episode,

  g = 1 / (2 n sigma) sum_i (l_i+ - l_i-) E_i,   l_i the mean loss of pair i's window,

is unbiased and has the least variance among estimators that draw noise once per window or less often; persistent evolution
strategies (PES) draw it per window. Memory holds the states, and none of the unroll.

References:
  Vicol, Metz and Sohl-Dickstein: Unbiased gradient estimation in unrolled computation graphs with persistent evolution
    strategies. ICML 2021, arXiv 2112.13835.
  Li, Harrison, Sohl-Dickstein, Smith and Metz: Variance-reduced gradient estimation via noise-reuse in online evolution
    strategies. NeurIPS 2023, arXiv 2304.12180.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.evolution.noise import full_rank
from ev3_distill.types import PyTree

InitialState = Callable[[jax.Array], PyTree]  # key of the episode -> inner state
Advance = Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, jax.Array]]
# (parameters, inner state, step) -> (inner state, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnrollConfig:
    """Hyperparameters of `noise_reuse`.

    Attributes:
      pairs: n; a multiple of horizon / window spreads the pairs evenly.
      sigma: standard deviation of the noise.
      horizon: steps per episode.
      window: steps per estimate; it must divide the horizon.
    """

    pairs: int
    sigma: float
    horizon: int
    window: int

    def __post_init__(self) -> None:
        if self.window < 1 or self.horizon % self.window:
            raise ValueError(
                f"the window must divide the horizon; got a window of {self.window} and a horizon of {self.horizon}: "
                "change one of them"
            )


class UnrollState(NamedTuple):
    """Where each of n pairs is in its episode."""

    inner: PyTree  # leaves [n, 2, ...], the inner states of both members
    step: jax.Array  # [n] int32, the next step, below the horizon
    episode: jax.Array  # [n] int32


class NoiseReuse(NamedTuple):
    """An (init, estimate) pair."""

    init: Callable[[jax.Array, PyTree], UnrollState]  # (key of the run, parameters) -> pairs spread over the episode
    estimate: Callable[[jax.Array, PyTree, UnrollState], tuple[PyTree, UnrollState, jax.Array]]
    # (key of the run, parameters, state) -> (gradient of the loss, next state, mean loss)


def noise_reuse(initial_state: InitialState, advance: Advance, config: UnrollConfig) -> NoiseReuse:
    """The estimator for one unrolled computation.

    Args:
      initial_state: key of the episode -> inner state; both members of a pair start from the same.
      advance: (parameters, inner state, step) -> (inner state, loss).
      config: hyperparameters.
    """
    pairs, sigma, horizon, window = config.pairs, config.sigma, config.horizon, config.window

    def init(key: jax.Array, params: PyTree) -> UnrollState:
        steps = window * (jnp.arange(pairs, dtype=jnp.int32) % (horizon // window))

        def one(pair: jax.Array) -> PyTree:
            noise_key, data_key = _keys(key, pair, jnp.int32(0))
            both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), initial_state(data_key))
            drawn = full_rank(params).draw(noise_key)
            return _unroll(advance, params, drawn, both, sigma=sigma, start=jnp.int32(0), count=steps[pair])[0]

        return UnrollState(jax.lax.map(one, jnp.arange(pairs)), steps, jnp.zeros(pairs, jnp.int32))

    def estimate(key: jax.Array, params: PyTree, state: UnrollState) -> tuple[PyTree, UnrollState, jax.Array]:
        noise = full_rank(params)

        def one(
            total: PyTree, pair_state: tuple[jax.Array, UnrollState]
        ) -> tuple[PyTree, tuple[UnrollState, jax.Array]]:
            pair, (inner, step, episode) = pair_state
            noise_key, _ = _keys(key, pair, episode)
            drawn = noise.draw(noise_key)
            inner, losses = _unroll(advance, params, drawn, inner, sigma=sigma, start=step, count=jnp.int32(window))
            weight = (losses[0] - losses[1]) / (2 * pairs * sigma * window)
            total = jax.tree.map(jnp.add, total, noise.weigh(weight[None], drawn[None]))
            ends = step + window == horizon
            fresh = initial_state(_keys(key, pair, episode + 1)[1])
            inner = jax.tree.map(lambda old, new: jnp.where(ends, new, old), inner, fresh)
            following = UnrollState(inner, jnp.where(ends, 0, step + window), episode + ends)
            return total, (following, losses.mean() / window)

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, (state, losses) = jax.lax.scan(one, zeros, (jnp.arange(pairs), state))
        return gradient, state, losses.mean()

    return NoiseReuse(init, estimate)


def _keys(key: jax.Array, pair: jax.Array, episode: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(key of the noise, key of the data) of one episode of a pair."""
    noise_key, data_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, pair), episode))
    return noise_key, data_key


def _unroll(
    advance: Advance,
    params: PyTree,
    drawn: jax.Array,
    inner: PyTree,
    *,
    sigma: float,
    start: jax.Array,
    count: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """Advance both members of a pair by `count` steps; returns their inner states and the sums of their losses [2]."""

    def one(sign: jax.Array, inner: PyTree) -> tuple[PyTree, jax.Array]:
        def run(noisy: PyTree) -> tuple[PyTree, jax.Array]:
            def step(i: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
                following, loss = advance(noisy, carry[0], start + i)
                return following, carry[1] + loss

            return jax.lax.fori_loop(0, count, step, (inner, jnp.float32(0)))

        unrolled: tuple[PyTree, jax.Array] = full_rank(params).member(run, drawn, sign * sigma)
        return unrolled

    return jax.vmap(one)(jnp.array([1.0, -1.0]), inner)
