"""Adapt: evidence -> decision, under an error budget for the whole run.

EV3 (arXiv 2310.18893), section 3.3. Two questions need different evidence. *Does exploration move?* The best proposal
becomes the current student if assess ranks it strictly higher. *Is it promoted?* A one-sided test compares the current
student with the champion on decide, paired by example: an exact McNemar test if the promise is 0 or 1, else betting.
After that decision, core/plateau.py asks whether the student is stuck.

The guarantee. Over a run, the probability that any promotion is to a student of which its test's hypothesis is not true
(such as a higher accuracy than the champion's) is at most delta, for decide examples drawn independently from the
population. Condition on all else
(explore, assess, keys): the pair met at test i is then a function of the earlier outcomes on decide alone, so all pairs
that could ever be met form a binary tree. The node with the history h (i tests, k of them promotions) has the budget

    B(h) = delta c^k (1 - c)^(i - k),     so that B(h, promoted) = c B(h) and B(h, kept) = (1 - c) B(h),

and its test the level c B(h), or all of B(h) where it closes the run. Call a node exposed where no promotion on the way
to it was false: the first false promotion happens at an exposed node whose candidate is no better. The levels of such
nodes sum to at most B(h) over the tree below any h, by induction from the leaves: where h itself is such a node, what
follows its promotion is no longer exposed, which leaves c B(h) + B(h, kept) = B(h); where the candidate of h is truly
better, its own level does not count, which leaves B(h, promoted) + B(h, kept) = B(h). A union bound over the tree gives
delta, whatever the reuse of the same finite split. (Bounding adaptive analyses by the tree of their outcomes: Dwork et
al. 2015, arXiv 1506.02629; testing on with what a rejection has set free: Bretz et al. 2009, "A graphical approach to
sequentially rejective multiple test procedures".) Tests are made only if assess predicts success: a test that is made
costs error budget, a test that is not made is free.

A search is one path through a larger tree, see `docs/explanation/error-budget.md`: its runs hand the budget on, none of
their tests is the last, and each further answer of decide that the search follows divides the budget among the possible
answers (`pay_for_answer`, `divide`), so that the budgets below a node still sum to at most its own.

Not covered: a teacher that was itself selected by the same decide examples. The teacher that `compress` trains if none
is named is such a teacher, through the few promotion decisions of its own run. The certificate comes from the sealed
split and is not affected.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.core.paired_tests import paired
from ev3_distill.types import ErrorBudget, Evidence

SHARE = 0.8  # c: the fraction of the remaining budget that a test may spend; from 0.5 to 0.9 the power changes little
MET_SHARE = (
    0.2  # of the budget of a search that continues after decide has proved all goals; a failed test leaves as much
)
TOLERANCE = (
    1.0  # standard errors within which scores of the leader count as level; with 0 a lucky score on a small split stays
)
SPACING = 1.5  # factor by which the run's cost must grow between two promotion tests


def initial_budget(delta: float) -> ErrorBudget:
    """The unspent budget at the start of a run."""
    return ErrorBudget(tests=jnp.int32(0), promotions=jnp.int32(0), left=jnp.float32(delta))


def level(budget: ErrorBudget, closing: jax.Array) -> jax.Array:
    """The level of the next test, see the module docstring; `closing` if it is the run's last."""
    return budget.left * jnp.where(closing, 1.0, SHARE)


def spend(budget: ErrorBudget, closing: jax.Array, tested: jax.Array, promoted: jax.Array) -> ErrorBudget:
    """The budget after this iteration's test, if there was one; a closing test leaves nothing."""
    retained = jnp.where(tested, jnp.where(promoted, SHARE, 1 - SHARE), 1.0)
    return ErrorBudget(
        tests=budget.tests + tested,
        promotions=budget.promotions + promoted,
        left=budget.left * jnp.where(closing, 0.0, retained),
    )


def pay_for_answer(budget: ErrorBudget, asked: jax.Array, met: jax.Array) -> ErrorBudget:
    """The budget after decide was asked whether all goals are met, in a search that continues either way."""
    share = jnp.where(met, MET_SHARE, 1 - MET_SHARE)
    return budget._replace(left=budget.left * jnp.where(asked, share, 1.0))


def divide(budget: ErrorBudget, answers: int) -> ErrorBudget:
    """The budget after an answer of decide that was one of `answers` possible ones."""
    return budget._replace(left=budget.left / answers)


def due(cost: jax.Array, tested_cost: jax.Array, closing: jax.Array) -> jax.Array:
    """Whether the last test lies so far back that another may be worthwhile.

    The run's cost must have grown by half since: a few tests of large differences prove more than many tests of small
    ones. A test in the closing iteration is always due.
    """
    return (cost > SPACING * tested_cost) | closing


def worth_testing(p_assess: jax.Array, alpha: jax.Array, closing: jax.Array) -> jax.Array:
    """Whether to make a test that is due: if assess predicts success at the level at hand.

    The closing iteration makes the test if assess sees any gain at all.
    """
    return jnp.where(closing, p_assess < 0.5, p_assess <= alpha)


class Choice(NamedTuple):
    """The proposal that assess prefers, scalars."""

    row: jax.Array  # int32; undefined if no proposal is active
    any_active: jax.Array  # bool
    moves: jax.Array  # bool, whether it replaces the current student
    gain: jax.Array  # float32, mean paired gain over the current student in the ruling score
    gain_se: jax.Array  # float32, its standard error


def choose(evidence: Evidence, current: Evidence, active: jax.Array, leader: jax.Array) -> Choice:
    """Selects a proposal, and decides whether the current student moves to it.

    The proposal with the highest promise score is selected. The student moves if that is strictly higher than the current
    student's. On a small split that score is coarse, and the best of many is lucky; so the leader also moves it if the promise
    score is level, to TOLERANCE standard errors, and the smooth select score is strictly higher. (Between different losses
    the smooth score would prefer the loss that resembles it.) Ties go to the incumbent.

    Args:
      evidence: of the proposals, leaves [P, N], nan if inactive.
      current: of the current student, leaves [N].
      active: [P] bool.
      leader: int32, row of the leading arm.
    """
    active = active & jnp.isfinite(evidence.promise.mean(axis=1) + evidence.select.mean(axis=1))
    means = jnp.where(active, evidence.promise.mean(axis=1), -jnp.inf)
    row = jnp.where(means[leader] == means.max(), leader, jnp.argmax(means)).astype(jnp.int32)
    scores = jnp.stack([evidence.promise[row], evidence.select[row]])
    (gain, smooth), (gain_se, smooth_se) = paired(scores, jnp.stack([current.promise, current.select]))
    better = gain > 0
    level_but_smoother = (row == leader) & (smooth > 0) & (gain >= -TOLERANCE * gain_se)
    any_active = active[row]
    return Choice(
        row,
        any_active,
        any_active & (better | level_but_smoother),
        jnp.where(better, gain, smooth),
        jnp.where(better, gain_se, smooth_se),
    )
