"""Where the labels and a teacher disagree on a split, and which classes are confused: clearly more often than usual.

Of the examples labeled c, the teacher gives class d to a fraction. The pair (c, d) is confused if a lower bound of that
fraction (Clopper and Pearson 1934, at a level that holds for all pairs at once) is above FLOOR and above the teacher's usual
error: the median over classes of the fraction of examples to which it gives another class.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify.bounds import binomial_lower
from ev3_distill.tasks.classification.example_metrics import predicted_class

LEVEL = 0.05  # probability that any pair of classes is named by chance
FLOOR = 0.05  # fraction of a class that must be confused at least
LISTED = 5  # most pairs that are named

Counts = dict[tuple[int, int], int]  # examples by (label, answer)


class ConfusedPair(NamedTuple):
    """Two classes that labels and teacher confuse, in the direction that is clearer."""

    label: int
    answer: int  # the teacher's class
    times: int  # of the examples with this label, those with this answer
    n: int  # examples with this label
    reverse_times: int  # the same with the classes exchanged
    reverse_n: int


class Disagreement(NamedTuple):
    """How labels and teacher disagree on a split."""

    n: int  # labeled examples
    differ: int  # of which the teacher gives another class
    pairs: tuple[ConfusedPair, ...]  # at most LISTED, the worst first
    moved: (
        int  # classes whose most frequent answer is another class, of which no two are the same; 0 unless most classes
    )
    num_classes: int


def find_disagreement(targets: Any, teacher: Mapping[str, Any]) -> Disagreement | None:
    """Compares a teacher's classes with labels; None without labels.

    Args:
      targets: labels [N], -1 where an example has none.
      teacher: its outputs by name, with `logits` [N, K].
    """
    labels, logits = np.asarray(targets), np.asarray(teacher["logits"])
    known = labels != -1
    if not known.any():
        return None
    labels, answers, size = labels[known], predicted_class(logits[known]), logits.shape[1]
    counts, of_class = _count_pairs(labels, answers, size), np.bincount(labels, minlength=size)
    right = np.bincount(labels[answers == labels], minlength=size)
    usual = float(np.median(1 - right[of_class > 0] / of_class[of_class > 0]))
    found = _confused(counts, of_class, FLOOR)
    moved = _moved(counts, found, size)
    if not moved:
        found = [(bound, c, d) for bound, c, d in found if bound > usual]
    differ = int((answers != labels).sum())
    return Disagreement(len(labels), differ, _as_pairs(found, counts, of_class), moved, size)


def _count_pairs(labels: np.ndarray, answers: np.ndarray, size: int) -> Counts:
    """How often each (label, answer) occurs, in order; not a matrix, which 10,000 classes would make too large."""
    sound = answers >= 0
    pairs, times = np.unique(labels[sound].astype(np.int64) * size + answers[sound], return_counts=True)
    return dict(zip(zip((pairs // size).tolist(), (pairs % size).tolist(), strict=True), times.tolist(), strict=True))


def _confused(counts: Counts, of_class: np.ndarray, floor: float) -> list[tuple[float, int, int]]:
    """(lower bound of the fraction, label, answer) of each pair with a bound above `floor`, the worst first.

    Args:
      counts: by label and answer.
      of_class: [K], examples with each label.
      floor: of the bound.
    """
    size = len(of_class)
    level = LEVEL / max(size * (size - 1), 1)
    found = []
    for (c, d), times in counts.items():
        if c != d and times > floor * of_class[c] and (bound := binomial_lower(times, int(of_class[c]), level)) > floor:
            found.append((bound, c, d))
    return sorted(found, reverse=True)


def _moved(counts: Counts, found: list[tuple[float, int, int]], size: int) -> int:
    """The number of classes whose usual answer is clearly another class, if those are most classes, as in another class order.

    In an order, no two classes have the same usual answer.
    """
    usual: dict[int, int] = {}
    for c, d in sorted(counts, key=lambda pair: counts[pair], reverse=True):  # of equals, the first class
        usual.setdefault(c, d)
    moved = {c: d for _, c, d in found if d == usual[c]}
    unmoved = [c for c, d in usual.items() if c == d]
    answers = [*moved.values(), *unmoved]
    return len(moved) if 2 * len(moved) > size and len(set(answers)) == len(answers) else 0


def _as_pairs(found: list[tuple[float, int, int]], counts: Counts, of_class: np.ndarray) -> tuple[ConfusedPair, ...]:
    """The worst pairs, each once, whichever way round."""
    first: dict[frozenset[int], tuple[int, int]] = {}
    for _, c, d in found:
        first.setdefault(frozenset((c, d)), (c, d))
    return tuple(
        ConfusedPair(c, d, counts[c, d], int(of_class[c]), counts.get((d, c), 0), int(of_class[d]))
        for c, d in list(first.values())[:LISTED]
    )
