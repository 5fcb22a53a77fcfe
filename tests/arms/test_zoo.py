"""The zoo of named arms: its contract, portfolios, learning rates and names."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arm_trajectories import (
    DRAW,
    MLP,
    START,
    assert_same,
    linear_apply,
    linear_start,
    propose,
    squared,
    stretch,
    trajectory,
)

from ev3_distill.arms import (
    ARMS,
    DEFAULT,
    EVOLVING,
    arms_named,
    default_arm_names,
    default_arms,
    label_arm_name,
)
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw
from ev3_distill.arms.zoo import CONVOLUTIONAL, round_late, up_and_down
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification import losses


@pytest.mark.parametrize("name", (*ARMS, *EVOLVING))
def test_every_arm_of_the_zoo_meets_the_contract(name):
    (arm,) = arms_named(MLP.apply, [name])
    assert arm.name == name
    assert arm.length > 0
    start = arm.init(START)
    rested, same = propose(arm, start, 0, 0)
    assert_same(rested, start)  # zero steps change nothing
    assert_same(same, START)
    moved, proposed = propose(arm, start, 0, 60 if name in EVOLVING else 6)  # a generation takes 21 steps
    shape = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (start, START))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (moved, proposed)) == shape
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((moved, proposed)))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), proposed.params, START.params)
    assert all(jax.tree.leaves(changed))


def test_default_names_follow_the_family_and_the_labels():
    of_mlp, of_resnet = ({"family": family} for family in ("mlp", "resnet"))
    assert default_arm_names(of_mlp) == DEFAULT
    assert default_arm_names({"factory": "mine:make"}) == DEFAULT
    assert default_arm_names(of_mlp, labels=False) == tuple(name for name in DEFAULT if name != "ce-challenger")
    assert default_arm_names(of_resnet) == CONVOLUTIONAL
    assert default_arm_names(of_resnet, labels=False) == CONVOLUTIONAL[:1]
    assert set(CONVOLUTIONAL) | {label_arm_name(of_resnet), label_arm_name(of_mlp)} <= set(ARMS)
    assert (label_arm_name(of_mlp), label_arm_name(of_resnet)) == ("ce", "ce-muon")


@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_default_portfolio_contains_a_label_only_arm_that_skips_the_race(family):
    """Label-only arms are in the default portfolio but skip the first race, which they would win because it is short."""
    arms = arms_named(linear_apply, default_arm_names({"family": family}))
    assert [arm.name for arm in arms if arm.name.startswith("ce")]
    assert [arm.name for arm in arms if arm.races] == ["kd4" if family == "mlp" else "kd4-muon"]


def test_goal_on_the_worst_class_adds_balanced_arms_and_races_all():
    arms = arms_named(linear_apply, default_arm_names({"family": "mlp"}, goals=["accuracy", "worst_class_accuracy"]))
    assert all(arm.races for arm in arms)
    assert {"ce-balanced", "ce-half-balanced"} <= {arm.name for arm in arms}


def test_tuned_arm_reports_its_hyperparameters():
    (arm,) = arms_named(MLP.apply, ["tuned-temperature-mix"])
    assert arm.uses_held_out
    assert set(arm.hyperparameters(arm.init(START))) == {"temperature", "mix"}
    with pytest.raises(InputError, match=r"an arm can tune temperature, mix, weights, rate, noise; got 'depth'"):
        arms_named(MLP.apply, ["tuned-depth"])


def test_annealed_arm_stops_at_the_end_of_the_budget():
    """The step size rises over the first twentieth of the budget and falls to zero at its end."""
    factors = [float(up_and_down(jnp.float32(spent))) for spent in (0, 0.025, 0.05, 0.525, 1)]
    np.testing.assert_allclose(factors, [0.05, 0.55, 1, 0.5, 0], atol=1e-6)
    arm = gradient_arm("a", MLP.apply, squared, optax.sgd(0.1), average=None, anneal=up_and_down)
    plain = gradient_arm("b", MLP.apply, squared, optax.sgd(0.1), average=None)
    at = functools.partial(arm.propose, arm.init(START), DRAW)
    assert_same(at(stretch(0, 3, spent=1.0))[1], START)  # step size zero
    step, whole = (one.propose(one.init(START), DRAW, stretch(0, 1, spent=0.525))[1] for one in (arm, plain))
    jax.tree.map(
        lambda half, full, start: np.testing.assert_allclose(2 * (half - start), full - start, rtol=1e-3, atol=1e-6),
        step,
        whole,
        START,
    )


def first_step(name, spent=0.0):
    """Largest change of a parameter in the first step of an arm of the zoo."""
    (arm,) = arms_named(MLP.apply, [name])
    state, _ = arm.propose(arm.init(START), DRAW, stretch(0, 1, spent=spent))
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.iterate.params, START.params)
    return max(jax.tree.leaves(changes))


@pytest.mark.parametrize(("name", "size"), [("ce", 0.01), ("ce-slow", 0.001), ("kd4-fast", 0.03)])
def test_learning_rates_of_the_zoo(name, size):
    """The first step of Adam equals the learning rate."""
    np.testing.assert_allclose(first_step(name), size, rtol=0.02)


def test_learning_rate_of_muon():
    """Biases train with Adam at a quarter of the rate 0.05; the schedule peaks at a twentieth of the budget.

    The first step of Adam with Nesterov momentum is 1 + 0.9 * 0.1 / (1 - 0.9^2) times the learning rate.
    """
    (arm,) = arms_named(MLP.apply, ["ce-muon"])
    state, _ = arm.propose(arm.init(START), DRAW, stretch(0, 1, spent=0.05))
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.iterate.params, START.params)
    biases = [change for change, x in zip(*map(jax.tree.leaves, (changes, START.params)), strict=True) if x.ndim == 1]
    np.testing.assert_allclose(max(biases), 0.05 / 4 * (1 + 0.09 / 0.19), rtol=0.02)


def test_evolution_arms_take_a_generation_of_64_members_in_21_steps():
    (arm,) = arms_named(MLP.apply, ["es-accuracy"])
    state, _ = propose(arm, arm.init(START), 0, 41)
    assert state.evolution.generation == 1 and state.unspent == 20
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.evolution.mean, START.params)
    np.testing.assert_allclose(max(jax.tree.leaves(changes)), 3e-3, rtol=0.02)


def test_members_of_evolution_arms_deviate_by_two_hundredths():
    members = []

    def recording_apply(variables, inputs, **options):
        jax.debug.callback(members.append, jax.tree.leaves(variables.params))
        return MLP.apply(variables, inputs, **options)

    (arm,) = arms_named(recording_apply, ["es-accuracy"])
    jax.block_until_ready(propose(arm, arm.init(START), 0, 21))
    jax.effects_barrier()
    deviations = [x - y for leaves in members for x, y in zip(leaves, jax.tree.leaves(START.params), strict=True)]
    assert len(members) == 64
    assert np.concatenate([np.ravel(x) for x in deviations]).std() == pytest.approx(0.02, rel=0.1)


def test_rounding_starts_at_three_quarters_of_the_budget():
    assert [float(round_late(jnp.float32(spent))) for spent in (0.0, 0.74, 0.75, 1.0)] == [0, 0, 1, 1]


def test_default_average_has_eta_8():
    """The weight of step i is proportional to i (i + 1) ... (i + 7)."""
    arm = gradient_arm("a", linear_apply, squared, optax.sgd(0.1))
    _, proposed = propose(arm, arm.init(linear_start()), 0, 30)
    iterates, _ = trajectory(linear_start(), 0.1, 30)
    weights = np.array([math.prod(range(i, i + 8)) for i in range(1, 31)], np.float64)
    expected = np.tensordot(weights / weights.sum(), iterates, 1)
    np.testing.assert_allclose(proposed.params["w"], expected, rtol=2e-4, atol=1e-5)


def test_default_arms_are_the_default_portfolio():
    assert tuple(arm.name for arm in default_arms(MLP.apply)) == DEFAULT
    assert set(DEFAULT) <= set(ARMS)


@pytest.mark.parametrize("names", [["nonesuch"], ["kd", "ce", "kd"]])
def test_unknown_or_repeated_arm_names_are_rejected(names):
    with pytest.raises(InputError, match=names[0]):
        arms_named(MLP.apply, names)


def test_arm_of_mixed_losses_minimizes_their_weighted_sum():
    text = "0.7*kd+0.3*ce@0.003"
    (named,) = arms_named(MLP.apply, [text])
    mix = losses.mix((0.7, losses.kd()), (0.3, losses.cross_entropy()))
    by_hand = gradient_arm(text, MLP.apply, mix, adamw(0.003))
    outcome = [arm.propose(arm.init(START), DRAW, stretch(0, 5))[1] for arm in (named, by_hand)]
    jax.tree.map(np.testing.assert_array_equal, *outcome)
    assert named.name == text


def test_adamw_on_one_vector_agrees_with_optax():
    outcome = [
        gradient_arm("ce", MLP.apply, losses.cross_entropy(), optimizer, average=None)
        for optimizer in (adamw(0.01), optax.adamw(0.01, weight_decay=1e-4))
    ]
    ours, theirs = (arm.propose(arm.init(START), DRAW, stretch(0, 20))[1].params for arm in outcome)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, theirs)


@pytest.mark.parametrize(
    "names", [["ce", "ce"], ["kd*0.5"], ["0.5*nothing"], ["-1*kd"], ["1*kd@fast"], ["1*kd@nan"], [""]]
)
def test_malformed_arm_names_are_rejected(names):
    with pytest.raises(InputError):
        arms_named(MLP.apply, names)
