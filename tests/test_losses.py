"""Each loss is its paper's formula, in value and gradient, and stays finite where logits are extreme."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ev3_distill import goals, losses
from ev3_distill.losses import LOSSES, mix
from ev3_distill.types import Batch

B, K = 6, 5
few = settings(deadline=None, max_examples=15)
# Quarters in [-2, 2]: a column of probabilities is then either constant or varies by more than dist's floor.
quarters = st.integers(-8, 8).map(lambda n: n / 4)
logit_arrays = arrays(np.float32, (B, K), elements=quarters)

SETTINGS = {
    "kd": [{"temperature": 4.0}, {"temperature": 1.0}],
    "ce": [{"label_smoothing": 0.0}, {"label_smoothing": 0.3}],
    "mse": [{}],
    "dkd": [{"alpha": 1.0, "beta": 8.0, "temperature": 4.0}, {"alpha": 0.5, "beta": 2.0, "temperature": 1.5}],
    "dist": [{"beta": 1.0, "gamma": 1.0, "temperature": 1.0}, {"beta": 0.5, "gamma": 2.0, "temperature": 3.0}],
    "nkd": [{"gamma": 1.5, "temperature": 1.0}, {"gamma": 0.7, "temperature": 2.0}],
    "standardized_kd": [{"base": 2.0}, {"base": 0.7}],
    "reverse_kl": [{"temperature": 1.0}, {"temperature": 2.5}],
    "jsd": [{"beta": 0.5, "temperature": 1.0}, {"beta": 0.2, "temperature": 2.0}],
}
CASES = [(name, dict(kwargs)) for name in LOSSES for kwargs in SETTINGS[name]]
LABELLED = ("ce", "dkd", "nkd")
MINIMAL_AT_TEACHER = ("kd", "mse", "dkd", "dist", "standardized_kd", "reverse_kl", "jsd")


def make_batch(teacher, labels=None, weight=None):
    teacher = jnp.asarray(teacher, jnp.float32)
    n = len(teacher)
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    weight = jnp.ones(n) if weight is None else jnp.asarray(weight, jnp.float32)
    return Batch(jnp.zeros((n, 1)), labels, teacher, jnp.arange(n, dtype=jnp.int32), weight)


def draw(seed=0):
    """A student, a teacher, labels of which one is missing, and uneven weights of which one is 0."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 2, (2, B, K)).astype(np.float32)
    labels = rng.integers(0, K, B)
    labels[2] = -1
    weight = rng.uniform(0.2, 3, B).astype(np.float32)
    weight[4] = 0
    return student, teacher, labels, weight


@functools.cache
def _jitted(name):  # traced hyperparameters, so that all settings share a compilation
    return jax.jit(lambda kwargs, student, batch: jax.value_and_grad(LOSSES[name](**kwargs))(student, batch))


def run(name, kwargs, student, batch):
    """Value and gradient; a hyperparameter not given is that of the first settings, which are the defaults."""
    kwargs = {**SETTINGS[name][0], **kwargs}
    value, gradient = _jitted(name)(kwargs, jnp.asarray(student, jnp.float32), batch)
    return float(value), np.asarray(gradient)


# The papers' formulas, in float64, example by example and class by class.


def softmax(row, temperature=1.0):
    exps = [math.exp(float(x) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def weighted_mean(pairs):
    pairs = list(pairs)
    return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)


def without(row, y):
    return [x for k, x in enumerate(row) if k != y]


def pearson(a, b, w):
    mean_a, mean_b = (sum(wi * x for wi, x in zip(w, v, strict=True)) / sum(w) for v in (a, b))
    cov = sum(wi * (x - mean_a) * (y - mean_b) for wi, x, y in zip(w, a, b, strict=True))
    var_a = sum(wi * (x - mean_a) ** 2 for wi, x in zip(w, a, strict=True))
    var_b = sum(wi * (y - mean_b) ** 2 for wi, y in zip(w, b, strict=True))
    return cov / math.sqrt(var_a * var_b)


def ref_kd(s, t, y, w, *, temperature):
    tau = temperature
    return weighted_mean((w[i], tau**2 * kl(softmax(t[i], tau), softmax(s[i], tau))) for i in range(len(s)))


def ref_ce(s, t, y, w, *, label_smoothing):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            q, total = softmax(s[i]), 0.0
            for k in range(len(q)):
                wanted = (1 - label_smoothing) * (k == y[i]) + label_smoothing / len(q)
                total -= wanted * math.log(q[k])
            pairs.append((w[i], total))
    return weighted_mean(pairs)


def ref_mse(s, t, y, w):
    pairs = []
    for i in range(len(s)):
        pairs.append((w[i], sum((float(a) - float(b)) ** 2 for a, b in zip(s[i], t[i], strict=True)) / len(s[i])))
    return weighted_mean(pairs)


def ref_dkd(s, t, y, w, *, alpha, beta, temperature):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            p, q = softmax(t[i], temperature), softmax(s[i], temperature)
            py, qy = p[y[i]], q[y[i]]
            tckd = kl([py, 1 - py], [qy, 1 - qy])
            nckd = kl([x / (1 - py) for x in without(p, y[i])], [x / (1 - qy) for x in without(q, y[i])])
            pairs.append((w[i], temperature**2 * (alpha * tckd + beta * nckd)))
    return weighted_mean(pairs)


def ref_dist(s, t, y, w, *, beta, gamma, temperature):
    q, p = [softmax(row, temperature) for row in s], [softmax(row, temperature) for row in t]
    n, classes = len(q), len(q[0])
    inter = weighted_mean((w[i], 1 - pearson(q[i], p[i], [1.0] * classes)) for i in range(n))
    r = [pearson([q[i][k] for i in range(n)], [p[i][k] for i in range(n)], w) for k in range(classes)]
    return temperature**2 * (beta * inter + gamma * (1 - sum(r) / classes))


def ref_nkd(s, t, y, w, *, gamma, temperature):
    pairs = []
    for i in range(len(s)):
        if y[i] >= 0:
            target = -softmax(t[i])[y[i]] * math.log(softmax(s[i])[y[i]])
            p, q = softmax(t[i], temperature), softmax(s[i], temperature)
            others = 0.0
            for k in range(len(p)):
                if k != y[i]:
                    others -= p[k] / (1 - p[y[i]]) * math.log(q[k] / (1 - q[y[i]]))
            pairs.append((w[i], target + gamma * temperature**2 * others))
    return weighted_mean(pairs)


def ref_standardized_kd(s, t, y, w, *, base):
    def z(row):
        mean = sum(map(float, row)) / len(row)
        std = math.sqrt(sum((float(x) - mean) ** 2 for x in row) / len(row))
        return [(float(x) - mean) / std for x in row]

    return weighted_mean((w[i], base**2 * kl(softmax(z(t[i]), base), softmax(z(s[i]), base))) for i in range(len(s)))


def ref_reverse_kl(s, t, y, w, *, temperature):
    return weighted_mean((w[i], kl(softmax(s[i], temperature), softmax(t[i], temperature))) for i in range(len(s)))


def ref_jsd(s, t, y, w, *, beta, temperature):
    pairs = []
    for i in range(len(s)):
        p, q = softmax(t[i], temperature), softmax(s[i], temperature)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        pairs.append((w[i], beta * kl(p, m) + (1 - beta) * kl(q, m)))
    return weighted_mean(pairs)


REFERENCES = {
    "kd": ref_kd,
    "ce": ref_ce,
    "mse": ref_mse,
    "dkd": ref_dkd,
    "dist": ref_dist,
    "nkd": ref_nkd,
    "standardized_kd": ref_standardized_kd,
    "reverse_kl": ref_reverse_kl,
    "jsd": ref_jsd,
}


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_value_is_the_papers(name, kwargs):
    for seed in range(3):
        student, teacher, labels, weight = draw(seed=seed)
        value, _ = run(name, kwargs, student, make_batch(teacher, labels, weight))
        expected = REFERENCES[name](student, teacher, labels, weight.astype(float), **kwargs)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_gradient_is_the_papers(name, kwargs):
    student, teacher, labels, weight = draw()
    _, gradient = run(name, kwargs, student, make_batch(teacher, labels, weight))
    for i, k in np.ndindex(B, K):
        ahead, behind = student.astype(float), student.astype(float)
        ahead[i, k] += 1e-5
        behind[i, k] -= 1e-5
        slope = REFERENCES[name](ahead, teacher, labels, weight.astype(float), **kwargs)
        slope -= REFERENCES[name](behind, teacher, labels, weight.astype(float), **kwargs)
        assert gradient[i, k] == pytest.approx(slope / 2e-5, rel=1e-3, abs=2e-5)


def test_defaults_are_the_first_settings():
    student, teacher, labels, weight = draw()
    batch = make_batch(teacher, labels, weight)
    for name, (value, _) in all_losses(jnp.asarray(student), batch).items():
        assert float(value) == pytest.approx(run(name, {}, student, batch)[0], rel=1e-6), name


LN3 = math.log(3)
HAND = [  # one example of any weight, two classes, label 0: name, hyperparameters, student, teacher, value
    ("kd", {"temperature": 1.0}, [0, 0], [LN3, 0], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    ("kd", {"temperature": 2.0}, [0, 0], [2 * LN3, 0], 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),
    ("ce", {"label_smoothing": 0.0}, [LN3, 0], [0, 0], math.log(4 / 3)),
    ("ce", {"label_smoothing": 0.5}, [LN3, 0], [0, 0], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
    ("mse", {}, [0, 1], [3, 0], 5.0),
    ("dkd", {"alpha": 2.0, "beta": 8.0, "temperature": 1.0}, [0, 0], [LN3, 0],
     2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),  # no second class that is not the label
    ("dist", {"beta": 1.0, "gamma": 0.0, "temperature": 2.0}, [3, 1], [0.5, 0], 0.0),
    ("dist", {"beta": 1.0, "gamma": 0.0, "temperature": 2.0}, [1, 3], [0.5, 0], 8.0),  # 2^2 (1 - -1)
    ("dist", {"beta": 0.0, "gamma": 3.0, "temperature": 1.0}, [1, 3], [0.5, 0], 3.0),  # nothing to correlate
    ("nkd", {"gamma": 1.5, "temperature": 1.0}, [0, 0], [LN3, 0], 0.75 * math.log(2)),
    ("standardized_kd", {"base": 1.0}, [5, -1], [1, 2], 2 * math.tanh(1)),
    ("standardized_kd", {"base": 1.0}, [5, -1], [7, -90], 0.0),
    ("reverse_kl", {"temperature": 1.0}, [0, 0], [LN3, 0], 0.5 * math.log(4 / 3)),
    ("jsd", {"beta": 0.5, "temperature": 1.0}, [0, 0], [LN3, 0],
     0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "student", "teacher", "expected"), HAND)
def test_two_classes_by_hand(name, kwargs, student, teacher, expected):
    rows = np.array([1] + [0] * (B - 1))
    value, _ = run(name, kwargs, np.tile(student, (B, 1)), make_batch(np.tile(teacher, (B, 1)), 1 - rows, rows))
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", MINIMAL_AT_TEACHER)
@few
@given(logit_arrays, arrays(np.float32, (B, K), elements=st.floats(-2, 2, width=32)))
def test_least_where_the_student_is_the_teacher(name, teacher, away):
    batch = make_batch(teacher, np.arange(B) % K)
    least, gradient = run(name, {}, teacher, batch)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert run(name, {}, teacher + away, batch)[0] >= least - 5e-5
    assert run(name, {}, teacher + away / 16, batch)[0] >= least - 5e-5
    if name != "dist":  # which cannot tell what is constant
        assert least == pytest.approx(0, abs=5e-5)


@pytest.mark.parametrize("name", ["ce", "nkd"])
def test_not_stationary_where_the_student_is_the_teacher(name):
    _, teacher, labels, weight = draw()
    batch = make_batch(teacher, labels, weight)
    _, gradient = run(name, {}, teacher, batch)
    assert np.abs(gradient).max() > 0.01
    further = np.asarray(teacher) - gradient
    assert run(name, {}, further, batch)[0] < run(name, {}, teacher, batch)[0]


def test_second_term_of_nkd_is_stationary_where_the_student_is_the_teacher():
    _, teacher, labels, weight = draw()
    batch = make_batch(teacher, labels, weight)
    (first, first_gradient), (both, both_gradient) = (run("nkd", {"gamma": g}, teacher, batch) for g in (0.0, 1.5))
    np.testing.assert_allclose(first_gradient, both_gradient, atol=1e-6)
    p_hat = [softmax(without(row, y)) for row, y in zip(teacher, labels, strict=True) if y >= 0]
    entropy = weighted_mean((w, -sum(p * math.log(p) for p in row)) for w, row in zip(weight[labels >= 0], p_hat))  # noqa: B905
    assert both - first == pytest.approx(1.5 * entropy, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mse"])
@few
@given(logit_arrays, logit_arrays, arrays(np.float32, (B, 1), elements=quarters))
def test_indifferent_to_shifts_of_logits(name, student, teacher, shift):
    labels = np.arange(B) % K
    expected, gradient = run(name, {}, student, make_batch(teacher, labels))
    value, shifted_gradient = run(name, {}, student + shift, make_batch(teacher - 2 * shift, labels))
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(shifted_gradient, gradient, rtol=1e-3, atol=1e-3)


@few
@given(
    logit_arrays, logit_arrays, arrays(np.float32, (2, B, 1), elements=st.floats(0.25, 16, width=32)), st.floats(-9, 9)
)
def test_standardized_kd_is_indifferent_to_positive_affine_maps(student, teacher, scale, shift):
    value, _ = run("standardized_kd", {}, student * scale[0] + shift, make_batch(teacher * scale[1] - shift))
    assert value == pytest.approx(run("standardized_kd", {}, student, make_batch(teacher))[0], rel=1e-3, abs=1e-3)


def test_standardized_kd_minds_negative_maps():
    student, teacher, _, _ = draw()
    batch = make_batch(teacher)
    assert abs(run("standardized_kd", {}, -student, batch)[0] - run("standardized_kd", {}, student, batch)[0]) > 0.01


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_dist_is_indifferent_to_positive_affine_maps_of_probabilities(beta, gamma, seed):
    student, teacher, _, weight = draw(seed=seed)
    rng = np.random.default_rng(seed)
    q = np.asarray(jax.nn.softmax(student))
    scale = rng.uniform(0.2, 0.9, (B, 1)) if gamma == 0 else 0.4  # free per example for the inter-class term alone
    offset = np.full(K, 1 / K) if beta else rng.dirichlet(np.ones(K))  # free per class for the intra-class term alone
    mapped = np.log(scale * q + (1 - scale) * offset)
    kwargs, batch = {"beta": beta, "gamma": gamma}, make_batch(teacher, weight=weight)
    expected, _ = run("dist", kwargs, student, batch)
    assert run("dist", kwargs, mapped, batch)[0] == pytest.approx(expected, rel=1e-4)
    assert run("dist", {"beta": 1.0, "gamma": 1.0}, mapped * 3, batch)[0] != pytest.approx(expected, rel=1e-3)


extreme = st.sampled_from([-1e4, 1e4, 0.0, 1.0, 1e-4, 9999.0]) | st.floats(-1e4, 1e4, width=32)


@jax.jit
def all_losses(student, batch):
    return {name: jax.value_and_grad(factory())(student, batch) for name, factory in LOSSES.items()}


def assert_finite(student, batch):
    for name, (value, gradient) in all_losses(jnp.asarray(student, jnp.float32), batch).items():
        assert np.isfinite(value), name
        assert np.isfinite(gradient).all(), name
        assert value >= -1e-3, name


@pytest.mark.parametrize("shape", [(4, 5), (4, 2), (1, 2)])
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_finite_at_extreme_logits(shape, data):
    student, teacher = (data.draw(arrays(np.float32, shape, elements=extreme)) for _ in range(2))
    labels = data.draw(arrays(np.int32, shape[0], elements=st.integers(-1, shape[1] - 1)))
    weight = data.draw(arrays(np.float32, shape[0], elements=st.sampled_from([0.0, 0.5, 2.0])))
    assert_finite(student, make_batch(teacher, labels, weight))


SOUND = np.array([[2.0, 0.5, -1.0, 0.0, 0.3]] * 4, np.float32) + np.eye(4, 5, dtype=np.float32)
DEGENERATE = {
    "sound": SOUND,
    "one-hot": 2e4 * np.eye(4, 5, dtype=np.float32) - 1e4,
    "wrong one-hot": 2e4 * np.eye(4, 5, 1, dtype=np.float32) - 1e4,
    "flat": np.full((4, 5), 1e4, np.float32),
    "flat but for rounding": np.full((4, 5), 0.1, np.float32) + 1e-8 * np.eye(4, 5, dtype=np.float32),
    "zero": np.zeros((4, 5), np.float32),
    "same rows": SOUND[:1].repeat(4, 0),
}


@pytest.mark.parametrize("student", DEGENERATE)
@pytest.mark.parametrize("teacher", DEGENERATE)
def test_finite_at_degenerate_logits(student, teacher):
    assert_finite(DEGENERATE[student], make_batch(DEGENERATE[teacher], [0, 1, 2, -1]))


def test_dist_counts_what_is_constant_as_uncorrelated():
    batch = make_batch(SOUND)
    zero = np.zeros((4, 5), np.float32)
    assert run("dist", {}, zero, batch)[0] == pytest.approx(2, abs=1e-6)  # neither classes nor examples vary
    same = DEGENERATE["same rows"]
    inter = run("dist", {"beta": 1.0, "gamma": 0.0}, same, batch)[0]
    assert inter < 0.5
    assert run("dist", {}, same, batch)[0] == pytest.approx(inter + 1, abs=1e-5)
    assert run("dist", {}, same, make_batch(same))[0] == pytest.approx(1, abs=1e-5)


def test_flat_students_are_uniform_for_standardized_kd():
    _, teacher, _, _ = draw()
    value, gradient = run("standardized_kd", {}, np.zeros((B, K)), make_batch(teacher))
    assert np.abs(gradient).max() > 0  # a student whose last layer starts at zero still learns
    for level in 1e6 / np.arange(3, 30, 2):  # where the mean of equal logits is not exact
        flat = run("standardized_kd", {}, np.full((B, K), level), make_batch(teacher))
        assert flat[0] == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(flat[1], gradient, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_unlabelled_examples_are_no_part_of_label_terms(name):
    student, teacher, _, weight = draw()
    labels = np.array([0, -1, 2, 3, 4, -1])
    value, gradient = run(name, {}, student, make_batch(teacher, labels, weight))
    if name in LABELLED:
        expected, expected_gradient = run(name, {}, student, make_batch(teacher, abs(labels), weight * (labels >= 0)))
        np.testing.assert_array_equal(gradient[labels < 0], 0)
    else:
        expected, expected_gradient = run(name, {}, student, make_batch(teacher, np.arange(B) % K, weight))
        assert np.abs(gradient[labels < 0]).max(-1).all()
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LABELLED)
def test_nothing_is_lost_without_any_label(name):
    student, teacher, _, weight = draw()
    value, gradient = run(name, {}, student, make_batch(teacher, np.full(B, -1), weight))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_weights(name):
    student, teacher, labels, weight = draw()
    value, gradient = run(name, {}, student, make_batch(teacher, labels, weight))
    scaled, _ = run(name, {}, student, make_batch(teacher, labels, 7 * weight))
    assert scaled == pytest.approx(value, rel=1e-5)
    other = student + 5 * (weight == 0)[:, None] * np.arange(K)
    assert run(name, {}, other, make_batch(teacher, labels, weight))[0] == pytest.approx(value, rel=1e-5)
    np.testing.assert_array_equal(gradient[weight == 0], 0)
    nothing, gradient = run(name, {}, student, make_batch(teacher, labels, np.zeros(B)))
    assert nothing == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_of_two_is_the_example_twice(name):
    student, teacher, labels, _ = draw()
    once = [0, 1, 2, 3, 0, 0]  # row 0 three times
    repeated, _ = run(name, {}, student[once], make_batch(teacher[once], labels[once]))
    weighted, _ = run(name, {}, student, make_batch(teacher, labels, [3, 1, 1, 1, 0, 0]))
    assert weighted == pytest.approx(repeated, rel=1e-4)


def test_a_negated_score_is_the_loss_of_labelled_examples():
    """The Brier score by hand; what has no label or no weight does not count; one that is surely wrong has 1 and no slope."""
    q = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    batch = make_batch(np.zeros_like(q), np.array([0, 2, -1, 1]), [1.0, 3.0, 1.0, 0.0])
    by_hand = (1 * (0.25 + 2 * 0.0625) + 3 * (0.01 + 0.04 + 0.09)) / 4 / 2  # halved
    loss = losses.negated(goals.brier)
    assert loss(jnp.log(q), batch) == pytest.approx(by_hand, rel=1e-5)
    sure = jnp.array([[60.0, 0.0, 0.0]])
    wrong = make_batch(np.zeros((1, 3)), np.array([1]))
    value, slope = jax.value_and_grad(loss)(sure, wrong)
    assert value == pytest.approx(1) and jnp.abs(slope).max() < 1e-6


def test_optax_agrees():
    student, teacher, _, _ = draw()
    labels = np.arange(B) % K
    batch = make_batch(teacher, labels)
    log_q, p, log_p = jax.nn.log_softmax(student), jax.nn.softmax(teacher), jax.nn.log_softmax(teacher)

    expected = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels).mean()
    assert run("ce", {}, student, batch)[0] == pytest.approx(float(expected), rel=1e-5)
    smooth = optax.losses.smooth_labels(jax.nn.one_hot(labels, K), 0.3)
    expected = optax.losses.softmax_cross_entropy(student, smooth).mean()
    assert run("ce", {"label_smoothing": 0.3}, student, batch)[0] == pytest.approx(float(expected), rel=1e-5)
    expected = 2 * optax.losses.l2_loss(student, teacher).mean()
    assert run("mse", {}, student, batch)[0] == pytest.approx(float(expected), rel=1e-5)
    expected = optax.losses.kl_divergence(log_q, p).mean()
    assert run("kd", {"temperature": 1.0}, student, batch)[0] == pytest.approx(float(expected), rel=1e-5)
    expected = optax.losses.kl_divergence(log_p, jax.nn.softmax(student)).mean()
    assert run("reverse_kl", {}, student, batch)[0] == pytest.approx(float(expected), rel=1e-5)


def test_kd_tends_to_half_the_logit_mse_at_high_temperature():
    student, teacher, _, weight = draw()
    student, teacher = (x - x.mean(-1, keepdims=True) for x in (student, teacher))
    batch = make_batch(teacher, weight=weight)
    _, mse = run("mse", {}, student, batch)
    error = []
    for temperature in (4.0, 40.0, 400.0):
        _, gradient = run("kd", {"temperature": temperature}, student, batch)
        error.append(np.abs(2 * gradient - mse).max() / np.abs(mse).max())
    assert error[0] > 0.05 > error[1] > 0.005 > error[2]


def test_dkd_decouples_kd():
    student, teacher, labels, _ = draw()
    for i in (0, 1, 3):  # kd is dkd with beta = 1 - p_y of the example
        batch = make_batch(teacher, labels, np.eye(B)[i])
        expected, _ = run("kd", {}, student, batch)
        target, others = (run("dkd", {"alpha": a, "beta": b}, student, batch)[0] for a, b in ((1.0, 0.0), (0.0, 1.0)))
        beta = 1 - softmax(teacher[i], 4.0)[labels[i]]
        assert target + beta * others == pytest.approx(expected, rel=1e-4)


def test_jsd_joins_both_divergences():
    student, teacher, _, weight = draw()
    student, teacher = student / 4, teacher / 4
    batch, small = make_batch(teacher, weight=weight), 1e-2
    forward, _ = run("kd", {"temperature": 1.0}, student, batch)
    backward, _ = run("reverse_kl", {}, student, batch)
    assert forward != pytest.approx(backward, rel=0.03)
    assert run("jsd", {"beta": small}, student, batch)[0] / small == pytest.approx(forward, rel=0.02)
    assert run("jsd", {"beta": 1 - small}, student, batch)[0] / small == pytest.approx(backward, rel=0.02)


@few
@given(st.floats(0, 4), st.floats(0, 4))
@example(0.0, 0.0)
def test_mix_is_linear(a, b):
    student, teacher, labels, weight = draw()
    batch = make_batch(teacher, labels, weight)
    (kd, kd_gradient), (ce, ce_gradient) = (run(name, {}, student, batch) for name in ("kd", "ce"))
    value, gradient = _mixed(jnp.float32(a), jnp.float32(b), jnp.asarray(student), batch)
    assert float(value) == pytest.approx(a * kd + 2 * b * ce, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, a * kd_gradient + 2 * b * ce_gradient, rtol=1e-4, atol=1e-6)


@jax.jit
def _mixed(a, b, student, batch):
    loss = mix((a, losses.kd()), (2.0, mix((b, losses.cross_entropy()))))
    return jax.value_and_grad(loss)(student, batch)


@pytest.mark.parametrize("name", [name for name in LOSSES if SETTINGS[name][-1]])
def test_hyperparameters_have_gradients(name):
    student, teacher, labels, weight = draw()
    kwargs, batch, key = SETTINGS[name][-1], make_batch(teacher, labels, weight), next(iter(SETTINGS[name][-1]))
    slopes = jax.jit(jax.grad(lambda traced: LOSSES[name](**traced)(student, batch)))(kwargs)
    ahead, behind = (
        REFERENCES[name](student, teacher, labels, weight.astype(float), **{**kwargs, key: kwargs[key] + step})
        for step in (1e-5, -1e-5)
    )
    assert float(slopes[key]) == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-5)


BROKEN = [(name, {key: bad}) for name in LOSSES for key in SETTINGS[name][0] for bad in (-0.5, math.nan, math.inf)]
BROKEN += [(name, {"temperature": 0.0}) for name in LOSSES if "temperature" in SETTINGS[name][0]]
BROKEN += [("standardized_kd", {"base": 0.0}), ("ce", {"label_smoothing": 1.0})]
BROKEN += [("jsd", {"beta": bad}) for bad in (0.0, 1.0, 1.5)]


@pytest.mark.parametrize(("name", "kwargs"), BROKEN)
def test_errors_name_the_rule_the_value_and_the_way_out(name, kwargs):
    ((key, bad),) = kwargs.items()
    with pytest.raises(ValueError, match=f"{key} must be .*; got {bad}: .+"):
        LOSSES[name](**kwargs)


def test_mix_refuses_nothing_and_negative_weights():
    with pytest.raises(ValueError, match="at least one pair"):
        mix()
    with pytest.raises(ValueError, match=r"weight 1 of mix must be .*; got -2.0"):
        mix((1.0, losses.kd()), (-2.0, losses.kd()))


# Losses made of others.


@pytest.mark.parametrize(
    ("power", "shares"),
    [(1.0, [0.25, 0.25, 0.25, 0.25, 1, 1, 0]), (0.5, [0.5, 0.5, 0.5, 0.5, 1, 1, 0]), (0.0, [1, 1, 1, 1, 1, 1, 0])],
)
def test_balanced_by_hand(power, shares):
    """Four of a class, one of another, one without a label, one that does not count."""
    batch = make_batch(np.zeros((7, 3)), [0, 0, 0, 0, 1, -1, 2], [1, 1, 1, 1, 1, 1, 0])
    weighed = losses.balanced(lambda logits, batch: batch.weight, power=power)
    np.testing.assert_allclose(weighed(batch.teacher_logits, batch), shares)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_taught_by_another(share):
    student, teacher, labels, weight = draw()
    peer = np.random.default_rng(1).normal(size=(B, K)).astype(np.float32)
    batch = make_batch(teacher, labels, weight)
    other = losses.taught_by(losses.kd(temperature=2.0), "peer", share=share)
    both = make_batch((1 - share) * teacher + share * peer, labels, weight)
    value = other(student, batch._replace(teacher_features={"peer": jnp.asarray(peer)}))
    np.testing.assert_allclose(value, losses.kd(temperature=2.0)(student, both), rtol=1e-6)
