"""Rules of one step: common random numbers, adoption and rejection, ties, promotion, roll-back."""

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
    finite,
    ladder,
    make_split,
    parts_kept_by_rejection,
    proposals_at,
    replace_fields,
    row,
    rows,
    sample,
    scored,
    steps_from,
    t_of,
)

from ev3_distill.core import adapt, explore
from ev3_distill.types import ADOPT, KEEP, PROMOTE, ROLL_BACK, Pools

# Common random numbers.


def test_batch_and_key_depend_only_on_the_global_step():
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    repeat = explore.draw_from(ladder(), sample, RUN_KEY)
    key_data = []
    for step in (0, 1, 17, 3, 17):
        batch, key = draw(jnp.int32(step))
        assert_same((batch, jax.random.key_data(key)), (repeat(step)[0], jax.random.key_data(repeat(step)[1])))
        np.testing.assert_array_equal(batch.index, rows(step))
        np.testing.assert_array_equal(batch.inputs, POOLS.explore.inputs[batch.index])
        key_data.append(tuple(np.asarray(jax.random.key_data(key))))
    assert len(set(key_data)) == 4
    assert key_data[2] == key_data[4]
    other_run = explore.draw_from(POOLS.explore, sample, jax.random.key(6))
    assert differ(jax.random.key_data(other_run(3)[1]), jax.random.key_data(draw(3)[1]))


def test_all_arms_see_the_same_batches_and_keys():
    steps = [8, 4, 0, 8]
    proposals = proposals_at(replace_fields(begin((1, 2, 1, 1)), clock={"position": jnp.int32(5)}), jnp.array(steps))
    draw = explore.draw_from(POOLS.explore, sample, RUN_KEY)
    want = jnp.array([draw(i)[0].index for i in range(5, 13)])
    keys = jnp.array([jax.random.key_data(draw(i)[1]) for i in range(5, 13)])
    for arm_state, count in zip(proposals.arm_states, steps, strict=True):
        np.testing.assert_array_equal(arm_state.log[5 : 5 + count], want[:count])
        np.testing.assert_array_equal(arm_state.keys[5 : 5 + count], keys[:count])
        assert (arm_state.log[:5] == -1).all()
        assert (arm_state.log[5 + count :] == -1).all()


def test_each_global_step_is_used_once():
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
    proposals = proposals_of((GOOD, SLOW, TWIN))
    assert_same(row(proposals.variables, 0), row(proposals.variables, 4))
    assert_same(proposals.arm_states[0], proposals.arm_states[4])
    assert differ(row(proposals.variables, 0), row(proposals.variables, 2))
    assert differ(row(proposals.variables, 0), START)


# Adopted and rejected proposals.


@pytest.mark.parametrize("speeds", [(-1,), (0,), (0, 0, -3, -1)], ids=str)
def test_rejected_proposal_changes_only_counters(speeds):
    """After a worse or equal proposal only counters, values and the arms' own trajectories change."""
    start = begin(speeds, t=30)
    states, decisions = steps_from(start, [MANY] * 4)
    for i, (state, decision) in enumerate(zip(states, decisions, strict=True)):
        assert decision.verdict == KEEP
        assert_same(parts_kept_by_rejection(state), parts_kept_by_rejection(start))
        assert (int(state.clock.stale), int(state.clock.iteration)) == (i + 1, i + 1)
        assert [int(arm_state.age) for arm_state in state.arms.states] == [2 * (i + 1)] * len(speeds)
        assert finite(state)


def test_every_arm_continues_its_own_trajectory_after_an_adoption():
    start = begin((1, 3, 2, 0))
    (first, second), decisions = steps_from(start, [MANY, MANY])
    assert (int(decisions[0].selected), int(first.current.arm), int(first.arms.leader)) == (1, 1, 1)
    proposals = proposals_at(start, decisions[0].steps)
    assert_same(first.arms.states, proposals.arm_states)
    assert_same(first.current.variables, row(proposals.variables, 1))
    np.testing.assert_array_equal(first.arms.wins, [0, 1, 0, 0])
    for arm_state, speed in zip(second.arms.states, (1, 3, 2, 0), strict=True):
        assert (int(arm_state.age), float(arm_state.student.params["t"])) == (4, 8 + 4 * speed)
        assert (arm_state.log[:4] >= 0).all()  # the log of the first iteration is still there
    assert t_of(second) == 8 + 3 * 4


def test_two_iterations_equal_one_of_twice_the_length():
    """2 x 6 steps and 1 x 12 by the same compiled step give the same student and optimizer states, bit for bit."""
    start = replace_fields(scored(begin_good(LEARNABLE), 0), clock={"cost": jnp.int32(60)})
    first, decision_1 = step_good(LEARNABLE, start, np.int32(50 * LENGTH))
    second, decision_2 = step_good(LEARNABLE, scored(first, 0), np.int32(50 * LENGTH))
    longer, decision_3 = step_good(LEARNABLE, start, np.int32(50 * 2 * LENGTH))
    for decision in (decision_1, decision_2, decision_3):
        assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert [int(d.steps[0]) for d in (decision_1, decision_2, decision_3)] == [LENGTH, LENGTH, 2 * LENGTH]
    assert_same(second.current.variables, longer.current.variables)
    assert_same(second.arms.states, longer.arms.states)
    assert_same(second.current.evidence, longer.current.evidence)


def test_rejection_does_not_change_a_trajectory():
    """A rejected and then an adopted iteration give the student and the arm's state of two adopted ones, bit for bit."""
    start = begin_good(LEARNABLE)
    rejected, decision = step_good(LEARNABLE, scored(start, 1), np.int32(MANY))
    assert int(decision.verdict) == KEEP
    assert_same(rejected.current.variables, start.current.variables)
    adopted, decision = step_good(LEARNABLE, scored(start, 0), np.int32(MANY))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    (after, decision), (want, _) = (step_good(LEARNABLE, scored(x, 0), np.int32(MANY)) for x in (rejected, adopted))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    assert int(after.arms.states[0].age) == 2 * LENGTH
    assert_same((after.arms.states, after.current.variables), (want.arms.states, want.current.variables))


# Ties.


def test_tie_on_assess_keeps_the_current_student():
    states, decisions = steps_from(begin((0, 0, 0, 0)), [MANY, MANY])
    assert [d.verdict for d in decisions] == [KEEP, KEEP]
    assert [float(d.gain) for d in decisions] == [0, 0]
    assert int(states[-1].arms.wins.sum()) == 0


@pytest.mark.parametrize("leader", [0, 1, 3])
def test_tie_among_proposals_goes_to_the_leader(leader):
    start = replace_fields(begin((1, 1, 1, 1)), arms={"leader": jnp.int32(leader)})
    _, (decision,) = steps_from(start, [MANY])
    assert decision.selected == leader
    assert len(set(decision.scores.tolist())) == 1


@pytest.mark.parametrize(
    ("decide", "counts"),
    [
        (make_split(np.repeat(np.arange(N // 2) + 0.5, 2), np.tile([0, 1], N // 2)), (16, 16)),  # 16 won, 16 lost
        (make_split(np.full(N, 1000.0)), (0, 0)),  # both students are wrong everywhere
        (make_split(np.full(N, -1000.0)), (0, 0)),  # both students are right everywhere
    ],
    ids=["wins and losses", "both wrong", "both right"],
)
def test_tie_on_decide_keeps_the_champion(decide, counts):
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
    assert t_of(states[-1]) == 24  # the current student moved nevertheless


# Promotion and rollback.


def test_promotion_is_proved_on_decide_and_recorded():
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


def test_gain_on_assess_alone_does_not_promote():
    """A student that is clearly better on assess but worse on decide is not promoted in any of four iterations."""
    pools = POOLS._replace(decide=make_split(np.arange(N) + 0.5, np.ones(N)))
    start = begin((8,), pools)
    states, decisions = steps_from(start, [MANY, MANY, MANY, 0], pools)
    assert any(d.promotion.tested and d.promotion.losses > d.promotion.wins for d in decisions)
    assert all(d.promoted_arm == -1 for d in decisions)
    assert_same(states[-1].champion, start.champion)


def state_behind_champion(t, speeds):
    """A state whose current student is t and whose champion is t = 40."""
    return begin(speeds, t=t)._replace(champion=begin(speeds, t=40).champion)


@pytest.mark.parametrize("speeds", [(0,), (1, 2, 0, -1)], ids=["rejected proposal", "adopted proposal"])
def test_student_proved_worse_than_the_champion_is_rolled_back(speeds):
    start = state_behind_champion(24, speeds)
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
    (after,), (decision,) = steps_from(state, [MANY])
    assert t_of(after) == 40 + 2 * max(speeds)  # the arms continue from the champion


def test_small_loss_does_not_roll_back():
    (state,), (decision,) = steps_from(state_behind_champion(38, (0,)), [MANY])  # two examples lost: p = 1/4
    assert decision.verdict == KEEP
    assert t_of(state) == 38


def test_decisions_and_counters_agree_over_a_whole_run():
    """Costs, positions, promotions and verdicts are consistent over a whole run of four arms on noisy labels."""
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
            assert_same(parts_kept_by_rejection(state), parts_kept_by_rejection(before))
        if verdict in (ADOPT, PROMOTE) and differ(state.current.variables, before.current.variables):
            assert float(d.gain) > 0
        assert float(d.promotion.alpha) <= float(before.budget.left) <= CONFIG.delta * (1 + 1e-6)
        before = state
    assert promoted >= 1
    assert spent == 50


def test_run_closes_if_its_limit_is_already_passed():
    (state,), _ = steps_from(begin((1,)), [MANY])
    (closed,), (decision,) = steps_from(state, [-1])
    assert (int(decision.steps.sum()), int(closed.clock.cost), bool(closed.closed)) == (0, int(state.clock.cost), True)
    assert_same(closed.current, state.current)
