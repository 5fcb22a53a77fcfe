"""The evolution arm and its parameter subspaces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_landscapes import KEY, random_variables

from ev3_distill import students
from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.errors import InputError
from ev3_distill.evolution import EvolutionConfig, parameters_named
from ev3_distill.tasks.classification import example_scores, steering
from ev3_distill.types import Batch, Stretch

N, F, K = 64, 4, 3


def make_batch(seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(N, F))
    labels = np.argmax(inputs @ np.random.default_rng(9).normal(size=(F, K)), -1)
    blank = jnp.zeros((N, K))
    return Batch(
        jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32), {"logits": blank}, jnp.arange(N), jnp.ones(N)
    )


BATCH = make_batch(0)
MLP = students.from_name("mlp:hidden=8", (F,), K)
START = random_variables(MLP)


def draw(step):
    return BATCH, jax.random.fold_in(KEY, step)


@functools.cache
def compiled_propose(arm):
    return jax.jit(lambda state, stretch: arm.propose(state, draw, stretch))


def propose(arm, state, start, steps):
    return compiled_propose(arm)(state, Stretch(jnp.int32(start), jnp.int32(steps), jnp.float32(0), jnp.float32(0)))


@functools.cache
def make_arm(objective=example_scores.accuracy, pairs=6, sigma=0.1, **options):
    return evolution_arm(
        "es", MLP.apply, objective, optax.adam(0.05), EvolutionConfig(pairs=pairs, sigma=sigma), **options
    )


OBJECTIVES = {
    "accuracy": example_scores.accuracy,
    "worst class": steering.goal("worst_class_accuracy", 0).score,
    "a scalar": lambda logits, batch: -jnp.square(logits - jax.nn.one_hot(batch.targets, K)).mean(),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_arm_improves_an_objective_without_gradient(objective):
    score = OBJECTIVES[objective]
    arm = make_arm(score, pairs=24, sigma=0.2)
    _, student = propose(arm, arm.init(START), 0, 16 * 60)
    before, after = (
        float(jnp.mean(score(MLP.apply(variables, BATCH.inputs, train=False)[0], BATCH)))
        for variables in (START, student)
    )
    assert after > before + 0.1


def test_split_trajectory_spends_the_same_steps_as_a_whole_one():
    """A generation of 6 pairs costs 4 steps; unspent steps of one stretch carry over to the next."""
    arm = make_arm()
    state, student = propose(arm, arm.init(START), 0, 22)
    assert int(state.evolution.generation) == 5 and int(state.unspent) == 2
    in_parts = arm.init(START)
    for start, steps in ((0, 3), (3, 0), (3, 9), (12, 10)):
        in_parts, last = propose(arm, in_parts, start, steps)
    assert int(in_parts.evolution.generation) == 5 and int(in_parts.unspent) == 2
    assert jax.tree.structure(last) == jax.tree.structure(student) == jax.tree.structure(START)


def test_zero_steps_leave_state_and_student_unchanged():
    arm = make_arm()
    state, student = propose(arm, arm.init(START), 0, 0)
    jax.tree.map(np.testing.assert_array_equal, (state, student), (arm.init(START), START))


@pytest.mark.parametrize(
    ("family", "name", "moving"),
    [
        ("conv4:width=4", "norms", ["norms"]),
        ("conv4:width=4", "head", ["head"]),
        ("mlp:hidden=8", "biases", ["bias"]),
        ("mlp:hidden=8", "head", ["[1]"]),
        ("conv4:width=4", r"\['convs'\]\[0\]", ["['convs'][0]"]),
    ],
)
def test_subspace_changes_only_the_parameters_it_names(family, name, moving):
    shape = (16, 16, 1) if "conv" in family else (F,)
    params = jax.tree.map(np.asarray, random_variables(students.from_name(family, shape, K)).params)
    subspace = parameters_named(name)(params)
    assert 0 < len(subspace.selected) < len(jax.tree.leaves(params))
    assert all(any(word in path for word in moving) for path in subspace.selected)
    joined = subspace.join(jax.tree.map(lambda leaf: leaf + 1, subspace.selected))
    for path, leaf in jax.tree_util.tree_leaves_with_path(joined):
        before = dict(jax.tree_util.tree_leaves_with_path(params))[path]
        expected = 1 if jax.tree_util.keystr(path) in subspace.selected else 0
        np.testing.assert_array_equal(leaf, before + expected)


def test_subspace_without_parameters_is_rejected():
    with pytest.raises(InputError, match="norms must match at least one parameter; the network has"):
        make_arm(subspace=parameters_named("norms")).init(START)


def test_arm_changes_only_its_subspace():
    arm = make_arm(subspace=parameters_named("head"))
    _, student = propose(arm, arm.init(START), 0, 40)
    layers = student.params["layers"], START.params["layers"]
    np.testing.assert_array_equal(layers[0][0]["kernel"], layers[1][0]["kernel"])
    assert float(jnp.abs(layers[0][1]["kernel"] - layers[1][1]["kernel"]).max()) > 0
