"""Whether a student is of any use: compared with always answering the most frequent class, and with its teacher.

A certificate is true of a useless student, too: "at least 36 % accuracy" reads like a success where one class has 41 % of the
examples. With s, t, c the scores (0 or 1) of student, teacher and constant answer on an example, an alarm is raised for one of
three reasons:

  one class: the student predicts the same class for all examples, which are of several classes.
  constant: of the examples that only one of student and constant answer gets right, the student does not win so many that a
    fair coin would do so with probability at most 0.05 (McNemar's exact one-sided test), and its balanced gain is below a half.
  teacher: the student keeps less than half of what its teacher gains over the constant answer: sum(2 s - t - c) is more than
    1.645 standard errors below 0, and its balanced gain is below half of its teacher's.

The balanced gain is the mean over classes of the accuracy on each, rescaled: 0 for a constant answer, 1 for no error. It is in
the rule for data where one class is frequent: a student that finds rare examples may be less accurate than the constant answer.
"""

from typing import NamedTuple

import numpy as np

from ev3_distill.certify.bounds import mcnemar_p_value

LEVEL = 0.05  # of the test against the constant answer
ERRORS = 1.645  # standard errors below half of the teacher's gain
HALF = 0.5

ONE_CLASS, CONSTANT, TEACHER = "one class", "constant", "teacher"


class Usefulness(NamedTuple):
    """A student beside the constant answer and its teacher, on the same n examples."""

    alarm: str  # ONE_CLASS, CONSTANT or TEACHER; empty for none
    n: int
    accuracy: float
    constant: float  # accuracy of the constant answer
    majority: int  # the most frequent class, which is that answer
    predicted: int  # the class that the student predicts for all examples; -1 if there are several, or they are unknown
    teacher: float | None  # the teacher's accuracy; None if it is unknown
    agreement: float | None  # with the teacher; None if it is unknown
    balanced: float  # balanced gain
    p_value: float  # of "the student is no better than the constant answer"
    teacher_useless: bool  # whether the teacher would raise the alarm of the constant answer itself
    labeled: bool  # whether the right answers are labels, not the teacher's classes


def usefulness(
    correct: np.ndarray,
    answers: np.ndarray,
    *,
    predicted: np.ndarray | None = None,
    teacher: np.ndarray | None = None,
    labeled: bool = True,
) -> Usefulness:
    """Compares a student with the constant answer and with its teacher.

    Args:
      correct: [N] whether the student gives the right answer; N is at least 1.
      answers: [N] the right answers: labels or, in data without any, the teacher's classes.
      predicted: [N] the student's classes, if they are known.
      teacher: [N] the teacher's classes, if they are known.
      labeled: whether the answers are labels.
    """
    classes, counts = np.unique(answers, return_counts=True)
    majority = int(classes[counts.argmax()])
    s, c = np.asarray(correct, bool), answers == majority
    t = None if teacher is None else np.asarray(teacher) == answers
    single = int(predicted[0]) if predicted is not None and len(np.unique(predicted)) == 1 else -1
    balanced, p_value = _balanced_gain(s, answers), _p_value(s, c)
    alarm = ""
    if single >= 0 and len(classes) > 1:
        alarm = ONE_CLASS
    elif len(classes) > 1 and p_value > LEVEL and balanced < HALF:
        alarm = CONSTANT
    elif t is not None and _far_below(s, t, c) and balanced < HALF * _balanced_gain(t, answers):
        alarm = TEACHER
    return Usefulness(
        alarm,
        n=len(answers),
        accuracy=float(s.mean()),
        constant=float(c.mean()),
        majority=majority,
        predicted=single,
        teacher=None if t is None else float(t.mean()),
        agreement=None if teacher is None or predicted is None else float((teacher == predicted).mean()),
        balanced=balanced,
        p_value=p_value,
        labeled=labeled,
        teacher_useless=t is not None and _p_value(t, c) > LEVEL and _balanced_gain(t, answers) < HALF,
    )


def _p_value(s: np.ndarray, c: np.ndarray) -> float:
    return mcnemar_p_value(int((s & ~c).sum()), int((c & ~s).sum()))


def _balanced_gain(s: np.ndarray, answers: np.ndarray) -> float:
    """0 for a constant answer, 1 for no error, 0 if there is one class."""
    _, index = np.unique(answers, return_inverse=True)
    recalls = np.bincount(index, s) / np.bincount(index)
    k = len(recalls)
    return float((recalls.mean() - 1 / k) / (1 - 1 / k)) if k > 1 else 0.0


def _far_below(s: np.ndarray, t: np.ndarray, c: np.ndarray) -> bool:
    """Whether the student's gain over the constant answer is clearly below half of the teacher's."""
    x = 2.0 * s - t - c
    return float(x.sum()) < -ERRORS * float(np.sqrt((x**2).sum()))
