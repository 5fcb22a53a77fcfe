"""Objectives follow their formulas, and broken logits never win."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ev3_distill.tasks.classification import example_scores
from ev3_distill.tasks.classification.example_scores import OBJECTIVES
from ev3_distill.types import Batch

N, K = 4, 3
few = settings(deadline=None, max_examples=40)
logit_arrays = arrays(np.float32, (N, K), elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e4, -1e4]))
label_arrays = arrays(np.int32, N, elements=st.integers(-1, K - 1))
UNIT = ("accuracy", "agreement", "probability", "margin")  # in [0, 1]
JITTED = {name: jax.jit(objective) for name, objective in OBJECTIVES.items()}


def make_split(labels, teacher=None):
    labels = jnp.asarray(labels, jnp.int32)
    n = len(labels)
    teacher = jnp.zeros((n, K)) if teacher is None else jnp.asarray(teacher, jnp.float32)
    return Batch(jnp.zeros((n, 1)), labels, {"logits": teacher}, jnp.arange(n, dtype=jnp.int32), jnp.ones(n))


def score(name, logits, labels, teacher=None):
    scores = JITTED[name](jnp.asarray(logits, jnp.float32), make_split(labels, teacher))
    assert scores.shape == (len(labels),)
    assert scores.dtype == jnp.float32
    return np.asarray(scores)


LOGITS = [[math.log(2), 0, 0], [0, math.log(2), 0], [1, 3, 3], [0, 0, 5]]
EXPECTED = {  # labels 0, 0, 2, -1: right, wrong, tied (the first class wins), none
    "accuracy": [1, 0, 0, 0],
    "log_likelihood": [-math.log(2), -math.log(4), -math.log(2 + math.exp(-2)), 0],
    "probability": [1 / 2, 1 / 4, 1 / (2 + math.exp(-2)), 0],
    # logits (a, 0, 0) have a population std of a sqrt(2) / 3
    "margin": [1 / (1 + math.exp(-1.5 * 3 / math.sqrt(2))), 1 / (1 + math.exp(1.5 * 3 / math.sqrt(2))), 1 / 2, 0],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_agree_with_hand_computation(name):
    np.testing.assert_allclose(score(name, LOGITS, [0, 0, 2, -1]), EXPECTED[name], rtol=1e-5)


def test_agreement_agrees_with_hand_computation():
    teacher = [[5, 0, 1], [5, 0, 1], [0, 1, 1], [1, 0, 9]]  # classes 0, 0, 1 (the first of a tie), 2
    np.testing.assert_array_equal(score("agreement", LOGITS, [-1, 1, 2, 0], teacher), [1, 0, 1, 1])


@pytest.mark.parametrize("name", OBJECTIVES)
@few
@given(logit_arrays, label_arrays, logit_arrays)
def test_scores_stay_in_their_range(name, logits, labels, teacher):
    scores = score(name, logits, labels, teacher)
    assert np.isfinite(scores).all()
    if name in UNIT:
        assert (scores >= 0).all()
        assert (scores <= 1).all()
    else:
        assert (scores <= 0).all()
    if name != "agreement":
        np.testing.assert_array_equal(scores[labels < 0], 0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(K))
def test_broken_logits_never_win(name, bad, place):
    logits = np.array([[3.0, 2.0, 1.0]] * N)
    logits[:, place] = bad
    labels = [0, 1, 2, place]
    scores = score(name, logits, labels, np.eye(N, K) + np.eye(N, K)[labels] * 9)
    assert (np.isnan(scores) | (scores == 0)).all()
    if name in ("accuracy", "agreement"):
        np.testing.assert_array_equal(scores, 0)
    else:
        assert np.isnan(scores).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_minus_infinity_never_win(name):
    scores = score(name, np.full((N, K), -math.inf), [0, 1, 2, 0])
    assert (np.isnan(scores) | (scores == 0)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_score_depends_only_on_its_own_example(name):
    logits, teacher, labels = np.array(LOGITS), np.eye(N, K), np.array([0, 0, 2, 1])
    expected = score(name, logits, labels, teacher)
    broken = logits.copy()
    broken[1] = math.nan
    np.testing.assert_array_equal(np.delete(score(name, broken, labels, teacher), 1), np.delete(expected, 1))
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(score(name, logits[order], labels[order], teacher[order]), expected[order], rtol=1e-6)


def test_margin_follows_its_formula():
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits, labels = rng.normal(3, 2, (N, K)).astype(np.float32), rng.integers(0, K, N)
        scores = score("margin", logits, labels)
        for i in range(N):
            row = [float(x) for x in logits[i]]
            mean = sum(row) / K
            std = math.sqrt(sum((x - mean) ** 2 for x in row) / K)
            z = [(x - mean) / std for x in row]
            best_other = max(z[k] for k in range(K) if k != labels[i])
            assert scores[i] == pytest.approx(1 / (1 + math.exp(-1.5 * (z[labels[i]] - best_other))), rel=1e-4)


@few
@given(
    arrays(np.float32, (N, K), elements=st.integers(-9, 9)), label_arrays, st.integers(-100, 100), st.integers(-9, 9)
)
def test_margin_ignores_scale_and_shift(logits, labels, power, shift):
    expected = score("margin", logits, labels)
    np.testing.assert_allclose(score("margin", logits * 2.0**power, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(score("margin", logits + shift, labels), expected, rtol=1e-6)


@few
@given(logit_arrays, label_arrays)
def test_margin_above_one_half_means_correct(logits, labels):
    scores, right = score("margin", logits, labels), score("accuracy", logits, labels)
    assert (scores[right == 1] >= 0.5).all()
    assert (scores[right == 0] <= 0.5).all()


def test_sharpness_tends_to_accuracy():
    logits = jnp.array([[2.0, 1.0, -3.0], [1.0, 2.0, -3.0]])
    split = make_split([0, 0])
    soft, default, sharp = (example_scores.margin(sharpness=s)(logits, split) for s in (1e-3, 1.5, 1e3))
    np.testing.assert_allclose(soft, 0.5, atol=1e-3)
    np.testing.assert_allclose(sharp, example_scores.accuracy(logits, split), atol=1e-6)
    np.testing.assert_allclose(default, OBJECTIVES["margin"](logits, split))
    assert 0.5 < default[0] < 1
    assert default[0] + default[1] == pytest.approx(1)


def test_margin_of_two_classes_depends_only_on_correctness():
    scores = OBJECTIVES["margin"](jnp.array([[1e-3, 0.0], [90.0, 5.0], [1.0, 2.0], [7.0, 7.0]]), make_split([0] * 4))
    if_correct = 1 / (1 + math.exp(-3))
    np.testing.assert_allclose(scores, [if_correct, if_correct, 1 - if_correct, 0.5], rtol=1e-4)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_errors_state_rule_value_and_fix(bad):
    with pytest.raises(ValueError, match=f"sharpness must be .*; got {bad}: .+"):
        example_scores.margin(sharpness=bad)
