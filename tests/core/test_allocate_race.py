"""Who races, for how long, and who leaves: `allocate` for the race at the start of a run."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allocations import arms_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, allocate
from ev3_distill.types import Arm

CONFIG = EV3(length=20, max_length=400)


@pytest.mark.parametrize(
    ("racers", "budget", "race", "steps"),
    [
        (2, 1000, 0.1, 100),
        (5, 1000, 0.1, 100),
        (6, 1000, 0.1, 83),  # half of the budget for all six: 83.3 each
        (2, 1000, 0.5, 250),
        (3, 1049, 0.1, 104),
        (2, 9, 0.1, 0),
        (2, 10, 0.1, 1),
        (1, 1000, 0.1, 0),  # one arm has no other to race against
        (4, 1000, 0.0, 0),
    ],
)
def test_steps_of_a_race_agree_with_hand_computation(racers, budget, race, steps):
    resting = [False]  # an arm that does not race does not count
    entered = jnp.array([True] * racers + resting)
    assert float(allocate.race_steps(entered, jnp.int32(budget), EV3(race=race))) == steps


@pytest.mark.parametrize(
    ("racers", "fast", "budget", "race", "length", "enter"),
    [
        ("1111", "0111", 1250, 0.08, 50, "1111"),  # 100 steps each: two of the shortest trajectories
        ("1111", "0111", 1249, 0.08, 50, "0110"),
        ("1111", "0111", 300, 0.08, 50, "0110"),
        ("1111", "0111", 300, 0.08, 12, "1111"),  # 24 each
        ("1111", "1111", 1, 0.08, 50, "1100"),
        ("010111", "010011", 300, 0.08, 50, "010010"),
        ("01", "01", 300, 0.08, 50, "01"),
        ("111111", "000111", 1000, 0.5, 50, "111110"),  # half of the budget is enough for five arms of 100 steps
        ("111111", "000111", 1199, 0.5, 50, "111110"),
        ("111111", "000111", 1200, 0.5, 50, "111111"),
        ("1111", "1111", 2**30, 0.08, 50, "1111"),
    ],
)
def test_arms_that_enter_the_race_agree_with_hand_computation(racers, fast, budget, race, length, enter):
    racers, fast, enter = ([x == "1" for x in text] for text in (racers, fast, enter))
    config = EV3(race=race, length=length)
    assert allocate.entrants(racers, fast, jnp.int32(budget), config).tolist() == enter


def test_arms_of_a_short_race_start_fast_unless_fewer_than_two_do():
    def fast(*starts_fast, races=(True, True, True)):
        arms = [Arm(str(i), None, None, races=races[i], starts_fast=x) for i, x in enumerate(starts_fast)]
        return Algorithm(lambda *_: None, arms, None, None, CONFIG).fast_racers

    assert fast(False, True, True) == (False, True, True)
    assert fast(False, False, True) == (True, True, True)
    assert fast(True, True, True, races=(True, False, True)) == (True, False, True)
    assert fast(False, True, True, races=(True, True, False)) == (True, True, False)


def test_arms_that_do_not_enter_are_out_of_the_race():
    def after(racing, entered, leader=0, raced=0):
        arms = allocate.enter(
            arms_of(value=[0.0] * len(racing), racing=racing, leader=leader, raced=raced), jnp.array(entered)
        )
        return arms.racing.tolist(), int(arms.leader)

    assert after([True, True, True], [True, True, False]) == ([True, True, False], 0)
    assert after([True, True, True], [False, True, True]) == ([False, True, True], 1)  # the first of them leads
    assert after([True, False, True], [True, True, False], raced=5) == ([True, False, False], 0)  # none returns
    assert after([True, True, True], [True, True, False], 2, raced=5) == ([True, True, True], 2)  # the leader stays
    assert after([False, False, True], [True, True, False], 0) == ([False, False, True], 0)  # the race is over


@functools.cache
def race_with(length, max_length, race, lengths):
    """A compiled iteration of a race of these arms, as `core/step` composes it."""
    config = EV3(length=length, max_length=max_length, race=race)
    racers = (True,) * len(lengths)

    @jax.jit
    def iteration(arms, cost, budget, behind):
        entered = allocate.entrants(racers, racers, budget, config)
        arms, steps = allocate.enter(arms, entered), allocate.race_steps(entered, budget, config)
        racing = allocate.is_racing(arms, steps)
        wanted = allocate.next_length(racing, steps - arms.raced, budget, cost, config=config)
        active = allocate.active_arms(arms, racing)
        trained = allocate.steps_of(active, arms.leader, jnp.float32(lengths), wanted, budget - cost)
        arms = arms._replace(raced=arms.raced + jnp.where(racing, trained.max(), 0))
        return (
            allocate.race_on(arms, behind, jnp.zeros(len(racers), bool), steps, budget=budget, config=config),
            trained,
            racing,
        )

    return iteration


RACES = st.tuples(
    st.sampled_from([1, 2, 50, 10**6]),
    st.sampled_from([0, 100, 10**6]),
    st.sampled_from([0.01, 0.08, 0.1, 0.5]),
    st.sampled_from([2, 3, 5, 6, 12]),
)


@settings(deadline=None, max_examples=150)
@given(RACES, st.integers(1, 50) | st.integers(1, 10**4) | st.integers(1, 2**30), st.integers(0, 2**31))
def test_race_of_any_arms_and_budget_keeps_its_bounds(drawn, budget, seed):
    """No arm takes more than its part, all together at most half, and none leaves early or if it leads.

    As many enter as can train for two of the shortest trajectories each, and at least two.
    """
    length, longer, race, count = drawn
    enough = [n for n in range(2, count + 1) if min(race, 0.5 / n) * budget >= 2 * length]
    enters = max(enough, default=2)
    rng, part = np.random.default_rng(seed), min(race, 0.5 / enters)
    iteration = race_with(length, max(length, longer), race, (1.0,) * count)
    arms, cost = arms_of(value=[0.0] * count, racing=[True] * count), np.zeros(count, np.int64)
    for _ in range(300):
        before = np.asarray(arms.racing) & (np.arange(count) < enters)
        leads = int(rng.choice(np.flatnonzero(before)))
        behind = np.where(rng.random(count) < 0.5, 0.0, -10.0).astype(np.float32)
        behind[rng.integers(count)] = 0
        arms = arms._replace(leader=jnp.int32(leads))
        arms, steps, racing = iteration(arms, np.int32(cost.sum()), np.int32(budget), behind)
        if not racing:
            break
        cost, racing = cost + np.asarray(steps), np.asarray(arms.racing)
        np.testing.assert_array_equal(
            np.asarray(steps) > 0, before
        )  # all that race train, for the same number of steps
        assert len(set(np.asarray(steps)[before].tolist())) == 1
        assert racing[int(arms.leader)] and not (racing & ~before).any()
        assert cost.max() == int(arms.raced) <= part * budget * (1 + 1e-6)
        assert cost.sum() <= budget / 2 * (1 + 1e-6)
        ends = int(arms.raced) >= math.floor(part * budget * (1 - 1e-6))
        left = before & ~racing
        assert ends or not left.any() or cost[left].min() >= max(0.02 * budget * (1 - 1e-6), 2 * length)
        assert ends or (before & (behind == 0) <= racing).all()
    else:
        assert length <= 2 or longer <= 100  # only many short trajectories take that many iterations
        return
    np.testing.assert_array_equal(arms.racing, np.arange(count) == int(arms.leader))  # exactly the leader is left
    if part * budget < 1:
        assert cost.sum() == 0  # too small a budget for a race
    elif part >= 0.02:
        assert cost[:enters].min() >= min(math.floor(part * budget * (1 - 1e-6)), 0.02 * budget * (1 - 1e-6))


def race_on(behind, *, leader=0, racing=None, raced=50, steps=100, budget=1000, drop=5.0, broken=(), length=5):
    arms = arms_of(value=[0.0] * len(behind), leader=leader, racing=racing or [True] * len(behind), raced=raced)
    config, broken = EV3(drop=drop, length=length), jnp.array([i in broken for i in range(len(behind))])
    behind, steps, budget = jnp.float32(behind), jnp.float32(steps), jnp.int32(budget)
    return allocate.race_on(arms, behind, broken, steps, budget=budget, config=config).racing.tolist()


def test_who_stays_in_the_race_agrees_with_hand_computation():
    assert race_on([0, -4.9, -5, -5.1]) == [True, True, True, False]
    assert race_on([0, -4.9, -5, -5.1], drop=4.95) == [True, True, False, False]
    assert race_on([0, -9, -9], leader=1) == [True, True, False]  # the leader never leaves
    assert race_on([0, -9, 0], racing=[True, True, False]) == [True, False, False]  # nor does one that left return
    assert race_on([0, -9, -9], raced=19) == [True] * 3  # too early
    assert race_on([0, -9, -9], raced=20) == [True, False, False]
    assert (
        race_on([0, -9, -9], raced=23, length=12) == [True] * 3
    )  # too early as well: not twice the shortest trajectory
    assert race_on([0, -9, -9], raced=24, length=12) == [True, False, False]
    assert race_on([0, -10, -9], raced=1, broken=[1]) == [True, False, True]  # a broken arm leaves at once
    assert race_on([-10, -10, -10], broken=range(3)) == [True] * 3  # unless no arm has a finite proposal
    assert race_on([-10, 0, -10], racing=[True, False, True], broken=[0, 2]) == [True, False, True]
    assert race_on([0, 0, 0], raced=100) == [True, False, False]  # the race is over
    assert race_on([0, 0, 0], raced=100, leader=2) == [False, False, True]
    assert race_on([0, 0, 0], raced=50, steps=40, leader=2) == [False, False, True]  # the budget has shrunk
    assert race_on([0, 0, 0], racing=[False, True, False], raced=100, leader=2) == [False, True, False]  # it was over


def test_race_goes_on_until_its_steps_are_reached_or_one_arm_is_left():
    def races(racing, raced):
        return bool(allocate.is_racing(arms_of(value=[0.0] * 3, racing=racing, raced=raced), jnp.float32(100)))

    assert races([True] * 3, 0) and races([True, False, True], 99)
    assert not races([True] * 3, 100) and not races([True] * 3, 130)
    assert not races([False, True, False], 0)


def test_all_arms_race_if_none_is_declared_to_race():
    arms = [Arm("a", None, None, races=False), Arm("b", None, None), Arm("c", None, None, races=False)]
    assert Algorithm(None, arms, None, None, None).racers == (False, True, False)
    assert Algorithm(None, arms[::2], None, None, None).racers == (True, True)


@pytest.mark.parametrize(
    ("value", "leader", "broken", "wanted"),
    [
        ((-1.0, -0.2, -0.5, 0.0), 0, (), 1),  # the last one has left the race
        ((-0.2, -0.2, -0.5, 0.0), 1, (), 1),  # level: the present leader
        ((-0.2, -0.2, -0.5, 0.0), 2, (), 0),
        ((-1.0, -0.2, -0.5, 0.0), 0, (1,), 2),
        ((-1.0, -0.2, -0.5, 0.0), 0, (0, 1, 2), 0),
    ],
)
def test_arm_nearest_to_the_best_leads_after_the_race(value, leader, broken, wanted):
    arms = arms_of(value=value, leader=leader, racing=(True, True, True, False), raced=100)
    failed = jnp.array([i in broken for i in range(4)])

    def after(steps):
        budget, config = jnp.int32(1000), EV3(length=5)
        return allocate.race_on(arms, jnp.zeros(4), failed, jnp.float32(steps), budget=budget, config=config)

    ended = after(100)
    assert int(ended.leader) == wanted
    assert ended.racing.tolist() == [i == wanted for i in range(4)]
    assert int(after(101).leader) == leader  # the race goes on


@pytest.mark.parametrize(
    ("value", "broken", "wanted"),
    [
        ((-1.0, -0.5), (), 0),
        ((-4.9, 0.0), (), 0),
        ((-5.0, 0.0), (), 1),  # as far as one iteration can move a value
        ((-4.9, 0.0), (0,), 1),
        ((-4.9, 0.0), (0, 1), 1),  # none has a finite proposal: the present leader
    ],
)
def test_first_arm_leads_after_a_short_race_unless_another_is_clearly_ahead(value, broken, wanted):
    arms = arms_of(value=value, leader=1, racing=(True, True), raced=9)
    failed, config = jnp.array([i in broken for i in range(2)]), EV3(length=5, drop=5.0)
    after = allocate.race_on(arms, jnp.zeros(2), failed, jnp.float32(9), budget=jnp.int32(1000), config=config)
    assert int(after.leader) == wanted


def test_first_half_of_a_short_race_does_not_count():
    def value(raced, steps):
        arms = arms_of(value=(-3.0, 0.0), racing=(True, True), raced=raced)
        after = allocate.race_on(
            arms,
            jnp.zeros(2),
            jnp.zeros(2, bool),
            jnp.float32(steps),
            budget=jnp.int32(1000),
            config=EV3(length=5),
        )
        return float(after.value[0])

    assert value(4, 9) == 0 and value(5, 9) == -3  # 9 steps are fewer than twice 5
    assert value(4, 10) == -3  # a race long enough


def test_leader_of_a_race_that_is_over_stays():
    arms = arms_of(value=(-1.0, -0.2), leader=0, raced=100)
    config = EV3(length=5)
    after = allocate.race_on(
        arms, jnp.zeros(2), jnp.zeros(2, bool), jnp.float32(100), budget=jnp.int32(1000), config=config
    )
    assert int(after.leader) == 0
