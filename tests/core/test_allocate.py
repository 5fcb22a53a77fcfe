"""Allocation of steps to arms: a race by halving, then the leader and challengers, within the remaining budget."""

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
property_test = settings(deadline=None, max_examples=60)
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
next_values = jax.jit(allocate.next_values)
next_length = jax.jit(functools.partial(allocate.next_length, config=CONFIG))


@st.composite
def portfolios(draw):
    """Relative lengths, which arms are active, and the leader, which is always active."""
    a = draw(st.sampled_from(ARMS))
    lengths = draw(st.lists(st.floats(0.0625, 8, width=32), min_size=a, max_size=a))
    leader = draw(st.integers(0, a - 1))
    active = [draw(st.booleans()) or i == leader for i in range(a)]
    return np.float32(lengths), np.array(active), leader


@property_test
@given(portfolios(), st.floats(1, 2000, width=32), st.integers(0, 300) | st.integers(0, 2**30))
def test_steps_never_exceed_the_remaining_budget(portfolio, length, remaining):
    lengths, active, leader = portfolio
    steps = np.asarray(steps_of(active, np.int32(leader), lengths, np.float32(length), np.int32(remaining)))
    assert steps.dtype == np.int32
    assert (steps >= 0).all()
    assert steps.sum(dtype=np.int64) <= remaining
    assert (steps[~active] == 0).all()
    assert (steps <= np.maximum(lengths * round(length) + 1e-2, 1)).all()
    if remaining > 0:
        assert steps[leader] >= 1  # hence every budget is spent to the last step
    else:
        assert (steps == 0).all()


@property_test
@given(portfolios(), st.integers(1, 400), st.integers(1, 5000))
def test_budget_is_spent_to_the_last_step(portfolio, length, budget):
    lengths, active, leader = portfolio
    left = budget
    for _ in range(budget):
        left -= int(steps_of(active, np.int32(leader), lengths, np.float32(length), np.int32(left)).sum())
        if left == 0 or budget > 40 * length:
            break
    assert left == 0 or (budget > 40 * length and left > 0)


def test_steps_agree_with_hand_computation():
    def steps(active, lengths, length, remaining, leader=0):
        return steps_of(
            np.array(active), np.int32(leader), np.float32(lengths), np.float32(length), np.int32(remaining)
        ).tolist()

    assert steps([True, True, False], [1, 1, 1], 10, 100) == [10, 10, 0]
    assert steps([True, True, False], [1, 0.5, 1], 10, 100) == [10, 5, 0]
    assert steps([True, True, True], [1, 1, 1], 10, 18) == [6, 6, 6]  # the remaining budget is divided equally
    assert steps([True, True, True], [1, 1, 1], 10, 3) == [1, 1, 1]
    assert steps([True, True, True], [1, 1, 1], 10, 2, leader=1) == [0, 2, 0]  # the leader gets a small rest
    assert steps([True, True, True], [1, 1, 1], 10, 0) == [0, 0, 0]


# Which arms train.


@property_test
@given(portfolios(), st.integers(0, 4), st.integers(0, 2**30), st.data())
def test_leader_always_trains(portfolio, iteration, seed, data):
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
        assert not resting.size or value[active & others].min(initial=0) >= resting.max()  # the better arms race
    else:
        assert active.sum() <= 2  # the leader and at most one challenger


@pytest.mark.parametrize(("a", "counts"), [(1, [1, 1, 1]), (2, [2, 1, 1]), (3, [3, 2, 1, 1]), (6, [6, 3, 2, 1, 1])])
def test_race_halves_the_arms_each_round(a, counts):
    value = -np.arange(a, dtype=np.float32)
    for iteration, count in enumerate(counts):
        active = never_explores(jax.random.key(0), np.int32(iteration), value, np.int32(0))
        np.testing.assert_array_equal(active, np.arange(a) < count)


@pytest.mark.parametrize("leader", range(6))
def test_leader_races_even_with_a_low_value(leader):
    value = -np.arange(6, dtype=np.float32)
    active = np.asarray(never_explores(jax.random.key(0), np.int32(1), value, np.int32(leader)))
    others = [i for i in range(6) if i != leader]
    np.testing.assert_array_equal(np.flatnonzero(active), sorted([leader, *others[:2]]))


def training_rates(iteration, value, racers, spent=0.0, exploration=0.4, pressed=False):
    options = {"spent": allocate.Spent(0.25, spent), "exploration": exploration, "pressed": pressed}
    draw = functools.partial(allocate.active_arms, racers=racers, **options)
    each = jax.jit(jax.vmap(lambda key: draw(key, arms_state(iteration, value, jnp.int32(0)))))
    return np.asarray(each(jax.random.split(jax.random.key(0), 20_000))).mean(0)


def test_arms_that_do_not_race_only_challenge_after_the_race_and_late():
    value, racers = np.float32([0, -1, -2, 0]), (True, True, True, False)
    for iteration, count in enumerate([3, 2, 1]):
        active = never_explores(jax.random.key(0), np.int32(iteration), value, np.int32(0), racers)
        np.testing.assert_array_equal(active, np.arange(4) < count)
    assert training_rates(1, value, racers, spent=0.25)[3] == 0  # while the race goes on
    assert training_rates(2, value, racers, spent=0.2)[3] == 0  # too early in the student's budget
    assert 0.1 < training_rates(2, value, racers, spent=0.25)[3] < 0.2


def test_pressing_goal_forces_one_challenger_once_all_arms_may_challenge():
    value, racers = np.float32([0, -1, 0]), (True, False, False)
    pressed = functools.partial(training_rates, 0, value, racers, exploration=0.0, pressed=True)
    np.testing.assert_array_equal(pressed(spent=0.2), [1, 0, 0])
    rates = pressed(spent=0.25)
    assert rates[0] == 1 and rates[1:].sum() == pytest.approx(1) and rates[2] > rates[1] > 0.2


def test_single_racer_leads_from_the_start_and_is_challenged_late():
    value, racers = np.float32([0, 0]), (True, False)
    np.testing.assert_array_equal(training_rates(0, value, racers), [1, 0])
    rates = training_rates(0, value, racers, spent=0.25)
    assert rates[0] == 1
    assert rates[1] == pytest.approx(0.3, abs=0.015)


def test_all_arms_race_if_none_is_declared_to_race():
    arms = [Arm("a", None, None, races=False), Arm("b", None, None), Arm("c", None, None, races=False)]
    assert Algorithm(None, arms, None, None, None).racers == (False, True, False)
    assert Algorithm(None, arms[::2], None, None, None).racers == (True, True)


def test_challengers_train_at_the_exploration_rate_and_better_arms_more_often():
    value = np.float32([0, -0.5, -9, -1])
    rates = training_rates(9, value, racers=(True,) * 4)
    assert rates[0] == 1
    assert rates[1:].sum() == pytest.approx(0.3, abs=0.015)
    assert rates[1] > rates[3] > rates[2]


# Updates of values and of the trajectory length.


def arm_results(a, n=12):
    value = st.lists(st.floats(-10, 0, width=32), min_size=a, max_size=a)
    score = st.sampled_from([0.0, 0.25, 1.0])
    select = st.lists(st.lists(score, min_size=n, max_size=n), min_size=a, max_size=a)
    return st.tuples(value, select, *[st.lists(st.booleans(), min_size=a, max_size=a)] * 2)


@property_test
@given(st.sampled_from(ARMS).flatmap(arm_results))
def test_values_stay_within_their_bounds(drawn):
    value, select, trained, broken = (np.array(x) for x in drawn)
    select = np.where((trained & ~broken)[:, None], select, np.nan).astype(np.float32)
    after = np.asarray(next_values(value.astype(np.float32), trained, select))
    assert ((after >= -10) & (after <= 0)).all()  # also fails for NaN
    rested = ~trained
    assert (after[rested] >= value[rested].astype(np.float32)).all()  # moves towards level or stays
    if trained.sum() > 1:
        assert (
            after[trained & broken] <= (value[trained & broken] - 10) / 2 + 1e-4
        ).all()  # a broken arm counts as -10
        sound = trained & ~broken
        if sound.any():
            means = np.where(sound, np.nan_to_num(select.mean(1), nan=-1), -1)
            best = means.argmax()
            assert after[best] == pytest.approx(value[best] / 2, abs=1e-4)  # the best arm has difference 0 to itself


def test_values_agree_with_hand_computation():
    """Arm 1 loses 1 on every example, without spread: -10. Arm 2 differs from arm 0, but not on average: 0. Arm 3 is broken."""
    select = np.float32([[1, 0, 1, 0], [0, -1, 0, -1], [0, 1, 0, 1], [np.nan] * 4])
    value, trained = np.float32([-4, -4, -4, -4]), np.ones(4, bool)
    np.testing.assert_allclose(next_values(value, trained, select), [-2, -7, -2, -7])


@property_test
@given(
    st.floats(1, 5000, width=32),
    st.floats(-1, 1, width=32) | st.just(float("nan")),
    st.floats(0, 1, width=32) | st.just(float("nan")),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_length_stays_within_its_bounds(length, gain, gain_se, moved, cost):
    after = float(next_length(np.float32(length), np.float32(gain), np.float32(gain_se), moved, np.int32(cost)))
    assert CONFIG.length <= after <= CONFIG.max_length  # also fails for NaN


def test_length_agrees_with_hand_computation():
    """The limit is a fifth of the student's 300 steps; trajectories without a gain may grow to 4 initial lengths."""
    config, cost = EV3(length=50, max_length=1000, max_share=0.2), np.int32(300)

    def after(length, z, moved):
        gain, gain_se, moved = np.float32(z), np.float32(1), np.bool_(moved)
        return float(allocate.next_length(np.float32(length), gain, gain_se, moved, cost, config=config))

    assert after(50, 1.0, True) == 60  # the limit, below the growth to 75
    assert after(50, 4.0, True) == 50
    assert [after(length, -1.0, False) for length in (50, 100, 150, 200)] == [100, 200, 200, 200]
    assert after(200, 4.0, True) == 60
    short = EV3(length=50, max_length=80)
    args = np.float32(50), np.float32(-1), np.float32(1), np.bool_(False), cost
    assert float(allocate.next_length(*args, config=short)) == 80


# Steps follow gains.

SPEEDS = (0.0, 1.0, 3.0, -1.0, 0.5)


def climber(name, speed):
    def propose(state, draw, stretch):
        state = state + speed * stretch.steps
        return state, Variables({"t": state}, {})

    return Arm(name, lambda variables: variables.params["t"], propose)


def apply_threshold(variables, inputs, *, train, key=None):
    """Predicts label 0, which is right, on the examples whose input is below t."""
    return jnp.stack([variables.params["t"] - inputs[:, 0], jnp.zeros(len(inputs))], 1), variables


def test_fastest_arm_leads_and_gets_most_steps():
    """Arms move the threshold at different speeds. The fastest takes the lead and over half of the steps."""
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
def test_new_race_starts_only_if_a_goal_presses_and_the_leader_makes_no_gain(pressing, stale, round_, again):
    value = jnp.array([0.0, -3, -2, -10])  # four arms: a race has two rounds
    clock = Clock(**{**dict.fromkeys(Clock._fields), "stale": jnp.int32(stale)})
    arms = arms_state(jnp.int32(round_), value, jnp.int32(0), jnp.float32(300))
    state = State(**{**dict.fromkeys(State._fields), "clock": clock, "arms": arms})
    after = allocate.race_again(state, jnp.bool_(pressing), racers=(True,) * 4, config=EV3(length=50)).arms
    assert (int(after.round), float(after.length)) == ((0, 150) if again else (round_, 300))
    np.testing.assert_array_equal(after.value, np.zeros(4) if again else value)
    racing = never_explores(jax.random.key(0), after.round, after.value, jnp.int32(0))
    assert int(racing.sum()) == (4 if again or round_ == 0 else 1)
