"""The step's rules: common random numbers, held-out splits, proposals that are discarded, rejected, adopted, promoted."""

import ast
import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ev3_distill.core
from ev3_distill import objectives
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.config import EV3
from ev3_distill.core import adapt, allocate, assess, explore, initial_state, make_step
from ev3_distill.core import step as step_module
from ev3_distill.types import (
    ADOPT,
    KEEP,
    PROMOTE,
    ROLL_BACK,
    Arm,
    Batch,
    Pools,
    Proposals,
    Stretch,
    Variables,
)
from students.mlp import mlp

CORE = Path(ev3_distill.core.__file__).parent
NAN = float("nan")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if np.issubdtype(leaf.dtype, np.floating))


# A world in which all can be computed by hand: a student is a threshold t, right on the examples of label 0 whose input
# is below t and on those of label 1 whose input is above it. Inputs are n + 1/2, so t = 7 is right on 7 of label 0.
# What the arms do is data, in the student's statistics, so that one compiled step serves all tests of as many arms.

B, N = 4, 64
RUN_KEY = jax.random.key(5)
SOUND, NAN_STUDENT, NAN_STATE, INF_STATE = range(4)


def make_split(inputs, labels=None):
    inputs = jnp.asarray(inputs, jnp.float32)[:, None]
    n = inputs.shape[0]
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    return Batch(inputs, labels, jnp.zeros((n, 2)), jnp.arange(n, dtype=jnp.int32), jnp.ones(n))


def ladder(n=N):
    return make_split(np.arange(n) + 0.5)


def apply_threshold(variables, inputs, *, train, key=None):
    lead = variables.params["t"] - inputs[:, 0]
    return jnp.stack([lead, jnp.zeros_like(lead)], axis=1), variables


def threshold(t, speeds=(0,), health=None):
    health = [SOUND] * len(speeds) if health is None else health
    return Variables({"t": jnp.float32(t)}, {"speed": jnp.float32(speeds), "health": jnp.int32(health)})


def rows(step):
    return (step * B + jnp.arange(B)) % N


def sample(examples, step):
    return jax.tree.map(lambda leaf: leaf[rows(step)], examples)


def rolled(arms, state, pools, steps):
    """What the arms propose after that many steps each."""
    draw = explore.draw_from(pools.explore, sample, RUN_KEY)
    stretches = [Stretch(state.position, n, jnp.float32(0), jnp.float32(0)) for n in steps]
    held = explore.held_from(pools.assess, RUN_KEY, batch_size=B)
    return explore.proposals_of(*explore.roll(arms, state.arm_states, draw, stretches, held), steps)


POOLS = Pools(ladder(), ladder(), ladder())
LOG = 64


class Walk(NamedTuple):
    student: Variables
    age: jax.Array  # steps since the arm last started afresh
    log: jax.Array  # [LOG, B] index of the examples seen at each global step, -1 where none
    keys: jax.Array  # [LOG, 2] the keys seen
    sick: jax.Array  # nan or infinite, or 0


def walker(i):
    """The i-th arm: its threshold moves by speed[i] at every step, and it remembers what it was shown."""

    def init(variables):
        log, keys = jnp.full((LOG, B), -1, jnp.int32), jnp.zeros((LOG, 2), jnp.uint32)
        return Walk(variables, jnp.int32(0), log, keys, jnp.float32(0))

    def propose(state, draw, stretch):
        start, steps = stretch.start, stretch.steps
        health = state.student.stats["health"][i]

        def advance(step, state):
            batch, key = draw(start + step)
            student = state.student._replace(params={"t": state.student.params["t"] + state.student.stats["speed"][i]})
            return Walk(
                student,
                state.age + 1,
                state.log.at[start + step].set(batch.index),
                state.keys.at[start + step].set(jax.random.key_data(key)),
                jnp.array([0, 0, jnp.nan, jnp.inf])[health],
            )

        state = jax.lax.fori_loop(0, steps, advance, state)
        t = jnp.where((health == NAN_STUDENT) & (steps > 0), jnp.nan, state.student.params["t"])
        return state, state.student._replace(params={"t": t})

    return Arm(str(i), init, propose)


WALKERS = tuple(walker(i) for i in range(4))
CONFIG = EV3(batch_size=B, length=2, max_length=2, exploration=0.0, takeover=0.0)


RULES = {"select": objectives.accuracy, "promise": objectives.accuracy, "config": CONFIG}


@functools.cache
def compiled(arms):
    """The initial state and the step for so many arms, 1 or 4."""
    chosen = WALKERS[:arms]

    def start(variables, pools):
        return initial_state(
            jax.random.key_data(RUN_KEY), variables, pools, apply=apply_threshold, arms=chosen, **RULES
        )

    return jax.jit(start), make_step(apply_threshold, chosen, sample, **RULES)


def begin(speeds, pools=POOLS, *, t=8, health=None):
    return compiled(len(speeds))[0](threshold(t, speeds, health), pools)


def steps_from(state, remaining, pools=POOLS):
    """Iterates; `remaining` lists what may still be spent at each iteration."""
    states, decisions = [], []
    for left in remaining:
        limit = int(state.cost) + left
        state, decision = compiled(len(state.arm_states))[1](pools, state, np.int32(limit))
        states.append(state)
        decisions.append(jax.device_get(decision))
    return states, decisions


def t_of(state):
    return float(state.current.params["t"])


@jax.jit
def explored(state, steps):
    """Proposals of all four walkers."""
    return rolled(WALKERS, state, POOLS, steps)


MANY = 10**6


# Common random numbers.


def test_a_batch_and_its_key_are_a_function_of_the_global_step_alone():
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    again = explore.draw_from(ladder(), sample, RUN_KEY)
    seen = []
    for step in (0, 1, 17, 3, 17):
        batch, key = draw(jnp.int32(step))
        assert_same((batch, jax.random.key_data(key)), (again(step)[0], jax.random.key_data(again(step)[1])))
        np.testing.assert_array_equal(batch.index, rows(step))
        np.testing.assert_array_equal(batch.inputs, POOLS.explore.inputs[batch.index])
        seen.append(tuple(np.asarray(jax.random.key_data(key))))
    assert len(set(seen)) == 4
    assert seen[2] == seen[4]
    elsewhere = explore.draw_from(POOLS.explore, sample, jax.random.key(6))
    assert differ(jax.random.key_data(elsewhere(3)[1]), jax.random.key_data(draw(3)[1]))


def test_all_arms_see_the_same_batches_and_keys():
    steps = [8, 4, 0, 8]
    made = explored(begin((1, 2, 1, 1))._replace(position=jnp.int32(5)), jnp.array(steps))
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    want = jnp.array([draw(i)[0].index for i in range(5, 13)])
    keys = jnp.array([jax.random.key_data(draw(i)[1]) for i in range(5, 13)])
    for arm_state, count in zip(made.arm_states, steps, strict=True):
        np.testing.assert_array_equal(arm_state.log[5 : 5 + count], want[:count])
        np.testing.assert_array_equal(arm_state.keys[5 : 5 + count], keys[:count])
        assert (arm_state.log[:5] == -1).all()
        assert (arm_state.log[5 + count :] == -1).all()


def test_no_global_step_is_seen_twice_while_a_run_goes_on():
    states, decisions = steps_from(begin((1,)), [MANY] * 6)
    position = 0
    for state, decision in zip(states, decisions, strict=True):
        position += int(decision.steps.max())
        assert (int(state.position), int(decision.position)) == (position, position)
    log = np.asarray(states[-1].arm_states[0].log)
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    np.testing.assert_array_equal(log[:position], [draw(i)[0].index for i in range(position)])
    assert (log[position:] == -1).all()


# A student that learns, for what needs gradients.

F, K = 4, 3
NETWORK = mlp((F,), K, hidden=(6,))
LENGTH = 6


def learnable(seed, n):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, F))
    logits = inputs @ np.random.default_rng(99).normal(size=(F, K))
    return Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(logits.argmax(1), jnp.int32),
        jnp.asarray(logits, jnp.float32),
        jnp.arange(n, dtype=jnp.int32),
        jnp.ones(n),
    )


LEARNABLE = Pools(learnable(0, N), learnable(1, 50), learnable(2, 50))
START = NETWORK.init(jax.random.key(1))


def squared(logits, batch):
    return jnp.square(logits - batch.teacher_logits).mean()


def nan_loss(logits, batch):
    return logits.sum() * jnp.nan


def poisoned(optimizer):
    """The same updates, but a state that is not finite."""

    def init(params):
        return optimizer.init(params), jnp.float32(0)

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state[0], params)
        return updates, (inner, jnp.float32(jnp.inf))

    return optax.GradientTransformation(init, update)


ADAM = optax.adam(0.05, eps_root=1e-8)  # differentiable where the second moment is 0
GOOD = gradient_arm("good", NETWORK.apply, squared, ADAM)
SLOW = gradient_arm("slow", NETWORK.apply, squared, optax.sgd(0.01), average=None)
TWIN = gradient_arm("twin", NETWORK.apply, squared, ADAM)
NAN_LOSS = gradient_arm("nan", NETWORK.apply, nan_loss, ADAM)
SICK = gradient_arm("sick", NETWORK.apply, squared, poisoned(ADAM))
LEARNERS = (GOOD, NAN_LOSS, SLOW, SICK, TWIN)
LEARNING = {
    "select": objectives.probability,
    "promise": objectives.accuracy,
    "config": EV3(batch_size=B, length=LENGTH, max_length=100, eval_batch_size=16),
}


@functools.cache
def learning(arms):
    """The initial state and the step of learners."""

    def start(pools):
        return initial_state(jax.random.key_data(RUN_KEY), START, pools, apply=NETWORK.apply, arms=arms, **LEARNING)

    return jax.jit(start), make_step(NETWORK.apply, arms, sample, **LEARNING)


BESET = (NAN_LOSS, GOOD, SICK)
begin_beset, step_beset = learning(BESET)
begin_good, step_good = learning((GOOD,))


@jax.jit
def learned(pools, steps):
    """Proposals of all learners, from the start."""
    state = SimpleNamespace(arm_states=tuple(arm.init(START) for arm in LEARNERS), position=0)
    return rolled(LEARNERS, state, pools, steps)


def proposals_of(trained, pools=LEARNABLE):
    return learned(pools, jnp.array([LENGTH * (arm in trained) for arm in LEARNERS]))


def row(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i]), tree)


def test_identical_arms_make_identical_proposals():
    made = proposals_of((GOOD, SLOW, TWIN))
    assert_same(row(made.variables, 0), row(made.variables, 4))
    assert_same(made.arm_states[0], made.arm_states[4])
    assert differ(row(made.variables, 0), row(made.variables, 2))
    assert differ(row(made.variables, 0), START)


# Broken proposals.


@pytest.mark.parametrize("broken", [[NAN_LOSS], [SICK], [NAN_LOSS, SICK]], ids=["student", "optimizer state", "both"])
def test_a_non_finite_proposal_is_discarded_alone(broken):
    """The healthy arms' proposals, their average and their states agree bit by bit with and without broken ones."""
    alone, beside = proposals_of((GOOD, SLOW)), proposals_of((GOOD, SLOW, *broken))
    assert alone.active.tolist() == beside.active.tolist() == [True, False, True, False, False, True]
    for i in (0, 2, 5):
        assert_same(row(alone.variables, i), row(beside.variables, i))
        assert finite(row(beside.variables, i))
    assert_same((alone.arm_states[0], alone.arm_states[2]), (beside.arm_states[0], beside.arm_states[2]))
    broken_states = [beside.arm_states[LEARNERS.index(arm)] for arm in broken]
    assert not any(finite(arm_state) for arm_state in broken_states)


def test_a_proposal_with_a_healthy_student_and_a_broken_optimizer_is_discarded():
    made = proposals_of((GOOD, SICK))
    assert finite(row(made.variables, 3))  # the student is in order
    assert made.active.tolist() == [True] + 5 * [False]  # nor is there an average of one


def test_a_run_beside_broken_arms():
    """Four iterations: broken arms are counted, never win, and leave a finite state."""
    first = state = begin_beset(LEARNABLE)  # a broken one leads
    discarded = 0
    for _ in range(4):
        state, decision = step_beset(LEARNABLE, state, np.int32(MANY))
        assert int(decision.discarded) == (np.asarray(decision.steps)[[0, 2]] > 0).sum()
        discarded += int(decision.discarded)
        assert int(decision.selected) == 1
        assert np.isnan(np.asarray(decision.scores)[[0, 2]]).all()
        assert finite(state)
    assert discarded >= 2
    assert int(state.leader) == 1
    assert state.arm_wins.tolist()[::2] == [0, 0]
    assert float(state.current_evidence.select.mean()) > float(first.current_evidence.select.mean())


def test_broken_walkers_never_win_and_are_not_averaged():
    start = begin((1, 1, 20, 4), health=(SOUND, NAN_STUDENT, NAN_STATE, SOUND))
    (state,), (decision,) = steps_from(start, [MANY])
    assert decision.discarded == 2
    assert decision.selected == 3
    np.testing.assert_array_equal(
        decision.scores, np.float32([10 / N, NAN, NAN, 16 / N, 13 / N])
    )  # average: 8 + (2+8)/2
    assert t_of(state) == 16
    assert finite(state)


def test_when_every_proposal_is_broken_nothing_moves_and_the_run_goes_on():
    start = begin((9, 9, 9, 9), health=(NAN_STUDENT, INF_STATE, NAN_STATE, NAN_STUDENT))
    states, decisions = steps_from(start, [MANY, MANY, MANY, 0])
    for state, decision in zip(states, decisions, strict=True):
        assert (decision.verdict, decision.selected, decision.promoted_arm) == (KEEP, -1, -1)
        assert decision.discarded == (decision.steps > 0).sum()
        assert np.isnan(decision.scores).all()
        assert_same(untouched(state), untouched(start))
        assert finite(state)
    assert [int(state.iteration) for state in states] == [1, 2, 3, 4]
    assert 0 < int(states[0].cost) < int(states[2].cost)
    assert bool(states[3].closed)


def test_an_arm_recovers_from_a_broken_iteration():
    """It goes on from the state before it: here the inputs of the first two batches are nan."""
    inputs = LEARNABLE.explore.inputs.at[: 2 * B].set(NAN)
    pools = LEARNABLE._replace(explore=LEARNABLE.explore._replace(inputs=inputs))
    state, verdicts = begin_good(pools), []
    for _ in range(2):
        state, decision = step_good(pools, state, np.int32(MANY))
        verdicts.append((int(decision.discarded), int(decision.verdict) in (ADOPT, PROMOTE)))
    assert verdicts == [(1, False), (0, True)]
    assert finite(state)


# Adopted and rejected proposals.


def untouched(state):
    """What an iteration without adoption, promotion or roll back must leave bit-identical."""
    return (
        state.key,
        state.current,
        state.current_evidence,
        state.champion,
        state.champion_evidence,
        state.champion_decide,
        state.arm_states,
        state.arm_wins,
        state.arm_promotions,
        state.leader,
        state.current_arm,
    )


@pytest.mark.parametrize("speeds", [(-1,), (0,), (0, 0, -3, -1)], ids=str)
def test_a_rejected_proposal_leaves_no_trace(speeds):
    """Worse or equal proposals: only counters, the trajectory length and the arms' standing change."""
    start = begin(speeds, t=30)
    states, decisions = steps_from(start, [MANY] * 4)
    for i, (state, decision) in enumerate(zip(states, decisions, strict=True)):
        assert decision.verdict == KEEP
        assert_same(untouched(state), untouched(start))
        assert (int(state.stale), int(state.iteration)) == (i + 1, i + 1)
        assert finite(state)


def test_an_adopted_proposal_carries_its_own_state_and_the_others_start_afresh():
    start = begin((1, 3, 2, 0))
    (first, second), decisions = steps_from(start, [MANY, MANY])
    assert (int(decisions[0].selected), int(first.current_arm), int(first.leader)) == (1, 1, 1)
    made = explored(start, decisions[0].steps)
    assert_same(first.arm_states[1], made.arm_states[1])
    assert_same(first.current, row(made.variables, 1))
    for i in (0, 2, 3):
        assert_same(first.arm_states[i], WALKERS[i].init(first.current))
    np.testing.assert_array_equal(first.arm_wins, [0, 1, 0, 0])
    assert int(second.arm_states[1].age) == 4  # the winner goes on ...
    assert t_of(second) == 8 + 3 * 4
    assert (second.arm_states[1].log[:4] >= 0).all()  # ... with all that it remembers


def test_an_average_that_wins_has_no_arm_s_own_state():
    """From 8 to 0 and 48; the average, 24, is right on all of assess."""
    pools = POOLS._replace(assess=make_split(np.arange(N) + 0.5, np.arange(N) >= 24))
    start = begin((-4, 20, -4, 20), pools)
    (state,), (decision,) = steps_from(start, [MANY], pools)
    assert decision.selected == 4
    assert (int(state.current_arm), t_of(state)) == (4, 24)
    for i, arm_state in enumerate(state.arm_states):
        assert_same(arm_state, WALKERS[i].init(state.current))
    np.testing.assert_array_equal(state.arm_wins, [0, 0, 0, 0])
    assert int(state.leader) == int(start.leader)


def test_two_adopted_iterations_are_one_uninterrupted_trajectory():
    """The same compiled step makes 2 x 6 steps and 1 x 12: the students and all optimizer states agree bit by bit."""
    start = begin_good(LEARNABLE)
    half, one = step_good(LEARNABLE, start, np.int32(MANY))
    whole, other = step_good(LEARNABLE, half._replace(length=jnp.float32(LENGTH)), np.int32(MANY))
    uninterrupted, third = step_good(LEARNABLE, start._replace(length=jnp.float32(2 * LENGTH)), np.int32(MANY))
    for decision in (one, other, third):
        assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert [int(d.steps[0]) for d in (one, other, third)] == [LENGTH, LENGTH, 2 * LENGTH]
    assert_same(whole.current, uninterrupted.current)
    assert_same(whole.arm_states, uninterrupted.arm_states)
    assert_same(whole.current_evidence, uninterrupted.current_evidence)


def test_a_rejected_trajectory_does_not_reach_the_next_one():
    """An iteration that assess rejects, then one that it adopts: the arm's state is then that of its own steps alone."""
    start = begin_good(LEARNABLE)
    perfect, poor = (jax.tree.map(lambda leaf, x=x: jnp.full_like(leaf, x), start.current_evidence) for x in (1, 0))
    kept, decision = step_good(LEARNABLE, start._replace(current_evidence=perfect), np.int32(MANY))
    assert int(decision.verdict) == KEEP
    again = kept._replace(current_evidence=poor, length=jnp.float32(LENGTH))
    after, decision = step_good(LEARNABLE, again, np.int32(MANY))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert int(after.arm_states[0].age) == LENGTH
    fresh, _ = step_good(LEARNABLE, again._replace(arm_states=start.arm_states), np.int32(MANY))
    assert_same((after.arm_states, after.current), (fresh.arm_states, fresh.current))


# Ties.


def test_a_tie_on_assess_keeps_the_incumbent():
    states, decisions = steps_from(begin((0, 0, 0, 0)), [MANY, MANY])
    assert [d.verdict for d in decisions] == [KEEP, KEEP]
    assert [float(d.gain) for d in decisions] == [0, 0]
    assert int(states[-1].arm_wins.sum()) == 0


@pytest.mark.parametrize("leader", [0, 1, 3])
def test_a_tie_among_proposals_goes_to_the_leader(leader):
    start = begin((1, 1, 1, 1))._replace(leader=jnp.int32(leader))  # their average ties too
    _, (decision,) = steps_from(start, [MANY])
    assert decision.selected == leader
    assert len(set(decision.scores.tolist())) == 1


@pytest.mark.parametrize(
    ("decide", "counts"),
    [
        (make_split(np.repeat(np.arange(N // 2) + 0.5, 2), np.tile([0, 1], N // 2)), (16, 16)),  # as many lost as won
        (make_split(np.full(N, 1000.0)), (0, 0)),  # no disagreement: all wrong
        (make_split(np.full(N, -1000.0)), (0, 0)),  # all right
    ],
    ids=["wins and losses", "both wrong", "both right"],
)
def test_a_tie_on_decide_keeps_the_champion(decide, counts):
    pools = POOLS._replace(decide=decide)
    start = begin((8,), pools)
    states, decisions = steps_from(start, [MANY, 0], pools)
    assert any(d.tested for d in decisions)
    for state, decision in zip(states, decisions, strict=True):
        assert decision.verdict in (KEEP, ADOPT)
        assert decision.promoted_arm == -1
        if decision.tested:
            assert (decision.wins, decision.losses) == counts
            assert decision.p_value > decision.alpha
        assert_same(state.champion, start.champion)
        assert_same(state.champion_decide, start.champion_decide)
        assert int(state.budget.promotions) == 0
    assert t_of(states[-1]) == 24  # exploration did move


# Promotion and roll back.


def test_a_promotion_is_proved_on_decide():
    (state,), (decision,) = steps_from(begin((8, 1, 0, 0)), [MANY])
    assert (decision.verdict, decision.promoted_arm, decision.tested) == (PROMOTE, 0, True)
    assert (decision.wins, decision.losses, decision.decide_n) == (16, 0, N)
    assert decision.p_value == pytest.approx(2**-16, rel=1e-4)
    assert_same(state.champion, state.current)
    assert_same(state.champion_evidence, state.current_evidence)
    np.testing.assert_array_equal(state.champion_decide, (np.arange(N) < 24).astype(np.float32))
    assert decision.champion_accuracy == pytest.approx(24 / N)
    np.testing.assert_array_equal(state.arm_promotions, [1, 0, 0, 0])
    assert (int(state.budget.tests), int(state.budget.promotions)) == (1, 1)
    assert decision.alpha == pytest.approx(adapt.SHARE * CONFIG.delta)
    assert float(state.budget.left) == pytest.approx(adapt.SHARE * CONFIG.delta)
    assert int(state.tested_cost) == int(state.cost)


def test_assess_alone_promotes_nobody():
    """Better on assess beyond doubt, worse on decide: not promoted, however often it is asked."""
    pools = POOLS._replace(decide=make_split(np.arange(N) + 0.5, np.ones(N)))
    start = begin((8,), pools)
    states, decisions = steps_from(start, [MANY, MANY, MANY, 0], pools)
    assert any(d.tested and d.losses > d.wins for d in decisions)
    assert all(d.promoted_arm == -1 for d in decisions)
    assert_same(states[-1].champion, start.champion)


def fallen(t, speeds):
    """Exploration stands at t, the champion at 40."""
    high = begin(speeds, t=40)
    return begin(speeds, t=t)._replace(
        champion=high.champion, champion_evidence=high.champion_evidence, champion_decide=high.champion_decide
    )


@pytest.mark.parametrize("speeds", [(0,), (1, 2, 0, -1)], ids=["kept", "adopted"])
def test_a_student_shown_worse_than_the_champion_is_rolled_back(speeds):
    start = fallen(24, speeds)
    (state,), (decision,) = steps_from(start, [MANY])
    assert decision.verdict == ROLL_BACK
    assert_same(state.current, start.champion)
    assert_same(state.champion, start.champion)
    assert_same(state.current_evidence, start.champion_evidence)
    assert_same(state.champion_evidence, start.champion_evidence)
    assert_same(state.champion_decide, start.champion_decide)
    assert_same(state.arm_states, tuple(arm.init(start.champion) for arm in WALKERS[: len(speeds)]))
    assert (int(state.current_arm), int(state.stale), int(state.budget.tests)) == (-1, 0, 0)
    assert decision.current_accuracy == pytest.approx(40 / N)
    (again,), (decision,) = steps_from(state, [MANY])
    assert t_of(again) == 40 + 2 * max(speeds)  # exploration goes on from the champion


def test_a_small_loss_is_no_reason_to_roll_back():
    (state,), (decision,) = steps_from(fallen(38, (0,)), [MANY])  # two examples lost: p = 1/4
    assert decision.verdict == KEEP
    assert t_of(state) == 38


def test_the_ledger_adds_up():
    """Costs, positions, promotions and what verdicts say, over a whole run of four arms in a noisy world."""
    rng = np.random.default_rng(0)
    pools = Pools(*(make_split(rng.uniform(0, 60, N), rng.random(N) < 0.1) for _ in range(3)))
    before = begin((2, -0.5, 0.25, 0), pools)
    spent, promoted = 0, 0
    while not bool(before.closed):
        (state,), (d,) = steps_from(before, [50 - spent], pools)
        verdict = int(d.verdict)
        spent += int(d.steps.sum())
        promoted += verdict == PROMOTE
        assert int(state.cost) == int(d.cost) == int(state.arm_cost.sum()) == spent
        assert int(state.position) == int(before.position) + int(d.steps.max())
        assert int(state.budget.promotions) == promoted == int(state.arm_promotions.sum())
        assert int(state.budget.tests) - int(before.budget.tests) == int(d.tested)
        assert (verdict == PROMOTE) == (d.promoted_arm >= 0) == differ(state.champion, before.champion)
        if verdict == PROMOTE:
            assert d.tested
            assert d.p_value <= d.alpha
        if verdict == KEEP:
            assert_same(untouched(state), untouched(before))
        if verdict in (ADOPT, PROMOTE) and differ(state.current, before.current):
            assert float(d.gain) > 0
        assert float(d.alpha) <= float(before.budget.left) <= CONFIG.delta * (1 + 1e-6)
        before = state
    assert promoted >= 1
    assert spent == 50


def test_a_limit_already_passed_closes_the_run():
    (state,), _ = steps_from(begin((1,)), [MANY])
    (closed,), (decision,) = steps_from(state, [-1])
    assert (int(decision.steps.sum()), int(closed.cost), bool(closed.closed)) == (0, int(state.cost), True)
    assert_same(closed.current, state.current)


# Held-out splits never meet a gradient.


def scrambled(split):
    rng = np.random.default_rng(7)
    return split._replace(
        inputs=jnp.asarray(100 * rng.normal(size=split.inputs.shape), jnp.float32),
        labels=jnp.asarray(rng.permutation(split.labels)),
        teacher_logits=-split.teacher_logits,
        weight=5 * split.weight,
    )


def test_proposals_do_not_depend_on_assess_or_decide():
    other = LEARNABLE._replace(assess=scrambled(LEARNABLE.assess), decide=scrambled(LEARNABLE.decide))
    here, there = proposals_of((GOOD, SLOW)), proposals_of((GOOD, SLOW), other)
    assert_same(here, there)
    assert differ(here, proposals_of((GOOD, SLOW), LEARNABLE._replace(explore=scrambled(LEARNABLE.explore))))


def test_no_gradient_of_an_iteration_reaches_a_held_out_split():
    """Forward derivatives of a whole, adopted iteration: zero along assess and decide, not along explore."""
    start = begin_good(LEARNABLE)
    at = {
        name: (getattr(LEARNABLE, name).inputs, getattr(LEARNABLE, name).teacher_logits)
        for name in LEARNABLE._fields[:3]
    }

    def outcome(floats):
        splits = {
            name: getattr(LEARNABLE, name)._replace(inputs=inputs, teacher_logits=logits)
            for name, (inputs, logits) in floats.items()
        }
        state, decision = step_good(LEARNABLE._replace(**splits), start, np.int32(MANY))
        return (state.current, state.champion, state.arm_states), decision.verdict

    derivative = jax.jit(lambda tangents: jax.jvp(outcome, (at,), (tangents,)))
    for name in at:
        tangents = {
            other: jax.tree.map(lambda leaf, on=other == name: jnp.full_like(leaf, on), at[other]) for other in at
        }
        (_, verdict), (moves, _) = derivative(tangents)
        assert int(verdict) in (ADOPT, PROMOTE)
        floats = [leaf for leaf in jax.tree.leaves(moves) if leaf.dtype == jnp.float32]
        assert len(floats) > 10
        assert any(bool((leaf != 0).any()) for leaf in floats) == (name == "explore")


def test_the_core_never_receives_the_test_split():
    assert Pools._fields == ("explore", "assess", "decide", "seen")  # the last is some of explore
    for module in (adapt, allocate, assess, explore, step_module):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            assert "test" not in inspect.signature(function).parameters, f"{module.__name__}.{name}"
    for path in CORE.glob("*.py"):
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "test" not in attributes, path.name


# Assess.


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 25])
def test_a_held_out_split_is_evaluated_whole_in_order_once(n):
    """Five at a time: every example's logits are its own, and none is dropped, repeated or padded."""

    def network(variables, inputs, *, train, key=None):
        assert not train
        return inputs * variables.params["t"] + jnp.array([0.0, 1.0]), variables

    inputs = make_split(np.arange(n) * 3.0 + 1).inputs
    logits = assess.logits_of(network, threshold(2), inputs, batch_size=5)
    np.testing.assert_array_equal(logits, np.stack([np.arange(n) * 6.0 + 2, np.arange(n) * 6.0 + 3], 1))
    np.testing.assert_array_equal(logits, network(threshold(2), inputs, train=False)[0])


def test_chunks_change_no_score():
    split = LEARNABLE.assess
    once = assess.logits_of(NETWORK.apply, START, split.inputs, batch_size=1000)
    for batch_size in (7, 49, 50):
        chunked = assess.logits_of(NETWORK.apply, START, split.inputs, batch_size=batch_size)
        np.testing.assert_allclose(chunked, once, rtol=1e-5, atol=1e-6)
        measures = assess.Measures(objectives.log_likelihood, objectives.accuracy)
        evidence = assess.score(NETWORK.apply, START, split, measures, batch_size=batch_size)
        np.testing.assert_allclose(evidence.select, objectives.log_likelihood(once, split), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(evidence.promise, objectives.accuracy(once, split))


def test_assess_scores_every_proposal_on_every_example():
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), threshold(3), threshold(50), threshold(NAN), threshold(23)
    )
    proposals = Proposals(stacked, (), jnp.array([True, True, False, False]))
    evidence = assess.assess(
        apply_threshold,
        proposals,
        ladder(23),
        assess.Measures(lambda logits, split: logits[:, 0] + 0 * split.labels, objectives.accuracy),
        batch_size=5,
    )
    x = np.arange(23) + 0.5
    np.testing.assert_array_equal(evidence.select[:2], [3 - x, 50 - x])
    np.testing.assert_array_equal(evidence.promise[:2], [x < 3, x < 50])
    assert np.isnan(evidence.select[2:]).all()
    assert np.isnan(evidence.promise[2:]).all()


def test_paired():
    scores, reference = jnp.array([[1.0, 0, 1, 1], [0, 0, 0, 0]]), jnp.array([0.0, 0, 1, 0])
    mean, se = assess.paired(scores, reference)
    np.testing.assert_allclose(mean, [0.5, -0.25])
    differences = np.array([[1, 0, 0, 1], [0, 0, -1, 0]])
    np.testing.assert_allclose(se, differences.std(1, ddof=1) / 2, rtol=1e-6)
    assert float(assess.paired(jnp.ones(1), jnp.zeros(1))[1]) == 0  # one example: no spread, and no division by zero


# Averages of proposals.


def test_the_average_is_the_mean_of_the_active_rows():
    rng = np.random.default_rng(0)
    leaves = rng.normal(size=(4, 3, 2)).astype(np.float32)
    leaves[1] = NAN
    leaves[3] = np.inf
    variables = Variables({"w": jnp.asarray(leaves)}, {"n": jnp.array([4, 1, 9, 1])})
    got = explore.mean_of(variables, jnp.array([True, False, True, False]))
    np.testing.assert_allclose(got.params["w"], (leaves[0] + leaves[2]) / 2, rtol=1e-6)
    assert got.stats["n"].dtype == jnp.int32
    nothing = explore.mean_of(variables, jnp.zeros(4, bool))
    assert finite(nothing)


@pytest.mark.parametrize(
    ("steps", "active"), [((3, 3, 0, 0), True), ((3, 0, 0, 0), False), ((0, 0, 0, 0), False), ((3, 0, 3, 0), False)]
)
def test_an_average_needs_two_sound_proposals(steps, active):
    start = begin((1, 3, 5, 5), health=(SOUND, SOUND, NAN_STUDENT, SOUND))
    made = explored(start, jnp.array(steps))
    assert made.active.tolist() == [steps[0] > 0, steps[1] > 0, False, False, active]
    if active:
        assert float(made.variables.params["t"][4]) == 8 + (3 + 9) / 2


@pytest.mark.parametrize(
    ("tree", "want"),
    [
        ({"a": 1.0, "b": 2}, True),
        ({"a": NAN, "b": 2}, False),
        ({"a": 1.0, "b": -np.inf}, False),
        ({"a": np.array([[1, 2], [3, np.nan]], np.float32)}, False),
        ({"a": np.array([1.0], jnp.bfloat16), "b": np.array([np.inf], jnp.bfloat16)}, False),
    ],
)
def test_all_finite(tree, want):
    assert bool(explore.all_finite(jax.tree.map(jnp.asarray, tree))) == want


# The whole core on nulls.


def test_promotions_of_null_students_stay_within_the_error_budget():
    """Whole runs in a world where every student is right on a random 60 % of the population: none is truly better.

    Each arm proposes an unrelated student each time, assess picks the best of them by luck, and every promotion is false.
    """
    runs, n, iterations, delta = 1000, 96, 6, 0.3

    def hashed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * np.uint32(factor)
        return x

    def apply(variables, inputs, *, train, key=None):
        bits = hashed(hashed(variables.params["seed"].view(jnp.uint32)) ^ inputs[:, 0].astype(jnp.uint32))
        right = jnp.where(bits < np.uint32(0.6 * 2**32), 1.0, -1.0)
        return jnp.stack([right, jnp.zeros_like(right)], 1), variables

    def drawer(i):
        def propose(state, draw, stretch):
            start, steps = stretch.start, stretch.steps
            bits = hashed(jax.random.key_data(draw(start)[1])[0] + np.uint32(i))
            fresh = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32)  # finite: 1 to 2
            return state, Variables({"seed": jnp.where(steps > 0, fresh, state)}, {})

        return Arm(str(i), lambda variables: variables.params["seed"], propose)

    arms = [drawer(i) for i in range(2)]
    config = EV3(batch_size=1, length=1, max_length=1, exploration=1.0, delta=delta, eval_batch_size=n)
    rules = {"select": objectives.accuracy, "promise": objectives.accuracy, "config": config}
    step = make_step(apply, arms, lambda pool, step: pool, **rules)

    def run(key):
        names = jax.random.randint(key, (2, n), 0, 2**22).astype(jnp.float32)  # exact in float32
        pools = Pools(make_split(jnp.zeros(1)), make_split(names[0]), make_split(names[1]))
        start = Variables({"seed": jnp.float32(1.5)}, {})
        state = initial_state(jax.random.key_data(key), start, pools, apply=apply, arms=arms, **rules)
        state, decisions = jax.lax.scan(lambda state, left: step(pools, state, left), state, lefts)
        return state.budget, decisions.tested.sum()

    lefts = jnp.where(jnp.arange(iterations) < iterations - 1, MANY, 0)
    budget, tested = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), runs))
    false = float((budget.promotions > 0).mean())
    assert false <= delta + 3 * (delta * (1 - delta) / runs) ** 0.5
    assert float(tested.mean()) > 0.5  # decide was asked, often enough for the bound to mean something
    assert float(budget.left.max()) <= delta * (1 + 1e-5)
