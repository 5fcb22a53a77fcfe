"""Row order of recorded outputs: are they shifted, or in reverse order, against the examples?

A lost first row, a test part saved before the train part and a reversed loop all give predictions that fit the labels once the
rows are shifted. All shifts are scored at once, as a circular cross-correlation of predictions and labels by the fast Fourier
transform; the best one is confirmed by an exact test at a level that is divided by the number of shifts.
"""

import numpy as np

from ev3_distill.certify.bounds import mcnemar_p_value
from ev3_distill.teachers.diagnosis.findings import LEAST_GAIN, LEAST_SKILL, LEVEL, RowShift, skill

WORK = 1 << 24  # most numbers (rows times classes) that are transformed; longer data are compared on their first rows


def find_row_shift(predicted: np.ndarray, labels: np.ndarray) -> RowShift | None:
    """The shift of the rows that clearly improves a teacher; None if none does.

    Examples of one class that follow one another count once, since they win or lose by a shift together. So sorted data have
    too few independent examples for a decision.

    Args:
      predicted: classes [N] of the recorded rows.
      labels: [N]; -1 for an example that is not to be compared, such as one of the sealed split.
    """
    compared = np.flatnonzero(labels >= 0)
    if not len(compared):
        return None
    classes = int(max(predicted.max(), labels.max())) + 1
    n = min(len(labels), max(WORK // classes, 1))
    predicted, labels = predicted[:n], labels[:n]
    compared = compared[compared < n]
    truth = labels[compared]
    if len(truth) < 2 or (predicted[compared] == truth).mean() > 1 - LEAST_GAIN:
        return None
    before = predicted[compared] == truth
    (shift, is_reversed), rows = _best_shift(predicted, labels, classes), predicted
    if is_reversed:
        rows = predicted[::-1]
    after = rows[(compared + shift) % n] == truth
    chance = float(np.bincount(truth).max() / len(truth))
    if (
        after.mean() - before.mean() < LEAST_GAIN
        or skill(float(after.mean()), chance) < LEAST_SKILL
        or _p_value(before, after, truth) > LEVEL / (2 * n)
    ):
        return None
    signed = shift if shift <= n // 2 else shift - n
    return RowShift(signed, is_reversed, float(before.mean()), float(after.mean()), len(truth))


def _best_shift(predicted: np.ndarray, labels: np.ndarray, classes: int) -> tuple[int, bool]:
    """The shift s in 0 ... n - 1 and direction with the most matches of predicted[(i + s) % n] and labels[i]."""
    n = len(labels)
    forward = np.zeros(n // 2 + 1, np.complex128)
    backward = np.zeros_like(forward)
    for k in range(classes):
        target = np.conj(np.fft.rfft(labels == k))
        forward += np.fft.rfft(predicted == k) * target
        backward += np.fft.rfft(predicted[::-1] == k) * target
    matches = [np.rint(np.fft.irfft(total, n)) for total in (forward, backward)]
    best = [int(each.argmax()) for each in matches]
    is_reversed = bool(matches[1][best[1]] > matches[0][best[0]])
    return best[is_reversed], is_reversed


def _p_value(before: np.ndarray, after: np.ndarray, truth: np.ndarray) -> float:
    """Exact one-sided McNemar test, in which a run of examples of one class is one trial: the sign of its gain."""
    starts = np.flatnonzero(np.r_[True, np.diff(truth) != 0])
    gains = np.add.reduceat(after.astype(int) - before.astype(int), starts)
    return mcnemar_p_value(int((gains > 0).sum()), int((gains < 0).sum()))
