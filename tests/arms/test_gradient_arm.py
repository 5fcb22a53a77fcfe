"""Gradient arms: trajectories, weight decay, iterate averages, BatchNorm, dropout; and the zoo of named arms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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
from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, initial_state, make_step
from ev3_distill.core.explore import draw_from
from ev3_distill.errors import InputError
from ev3_distill.students import from_nnx
from ev3_distill.students.families.mlp import mlp
from ev3_distill.tasks.classification import losses
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import ADOPT, Batch, Pools, Stretch, Variables

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


# The zoo.


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
