"""Plateau: whether the student still improves at its size, or is stuck and should grow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ev3_distill.core.paired_tests import paired
from ev3_distill.core.prioritise import ruled
from ev3_distill.types import Evidence, Plateau, State

RISES = 2.0  # standard errors by which a score must rise to count as an improvement
SHORT = 5  # initial trajectories; the patience is at least that long, because early plateaus last as long
NO_END = 2**30  # a cost that no run reaches


def start_plateau(evidence: Evidence, seen: jax.Array, position: jax.Array) -> Plateau:
    """The record from which improvement is counted, in a run that may continue as long as the student improves."""
    return Plateau(evidence, seen, position, jnp.int32(NO_END), jnp.bool_(False))


def stuck(state: State) -> jax.Array:
    """Whether the student no longer improves at its size."""
    return state.plateau.stuck if isinstance(state.plateau, Plateau) else jnp.bool_(False)


def update_plateau(
    plateau: Plateau,
    evidence: Evidence,
    seen: Callable[[], jax.Array],
    *,
    ruling: jax.Array,
    position: jax.Array,
    cost: jax.Array,
    promoted: jax.Array,
    patience: jax.Array,
) -> Plateau:
    """Updates the record after an iteration.

    The student improves if it was promoted, or if assess shows clearly more than at the last improvement, in the ruling
    objective. If neither happens for as long as `patience`, its score on training examples decides. If that has risen,
    the student needs more training and has as much time again. If not, its size is the limit: it is stuck. A student
    that has used its part of a search's budget is stuck, too, in the first iteration after that without a promotion.

    Args:
      plateau: before.
      evidence: of the current student on assess, leaves [N].
      seen: computes the current student's promise scores on a part of explore, [N'].
      ruling: the goal that rules, or PROMISE.
      position: global step after this iteration.
      cost: of the run after this iteration.
      promoted: whether this iteration promoted the student.
      patience: global steps.
    """
    now, then = (ruled(x, ruling).promise for x in (evidence, plateau.assess))
    improved = promoted | _rises(now, then)
    overdue = ~improved & (position - plateau.position > patience)
    seen_now = jax.lax.cond(improved | overdue, seen, lambda: plateau.seen)
    learns = overdue & _rises(seen_now, plateau.seen)
    return Plateau(
        assess=jax.tree.map(lambda new, old: jnp.where(improved, new, old), evidence, plateau.assess),
        seen=jnp.where(improved | learns, seen_now, plateau.seen),
        position=jnp.where(improved | learns, position, plateau.position),
        until=plateau.until,
        stuck=plateau.stuck | (overdue & ~learns) | ((cost >= plateau.until) & ~promoted),
    )


def _rises(now: jax.Array, then: jax.Array) -> jax.Array:
    gain, se = paired(now, then)
    return (gain > 0) & (gain > RISES * se)
