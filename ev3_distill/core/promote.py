"""Promotion: tests the current student against the champion on the `decide` split, and whether all goals are met there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.core import adapt, prioritise
from ev3_distill.core.algorithm import Algorithm
from ev3_distill.core.assess import outputs_of
from ev3_distill.core.paired_tests import paired, suitable_test
from ev3_distill.core.plateau import NO_END, stuck
from ev3_distill.types import Champion, GoalScores, Objectives, Pools, PromotionTest, PyTree, State, Variables

GOALS_SPACING = 1.1  # factor by which the run's cost must grow between two tests whether all goals are met


def promote(state: State, pools: Pools, algorithm: Algorithm, *, closing: jax.Array) -> tuple[State, PromotionTest]:
    """Tests the current student against the champion on decide if a test is worthwhile; see core/adapt.py.

    The test is about the goal that the champion misses by most on assess; if it misses none, about the promise. A
    candidate that would break a goal that the champion meets on decide is blocked; for the error budget, that is a
    failed test. After a run was ended because decide proved all goals, no promotion is tested: that use of decide has
    no error budget beside it.
    """
    objectives, thresholds = algorithm.objectives, algorithm.objectives.thresholds
    last = closing & ~stuck(state)  # a stuck student may grow and be tested again
    alpha = adapt.level(state.budget, last)
    ruling = prioritise.ruling_of(prioritise.risks_of(state.champion.evidence, thresholds), at_risk=0.0)
    due = adapt.due(state.clock.cost, state.clock.tested_cost, closing) & ~state.met

    def predict() -> jax.Array:
        return adapt.worth_testing(_predicted_p_value(state, pools, objectives, ruling), alpha, closing)

    def compare() -> _Comparison:
        outputs = outputs_of(
            algorithm.apply, state.current.variables, pools.decide.inputs, batch_size=algorithm.config.eval_batch_size
        )
        return _compare(state, pools, objectives, outputs, ruling)

    def skip() -> _Comparison:
        none, champion = jnp.int32(0), state.champion
        return _Comparison(champion.decide, champion.goals, none, none, jnp.float32(1), jnp.bool_(False))

    tested = jax.lax.cond(due, predict, lambda: jnp.bool_(False))
    result = jax.lax.cond(tested, compare, skip)
    proven = tested & (result.p_value <= alpha)
    promoted = proven & ~result.breaks
    won = (jnp.arange(state.arms.promotions.shape[0]) == state.current.arm) & promoted
    candidate = Champion(state.current.variables, state.current.evidence, result.decide, result.goals)
    state = state._replace(
        champion=where(promoted, candidate, state.champion),
        arms=state.arms._replace(promotions=state.arms.promotions + won),
        clock=state.clock._replace(tested_cost=jnp.where(tested, state.clock.cost, state.clock.tested_cost)),
        budget=adapt.spend(state.budget, last, tested, promoted),
    )
    unit = pools.decide.unit
    n = jnp.int32(pools.decide.index.shape[0]) if isinstance(unit, tuple) else unit.max() + 1
    return state, PromotionTest(
        tested, ruling, result.wins, result.losses, n, alpha, result.p_value, promoted, proven & result.breaks
    )


class _Comparison(NamedTuple):
    """The scores of a candidate on decide, and the result of its test."""

    decide: jax.Array  # [N] promise scores
    goals: GoalScores | tuple[()]
    wins: jax.Array
    losses: jax.Array
    p_value: jax.Array
    breaks: jax.Array  # whether it breaks a goal that the champion meets


def _compare(state: State, pools: Pools, objectives: Objectives, outputs: PyTree, ruling: jax.Array) -> _Comparison:
    """Tests the candidate with these outputs on decide."""
    candidate = objectives.promise.score(outputs, pools.decide)
    unit = pools.decide.unit
    tests = [suitable_test(binary=objectives.promise.binary, unit=unit)(candidate, state.champion.decide)]
    champion = state.champion.goals
    against = objectives.goal_scores(outputs, pools.decide, state.champion.evidence)
    if not (isinstance(champion, GoalScores) and isinstance(against, GoalScores)):
        wins, losses, p_value = tests[0]
        return _Comparison(candidate, (), wins, losses, p_value, jnp.bool_(False))
    for goal, ours, theirs in zip(objectives.goals, against.comparison, champion.comparison, strict=True):
        tests.append(suitable_test(binary=goal.binary, unit=unit)(ours, theirs))
    wins, losses, p_value = [jnp.stack(column)[ruling + 1] for column in zip(*tests, strict=True)]
    thresholds = objectives.thresholds
    breaks = ((champion.metric >= thresholds) & ~(against.metric >= thresholds)).any()
    own = objectives.goal_scores(outputs, pools.decide, state.current.evidence)
    return _Comparison(candidate, own, wins, losses, p_value, breaks)


def _predicted_p_value(state: State, pools: Pools, objectives: Objectives, ruling: jax.Array) -> jax.Array:
    """The p-value of the test on assess: it predicts the result on decide, and proves nothing."""
    test = suitable_test(binary=objectives.promise.binary, unit=pools.assess.unit)
    candidate, champion = state.current.evidence, state.champion.evidence
    if not objectives.goals:
        return test(candidate.promise, champion.promise)[2]
    gain, se = paired(*(prioritise.ruled(x, ruling).promise for x in (candidate, champion)))
    normal = jnp.where(gain > 0, jax.scipy.stats.norm.sf(gain / jnp.maximum(se, 1e-12)), 1.0)
    return jnp.where(ruling >= 0, normal, test(candidate.promise, champion.promise)[2])


def seen_scores(algorithm: Algorithm, variables: Variables, pools: Pools) -> jax.Array:
    """A student's promise scores on a part of explore, [N']."""
    if pools.seen is None:
        raise TypeError(
            "a run with a patience needs a part of explore in pools.seen; got None: pass Pools(..., seen=...)"
        )
    size = algorithm.config.eval_batch_size
    outputs = outputs_of(algorithm.apply, variables, pools.seen.inputs, batch_size=size)
    return algorithm.objectives.promise.score(outputs, pools.seen)


def check_goals(state: State, pools: Pools, algorithm: Algorithm, risks: jax.Array, *, closing: jax.Array) -> State:
    """Tests on decide whether all goals are met, if assess says so and the run's cost has grown by a tenth since the last test.

    In the closing iteration the test is made unless assess contradicts.
    """
    goals, level = algorithm.objectives.goals, algorithm.stop_level
    if level is None or not goals:
        return state

    def test() -> jax.Array:
        outputs = outputs_of(
            algorithm.apply, state.current.variables, pools.decide.inputs, batch_size=algorithm.config.eval_batch_size
        )
        evidence = pools.decide.one_per_unit(outputs)
        return jnp.stack([goal.p_value(*evidence) <= level for goal in goals]).all()

    clock = state.clock
    likely = (risks.min() >= prioritise.AT_RISK) & (clock.cost > GOALS_SPACING * clock.met_cost)
    due = (likely | (closing & (risks.min() >= 0))) & ~state.met & (clock.met_cost < NO_END)
    met = jax.lax.cond(due, test, lambda: jnp.bool_(False))
    return state._replace(
        met=state.met | met, clock=clock._replace(met_cost=jnp.where(due, clock.cost, clock.met_cost))
    )


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Selects between two trees of one structure by a scalar bool."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
