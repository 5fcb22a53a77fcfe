"""Outputs without labels and names: embeddings and regression targets are refused, logits of classifiers are not."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from ev3_distill.teachers.diagnosis.undeclared import why_not_logits

RNG = np.random.default_rng(0)


def classifier(columns, n=500, margin=6.0, scale=1.5):
    """Logits of a classifier with one class ahead of the others."""
    logits = RNG.normal(0, scale, (n, columns))
    return logits + margin * np.eye(columns)[RNG.integers(0, columns, n)] * RNG.random((n, 1))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


FEATURES = np.maximum(RNG.normal(size=(500, 512)), 0)
SUSPECT = {
    "embedding": (unit(RNG.normal(size=(500, 384))), "each row of its 384 outputs has length 1"),
    "angle": (unit(RNG.normal(size=(500, 2))), "each row of its 2 outputs has length 1"),
    "normalized features": (unit(FEATURES), "has length 1"),
    "raw embedding": (RNG.normal(size=(500, 384)), "the softmax of its 384 outputs is almost uniform"),
    "cosines": (RNG.uniform(-0.2, 0.4, (500, 100)), "almost uniform"),
    "relu": (FEATURES, "no output is negative and 50% of them are 0"),
    "targets": (
        RNG.normal(size=(500, 3)) * [1, 3, 2] + [0, 70, 12],
        "output 1 of 3 is the largest for all 500 examples",
    ),
}
LOGITS = {
    "two": classifier(2),
    "ten": classifier(10),
    "hundred": classifier(100),
    "thousand": classifier(1000),
    "weak, hundred classes": classifier(100, margin=2.0),
    "log-probabilities": log_softmax(classifier(50), axis=1),
    "probabilities": softmax(classifier(50), axis=1),  # diagnosed elsewhere
    "certain": softmax(40 * classifier(50), axis=1),
    "distances": -(np.abs(classifier(10)) ** 2),
    "votes": 4 * np.eye(10)[RNG.integers(0, 10, 500)],
    "few": RNG.normal(size=(7, 384)),
    "one class so far": np.tile([[2.0, -1.0]], (20, 1)) + RNG.normal(0, 0.1, (20, 2)),
}


@pytest.mark.parametrize("name", SUSPECT)
def test_outputs_that_are_no_logits_are_suspected(name):
    outputs, reason = SUSPECT[name]
    text = why_not_logits(outputs.astype(np.float32))
    assert reason in text
    assert text.endswith("if these are logits, give --teacher-input.outputs logits")


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_not_suspected(name):
    assert why_not_logits(LOGITS[name].astype(np.float32)) == ""
