"""Behavior that pins each steering constant: a test fails if its constant changes by a factor of two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allocations import arms_of, clock_of
from random_walks import (
    CONFIG,
    OBJECTIVES,
    POOLS,
    WALKERS,
    apply_threshold,
    compiled,
    replace_fields,
    sample,
    threshold,
)

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, adapt, allocate, initial_state, make_step, paired_tests, prioritise, promote
from ev3_distill.tasks.classification.steering import goal
from ev3_distill.types import Evidence, GoalEvidence


def scores(mean, se, n=100):
    """Scores [n] with the given mean and standard error."""
    spread = np.tile([1.0, -1.0], n // 2) * se * (n - 1) ** 0.5
    return np.float32(mean + spread)


def test_promotion_test_spends_four_fifths_of_the_error_budget():
    budget = adapt.initial_budget(0.05)
    assert float(adapt.level(budget, jnp.bool_(False))) == pytest.approx(0.04)
    promoted, failed = (adapt.spend(budget, jnp.bool_(False), jnp.bool_(True), jnp.bool_(x)) for x in (True, False))
    assert (float(promoted.left), float(failed.left)) == pytest.approx((0.04, 0.01))


def test_cost_grows_by_half_between_promotion_tests():
    due = [bool(adapt.due(jnp.int32(cost), jnp.int32(100), jnp.bool_(False))) for cost in (149, 151)]
    assert due == [False, True]


def test_p_value_of_betting_agrees_with_precomputed_values():
    """For n differences of 1, the p-value is 1 / mean over the nine bets b of (1 + b)^n, precomputed for n = 20 and 6."""
    for n, p_value in ((20, 1.41644e-05), (6, 0.11535)):
        assert float(paired_tests.betting(jnp.ones(n), jnp.zeros(n))[2]) == pytest.approx(p_value, rel=1e-3)


@pytest.mark.parametrize(("risk", "ruling"), [(2.5, 0), (3.5, prioritise.PROMISE)])
def test_goal_within_three_standard_errors_rules(risk, ruling):
    assert int(prioritise.ruling_of(jnp.array([risk, 9.0]))) == ruling


@pytest.mark.parametrize(("standard_errors_below", "breaks"), [(0.75, False), (1.5, True)])
def test_proposal_may_lie_one_standard_error_below_a_goal(standard_errors_below, breaks):
    def evidence(score):
        return Evidence(score, score, GoalEvidence(score[..., None, :], score[..., None, :], jnp.zeros(1, jnp.int32)))

    current, proposal = (
        evidence(np.full(100, 0.5, np.float32)),
        evidence(scores(0.5 - standard_errors_below * 0.01, 0.01)[None]),
    )
    assert bool(prioritise.breaks(proposal, current, jnp.array([0.5]))[0]) == breaks


def test_resting_arm_returns_to_level_by_15_percent_an_iteration():
    value = allocate.next_values(jnp.array([0.0, -4.0]), jnp.array([True, False]), jnp.zeros(2))
    np.testing.assert_allclose(value, [0, -3.4], rtol=1e-6)


def test_value_falls_by_one_standard_error_when_the_arm_is_asked():
    arms = arms_of(value=(-2.0, -4.0, -9.5), lag=(-3.0, -3.0, -3.0))
    np.testing.assert_allclose(allocate.with_asked(arms, jnp.int32(1)).value, [-2, -5, -9.5])
    np.testing.assert_allclose(allocate.with_asked(arms, jnp.int32(2)).value, [-2, -4, -10])


@pytest.mark.parametrize(("stale", "asks"), [(1, False), (2, False), (3, True), (4, False), (5, False), (6, True)])
def test_another_arm_is_asked_after_every_third_iteration_without_a_move(stale, asks):
    arms = arms_of(value=(0.0, 0.0))
    assert int(allocate.to_ask(arms, clock_of(stale=stale), jnp.bool_(False))) == (1 if asks else -1)


@pytest.mark.parametrize(
    ("raced", "budget", "racing"),
    [(199, 10_000, True), (200, 10_000, False), (99, 1000, True), (100, 1000, False)],
    ids=["a step too early", "a fiftieth of the budget", "a step too early if short", "two initial trajectories"],
)
def test_arm_leaves_the_race_after_a_fiftieth_of_the_budget(raced, budget, racing):
    arms = arms_of(value=(0.0, 0.0, 0.0), racing=(True,) * 3, raced=raced)
    behind, broken = jnp.array([0.0, 0.0, -9.0]), jnp.zeros(3, bool)
    config = EV3(length=50)
    after = allocate.race_on(arms, behind, broken, jnp.float32(1000), budget=jnp.int32(budget), config=config)
    assert after.racing.tolist() == [True, True, racing]


def test_trajectory_is_a_fiftieth_of_the_budget_and_at_most_a_fifth_of_the_cost():
    config = EV3(length=10, max_length=1000)

    def length(budget, cost):
        left = jnp.float32(0)
        return float(allocate.next_length(jnp.bool_(False), left, jnp.int32(budget), jnp.int32(cost), config=config))

    assert (length(5000, 5000), length(10_000, 5000)) == (100, 200)
    assert (length(10**6, 200), length(10**6, 400)) == (40, 80)


@pytest.mark.parametrize(("lag", "anew"), [(-1.9, False), (-2.1, True)])
def test_leader_two_standard_errors_below_the_current_student_starts_the_final_phase_anew(lag, anew):
    start, step = compiled(1, has_final=True)
    initial = start(threshold(8), POOLS)
    (walk,) = initial.arms.states
    arms = {"lag": jnp.array([lag]), "states": (walk._replace(age=jnp.int32(5)),)}
    after, _ = step(POOLS, replace_fields(initial, clock={"cost": jnp.int32(80)}, arms=arms), np.int32(100))
    assert bool(after.final) and int(after.arms.states[0].age) == (0 if anew else 5)


def test_patience_lasts_at_least_five_initial_trajectories():
    """With trajectories of 2 steps and a patience of 2, a student without gains is stuck after more than 2 x 5 x 2 steps."""
    config = dataclasses.replace(CONFIG, patience=2.0)
    algorithm = Algorithm(apply_threshold, WALKERS[:1], sample, OBJECTIVES, config)
    pools = POOLS._replace(seen=POOLS.assess)
    state = initial_state(jax.random.key_data(jax.random.key(0)), threshold(8), pools, algorithm)
    step, first_stuck = make_step(algorithm), None
    while first_stuck is None:
        state, decision = step(pools, state, np.int32(10**6))
        first_stuck = int(decision.position) if decision.stuck else None
    assert first_stuck == 22


@pytest.mark.parametrize(("cost", "tested"), [(105, False), (115, True)])
def test_cost_grows_by_a_tenth_between_tests_of_all_goals(cost, tested):
    objectives = OBJECTIVES._replace(goals=(goal("accuracy", 0.1),))
    algorithm = Algorithm(apply_threshold, WALKERS[:1], sample, objectives, CONFIG, stop_level=0.05)
    state = initial_state(jax.random.key_data(jax.random.key(0)), threshold(60), POOLS, algorithm)
    state = state._replace(clock=state.clock._replace(cost=jnp.int32(cost), met_cost=jnp.int32(100)))
    after = promote.check_goals(state, POOLS, algorithm, jnp.array([9.0]), closing=jnp.bool_(False))
    assert bool(after.met) == tested
