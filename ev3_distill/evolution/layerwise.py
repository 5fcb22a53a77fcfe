"""Block-coordinate estimates: one population per block of parameters, such as a layer, while the other blocks stay fixed.

With noise on a block of d_k of d parameters, the variance of its estimate is |gradient of the block|^2 d_k / n instead of
|gradient|^2 d / n. All members share the layers before the block, which are evaluated once. So deep layers are cheap to
evaluate and can have large populations. The estimate is of the sum over blocks of each block's smoothed objective, which has no
noise from the other blocks; as sigma goes to 0, it tends to the gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.evolution.population import Fitness, Population, PopulationStats, estimate
from ev3_distill.evolution.subspace import Subspace
from ev3_distill.runtime.distributed import Spread
from ev3_distill.types import PyTree


class Block(NamedTuple):
    """A block of parameters and its population."""

    subspace: Callable[[PyTree], Subspace]  # parameters -> the block; disjoint from other blocks
    population: Population


def estimate_by_blocks(
    key: jax.Array,
    mean: PyTree,
    fitness: Fitness,
    blocks: Sequence[Block],
    *,
    spread: Spread | None = None,
) -> tuple[PyTree, PopulationStats]:
    """Like `estimate`, one population after the other. Parameters outside all blocks get gradient 0.

    Fitness is shaped within each population, so every block has a scale of its own. Use an optimizer that is invariant to
    scale, such as Adam.
    """
    gradient, stats = optax.tree.zeros_like(mean), []
    for i, block in enumerate(blocks):
        selected, join = block.subspace(mean)
        estimated, block_stats = estimate(
            jax.random.fold_in(key, i),
            selected,
            lambda selected, data_key, join=join: fitness(join(selected), data_key),  # type: ignore[misc]
            block.population,
            spread=spread,
        )
        gradient = block.subspace(gradient).join(estimated)
        stats.append(block_stats)
    return gradient, _combined(stats, [block.population.pairs for block in blocks])


def _combined(stats: Sequence[PopulationStats], pairs: Sequence[int]) -> PopulationStats:
    """Statistics over the members of all populations."""
    mean, best, std, failed = (jnp.stack(field) for field in zip(*stats, strict=True))
    weight = 2 * jnp.array(pairs) - failed
    weight = weight / jnp.maximum(weight.sum(), 1)
    center = weight @ mean
    variance = weight @ (jnp.square(std) + jnp.square(mean - center))
    return PopulationStats(center, best.max(), jnp.sqrt(variance), failed.sum())
