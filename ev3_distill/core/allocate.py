"""Allocate: which arms train in an iteration and for how long, so that a portfolio costs little more than its best member.

First a race by successive halving (Jamieson and Talwalkar 2016): all arms that race, then the better half, and so on. Then
the leader trains alone but for a challenger now and then, drawn with odds that follow what each arm has shown beside the best.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core.assess import paired
from ev3_distill.types import Arm, State

SOFT = 2.0
LATE = 0.25  # share of a student's budget from which arms challenge that do not race: by then they look far ahead
REST = 0.85  # what is left of a resting arm's distance from level: a run's start says little of its end
IN_VAIN = 4  # times the shortest trajectory one may be, whatever its student's cost, where the last brought nothing


def racers_of(arms: Sequence[Arm]) -> tuple[bool, ...]:
    """Which arms race: all, where none would."""
    races = tuple(arm.races for arm in arms)
    return races if any(races) else (True,) * len(races)


def rounds_of(racers: Sequence[bool]) -> int:
    """Iterations of a race, until one arm is left."""
    return math.ceil(math.log2(sum(racers)))


def race_again(state: State, pressing: jax.Array, *, racers: Sequence[bool], config: EV3) -> State:
    """Lets all arms race anew where a goal presses and the leader, alone since the last race, no longer moves the student.

    What the arms have shown was shown of another objective, or of a student that they could still improve; so all start
    level, and on trajectories half as long.

    Args:
      state: after this iteration's move.
      pressing: scalar bool, whether a goal ruled, or kept a proposal from being taken.
      racers: [A], see `racers_of`.
      config: of the run.
    """
    again = pressing & (state.stale > 0) & (state.round > rounds_of(racers))
    return state._replace(
        round=jnp.where(again, 0, state.round),
        arm_value=jnp.where(again, 0.0, state.arm_value),
        length=jnp.where(again, jnp.maximum(state.length / 2, config.length), state.length),
    )


def active_arms(
    key: jax.Array,
    iteration: jax.Array,
    value: jax.Array,
    leader: jax.Array,
    *,
    racers: Sequence[bool],
    spent: float | jax.Array,
    spent_here: float | jax.Array,
    exploration: float,
    pressed: bool | jax.Array = False,
) -> jax.Array:
    """Which arms train now, [A] bool; the leader always does.

    Args:
      key: consumed.
      iteration: int32, of the race, from 0; iteration r races the best ceil(R / 2^r) of R arms until one is left.
      value: [A] standing of each arm in standard errors, 0 is level with the best, lower is worse.
      leader: int32.
      racers: [A], which arms race; the others only challenge, and late.
      spent: share of the run's budget before this iteration.
      spent_here: the same since the student began or grew: soon after that those win that start fast.
      exploration: probability of one challenger after the race; it falls with the budget left, for a better arm pays off less.
      pressed: whether there is one for certain, as soon as all arms may challenge: see `core/step.py`.
    """
    arms = value.shape[0]
    if arms == 1:
        return jnp.ones(1, bool)
    is_leader = jnp.arange(arms) == leader
    of_racers = jnp.where(jnp.array(racers), value, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(jnp.where(is_leader, jnp.inf, of_racers), descending=True))
    racing = jnp.ceil(sum(racers) / 2.0 ** jnp.minimum(iteration, 30)).astype(jnp.int32)
    coin, draw = jax.random.split(key)
    may = ~is_leader & (jnp.array(racers) | (spent_here >= LATE))
    challenger = jax.random.categorical(draw, jnp.where(may, value / SOFT, -jnp.inf))
    asked = jax.random.bernoulli(coin, exploration * (1 - spent)) | (pressed & (spent_here >= LATE))
    challenged = asked & may & (jnp.arange(arms) == challenger)
    return jnp.where(racing > 1, rank < racing, is_leader | (challenged & (arms > 1)))


def steps_of(
    active: jax.Array, leader: jax.Array, lengths: jax.Array, length: jax.Array, remaining: jax.Array
) -> jax.Array:
    """Steps of each arm, [A] int32, never more in all than `remaining`.

    Args:
      active: [A] bool.
      leader: trains alone where `remaining` is too short for all.
      lengths: [A] each arm's trajectory length relative to the run's.
      length: the run's present trajectory length, in steps.
      remaining: int32, steps left of the budget.
    """
    alone = jnp.arange(active.shape[0]) == leader
    affordable = jnp.where(active, lengths, 0).sum() * jnp.minimum(length, 1.0) <= remaining
    active = jnp.where(affordable, active, alone)
    shares = jnp.where(active, lengths, 0)
    fitting = jnp.minimum(jnp.round(length), remaining / shares.sum())
    steps = jnp.floor(shares * fitting + 1e-3).astype(jnp.int32)
    least = jnp.maximum(steps, (alone & active).astype(jnp.int32))
    least = jnp.where(least.sum() <= remaining, least, jnp.where(alone, least, 0))
    return jnp.where(remaining > 0, least, 0)


def standing(value: jax.Array, active: jax.Array, scores: jax.Array) -> jax.Array:
    """The arms' standing after an iteration, [A].

    Each arm that trained moves half way to its paired difference from the best beside it, in standard errors and at least
    -10; one that gave no finite proposal counts as -10. An arm that rested drifts slowly back towards level, so that it is
    tried again.

    Args:
      value: [A] before.
      active: [A] bool, trained in this iteration, finite or not.
      scores: [A, N] of the arms' proposals, nan where there is none.
    """
    if value.shape[0] == 1:
        return value
    means = scores.mean(axis=1)
    best = jnp.argmax(jnp.where(jnp.isnan(means), -jnp.inf, means))
    gain, se = paired(scores, scores[best])
    shown = jnp.clip(jnp.where(gain == 0, 0.0, gain / jnp.maximum(se, 1e-12)), -10, 0)
    shown = jnp.where(jnp.isnan(shown), -10, shown)
    moved = jnp.where(active.sum() > 1, (value + shown) / 2, value)
    return jnp.where(active, moved, REST * value)


def next_length(
    length: jax.Array, gain: jax.Array, gain_se: jax.Array, moved: jax.Array, cost: jax.Array, *, config: EV3
) -> jax.Array:
    """The next trajectory length, a float in steps.

    A trajectory should be just long enough that assess can see what it brought. It doubles where nothing beat the current
    student, grows by half where the gain was under two standard errors, shrinks by a quarter where it was over eight, and is
    left alone in between; it stays within [config.length, config.max_length] and
    under config.max_share of the cost since the student began or grew, so that it makes many decisions whatever its budget.
    Where nothing beat the current student that share is no obstacle up to IN_VAIN times config.length: one that has just grown
    may have to get worse before it gets better, and would try in vain, again and again, for as long as it is kept short.
    """
    z = gain / jnp.maximum(gain_se, 1e-12)
    factor = jnp.where(~moved, 2.0, jnp.where(z < 2, 1.5, jnp.where(z > 8, 0.75, 1.0)))
    shortest = jnp.where(moved, 1, IN_VAIN) * config.length
    longest = jnp.clip(config.max_share * cost, jnp.minimum(shortest, config.max_length), config.max_length)
    return jnp.clip(length * factor, config.length, longest)
