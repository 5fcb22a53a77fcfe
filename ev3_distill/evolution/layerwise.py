"""An estimate part by part: one population for each part of the parameters, such as a layer, while the others stay.

With noise on a part of d_k of d parameters the variance of its estimate is |gradient of that part|^2 d_k / n, not
|gradient|^2 d / n, and a network's layers before that part give all members the same, once. Deep layers are then cheap to
evaluate, and their populations can be large for little. A block-coordinate estimate is of the sum over parts of each one's
smoothed objective, which has no noise of other parts in it: as sigma falls, the gradient.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ev3_distill.evolution.strategy import Fitness, Report, estimate
from ev3_distill.evolution.subspace import Subspace
from ev3_distill.runtime.distributed import Spread
from ev3_distill.types import PyTree


class Part(NamedTuple):
    """A population of its own."""

    subspace: Callable[[PyTree], Subspace]  # of the parameters that move in it; disjoint from the other parts'
    pairs: int
    chunk: int | None = None  # pairs at once


def estimate_by_parts(
    key: jax.Array,
    mean: PyTree,
    fitness: Fitness,
    parts: Sequence[Part],
    *,
    sigma: jax.typing.ArrayLike,
    shaping: str = "rank",
    rank: int | None = None,
    spread: Spread = Spread(),  # noqa: B008  a tuple
) -> tuple[PyTree, Report]:
    """As `estimate`, of one population after the other; a parameter in no part has gradient 0.

    Shaping is within each population, so that its scale is each part's own: an optimizer that is deaf to scale, such as Adam,
    is the one to take.
    """
    gradient, reports = optax.tree.zeros_like(mean), []
    for i, part in enumerate(parts):
        moving, join = part.subspace(mean)
        found, report = estimate(
            jax.random.fold_in(key, i),
            moving,
            lambda moving, of_data, join=join: fitness(join(moving), of_data),  # type: ignore[misc]
            pairs=part.pairs,
            sigma=sigma,
            shaping=shaping,
            rank=rank,
            chunk=part.chunk,
            spread=spread,
        )
        gradient = part.subspace(gradient).join(found)
        reports.append(report)
    return gradient, _together(reports, [part.pairs for part in parts])


def _together(reports: Sequence[Report], pairs: Sequence[int]) -> Report:
    """Of all members: the sound ones' mean and spread."""
    mean, best, std, broken = (jnp.stack(field) for field in zip(*reports, strict=True))
    weight = 2 * jnp.array(pairs) - broken
    weight = weight / jnp.maximum(weight.sum(), 1)
    center = weight @ mean
    variance = weight @ (jnp.square(std) + jnp.square(mean - center))
    return Report(center, best.max(), jnp.sqrt(variance), broken.sum())
