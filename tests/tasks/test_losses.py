"""Each loss follows its paper's formula, in value and gradient; hand-computed values and optax agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_formulas import REFERENCES, SETTINGS, B, K, all_losses, draw, make_batch, run, softmax

from ev3_distill.tasks.classification import example_scores, losses
from ev3_distill.tasks.classification.losses import LOSSES, mix

CASES = [(name, dict(kwargs)) for name in LOSSES for kwargs in SETTINGS[name]]


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_value_follows_the_papers_formula(name, kwargs):
    for seed in range(3):
        student, teacher, labels, weight = draw(seed=seed)
        value, _ = run(name, kwargs, student, make_batch(teacher, labels, weight))
        expected = REFERENCES[name](student, teacher, labels, weight.astype(float), **kwargs)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_gradient_follows_the_papers_formula(name, kwargs):
    student, teacher, labels, weight = draw()
    _, gradient = run(name, kwargs, student, make_batch(teacher, labels, weight))
    for i, k in np.ndindex(B, K):
        ahead, behind = student.astype(float), student.astype(float)
        ahead[i, k] += 1e-5
        behind[i, k] -= 1e-5
        slope = REFERENCES[name](ahead, teacher, labels, weight.astype(float), **kwargs)
        slope -= REFERENCES[name](behind, teacher, labels, weight.astype(float), **kwargs)
        assert gradient[i, k] == pytest.approx(slope / 2e-5, rel=1e-3, abs=2e-5)


def test_defaults_are_the_documented_settings():
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
    ("trusted_kd", {"temperature": 1.0, "label_smoothing": 0.0}, [0, 0], [LN3, 0],
     0.75 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) + 0.25 * math.log(2)),
    ("trusted_kd", {"temperature": 2.0, "label_smoothing": 0.0}, [0, 0], [-2 * LN3, 0],  # p_y is 1/10, and 1/4 at T = 2
     0.1 * 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) + 0.9 * math.log(2)),
    ("reverse_kl", {"temperature": 1.0}, [0, 0], [LN3, 0], 0.5 * math.log(4 / 3)),
    ("jsd", {"beta": 0.5, "temperature": 1.0}, [0, 0], [LN3, 0],
     0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "student", "teacher", "expected"), HAND)
def test_losses_of_two_classes_agree_with_hand_computation(name, kwargs, student, teacher, expected):
    rows = np.array([1] + [0] * (B - 1))
    value, _ = run(name, kwargs, np.tile(student, (B, 1)), make_batch(np.tile(teacher, (B, 1)), 1 - rows, rows))
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_negated_score_averages_labeled_examples():
    """The Brier score by hand. Examples without label or weight do not count; a confidently wrong one has gradient 0."""
    q = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]], np.float32)
    batch = make_batch(np.zeros_like(q), np.array([0, 2, -1, 1]), [1.0, 3.0, 1.0, 0.0])
    by_hand = (1 * (0.25 + 2 * 0.0625) + 3 * (0.01 + 0.04 + 0.09)) / 4 / 2  # halved
    loss = losses.negated(example_scores.brier)
    assert loss(jnp.log(q), batch) == pytest.approx(by_hand, rel=1e-5)
    sure = jnp.array([[60.0, 0.0, 0.0]])
    wrong = make_batch(np.zeros((1, 3)), np.array([1]))
    value, slope = jax.value_and_grad(loss)(sure, wrong)
    assert value == pytest.approx(1) and jnp.abs(slope).max() < 1e-6


def test_values_agree_with_optax():
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


def test_jsd_tends_to_both_divergences():
    student, teacher, _, weight = draw()
    student, teacher = student / 4, teacher / 4
    batch, small = make_batch(teacher, weight=weight), 1e-2
    forward, _ = run("kd", {"temperature": 1.0}, student, batch)
    backward, _ = run("reverse_kl", {}, student, batch)
    assert forward != pytest.approx(backward, rel=0.03)
    assert run("jsd", {"beta": small}, student, batch)[0] / small == pytest.approx(forward, rel=0.02)
    assert run("jsd", {"beta": 1 - small}, student, batch)[0] / small == pytest.approx(backward, rel=0.02)


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
def test_errors_state_rule_value_and_fix(name, kwargs):
    ((key, bad),) = kwargs.items()
    with pytest.raises(ValueError, match=f"{key} must be .*; got {bad}: .+"):
        LOSSES[name](**kwargs)


def test_mix_rejects_no_loss_and_negative_weights():
    with pytest.raises(ValueError, match="at least one pair"):
        mix()
    with pytest.raises(ValueError, match=r"weight 1 of mix must be .*; got -2.0"):
        mix((1.0, losses.kd()), (-2.0, losses.kd()))


# Losses from other losses.


@pytest.mark.parametrize(
    ("power", "shares"),
    [(1.0, [0.25, 0.25, 0.25, 0.25, 1, 1, 0]), (0.5, [0.5, 0.5, 0.5, 0.5, 1, 1, 0]), (0.0, [1, 1, 1, 1, 1, 1, 0])],
)
def test_balanced_weights_agree_with_hand_computation(power, shares):
    """Four examples of one class, one of another, one without a label, one of weight 0."""
    batch = make_batch(np.zeros((7, 3)), [0, 0, 0, 0, 1, -1, 2], [1, 1, 1, 1, 1, 1, 0])
    balanced_weights = losses.balanced(lambda logits, batch: batch.weight, power=power)
    np.testing.assert_allclose(balanced_weights(batch.teacher["logits"], batch), shares)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_taught_by_mixes_the_teachers_logits(share):
    student, teacher, labels, weight = draw()
    peer = np.random.default_rng(1).normal(size=(B, K)).astype(np.float32)
    batch = make_batch(teacher, labels, weight)
    other = losses.taught_by(losses.kd(temperature=2.0), "peer", share=share)
    both = make_batch((1 - share) * teacher + share * peer, labels, weight)
    value = other(student, batch._replace(teacher={**batch.teacher, "peer": jnp.asarray(peer)}))
    np.testing.assert_allclose(value, losses.kd(temperature=2.0)(student, both), rtol=1e-6)
