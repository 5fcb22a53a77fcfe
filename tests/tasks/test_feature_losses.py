"""Feature losses follow the papers' formulas, stay finite for degenerate features, and reject incompatible shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_formulas import FORMULAS, REFERENCES

from ev3_distill.errors import InputError
from ev3_distill.tasks.classification import feature_losses
from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES, rkd, with_features
from ev3_distill.types import Batch

B = 5


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
    """A student's and a teacher's feature, uneven weights of which one is 0, and a regressor."""
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


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_value_and_gradient_follow_the_papers_formula(name, shapes):
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
def test_an_example_of_weight_zero_does_not_count(name):
    student, teacher, weight, extra = draw(IMAGES)
    expected, _, _ = run(name, student, teacher, weight, extra)
    student[2], teacher[2] = 30, -40
    assert run(name, student, teacher, 7 * weight, extra)[0] == pytest.approx(expected, rel=1e-5)
    assert run(name, student, teacher, 0 * weight, extra)[0] == 0


@pytest.mark.parametrize("name", SINGLE)
def test_loss_of_equal_features_is_zero(name):
    _, teacher, weight, _ = draw(IMAGES)
    same = {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    value, gradient, _ = run(name, teacher, teacher, weight, same)
    assert value == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if name != "fitnet":  # the scale, common to all, is the student's own
        assert run(name, 3 * teacher, teacher, weight, same)[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_relational_losses_are_invariant_to_shifts(name):
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
def test_loss_and_gradient_are_finite_for_degenerate_features(name):
    students, teachers = (degenerate(shape) for shape in IMAGES)
    _, _, weight, extra = draw(IMAGES)
    for weights in (weight, np.ones(B, np.float32), np.eye(B, dtype=np.float32)[1]):
        for at, student in students.items():
            for to, teacher in teachers.items():
                value, gradient, beside = run(name, student, teacher, weights, extra)
                assert np.isfinite(value), (at, to)
                assert value >= 0, (at, to)
                assert all(np.isfinite(x).all() for x in (gradient, *jax.tree.leaves(beside))), (at, to)


def test_memory_of_the_angle_term_is_bounded():
    """Several blocks give the value of one block, and only a few are in memory at once."""
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(128, 8)), jnp.float32) for _ in range(2))
    gradient = jax.jit(jax.grad(lambda s, t: FORMULAS["rkd-angle"].compare(s, t, jnp.ones(len(s)), ())))
    held = gradient.lower(student, teacher).compile().memory_analysis().temp_size_in_bytes
    assert held < 16 * 4 * 2**20


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [("fitnet", (4,), (2, 2, 4)), ("fitnet", (6, 4), (6, 4)), ("at", (4,), (4,)), ("at", (2, 2, 3), (4,))],
)
def test_incompatible_shapes_are_rejected(name, student, teacher):
    formula = FORMULAS[name]
    with pytest.raises(InputError, match=r"\[4\]|\[6, 4\]"):
        formula.begin(student, teacher)
    with pytest.raises(InputError, match=r"\[4\]|\[6, 4\]"):
        formula.compare(jnp.zeros((2, *student)), jnp.zeros((2, *teacher)), jnp.ones(2), ())


def test_weights_of_rkd_are_checked():
    with pytest.raises(InputError, match="angle must be"):
        rkd(angle=-1.0)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("fitnet", [[1.0], [2.0]], [[0.0], [0.0]], 100 * (1 + 4) / 2),  # the affine map is the identity
        ("at", [[[[1.0], [0.0]]]], [[[[0.0], [1.0]]]], 1000 * 1),  # all attention on one of two positions
        ("sp", [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], 3000 * (1 - 0.5**0.5)),
        ("rkd", [[0.0], [1.0], [3.0]], [[0.0], [1.0], [2.0]], None),
    ],
)
def test_default_weight_multiplies_the_formula(name, student, teacher, expected):
    """By hand: an arm with features adds the formula, times its weight of the CIFAR experiments, to the loss on logits."""
    loss = FEATURE_LOSSES[name]()
    features, targets = np.array(student, np.float32), np.array(teacher, np.float32)
    extra = {"kernel": np.eye(1, dtype=np.float32), "bias": np.zeros(1, np.float32)} if name == "fitnet" else ()
    total = with_features(lambda logits, batch: jnp.float32(7), loss, student="s", teacher="t")
    weight = jnp.ones(len(features))
    batch = Batch(None, None, {"t": targets}, None, weight)
    if expected is None:  # rkd weighs its own two terms
        expected = loss.compare(features, targets, weight, extra)
    assert float(total((None, {"s": features}), batch, extra)) == pytest.approx(7 + float(expected), rel=1e-5)


def test_examples_nearer_than_float32_can_tell_coincide():
    """The squared distance counts as 0 below 1e-5 of the squared norms: here, below a distance of about 1.5e-3."""
    weight = jnp.ones(3)

    def distance(gap):
        rows = feature_losses._centered(jnp.array([[0.0], [1.0], [1.0 + gap]]), weight)
        return float(feature_losses._relations(rows, weight).distance[1, 2])

    assert distance(1.2e-3) == 0
    assert distance(1.8e-3) == pytest.approx(1.8e-3, rel=0.02)


def test_rows_below_the_smallest_divisor_are_not_of_unit_norm():
    """An example of relative size 5e-7 has a row of products of norm 5e-7; divided by 1e-6 it is 1/2, not 1."""
    rows = feature_losses._scaled(jnp.array([[1.0], [5e-7]]), jnp.ones(2))
    normed = feature_losses._normed(feature_losses._products(rows), jnp.ones(2))
    np.testing.assert_allclose(normed[1], [0.5, 2.5e-7], rtol=1e-3)
