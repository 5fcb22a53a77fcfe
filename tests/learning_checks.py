"""Gradient arms that train a small network, healthy and broken, with the data and compiled functions for their tests."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from random_walks import RUN_KEY, B, N, run_arms, sample

from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, initial_state, make_step
from ev3_distill.students.families.mlp import mlp
from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import Batch, Pools

F, K = 4, 3
NETWORK = mlp((F,), K, hidden=(6,))
LENGTH = 6


def learnable(seed, n):
    """`n` examples whose labels are the argmax of linear teacher logits."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, F))
    logits = inputs @ np.random.default_rng(99).normal(size=(F, K))
    return Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(logits.argmax(1), jnp.int32),
        {"logits": jnp.asarray(logits, jnp.float32)},
        jnp.arange(n, dtype=jnp.int32),
        jnp.ones(n),
    )


LEARNABLE = Pools(learnable(0, N), learnable(1, 50), learnable(2, 50))
START = NETWORK.init(jax.random.key(1))


def squared_error(logits, batch):
    return jnp.square(logits - batch.teacher["logits"]).mean()


def nan_loss(logits, batch):
    return logits.sum() * jnp.nan


def with_infinite_state(optimizer):
    """An optimizer with the same updates, but an infinite number in its state after one update."""

    def init(params):
        return optimizer.init(params), jnp.float32(0)

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state[0], params)
        return updates, (inner, jnp.float32(jnp.inf))

    return optax.GradientTransformation(init, update)


ADAM = optax.adam(0.05, eps_root=1e-8)  # differentiable where the second moment is 0
GOOD = gradient_arm("good", NETWORK.apply, squared_error, ADAM)
SLOW = gradient_arm("slow", NETWORK.apply, squared_error, optax.sgd(0.01), average=None)
TWIN = gradient_arm("twin", NETWORK.apply, squared_error, ADAM)
NAN_LOSS = gradient_arm("nan", NETWORK.apply, nan_loss, ADAM)
INF_OPT_STATE = gradient_arm("sick", NETWORK.apply, squared_error, with_infinite_state(ADAM))
LEARNERS = (GOOD, NAN_LOSS, SLOW, INF_OPT_STATE, TWIN)
OBJECTIVES = Objectives(example_scores.probability, ACCURACY)
LEARNING = EV3(batch_size=B, length=LENGTH, max_length=100, eval_batch_size=16)


@functools.cache
def compiled(arms):
    """The compiled functions for the initial state and one step of these arms."""
    algorithm = Algorithm(NETWORK.apply, arms, sample, OBJECTIVES, LEARNING)

    def start(pools):
        return initial_state(jax.random.key_data(RUN_KEY), START, pools, algorithm)

    return jax.jit(start), make_step(algorithm)


WITH_BROKEN = (NAN_LOSS, GOOD, INF_OPT_STATE)
begin_with_broken, step_with_broken = compiled(WITH_BROKEN)
begin_good, step_good = compiled((GOOD,))


@jax.jit
def propose_all(pools, steps):
    """Proposals of all `LEARNERS` from their initial states, after the steps [A] of each."""
    state = SimpleNamespace(
        arms=SimpleNamespace(states=tuple(arm.init(START) for arm in LEARNERS)), clock=SimpleNamespace(position=0)
    )
    return run_arms(LEARNERS, state, pools, steps)


def proposals_of(active, pools=LEARNABLE):
    """Proposals where only the arms in `active` train."""
    return propose_all(pools, jnp.array([LENGTH * (arm in active) for arm in LEARNERS]))
