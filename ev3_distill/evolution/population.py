"""Gradient estimates from a population: antithetic perturbations of parameters, each scored by a fitness function.

A population has n antithetic pairs mean ± sigma E_i with fitness f_i+ and f_i-, higher is better. The gradient of the smoothed
objective E[f(mean + sigma E)] is estimated as

    g = 1 / (2 n sigma) sum_i (u_i+ - u_i-) E_i,

where u is the fitness after shaping. The fitness may be any function that returns a number; it needs no derivative.

Noise is not stored. `fold_in(key, pair)` generates it once to score the pair and again to form the sum, chunk by chunk, on the
device that owns the pair. A population whose noise fits in HOLD_BYTES keeps it and generates it once. Beyond the mean, memory
holds this noise or the noise of one chunk, and less than 16 bytes per member (its fitness and rank).

References:
  Salimans et al.: Evolution strategies as a scalable alternative to reinforcement learning. arXiv 1703.03864.
  Nesterov and Spokoiny: Random gradient-free minimization of convex functions. FoCM 17, 2017.
  Distributed evolution strategies using TPUs for meta-learning. arXiv 2201.00093.
  Sarkar et al.: Evolution strategies at the hyperscale. arXiv 2511.16652 (low-rank noise).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.evolution.noise import Noise, full_rank, low_rank
from ev3_distill.evolution.shaping import SHAPINGS
from ev3_distill.runtime.distributed import Spread
from ev3_distill.types import PyTree

# Bytes of noise and members per chunk where the caller sets no chunk size. On a CPU: what its caches hold.
CHUNK_BYTES = {True: 2**20, False: 2**26}  # by "the backend is a CPU"
HOLD_BYTES = 32 * 2**20  # noise that a population may keep; generating it dominates the cost of small networks

Fitness = Callable[[PyTree, jax.Array], jax.Array]  # (parameters, key of the pair) -> scalar, higher is better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """Hyperparameters of a population.

    Attributes:
      pairs: n; the population has 2 n members.
      sigma: standard deviation of the noise. Only `EvolutionConfig` also accepts a schedule.
      shaping: how fitness becomes utility, a key of SHAPINGS. "centered" leaves the estimate unbiased.
      rank: rank of the noise on matrices and kernels; None for full-rank noise.
      chunk: pairs scored at once; None for as many as CHUNK_BYTES hold, or one for convolutions on a CPU.
      hold_noise: whether to keep the noise between scoring and summation; None to keep it if it fits in HOLD_BYTES.
    """

    pairs: int
    sigma: optax.ScalarOrSchedule
    shaping: str = "rank"
    rank: int | None = None
    chunk: int | None = None
    hold_noise: bool | None = None

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.shaping not in SHAPINGS or (self.chunk is not None and self.chunk < 1):
            raise ValueError(
                f"a population needs pairs >= 1, chunk >= 1 or None, and a shaping of {', '.join(SHAPINGS)}; "
                f"got pairs={self.pairs}, chunk={self.chunk}, shaping='{self.shaping}': change these values"
            )


class PopulationStats(NamedTuple):
    """Fitness statistics of one population, scalars."""

    mean: jax.Array  # float32, over members with finite fitness
    best: jax.Array  # float32, -inf if no member has finite fitness
    std: jax.Array  # float32, over members with finite fitness
    failed: jax.Array  # int32, number of members without finite fitness; they rank last


def estimate(
    key: jax.Array, mean: PyTree, fitness: Fitness, population: Population, *, spread: Spread | None = None
) -> tuple[PyTree, PopulationStats]:
    """Estimate the gradient of the smoothed objective from one population; the direction is uphill.

    Args:
      key: of this population.
      mean: parameters, floating arrays.
      fitness: of one member. Both members of a pair get the same key to sample data with. A fitness that ignores the key scores
        all members on the same data.
      population: its hyperparameters.
      spread: over devices; None for a single device.

    Returns:
      (gradient, shaped like `mean`, statistics). With shaping "centered" the estimate is unbiased, except that members without
      finite fitness count as the worst of the others.
    """
    return estimate_and_score(key, mean, fitness, population, spread=spread)[:2]


def estimate_and_score(
    key: jax.Array, mean: PyTree, fitness: Fitness, population: Population, *, spread: Spread | None = None
) -> tuple[PyTree, PopulationStats, jax.Array]:
    """Like `estimate`, and also return each member's fitness [n, 2], -inf where it is not finite."""
    spread, sigma = spread or Spread(), population.sigma
    if callable(sigma):
        raise ValueError("an estimate needs a number for sigma; got a schedule: evaluate it for this generation first")
    noise = noise_of(mean, population.rank)
    plan = _plan(population, mean, noise, spread)

    def draw(start: jax.Array, count: int = plan.size) -> jax.Array:
        return jax.vmap(lambda pair: noise.draw(jax.random.fold_in(key, 2 * pair)))(start + jnp.arange(count))

    def score(chunk: tuple[jax.Array, PyTree]) -> jax.Array:
        start, held = chunk
        drawn = held if plan.hold else draw(start)
        keys = jax.vmap(lambda pair: jax.random.fold_in(key, 2 * pair + 1))(start + jnp.arange(plan.size))
        one_by_one = plan.size == 1 and population.rank is None  # members share no computation
        return _score_pairs(fitness, noise, drawn, keys, sigma=sigma, one_by_one=one_by_one)

    # Held noise is generated at once: inside the loop over chunks, an MLP's generation took 1.4 times as long on a CPU.
    held = draw(plan.first, plan.own).reshape(len(plan.starts), plan.size, -1) if plan.hold else ()
    scores = jax.lax.map(score, (plan.starts, held))
    scores, stats = _stats(spread.gather(scores.reshape(plan.own, 2))[: population.pairs])
    weights = SHAPINGS[population.shaping](scores) / (2 * population.pairs * sigma)
    weights = jnp.pad(weights, (0, plan.total - population.pairs))

    def add(total: PyTree, chunk: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        start, held = chunk
        chunk_weights = jax.lax.dynamic_slice_in_dim(weights, start, plan.size)
        return jax.tree.map(jnp.add, total, noise.weigh(chunk_weights, held if plan.hold else draw(start))), None

    def part_sum(chunks: tuple[jax.Array, PyTree]) -> PyTree:
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, mean), chunks)[0]

    by_part = jax.tree.map(lambda leaf: leaf.reshape(spread.parts, -1, *leaf.shape[1:]), (plan.starts, held))
    return spread.total(jax.lax.map(part_sum, by_part)), stats, scores


def noise_of(mean: PyTree, rank: int | None) -> Noise:
    """The noise of a population: full rank for None, else low rank."""
    return full_rank(mean) if rank is None else low_rank(mean, rank)


class _Plan(NamedTuple):
    """How the pairs are divided into chunks. All chunks have the same size; the last pairs may be padding."""

    size: int  # pairs per chunk
    own: int  # pairs on this device
    total: int  # pairs on all devices
    first: jax.Array  # int32, the first pair of this device
    starts: jax.Array  # [chunks] int32, the first pair of each chunk of this device
    hold: bool  # whether noise is kept


def _plan(population: Population, mean: PyTree, noise: Noise, spread: Spread) -> _Plan:
    blocks = spread.devices * spread.parts
    size = min(population.chunk or _default_chunk(mean, noise), math.ceil(population.pairs / blocks))
    chunks = math.ceil(population.pairs / (blocks * size))  # of each part
    size = math.ceil(population.pairs / (blocks * chunks))  # as even as possible
    own = spread.parts * chunks * size
    first = spread.device_index() * own
    starts = first + size * jnp.arange(spread.parts * chunks, dtype=jnp.int32)
    hold = 4 * noise.size * own <= HOLD_BYTES if population.hold_noise is None else population.hold_noise
    return _Plan(size, own, blocks * chunks * size, first, starts, hold)


def _default_chunk(mean: PyTree, noise: Noise) -> int:
    """Pairs whose noise and members fit in CHUNK_BYTES; 1 on a CPU with kernels, where batched kernels convolve slowly."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and any(leaf.ndim > 2 for leaf in jax.tree.leaves(mean)):
        return 1
    members = 2 * sum(leaf.size for leaf in jax.tree.leaves(mean))
    return max(1, CHUNK_BYTES[on_cpu] // (4 * (noise.size + members)))


def _score_pairs(
    fitness: Fitness,
    noise: Noise,
    drawn: jax.Array,
    keys: jax.Array,
    *,
    sigma: jax.typing.ArrayLike,
    one_by_one: bool,
) -> jax.Array:
    """Fitness [c, 2] of c pairs with noise `drawn` [c, size] and data keys [c]."""

    def score(member: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        drawn, data_key, sign = member
        return noise.member(lambda params: fitness(params, data_key), drawn, sign * sigma).astype(jnp.float32)

    count = len(keys)
    members = jnp.repeat(drawn, 2, axis=0), jnp.repeat(keys, 2, axis=0), jnp.tile(jnp.array([1.0, -1.0]), count)
    scores = jax.lax.map(score, members) if one_by_one else jax.vmap(score)(members)
    return scores.reshape(count, 2)


def _stats(scores: jax.Array) -> tuple[jax.Array, PopulationStats]:
    """The scores with -inf in place of non-finite values, and their statistics."""
    finite = jnp.isfinite(scores)
    count = jnp.maximum(finite.sum(), 1)
    mean = jnp.where(finite, scores, 0).sum() / count
    std = jnp.sqrt(jnp.where(finite, jnp.square(scores - mean), 0).sum() / count)
    scores = jnp.where(finite, scores, -jnp.inf)
    return scores, PopulationStats(mean, scores.max(), std, (~finite).sum(dtype=jnp.int32))
