"""Allocation of steps to arms within the budget: the leader, now and then another arm, and the lengths of trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allocations import arms_of, clock_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, allocate, initial_state, make_step
from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import Arm, Batch, Evidence, Pools, Variables

ARMS = (1, 2, 3, 6)
property_test = settings(deadline=None, max_examples=60)
CONFIG = EV3(length=20, max_length=400)
NAN = float("nan")

steps_of = jax.jit(allocate.steps_of)
next_values = jax.jit(allocate.next_values)
standardized = jax.jit(lambda scores: allocate.standardized(*allocate.behind_best(scores)))
to_ask = jax.jit(allocate.to_ask)


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


def test_active_arms_are_those_in_the_race_or_the_leader_and_an_asked_arm():
    def active(racing, asked, leader=2):
        arms = arms_of(value=[0.0] * 4, racing=[True, True, False, False], leader=leader)
        return np.flatnonzero(allocate.active_arms(arms._replace(asked=jnp.int32(asked)), racing)).tolist()

    assert active(jnp.bool_(True), -1, leader=1) == [0, 1]
    assert active(jnp.bool_(True), 3, leader=1) == [0, 1]
    assert active(jnp.bool_(False), -1) == [2]
    assert active(jnp.bool_(False), 0) == [0, 2]
    assert active(jnp.bool_(False), 2) == [2]


# The trajectory length.


@property_test
@given(st.booleans(), st.integers(0, 2**30), st.integers(1, 2**30), st.integers(0, 2**30), st.integers(1, 5000))
def test_length_stays_within_its_bounds(racing, left, budget, cost, length):
    config, left = EV3(length=length, max_length=2 * length), left if racing else 0
    got = float(
        allocate.next_length(jnp.bool_(racing), jnp.float32(left), jnp.int32(budget), jnp.int32(cost), config=config)
    )
    assert got == round(got)
    assert (1 if racing else length) <= got <= 2 * length  # also fails for NaN
    assert got <= max(budget / 50, 1 if racing else length) * (1 + 1e-6) + 0.5
    if racing:
        assert got <= max(left, 1)
    assert got <= max(0.2 * cost, length) + 0.5


@pytest.mark.parametrize(
    ("racing", "left", "budget", "cost", "length"),
    [
        (False, 0, 3000, 3000, 60),  # a fiftieth
        (False, 0, 500, 500, 20),  # at least config.length
        (False, 0, 10**6, 10**6, 400),  # at most config.max_length
        (False, 0, 10**6, 0, 20),  # a budget that may shrink: no more than a fifth of the cost so far
        (False, 0, 10**6, 200, 40),
        (True, 10**5, 10**6, 10**6, 400),
        (True, 100, 1000, 50, 20),
        (True, 100, 500, 0, 10),  # in a race it may be shorter than config.length
        (True, 100, 20, 0, 1),
        (True, 3, 1000, 500, 3),  # the rest of the race
        (True, 104, 1049, 0, 20),  # 20.98, but at most config.length at the start
        (True, 104, 1049, 500, 21),
    ],
)
def test_length_agrees_with_hand_computation(racing, left, budget, cost, length):
    arguments = jnp.bool_(racing), jnp.float32(left), jnp.int32(budget), jnp.int32(cost)
    assert float(allocate.next_length(*arguments, config=CONFIG)) == length


# How far arms lie behind, and whom that makes worth asking.


def test_distance_from_the_best_arm_agrees_with_hand_computation():
    """Arm 1 is right on two of eight examples fewer than arm 0: gap -1/4, standard error sqrt(3/16) / sqrt(7)."""
    scores = np.float32([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [NAN] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
    gap, se = allocate.behind_best(scores)
    np.testing.assert_allclose(gap, [0, -0.25, NAN, 0], atol=1e-7)
    np.testing.assert_allclose(np.asarray(se)[:2], [0, (3 / 16) ** 0.5 / 7**0.5], atol=1e-7)
    np.testing.assert_allclose(standardized(scores), [0, -(7**0.5) / 3**0.5, -10, 0], rtol=1e-5)
    np.testing.assert_array_equal(standardized(np.full((2, 8), NAN, np.float32)), [-10, -10])
    np.testing.assert_array_equal(standardized(np.float32([[1] * 8, [0] * 8])), [0, -10])  # without spread


def arm_results(a, n=12):
    value = st.lists(st.floats(-10, 0, width=32), min_size=a, max_size=a)
    score = st.sampled_from([0.0, 0.25, 1.0])
    select = st.lists(st.lists(score, min_size=n, max_size=n), min_size=a, max_size=a)
    return st.tuples(value, select, *[st.lists(st.booleans(), min_size=a, max_size=a)] * 2)


@property_test
@given(st.sampled_from(ARMS).flatmap(arm_results))
def test_values_stay_within_their_bounds(drawn):
    value, scores, trained, broken = (np.array(x) for x in drawn)
    value = value.astype(np.float32)
    scores = np.where((trained & ~broken)[:, None], scores, NAN).astype(np.float32)
    behind = np.asarray(standardized(scores))
    assert ((behind >= -10) & (behind <= 0)).all()  # also fails for NaN
    after = np.asarray(next_values(value, trained, behind))
    assert ((after >= -10) & (after <= 0)).all()
    assert (after[~trained] >= value[~trained]).all()  # moves towards level or stays
    if trained.sum() > 1:
        assert (
            after[trained & broken] <= (value[trained & broken] - 10) / 2 + 1e-4
        ).all()  # a broken arm counts as -10
        sound = trained & ~broken
        if sound.any():
            best = np.where(sound, np.nan_to_num(scores.mean(1), nan=-1), -1).argmax()
            assert behind[best] == 0 and after[best] == pytest.approx(value[best] / 2, abs=1e-4)
    else:
        np.testing.assert_array_equal(after[trained], value[trained])  # nothing to compare with


def test_values_agree_with_hand_computation():
    """Arm 1 loses 1 on every example, without spread: -10. Arm 2 differs from arm 0, but not on average: 0. Arm 3 is broken."""
    scores = np.float32([[1, 0, 1, 0], [0, -1, 0, -1], [0, 1, 0, 1], [NAN] * 4, [NAN] * 4])
    value, trained = np.float32([-4, -4, -4, -4, -4]), np.array([True] * 4 + [False])
    np.testing.assert_allclose(next_values(value, trained, standardized(scores)), [-2, -7, -2, -7, -3.4], rtol=1e-6)
    alone = np.arange(5) == 0
    np.testing.assert_allclose(next_values(value, alone, standardized(scores)), [-4, -3.4, -3.4, -3.4, -3.4], rtol=1e-6)


def test_lag_agrees_with_hand_computation():
    """Arm 0 is the current student; arm 1 is right on two of eight examples fewer, arm 2 broken; arm 3 rests."""
    scores = np.float32([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [NAN] * 8, [NAN] * 8])
    arms, trained = arms_of(value=[0.0] * 4, lag=[-3.0, -1.0, -1.0, -1.5]), np.array([True, True, True, False])
    after = allocate.next_lag(arms, trained, scores, Evidence(select=scores[2], promise=scores[0]))
    np.testing.assert_allclose(after, [-1.5, (-1 - (7 / 3) ** 0.5) / 2, -5.5, -1.5], rtol=1e-5)


# Asking another arm.


@pytest.mark.parametrize(
    ("stale", "pressing", "asks"),
    [(0, False, False), (1, False, False), (2, False, False), (3, False, True), (4, False, False), (6, False, True),
     (0, True, False), (1, True, True), (2, True, True), (3, True, True)],
)  # fmt: skip
def test_arm_of_the_highest_value_is_asked_if_nothing_moves(stale, pressing, asks):
    value = [0.0, -3, -1, -1, -9]
    for leader, best in ((0, 2), (2, 0), (4, 0)):
        arms = arms_of(value=value, leader=leader)
        assert int(to_ask(arms, clock_of(stale=stale), jnp.bool_(pressing))) == (best if asks else -1)
        racing = arms._replace(racing=jnp.array([True, True, False, False, False]))
        assert int(to_ask(racing, clock_of(stale=stale), jnp.bool_(pressing))) == -1  # not in a race
    assert int(to_ask(arms_of(value=[0.0]), clock_of(stale=stale), jnp.bool_(pressing))) == -1  # a single arm


def test_asked_arm_starts_anew_and_makes_way_for_others():
    arms = arms_of(value=[-1.0, -2.0, -3.0], lag=[-4.0, -5.0, -6.0])
    after = allocate.with_asked(arms, jnp.int32(1))
    np.testing.assert_array_equal(after.value, [-1, -3, -3])
    np.testing.assert_array_equal(after.lag, [-4, 0, -6])
    assert int(after.asked) == 1
    none = allocate.with_asked(arms, jnp.int32(-1))
    jax.tree.map(np.testing.assert_array_equal, none, arms)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2, 3, 6, 12]), st.booleans(), st.integers(0, 2**31))
def test_every_arm_is_asked_in_turn_whatever_its_value_was(count, pressing, seed):
    """If nothing moves for 300 iterations: also if one arm always ends level with the leader, and the others far behind."""
    rng = np.random.default_rng(seed)
    arms, stale, asked = arms_of(value=-10 * rng.random(count), leader=int(rng.integers(count))), 0, set()
    behind = np.where(rng.random(count) < 0.5, 0.0, -10.0).astype(np.float32)
    for _ in range(300):
        trained = np.asarray(allocate.active_arms(arms, jnp.bool_(False)))
        arms, stale = arms._replace(value=next_values(arms.value, trained, behind)), stale + 1
        arm = to_ask(arms, clock_of(stale=stale), jnp.bool_(pressing))
        arms = allocate.with_asked(arms, arm)
        asked.add(int(arm))
    assert asked == set(range(count)) - {int(arms.leader)} | ({-1} if not pressing else set())


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


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_fastest_arm_leads_and_gets_most_steps(final):
    """Arms move the threshold at different speeds. The fastest takes the lead and over half of the steps."""
    inputs = jnp.linspace(0, 1200, 300)[:, None]
    split = Batch(inputs, jnp.zeros(300, int), {"logits": jnp.zeros((300, 2))}, jnp.arange(300), jnp.ones(300))
    pools = Pools(split, split, split)
    arms = [climber(str(i), speed) for i, speed in enumerate(SPEEDS)]
    objectives, config = Objectives(example_scores.accuracy, ACCURACY), EV3(length=5, max_length=5, final=final)
    algorithm = Algorithm(apply_threshold, arms, lambda pool, step: pool, objectives, config, has_final=final > 0)
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
        assert 6 <= np.delete(cost, cost.argmax()).min() <= np.delete(cost, cost.argmax()).max() <= 24
