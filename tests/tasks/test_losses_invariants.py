"""Invariances and minima of losses, and finite values and gradients at extreme logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from loss_formulas import B, K, all_losses, draw, make_batch, run, softmax, weighted_mean, without

from ev3_distill.tasks.classification import loss_terms, losses
from ev3_distill.tasks.classification.losses import LOSSES, mix

few = settings(deadline=None, max_examples=15)
# Quarters in [-2, 2]: a column of probabilities is then either constant or varies by more than dist's floor.
quarters = st.integers(-8, 8).map(lambda n: n / 4)
logit_arrays = arrays(np.float32, (B, K), elements=quarters)


LABELLED = ("ce", "dkd", "nkd")
MINIMAL_AT_TEACHER = ("kd", "mse", "dkd", "dist", "standardized_kd", "reverse_kl", "jsd")


@pytest.mark.parametrize("name", MINIMAL_AT_TEACHER)
@few
@given(logit_arrays, arrays(np.float32, (B, K), elements=st.floats(-2, 2, width=32)))
def test_loss_is_smallest_where_the_student_equals_the_teacher(name, teacher, away):
    batch = make_batch(teacher, np.arange(B) % K)
    least, gradient = run(name, {}, teacher, batch)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert run(name, {}, teacher + away, batch)[0] >= least - 5e-5
    assert run(name, {}, teacher + away / 16, batch)[0] >= least - 5e-5
    if name != "dist":  # which cannot tell what is constant
        assert least == pytest.approx(0, abs=5e-5)


@pytest.mark.parametrize("name", ["ce", "nkd"])
def test_label_losses_are_not_stationary_at_the_teacher(name):
    _, teacher, labels, weight = draw()
    batch = make_batch(teacher, labels, weight)
    _, gradient = run(name, {}, teacher, batch)
    assert np.abs(gradient).max() > 0.01
    further = np.asarray(teacher) - gradient
    assert run(name, {}, further, batch)[0] < run(name, {}, teacher, batch)[0]


def test_second_term_of_nkd_is_stationary_at_the_teacher():
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
def test_loss_is_invariant_to_shifts_of_logits(name, student, teacher, shift):
    labels = np.arange(B) % K
    expected, gradient = run(name, {}, student, make_batch(teacher, labels))
    value, shifted_gradient = run(name, {}, student + shift, make_batch(teacher - 2 * shift, labels))
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(shifted_gradient, gradient, rtol=1e-3, atol=1e-3)


@few
@given(
    logit_arrays, logit_arrays, arrays(np.float32, (2, B, 1), elements=st.floats(0.25, 16, width=32)), st.floats(-9, 9)
)
def test_standardized_kd_is_invariant_to_positive_affine_maps(student, teacher, scale, shift):
    value, _ = run("standardized_kd", {}, student * scale[0] + shift, make_batch(teacher * scale[1] - shift))
    assert value == pytest.approx(run("standardized_kd", {}, student, make_batch(teacher))[0], rel=1e-3, abs=1e-3)


def test_standardized_kd_changes_under_negative_maps():
    student, teacher, _, _ = draw()
    batch = make_batch(teacher)
    assert abs(run("standardized_kd", {}, -student, batch)[0] - run("standardized_kd", {}, student, batch)[0]) > 0.01


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_dist_is_invariant_to_positive_affine_maps_of_probabilities(beta, gamma, seed):
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


def assert_finite(student, batch):
    for name, (value, gradient) in all_losses(jnp.asarray(student, jnp.float32), batch).items():
        assert np.isfinite(value), name
        assert np.isfinite(gradient).all(), name
        assert value >= -1e-3, name


@pytest.mark.parametrize("shape", [(4, 5), (4, 2), (1, 2)])
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_loss_and_gradient_are_finite_at_extreme_logits(shape, data):
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
def test_loss_and_gradient_are_finite_at_degenerate_logits(student, teacher):
    assert_finite(DEGENERATE[student], make_batch(DEGENERATE[teacher], [0, 1, 2, -1]))


def test_dist_treats_constant_outputs_as_uncorrelated():
    batch = make_batch(SOUND)
    zero = np.zeros((4, 5), np.float32)
    assert run("dist", {}, zero, batch)[0] == pytest.approx(2, abs=1e-6)  # neither classes nor examples vary
    same = DEGENERATE["same rows"]
    inter = run("dist", {"beta": 1.0, "gamma": 0.0}, same, batch)[0]
    assert inter < 0.5
    assert run("dist", {}, same, batch)[0] == pytest.approx(inter + 1, abs=1e-5)
    assert run("dist", {}, same, make_batch(same))[0] == pytest.approx(1, abs=1e-5)


def test_standardized_kd_treats_flat_logits_as_uniform():
    _, teacher, _, _ = draw()
    value, gradient = run("standardized_kd", {}, np.zeros((B, K)), make_batch(teacher))
    assert np.abs(gradient).max() > 0  # a student whose last layer starts at zero still learns
    for level in 1e6 / np.arange(3, 30, 2):  # where the mean of equal logits is not exact
        flat = run("standardized_kd", {}, np.full((B, K), level), make_batch(teacher))
        assert flat[0] == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(flat[1], gradient, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "trusted_kd"])  # which has a test of its own
def test_unlabeled_examples_do_not_count_in_label_terms(name):
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


def test_a_trusted_teacher_is_followed_and_a_contradicted_one_is_not():
    """The loss is that of kd without labels; it is cross entropy if the teacher is sure of another class."""
    student, teacher, labels, weight = draw()
    unlabeled = make_batch(teacher, np.full(B, -1), weight)
    jax.tree.map(
        np.testing.assert_array_equal, run("trusted_kd", {}, student, unlabeled), run("kd", {}, student, unlabeled)
    )
    labels = abs(labels)
    sure = make_batch(1e3 * np.eye(K)[(labels + 1) % K], labels, weight)
    for ours, theirs in zip(run("trusted_kd", {}, student, sure), run("ce", {}, student, sure), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    agrees = make_batch(1e3 * np.eye(K)[labels], labels, weight)
    for ours, theirs in zip(run("trusted_kd", {}, student, agrees), run("kd", {}, student, agrees), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LABELLED)
def test_label_losses_are_zero_without_labels(name):
    student, teacher, _, weight = draw()
    value, gradient = run(name, {}, student, make_batch(teacher, np.full(B, -1), weight))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_a_weighted_mean_over_examples(name):
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
def test_weight_three_equals_the_example_three_times(name):
    student, teacher, labels, _ = draw()
    once = [0, 1, 2, 3, 0, 0]  # row 0 three times
    repeated, _ = run(name, {}, student[once], make_batch(teacher[once], labels[once]))
    weighted, _ = run(name, {}, student, make_batch(teacher, labels, [3, 1, 1, 1, 0, 0]))
    assert weighted == pytest.approx(repeated, rel=1e-4)


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


def test_standard_deviations_below_the_floor_count_as_the_floor():
    """Logits 0 and 1e-3 have a standard deviation of 5e-4, half of the floor: z-scores are 1/2, not 1."""
    weight = jnp.ones(2)
    z = loss_terms.standardize(jnp.array([0.0, 1e-3]), weight, floor=loss_terms.LOGIT_FLOOR)
    np.testing.assert_allclose(z, [-0.5, 0.5], rtol=1e-5)
    # probabilities that differ by 1e-6 have half of their floor, too: with z-scores of 1 they would correlate fully
    r = loss_terms.correlation(jnp.array([0.0, 1e-6]), jnp.array([0.0, 1.0]), weight)
    assert float(r) == pytest.approx(0.5, rel=1e-5)
