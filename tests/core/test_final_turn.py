"""When the final phase begins, and what a step decides before, at and after its turn; the arms are random walks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_walks import (
    CONFIG,
    OBJECTIVES,
    POOLS,
    WALKERS,
    N,
    apply_threshold,
    assert_same,
    compiled,
    make_split,
    replace_fields,
    sample,
    t_of,
    threshold,
    whole_run,
)

from ev3_distill.core import Algorithm, make_parts
from ev3_distill.types import ADOPT, FINAL, KEEP, PROMOTE, State

HALF = dataclasses.replace(CONFIG, final=0.5)


def begin(speeds, *, t=8, pools=POOLS, config=CONFIG):
    return compiled(len(speeds), config, has_final=True)[0](threshold(t, speeds), pools)


def run(state, limit, pools=POOLS, config=CONFIG):
    """[(state before, state after, decision)] of each iteration up to the closing one."""
    states, decisions = whole_run(state, limit, pools, config=config, has_final=True)
    return list(zip([state, *states], states, decisions, strict=False))


def turn_of(rows):
    return next(i for i, (_, after, _) in enumerate(rows) if bool(after.final))


@pytest.mark.parametrize("limit", [*range(13), 49, 50, 51, 99, 100])
@pytest.mark.parametrize("speeds", [(1,), (0.5, 1, 0, -0.25)], ids=["one arm", "four arms"])
def test_last_fifth_of_any_budget_is_the_final_phase(limit, speeds):
    """Rounded down, so that of fewer than five steps none is. The budget is spent to the last step."""
    rows = run(begin(speeds), limit)
    turn = turn_of(rows)
    assert int(rows[turn][1].clock.cost) == limit - limit // 5
    assert int(rows[turn][2].steps.sum()) == 0 and not bool(rows[turn][1].closed)
    assert int(rows[-1][1].clock.cost) == limit and int(rows[-1][2].steps.sum()) == 0
    assert [bool(after.closed) for _, after, _ in rows] == [False] * (len(rows) - 1) + [True]
    leader = int(rows[turn][1].arms.leader)
    for before, after, d in rows[turn + 1 :]:
        assert bool(before.final) and bool(after.final) and bool(d.final)
        trained = [leader] if not bool(after.closed) else []
        assert np.flatnonzero(d.steps).tolist() == trained and int(d.asked) == -1
        assert int(d.verdict) == (FINAL if trained else KEEP)
        assert not bool(d.promotion.tested) and float(d.promotion.alpha) == 0
        assert int(after.arms.leader) == leader
    assert not any(bool(d.final) for _, _, d in rows[: turn + 1])


@pytest.mark.parametrize("final", [0.0, 0.1, 0.9])
def test_share_of_the_final_phase_follows_the_configuration(final):
    """A share of 0.9 ends the race of four arms, which would take 32 % of the budget."""
    config = dataclasses.replace(CONFIG, final=final)
    rows = run(begin((0.5, 1, 0, -0.25), config=config), 100, config=config)
    turn = turn_of(rows)
    assert int(rows[turn][1].clock.cost) == round(100 * (1 - final)) and int(rows[-1][1].clock.cost) == 100
    np.testing.assert_array_equal(rows[turn][1].arms.racing, np.arange(4) == 1)


def test_current_student_follows_the_leader_whatever_assess_says():
    """The walk goes up to t = 24 + 1, and in the final phase on, although more than 24 is wrong on assess."""
    pools = POOLS._replace(assess=make_split(np.arange(N) + 0.5, np.arange(N) >= 24))
    rows = run(begin((1,), t=8, pools=pools, config=HALF), 32, pools, HALF)
    turn = turn_of(rows)
    before, after = rows[turn][1], rows[-1][1]
    assert t_of(before) == 24 and int(rows[turn][1].clock.cost) == 16
    assert t_of(after) == 40 and int(after.arms.states[0].age) == 32  # it continued its trajectory
    for _, state, d in rows[turn + 1 : -1]:
        assert_same(state.current.variables, state.arms.states[0].student)
        assert (int(state.current.arm), int(state.clock.stale)) == (0, 0)
        assert d.current_score == pytest.approx(float(state.current.evidence.promise.mean()))
    assert after.current.evidence.promise.sum() < before.current.evidence.promise.sum()
    assert_same((after.champion, after.budget), (before.champion, before.budget))  # proven worse: no roll-back


def test_turn_makes_the_closing_test_with_the_rest_of_the_error_budget():
    """Two examples are gained in 16 steps: only a closing test is made for so little."""
    rows = run(begin((0.125,), t=8), 20)
    turn = turn_of(rows)
    tested = [i for i, (_, _, d) in enumerate(rows) if bool(d.promotion.tested)]
    assert tested == [turn]
    _, after, d = rows[turn]
    assert float(d.promotion.alpha) == pytest.approx(CONFIG.delta) and float(after.budget.left) == 0
    assert (int(d.promotion.wins), int(d.promotion.losses), int(d.verdict)) == (2, 0, KEEP)


def test_gain_of_the_last_trajectory_is_promoted_at_the_turn():
    rows = run(begin((4,), t=0), 20)
    turn = turn_of(rows)
    promoted = [i for i, (_, _, d) in enumerate(rows) if int(d.verdict) == PROMOTE]
    assert turn in promoted and not [i for i in promoted if i > turn]
    assert_same(rows[turn][1].champion.variables, rows[turn][1].current.variables)


def test_leader_that_lies_clearly_below_starts_the_phase_from_the_current_student():
    """The walk down from 40 right of 64 is far below at the turn; in the phase it goes down from 40 again."""
    rows = run(begin((-1,), t=40), 100)
    turn = turn_of(rows)
    (_, state, d), (_, first, d_first) = rows[turn], rows[turn + 1]
    assert int(state.clock.cost) == 80 and int(d.verdict) == KEEP and t_of(state) == 40
    assert float(state.arms.lag[0]) < -2
    assert_same(state.arms.states[0], WALKERS[0].init(state.current.variables))
    assert t_of(first) == 40 - int(d_first.steps[0]) and int(d_first.verdict) == FINAL
    assert int(rows[-1][1].arms.states[0].age) == 20


def limits_of(seed, true=60):
    """A limit that is known only roughly at first, as that of a wall time: the better, the nearer."""
    rng = np.random.default_rng(seed)

    def limit(state):
        cost = int(state.clock.cost)
        return 2**30 if not cost else max(cost, int(cost + (true - cost) * rng.uniform(0.7, 1.3)))

    return limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speeds", [(1,), (0.5, 1, 0, -0.25)], ids=["one arm", "four arms"])
def test_limit_may_change_in_every_iteration(seed, speeds):
    rows = run(begin(speeds), limits_of(seed))
    turn = turn_of(rows)
    assert 30 <= int(rows[turn][1].clock.cost) <= 60 and 45 <= int(rows[-1][1].clock.cost) <= 75
    assert all(bool(after.final) for _, after, _ in rows[turn:])  # it never ends before the run
    assert all((d.steps > 0).sum() <= 1 for _, _, d in rows[turn:])
    assert bool(rows[-1][1].closed)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**30), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), st.floats(0, 1))
@example(2**24 + 3, 0.0, 1.0)
@example(2**30 - 1, 0.2, 0.8)
def test_plan_stays_within_limits_up_to_2_to_the_30(limit, final, spent):
    """In float32, which has 24 bits: neither the limit nor the turn is passed, and the turn is right to 1e-7 of the limit."""
    config = dataclasses.replace(CONFIG, final=final, max_length=2000)
    algorithm = Algorithm(apply_threshold, WALKERS[:1], sample, OBJECTIVES, config, has_final=True)
    plan = jax.jit(make_parts(algorithm).plan)
    cost = int(limit * spent)
    state: State = replace_fields(begin((1,)), clock={"cost": jnp.int32(cost)})
    got = plan(state, np.int32(limit))
    turn = limit - int(limit * final)
    assert abs(cost + int(got.remaining) - max(turn, cost)) <= 1 + 2e-7 * limit
    assert cost + int(got.remaining) <= limit and int(got.steps.sum()) <= int(got.remaining)
    assert bool(got.turns) == (int(got.remaining) == 0)
    later = plan(state._replace(final=jnp.bool_(True)), np.int32(limit))
    assert int(later.remaining) == limit - cost and not bool(later.turns)


def test_run_without_a_final_phase_decides_to_its_end():
    states, decisions = whole_run(compiled(1)[0](threshold(8, (1,)), POOLS), 20)
    assert not any(bool(state.final) for state in states) and states[0].before == ()
    assert {int(d.verdict) for d in decisions[:-1]} <= {ADOPT, PROMOTE}
    assert int(states[-1].clock.cost) == 20
