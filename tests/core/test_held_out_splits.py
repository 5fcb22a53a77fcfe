"""Held-out splits get no gradients and are evaluated completely; averages of proposals; false promotions of whole runs."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning_checks import GOOD, LEARNABLE, NETWORK, SLOW, START, begin_good, proposals_of, step_good
from random_walks import (
    MANY,
    NAN,
    NAN_STUDENT,
    SOUND,
    apply_threshold,
    assert_same,
    begin,
    differ,
    ladder,
    make_split,
    proposals_at,
    scored,
    threshold,
)

import ev3_distill.core
from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, adapt, allocate, assess, explore, initial_state, make_step
from ev3_distill.core import step as step_module
from ev3_distill.core.paired_tests import paired
from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import ADOPT, PROMOTE, Arm, Pools, Proposals, Variables

CORE = Path(ev3_distill.core.__file__).parent


# No gradients on held-out splits.


def scrambled(split):
    rng = np.random.default_rng(7)
    return split._replace(
        inputs=jnp.asarray(100 * rng.normal(size=split.inputs.shape), jnp.float32),
        targets=jnp.asarray(rng.permutation(split.targets)),
        teacher={"logits": -split.teacher["logits"]},
        weight=5 * split.weight,
    )


def test_proposals_do_not_depend_on_assess_or_decide():
    other = LEARNABLE._replace(assess=scrambled(LEARNABLE.assess), decide=scrambled(LEARNABLE.decide))
    proposals, proposals_other_splits = proposals_of((GOOD, SLOW)), proposals_of((GOOD, SLOW), other)
    assert_same(proposals, proposals_other_splits)
    assert differ(proposals, proposals_of((GOOD, SLOW), LEARNABLE._replace(explore=scrambled(LEARNABLE.explore))))


def test_iteration_has_zero_derivative_along_held_out_splits():
    """The forward derivative of an adopted iteration is zero along assess and decide, but not along explore."""
    start = scored(begin_good(LEARNABLE), 0)
    at = {name: (getattr(LEARNABLE, name).inputs, getattr(LEARNABLE, name).teacher) for name in LEARNABLE._fields[:3]}

    def outcome(floats):
        splits = {
            name: getattr(LEARNABLE, name)._replace(inputs=inputs, teacher=teacher)
            for name, (inputs, teacher) in floats.items()
        }
        state, decision = step_good(LEARNABLE._replace(**splits), start, np.int32(MANY))
        return (state.current.variables, state.champion.variables, state.arms.states), decision.verdict

    derivative = jax.jit(lambda tangents: jax.jvp(outcome, (at,), (tangents,)))
    for name in at:
        tangents = {
            other: jax.tree.map(lambda leaf, on=other == name: jnp.full_like(leaf, on), at[other]) for other in at
        }
        (_, verdict), (derivatives, _) = derivative(tangents)
        assert int(verdict) in (ADOPT, PROMOTE)
        floats = [leaf for leaf in jax.tree.leaves(derivatives) if leaf.dtype == jnp.float32]
        assert len(floats) > 10
        assert any(bool((leaf != 0).any()) for leaf in floats) == (name == "explore")


def test_core_never_receives_the_test_split():
    assert Pools._fields == ("explore", "assess", "decide", "seen")  # seen is a part of explore
    for module in (adapt, allocate, assess, explore, step_module):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            assert "test" not in inspect.signature(function).parameters, f"{module.__name__}.{name}"
    for path in CORE.glob("*.py"):
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "test" not in attributes, path.name


# Assess.


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 25])
def test_every_example_is_evaluated_exactly_once_in_order(n):
    """In chunks of five, each example gets its own logits, and none is dropped, repeated or padded."""

    def network(variables, inputs, *, train, key=None):
        assert not train
        return inputs * variables.params["t"] + jnp.array([0.0, 1.0]), variables

    inputs = make_split(np.arange(n) * 3.0 + 1).inputs
    logits = assess.outputs_of(network, threshold(2), inputs, batch_size=5)
    np.testing.assert_array_equal(logits, np.stack([np.arange(n) * 6.0 + 2, np.arange(n) * 6.0 + 3], 1))
    np.testing.assert_array_equal(logits, network(threshold(2), inputs, train=False)[0])


def test_tree_of_outputs_does_not_depend_on_the_chunk_size():
    def network(variables, inputs, *, train, key=None):
        x = inputs[:, 0]
        return {"value": x, "box": (x[:, None, None] * jnp.ones((2, 3)), x[:, None] > 5)}, variables

    inputs = make_split(np.arange(13)).inputs
    chunked, whole = (assess.outputs_of(network, threshold(0), inputs, batch_size=size) for size in (5, 13))
    assert jax.tree.map(jnp.shape, chunked) == {"value": (13,), "box": ((13, 2, 3), (13, 1))}
    assert_same(chunked, whole)


def test_scores_do_not_depend_on_the_chunk_size():
    split = LEARNABLE.assess
    unchunked = assess.outputs_of(NETWORK.apply, START, split.inputs, batch_size=1000)
    for batch_size in (7, 49, 50):
        chunked = assess.outputs_of(NETWORK.apply, START, split.inputs, batch_size=batch_size)
        np.testing.assert_allclose(chunked, unchunked, rtol=1e-5, atol=1e-6)
        objectives = Objectives(example_scores.log_likelihood, ACCURACY)
        evidence = assess.score(NETWORK.apply, START, split, objectives, batch_size=batch_size)
        np.testing.assert_allclose(
            evidence.select, example_scores.log_likelihood(unchunked, split), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(evidence.promise, example_scores.accuracy(unchunked, split))


def test_assess_scores_every_proposal_on_every_example():
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), threshold(3), threshold(50), threshold(NAN), threshold(23)
    )
    proposals = Proposals(stacked, (), jnp.array([True, True, False, False]))
    evidence = assess.assess(
        apply_threshold,
        proposals,
        ladder(23),
        Objectives(lambda logits, split: logits[:, 0] + 0 * split.targets, ACCURACY),
        batch_size=5,
    )
    x = np.arange(23) + 0.5
    np.testing.assert_array_equal(evidence.select[:2], [3 - x, 50 - x])
    np.testing.assert_array_equal(evidence.promise[:2], [x < 3, x < 50])
    assert np.isnan(evidence.select[2:]).all()
    assert np.isnan(evidence.promise[2:]).all()


def test_paired_returns_mean_and_standard_error_of_differences():
    scores, reference = jnp.array([[1.0, 0, 1, 1], [0, 0, 0, 0]]), jnp.array([0.0, 0, 1, 0])
    mean, se = paired(scores, reference)
    np.testing.assert_allclose(mean, [0.5, -0.25])
    differences = np.array([[1, 0, 0, 1], [0, 0, -1, 0]])
    np.testing.assert_allclose(se, differences.std(1, ddof=1) / 2, rtol=1e-6)
    assert float(paired(jnp.ones(1), jnp.zeros(1))[1]) == 0  # one example: no spread, and no division by zero


@pytest.mark.parametrize("steps", [(3, 3, 0, 0), (3, 0, 0, 0), (0, 0, 0, 0), (3, 0, 3, 2)])
def test_proposals_are_one_row_for_each_arm_and_active_if_trained_and_finite(steps):
    start = begin((1, 3, 5, 5), health=(SOUND, SOUND, NAN_STUDENT, SOUND))
    proposals = proposals_at(start, jnp.array(steps))
    assert proposals.active.tolist() == [steps[0] > 0, steps[1] > 0, False, steps[3] > 0]
    t = np.asarray(proposals.variables.params["t"])
    np.testing.assert_array_equal(t[[0, 1, 3]], [8 + steps[0], 8 + 3 * steps[1], 8 + 5 * steps[3]])
    assert np.isnan(t[2]) == (steps[2] > 0)


@pytest.mark.parametrize(
    ("tree", "want"),
    [
        ({"a": 1.0, "b": 2}, True),
        ({"a": NAN, "b": 2}, False),
        ({"a": 1.0, "b": -np.inf}, False),
        ({"a": np.array([[1, 2], [3, np.nan]], np.float32)}, False),
        ({"a": np.array([1.0], jnp.bfloat16), "b": np.array([np.inf], jnp.bfloat16)}, False),
    ],
)
def test_all_finite_detects_nan_and_inf_in_any_leaf(tree, want):
    assert bool(explore.all_finite(jax.tree.map(jnp.asarray, tree))) == want


# False promotions of whole runs.


def test_rate_of_runs_with_a_false_promotion_is_at_most_delta():
    """Every student is right on a random 60 % of the population, so none is truly better and every promotion is false.

    Each arm proposes an unrelated student in each iteration, and assess selects among them by chance.
    """
    runs, n, iterations, delta = 1000, 96, 6, 0.3

    def hashed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * np.uint32(factor)
        return x

    def apply(variables, inputs, *, train, key=None):
        bits = hashed(hashed(variables.params["seed"].view(jnp.uint32)) ^ inputs[:, 0].astype(jnp.uint32))
        right = jnp.where(bits < np.uint32(0.6 * 2**32), 1.0, -1.0)
        return jnp.stack([right, jnp.zeros_like(right)], 1), variables

    def random_arm(i):
        def propose(state, draw, stretch):
            start, steps = stretch.start, stretch.steps
            bits = hashed(jax.random.key_data(draw(start)[1])[0] + np.uint32(i))
            seed = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32)  # finite: 1 to 2
            return state, Variables({"seed": jnp.where(steps > 0, seed, state)}, {})

        return Arm(str(i), lambda variables: variables.params["seed"], propose)

    arms = [random_arm(i) for i in range(2)]
    config = EV3(batch_size=1, length=1, max_length=1, delta=delta, eval_batch_size=n)
    objectives = Objectives(example_scores.accuracy, ACCURACY)
    algorithm = Algorithm(apply, arms, lambda pool, step: pool, objectives, config)
    step = make_step(algorithm)

    def run(key):
        examples = jax.random.randint(key, (2, n), 0, 2**22).astype(jnp.float32)  # exact in float32
        pools = Pools(make_split(jnp.zeros(1)), make_split(examples[0]), make_split(examples[1]))
        start = Variables({"seed": jnp.float32(1.5)}, {})
        state = initial_state(jax.random.key_data(key), start, pools, algorithm)
        state, decisions = jax.lax.scan(lambda state, left: step(pools, state, left), state, limits)
        return state.budget, decisions.promotion.tested.sum()

    limits = jnp.where(jnp.arange(iterations) < iterations - 1, MANY, 0)
    budget, tested = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), runs))
    false = float((budget.promotions > 0).mean())
    assert false <= delta + 3 * (delta * (1 - delta) / runs) ** 0.5
    assert float(tested.mean()) > 0.5  # enough tests for the bound to be meaningful
    assert float(budget.left.max()) <= delta * (1 + 1e-5)
