"""The state of a run before its first iteration."""

from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.core import adapt, promote
from ev3_distill.core.algorithm import Algorithm
from ev3_distill.core.assess import outputs_of
from ev3_distill.core.plateau import start_plateau
from ev3_distill.types import (
    ArmsState,
    Batch,
    BeforeFinal,
    Champion,
    Clock,
    CurrentStudent,
    Plateau,
    Pools,
    SafestStudent,
    State,
    Variables,
)


def initial_state(key: jax.Array, variables: Variables, pools: Pools, algorithm: Algorithm) -> State:
    """The state before the first iteration: the student with these variables is both current and champion.

    Args:
      key: data of the run's PRNG key.
      variables: of the student.
      pools: the data.
      algorithm: of the run.
    """
    objectives, config, zero = algorithm.objectives, algorithm.config, jnp.int32(0)

    def outputs_on(split: Batch) -> Any:
        return outputs_of(algorithm.apply, variables, split.inputs, batch_size=config.eval_batch_size)

    evidence = objectives.evidence(outputs_on(pools.assess), pools.assess)
    on_decide = outputs_on(pools.decide)
    plateau: Plateau | tuple[()] = ()
    if config.patience:
        plateau = start_plateau(evidence, promote.seen_scores(algorithm, variables, pools), zero)
    decide = objectives.promise.score(on_decide, pools.decide)
    return State(
        key=key,
        clock=Clock(zero, zero, zero, zero, zero, zero, zero),
        current=CurrentStudent(variables, evidence, jnp.int32(-1)),
        champion=Champion(variables, evidence, decide, objectives.goal_scores(on_decide, pools.decide, evidence)),
        safest=SafestStudent(variables if objectives.goals else (), jnp.float32(jnp.finfo(jnp.float32).min)),
        arms=_initial_arms(variables, algorithm),
        budget=adapt.initial_budget(config.delta),
        plateau=plateau,
        met=jnp.bool_(False),
        final=jnp.bool_(False),
        before=BeforeFinal(variables, zero) if algorithm.has_final else (),
        closed=jnp.bool_(False),
    )


def _initial_arms(variables: Variables, algorithm: Algorithm) -> ArmsState:
    a, zero, leader = len(algorithm.arms), jnp.int32(0), algorithm.racers.index(True)
    counts = jnp.zeros(a, jnp.int32)
    alone = jnp.arange(a) == leader
    return ArmsState(
        states=tuple(arm.init(variables) for arm in algorithm.arms),
        value=jnp.zeros(a),
        lag=jnp.zeros(a),
        cost=counts,
        wins=counts,
        promotions=counts,
        leader=jnp.int32(leader),
        racing=jnp.array(algorithm.racers) if algorithm.config.race else alone,
        raced=zero,
        asked=jnp.int32(-1),
        length=jnp.float32(algorithm.config.length),
    )
