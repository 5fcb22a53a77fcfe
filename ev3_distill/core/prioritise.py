"""Prioritise: which objective rules now, among the promise and goals that must hold; evidence -> the scores that decide.

A lexicographic rule whose order follows the risk. A goal is at risk where the current student lies less than AT_RISK standard
errors above it on assess. The goal at the greatest risk rules selection and the arms' shares; where none is at risk, the
promise does. Whatever rules, a proposal may not break a goal that the current student meets.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ev3_distill.core.assess import paired
from ev3_distill.types import Evidence, Goal, GoalEvidence

AT_RISK = 3.0  # standard errors: what assess shows of a student that it chose is optimistic
PROMISE = -1  # rules where no goal does
SLACK = 1.0  # standard errors of its paired change by which a proposal may lie below a goal


def least_of(goals: Sequence[Goal]) -> jax.Array:
    """Thresholds [G]."""
    return jnp.array([goal.least for goal in goals], jnp.float32)


def risks_of(evidence: Evidence, least: jax.Array) -> jax.Array:
    """How far one student lies above each goal, in standard errors, [G]; a nan score is infinitely far below.

    Args:
      evidence: of one student, its goals' leaves [G, N].
      least: [G].
    """
    if not isinstance(evidence.goals, GoalEvidence):
        return jnp.zeros(0)
    score = evidence.goals.score
    n = score.shape[-1]
    se = jnp.maximum(
        score.std(axis=-1) / jnp.sqrt(max(n - 1, 1)), 1 / n
    )  # all alike proves no more than n examples can
    risks = (score.mean(axis=-1) - least) / se
    return jnp.where(jnp.isnan(risks), -jnp.inf, risks)


def ruling_of(risks: jax.Array, at_risk: float = AT_RISK) -> jax.Array:
    """The goal that rules, int32, or PROMISE.

    Args:
      risks: [G].
      at_risk: in standard errors; 0 lets only goals rule that are broken.
    """
    if risks.shape[0] == 0:
        return jnp.int32(PROMISE)
    return jnp.where(risks.min() < at_risk, jnp.argmin(risks), PROMISE).astype(jnp.int32)


def ruled(evidence: Evidence, ruling: jax.Array) -> Evidence:
    """Evidence in which the scores of the ruling objective stand for select and promise, leaves as there."""
    goals = evidence.goals
    if not isinstance(goals, GoalEvidence):
        return evidence
    by_goal, row = ruling >= 0, jnp.maximum(ruling, 0)
    return Evidence(
        jnp.where(by_goal, jnp.take(goals.smooth, row, axis=-2), evidence.select),
        jnp.where(by_goal, jnp.take(goals.score, row, axis=-2), evidence.promise),
    )


def breaks(evidence: Evidence, current: Evidence, least: jax.Array) -> jax.Array:
    """Whether a proposal would break a goal that the current student meets, [P].

    Args:
      evidence: of the proposals, leaves [P, N], its goals' [P, G, N].
      current: of the current student, leaves [N] and [G, N].
      least: [G].
    """
    if not (isinstance(evidence.goals, GoalEvidence) and isinstance(current.goals, GoalEvidence)):
        return jnp.zeros(evidence.promise.shape[0], bool)
    _, se = paired(evidence.goals.score, current.goals.score)
    met = current.goals.score.mean(axis=-1) >= least
    below = evidence.goals.score.mean(axis=-1) < least - SLACK * se
    return (met & below).any(axis=-1)


def falls_shorter(one: Evidence, other: Evidence, least: jax.Array) -> jax.Array:
    """Whether one student lies further below any goal than the other, scalar bool; what lies above counts as level."""
    if not (isinstance(one.goals, GoalEvidence) and isinstance(other.goals, GoalEvidence)):
        return jnp.bool_(False)
    short, shorter = (jnp.minimum(x.goals.score.mean(axis=-1), least) for x in (other, one))  # type: ignore[union-attr]
    return (shorter < short).any()
