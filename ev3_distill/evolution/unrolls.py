"""Noise-reuse evolution strategies: estimates along an unrolled computation that never wait for its end.

A learner, a simulation or a recurrent network is unrolled for `horizon` steps; wanted is the gradient of the mean of its steps'
losses, smoothed over the parameters. Each antithetic pair carries the two states of its own episode and moves on by `window`
steps at a time; its noise is drawn once per episode and used again in every window, from a key that names pair and episode. Of
pairs that are spread evenly over the episode

  g = 1 / (2 n sigma) sum_i (l_i+ - l_i-) E_i,   l_i the mean loss of pair i's window,

is unbiased, with the least variance among estimators that draw noise per window or more rarely. Memory: the states and nothing
of the unroll, whatever its length.

Reference: Li, Harrison, Sohl-Dickstein, Smith and Metz: Variance-reduced gradient estimation via noise-reuse in online
  evolution strategies. NeurIPS 2023, arXiv 2304.12180.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.evolution.noise import full_rank
from ev3_distill.types import PyTree


class Unrolls(NamedTuple):
    """Where n pairs are in their episodes."""

    inner: PyTree  # leaves [n, 2, ...], of both members
    at: jax.Array  # [n] int32, the next step, below the horizon
    episode: jax.Array  # [n] int32


class NoiseReuse(NamedTuple):
    """An (init, estimate) pair."""

    init: Callable[[jax.Array, PyTree], Unrolls]  # (key of the run, parameters) -> pairs spread over the episode
    estimate: Callable[[jax.Array, PyTree, Unrolls], tuple[PyTree, Unrolls, jax.Array]]
    # (key of the run, parameters, where pairs are) -> (gradient of the loss, where they are then, mean loss)


def noise_reuse(
    begin: Callable[[jax.Array], PyTree],
    advance: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, jax.Array]],
    *,
    pairs: int,
    sigma: float,
    horizon: int,
    window: int,
) -> NoiseReuse:
    """The estimator for one unrolled computation.

    Args:
      begin: key of the episode -> inner state; both members of a pair get the same.
      advance: (parameters, inner state, step) -> (inner state, loss).
      pairs: n; a multiple of horizon / window spreads them evenly.
      sigma: standard deviation of the noise.
      horizon: steps of an episode.
      window: of them per estimate; it divides the horizon.
    """
    if window < 1 or horizon % window:
        raise ValueError(f"a window divides the horizon; got {window} and {horizon}: take another")

    def keys(key: jax.Array, pair: jax.Array, episode: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_noise, of_data = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, pair), episode))
        return of_noise, of_data

    def unroll(
        params: PyTree, drawn: jax.Array, inner: PyTree, start: jax.Array, count: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        """Both members `count` steps on, and the sums of their losses [2]."""

        def one(sign: jax.Array, inner: PyTree) -> tuple[PyTree, jax.Array]:
            def along(noisy: PyTree) -> tuple[PyTree, jax.Array]:
                def step(i: jax.Array, now: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
                    then, loss = advance(noisy, now[0], start + i)
                    return then, now[1] + loss

                return jax.lax.fori_loop(0, count, step, (inner, jnp.float32(0)))

            moved: tuple[PyTree, jax.Array] = full_rank(params).member(along, drawn, sign * sigma)
            return moved

        return jax.vmap(one)(jnp.array([1.0, -1.0]), inner)

    def init(key: jax.Array, params: PyTree) -> Unrolls:
        at = window * (jnp.arange(pairs, dtype=jnp.int32) % (horizon // window))

        def one(pair: jax.Array) -> PyTree:
            of_noise, of_data = keys(key, pair, jnp.int32(0))
            both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), begin(of_data))
            return unroll(params, full_rank(params).draw(of_noise), both, jnp.int32(0), at[pair])[0]

        return Unrolls(jax.lax.map(one, jnp.arange(pairs)), at, jnp.zeros(pairs, jnp.int32))

    def estimate(key: jax.Array, params: PyTree, unrolls: Unrolls) -> tuple[PyTree, Unrolls, jax.Array]:
        noise = full_rank(params)

        def one(total: PyTree, given: tuple[jax.Array, Unrolls]) -> tuple[PyTree, tuple[Unrolls, jax.Array]]:
            pair, (inner, at, episode) = given
            of_noise, _ = keys(key, pair, episode)
            drawn = noise.draw(of_noise)
            inner, losses = unroll(params, drawn, inner, at, jnp.int32(window))
            weight = (losses[0] - losses[1]) / (2 * pairs * sigma * window)
            total = jax.tree.map(jnp.add, total, noise.weigh(weight[None], drawn[None]))
            ends = at + window == horizon
            fresh = begin(keys(key, pair, episode + 1)[1])
            inner = jax.tree.map(lambda old, new: jnp.where(ends, new, old), inner, fresh)
            return total, (Unrolls(inner, jnp.where(ends, 0, at + window), episode + ends), losses.mean() / window)

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, (unrolls, losses) = jax.lax.scan(one, zeros, (jnp.arange(pairs), unrolls))
        return gradient, unrolls, losses.mean()

    return NoiseReuse(init, estimate)
