"""Confused classes are those that a teacher's answers mix clearly more often than usual."""

import numpy as np
import pytest
from scipy.stats import binomtest

from ev3_distill.tasks.classification import disagreement
from ev3_distill.tasks.classification.disagreement import ConfusedPair, find_disagreement
from ev3_distill.tasks.classification.task import classification

LABELS = np.repeat(np.arange(4), 100)


def found(answers, labels=LABELS, size=4):
    return find_disagreement(labels, {"logits": 5 * np.eye(size, dtype=np.float32)[np.asarray(answers)]})


def answers_with(*changes):
    """The labels as answers, but for (label, answer, times)."""
    answers = LABELS.copy()
    for label, answer, times in changes:
        start = 100 * label + (answers[label == LABELS] != label).sum()
        answers[start : start + times] = answer
    return answers


def test_swapped_classes_are_one_pair():
    of = found(answers_with((1, 3, 95), (3, 1, 90)))
    assert of == (400, 185, (ConfusedPair(1, 3, 95, 100, 90, 100),), 0, 4)
    assert classification(4).disagreement is find_disagreement


def test_a_teacher_of_few_errors_confuses_nothing():
    assert found(LABELS) == (400, 0, (), 0, 4)
    assert found(answers_with((1, 3, 5), (2, 0, 4))) == (400, 9, (), 0, 4)


def test_the_bound_of_a_pair_decides():
    """A pair is named from the count on at which an independent exact bound is above FLOOR."""
    level = disagreement.LEVEL / (4 * 3)

    def bound(times):
        return binomtest(times, 100, alternative="greater").proportion_ci(1 - level, method="exact").low

    least = next(times for times in range(100) if bound(times) > disagreement.FLOOR)
    assert found(answers_with((1, 3, least - 1))).pairs == ()
    assert found(answers_with((1, 3, least))).pairs == (ConfusedPair(1, 3, least, 100, 0, 100),)


def test_a_pair_must_exceed_the_usual_error():
    """Each class has 40 errors; one class has its own in one place, which is no more than usual."""
    spread = [(label, (label + i) % 4, 13) for label in (0, 1, 2) for i in (1, 2, 3)]
    assert found(answers_with(*spread, (3, 0, 40))).pairs == ()
    (pair,) = found(answers_with(*spread, (3, 0, 80))).pairs
    assert pair[:4] == (3, 0, 80, 100)


def test_the_worst_five_pairs_are_named_the_worst_first():
    labels = np.repeat(np.arange(20), 100)
    answers = labels.copy()
    for i in range(6):
        answers[200 * i : 200 * i + 50 + 5 * i] = 2 * i + 1
    of = found(answers, labels, 20)
    assert [pair[:3] for pair in of.pairs] == [(2 * i, 2 * i + 1, 50 + 5 * i) for i in (5, 4, 3, 2, 1)]


def test_most_classes_in_another_order_are_moved():
    assert found((LABELS + 1) % 4).moved == 4
    assert found(np.array([1, 0, 3, 3])[LABELS]).moved == 0  # two classes have one answer, so this is no order
    assert found(np.array([1, 2, 0, 3])[LABELS]).moved == 3
    assert found(np.array([1, 0, 2, 3])[LABELS]).moved == 0  # half of the classes is not most
    assert found(np.zeros(400, int)).moved == 0
    assert len(found((LABELS + 1) % 4).pairs) == 4


@pytest.mark.parametrize("labels", [np.full(400, -1), LABELS])
def test_examples_without_a_label_or_an_answer(labels):
    none = find_disagreement(labels, {"logits": np.full((400, 4), np.nan, np.float32)})
    assert none == (None if (labels < 0).all() else (400, 400, (), 0, 4))


def test_only_labeled_examples_count():
    labels = np.where(np.arange(400) % 2, LABELS, -1)
    assert found(answers_with((1, 3, 100)), labels)[:3] == (200, 50, (ConfusedPair(1, 3, 50, 50, 0, 50),))


def test_many_classes_need_no_matrix_of_them():
    """50,000 classes squared would be 20 GB of counts."""
    labels = np.arange(1000) % 10
    answers = np.where(labels < 2, 1 - labels, labels)
    logits = np.zeros((1000, 50_000), np.float32)
    logits[np.arange(1000), answers] = 1
    found = find_disagreement(labels, {"logits": logits})
    assert found.pairs == (ConfusedPair(1, 0, 100, 100, 100, 100),)
    assert (found.differ, found.moved, found.num_classes) == (200, 0, 50_000)
