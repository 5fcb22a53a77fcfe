"""Broken proposals are discarded and harm no other arm; a broken arm restarts from the current student."""

import numpy as np
import pytest
from learning_checks import (
    GOOD,
    INF_OPT_STATE,
    LEARNABLE,
    LEARNERS,
    LENGTH,
    NAN_LOSS,
    SLOW,
    begin_good,
    begin_with_broken,
    proposals_of,
    step_good,
    step_with_broken,
)
from random_walks import (
    INF_STATE,
    MANY,
    NAN,
    NAN_STATE,
    NAN_STUDENT,
    SOUND,
    B,
    N,
    assert_same,
    begin,
    finite,
    parts_kept_by_rejection,
    row,
    steps_from,
    t_of,
)

from ev3_distill.types import ADOPT, KEEP, PROMOTE


@pytest.mark.parametrize(
    "broken", [[NAN_LOSS], [INF_OPT_STATE], [NAN_LOSS, INF_OPT_STATE]], ids=["student", "optimizer state", "both"]
)
def test_broken_proposal_does_not_affect_healthy_arms(broken):
    """The healthy arms' proposals and their states agree bit by bit with and without broken ones."""
    without_broken, with_broken = proposals_of((GOOD, SLOW)), proposals_of((GOOD, SLOW, *broken))
    assert without_broken.active.tolist() == with_broken.active.tolist() == [True, False, True, False, False]
    for i in (0, 2):
        assert_same(row(without_broken.variables, i), row(with_broken.variables, i))
        assert finite(row(with_broken.variables, i))
    assert_same(
        (without_broken.arm_states[0], without_broken.arm_states[2]),
        (with_broken.arm_states[0], with_broken.arm_states[2]),
    )
    broken_states = [with_broken.arm_states[LEARNERS.index(arm)] for arm in broken]
    assert not any(finite(arm_state) for arm_state in broken_states)


def test_finite_student_with_a_broken_optimizer_is_discarded():
    proposals = proposals_of((GOOD, INF_OPT_STATE))
    assert finite(row(proposals.variables, 3))  # the student itself is finite
    assert proposals.active.tolist() == [True] + 4 * [False]


def test_run_with_broken_arms_improves_and_stays_finite():
    """Over four iterations broken arms are counted and never win, and every state is finite."""
    first = state = begin_with_broken(LEARNABLE)  # a broken arm leads at the start
    discarded = 0
    for _ in range(4):
        state, decision = step_with_broken(LEARNABLE, state, np.int32(MANY))
        assert int(decision.discarded) == (np.asarray(decision.steps)[[0, 2]] > 0).sum()
        discarded += int(decision.discarded)
        assert int(decision.selected) == 1
        assert np.isnan(np.asarray(decision.scores)[[0, 2]]).all()
        assert finite(state)
    assert discarded >= 2
    assert int(state.arms.leader) == 1
    assert state.arms.wins.tolist()[::2] == [0, 0]
    assert float(state.current.evidence.select.mean()) > float(first.current.evidence.select.mean())


def test_broken_proposals_never_win():
    start = begin((1, 1, 20, 4), health=(SOUND, NAN_STUDENT, NAN_STATE, SOUND))
    (state,), (decision,) = steps_from(start, [MANY])
    assert decision.discarded == 2
    assert decision.selected == 3
    np.testing.assert_array_equal(decision.scores, np.float32([10 / N, NAN, NAN, 16 / N]))
    assert t_of(state) == 16
    assert finite(state)


def test_run_continues_unchanged_if_every_proposal_is_broken():
    start = begin((9, 9, 9, 9), health=(NAN_STUDENT, INF_STATE, NAN_STATE, NAN_STUDENT))
    states, decisions = steps_from(start, [MANY, MANY, MANY, 0])
    for state, decision in zip(states, decisions, strict=True):
        assert (decision.verdict, decision.selected, decision.promoted_arm) == (KEEP, -1, -1)
        assert decision.discarded == (decision.steps > 0).sum()
        assert np.isnan(decision.scores).all()
        assert_same(parts_kept_by_rejection(state), parts_kept_by_rejection(start))
        assert_same(state.arms.states, start.arms.states)
        assert finite(state)
    assert [int(state.clock.iteration) for state in states] == [1, 2, 3, 4]
    assert 0 < int(states[0].clock.cost) < int(states[2].clock.cost)
    assert bool(states[3].closed)


def test_arm_recovers_after_a_broken_iteration():
    """The arm restarts from the current student. The inputs of the first two batches are NaN here."""
    inputs = LEARNABLE.explore.inputs.at[: 2 * B].set(NAN)
    pools = LEARNABLE._replace(explore=LEARNABLE.explore._replace(inputs=inputs))
    state, verdicts = begin_good(pools), []
    for _ in range(2):
        limit = state.clock.cost + LENGTH  # longer trajectories would use the NaN batches again
        state, decision = step_good(pools, state, limit)
        verdicts.append((int(decision.discarded), int(decision.verdict) in (ADOPT, PROMOTE)))
    assert verdicts == [(1, False), (0, True)]
    assert finite(state)
