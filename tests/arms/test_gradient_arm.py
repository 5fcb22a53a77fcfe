"""Gradient arms: trajectories, weight decay, iterate averages, BatchNorm and dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arm_trajectories import (
    DRAW,
    EXPLORE,
    MLP,
    POOLS,
    START,
    B,
    F,
    K,
    N,
    assert_same,
    linear_apply,
    linear_start,
    no_gradient,
    propose,
    rows,
    sample,
    squared,
    trajectory,
)
from flax import nnx

from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, initial_state, make_step
from ev3_distill.students import from_nnx
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import ADOPT, Variables

# Weight decay.

RATE, DECAY = 0.05, 0.1
DECAYED = {
    "adamw": optax.adamw(RATE, weight_decay=DECAY),
    "sgd": optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE)),
}


@pytest.mark.parametrize("trajectories", [[200], [100, 100]], ids=["one", "two"])
@pytest.mark.parametrize("optimizer", DECAYED)
def test_weight_decay_applies_to_the_current_parameters(optimizer, trajectories):
    arm = gradient_arm("a", MLP.apply, no_gradient, DECAYED[optimizer], average=None)
    state, at = arm.init(START), 0
    for steps in trajectories:
        state, proposed = propose(arm, state, at, steps)
        at += steps
    shrunk = (1 - RATE * DECAY) ** 200
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, shrunk * b, rtol=1e-4), proposed.params, START.params)


@pytest.mark.parametrize("optimizer", DECAYED)
def test_weight_decay_over_two_adopted_iterations(optimizer):
    """In whole steps: assess favors small logits here, so both trajectories of 100 steps are adopted."""
    arm = gradient_arm("a", MLP.apply, no_gradient, DECAYED[optimizer], average=None)
    config = EV3(batch_size=B, length=100, max_length=100)
    objectives = Objectives(lambda logits, split: -jnp.abs(logits).sum(-1), ACCURACY)
    algorithm = Algorithm(MLP.apply, [arm], sample, objectives, config)
    step = make_step(algorithm)
    key = jax.random.key_data(jax.random.key(0))
    state = initial_state(key, START, POOLS, algorithm)
    for _ in range(2):
        state, decision = step(POOLS, state, np.int32(200))
        assert int(decision.verdict) == ADOPT
    shrunk = (1 - RATE * DECAY) ** 200
    trained = state.current.variables.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, shrunk * b, rtol=1e-4), trained, START.params)
    assert int(state.arms.states[0].age) == 200


# Trajectories and averages.


def test_last_iterate_is_proposed_without_averaging():
    arm = gradient_arm("a", linear_apply, squared, optax.sgd(0.1), average=None)
    state, proposed = propose(arm, arm.init(linear_start()), 0, 30)
    iterates, means = trajectory(linear_start(), 0.1, 30)
    np.testing.assert_allclose(proposed.params["w"], iterates[-1], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(proposed.stats["mean"], means[-1], rtol=2e-4, atol=1e-5)
    assert_same(proposed, state.iterate)


@pytest.mark.parametrize("split", [[30], [1, 12, 17]], ids=["whole", "in parts"])
@pytest.mark.parametrize("eta", [1, 3, 8])
def test_average_is_polynomial_decay_averaging(eta, split):
    """Shamir and Zhang's weights in closed form, in float64: step i of t weighs i (i + 1) ... (i + eta - 1)."""
    arm = gradient_arm("a", linear_apply, squared, optax.sgd(0.1), average=float(eta))
    state, at = arm.init(linear_start()), 0
    for steps in split:
        state, proposed = propose(arm, state, at, steps)
        at += steps
    iterates, means = trajectory(linear_start(), 0.1, 30)
    weights = np.array([math.prod(range(i, i + eta)) for i in range(1, 31)], np.float64)
    weights /= weights.sum()
    np.testing.assert_allclose(proposed.params["w"], np.tensordot(weights, iterates, 1), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(proposed.stats["mean"], np.tensordot(weights, means, 1), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(
        state.iterate.params["w"], iterates[-1], rtol=2e-4, atol=1e-5
    )  # the state keeps the last one
    assert int(proposed.stats["n"]) == 30  # an integer follows the iterate
    assert proposed.stats["n"].dtype == jnp.int32
    assert_same(proposed, state.average)


def test_trajectory_in_parts_equals_the_whole():
    arm = gradient_arm("a", MLP.apply, squared, optax.adam(0.01))
    whole = propose(arm, arm.init(START), 0, 20)
    state = arm.init(START)
    for at, steps in ((0, 7), (7, 0), (7, 13)):
        state, proposed = propose(arm, state, at, steps)
    assert_same((state, proposed), whole)


def test_init_resets_optimizer_and_average():
    """init depends only on the student: no optimizer state of an earlier trajectory, and a new average."""
    arm = gradient_arm("a", MLP.apply, squared, optax.adam(0.01))
    _, proposed = propose(arm, arm.init(START), 0, 5)
    fresh = arm.init(proposed)
    assert int(fresh.age) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(fresh.opt_state))
    state, _ = propose(arm, fresh, 5, 1)
    first = zip(jax.tree.leaves(state.average), jax.tree.leaves(state.iterate), strict=True)
    for average, iterate in first:  # the first step has all the weight
        np.testing.assert_allclose(average, iterate, rtol=1e-5, atol=1e-7)


def test_optimizer_updates_only_params():
    """An optimizer that changes all its inputs does not change the statistics."""
    arm = gradient_arm("a", linear_apply, squared, DECAYED["sgd"], average=None)
    _, proposed = propose(arm, arm.init(linear_start()), 0, 3)
    _, means = trajectory(linear_start(), 0.1, 3)
    np.testing.assert_allclose(proposed.stats["mean"], means[-1], rtol=1e-5, atol=1e-6)


# Networks with statistics and noise.


class Normed(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(F, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(F, K, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


class Dropped(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(F, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, K, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.hidden(x))))


def test_batch_norm_statistics_are_part_of_the_proposal():
    network = from_nnx(lambda rngs: Normed(rngs=rngs))
    start = network.init(jax.random.key(0))
    arm = gradient_arm("a", network.apply, squared, optax.sgd(0.01), average=None)
    _, proposed = propose(arm, arm.init(start), 0, 12)
    mean, var = np.zeros(F), np.ones(F)
    for i in range(12):
        x = np.asarray(EXPLORE.inputs, np.float64)[np.asarray(rows(i))]
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    np.testing.assert_allclose(proposed.stats["norm"]["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(proposed.stats["norm"]["var"], var, rtol=1e-4, atol=1e-5)
    # evaluation of the proposal uses them, not the statistics of the batch
    evaluate = jax.jit(lambda variables, inputs: network.apply(variables, inputs, train=False)[0])
    many = evaluate(proposed, POOLS.assess.inputs)
    np.testing.assert_allclose(evaluate(proposed, POOLS.assess.inputs[:1])[0], many[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(many, evaluate(Variables(proposed.params, start.stats), POOLS.assess.inputs))


def test_batch_norm_statistics_are_averaged():
    network = from_nnx(lambda rngs: Normed(rngs=rngs))
    arm = gradient_arm("a", network.apply, squared, optax.sgd(0.01), average=2.0)
    state, proposed = propose(arm, arm.init(network.init(jax.random.key(0))), 0, 12)
    means, mean = [], np.zeros(F)
    for i in range(12):
        x = np.asarray(EXPLORE.inputs, np.float64)[np.asarray(rows(i))]
        mean = 0.9 * mean + 0.1 * x.mean(0)
        means.append(mean)
    weights = np.array([i * (i + 1) for i in range(1, 13)], np.float64)
    np.testing.assert_allclose(
        proposed.stats["norm"]["mean"], np.average(means, axis=0, weights=weights), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state.iterate.stats["norm"]["mean"], means[-1], rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_the_step_and_is_common_to_all_arms():
    network = from_nnx(lambda rngs: Dropped(rngs=rngs))
    start = network.init(jax.random.key(0))
    inputs = EXPLORE.inputs[:B]
    train = jax.jit(lambda step: network.apply(start, inputs, train=True, key=DRAW(step)[1])[0])
    evaluate = jax.jit(lambda key: network.apply(start, inputs, train=False, key=key)[0])

    def logits(step):
        return np.asarray(train(np.int32(step)))

    np.testing.assert_array_equal(logits(3), logits(3))
    assert not np.allclose(logits(3), logits(4))
    twins = [gradient_arm(name, network.apply, squared, optax.sgd(0.1)) for name in "ab"]
    one, other = (propose(arm, arm.init(start), 5, 4) for arm in twins)
    assert_same(one, other)
    elsewhere = propose(twins[0], twins[0].init(start), 5 + 5 * N, 4)  # the same batches, other keys
    assert not np.allclose(one[1].params["out"]["kernel"], elsewhere[1].params["out"]["kernel"])
    np.testing.assert_array_equal(evaluate(jax.random.key(7)), evaluate(jax.random.key(8)))
