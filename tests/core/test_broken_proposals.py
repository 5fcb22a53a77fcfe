"""Broken proposals: discarded alone, never averaged, and without a trace in what goes on."""

import numpy as np
import pytest
from learning_checks import (
    GOOD,
    LEARNABLE,
    LEARNERS,
    LENGTH,
    NAN_LOSS,
    SICK,
    SLOW,
    begin_beset,
    begin_good,
    proposals_of,
    step_beset,
    step_good,
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
    assert int(state.arms.leader) == 1
    assert state.arms.wins.tolist()[::2] == [0, 0]
    assert float(state.current.evidence.select.mean()) > float(first.current.evidence.select.mean())


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
        assert_same(parts_kept_by_rejection(state), parts_kept_by_rejection(start))
        assert finite(state)
    assert [int(state.clock.iteration) for state in states] == [1, 2, 3, 4]
    assert 0 < int(states[0].clock.cost) < int(states[2].clock.cost)
    assert bool(states[3].closed)


def test_an_arm_recovers_from_a_broken_iteration():
    """It goes on from the state before it: here the inputs of the first two batches are nan."""
    inputs = LEARNABLE.explore.inputs.at[: 2 * B].set(NAN)
    pools = LEARNABLE._replace(explore=LEARNABLE.explore._replace(inputs=inputs))
    state, verdicts = begin_good(pools), []
    for _ in range(2):
        state, decision = step_good(
            pools, state, state.clock.cost + LENGTH
        )  # longer ones would meet these batches again
        verdicts.append((int(decision.discarded), int(decision.verdict) in (ADOPT, PROMOTE)))
    assert verdicts == [(1, False), (0, True)]
    assert finite(state)
