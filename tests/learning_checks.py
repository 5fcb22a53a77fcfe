"""Learners: arms that train a small network, sound ones and broken ones, for what needs gradients."""

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


def squared(logits, batch):
    return jnp.square(logits - batch.teacher["logits"]).mean()


def nan_loss(logits, batch):
    return logits.sum() * jnp.nan


def poisoned(optimizer):
    """The same updates, but a state that is not finite."""

    def init(params):
        return optimizer.init(params), jnp.float32(0)

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state[0], params)
        return updates, (inner, jnp.float32(jnp.inf))

    return optax.GradientTransformation(init, update)


ADAM = optax.adam(0.05, eps_root=1e-8)  # differentiable where the second moment is 0
GOOD = gradient_arm("good", NETWORK.apply, squared, ADAM)
SLOW = gradient_arm("slow", NETWORK.apply, squared, optax.sgd(0.01), average=None)
TWIN = gradient_arm("twin", NETWORK.apply, squared, ADAM)
NAN_LOSS = gradient_arm("nan", NETWORK.apply, nan_loss, ADAM)
SICK = gradient_arm("sick", NETWORK.apply, squared, poisoned(ADAM))
LEARNERS = (GOOD, NAN_LOSS, SLOW, SICK, TWIN)
OBJECTIVES = Objectives(example_scores.probability, ACCURACY)
LEARNING = EV3(batch_size=B, length=LENGTH, max_length=100, eval_batch_size=16)


@functools.cache
def learning(arms):
    """The initial state and the step of learners."""
    algorithm = Algorithm(NETWORK.apply, arms, sample, OBJECTIVES, LEARNING)

    def start(pools):
        return initial_state(jax.random.key_data(RUN_KEY), START, pools, algorithm)

    return jax.jit(start), make_step(algorithm)


BESET = (NAN_LOSS, GOOD, SICK)
begin_beset, step_beset = learning(BESET)
begin_good, step_good = learning((GOOD,))


@jax.jit
def learned(pools, steps):
    """Proposals of all learners, from the start."""
    state = SimpleNamespace(
        arms=SimpleNamespace(states=tuple(arm.init(START) for arm in LEARNERS)), clock=SimpleNamespace(position=0)
    )
    return run_arms(LEARNERS, state, pools, steps)


def proposals_of(trained, pools=LEARNABLE):
    return learned(pools, jnp.array([LENGTH * (arm in trained) for arm in LEARNERS]))
