"""Outputs without labels or class names: do their columns look like the logits of classes?

Without labels the number of classes is the number of columns, whatever they hold, and a certificate of agreement would be about
the largest entry of an embedding or of several regression targets. This module finds what logits never do; the user may declare
that outputs are logits with `--teacher-input.outputs logits`. Two or three numbers on one scale look the same.
"""

import numpy as np
from scipy.special import log_softmax

from ev3_distill.teachers.output_meaning import OPTION, PROBABILITIES, SIGMOID, meaning_of

LEAST_ROWS = 8  # least number of examples to tell anything from
ROWS_OF_ONE_CLASS = 50  # least number of examples of which all have the same largest column
MANY_COLUMNS = 32  # embeddings have at least as many
FLAT = 0.9  # mean entropy of the softmax, as a fraction of log K; classifiers with many classes are far below, embeddings above
UNIT_TOLERANCE = 1e-3  # of the length of a normalized row


def why_not_logits(outputs: np.ndarray) -> str:
    """Why outputs [n, K] are probably not logits of classes, and what to do; empty if nothing speaks against it.

    Probabilities and sigmoids are outputs of a classifier, and are diagnosed elsewhere.
    """
    meaning = meaning_of(outputs)
    reason = "" if len(outputs) < LEAST_ROWS or meaning == PROBABILITIES else _reason(outputs, meaning)
    way_out = "embeddings and regressions are tasks that ev3-distill does not offer yet; if these are logits, give"
    return f"{reason}; {way_out} {OPTION} logits" if reason else ""


def _reason(outputs: np.ndarray, meaning: str) -> str:
    """What logits never do; empty if there is nothing."""
    n, columns = outputs.shape
    if np.allclose(np.linalg.norm(outputs, axis=1), 1, atol=UNIT_TOLERANCE):
        return f"each row of its {columns} outputs has length 1, as embeddings have"
    if meaning == SIGMOID:
        return ""
    zeros = outputs == 0
    if outputs.min() >= 0 and zeros.any() and np.median((~zeros).sum(axis=1)) >= 2:
        return f"no output is negative and {zeros.mean():.0%} of them are 0, as in features after a ReLU"
    largest = outputs.argmax(axis=1)
    if n >= ROWS_OF_ONE_CLASS and (largest == largest[0]).all():
        return (
            f"output {largest[0]} of {columns} is the largest for all {n:,} examples, as with regression targets of different "
            f"units, so that any student agrees"
        )
    log_probabilities = log_softmax(outputs.astype(np.float64), axis=1)
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(axis=1).mean()
    if columns >= MANY_COLUMNS and entropy > FLAT * np.log(columns):
        return (
            f"the softmax of its {columns} outputs is almost uniform (largest probability "
            f"{np.exp(log_probabilities.max(axis=1)).mean():.1%} on average), as with embeddings"
        )
    return ""
