"""A run of several arms: lineages that do not influence one another, the race, and arms that are asked if nothing moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_walks import (
    CONFIG,
    NAN_STATE,
    NAN_STUDENT,
    OBJECTIVES,
    POOLS,
    RUN_KEY,
    SOUND,
    WALKERS,
    B,
    N,
    apply_threshold,
    assert_same,
    begin,
    compiled,
    finite,
    make_split,
    replace_fields,
    rows,
    sample,
    steps_from,
    t_of,
    threshold,
    whole_run,
)

from ev3_distill.core import Algorithm, initial_state, make_step
from ev3_distill.tasks.classification.steering import goal
from ev3_distill.types import ADOPT, KEEP, PROMOTE, ROLL_BACK, Pools

# Lineages.


def noisy_pools(seed=0):
    """Labels of which a tenth is 1: the best threshold is about 60, but small differences are noise."""
    rng = np.random.default_rng(seed)
    return Pools(*(make_split(rng.uniform(0, 60, N), rng.random(N) < 0.1) for _ in range(3)))


def test_arm_trains_as_if_it_were_alone_until_it_leaves_the_race():
    """Each of four arms has the state of a run with this arm alone, bit for bit, for as long as it races."""
    speeds, budget = (0.25, 3, -1, 0.5), 50
    states, decisions = steps_from(begin(speeds), [budget - 4 * i for i in range(4)])
    assert [d.steps.tolist() for d in decisions] == [[1] * 4] * 4
    assert {int(d.verdict) for d in decisions} == {ADOPT, PROMOTE}
    config = dataclasses.replace(CONFIG, length=1)
    for i in range(4):
        step = make_step(algorithm := Algorithm(apply_threshold, WALKERS[i : i + 1], sample, OBJECTIVES, config))
        state = initial_state(jax.random.key_data(RUN_KEY), threshold(8, speeds), POOLS, algorithm)
        for together in states:
            state, _ = step(POOLS, state, np.int32(budget))
            assert_same(state.arms.states[0], together.arms.states[i])


def lineages_of(seed, speeds, budget, **options):
    """A run on noisy labels; checks that each arm's state follows from its own log and the restarts alone."""
    pools = noisy_pools(seed)
    before = begin(speeds, pools)
    first, last = before, None
    for state, decision in zip(*whole_run(before, budget, pools, **options), strict=True):
        for i, steps in enumerate(decision.steps):
            old, new = before.arms.states[i], state.arms.states[i]
            restarted = int(decision.verdict) == ROLL_BACK or int(state.arms.asked) == i
            if restarted:
                assert_same(new, WALKERS[i].init(state.current.variables))
                continue
            assert int(new.age) == int(old.age) + steps
            assert float(new.student.params["t"]) == float(old.student.params["t"]) + speeds[i] * steps
            start = int(before.clock.position)
            used = range(start, start + int(steps))
            np.testing.assert_array_equal(
                new.log[start : start + int(steps)], np.array([rows(j) for j in used]).reshape(-1, B)
            )
            np.testing.assert_array_equal(new.log[:start], old.log[:start])
            if not steps:
                assert_same(new, old)  # an arm that rests keeps its state
        before, last = state, state
    return first, last


@pytest.mark.parametrize("seed", range(3))
def test_arms_keep_their_trajectories_through_adoptions_rejections_and_rests(seed):
    _, last = lineages_of(seed, (2, -0.5, 0.25, 0.75), 100)
    ages = [int(arm_state.age) for arm_state in last.arms.states]
    assert max(ages) > 10  # a long trajectory through many decisions


def test_leader_of_the_race_continues_without_a_gap():
    """The log of the leader's batches has every global step of the run, none twice."""
    states, decisions = whole_run(begin((0.25, 1, 0.5, 0)), 60)
    last = states[-1]
    leader, position = int(last.arms.leader), int(last.clock.position)
    assert leader == 1 and all(int(d.asked) == -1 for d in decisions)
    assert (int(last.arms.states[leader].age), int(last.arms.cost[leader])) == (position, position)
    np.testing.assert_array_equal(last.arms.states[leader].log[:position], [rows(i) for i in range(position)])


# The race.


def test_arm_clearly_behind_leaves_the_race():
    """After n iterations of two steps, arm 1 has 13 n more right than arm 3: 5 standard errors from 20 of 64 on."""
    states, decisions = steps_from(begin((6, 6.5, 6, 0), t=0), [100, 92, 84, 76])
    assert [d.racing.tolist() for d in decisions[:2]] == [[True] * 4, [True, True, True, False]]
    gap = -2 * 13 / N
    assert decisions[1].behind.tolist() == pytest.approx([-2 / N, 0, -2 / N, gap])
    se = (26 / N * (1 - 26 / N)) ** 0.5 / (N - 1) ** 0.5
    assert decisions[1].behind_se[3] == pytest.approx(se, rel=1e-5)
    assert -gap / se > CONFIG.drop > (13 / N) / (((13 / N) * (1 - 13 / N)) ** 0.5 / (N - 1) ** 0.5)
    assert decisions[2].steps.tolist() == [2, 2, 2, 0]
    assert np.isnan(decisions[2].behind[3])
    assert int(states[-1].arms.leader) == 1


@pytest.mark.parametrize("budget", [*range(1, 52), 99, 1000])
@pytest.mark.parametrize("speeds", [(1,), (0.5, 1, 0, -0.25)], ids=["one arm", "four arms"])
def test_run_of_any_budget_is_spent_and_its_race_keeps_its_bounds(speeds, budget):
    states, decisions = whole_run(begin(speeds), budget)
    last, count = states[-1], len(speeds)
    assert int(last.clock.cost) == budget == int(last.arms.cost.sum())
    assert int(decisions[-1].steps.sum()) == 0
    raced, part = int(last.arms.raced), min(CONFIG.race, 0.5 / count)
    race = [d.steps for d in decisions if (d.steps > 0).sum() > 1 and int(d.asked) < 0]
    enter = 4 if part * budget >= 4 else 2  # two of the shortest trajectories of two steps
    most = int(part * budget + 1e-6) if count > 1 else 0
    assert raced == most if budget < 100 else 20 <= raced < most or count == 1  # some are clearly behind only later
    if count > 1 and raced:
        assert sum(steps.sum() for steps in race) <= budget / 2
        assert (sum(race)[:enter] >= 0.02 * budget).all()  # each arm, whichever of them learns from labels alone
        assert (sum(race)[enter:] == 0).all()
    np.testing.assert_array_equal(last.arms.racing, np.arange(count) == int(last.arms.leader))
    # After a short race, arm 1 is not clearly ahead of arm 0.
    assert int(last.arms.leader) == (np.argmax(speeds) if enter == 4 else 0)


def test_short_race_is_between_the_first_two_and_the_others_are_asked_later():
    """8 % of 48 steps are 3 for each arm, fewer than two trajectories of two steps. Arms 2 and 3 would win the race."""
    states, decisions = steps_from(begin((0.25, 0.5, 4, 4)), [48, 46, 44, 42])
    assert [d.steps.tolist() for d in decisions] == [[1, 1, 0, 0]] * 3 + [[2, 0, 0, 0]]
    assert [d.racing.tolist() for d in decisions[1:]] == [[True, True, False, False]] + [
        [True, False, False, False]
    ] * 2  # arm 1 is ahead, but not clearly
    states, decisions = whole_run(begin((0, 0, 4, 0)), 48)
    assert {int(d.asked) for d in decisions} >= {1, 2} and int(states[-1].arms.leader) == 2


def test_race_without_steps_is_over_at_once():
    """With `race` 0, the first arm that races leads from the start."""
    config = dataclasses.replace(CONFIG, race=0.0)
    state = begin((1, 3, 0, 0), config=config)
    np.testing.assert_array_equal(state.arms.racing, [True, False, False, False])
    _, decisions = steps_from(state, [100], config=config)
    assert decisions[0].steps.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("limits", [[10**6, 100], [10**6, 20], [10**6, 20, 10**6]], ids=str)
def test_race_ends_for_good_if_the_budget_shrinks(limits):
    """A wall time says only later how many steps it allows. After a race, others train only if they are asked."""
    state, limits = begin((1, 0.5, 0, 0)), iter([*limits, *[limits[-1]] * 100])
    over = False
    for _ in range(60):
        before, limit = state, next(limits)
        (state,), (d,) = steps_from(before, [limit - int(before.clock.cost)])
        part = min(CONFIG.race, 0.125) * limit
        racing = bool(before.arms.racing.sum() > 1) and int(before.arms.raced) < int(part)
        assert not (over and racing)
        over |= int(state.arms.racing.sum()) == 1
        if racing:
            assert (d.steps > 0).sum() == before.arms.racing.sum()
        else:
            assert over
            trained = {0, int(d.asked)} - {-1} if int(before.clock.cost) < limit else set()
            assert set(np.flatnonzero(d.steps).tolist()) == trained
        if bool(state.closed):
            break
    assert over


def test_arm_too_short_for_a_step_rests_and_does_not_leave():
    """A quarter of a trajectory of two steps is no step: nothing shows that this arm is behind."""
    arms = WALKERS[0], WALKERS[1]._replace(length=0.25)
    step = make_step(algorithm := Algorithm(apply_threshold, arms, sample, OBJECTIVES, CONFIG))
    state = initial_state(jax.random.key_data(RUN_KEY), threshold(8, (1, 1)), POOLS, algorithm)
    for i in range(8):
        state, decision = step(POOLS, state, np.int32(200))
        assert (decision.steps.tolist(), int(state.arms.raced)) == ([2, 0], 2 * (i + 1))
        assert state.arms.racing.tolist() == [True, i < 7]  # 8 % of 200 steps


# Broken arms in a race.


@pytest.mark.parametrize("broken", [0, 1, 3])
@pytest.mark.parametrize("how", [NAN_STUDENT, NAN_STATE])
def test_broken_arm_leaves_the_race_and_harms_no_other(broken, how):
    """It is as far behind as can be; also if it led at the start. The others go on as without it."""
    health = [how if i == broken else SOUND for i in range(4)]
    (states, decisions), (without, _) = (
        whole_run(begin((0.5, 1, 1.5, 1), health=of), 100) for of in (health, [SOUND] * 4)
    )
    assert finite(states[-1])
    first = decisions[0]
    assert first.racing.tolist() == [i != broken for i in range(4)] and first.discarded == 1
    assert int(states[0].arms.leader) == 2 == int(states[-1].arms.leader)
    for i in set(range(4)) - {broken}:
        of_arm = [s.arms.states[i]._replace(student=s.arms.states[i].student.params) for s in (states[3], without[3])]
        assert_same(*of_arm)
    assert_same(states[0].arms.states[broken], WALKERS[broken].init(states[0].current.variables))
    assert t_of(states[-1]) >= t_of(without[-1])


def test_iteration_without_a_finite_proposal_drops_no_arm():
    """All arms are broken for the first two iterations, and then sound."""
    state = begin((0.5, 1, 0, 0.25), health=[NAN_STUDENT] * 4)
    (first, second), _ = steps_from(state, [100, 96])
    assert first.arms.racing.all() and second.arms.racing.all()
    stats = {"speed": jnp.float32((0.5, 1, 0, 0.25)), "health": jnp.full(4, SOUND, jnp.int32)}
    healthy = second.current.variables._replace(stats=stats)
    second = replace_fields(
        second, current={"variables": healthy}, arms={"states": tuple(arm.init(healthy) for arm in WALKERS)}
    )
    states, decisions = whole_run(second, 100)
    assert (decisions[0].steps > 0).all()
    assert int(states[-1].arms.leader) == 1 and int(states[-1].clock.cost) == 100


def test_run_whose_arms_are_all_broken_ends_where_it_began():
    start = begin((9, 9, 9, 9), health=[NAN_STUDENT] * 4)
    states, decisions = whole_run(start, 100)
    assert {int(d.verdict) for d in decisions} == {KEEP}
    assert_same(states[-1].current, start.current)
    assert int(states[-1].clock.cost) == 100 and finite(states[-1])
    assert {int(d.asked) for d in decisions} == {-1, 1, 2, 3}


# Arms that are asked.


def after_race(speeds, t=8, **fields):
    """A state of a run whose race is over, led by arm 0."""
    state = begin(speeds, t=t)
    alone = jnp.arange(len(speeds)) == 0
    return replace_fields(state, arms={"racing": alone, **fields})


LONG = 10**4


def test_another_arm_trains_after_three_iterations_without_a_move():
    states, decisions = steps_from(after_race((0, 0, 0, 0)), [LONG] * 10)
    assert [int(d.asked) for d in decisions] == [-1, -1, -1, 1, -1, -1, 2, -1, -1, 3]
    for d in decisions:
        np.testing.assert_array_equal(d.steps > 0, [i in (0, int(d.asked)) for i in range(4)])
    assert [int(state.arms.asked) for state in states[2::3]] == [1, 2, 3]


def test_asked_arm_starts_from_the_current_student_and_leads_if_it_moves():
    speeds = (-1, 0, 0.25, 2)  # training by the leader harms
    start = after_race(speeds, t=30, value=jnp.float32([0, -3, -2, -1]), lag=jnp.full(4, -4.0))
    states, decisions = steps_from(start, [LONG] * 5)
    assert [int(d.verdict) for d in decisions[:3]] == [KEEP] * 3
    asking, asked, later = states[2], states[3], states[4]
    assert int(asking.arms.asked) == 3
    assert_same(asking.arms.states[3], WALKERS[3].init(start.current.variables))
    assert float(asking.arms.lag[3]) == 0
    for i in (0, 1, 2):
        assert int(asking.arms.states[i].age) == 6 * (i == 0)  # the others do not start anew
    assert decisions[3].steps.tolist() == [2, 0, 0, 2]
    assert (int(asked.arms.leader), int(asked.current.arm), t_of(asked)) == (3, 3, 34)
    assert int(asked.arms.asked) == -1 and int(asked.clock.stale) == 0
    assert decisions[4].steps.tolist() == [0, 0, 0, 2]  # it trains on alone
    assert t_of(later) == 38 and int(later.arms.states[3].age) == 4


def test_arm_that_is_asked_in_vain_does_not_lead():
    start = after_race((0, -1, 0, 0), t=30, value=jnp.float32([0, 0, -5, -5]))
    states, decisions = steps_from(start, [LONG] * 5)
    assert decisions[3].steps.tolist() == [2, 2, 0, 0] and int(decisions[3].verdict) == KEEP
    assert int(states[3].arms.leader) == 0 and int(states[3].arms.states[0].age) == 8
    assert decisions[4].steps.tolist() == [2, 0, 0, 0]


@functools.cache
def run_of(count, pressing, races=True):
    """A run of arms that never move, with a goal out of reach if it is pressing."""
    objectives = OBJECTIVES._replace(goals=(goal("accuracy", 0.9),) if pressing else ())
    arms = [WALKERS[0], *(arm._replace(races=races) for arm in WALKERS[1:count])]
    algorithm = Algorithm(apply_threshold, arms, sample, objectives, CONFIG)
    state = initial_state(jax.random.key_data(RUN_KEY), threshold(8, (0,) * count), POOLS, algorithm)
    return state, make_step(algorithm)


@pytest.mark.parametrize("races", [True, False], ids=["all race", "one races"])
@pytest.mark.parametrize("pressing", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_four_iterations_pass_without_a_move_or_another_arm(count, pressing, races):
    """With a goal that presses, no two. Every arm is asked in the end, and each starts from the current student."""
    (state, step), alone, asked = run_of(count, pressing, races), 0, set()
    while not bool(state.closed):
        before = state
        state, d = step(POOLS, state, np.int32(200))
        trained = set(np.flatnonzero(d.steps).tolist())
        others = trained - {int(before.arms.leader)}
        assert int(d.verdict) == KEEP
        alone = 0 if others else alone + 1
        assert alone <= (1 if pressing else 3) or not trained
        if int(d.asked) >= 0:
            assert trained == {int(before.arms.leader), int(d.asked)}
            assert_same(before.arms.states[int(d.asked)], WALKERS[int(d.asked)].init(before.current.variables))
            asked.add(int(d.asked))
    assert asked == set(range(1, count))


def test_decision_names_no_asked_arm_if_none_trained():
    """The budget ends before the asked arm trains."""
    states, decisions = steps_from(after_race((0, 0, 0, 0)), [LONG, LONG, LONG, 0])
    assert int(states[2].arms.asked) == 1 and int(decisions[3].asked) == -1


def test_single_arm_is_never_accompanied():
    state, decisions = whole_run(begin((0,)), 60)
    assert all(int(d.asked) == -1 for d in decisions) and int(state[-1].clock.cost) == 60


# The current student.


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 2.0, 7.0]), min_size=4, max_size=4))
def test_promise_of_the_current_student_never_falls_except_by_a_roll_back(seed, speeds):
    pools = noisy_pools(seed)
    before = begin(speeds, pools, t=int(seed % 60))
    for state, d in zip(*whole_run(before, 120, pools), strict=True):
        if int(d.verdict) != ROLL_BACK:
            assert state.current.evidence.promise.sum() >= before.current.evidence.promise.sum()
        leader_moves = int(state.arms.leader) != int(before.arms.leader)
        race_ends = int(before.arms.racing.sum()) > 1 == int(state.arms.racing.sum())
        assert not leader_moves or race_ends or int(d.verdict) in (ADOPT, PROMOTE)
        assert bool(state.arms.racing[int(state.arms.leader)]) or int(state.arms.racing.sum()) == 1
        before = state


def test_roll_back_restarts_every_arm_and_the_race_goes_on():
    start = begin((1, 0, 0, 0), t=24)._replace(champion=begin((1, 0, 0, 0), t=40).champion)
    (state, after), decisions = steps_from(start, [100, 96])
    assert int(decisions[0].verdict) == ROLL_BACK and state.arms.racing.all()
    assert_same(state.arms.states, tuple(arm.init(start.champion.variables) for arm in WALKERS))
    assert (decisions[1].steps > 0).all() and t_of(after) == 42


@pytest.mark.parametrize("kind", [np.int32, jnp.int32, int], ids=["NumPy", "JAX", "Python"])
def test_limit_may_be_of_any_integer_kind(kind):
    for has_final in (False, True):
        start, step = compiled(4, has_final=has_final)
        state, decision = step(POOLS, start(threshold(8, (1, 2, 0, 0)), POOLS), kind(1000))
        assert decision.steps.tolist() == [2] * 4
        assert {leaf.dtype for leaf in jax.tree.leaves(state.clock)} == {jnp.dtype("int32")}
