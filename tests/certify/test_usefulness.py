"""The rule that tells a useless student: hand-computed, and on simulated students with and without skill."""

import numpy as np
import pytest

from ev3_distill.certify.usefulness import CONSTANT, ONE_CLASS, TEACHER, usefulness


def judged(predicted, answers, teacher=None):
    predicted, answers = np.array(predicted), np.array(answers)
    return usefulness(
        predicted == answers, answers, predicted=predicted, teacher=None if teacher is None else np.array(teacher)
    )


def test_numbers_are_those_computed_by_hand():
    answers, predicted, teacher = (
        [0] * 5 + [1] * 3 + [2] * 2,
        [0, 0, 0, 0, 1, 1, 1, 0, 2, 0],
        [0] * 5 + [1] * 3 + [0] * 2,
    )
    found = judged(predicted, answers, teacher)
    assert (found.n, found.accuracy, found.constant, found.majority) == (10, 0.7, 0.5, 0)
    assert (found.teacher, found.agreement, found.predicted) == (0.8, 0.7, -1)
    recalls = (4 / 5 + 2 / 3 + 1 / 2) / 3
    assert found.balanced == pytest.approx((recalls - 1 / 3) / (2 / 3))
    assert found.p_value == pytest.approx(5 / 16)  # wins 3, losses 1: P[Binomial(4, 1/2) >= 3]
    assert found.alarm == CONSTANT  # 10 examples prove little, and the balanced gain is 0.48


def test_a_student_that_predicts_one_class_raises_an_alarm():
    found = judged([2] * 40, [2] * 30 + [1] * 10)
    assert (found.alarm, found.predicted) == (ONE_CLASS, 2)
    assert judged([2] * 40, [2] * 40).alarm == ""  # there is one class


def simulated(accuracy, shares, n, seed, like=None):
    """Answers, and predictions with that accuracy; errors fall on other classes by their shares."""
    rng = np.random.default_rng(seed)
    answers = rng.choice(len(shares), n, p=shares) if like is None else like
    others = rng.choice(len(shares), n, p=shares)
    return np.where(rng.random(n) < accuracy, answers, others), answers


def test_students_far_below_their_teachers_raise_an_alarm_and_others_do_not():
    shares = [0.407, 0.2, 0.2, 0.1, 0.093]
    for seed in range(20):
        teacher, answers = simulated(0.65, shares, 1000, seed)
        unscaled, _ = simulated(0.0, shares, 1000, seed + 100, answers)
        assert judged(unscaled, answers, teacher).alarm == CONSTANT
        weak, _ = simulated(0.2, [0.2] * 5, 1000, seed + 200, answers)  # 36 %, less than the constant answer
        assert judged(weak, answers, teacher).alarm == CONSTANT
        good, _ = simulated(0.6, shares, 1000, seed + 300, answers)
        assert judged(good, answers, teacher).alarm == ""


def test_a_student_that_keeps_less_than_half_of_its_teachers_gain_raises_an_alarm():
    shares = [0.1] * 10
    for seed in range(20):
        teacher, answers = simulated(0.9, shares, 500, seed)
        weak, _ = simulated(0.3, shares, 500, seed + 100, answers)
        assert judged(weak, answers, teacher).alarm == TEACHER
        assert judged(weak, answers).alarm == ""  # without a teacher: 37 % are better than 10 %
        assert judged(simulated(0.6, shares, 500, seed + 200, answers)[0], answers, teacher).alarm == ""


def test_a_useless_teacher_is_told():
    shares = [0.25] * 4
    teacher, answers = simulated(0.0, shares, 500, 0)
    found = judged(simulated(0.0, shares, 500, 1, answers)[0], answers, teacher)
    assert (found.alarm, found.teacher_useless) == (CONSTANT, True)
    assert not judged(answers, answers, answers).teacher_useless


def test_a_student_that_finds_rare_examples_raises_no_alarm_though_it_is_less_accurate_than_the_constant_answer():
    answers = np.repeat([0, 1], [990, 10])
    predicted = answers.copy()
    predicted[:20] = 1  # false alarms
    predicted[-2:] = 0  # missed
    found = judged(predicted, answers, answers)
    assert found.accuracy < found.constant
    assert found.alarm == ""
    predicted[-8:] = 0
    assert judged(predicted, answers, answers).alarm == CONSTANT


def test_false_alarms_are_rare_at_any_size():
    """A student with nine tenths of its teacher's gain, of 10 classes; and one with all of it, on few examples."""
    for n, accuracy in ((50, 0.85), (300, 0.85), (2000, 0.85)):
        for seed in range(50):
            teacher, answers = simulated(0.95, [0.1] * 10, n, seed)
            student, _ = simulated(accuracy, [0.1] * 10, n, 1000 + seed, answers)
            assert judged(student, answers, teacher).alarm == ""
