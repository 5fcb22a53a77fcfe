"""Allocate: which arms train in an iteration, and for how long, so that a portfolio costs little more than its best member.

A run starts with a race by successive halving (Jamieson and Talwalkar 2016): first all arms that race, then the better
half, and so on. After that the leader trains alone, except for an occasional challenger. Challengers are drawn with
odds that follow how each arm compared with the best arm beside it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core.paired_tests import paired
from ev3_distill.types import ArmsState, State

SOFT = 2.0  # standard errors by which an arm's odds of being drawn as challenger fall by a factor e
LATE = (
    0.25  # fraction of a student's budget after which arms that do not race may challenge: earlier, fast starters win
)
REST = (
    0.85  # factor on the distance of a resting arm from level, per iteration: early results say little about late ones
)
IN_VAIN = 4  # trajectories without a gain may grow to this many times the initial length, whatever the student's cost


def rounds_of(racers: Sequence[bool]) -> int:
    """Iterations of a race, until one arm is left."""
    return math.ceil(math.log2(sum(racers)))


def race_again(state: State, pressing: jax.Array, *, racers: Sequence[bool], config: EV3) -> State:
    """Starts another race if a goal presses and the leader, alone since the last race, no longer improves the student.

    The arms' values come from another objective, or from a student that was easier to improve; so all start level, and
    on trajectories half as long.

    Args:
      state: after this iteration's move.
      pressing: scalar bool, whether a goal rules or prevented a move.
      racers: [A], see `Algorithm.racers`.
      config: of the run.
    """
    arms = state.arms
    again = pressing & (state.clock.stale > 0) & (arms.round > rounds_of(racers))
    return state._replace(
        arms=arms._replace(
            round=jnp.where(again, 0, arms.round),
            value=jnp.where(again, 0.0, arms.value),
            length=jnp.where(again, jnp.maximum(arms.length / 2, config.length), arms.length),
        )
    )


class Spent(NamedTuple):
    """Fractions of a budget that were spent before an iteration."""

    run: float | jax.Array  # of the run's budget
    student: float | jax.Array  # of the student's budget since it started or grew


def active_arms(
    key: jax.Array,
    arms: ArmsState,
    *,
    racers: Sequence[bool],
    spent: Spent,
    exploration: float,
    pressed: bool | jax.Array = False,
) -> jax.Array:
    """Which arms train now, [A] bool; the leader always does.

    Args:
      key: consumed.
      arms: their value, leader and round. Round r races the best ceil(R / 2^r) of R arms until one is left.
      racers: [A], which arms race; the others only challenge, and late.
      spent: before this iteration.
      exploration: probability of a challenger after the race; it falls with the remaining budget, because a better arm
        then pays off less.
      pressed: whether there must be a challenger, as soon as all arms may challenge; see `core/step.py`.
    """
    value, leader = arms.value, arms.leader
    count = value.shape[0]
    if count == 1:
        return jnp.ones(1, bool)
    is_leader = jnp.arange(count) == leader
    of_racers = jnp.where(jnp.array(racers), value, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(jnp.where(is_leader, jnp.inf, of_racers), descending=True))
    racing = jnp.ceil(sum(racers) / 2.0 ** jnp.minimum(arms.round, 30)).astype(jnp.int32)
    coin, draw = jax.random.split(key)
    eligible = ~is_leader & (jnp.array(racers) | (spent.student >= LATE))
    challenger = jax.random.categorical(draw, jnp.where(eligible, value / SOFT, -jnp.inf))
    challenge = jax.random.bernoulli(coin, exploration * (1 - spent.run)) | (pressed & (spent.student >= LATE))
    challenged = challenge & eligible & (jnp.arange(count) == challenger)
    return jnp.where(racing > 1, rank < racing, is_leader | (challenged & (count > 1)))


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


def next_values(value: jax.Array, active: jax.Array, scores: jax.Array) -> jax.Array:
    """The arms' values after an iteration, [A].

    The value of an arm that trained moves half way to its paired difference from the best arm beside it, in standard
    errors and at least -10; an arm without a finite proposal counts as -10. The value of an arm that rested drifts
    slowly back towards level, so that the arm is tried again.

    Args:
      value: [A] before.
      active: [A] bool, trained in this iteration, finite or not.
      scores: [A, N] of the arms' proposals, nan if there is none.
    """
    if value.shape[0] == 1:
        return value
    means = scores.mean(axis=1)
    best = jnp.argmax(jnp.where(jnp.isnan(means), -jnp.inf, means))
    gain, se = paired(scores, scores[best])
    difference = jnp.clip(jnp.where(gain == 0, 0.0, gain / jnp.maximum(se, 1e-12)), -10, 0)
    difference = jnp.where(jnp.isnan(difference), -10, difference)
    moved = jnp.where(active.sum() > 1, (value + difference) / 2, value)
    return jnp.where(active, moved, REST * value)


def next_length(
    length: jax.Array, gain: jax.Array, gain_se: jax.Array, moved: jax.Array, cost: jax.Array, *, config: EV3
) -> jax.Array:
    """The next trajectory length, a float in steps.

    A trajectory should be just long enough for assess to see its effect. The length doubles if nothing beat the current
    student, grows by half if the gain was under two standard errors, shrinks by a quarter if it was over eight, and
    else does not change. It stays within [config.length, config.max_length] and under config.max_share of the cost
    since the student started or grew, so that a run makes many decisions whatever its budget. If nothing beat the
    current student, that fraction is no limit up to IN_VAIN times config.length: a student that has just grown may have
    to get worse before it gets better.
    """
    z = gain / jnp.maximum(gain_se, 1e-12)
    factor = jnp.where(~moved, 2.0, jnp.where(z < 2, 1.5, jnp.where(z > 8, 0.75, 1.0)))
    shortest = jnp.where(moved, 1, IN_VAIN) * config.length
    longest = jnp.clip(config.max_share * cost, jnp.minimum(shortest, config.max_length), config.max_length)
    return jnp.clip(length * factor, config.length, longest)
