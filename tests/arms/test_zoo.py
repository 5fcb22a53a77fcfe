"""The zoo of named arms: its contract, portfolios, learning rates and names."""

import dataclasses
import functools
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
    START,
    assert_same,
    linear_apply,
    linear_start,
    propose,
    rows,
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
from ev3_distill.arms.optimizers import adamw, muon, sgd
from ev3_distill.arms.zoo import CONVOLUTIONAL, round_late, up_and_down
from ev3_distill.errors import InputError
from ev3_distill.tasks.classification import losses

pytestmark = pytest.mark.portfolio


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
    assert default_arm_names(of_mlp, labels=False) == tuple(name for name in DEFAULT if name != "ce-sgd")
    assert default_arm_names(of_resnet) == CONVOLUTIONAL
    assert default_arm_names(of_resnet, labels=False) == CONVOLUTIONAL[:1]
    assert set(CONVOLUTIONAL) | {label_arm_name(of_resnet), label_arm_name(of_mlp)} <= set(ARMS)
    assert (label_arm_name(of_mlp), label_arm_name(of_resnet)) == ("ce", "ce-muon")


FAMILIES = ("mlp", "transformer", "resnet", "mobilenet", "conv4", "convnet1d")
ON_RARE_CLASSES = ("worst_class_accuracy", "balanced_accuracy", "macro_f1", "recall(3)")


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_alone_race_in_every_default_portfolio(family):
    arms = arms_named(MLP.apply, default_arm_names({"family": family}))
    assert len(arms) > 1
    assert all(arm.races for arm in arms)
    assert [arm.name for arm in arms if not ARMS[arm.name].uses_teacher]
    assert [arm.name for arm in arms if ARMS[arm.name].uses_teacher]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_labels_every_default_arm_learns_from_the_teacher(family):
    names = default_arm_names({"family": family}, labels=False)
    assert names
    assert all(ARMS[name].uses_teacher for name in names)


def test_default_arms_of_networks_without_convolutions_differ_in_optimizer_and_loss():
    assert {ARMS[name].optimizer for name in DEFAULT} == {"muon", "sgd", "adamw"}
    assert all(ARMS[name].optimizer == "muon" for name in CONVOLUTIONAL)


def test_arms_of_a_short_race_by_default_are_one_that_needs_no_teacher_and_one_that_does():
    fast = [arm.name for arm in arms_named(MLP.apply, DEFAULT) if arm.starts_fast]
    assert fast[:2] == ["trust-sgd", "ce-sgd"] and [ARMS[name].uses_teacher for name in fast[:2]] == [True, False]
    assert {ARMS[name].uses_teacher for name in CONVOLUTIONAL} == {True, False} and len(CONVOLUTIONAL) == 2


@pytest.mark.parametrize("metric", ON_RARE_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_goal_that_balances_classes_adds_balanced_arms(family, metric):
    spec = {"family": family}
    plain, names = default_arm_names(spec), default_arm_names(spec, goals=["accuracy", metric])
    assert names[: len(plain)] == plain
    added = names[len(plain) :]
    assert added
    assert all(name.endswith("-balanced") for name in added)
    assert all(arm.races for arm in arms_named(MLP.apply, names))
    assert default_arm_names(spec, goals=["accuracy", "brier"]) == plain


# Optimizers.


def moved(optimizer, gradients):
    """Updates of a parameter tree by gradients, one after the other, from zero."""
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, outcome = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        outcome.append(updates)
    return outcome


def gradients_like(shapes, count=4):
    rng = np.random.default_rng(0)

    def drawn(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [jax.tree.map(drawn, shapes, is_leaf=lambda node: isinstance(node, tuple)) for _ in range(count)]


assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
DENSE = {"layers": [{"kernel": (6, 5), "bias": (5,)}, {"kernel": (5, 3), "bias": (3,)}], "positions": (4, 6)}
CONVOLVING = {"first": {"kernel": (3, 3, 2, 8), "scale": (8,)}, "head": {"kernel": (8, 3), "bias": (3,)}}


def test_sgd_has_nesterov_momentum_and_weight_decay():
    """m = 0.9 m + (g + 5e-4 w); w = w - 0.1 (g + 5e-4 w + 0.9 m), in NumPy and float64."""
    arm = gradient_arm("a", linear_apply, squared, sgd(0.1), average=None)
    state, _ = propose(arm, arm.init(linear_start()), 0, 25)
    w = np.asarray(linear_start().params["w"], np.float64)
    momentum = np.zeros_like(w)
    for i in range(25):
        x, target = (
            np.asarray(leaf, np.float64)[np.asarray(rows(i))] for leaf in (EXPLORE.inputs, EXPLORE.teacher["logits"])
        )
        gradient = x.T @ (x @ w - target) / len(x) + 5e-4 * w
        momentum = 0.9 * momentum + gradient
        w = w - 0.1 * (gradient + 0.9 * momentum)
    np.testing.assert_allclose(state.iterate.params["w"], w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize(("size", "vectors"), [(99, 1), (100, 2)])
def test_parameters_are_one_vector_in_small_networks_alone(monkeypatch, optimizer, size, vectors):
    monkeypatch.setattr("ev3_distill.arms.optimizers.SMALL", 100)
    draw = np.random.default_rng(0).normal
    params, gradients = (
        {"bias": jnp.asarray(draw(size=9)), "kernel": jnp.asarray(draw(size=size - 9))} for _ in range(2)
    )
    plain = optax.adamw(0.1, weight_decay=1e-4)
    if optimizer is sgd:
        plain = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    results = []
    for one in (optimizer(0.1), plain):
        state, current = one.init(params), params
        for _ in range(3):
            updates, state = one.update(gradients, state, current)
            current = optax.apply_updates(current, updates)
        results.append((current, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), results[0][0], results[1][0])
    moments = [leaf for leaf in jax.tree.leaves(results[0][1]) if leaf.ndim]
    assert len(moments) == vectors * (2 if optimizer is adamw else 1)


def test_sgd_of_the_zoo_has_rate_a_tenth():
    """The first step is 1.9 times the rate times the gradient, decay included."""
    for name in ("ce-sgd", "kd2-sgd", "trust-sgd"):
        (arm,) = arms_named(MLP.apply, [name])
        plain = gradient_arm("p", MLP.apply, ARMS[name].loss(), optax.sgd(1.0), average=None)
        ours, gradient = (
            jax.tree.map(
                lambda a, b: a - b, one.propose(one.init(START), DRAW, stretch(0, 1))[0].iterate.params, START.params
            )
            for one in (arm, plain)
        )
        jax.tree.map(
            lambda step, g, w: np.testing.assert_allclose(step, 0.19 * (g - 5e-4 * w), rtol=1e-3, atol=1e-7),
            ours,
            gradient,
            START.params,
        )


def test_muon_without_convolutions_takes_kernels_of_two_axes():
    """Kernels train as with optax's Muon; vectors, and matrices that are no kernels, as with Adam with Nesterov momentum."""
    gradients = gradients_like(DENSE)
    ours = moved(muon(0.05), gradients)
    of_muon, of_adam = moved(optax.contrib.muon(0.05), gradients), moved(optax.nadam(0.05 / 4), gradients)
    for mine, by_muon, by_adam in zip(ours, of_muon, of_adam, strict=True):
        for layer in (0, 1):
            assert_close(mine["layers"][layer]["kernel"], by_muon["layers"][layer]["kernel"])
            assert_close(mine["layers"][layer]["bias"], by_adam["layers"][layer]["bias"])
        assert_close(mine["positions"], by_adam["positions"])
        values = np.linalg.svd(mine["layers"][0]["kernel"] / 0.05, compute_uv=False)
        assert ((values > 0.6) & (values < 1.3)).all()  # five Newton-Schulz steps bring them near 1


def test_muon_with_convolutions_leaves_the_head_to_adam():
    gradients = gradients_like(CONVOLVING)
    ours, by_adam = moved(muon(0.05), gradients), moved(optax.nadam(0.05 / 4), gradients)
    flat = [{"kernel": g["first"]["kernel"].reshape(18, 8)} for g in gradients]
    by_muon = moved(optax.contrib.muon(0.05), flat)
    for mine, adam, matrix in zip(ours, by_adam, by_muon, strict=True):
        assert_close(mine["first"]["kernel"].reshape(18, 8), matrix["kernel"])
        jax.tree.map(assert_close, mine["head"], adam["head"])


@pytest.mark.parametrize("name", ["kd4-muon", "trust-sgd", "ce-sgd", "kd4"])
def test_default_arms_round_weights_of_a_student_for_int8_late(name):
    """Until three quarters of the budget are spent, an arm trains as for float32; then the forward pass rounds."""
    seen = []

    def straight(variables, inputs, *, train, key=None, share=1.0):
        jax.debug.callback(lambda share: seen.append(float(share)), share)
        return MLP.apply(variables, inputs, train=train, key=key)

    (arm,) = arms_named(MLP.apply, [name], network=dataclasses.replace(MLP, straight=straight))
    jax.block_until_ready(arm.propose(arm.init(START), DRAW, stretch(0, 4, spent=0.5, each=0.1)))
    jax.effects_barrier()
    assert sorted(seen) == [0, 0, 0, 1]
    (plain,) = arms_named(MLP.apply, [name])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        *(one.propose(one.init(START), DRAW, stretch(0, 4))[1] for one in (arm, plain)),
    )


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
