"""Prioritise: which objective rules, the promise or one of the goals; evidence -> the scores that decide.

The rule is lexicographic, and its order follows the risk. A goal is at risk if the current student lies less than
AT_RISK standard errors above it on assess. The goal at the greatest risk rules selection and the allocation to arms; if
none is at risk, the promise rules. Whatever rules, a proposal may not break a goal that the current student meets.
"""

import jax
import jax.numpy as jnp

from ev3_distill.core.paired_tests import paired
from ev3_distill.types import Evidence, GoalEvidence

AT_RISK = 3.0  # standard errors; large because assess is optimistic about a student that it selected
PROMISE = -1  # rules if no goal does
SLACK = 1.0  # standard errors of its paired change by which a proposal may lie below a goal


def risks_of(evidence: Evidence, thresholds: jax.Array) -> jax.Array:
    """Standard errors by which one student lies above each goal, [G]; -inf for a nan score.

    Args:
      evidence: of one student, its goals' leaves [G, N].
      thresholds: [G].
    """
    if not isinstance(evidence.goals, GoalEvidence):
        return jnp.zeros(0)
    score = evidence.goals.score
    n = score.shape[-1]
    se = jnp.maximum(
        score.std(axis=-1) / jnp.sqrt(max(n - 1, 1)), 1 / n
    )  # equal scores prove no more than n examples can
    risks = (score.mean(axis=-1) - thresholds) / se
    return jnp.where(jnp.isnan(risks), -jnp.inf, risks)


def ruling_of(risks: jax.Array, at_risk: float = AT_RISK) -> jax.Array:
    """The goal that rules, int32, or PROMISE.

    Args:
      risks: [G].
      at_risk: standard errors; with 0 only goals that are not met rule.
    """
    if risks.shape[0] == 0:
        return jnp.int32(PROMISE)
    return jnp.where(risks.min() < at_risk, jnp.argmin(risks), PROMISE).astype(jnp.int32)


def ruled(evidence: Evidence, ruling: jax.Array) -> Evidence:
    """Evidence whose select and promise are the scores of the ruling objective, leaves as before."""
    goals = evidence.goals
    if not isinstance(goals, GoalEvidence):
        return evidence
    by_goal, row = ruling >= 0, jnp.maximum(ruling, 0)
    return Evidence(
        jnp.where(by_goal, jnp.take(goals.smooth, row, axis=-2), evidence.select),
        jnp.where(by_goal, jnp.take(goals.score, row, axis=-2), evidence.promise),
    )


def breaks(evidence: Evidence, current: Evidence, thresholds: jax.Array) -> jax.Array:
    """Whether a proposal would break a goal that the current student meets, [P].

    Args:
      evidence: of the proposals, leaves [P, N], its goals' [P, G, N].
      current: of the current student, leaves [N] and [G, N].
      thresholds: [G].
    """
    if not (isinstance(evidence.goals, GoalEvidence) and isinstance(current.goals, GoalEvidence)):
        return jnp.zeros(evidence.promise.shape[0], bool)
    _, se = paired(evidence.goals.score, current.goals.score)
    met = current.goals.score.mean(axis=-1) >= thresholds
    below = evidence.goals.score.mean(axis=-1) < thresholds - SLACK * se
    return (met & below).any(axis=-1)


def falls_shorter(one: Evidence, other: Evidence, thresholds: jax.Array) -> jax.Array:
    """Whether one student lies further below any goal than the other, scalar bool; above a goal counts as level."""
    if not (isinstance(one.goals, GoalEvidence) and isinstance(other.goals, GoalEvidence)):
        return jnp.bool_(False)
    reached, reference = (jnp.minimum(x.goals.score.mean(axis=-1), thresholds) for x in (one, other))  # type: ignore[union-attr]
    return (reached < reference).any()
