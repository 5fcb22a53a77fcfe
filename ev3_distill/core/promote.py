"""Trial: the current student meets the champion on decide; and what else a run asks of it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core import adapt, assess, prioritise
from ev3_distill.core.assess import Measures, paired
from ev3_distill.types import Apply, Goal, Objective, Pools, Progress, PyTree, Standing, State, Variables


class Trial(NamedTuple):
    """What came of it, scalars; see `Decision`."""

    tested: jax.Array
    promoted: jax.Array
    wins: jax.Array
    losses: jax.Array
    alpha: jax.Array
    p_value: jax.Array
    ruling: jax.Array
    kept: jax.Array


def promote(
    state: State, pools: Pools, *, closing: jax.Array, apply: Apply, measures: Measures, config: EV3
) -> tuple[State, Trial]:
    """Lets the current student meet the champion on decide where that is worth a test; see core/adapt.py.

    The test is about the goal that the champion breaks worst on assess, else about the promise; and one who would break a
    goal that the champion meets on decide is kept from its place: for all that follows, that is a test which failed. A run
    that decide ended, all goals being met, makes no test any more: that answer of decide has no budget to go with it.
    """
    last = closing & ~stuck(state)  # what is stuck may grow and be tested again
    alpha = adapt.level(state.budget, last)
    goals, least = measures.goals, prioritise.least_of(measures.goals)
    ruling = prioritise.ruling_of(prioritise.risks_of(state.champion_evidence, least), at_risk=0.0)

    def predict() -> jax.Array:
        promised = functools.partial(adapt.mcnemar, state.current_evidence.promise, state.champion_evidence.promise)
        if not goals:
            return adapt.worth_testing(promised()[2], alpha, closing)
        one, other = (prioritise.ruled(x, ruling).promise for x in (state.current_evidence, state.champion_evidence))
        p_assess = jnp.where(ruling >= 0, _roughly(*paired(one, other)), promised()[2])
        return adapt.worth_testing(p_assess, alpha, closing)

    def ask() -> _Asked:
        logits = assess.logits_of(apply, state.current, pools.decide.inputs, batch_size=config.eval_batch_size)
        candidate = measures.promise(logits, pools.decide)
        trials = [adapt.mcnemar(candidate, state.champion_decide)]
        champion = state.champion_goals
        against = measures.standing(logits, pools.decide, state.champion_evidence)
        if not (isinstance(champion, Standing) and isinstance(against, Standing)):
            wins, losses, p_value = trials[0]
            return _Asked(candidate, (), wins, losses, p_value, jnp.bool_(False))
        for goal, ours, theirs in zip(goals, against.compared, champion.compared, strict=True):
            trials.append(adapt.mcnemar(ours, theirs) if goal.shares else adapt.betting(ours, theirs))
        wins, losses, p_value = [jnp.stack(column)[ruling + 1] for column in zip(*trials, strict=True)]
        kept = ((champion.metric >= least) & ~(against.metric >= least)).any()
        standing = measures.standing(logits, pools.decide, state.current_evidence)
        return _Asked(candidate, standing, wins, losses, p_value, kept)

    def rest() -> _Asked:
        none = jnp.int32(0)
        return _Asked(state.champion_decide, state.champion_goals, none, none, jnp.float32(1), jnp.bool_(False))

    due = adapt.due(state.cost, state.tested_cost, closing) & ~state.met
    tested = jax.lax.cond(due, predict, lambda: jnp.bool_(False))
    asked = jax.lax.cond(tested, ask, rest)
    proven = tested & (asked.p_value <= alpha)
    promoted = proven & ~asked.kept
    won = (jnp.arange(state.arm_promotions.shape[0]) == state.current_arm) & promoted
    state = state._replace(
        champion=where(promoted, state.current, state.champion),
        champion_evidence=where(promoted, state.current_evidence, state.champion_evidence),
        champion_decide=where(promoted, asked.candidate, state.champion_decide),
        champion_goals=where(promoted, asked.standing, state.champion_goals),
        arm_promotions=state.arm_promotions + won,
        tested_cost=jnp.where(tested, state.cost, state.tested_cost),
        budget=adapt.spend(state.budget, last, tested, promoted),
    )
    return state, Trial(tested, promoted, asked.wins, asked.losses, alpha, asked.p_value, ruling, proven & asked.kept)


def stuck(state: State) -> jax.Array:
    """Whether the student gets nowhere any more at its size."""
    return state.progress.stuck if isinstance(state.progress, Progress) else jnp.bool_(False)


def on_seen(apply: Apply, variables: Variables, pools: Pools, promise: Objective, *, config: EV3) -> jax.Array:
    """A student's promise scores on some of what explore holds, [N']."""
    if pools.seen is None:
        raise TypeError("a run whose patience ends needs some of explore in pools.seen; got none")
    logits = assess.logits_of(apply, variables, pools.seen.inputs, batch_size=config.eval_batch_size)
    return promise(logits, pools.seen)


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Of two trees alike, by a scalar bool."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class _Asked(NamedTuple):
    """What decide says of a candidate."""

    candidate: jax.Array  # [N] promise scores
    standing: Standing | tuple[()]
    wins: jax.Array
    losses: jax.Array
    p_value: jax.Array
    kept: jax.Array


def _roughly(gain: jax.Array, se: jax.Array) -> jax.Array:
    """A normal p-value: it predicts, and proves nothing."""
    return jnp.where(gain > 0, jax.scipy.stats.norm.sf(gain / jnp.maximum(se, 1e-12)), 1.0)


def met(
    state: State,
    pools: Pools,
    risks: jax.Array,
    *,
    closing: jax.Array,
    apply: Apply,
    goals: Sequence[Goal],
    level: float,
    config: EV3,
) -> State:
    """Asks decide whether all goals are met, where assess says so and the run's cost has grown by a tenth since.

    In the closing iteration it is asked where assess does not say the contrary.
    """

    def ask() -> jax.Array:
        logits = assess.logits_of(apply, state.current, pools.decide.inputs, batch_size=config.eval_batch_size)
        return jnp.stack([goal.refuted(logits, pools.decide) <= level for goal in goals]).all()

    likely = (risks.min() >= prioritise.AT_RISK) & (state.cost > 1.1 * state.met_cost)
    due = (likely | (closing & (risks.min() >= 0))) & ~state.met & (state.met_cost < adapt.NO_END)
    met = jax.lax.cond(due, ask, lambda: jnp.bool_(False))
    return state._replace(met=state.met | met, met_cost=jnp.where(due, state.cost, state.met_cost))
