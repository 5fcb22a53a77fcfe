"""Allocate: which arms train in an iteration, and for how long, so that a portfolio costs little more than its best member.

A run starts with a race. Each arm trains a student of its own, from common initial parameters and with its own optimizer,
for up to a fraction `config.race` of the budget. If that is too short to compare them all, two that start fast race. After each
iteration, an arm that assess shows to be clearly behind the best one leaves the race. When it is over, the arm that was
nearest to the best one, smoothed over iterations, leads: it continues its own trajectory alone. After a short race that is
the first arm, unless another is clearly ahead.
If nothing has moved for PATIENCE iterations, another arm is asked: it starts from the current student and trains beside the
leader for an iteration. If its proposal becomes current, it leads.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core.paired_tests import paired
from ev3_distill.types import ArmsState, Clock, Evidence

TRAJECTORIES = 50  # of a run, each at most this part of the budget: enough points among which assess selects the best
MOST_RACING = 0.5  # of the budget, for the race of all arms
# Of the budget, and times config.length: an arm trains for the longer of both before it may leave the race, since the first
# steps only show which arm starts fast. A race too short for the latter is between FEWEST arms, which start fast.
LEAST, LEAST_LENGTHS = 0.02, 2
FEWEST = 2
GROWS = 0.2  # a trajectory may take this fraction of the steps so far at any budget: a wall time begins unknown
PATIENCE = 3  # iterations without a move after which another arm is asked
REST = (
    0.85  # factor on the distance of a resting arm from level, per iteration: early results say little about late ones
)
ASKED = 1.0  # standard errors by which an arm's value falls when it is asked
FARTHEST = 10.0  # standard errors; differences count as at most that


def entrants(racers: Sequence[bool], fast: Sequence[bool], budget: jax.Array, config: EV3) -> jax.Array:
    """Which arms enter the race, [A] bool: the first ones, as many as the race gives LEAST_LENGTHS * config.length steps each.

    If it is too short for that, the first FEWEST of those that start fast enter: what a short race costs counts, and it does
    not show the worth of an arm that starts slowly.

    Args:
      racers: [A], which arms may race, in the order of the portfolio.
      fast: [A], which of them enter a short race.
      budget: of the student.
      config: of the run.
    """
    least = LEAST_LENGTHS * config.length
    count = jnp.maximum(MOST_RACING * budget / least, FEWEST)
    among, of_short = jnp.array(racers), jnp.array(fast)
    in_short = of_short & (jnp.cumsum(of_short) <= FEWEST)
    return jnp.where(is_short(config.race * budget, config), in_short, among & (jnp.cumsum(among) <= count))


def race_steps(entered: jax.Array, budget: jax.Array, config: EV3) -> jax.Array:
    """Steps of each arm that stays in the race to its end, a whole number as a float; 0 if there is no race.

    Args:
      entered: [A] bool, which arms enter the race.
      budget: of the student.
      config: of the run.
    """
    count = entered.sum()
    return jnp.floor(budget * jnp.where(count > 1, jnp.minimum(config.race, MOST_RACING / count), 0.0))


def is_short(steps: jax.Array, config: EV3) -> jax.Array:
    """Whether a race of so many steps of each arm is too short to show which arm is the best in the long run."""
    return steps < LEAST_LENGTHS * config.length


def enter(arms: ArmsState, entered: jax.Array) -> ArmsState:
    """The arms with those out of the race that do not enter it; they wait to be asked.

    Before the first step of the race, the first arm that enters leads. Later the leader stays in the race.
    """
    begins = (arms.racing.sum() > 1) & (arms.raced == 0) & ~entered[arms.leader]
    leader = jnp.where(begins, jnp.argmax(entered), arms.leader).astype(jnp.int32)
    stays = entered | (jnp.arange(arms.value.shape[0]) == leader)
    return arms._replace(leader=leader, racing=jnp.where(arms.racing.sum() > 1, arms.racing & stays, arms.racing))


def is_racing(arms: ArmsState, steps: jax.Array) -> jax.Array:
    """Whether the race goes on, given the steps of each arm."""
    return (arms.racing.sum() > 1) & (arms.raced < steps)


def active_arms(arms: ArmsState, racing: jax.Array) -> jax.Array:
    """Which arms train now, [A] bool: those in the race, or else the leader and an arm that is asked."""
    numbers = jnp.arange(arms.value.shape[0])
    return jnp.where(racing, arms.racing, (numbers == arms.leader) | (numbers == arms.asked))


def next_length(racing: jax.Array, left: jax.Array, budget: jax.Array, cost: jax.Array, *, config: EV3) -> jax.Array:
    """The length of a trajectory, a float in steps.

    It is a fiftieth of the budget, between `config.length` and `config.max_length`, and at most GROWS of the cost so far unless
    that is less than `config.length`. In a race it may be shorter than `config.length`.

    Args:
      racing: whether the arms race.
      left: steps that each arm has left in the race.
      budget: of the student.
      cost: of the student so far.
      config: of the run.
    """
    most = jnp.maximum(GROWS * cost, config.length)
    wanted = jnp.minimum(budget / TRAJECTORIES, most)
    alone = jnp.clip(wanted, config.length, config.max_length)
    in_race = jnp.clip(jnp.minimum(wanted, left), 1, config.max_length)
    return jnp.round(jnp.where(racing, in_race, alone))


def steps_of(
    active: jax.Array, leader: jax.Array, lengths: jax.Array, length: jax.Array, remaining: jax.Array
) -> jax.Array:
    """Steps of each arm, [A] int32, at most `remaining` in total.

    Args:
      active: [A] bool.
      leader: trains alone if `remaining` is too short for all.
      lengths: [A] trajectory length of each arm relative to the run's.
      length: present trajectory length of the run, in steps.
      remaining: int32, steps left of the budget.
    """
    alone = jnp.arange(active.shape[0]) == leader
    affordable = jnp.where(active, lengths, 0).sum() * jnp.minimum(length, 1.0) <= remaining
    active = jnp.where(affordable, active, alone)
    relative = jnp.where(active, lengths, 0)
    fitting = jnp.minimum(jnp.round(length), remaining / relative.sum())
    steps = jnp.floor(relative * fitting + 1e-3).astype(jnp.int32)
    least = jnp.maximum(steps, (alone & active).astype(jnp.int32))
    least = jnp.where(least.sum() <= remaining, least, jnp.where(alone, least, 0))
    return jnp.where(remaining > 0, least, 0)


def behind_best(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By how much each proposal lies behind the best one, paired by example: the mean difference, at most 0, and its error.

    Args:
      scores: [A, N], nan if there is none.

    Returns:
      [A] and [A], nan for an arm without a proposal.
    """
    means = scores.mean(axis=1)
    best = jnp.argmax(jnp.where(jnp.isnan(means), -jnp.inf, means))
    gap, se = paired(scores, scores[best])
    return jnp.minimum(gap, 0.0), se


def standardized(gap: jax.Array, se: jax.Array) -> jax.Array:
    """A paired difference in standard errors, within FARTHEST; without a proposal (nan) as far behind as can be."""
    z = jnp.where(gap == 0, 0.0, gap / jnp.maximum(se, 1e-12))
    return jnp.where(jnp.isnan(z), -FARTHEST, jnp.clip(z, -FARTHEST, FARTHEST))


def next_values(value: jax.Array, active: jax.Array, behind: jax.Array) -> jax.Array:
    """The arms' values after an iteration, [A].

    The value of an arm that trained moves half way to its difference from the best arm beside it. The value of an arm that
    rested drifts slowly back towards level, so that the arm is asked again.

    Args:
      value: [A] before.
      active: [A] bool, trained in this iteration, finite or not.
      behind: [A] standard errors behind the best arm, see `standardized`.
    """
    moved = jnp.where(active.sum() > 1, (value + behind) / 2, value)
    return jnp.where(active, moved, REST * value)


def next_lag(arms: ArmsState, trained: jax.Array, scores: jax.Array, current: Evidence) -> jax.Array:
    """How far the arms' newest proposals lie from the current student, smoothed over iterations, [A].

    Args:
      arms: before.
      trained: [A] bool.
      scores: [A, N] of their proposals, nan if there is none.
      current: evidence of the current student after this iteration, whose promise is the score that `scores` has.
    """
    newest = standardized(*paired(scores, current.promise))
    return jnp.where(trained, (arms.lag + newest) / 2, arms.lag)


def race_on(
    arms: ArmsState, behind: jax.Array, broken: jax.Array, steps: jax.Array, *, budget: jax.Array, config: EV3
) -> ArmsState:
    """The arms after an iteration of the race: some leave it, and at its end all but the leader.

    An arm whose proposal is not finite leaves at once, unless that is true of all arms. After a short race the first arm leads,
    unless another was clearly ahead in its second half: the first steps of two arms may differ by seven points of accuracy, of
    which nothing is left at the end.

    Args:
      arms: with the leader of now, and `raced` with this iteration.
      behind: [A] standard errors behind the best arm in this iteration.
      broken: [A] bool, trained in this iteration without a finite proposal.
      steps: of each arm in the whole race.
      budget: of the student.
      config: of the run.
    """
    several, short = arms.racing.sum() > 1, is_short(steps, config)
    ends = several & ~is_racing(arms, steps)
    arms = arms._replace(value=jnp.where(several & short & (2 * arms.raced <= steps), 0.0, arms.value))
    margin = jnp.where(short, config.drop, 0.0)
    arms = arms._replace(leader=jnp.where(ends, _winner(arms, arms.racing & ~broken, margin), arms.leader))
    leads = jnp.arange(arms.value.shape[0]) == arms.leader
    early = arms.raced < jnp.maximum(LEAST * budget, LEAST_LENGTHS * config.length)
    stays = jnp.where(broken, ~(arms.racing & ~broken).any(), early | (behind >= -config.drop))
    racing = leads | (arms.racing & stays & is_racing(arms, steps))
    return arms._replace(racing=jnp.where(several, racing, arms.racing))


def _winner(arms: ArmsState, among: jax.Array, margin: jax.Array) -> jax.Array:
    """The arm that leads after the race, int32: that of the highest value `among` [A] bool these, the present leader if level.

    The present leader proposed the current student, which may be a single lucky proposal; values are smoothed over iterations.
    With a margin, in standard errors, the first arm leads unless the value of another is so much higher.
    """
    value = jnp.where(among, arms.value, -math.inf)
    present = jnp.where(margin > 0, jnp.argmax(among), arms.leader)
    ahead = value.max() - value[present]
    level = (ahead == 0) | (ahead < margin) | ~among.any()
    return jnp.where(level, jnp.where(among.any(), present, arms.leader), jnp.argmax(value)).astype(jnp.int32)


def to_ask(arms: ArmsState, clock: Clock, pressing: jax.Array) -> jax.Array:
    """The arm that trains beside the leader in the next iteration, int32; -1 for none.

    Nothing has moved for PATIENCE iterations, or since the last one if a goal presses. It is the arm of the highest value.
    """
    a = arms.value.shape[0]
    if a == 1:
        return jnp.int32(-1)
    due = jnp.where(pressing, clock.stale > 0, (clock.stale > 0) & (clock.stale % PATIENCE == 0))
    others = jnp.where(jnp.arange(a) == arms.leader, -math.inf, arms.value)
    return jnp.where(due & (arms.racing.sum() <= 1), jnp.argmax(others), -1).astype(jnp.int32)


def with_asked(arms: ArmsState, asked: jax.Array) -> ArmsState:
    """The arms once one of them is asked, or none (-1).

    Its lag starts anew, as its trajectory does. Its value falls, so that the turn of every other arm comes, even if this one
    never lies behind the leader.
    """
    this = jnp.arange(arms.value.shape[0]) == asked
    return arms._replace(
        asked=asked,
        lag=jnp.where(this, 0.0, arms.lag),
        value=jnp.where(this, jnp.maximum(arms.value - ASKED, -FARTHEST), arms.value),
    )
