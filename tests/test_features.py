"""Losses on features: the papers' formulas, what is degenerate, and arms that learn features beside logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from ev3_distill import losses, objectives
from ev3_distill.arms import arms_named, features_asked
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.config import EV3
from ev3_distill.core import initial_state, make_step
from ev3_distill.core.explore import draw_from
from ev3_distill.errors import InputError
from ev3_distill.features import FEATURE_LOSSES, FeatureLoss, rkd, with_features
from ev3_distill.network import from_nnx
from ev3_distill.types import ADOPT, PROMOTE, Batch, Pools, Stretch
from students.mlp import mlp

B = 5
FORMULAS = {
    "fitnet": FEATURE_LOSSES["fitnet"](),
    "at": FEATURE_LOSSES["at"](),
    "rkd-distance": rkd(distance=1.0, angle=0.0),
    "rkd-angle": rkd(distance=0.0, angle=1.0),
    "rkd": rkd(),
    "sp": FEATURE_LOSSES["sp"](),
}
VECTORS = ((B, 3), (B, 4))
IMAGES = ((B, 4, 6, 3), (B, 2, 4, 2))  # sizes that divide, and sizes that do not
CROSSED = ((B, 2, 3, 3), (B, 4, 2, 2))  # each larger along one axis
SINGLE = [name for name in FORMULAS if name != "rkd"]
CASES = [
    *((name, IMAGES) for name in SINGLE),
    *((name, CROSSED) for name in ("fitnet", "at")),
    *((name, VECTORS) for name in FORMULAS if name != "at"),
]


def draw(shapes, seed=0):
    """A student's feature, a teacher's, uneven weights of which one is 0, and a regressor."""
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(0.3, 1, shape).astype(np.float32) for shape in shapes)
    weight = np.array([0.5, 2.0, 0.0, 1.0, 1.5], np.float32)
    kernel = rng.normal(size=(shapes[0][-1], shapes[1][-1])).astype(np.float32)
    return student, teacher, weight, {"kernel": kernel, "bias": rng.normal(size=shapes[1][-1]).astype(np.float32)}


@functools.cache
def compiled(name):
    def value(student, teacher, weight, extra):
        return FORMULAS[name].compare(student, teacher, weight, extra)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 3)))


def run(name, student, teacher, weight, extra):
    """Value, gradient at the student's feature, gradient at extra."""
    value, (gradient, beside) = compiled(name)(student, teacher, weight, extra)
    return float(value), np.asarray(gradient), beside


# The papers' formulas in float64, example by example.


def pooled(image, height, width):
    out = np.zeros((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            rows = range(i * image.shape[0] // height, math.ceil((i + 1) * image.shape[0] / height))
            columns = range(j * image.shape[1] // width, math.ceil((j + 1) * image.shape[1] / width))
            out[i, j] = np.mean([image[r, c] for r in rows for c in columns], axis=0)
    return out


def matched(one, other):
    if one.ndim == 1:
        return one, other
    size = [min(one.shape[axis], other.shape[axis]) for axis in (0, 1)]
    return pooled(one, *size), pooled(other, *size)


def weighted_mean(pairs):
    pairs = list(pairs)
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


def ref_fitnet(s, t, w, extra):
    pairs = []
    for i in range(len(s)):
        one, other = matched(s[i], t[i])
        error = one @ np.asarray(extra["kernel"], float) + np.asarray(extra["bias"], float) - other
        pairs.append((w[i], (error**2).mean()))
    return weighted_mean(pairs)


def ref_at(s, t, w, extra):
    pairs = []
    for i in range(len(s)):
        one, other = ((x**2).sum(-1).ravel() for x in matched(s[i], t[i]))
        error = one / math.sqrt((one**2).sum()) - other / math.sqrt((other**2).sum())
        pairs.append((w[i], (error**2).mean()))
    return weighted_mean(pairs)


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def distinct(n, count):
    return [index for index in np.ndindex(*[n] * count) if len(set(index)) == count]


def norm(x):
    return math.sqrt((x.ravel() ** 2).sum())


def ref_rkd_distance(s, t, w, extra):
    pairs = distinct(len(s), 2)
    mean_s, mean_t = (weighted_mean((w[i] * w[j], norm(f[i] - f[j])) for i, j in pairs) for f in (s, t))
    return weighted_mean(
        (w[i] * w[j], huber(norm(s[i] - s[j]) / mean_s - norm(t[i] - t[j]) / mean_t)) for i, j in pairs
    )


def ref_rkd_angle(s, t, w, extra):
    def cosine(f, i, j, k):
        one, other = (f[j] - f[i]).ravel(), (f[k] - f[i]).ravel()
        return one @ other / norm(one) / norm(other)

    return weighted_mean(
        (w[i] * w[j] * w[k], huber(cosine(s, i, j, k) - cosine(t, i, j, k))) for i, j, k in distinct(len(s), 3)
    )


def ref_sp(s, t, w, extra):
    b, total = sum(x > 0 for x in w), 0.0
    share = [x * b / sum(w) for x in w]

    def similarities(f):
        g = [[f[i].ravel() @ f[j].ravel() for j in range(len(f))] for i in range(len(f))]
        return [[x / math.sqrt(sum(v * y * y for v, y in zip(share, row, strict=True))) for x in row] for row in g]

    g_s, g_t = similarities(s), similarities(t)
    for i, j in np.ndindex(len(s), len(s)):
        total += share[i] * share[j] * (g_s[i][j] - g_t[i][j]) ** 2
    return total / b**2


REFERENCES = {
    "fitnet": ref_fitnet,
    "at": ref_at,
    "rkd-distance": ref_rkd_distance,
    "rkd-angle": ref_rkd_angle,
    "rkd": lambda *args: 25 * ref_rkd_distance(*args) + 50 * ref_rkd_angle(*args),
    "sp": ref_sp,
}


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_value_and_gradient_are_the_papers(name, shapes):
    student, teacher, weight, extra = draw(shapes)
    value, gradient, beside = run(name, student, teacher, weight, extra)
    doubles = [np.asarray(x, np.float64) for x in (student, teacher, weight)]

    def reference(moved):
        return REFERENCES[name](moved, *doubles[1:], extra)

    assert value == pytest.approx(reference(doubles[0]), rel=2e-5)
    along = np.random.default_rng(1).normal(size=student.shape)
    slope = (reference(doubles[0] + 1e-5 * along) - reference(doubles[0] - 1e-5 * along)) / 2e-5
    assert (gradient * along).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert np.abs(gradient[weight > 0]).reshape(4, -1).max(1).min() > 0
    np.testing.assert_array_equal(gradient[weight == 0], 0)
    assert all((leaf != 0).all() == (name == "fitnet") for leaf in jax.tree.leaves(beside))


@pytest.mark.parametrize("name", SINGLE)
def test_an_example_of_weight_0_is_no_part_of_it(name):
    student, teacher, weight, extra = draw(IMAGES)
    expected, _, _ = run(name, student, teacher, weight, extra)
    student[2], teacher[2] = 30, -40
    assert run(name, student, teacher, 7 * weight, extra)[0] == pytest.approx(expected, rel=1e-5)
    assert run(name, student, teacher, 0 * weight, extra)[0] == 0


@pytest.mark.parametrize("name", SINGLE)
def test_nothing_to_learn_from_oneself(name):
    _, teacher, weight, _ = draw(IMAGES)
    same = {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    value, gradient, _ = run(name, teacher, teacher, weight, same)
    assert value == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if name != "fitnet":  # the scale, common to all, is the student's own
        assert run(name, 3 * teacher, teacher, weight, same)[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_relations_are_indifferent_to_shifts(name):
    student, teacher, weight, _ = draw(VECTORS)
    expected, gradient, _ = run(name, student, teacher, weight, ())
    value, moved, _ = run(name, student + np.float32([8, -16, 4]), teacher, weight, ())
    assert value == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(moved, gradient, rtol=1e-3, atol=1e-5)


def degenerate(shape):
    sound = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    twin = sound.copy()
    twin[1] = twin[0]
    near = twin.copy()
    near[1] += np.float32(1e-6)
    dead = sound.copy()
    dead[3] = 0
    return {
        "sound": sound,
        "zero": 0 * sound,
        "one is zero": dead,
        "identical": np.broadcast_to(sound[:1], shape),
        "two identical": twin,
        "two nearly so": near,
        "flat": np.full(shape, 0.1, np.float32),
        "tiny": 1e-30 * sound,
        "huge": 1e15 * sound,
    }


@pytest.mark.parametrize("name", SINGLE)
def test_finite_where_features_are_degenerate(name):
    students, teachers = (degenerate(shape) for shape in IMAGES)
    _, _, weight, extra = draw(IMAGES)
    for weights in (weight, np.ones(B, np.float32), np.eye(B, dtype=np.float32)[1]):
        for at, student in students.items():
            for to, teacher in teachers.items():
                value, gradient, beside = run(name, student, teacher, weights, extra)
                assert np.isfinite(value), (at, to)
                assert value >= 0, (at, to)
                assert all(np.isfinite(x).all() for x in (gradient, *jax.tree.leaves(beside))), (at, to)


def test_the_memory_of_angles_is_bounded():
    """Blocks give what one block gives, and no more than a few of them are held at once."""
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(128, 8)), jnp.float32) for _ in range(2))
    gradient = jax.jit(jax.grad(lambda s, t: FORMULAS["rkd-angle"].compare(s, t, jnp.ones(len(s)), ())))
    held = gradient.lower(student, teacher).compile().memory_analysis().temp_size_in_bytes
    assert held < 16 * 4 * 2**20


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [("fitnet", (4,), (2, 2, 4)), ("fitnet", (6, 4), (6, 4)), ("at", (4,), (4,)), ("at", (2, 2, 3), (4,))],
)
def test_shapes_that_do_not_fit(name, student, teacher):
    formula = FORMULAS[name]
    with pytest.raises(InputError, match=r"\[4\]|\[6, 4\]"):
        formula.begin(student, teacher)
    with pytest.raises(InputError, match=r"\[4\]|\[6, 4\]"):
        formula.compare(jnp.zeros((2, *student)), jnp.zeros((2, *teacher)), jnp.ones(2), ())


def test_weights_of_relations_are_checked():
    with pytest.raises(InputError, match="angle must be"):
        rkd(angle=-1.0)


# Networks and arms.

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
    """Its `features` are layers, not a method."""

    def __init__(self, *, rngs):
        self.features = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.features(x)


SMALL = from_nnx(lambda rngs: Small(rngs=rngs), {"input_shape": list(SHAPE)})
TEACHER = {"block": (2, 2, 6), "embedding": (5,)}


def make_split(seed):
    """Labels and the teacher's features follow from the inputs."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    inputs = rng.normal(size=(N, *SHAPE)).astype(np.float32)
    block = patches(inputs) @ fixed.normal(size=(4, 6))
    logits, embedding = (inputs.reshape(N, -1) @ fixed.normal(size=(16, n)) for n in (K, 5))
    return Batch(
        jnp.asarray(inputs),
        jnp.asarray(logits.argmax(1), jnp.int32),
        jnp.asarray(logits, jnp.float32),
        jnp.arange(N, dtype=jnp.int32),
        jnp.ones(N),
        {
            "block": jnp.asarray(block, jnp.float32),
            "embedding": jnp.asarray(embedding, jnp.float32),
        },
    )


def sample(examples, step):
    return jax.tree.map(lambda leaf: leaf[(step * 8 + jnp.arange(8)) % N], examples)


EXPLORE = make_split(0)
DRAW = draw_from(EXPLORE, sample, jax.random.key(0))
HELD = [make_split(seed)._replace(teacher_features={}) for seed in (1, 2)]
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
def test_features_come_with_the_very_logits(train):
    variables, pixels = start(), jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, *SHAPE)), jnp.uint8)
    logits, after = SMALL.apply(variables, pixels / 255, train=train)
    (same, found), also = SMALL.features(variables, pixels, train=train)
    np.testing.assert_array_equal(same, logits)
    jax.tree.map(np.testing.assert_array_equal, also, after)
    assert {name: leaf.shape for name, leaf in found.items()} == {"stage": (8, 2, 2, 4), "pooled": (8, 4)}
    np.testing.assert_array_equal(SMALL.apply(variables, pixels, train=train)[0], logits)


def test_networks_without_features():
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
def test_an_arm_learns_features_beside_logits(name):
    """Its loss on features falls below kd4's, and what it proposes is a student alone."""
    arm, (state, proposed) = arm_of(name), trained(name)
    assert arm.name == name
    assert jax.tree.structure(proposed) == jax.tree.structure(start())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, proposed)))
    (kind, student, teacher, *_) = re.split("[:=*@]", name)
    compare, fitted = jax.jit(FEATURE_LOSSES[kind]().compare), []
    for of in (state.iterate, trained("kd4")[0].iterate):
        (_, found), _ = SMALL.features(of, EXPLORE.inputs, train=True)
        s, t = found[student], EXPLORE.teacher_features[teacher]
        fitted.append(float(compare(s, t, EXPLORE.weight, regressor(s, t) if kind == "fitnet" else ())))
    assert fitted[0] < 0.9 * fitted[1]
    begun = arm.init(start()).extra
    assert all((a != b).all() for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(begun), strict=True))
    assert bool(jax.tree.leaves(begun)) == (kind == "fitnet")


def regressor(student, teacher):
    """The best there is."""
    rows = np.c_[np.asarray(student).reshape(-1, student.shape[-1]), np.ones(student.size // student.shape[-1])]
    solved = np.linalg.lstsq(rows, np.asarray(teacher).reshape(len(rows), -1), rcond=None)[0].astype(np.float32)
    return {"kernel": solved[:-1], "bias": solved[-1]}


def test_the_loss_of_a_named_arm_is_the_weighted_sum():
    """kd4's loss plus the weight times the feature loss, at a rate of its own; by what the students say.

    A bias before BatchNorm has no gradient, and Adam makes full steps of what rounding leaves of it.
    """
    logits_loss = losses.mix((0.9, losses.kd(temperature=4.0)), (0.1, losses.cross_entropy()))

    def loss(outputs, batch):
        logits, found = outputs
        block = batch.teacher_features["block"]
        return logits_loss(logits, batch) + 2.5 * FORMULAS["sp"].compare(found["pooled"], block, batch.weight, ())

    made = gradient_arm("made", SMALL.features, loss, optax.adamw(0.003, weight_decay=1e-4))
    arms = (made, *map(named, ("sp:pooled=block*2.5@0.003", "sp:pooled=block*2.3@0.003", "sp:pooled=block*2.5@0.0029")))
    say = jax.jit(lambda student: SMALL.features(student, EXPLORE.inputs, train=True)[0])
    wanted, same, *others = (ravel_pytree(say(propose(arm, arm.init(start()), 3)[1]))[0] for arm in arms)
    assert abs(same - wanted).max() < 1e-5
    assert all(abs(other - wanted).max() > 1e-4 for other in others)


def test_the_usual_weights():
    assert {name: make().weight for name, make in FEATURE_LOSSES.items()} == {
        "fitnet": 100,
        "at": 1000,
        "rkd": 1,
        "sp": 3000,
    }
    two = FeatureLoss(lambda s, t, weight, extra: jnp.float32(2), lambda s, t: (), 3.0)
    outputs = EXPLORE.teacher_logits, {"pooled": EXPLORE.inputs}
    for weight, expected in ((None, 6.0), (0.5, 1.0)):
        loss = with_features(lambda logits, batch: 0.25, two, student="pooled", teacher="block", weight=weight)
        assert float(loss(outputs, EXPLORE)) == 0.25 + expected


def test_extra_goes_on_with_a_promotion():
    """Through the step: where the student moves, regressor and optimizer go on from what was proposed."""
    arm = arm_of("fitnet:stage=block@0.02")
    rules = {
        "select": objectives.probability,
        "promise": objectives.accuracy,
        "config": EV3(batch_size=8, length=40, max_length=40, eval_batch_size=N),
    }
    step = make_step(SMALL.apply, [arm], sample, **rules)
    key = jax.random.key_data(jax.random.key(0))
    begin = jax.jit(lambda key: initial_state(key, start(), POOLS, apply=SMALL.apply, arms=[arm], **rules))
    after, decision = step(POOLS, begin(key), np.int32(1000))
    assert int(decision.verdict) in (ADOPT, PROMOTE)
    (state,) = after.arm_states
    begun = arm.init(start())
    assert int(state.age) == 40
    own = sum(leaf.size for leaf in jax.tree.leaves(begun.extra))  # the last of the moments, which are one vector
    changed = jax.tree.map(
        lambda a, b: bool((a != b).all()),
        (state.extra, state.opt_state[0].mu[-own:]),
        (begun.extra, begun.opt_state[0].mu[-own:]),
    )
    assert all(jax.tree.leaves(changed))
    assert len(jax.tree.leaves(changed)) == 3
    assert state.opt_state[0].mu.size == own + sum(leaf.size for leaf in jax.tree.leaves(begun.iterate.params))
    again, _ = step(POOLS, after, np.int32(1000))
    assert int(again.arm_states[0].age) in (40, 80)  # kept, or gone on with


def test_without_extra_the_optimizer_sees_the_parameters_alone():
    (arm,) = arms_named(SMALL.apply, ["kd4"])
    state = arm.init(start())
    assert state.extra == ()
    assert state.opt_state[0].mu.size == sum(leaf.size for leaf in jax.tree.leaves(start().params))


def test_features_asked():
    names = ["kd4", "at:stage=/layer3/Relu:0", "0.7*kd+0.3*ce", "rkd:pooled=a=b*2@1e-3", "sp:stage=/layer3/Relu:0@0.1"]
    assert features_asked(names) == ("/layer3/Relu:0", "a=b")
    assert features_asked(["sp:pooled=x*2@fast"]) == ("x*2@fast",)  # no rate, so part of a name


@pytest.mark.parametrize(
    "name", ["at:stage=nothing", "at:nothing=block", "at:block=stage", "rkd:pooled=embedding@fast"]
)
def test_wrong_features_are_answered_with_the_right_ones(name):
    with pytest.raises(InputError) as told:
        named(name)
    for listed in (name, "pooled [4], stage [2, 2, 4]", "block [2, 2, 6], embedding [5]"):
        assert listed in str(told.value)


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
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="an arm that learns features is"):
        named(name)


def test_features_that_nobody_shows():
    for changes in ({"network": None}, {"network": mlp((4,), K)}, {"network": from_nnx(lambda rngs: Small(rngs=rngs))}):
        with pytest.raises(InputError, match="the student has none; the teacher has block"):
            named("at:stage=block", **changes)
    with pytest.raises(InputError, match="the teacher has none"):
        named("at:stage=block", teacher_features=None)
    with pytest.raises(InputError, match="two images"):
        named("at:pooled=embedding")
    loss = with_features(losses.kd(), FEATURE_LOSSES["sp"](), student="stage", teacher="block")
    with pytest.raises(InputError, match="the teacher has no feature 'block'; got none"):
        loss((EXPLORE.teacher_logits, {"stage": EXPLORE.inputs}), HELD[0])
