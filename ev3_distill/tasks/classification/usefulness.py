"""Whether a classifier is of any use, from what is known of it on a split; see `certify/usefulness.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ev3_distill.certify.usefulness import Usefulness, usefulness
from ev3_distill.tasks.classification.example_metrics import predicted_class


def classifier_usefulness(
    targets: Any, teacher: Mapping[str, Any] | None, *, scores: Any = None, outputs: Any = None
) -> Usefulness | None:
    """Compares a classifier with the most frequent class and with its teacher.

    Without any label the teacher's classes stand in for labels.

    Args:
      targets: labels [N], -1 where an example has none.
      teacher: the teacher's outputs by name; None if it is unknown.
      scores: [N] the student's promise scores, if its outputs are unknown.
      outputs: the student's logits [N, K].

    Returns:
      The comparison; None if nothing is known of the right answers.
    """
    labels = np.asarray(targets)
    of_teacher = None if teacher is None else np.asarray(predicted_class(np.asarray(teacher["logits"])))
    rows = np.flatnonzero(labels != -1)
    labeled = len(rows) > 0
    if not len(rows):
        if of_teacher is None or not len(labels):
            return None
        labels, rows = of_teacher, np.arange(len(labels))
    predicted = None if outputs is None else np.asarray(predicted_class(np.asarray(outputs)))
    correct = np.asarray(scores) > 0 if predicted is None else predicted == labels
    return usefulness(
        correct[rows],
        labels[rows],
        predicted=None if predicted is None else predicted[rows],
        teacher=None if of_teacher is None else of_teacher[rows],
        labeled=labeled,
    )
