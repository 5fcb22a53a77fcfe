"""Data and students on which tests of arms roll out trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.core.explore import draw_from
from ev3_distill.students.families.mlp import mlp
from ev3_distill.types import Batch, Pools, Stretch, Variables

N, F, K, B = 40, 4, 3, 8


def make_split(seed, n=N):
    rng = np.random.default_rng(seed)
    return Batch(
        jnp.asarray(rng.normal(size=(n, F)), jnp.float32),
        jnp.asarray(rng.integers(0, K, n), jnp.int32),
        {"logits": jnp.asarray(2 * rng.normal(size=(n, K)), jnp.float32)},
        jnp.arange(n, dtype=jnp.int32),
        jnp.ones(n),
    )


def rows(step):
    return (step * B + jnp.arange(B)) % N


def sample(examples, step):
    return jax.tree.map(lambda leaf: leaf[rows(step)], examples)


EXPLORE = make_split(0)
EXPLORE = EXPLORE._replace(teacher={**EXPLORE.teacher, "peer": make_split(3).teacher["logits"]})
POOLS = Pools(EXPLORE, make_split(1), make_split(2))
DRAW = draw_from(EXPLORE, sample, jax.random.key(0))
MLP = mlp((F,), K, hidden=(5,))
START = MLP.init(jax.random.key(1))


def squared(logits, batch):
    return 0.5 * jnp.square(logits - batch.teacher["logits"]).sum(-1).mean()


def no_gradient(logits, batch):
    return 0 * logits.sum()


def linear_apply(variables, inputs, *, train, key=None):
    """A linear student whose statistics count batches and follow the inputs' mean."""
    stats = variables.stats
    if train:
        stats = {"n": stats["n"] + 1, "mean": 0.5 * stats["mean"] + 0.5 * inputs.mean(0)}
    return inputs @ variables.params["w"], Variables(variables.params, stats)


def linear_start():
    w = jnp.asarray(np.random.default_rng(3).normal(size=(F, K)), jnp.float32)
    return Variables({"w": w}, {"n": jnp.int32(0), "mean": jnp.zeros(F)})


def trajectory(start, rate, steps):
    """The iterates of plain gradient descent on `squared`, in NumPy and float64: [steps, F, K], and the batch means."""
    w, mean = np.asarray(start.params["w"], np.float64), np.zeros(F)
    iterates, means = [], []
    for i in range(steps):
        batch_rows = np.asarray(rows(i))
        x = np.asarray(EXPLORE.inputs, np.float64)[batch_rows]
        target = np.asarray(EXPLORE.teacher["logits"], np.float64)[batch_rows]
        w = w - rate * x.T @ (x @ w - target) / B
        mean = 0.5 * mean + 0.5 * x.mean(0)
        iterates.append(w)
        means.append(mean)
    return np.stack(iterates), np.stack(means)


@functools.cache
def compiled(arm):
    return jax.jit(lambda state, start, steps: arm.propose(state, DRAW, stretch(start, steps)))


def stretch(start, steps, spent=0.0, each=0.0):
    return Stretch(jnp.int32(start), jnp.int32(steps), jnp.float32(spent), jnp.float32(each))


def propose(arm, state, start, steps):
    return compiled(arm)(state, np.int32(start), np.int32(steps))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
