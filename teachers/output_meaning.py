"""Meaning of a teacher's main output [n, R] in a classification: logits, probabilities, sigmoids, or one column alone.

Distillation needs logits. `--teacher-input.outputs` states what a teacher returns:

  logits          As they are. Logarithms of probabilities are logits, too: their softmax is the same. One column is the logit d
                  of class 1 of two classes, and becomes (-d/2, d/2), whose softmax is (sigmoid(-d), sigmoid(d)).
  probabilities   Become their logarithms. One column is the probability p of class 1, thus the logit log p - log(1 - p).
  sigmoid         Become the logits before the sigmoid, log p - log(1 - p).
"""

import numpy as np

from ev3_distill.errors import InputError

LOGITS, PROBABILITIES, SIGMOID = "logits", "probabilities", "sigmoid"
MEANINGS = (LOGITS, PROBABILITIES, SIGMOID)
LEAST_PROBABILITY = 1e-7  # of a class; keeps its logarithm finite
OPTION = "--teacher-input.outputs"
NO_REGRESSION = "a teacher of numbers needs a regression task, which ev3-distill does not offer yet"
LEAST_VALUES = 32  # least number of values in [0, 1] that look like sigmoids
_SUM_TOLERANCE = 1e-3  # of probabilities: float16 models sum to 1 within a few 1e-4


def meaning_of(outputs: np.ndarray) -> str:
    """What outputs [n, R] look like: one of `MEANINGS`.

    Probabilities lie in [0, 1], and each row sums to 1. Sigmoids lie in [0, 1] and do not. All else passes as logits.
    """
    if not outputs.size or outputs.min() < 0 or outputs.max() > 1 + _SUM_TOLERANCE or outputs.max() == outputs.min():
        return LOGITS
    if outputs.shape[1] > 1 and np.allclose(outputs.sum(axis=1), 1, atol=_SUM_TOLERANCE):
        return PROBABILITIES
    return SIGMOID if outputs.max() <= 1 and outputs.size >= LEAST_VALUES else LOGITS


def to_logits(outputs: np.ndarray, stated: str, *, source: str) -> np.ndarray:
    """Converts outputs [n, R] to logits [n, K], where K is R, or 2 if one column is stated.

    Args:
      outputs: of the teacher, float32.
      stated: one of `MEANINGS`, or empty if the user states nothing: the outputs are returned as they are.
      source: the teacher, for errors.

    Raises:
      InputError: stated probabilities do not lie in [0, 1].
    """
    if not stated:
        return outputs
    values = outputs
    if stated != LOGITS:
        if outputs.min() < 0 or outputs.max() > 1 + _SUM_TOLERANCE:
            raise InputError(
                f"outputs that are {stated} lie in [0, 1]; {source} gives values from {outputs.min():.3g} to "
                f"{outputs.max():.3g}: omit {OPTION}, or give {OPTION} logits"
            )
        logarithm = np.log(np.clip(outputs, LEAST_PROBABILITY, 1))
        one_column = outputs.shape[1] == 1
        values = logarithm
        if stated == SIGMOID or one_column:
            values = logarithm - np.log(np.clip(1 - outputs, LEAST_PROBABILITY, 1))
    return np.concatenate([-values / 2, values / 2], axis=1) if outputs.shape[1] == 1 else values


def columns_as_logits(columns: int | None, stated: str) -> int | None:
    """Number of logits that `to_logits` makes of R columns; None if R is unknown."""
    return 2 if columns == 1 and stated else columns


def one_column_error(num_classes: int, *, source: str) -> InputError:
    """The error for a teacher with one output column that the user does not explain.

    Agreement with one column is 100 % for any student, since a single class is always the most likely one.

    Args:
      num_classes: of the data; 0 if unknown.
      source: the teacher.
    """
    binary = (
        f"give {OPTION} logits if it is the decision value (the logit) of class 1 of two, or {OPTION} probabilities if it is "
        "the probability of class 1"
    )
    if num_classes > 2:
        binary = "return one logit per class, instead of a class number or a score"
    count = num_classes if num_classes > 1 else "at least 2"
    return InputError(
        f"a teacher must have one output column per class, {count}; {source} has one: {binary}; {NO_REGRESSION}"
    )


def labels_error(num_classes: int, *, source: str) -> InputError:
    """The error for a teacher that returns whole numbers [B], such as class labels."""
    return InputError(
        f"a teacher must give a score for each class, [B, {num_classes or 'K'}]; {source} gives one whole number per example, "
        f"such as the predicted class: take the output that holds logits or probabilities; {NO_REGRESSION}"
    )


def advice_on(meaning: str) -> str:
    """What to tell of outputs that are no logits; empty for logits."""
    if meaning == PROBABILITIES:
        return (
            "its outputs are probabilities (each row sums to 1), but distillation needs logits: remove the softmax, or give "
            f"{OPTION} probabilities to take the logarithm"
        )
    if meaning == SIGMOID:
        return (
            "its outputs lie in [0, 1] and rows do not sum to 1, as after a sigmoid, but distillation needs logits: remove the "
            f"sigmoid, or give {OPTION} sigmoid to undo it (or {OPTION} logits if they are logits). Several classes at once "
            "(multi-label) are a task that ev3-distill does not offer yet"
        )
    return ""


def advice_on_infinite(outputs: np.ndarray) -> str:
    """What to do about outputs that are not finite."""
    if np.isneginf(outputs).any() and not np.isnan(outputs).any() and np.nanmax(outputs) <= 0:
        return "the logarithm of a probability of 0; clip first, as in numpy.log(numpy.clip(probabilities, 1e-7, 1))"
    return "check the teacher and the scale of its inputs"
