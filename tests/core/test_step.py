"""The step's rules: common random numbers, proposals that are rejected and adopted, ties, promotion and roll back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning_checks import GOOD, LEARNABLE, LENGTH, SLOW, START, TWIN, begin_good, proposals_of, step_good
from random_walks import (
    CONFIG,
    MANY,
    POOLS,
    RUN_KEY,
    WALKERS,
    N,
    assert_same,
    begin,
    differ,
    explored,
    finite,
    ladder,
    make_split,
    replaced,
    row,
    rows,
    sample,
    steps_from,
    t_of,
    untouched,
)

from ev3_distill.core import adapt, explore
from ev3_distill.types import ADOPT, KEEP, PROMOTE, ROLL_BACK, Pools

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
    made = explored(replaced(begin((1, 2, 1, 1)), clock={"position": jnp.int32(5)}), jnp.array(steps))
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
        assert (int(state.clock.position), int(decision.position)) == (position, position)
    log = np.asarray(states[-1].arms.states[0].log)
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    np.testing.assert_array_equal(log[:position], [draw(i)[0].index for i in range(position)])
    assert (log[position:] == -1).all()


def test_identical_arms_make_identical_proposals():
    made = proposals_of((GOOD, SLOW, TWIN))
    assert_same(row(made.variables, 0), row(made.variables, 4))
    assert_same(made.arm_states[0], made.arm_states[4])
    assert differ(row(made.variables, 0), row(made.variables, 2))
    assert differ(row(made.variables, 0), START)


# Adopted and rejected proposals.


@pytest.mark.parametrize("speeds", [(-1,), (0,), (0, 0, -3, -1)], ids=str)
def test_a_rejected_proposal_leaves_no_trace(speeds):
    """Worse or equal proposals: only counters, the trajectory length and the arms' standing change."""
    start = begin(speeds, t=30)
    states, decisions = steps_from(start, [MANY] * 4)
    for i, (state, decision) in enumerate(zip(states, decisions, strict=True)):
        assert decision.verdict == KEEP
        assert_same(untouched(state), untouched(start))
        assert (int(state.clock.stale), int(state.clock.iteration)) == (i + 1, i + 1)
        assert finite(state)


def test_an_adopted_proposal_carries_its_own_state_and_the_others_start_afresh():
    start = begin((1, 3, 2, 0))
    (first, second), decisions = steps_from(start, [MANY, MANY])
    assert (int(decisions[0].selected), int(first.current.arm), int(first.arms.leader)) == (1, 1, 1)
    made = explored(start, decisions[0].steps)
    assert_same(first.arms.states[1], made.arm_states[1])
    assert_same(first.current.variables, row(made.variables, 1))
    for i in (0, 2, 3):
        assert_same(first.arms.states[i], WALKERS[i].init(first.current.variables))
    np.testing.assert_array_equal(first.arms.wins, [0, 1, 0, 0])
    assert int(second.arms.states[1].age) == 4  # the winner goes on ...
    assert t_of(second) == 8 + 3 * 4
    assert (second.arms.states[1].log[:4] >= 0).all()  # ... with all that it remembers


def test_an_average_that_wins_has_no_arm_s_own_state():
    """From 8 to 0 and 48; the average, 24, is right on all of assess."""
    pools = POOLS._replace(assess=make_split(np.arange(N) + 0.5, np.arange(N) >= 24))
    start = begin((-4, 20, -4, 20), pools)
    (state,), (decision,) = steps_from(start, [MANY], pools)
    assert decision.selected == 4
    assert (int(state.current.arm), t_of(state)) == (4, 24)
    for i, arm_state in enumerate(state.arms.states):
        assert_same(arm_state, WALKERS[i].init(state.current.variables))
    np.testing.assert_array_equal(state.arms.wins, [0, 0, 0, 0])
    assert int(state.arms.leader) == int(start.arms.leader)


def test_two_adopted_iterations_are_one_uninterrupted_trajectory():
    """The same compiled step makes 2 x 6 steps and 1 x 12: the students and all optimizer states agree bit by bit."""
    start = begin_good(LEARNABLE)
    half, one = step_good(LEARNABLE, start, np.int32(MANY))
    whole, other = step_good(LEARNABLE, replaced(half, arms={"length": jnp.float32(LENGTH)}), np.int32(MANY))
    uninterrupted, third = step_good(
        LEARNABLE, replaced(start, arms={"length": jnp.float32(2 * LENGTH)}), np.int32(MANY)
    )
    for decision in (one, other, third):
        assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert [int(d.steps[0]) for d in (one, other, third)] == [LENGTH, LENGTH, 2 * LENGTH]
    assert_same(whole.current.variables, uninterrupted.current.variables)
    assert_same(whole.arms.states, uninterrupted.arms.states)
    assert_same(whole.current.evidence, uninterrupted.current.evidence)


def test_a_rejected_trajectory_does_not_reach_the_next_one():
    """An iteration that assess rejects, then one that it adopts: the arm's state is then that of its own steps alone."""
    start = begin_good(LEARNABLE)
    perfect, poor = (jax.tree.map(lambda leaf, x=x: jnp.full_like(leaf, x), start.current.evidence) for x in (1, 0))
    kept, decision = step_good(LEARNABLE, replaced(start, current={"evidence": perfect}), np.int32(MANY))
    assert int(decision.verdict) == KEEP
    again = replaced(kept, current={"evidence": poor}, arms={"length": jnp.float32(LENGTH)})
    after, decision = step_good(LEARNABLE, again, np.int32(MANY))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert int(after.arms.states[0].age) == LENGTH
    fresh, _ = step_good(LEARNABLE, replaced(again, arms={"states": start.arms.states}), np.int32(MANY))
    assert_same((after.arms.states, after.current.variables), (fresh.arms.states, fresh.current.variables))


# Ties.


def test_a_tie_on_assess_keeps_the_incumbent():
    states, decisions = steps_from(begin((0, 0, 0, 0)), [MANY, MANY])
    assert [d.verdict for d in decisions] == [KEEP, KEEP]
    assert [float(d.gain) for d in decisions] == [0, 0]
    assert int(states[-1].arms.wins.sum()) == 0


@pytest.mark.parametrize("leader", [0, 1, 3])
def test_a_tie_among_proposals_goes_to_the_leader(leader):
    start = replaced(begin((1, 1, 1, 1)), arms={"leader": jnp.int32(leader)})  # their average ties too
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
    assert any(d.promotion.tested for d in decisions)
    for state, decision in zip(states, decisions, strict=True):
        assert decision.verdict in (KEEP, ADOPT)
        assert decision.promoted_arm == -1
        if decision.promotion.tested:
            assert (decision.promotion.wins, decision.promotion.losses) == counts
            assert decision.promotion.p_value > decision.promotion.alpha
        assert_same(state.champion, start.champion)
        assert_same(state.champion.decide, start.champion.decide)
        assert int(state.budget.promotions) == 0
    assert t_of(states[-1]) == 24  # exploration did move


# Promotion and roll back.


def test_a_promotion_is_proved_on_decide():
    (state,), (decision,) = steps_from(begin((8, 1, 0, 0)), [MANY])
    assert (decision.verdict, decision.promoted_arm, decision.promotion.tested) == (PROMOTE, 0, True)
    assert (decision.promotion.wins, decision.promotion.losses, decision.promotion.n) == (16, 0, N)
    assert decision.promotion.p_value == pytest.approx(2**-16, rel=1e-4)
    assert_same(state.champion.variables, state.current.variables)
    assert_same(state.champion.evidence, state.current.evidence)
    np.testing.assert_array_equal(state.champion.decide, (np.arange(N) < 24).astype(np.float32))
    assert decision.champion_score == pytest.approx(24 / N)
    np.testing.assert_array_equal(state.arms.promotions, [1, 0, 0, 0])
    assert (int(state.budget.tests), int(state.budget.promotions)) == (1, 1)
    assert decision.promotion.alpha == pytest.approx(adapt.SHARE * CONFIG.delta)
    assert float(state.budget.left) == pytest.approx(adapt.SHARE * CONFIG.delta)
    assert int(state.clock.tested_cost) == int(state.clock.cost)


def test_assess_alone_promotes_nobody():
    """Better on assess beyond doubt, worse on decide: not promoted, however often it is asked."""
    pools = POOLS._replace(decide=make_split(np.arange(N) + 0.5, np.ones(N)))
    start = begin((8,), pools)
    states, decisions = steps_from(start, [MANY, MANY, MANY, 0], pools)
    assert any(d.promotion.tested and d.promotion.losses > d.promotion.wins for d in decisions)
    assert all(d.promoted_arm == -1 for d in decisions)
    assert_same(states[-1].champion, start.champion)


def fallen(t, speeds):
    """Exploration stands at t, the champion at 40."""
    return begin(speeds, t=t)._replace(champion=begin(speeds, t=40).champion)


@pytest.mark.parametrize("speeds", [(0,), (1, 2, 0, -1)], ids=["kept", "adopted"])
def test_a_student_shown_worse_than_the_champion_is_rolled_back(speeds):
    start = fallen(24, speeds)
    (state,), (decision,) = steps_from(start, [MANY])
    assert decision.verdict == ROLL_BACK
    assert_same(state.current.variables, start.champion.variables)
    assert_same(state.champion, start.champion)
    assert_same(state.current.evidence, start.champion.evidence)
    assert_same(state.champion.evidence, start.champion.evidence)
    assert_same(state.champion.decide, start.champion.decide)
    assert_same(state.arms.states, tuple(arm.init(start.champion.variables) for arm in WALKERS[: len(speeds)]))
    assert (int(state.current.arm), int(state.clock.stale), int(state.budget.tests)) == (-1, 0, 0)
    assert decision.current_score == pytest.approx(40 / N)
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
        assert int(state.clock.cost) == int(d.cost) == int(state.arms.cost.sum()) == spent
        assert int(state.clock.position) == int(before.clock.position) + int(d.steps.max())
        assert int(state.budget.promotions) == promoted == int(state.arms.promotions.sum())
        assert int(state.budget.tests) - int(before.budget.tests) == int(d.promotion.tested)
        assert (
            (verdict == PROMOTE) == (d.promoted_arm >= 0) == differ(state.champion.variables, before.champion.variables)
        )
        if verdict == PROMOTE:
            assert d.promotion.tested
            assert d.promotion.p_value <= d.promotion.alpha
        if verdict == KEEP:
            assert_same(untouched(state), untouched(before))
        if verdict in (ADOPT, PROMOTE) and differ(state.current.variables, before.current.variables):
            assert float(d.gain) > 0
        assert float(d.promotion.alpha) <= float(before.budget.left) <= CONFIG.delta * (1 + 1e-6)
        before = state
    assert promoted >= 1
    assert spent == 50


def test_a_limit_already_passed_closes_the_run():
    (state,), _ = steps_from(begin((1,)), [MANY])
    (closed,), (decision,) = steps_from(state, [-1])
    assert (int(decision.steps.sum()), int(closed.clock.cost), bool(closed.closed)) == (0, int(state.clock.cost), True)
    assert_same(closed.current, state.current)
