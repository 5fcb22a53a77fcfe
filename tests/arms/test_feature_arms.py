"""Networks that expose features, and arms with a feature loss in addition to the loss on logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from feature_formulas import FORMULAS
from flax import nnx
from jax.flatten_util import ravel_pytree

from ev3_distill.arms import arms_named, teacher_features_of
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.config import EV3
from ev3_distill.core import Algorithm, Objectives, initial_state, make_step
from ev3_distill.core.explore import draw_from
from ev3_distill.errors import InputError
from ev3_distill.students import from_nnx
from ev3_distill.students.families.mlp import mlp
from ev3_distill.tasks.classification import example_scores, losses
from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES, FeatureLoss, with_features
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.types import ADOPT, PROMOTE, Batch, Pools, Stretch

N, K, SHAPE = 40, 3, (4, 4, 1)


def patches(x):
    """[B, 4, 4, 1] to [B, 2, 2, 4]."""
    return x.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 2, 2, 4)


class Small(nnx.Module):
    """A convolution, 2x2 with stride 2, and a linear head."""

    def __init__(self, *, rngs):
        self.patch = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, K, rngs=rngs)

    def __call__(self, x):
        return self.features(x)[0]

    def features(self, x):
        stage = nnx.relu(self.norm(self.patch(patches(x))))
        pooled = stage.mean((1, 2))
        return self.head(pooled), {"stage": stage, "pooled": pooled}


class Layered(nnx.Module):
    """Its `features` attribute is a layer, not a method."""

    def __init__(self, *, rngs):
        self.features = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.features(x)


SMALL = from_nnx(lambda rngs: Small(rngs=rngs), {"input_shape": list(SHAPE)})
TEACHER = {"block": (2, 2, 6), "embedding": (5,)}


def make_split(seed):
    """A split whose labels and teacher features are functions of the inputs."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    inputs = rng.normal(size=(N, *SHAPE)).astype(np.float32)
    block = patches(inputs) @ fixed.normal(size=(4, 6))
    logits, embedding = (inputs.reshape(N, -1) @ fixed.normal(size=(16, n)) for n in (K, 5))
    return Batch(
        jnp.asarray(inputs),
        jnp.asarray(logits.argmax(1), jnp.int32),
        {
            "logits": jnp.asarray(logits, jnp.float32),
            "block": jnp.asarray(block, jnp.float32),
            "embedding": jnp.asarray(embedding, jnp.float32),
        },
        jnp.arange(N, dtype=jnp.int32),
        jnp.ones(N),
    )


def sample(examples, step):
    return jax.tree.map(lambda leaf: leaf[(step * 8 + jnp.arange(8)) % N], examples)


EXPLORE = make_split(0)
DRAW = draw_from(EXPLORE, sample, jax.random.key(0))
HELD = [split._replace(teacher={"logits": split.teacher["logits"]}) for split in (make_split(1), make_split(2))]
POOLS = Pools(EXPLORE, *HELD)


def named(name, **changes):
    (arm,) = arms_named(SMALL.apply, [name], **{"network": SMALL, "teacher_features": TEACHER, **changes})
    return arm


def propose(arm, state, steps):
    stretch = Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0), jnp.float32(0))
    return jax.jit(lambda state: arm.propose(state, DRAW, stretch))(state)


@functools.cache
def start():
    return SMALL.init(jax.random.key(1))


@pytest.mark.parametrize("train", [False, True])
def test_features_come_with_identical_logits(train):
    variables, pixels = start(), jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, *SHAPE)), jnp.uint8)
    logits, after = SMALL.apply(variables, pixels / 255, train=train)
    (same, features), also = SMALL.features(variables, pixels, train=train)
    np.testing.assert_array_equal(same, logits)
    jax.tree.map(np.testing.assert_array_equal, also, after)
    assert {name: leaf.shape for name, leaf in features.items()} == {"stage": (8, 2, 2, 4), "pooled": (8, 4)}
    np.testing.assert_array_equal(SMALL.apply(variables, pixels, train=train)[0], logits)


def test_networks_without_a_features_method_have_none():
    assert mlp((4,), K).features is None
    assert from_nnx(lambda rngs: Layered(rngs=rngs)).features is None


@functools.cache
def arm_of(name):
    return named(name)


@functools.cache
def trained(name):
    arm = arm_of(name)
    return propose(arm, arm.init(start()), 60)


@pytest.mark.parametrize("name", ["fitnet:stage=block@0.02", "at:stage=block", "rkd:pooled=block*2", "sp:stage=block"])
def test_arm_reduces_its_feature_loss(name):
    """Its feature loss falls below that of kd4, and the proposal has only the variables of the student."""
    arm, (state, proposed) = arm_of(name), trained(name)
    assert arm.name == name
    assert jax.tree.structure(proposed) == jax.tree.structure(start())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, proposed)))
    (kind, student, teacher, *_) = re.split("[:=*@]", name)
    compare, fitted = jax.jit(FEATURE_LOSSES[kind]().compare), []
    for of in (state.iterate, trained("kd4")[0].iterate):
        (_, features), _ = SMALL.features(of, EXPLORE.inputs, train=True)
        s, t = features[student], EXPLORE.teacher[teacher]
        fitted.append(float(compare(s, t, EXPLORE.weight, regressor(s, t) if kind == "fitnet" else ())))
    assert fitted[0] < 0.9 * fitted[1]
    initial = arm.init(start()).extra
    assert all((a != b).all() for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(initial), strict=True))
    assert bool(jax.tree.leaves(initial)) == (kind == "fitnet")


def regressor(student, teacher):
    """The least-squares regressor from student features to teacher features."""
    rows = np.c_[np.asarray(student).reshape(-1, student.shape[-1]), np.ones(student.size // student.shape[-1])]
    solved = np.linalg.lstsq(rows, np.asarray(teacher).reshape(len(rows), -1), rcond=None)[0].astype(np.float32)
    return {"kernel": solved[:-1], "bias": solved[-1]}


def test_loss_of_a_named_arm_is_the_weighted_sum():
    """The loss is that of kd4 plus weight * feature loss, with its own learning rate.

    Outputs are compared, not parameters: a bias before BatchNorm has no gradient, and Adam turns its rounding errors
    into full steps.
    """
    logits_loss = losses.mix((0.9, losses.kd(temperature=4.0)), (0.1, losses.cross_entropy()))

    def loss(outputs, batch):
        logits, features = outputs
        block = batch.teacher["block"]
        return logits_loss(logits, batch) + 2.5 * FORMULAS["sp"].compare(features["pooled"], block, batch.weight, ())

    by_hand = gradient_arm("by_hand", SMALL.features, loss, optax.adamw(0.003, weight_decay=1e-4))
    arms = (
        by_hand,
        *map(named, ("sp:pooled=block*2.5@0.003", "sp:pooled=block*2.3@0.003", "sp:pooled=block*2.5@0.0029")),
    )
    outputs_of = jax.jit(lambda student: SMALL.features(student, EXPLORE.inputs, train=True)[0])
    wanted, same, *others = (ravel_pytree(outputs_of(propose(arm, arm.init(start()), 3)[1]))[0] for arm in arms)
    assert abs(same - wanted).max() < 1e-5
    assert all(abs(other - wanted).max() > 1e-4 for other in others)


def test_default_weights_of_feature_losses():
    assert {name: make().weight for name, make in FEATURE_LOSSES.items()} == {
        "fitnet": 100,
        "at": 1000,
        "rkd": 1,
        "sp": 3000,
    }
    two = FeatureLoss(lambda s, t, weight, extra: jnp.float32(2), lambda s, t: (), 3.0)
    outputs = EXPLORE.teacher["logits"], {"pooled": EXPLORE.inputs}
    for weight, expected in ((None, 6.0), (0.5, 1.0)):
        loss = with_features(lambda logits, batch: 0.25, two, student="pooled", teacher="block", weight=weight)
        assert float(loss(outputs, EXPLORE)) == 0.25 + expected


def test_extra_parameters_continue_after_adoption():
    """After a whole step that moves the student, regressor and optimizer continue from the proposal."""
    arm = arm_of("fitnet:stage=block@0.02")
    config = EV3(batch_size=8, length=40, max_length=40, eval_batch_size=N)
    algorithm = Algorithm(SMALL.apply, [arm], sample, Objectives(example_scores.probability, ACCURACY), config)
    step = make_step(algorithm)
    key = jax.random.key_data(jax.random.key(0))
    begin = jax.jit(lambda key: initial_state(key, start(), POOLS, algorithm))
    after, decision = step(POOLS, begin(key), np.int32(1000))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    (state,) = after.arms.states
    initial = arm.init(start())
    assert int(state.age) == 40
    own = sum(
        leaf.size for leaf in jax.tree.leaves(initial.extra)
    )  # the last entries of the moments, which are one vector
    changed = jax.tree.map(
        lambda a, b: bool((a != b).all()),
        (state.extra, state.opt_state[0].mu[-own:]),
        (initial.extra, initial.opt_state[0].mu[-own:]),
    )
    assert all(jax.tree.leaves(changed))
    assert len(jax.tree.leaves(changed)) == 3
    assert state.opt_state[0].mu.size == own + sum(leaf.size for leaf in jax.tree.leaves(initial.iterate.params))
    again, _ = step(POOLS, after, np.int32(1000))
    assert int(again.arms.states[0].age) in (40, 80)  # not adopted, or adopted


def test_without_extra_the_optimizer_updates_only_the_parameters():
    (arm,) = arms_named(SMALL.apply, ["kd4"])
    state = arm.init(start())
    assert state.extra == ()
    assert state.opt_state[0].mu.size == sum(leaf.size for leaf in jax.tree.leaves(start().params))


def test_teacher_features_are_parsed_from_arm_names():
    names = ["kd4", "at:stage=/layer3/Relu:0", "0.7*kd+0.3*ce", "rkd:pooled=a=b*2@1e-3", "sp:stage=/layer3/Relu:0@0.1"]
    assert teacher_features_of(names) == ("/layer3/Relu:0", "a=b")
    assert teacher_features_of(["sp:pooled=x*2@fast"]) == ("x*2@fast",)  # not a rate, so part of the name


@pytest.mark.parametrize(
    "name", ["at:stage=nothing", "at:nothing=block", "at:block=stage", "rkd:pooled=embedding@fast"]
)
def test_error_for_wrong_features_lists_the_available_ones(name):
    with pytest.raises(InputError) as error:
        named(name)
    for listed in (name, "pooled [4], stage [2, 2, 4]", "block [2, 2, 6], embedding [5]"):
        assert listed in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "at:stage",
        "at:=block",
        "at:stage=",
        "no:stage=block",
        "at:stage=block*-1",
        "at:stage=block@nan",
        "at:stage=block*0",
        ":",
    ],
)
def test_malformed_arm_names_are_rejected(name):
    with pytest.raises(InputError, match="an arm that learns features is"):
        named(name)


def test_missing_features_are_rejected():
    for changes in ({"network": None}, {"network": mlp((4,), K)}, {"network": from_nnx(lambda rngs: Small(rngs=rngs))}):
        with pytest.raises(InputError, match="the student has none; the teacher has block"):
            named("at:stage=block", **changes)
    with pytest.raises(InputError, match="the teacher has none"):
        named("at:stage=block", teacher_features=None)
    with pytest.raises(InputError, match="two images"):
        named("at:pooled=embedding")
    loss = with_features(losses.kd(), FEATURE_LOSSES["sp"](), student="stage", teacher="block")
    with pytest.raises(InputError, match="the teacher must have the feature 'block'; got logits"):
        loss((EXPLORE.teacher["logits"], {"stage": EXPLORE.inputs}), HELD[0])
