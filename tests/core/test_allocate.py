"""The arms' shares: a race by halving, then mostly the leader; never more than the budget has left."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, allocate, initial_state, make_step
from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import Arm, ArmsState, Batch, Clock, Pools, State, Variables

ARMS = (1, 2, 3, 6)
few = settings(deadline=None, max_examples=60)
CONFIG = EV3(length=20, max_length=400)


def active_arms(key, iteration, value, leader, racers=None, exploration=0.5):
    racers = tuple(racers or [True] * len(value))
    spent = allocate.Spent(0.0, 0.0)
    return _active_arms(key, arms_state(iteration, value, leader), racers=racers, spent=spent, exploration=exploration)


def arms_state(round_, value, leader, length=None):
    return ArmsState((), value, None, None, None, leader, round_, length)


_active_arms = jax.jit(allocate.active_arms, static_argnames="racers")
never_explores = functools.partial(active_arms, exploration=0.0)
steps_of = jax.jit(allocate.steps_of)
standing = jax.jit(allocate.next_values)
next_length = jax.jit(functools.partial(allocate.next_length, config=CONFIG))


@st.composite
def portfolios(draw):
    """Relative lengths, which arms are active, and the leader, who is."""
    a = draw(st.sampled_from(ARMS))
    lengths = draw(st.lists(st.floats(0.0625, 8, width=32), min_size=a, max_size=a))
    leader = draw(st.integers(0, a - 1))
    active = [draw(st.booleans()) or i == leader for i in range(a)]
    return np.float32(lengths), np.array(active), leader


@few
@given(portfolios(), st.floats(1, 2000, width=32), st.integers(0, 300) | st.integers(0, 2**30))
def test_steps_never_exceed_what_is_left(portfolio, length, remaining):
    lengths, active, leader = portfolio
    steps = np.asarray(steps_of(active, np.int32(leader), lengths, np.float32(length), np.int32(remaining)))
    assert steps.dtype == np.int32
    assert (steps >= 0).all()
    assert steps.sum(dtype=np.int64) <= remaining
    assert (steps[~active] == 0).all()
    assert (steps <= np.maximum(lengths * round(length) + 1e-2, 1)).all()
    if remaining > 0:
        assert steps[leader] >= 1  # so every budget is spent in the end, to the last step
    else:
        assert (steps == 0).all()


@few
@given(portfolios(), st.integers(1, 400), st.integers(1, 5000))
def test_a_budget_is_spent_exactly(portfolio, length, budget):
    lengths, active, leader = portfolio
    left = budget
    for _ in range(budget):
        left -= int(steps_of(active, np.int32(leader), lengths, np.float32(length), np.int32(left)).sum())
        if left == 0 or budget > 40 * length:
            break
    assert left == 0 or (budget > 40 * length and left > 0)


def test_steps_by_hand():
    def steps(active, lengths, length, remaining, leader=0):
        return steps_of(
            np.array(active), np.int32(leader), np.float32(lengths), np.float32(length), np.int32(remaining)
        ).tolist()

    assert steps([True, True, False], [1, 1, 1], 10, 100) == [10, 10, 0]
    assert steps([True, True, False], [1, 0.5, 1], 10, 100) == [10, 5, 0]
    assert steps([True, True, True], [1, 1, 1], 10, 18) == [6, 6, 6]  # a short rest is shared alike
    assert steps([True, True, True], [1, 1, 1], 10, 3) == [1, 1, 1]
    assert steps([True, True, True], [1, 1, 1], 10, 2, leader=1) == [0, 2, 0]  # too short for all: the leader's
    assert steps([True, True, True], [1, 1, 1], 10, 0) == [0, 0, 0]


# Who trains.


@few
@given(portfolios(), st.integers(0, 4), st.integers(0, 2**30), st.data())
def test_the_leader_always_trains(portfolio, iteration, seed, data):
    lengths, _, leader = portfolio
    a = len(lengths)
    value = np.float32(data.draw(st.lists(st.floats(-10, 0, width=32, allow_subnormal=False), min_size=a, max_size=a)))
    active = np.asarray(active_arms(jax.random.key(seed), np.int32(iteration), value, np.int32(leader)))
    assert active[leader]
    racing = math.ceil(a / 2**iteration)
    if racing > 1:
        assert active.sum() == racing
        others = np.arange(a) != leader
        resting = value[~active]
        assert not resting.size or value[active & others].min(initial=0) >= resting.max()  # none better rests
    else:
        assert active.sum() <= 2  # one challenger at most


@pytest.mark.parametrize(("a", "counts"), [(1, [1, 1, 1]), (2, [2, 1, 1]), (3, [3, 2, 1, 1]), (6, [6, 3, 2, 1, 1])])
def test_the_race_halves(a, counts):
    value = -np.arange(a, dtype=np.float32)
    for iteration, count in enumerate(counts):
        active = never_explores(jax.random.key(0), np.int32(iteration), value, np.int32(0))
        np.testing.assert_array_equal(active, np.arange(a) < count)


@pytest.mark.parametrize("leader", range(6))
def test_the_leader_races_whatever_its_standing(leader):
    value = -np.arange(6, dtype=np.float32)
    active = np.asarray(never_explores(jax.random.key(0), np.int32(1), value, np.int32(leader)))
    others = [i for i in range(6) if i != leader]
    np.testing.assert_array_equal(np.flatnonzero(active), sorted([leader, *others[:2]]))


def how_often(iteration, value, racers, spent=0.0, exploration=0.4, pressed=False):
    rest = {"spent": allocate.Spent(0.25, spent), "exploration": exploration, "pressed": pressed}
    draw = functools.partial(allocate.active_arms, racers=racers, **rest)
    each = jax.jit(jax.vmap(lambda key: draw(key, arms_state(iteration, value, jnp.int32(0)))))
    return np.asarray(each(jax.random.split(jax.random.key(0), 20_000))).mean(0)


def test_who_does_not_race_only_challenges():
    value, racers = np.float32([0, -1, -2, 0]), (True, True, True, False)
    for iteration, count in enumerate([3, 2, 1]):
        active = never_explores(jax.random.key(0), np.int32(iteration), value, np.int32(0), racers)
        np.testing.assert_array_equal(active, np.arange(4) < count)
    assert how_often(1, value, racers, spent=0.25)[3] == 0  # while others race
    assert how_often(2, value, racers, spent=0.2)[3] == 0  # so early
    assert 0.1 < how_often(2, value, racers, spent=0.25)[3] < 0.2


def test_where_it_presses_one_challenges_for_certain_once_all_may():
    value, racers = np.float32([0, -1, 0]), (True, False, False)
    pressed = functools.partial(how_often, 0, value, racers, exploration=0.0, pressed=True)
    np.testing.assert_array_equal(pressed(spent=0.2), [1, 0, 0])
    often = pressed(spent=0.25)
    assert often[0] == 1 and often[1:].sum() == pytest.approx(1) and often[2] > often[1] > 0.2


def test_one_racer_leads_from_the_start_and_is_challenged_late():
    value, racers = np.float32([0, 0]), (True, False)
    np.testing.assert_array_equal(how_often(0, value, racers), [1, 0])
    often = how_often(0, value, racers, spent=0.25)
    assert often[0] == 1
    assert often[1] == pytest.approx(0.3, abs=0.015)


def test_where_no_arm_would_race_all_do():
    arms = [Arm("a", None, None, races=False), Arm("b", None, None), Arm("c", None, None, races=False)]
    assert Algorithm(None, arms, None, None, None).racers == (False, True, False)
    assert Algorithm(None, arms[::2], None, None, None).racers == (True, True)


def test_challengers_come_as_often_as_asked_and_the_better_more_often():
    value = np.float32([0, -0.5, -9, -1])
    often = how_often(9, value, racers=(True,) * 4)
    assert often[0] == 1
    assert often[1:].sum() == pytest.approx(0.3, abs=0.015)
    assert often[1] > often[3] > often[2]


# What iterations show.


def standings(a, n=12):
    value = st.lists(st.floats(-10, 0, width=32), min_size=a, max_size=a)
    score = st.sampled_from([0.0, 0.25, 1.0])
    select = st.lists(st.lists(score, min_size=n, max_size=n), min_size=a, max_size=a)
    return st.tuples(value, select, *[st.lists(st.booleans(), min_size=a, max_size=a)] * 2)


@few
@given(st.sampled_from(ARMS).flatmap(standings))
def test_standing_stays_within_its_bounds(drawn):
    value, select, trained, broken = (np.array(x) for x in drawn)
    select = np.where((trained & ~broken)[:, None], select, np.nan).astype(np.float32)
    after = np.asarray(standing(value.astype(np.float32), trained, select))
    assert ((after >= -10) & (after <= 0)).all()  # false for nan
    rested = ~trained
    assert (after[rested] >= value[rested].astype(np.float32)).all()  # back towards level, never away from it
    if trained.sum() > 1:
        assert (
            after[trained & broken] <= (value[trained & broken] - 10) / 2 + 1e-4
        ).all()  # broken: the worst there is
        sound = trained & ~broken
        if sound.any():
            means = np.where(sound, np.nan_to_num(select.mean(1), nan=-1), -1)
            best = means.argmax()
            assert after[best] == pytest.approx(value[best] / 2, abs=1e-4)  # the best is level with itself


def test_standing_by_hand():
    """Arm 1 is worse on every example alike: without any spread, the worst there is. Arm 2 differs, but not on average."""
    select = np.float32([[1, 0, 1, 0], [0, -1, 0, -1], [0, 1, 0, 1], [np.nan] * 4])
    value, everyone = np.float32([-4, -4, -4, -4]), np.ones(4, bool)
    np.testing.assert_allclose(standing(value, everyone, select), [-2, -7, -2, -7])


@few
@given(
    st.floats(1, 5000, width=32),
    st.floats(-1, 1, width=32) | st.just(float("nan")),
    st.floats(0, 1, width=32) | st.just(float("nan")),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_the_length_stays_within_its_bounds(length, gain, gain_se, moved, cost):
    after = float(next_length(np.float32(length), np.float32(gain), np.float32(gain_se), moved, np.int32(cost)))
    assert CONFIG.length <= after <= CONFIG.max_length  # false for nan


def test_the_length_by_hand():
    """Of a student that began 300 steps ago: trajectories have a fifth of that, unless they were in vain."""
    config, cost = EV3(length=50, max_length=1000, max_share=0.2), np.int32(300)

    def after(length, z, moved):
        gain, gain_se, moved = np.float32(z), np.float32(1), np.bool_(moved)
        return float(allocate.next_length(np.float32(length), gain, gain_se, moved, cost, config=config))

    assert after(50, 1.0, True) == 60  # and not 75
    assert after(50, 4.0, True) == 50
    assert [after(length, -1.0, False) for length in (50, 100, 150, 200)] == [100, 200, 200, 200]
    assert after(200, 4.0, True) == 60
    short = EV3(length=50, max_length=80)
    args = np.float32(50), np.float32(-1), np.float32(1), np.bool_(False), cost
    assert float(allocate.next_length(*args, config=short)) == 80


# Shares follow payoff.

SPEEDS = (0.0, 1.0, 3.0, -1.0, 0.5)


def climber(name, speed):
    def propose(state, draw, stretch):
        state = state + speed * stretch.steps
        return state, Variables({"t": state}, {})

    return Arm(name, lambda variables: variables.params["t"], propose)


def apply_threshold(variables, inputs, *, train, key=None):
    """Right, label 0, on the examples whose input is below t."""
    return jnp.stack([variables.params["t"] - inputs[:, 0], jnp.zeros(len(inputs))], 1), variables


def test_the_best_arm_gets_most():
    """Arms that climb at different speeds: the first of them leads at first, most steps go to the fastest."""
    inputs = jnp.linspace(0, 1200, 300)[:, None]
    split = Batch(inputs, jnp.zeros(300, int), {"logits": jnp.zeros((300, 2))}, jnp.arange(300), jnp.ones(300))
    pools = Pools(split, split, split)
    arms = [climber(str(i), speed) for i, speed in enumerate(SPEEDS)]
    objectives = Objectives(example_scores.accuracy, ACCURACY)
    algorithm = Algorithm(apply_threshold, arms, lambda pool, step: pool, objectives, EV3(length=5, max_length=5))
    step = make_step(algorithm)
    for seed in range(3):
        start = Variables({"t": jnp.float32(1)}, {})
        state = initial_state(jax.random.key_data(jax.random.key(seed)), start, pools, algorithm)
        while not bool(state.closed):
            state, _ = step(pools, state, np.int32(300))
        cost = np.asarray(state.arms.cost)
        assert cost.sum() == 300
        assert int(state.arms.leader) == cost.argmax() == int(np.argmax(SPEEDS))
        assert cost.max() > 150


@pytest.mark.parametrize(
    ("pressing", "stale", "round_", "again"),
    [(True, 1, 3, True), (False, 1, 3, False), (True, 0, 3, False), (True, 5, 2, False), (True, 5, 0, False)],
)
def test_arms_race_again_where_a_goal_presses_and_the_leader_is_stuck(pressing, stale, round_, again):
    value = jnp.array([0.0, -3, -2, -10])  # four arms race for two rounds
    clock = Clock(**{**dict.fromkeys(Clock._fields), "stale": jnp.int32(stale)})
    arms = arms_state(jnp.int32(round_), value, jnp.int32(0), jnp.float32(300))
    state = State(**{**dict.fromkeys(State._fields), "clock": clock, "arms": arms})
    after = allocate.race_again(state, jnp.bool_(pressing), racers=(True,) * 4, config=EV3(length=50)).arms
    assert (int(after.round), float(after.length)) == ((0, 150) if again else (round_, 300))
    np.testing.assert_array_equal(after.value, np.zeros(4) if again else value)
    racing = never_explores(jax.random.key(0), after.round, after.value, jnp.int32(0))
    assert int(racing.sum()) == (4 if again or round_ == 0 else 1)
