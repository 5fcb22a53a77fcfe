"""Adapt: what the evidence allows; evidence -> decision, under an error budget for the whole run.

EV3 (arXiv 2310.18893), section 3.3. Questions with different burdens of proof. *Does exploration move?* The best
proposal becomes `current` when assess ranks it strictly higher. *Is it promoted?* The moved student meets the champion on
decide, paired example by example, by an exact one-sided McNemar test. And once that is decided: *is it stuck*, and should
grow? See `progressed`.

The guarantee. Over a run, the probability that any promotion is to a student whose true promise score is not higher than its
champion's is at most delta, for decide examples drawn independently from the population. Condition on all else (explore,
assess, keys): the pair met at test i is then a function of the earlier outcomes on decide alone, so all pairs that could ever
be met form a binary tree. The node with the history h (i tests, k of them promotions) has the budget

    B(h) = delta c^k (1 - c)^(i - k),     so that B(h, promoted) = c B(h) and B(h, kept) = (1 - c) B(h),

and its test the level c B(h), or all of B(h) where it closes the run. Call a node exposed where no promotion on the way to it
was false: the first false promotion happens at an exposed node whose candidate is no better. The levels of such nodes sum to
at most B(h) over the tree below any h, by induction from the leaves: where h itself is such a node, what follows its promotion
is no longer exposed, which leaves c B(h) + B(h, kept) = B(h); where the candidate of h is truly better, its own level does not
count, which leaves B(h, promoted) + B(h, kept) = B(h). A union bound over the tree gives delta, whatever the reuse of the same
finite split. (Bounding adaptive analyses by the tree of their outcomes: Dwork et al. 2015, arXiv 1506.02629; testing on with
what a rejection has set free: Bretz et al. 2009, "A graphical approach to sequentially rejective multiple test procedures".)
Tests are made only where assess predicts success: each one made costs, each one not made is free.

Not covered: a teacher that was itself chosen by the same decide examples is no part of "all else". The one that `compress`
trains where none is named is such a teacher, through the few accept bits of its own run; the certificate, from the sealed
split, is not touched by it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from ev3_distill.core.assess import paired
from ev3_distill.core.prioritise import ruled
from ev3_distill.types import ErrorBudget, Evidence, Progress

SHARE = 0.8  # c: of the budget left, what a test may spend; from 0.5 to 0.9 the power changes little

TOLERANCE = 2.0  # standard errors within which the promise scores of one trajectory are level; 1 stalls small splits


def unspent(delta: float) -> ErrorBudget:
    """The budget of a run that begins."""
    return ErrorBudget(tests=jnp.int32(0), promotions=jnp.int32(0), left=jnp.float32(delta))


def level(budget: ErrorBudget, closing: jax.Array) -> jax.Array:
    """The level of the next test, see the module; `closing` where it is the run's last."""
    return budget.left * jnp.where(closing, 1.0, SHARE)


def mcnemar(candidate: jax.Array, champion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exact one-sided McNemar test that the candidate is right more often (McNemar 1947).

    Args:
      candidate: [N] scores in {0, 1}.
      champion: [N] scores in {0, 1}, of the same examples.

    Returns:
      wins, losses (int32: examples that only one of them gets right) and the p-value P(Bin(wins + losses, 1/2) >= wins),
      1 where nothing differs: a tie goes to the champion. nan scores count as wrong. The p-value is rounded up by more
      than the float32 incomplete beta function errs, some 2e-6 of it per differing example.
    """
    candidate, champion = candidate > 0.5, champion > 0.5
    wins = (candidate & ~champion).sum()
    losses = (champion & ~candidate).sum()
    tail = betainc(jnp.maximum(wins, 1).astype(jnp.float32), losses + 1.0, 0.5)
    rounded_up = jnp.minimum(tail * (1 + 1e-5 + 2e-6 * (wins + losses)), 1.0)
    p_value = jnp.where(wins > 0, rounded_up, 1.0)
    return wins, losses, p_value


def proves(candidate: jax.Array, champion: jax.Array, alpha: float) -> jax.Array:
    """Whether McNemar's test proves at the level alpha < 1/2 that the candidate is right more often, a scalar bool.

    Without more wins than losses the p-value is above 1/2, and is not computed.
    """
    ahead = (candidate > 0.5).sum() > (champion > 0.5).sum()
    return jax.lax.cond(ahead, lambda: mcnemar(candidate, champion)[2] <= alpha, lambda: jnp.bool_(False))


BETS = (0.95, *(0.5**i for i in range(1, 9)))  # shares of the capital that the paired bets stake, in equal parts


def betting(candidate: jax.Array, champion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A paired test that the candidate's mean is higher, for scores in [0, 1].

    Bets on the differences d_i: the capital W = mean over bets b of prod_i (1 + b d_i) has a mean of at most 1 where
    sum_i E[d_i] <= 0, the d_i being independent, so 1 / W is a p-value by Markov's inequality (Waudby-Smith and Ramdas 2024).
    It pays for its generality: on scores that are 0 or 1 McNemar's test proves more. nan scores prove nothing.

    Args:
      candidate: [N].
      champion: [N], of the same examples.

    Returns:
      wins, losses (int32: examples with a higher, a lower score) and the p-value.
    """
    difference = candidate - champion
    capital = jax.scipy.special.logsumexp(
        jnp.stack([jnp.log1p(bet * difference).sum() for bet in BETS]) - jnp.log(float(len(BETS)))
    )
    p_value = jnp.where(jnp.isnan(capital), 1.0, jnp.minimum(jnp.exp(-capital) * (1 + 1e-4), 1.0))
    return (difference > 0).sum(), (difference < 0).sum(), p_value


class Choice(NamedTuple):
    """Which proposal assess favours, scalars."""

    row: jax.Array  # int32; undefined where none is active
    any_active: jax.Array  # bool
    moves: jax.Array  # bool, whether it takes the current student's place
    gain: jax.Array  # float32, mean paired gain over the current student in the score that ruled
    gain_se: jax.Array  # float32, its standard error


def choose(
    evidence: Evidence, current: Evidence, active: jax.Array, leader: jax.Array, *, takeover: jax.Array
) -> Choice:
    """The proposal that assess favours, and whether exploration moves to it.

    Another than the leader's proposal takes its place where it beats that by more than `takeover` standard errors of their
    paired difference in the promise score: changing arms costs a fresh start of the optimizer, and the best of many noisy
    scores is optimistic. Exploration moves where the promise score is strictly higher than the current student's. On a small
    split that score is too coarse for the small steps of one trajectory; so the leader also moves it where the promise score
    is level, to TOLERANCE standard errors, and the smooth select score strictly higher (between different losses the smooth
    score would favour the loss that resembles it). A tie goes to the incumbent throughout.

    Args:
      evidence: of the proposals, leaves [P, N], nan where inactive.
      current: of the current student, leaves [N].
      active: [P] bool.
      leader: int32, row of the leading arm.
      takeover: scalar.
    """
    active = active & jnp.isfinite(evidence.promise.mean(axis=1) + evidence.select.mean(axis=1))
    row = leader if active.shape[0] == 1 else _favoured(evidence.promise, active, leader, takeover=takeover)
    chosen = jnp.stack([evidence.promise[row], evidence.select[row]])
    (gain, smooth), (gain_se, smooth_se) = paired(chosen, jnp.stack([current.promise, current.select]))
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


def _favoured(promise: jax.Array, active: jax.Array, leader: jax.Array, *, takeover: jax.Array) -> jax.Array:
    """The leader's row, or that of the proposal which takes its place."""
    means = jnp.where(active, promise.mean(axis=1), -jnp.inf)
    best = jnp.where(means[leader] == means.max(), leader, jnp.argmax(means))
    lead, lead_se = paired(promise[best], promise[leader])
    stays = jnp.isfinite(means[leader]) & (lead <= takeover * lead_se)
    return jnp.where(stays, leader, best).astype(jnp.int32)


def due(cost: jax.Array, tested_cost: jax.Array, closing: jax.Array) -> jax.Array:
    """Whether the last test lies so far back that another may be worth it.

    The run's cost must have grown by a half since: a few tests of large differences prove more than many of small ones. The
    closing iteration may always ask.
    """
    return (cost > 1.5 * tested_cost) | closing


def worth_testing(p_assess: jax.Array, alpha: jax.Array, closing: jax.Array) -> jax.Array:
    """Whether to ask decide, where a test is due: assess predicts success at the level at hand.

    The closing iteration asks where assess sees any gain at all.
    """
    return jnp.where(closing, p_assess < 0.5, p_assess <= alpha)


RISES = 2.0  # standard errors by which a score must rise for the student to have got anywhere


NO_END = 2**30  # a cost that no run reaches


def from_here(evidence: Evidence, seen: jax.Array, position: jax.Array) -> Progress:
    """Progress is counted from this student on, in a run that may take as long as it gets anywhere."""
    return Progress(evidence, seen, position, jnp.int32(NO_END), jnp.bool_(False))


def progressed(
    progress: Progress,
    shown: Evidence,
    seen: Callable[[], jax.Array],
    *,
    ruling: jax.Array,
    position: jax.Array,
    cost: jax.Array,
    promoted: jax.Array,
    patience: jax.Array,
) -> Progress:
    """Whether the student still gets anywhere, after what this iteration decided.

    It does where it was promoted, or where assess shows clearly more than when it last did, in the objective that rules. Where
    neither has happened for as long as `patience`, the examples that it trains on are asked. Does it get these right more often
    than then, training is what is short, and it has as much time again. Does it not, its size is: it is stuck. So is one whose
    share of the budget is spent, in the first iteration after that without a promotion.

    Args:
      progress: before.
      shown: of the current student on assess, leaves [N].
      seen: gives the current student's promise scores on some of explore, [N'].
      ruling: the goal that rules, or PROMISE.
      position: global step after this iteration.
      cost: of the run after this iteration.
      promoted: whether decide proved it better in this iteration.
      patience: global steps.
    """
    now, then = (ruled(evidence, ruling).promise for evidence in (shown, progress.assess))
    gets_on = promoted | _rises(now, then)
    overdue = ~gets_on & (position - progress.position > patience)
    asked = jax.lax.cond(gets_on | overdue, seen, lambda: progress.seen)
    learns = overdue & _rises(asked, progress.seen)
    return Progress(
        assess=jax.tree.map(lambda new, old: jnp.where(gets_on, new, old), shown, progress.assess),
        seen=jnp.where(gets_on | learns, asked, progress.seen),
        position=jnp.where(gets_on | learns, position, progress.position),
        until=progress.until,
        stuck=progress.stuck | (overdue & ~learns) | ((cost >= progress.until) & ~promoted),
    )


def _rises(now: jax.Array, then: jax.Array) -> jax.Array:
    gain, se = paired(now, then)
    return (gain > 0) & (gain > RISES * se)


def spend(budget: ErrorBudget, closing: jax.Array, tested: jax.Array, promoted: jax.Array) -> ErrorBudget:
    """The budget after this iteration's test, if there was one; nothing is left of it after a closing one."""
    stays = jnp.where(tested, jnp.where(promoted, SHARE, 1 - SHARE), 1.0)
    return ErrorBudget(
        tests=budget.tests + tested,
        promotions=budget.promotions + promoted,
        left=budget.left * jnp.where(closing, 0.0, stays),
    )
