"""Recorded rows that are shifted or reversed are found; good, weak and sorted ones raise no alarm."""

import numpy as np
import pytest

from ev3_distill.teachers.diagnosis.diagnose import _same_frequencies
from ev3_distill.teachers.diagnosis.row_order import _best_shift, find_row_shift

N, K = 600, 5
LABELS = np.random.default_rng(0).integers(0, K, N)


def predictions(labels, accuracy, seed=1):
    """Right with this probability, else uniform."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(0, K, len(labels)))


def hide(labels, seed=2, share=0.2):
    """Labels without those of the sealed split."""
    return np.where(np.random.default_rng(seed).random(len(labels)) < share, -1, labels)


@pytest.mark.parametrize("shift", [1, -1, 2, 7, 120, -250])
@pytest.mark.parametrize("accuracy", [0.9, 0.4])
def test_a_shift_is_found(shift, accuracy):
    predicted = np.roll(predictions(LABELS, accuracy), shift)
    found = find_row_shift(predicted, hide(LABELS))
    assert (found.shift, found.reversed) == (shift, False)
    assert found.before < 0.3 < found.after == pytest.approx(accuracy + (1 - accuracy) / K, abs=0.06)
    assert f"numpy.roll(logits, {-shift}, axis=0)" in found.advice
    repaired = np.roll(predicted, -shift)
    assert find_row_shift(repaired, hide(LABELS)) is None


@pytest.mark.parametrize(
    ("shift", "advice"), [(0, "save logits[::-1]"), (3, "save numpy.roll(logits[::-1], -3, axis=0)")]
)
def test_a_reverse_order_is_found(shift, advice):
    predicted = np.roll(predictions(LABELS, 0.9), shift)[::-1]
    found = find_row_shift(predicted, hide(LABELS))
    assert (found.shift, found.reversed) == (shift, True)
    assert advice in found.advice
    assert (np.roll(predicted[::-1], -shift) == LABELS).mean() > 0.85


def test_test_rows_saved_before_train_rows_are_a_shift():
    predicted = predictions(LABELS, 0.9)
    found = find_row_shift(np.concatenate([predicted[500:], predicted[:500]]), LABELS)
    assert found.shift == 100


def test_all_matches_are_counted_as_by_hand():
    predicted, labels = np.array([0, 1, 2, 0, 2]), np.array([2, 0, 2, -1, 1])
    matches = [
        [np.sum(rows[(np.arange(5) + s) % 5] == labels) for s in range(5)] for rows in (predicted, predicted[::-1])
    ]
    shift, is_reversed = _best_shift(predicted, labels, 3)
    assert matches[is_reversed][shift] == max(map(max, matches))


def test_teachers_in_order_raise_no_alarm():
    """200 teachers of any accuracy, among them random ones."""
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, K, 200)
        alarms += find_row_shift(predictions(labels, seed / 200, seed + 1000), labels) is not None
    assert alarms == 0


def test_sorted_labels_raise_no_alarm():
    """A teacher that takes each class for the next one fits sorted labels after a shift by one class, but by 5 trials only."""
    labels = np.repeat(np.arange(K), 100)
    assert find_row_shift((labels + 1) % K, labels) is None
    assert find_row_shift(np.roll(labels, 1), labels) is None
    assert find_row_shift((labels + 1) % K, hide(labels)) is None


def test_another_order_is_none_of_a_shift_but_keeps_the_frequencies():
    predicted = np.random.default_rng(3).permutation(predictions(LABELS, 0.9))
    assert find_row_shift(predicted, LABELS) is None
    assert _same_frequencies(predicted, LABELS)
    assert not _same_frequencies(np.where(predicted == 0, 1, predicted), LABELS)
    assert not _same_frequencies(np.zeros(N, int), LABELS)


def test_nothing_is_compared_without_labels():
    assert find_row_shift(predictions(LABELS, 0.9), np.full(N, -1)) is None


def test_long_data_are_compared_on_their_first_rows(monkeypatch):
    monkeypatch.setattr("ev3_distill.teachers.diagnosis.row_order.WORK", 300 * K)
    found = find_row_shift(np.roll(predictions(LABELS, 0.9), 2), LABELS)
    assert (found.shift, found.n) == (2, 300)
