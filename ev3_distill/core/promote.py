"""Promotion: tests the current student against the champion on the `decide` split, and whether all goals are met there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.core import adapt, prioritise
from ev3_distill.core.algorithm import Algorithm
from ev3_distill.core.assess import outputs_of
from ev3_distill.core.paired_tests import least_mean, paired, suitable_test
from ev3_distill.core.plateau import NO_END, stuck
from ev3_distill.types import (
    Champion,
    Evidence,
    GoalEvidence,
    GoalScores,
    Objectives,
    Pools,
    PromotionTest,
    PyTree,
    State,
    Variables,
)

GOALS_SPACING = 1.1  # factor by which the run's cost must grow between two tests whether all goals are met


def promote(state: State, pools: Pools, algorithm: Algorithm, *, closing: jax.Array) -> tuple[State, PromotionTest]:
    """Tests the current student against the champion on decide if a test is worthwhile; see core/adapt.py.

    The test is about the goal that the champion misses by most on assess; if it misses none, about the promise. What it
    proves is the goal's `hypothesis`. A proven candidate is blocked if it would break a goal that the champion meets on
    decide, or if the tested goal's own metric is lower on decide than the champion's. For the error budget, that is a
    failed test. After a run was ended because decide proved all goals, no promotion is tested, nor in the final phase, in
    which students learn from decide.
    """
    objectives, thresholds = algorithm.objectives, algorithm.objectives.thresholds
    last = closing & ~stuck(state) & (not algorithm.continues)  # a stuck student may grow and be tested again
    any_gain = closing & (not algorithm.continues)
    alpha = adapt.level(state.budget, last)
    ruling = prioritise.ruling_of(prioritise.risks_of(state.champion.evidence, thresholds), at_risk=0.0)
    due = adapt.due(state.clock.cost, state.clock.tested_cost, closing) & ~state.met & ~state.final

    def predict() -> jax.Array:
        return adapt.worth_testing(_predicted_p_value(state, pools, objectives, ruling), alpha, any_gain)

    def compare() -> _Comparison:
        outputs = outputs_of(
            algorithm.apply, state.current.variables, pools.decide.inputs, batch_size=algorithm.config.eval_batch_size
        )
        return _compare(state, pools, objectives, outputs, ruling)

    def skip() -> _Comparison:
        none, never, champion = jnp.int32(0), jnp.bool_(False), state.champion
        return _Comparison(
            champion.decide, champion.goals, _Test(none, none, none, jnp.float32(1), never), never, never
        )

    tested = jax.lax.cond(due, predict, lambda: jnp.bool_(False))
    result, focus = jax.lax.cond(tested, compare, skip), _foci(state.champion.evidence)[jnp.maximum(ruling, 0)]
    proven = tested & (alpha > 0) & (result.outcome.p_value <= alpha)  # a p-value may underflow to 0
    promoted = proven & ~result.breaks & ~result.lowers
    won = (jnp.arange(state.arms.promotions.shape[0]) == state.current.arm) & promoted
    candidate = Champion(state.current.variables, state.current.evidence, result.decide, result.goals)
    state = state._replace(
        champion=where(promoted, candidate, state.champion),
        arms=state.arms._replace(promotions=state.arms.promotions + won),
        clock=state.clock._replace(tested_cost=jnp.where(tested, state.clock.cost, state.clock.tested_cost)),
        budget=adapt.spend(state.budget, last, tested, promoted),
    )
    return state, PromotionTest(
        tested=tested,
        goal=ruling,
        focus=focus,
        wins=result.outcome.wins,
        losses=result.outcome.losses,
        n=result.outcome.n,
        counts=result.outcome.counts,
        alpha=alpha,
        p_value=result.outcome.p_value,
        promoted=promoted,
        breaks=proven & result.breaks,
        lowers=proven & result.lowers,
    )


class _Test(NamedTuple):
    """The result of a test, scalars."""

    wins: jax.Array
    losses: jax.Array
    n: jax.Array
    p_value: jax.Array
    counts: jax.Array


class _Comparison(NamedTuple):
    """The scores of a candidate on decide, and the result of its test."""

    decide: jax.Array  # [N] promise scores
    goals: GoalScores | tuple[()]
    outcome: _Test
    breaks: jax.Array  # whether it breaks a goal that the champion meets
    lowers: jax.Array  # whether the metric of the ruling goal is lower than the champion's


def _compare(state: State, pools: Pools, objectives: Objectives, outputs: PyTree, ruling: jax.Array) -> _Comparison:
    """Tests the candidate with these outputs on decide."""
    candidate = objectives.promise.score(outputs, pools.decide)
    unit, never = pools.decide.unit, jnp.bool_(False)
    n = jnp.int32(pools.decide.index.shape[0]) if isinstance(unit, tuple) else unit.max() + 1

    def pairs(ours: jax.Array, theirs: jax.Array, *, binary: bool) -> _Test:
        wins, losses, p_value = suitable_test(binary=binary, unit=unit, lone=pools.decide.lone)(ours, theirs)
        return _Test(wins, losses, n, p_value, jnp.bool_(binary and isinstance(unit, tuple)))

    tests = [pairs(candidate, state.champion.decide, binary=objectives.promise.binary)]
    champion, reference = state.champion.goals, state.champion.evidence
    against = objectives.goal_scores(outputs, pools.decide, reference)
    if not (isinstance(champion, GoalScores) and isinstance(against, GoalScores)):
        return _Comparison(candidate, (), tests[0], never, never)
    foci = _foci(reference)
    for g, goal in enumerate(objectives.goals):
        ours, theirs = against.comparison[g], champion.comparison[g]
        if goal.strata is None:
            tests.append(pairs(ours, theirs, binary=goal.binary))
        else:
            (ours, theirs, kept), split = pools.decide.one_per_unit((ours, theirs, outputs))
            strata, number = goal.strata(kept, split)
            tests.append(_Test(*least_mean(ours, theirs, strata, number=number, focus=foci[g]), jnp.bool_(True)))
    test = jax.tree.map(lambda *column: jnp.stack(column)[ruling + 1], *tests)
    thresholds, row = objectives.thresholds, jnp.maximum(ruling, 0)
    breaks = ((champion.metric >= thresholds) & ~(against.metric >= thresholds)).any()
    lowers = (ruling >= 0) & ((against.metric < champion.metric) | jnp.isnan(against.metric))[row]
    own = objectives.goal_scores(outputs, pools.decide, state.current.evidence)
    return _Comparison(candidate, own, test, breaks, lowers)


def _foci(evidence: Evidence) -> jax.Array:
    """The class or group that each goal is about for a student, on assess, [G]; [1] without goals."""
    return evidence.goals.focus if isinstance(evidence.goals, GoalEvidence) else jnp.zeros(1, jnp.int32)


def _predicted_p_value(state: State, pools: Pools, objectives: Objectives, ruling: jax.Array) -> jax.Array:
    """The p-value of the test on assess: it predicts the result on decide, and proves nothing."""
    test = suitable_test(binary=objectives.promise.binary, unit=pools.assess.unit, lone=pools.assess.lone)
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

    In the closing iteration the test is made unless assess contradicts. A run that ends here needs no error budget for
    this answer; a run that continues pays for it.
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

    clock, budget = state.clock, state.budget
    likely = (risks.min() >= prioritise.AT_RISK) & (clock.cost > GOALS_SPACING * clock.met_cost)
    due = (likely | (closing & (risks.min() >= 0))) & ~state.met & (clock.met_cost < NO_END)
    met = jax.lax.cond(due, test, lambda: jnp.bool_(False))
    if algorithm.continues:
        budget = adapt.pay_for_answer(budget, due, met)
    return state._replace(
        met=state.met | met, clock=clock._replace(met_cost=jnp.where(due, clock.cost, clock.met_cost)), budget=budget
    )


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Selects between two trees of one structure by a scalar bool.

    A conditional copies arrays, where a select needs a kernel for each of them, which takes XLA:CPU 15 ms to compile.
    """
    return jax.lax.cond(condition, lambda: new, lambda: old)
