"""Checks a teacher on labeled examples before training, and finds the preprocessing that would repair it.

Common errors are silent: another class order, BGR instead of RGB, another range of pixel values, another layout. Each
candidate repair runs on a few labeled examples. Those that look better run on more, and the best few are tested on examples
that played no part in selecting them. (A class order that passes is then estimated again from all examples.) A repair is
confirmed if, on the test examples, it raises accuracy by at least `LEAST_GAIN`, the exact one-sided McNemar test gives
p <= `LEVEL`, and the repaired teacher is better than chance. So the probability of a false alarm, for a good teacher or a weak
one, is a few times `LEVEL`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.errors import InputError
from ev3_distill.teachers.diagnosis.findings import (
    LEAST_GAIN,
    LEAST_SKILL,
    Diagnosis,
    Predictions,
    Remedy,
    is_better,
    p_value,
    skill,
)
from ev3_distill.teachers.diagnosis.repairs import Changes, Repair, pairs, repairs
from ev3_distill.teachers.diagnosis.undeclared import why_not_logits
from ev3_distill.teachers.output_meaning import meaning_of
from ev3_distill.teachers.preprocessing import canonical
from ev3_distill.teachers.teacher import Teacher

SCREENS = (16, 64, 256)  # examples of the three screens: not hopeless, better, better by LEAST_GAIN / 2
HOPELESS_GAIN = -0.3  # gain at the first screen that drops a candidate
TESTED_REPAIRS = 3  # most repairs tested in one round
ROUNDS = 3  # most errors repaired one after the other
BATCH = 128  # examples of one pass of the teacher
LISTED_CLASSES = 100  # most classes whose order is written out


class Examples(Protocol):
    """Inputs, in memory or read lazily."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, ...]."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the inputs."""

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Reads the examples [n, ...] of rows [n]."""


def diagnose(
    teacher: Teacher,
    inputs: Examples,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    *,
    limit: int = 2000,
    seed: int = 0,
) -> Diagnosis:
    """Measures the accuracy of a teacher on labeled examples and searches for a repair.

    Args:
      teacher: the search needs its `with_preprocessing`; without it the teacher is only measured.
      inputs: [N, ...], in memory or read lazily.
      labels: [N]; -1 for an example without a label.
      class_names: of the data.
      limit: most examples to use. With candidates included, a good teacher runs on about twice as many.
      seed: selects the examples.

    Raises:
      InputError: the teacher fails on the data.
    """
    labeled = np.flatnonzero(np.asarray(labels) >= 0)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(labeled)[:limit])
    if not len(rows):
        return _without_labels(teacher, inputs[np.sort(rng.permutation(len(labels))[:limit])], class_names)
    order = rng.permutation(len(rows))  # screens and test are random parts
    examples, truth = inputs[rows][order], np.asarray(labels)[rows][order]
    base = _Trial(teacher, examples, truth)
    chance = float(np.bincount(truth).max() / len(truth))
    low, high = _interval(int(base.hits.sum()), len(truth))
    names = tuple(class_names) or teacher.class_names or ()
    remedy = None if teacher.with_preprocessing is None else _search(base, names, chance)
    members = tuple(diagnose(m, inputs, labels, class_names, limit=limit, seed=seed) for m in teacher.members)
    accuracy = float(base.hits.mean())
    return Diagnosis(
        teacher.source,
        *(accuracy, low, high, chance, len(rows)),
        remedy,
        members,
        meaning=meaning_of(base.logits),
        stated=_states(teacher),
        recorded=teacher.recorded,
        same_frequencies=_same_frequencies(base.logits.argmax(axis=1), truth),
        notes=teacher.notes,
    )


class _Trial:
    """A teacher on the examples, which runs only on as many as needed."""

    def __init__(self, teacher: Teacher, examples: np.ndarray, truth: np.ndarray) -> None:
        self.teacher, self.examples, self.truth = teacher, examples, truth
        self._parts: list[np.ndarray] = []
        self._done = 0

    def first(self, count: int) -> np.ndarray:
        """Logits [n, K] of the first `count` examples or more."""
        while self._done < min(count, len(self.examples)):
            end = min(count, len(self.examples), self._done + BATCH)
            self._parts.append(self.teacher.outputs(self.examples[self._done : end])["logits"])
            self._done = end
        return np.concatenate(self._parts)

    @property
    def logits(self) -> np.ndarray:
        """Logits [N, K] of all examples."""
        return self.first(len(self.examples))

    @functools.cached_property
    def hits(self) -> np.ndarray:
        """Which of all examples are classified correctly [N]."""
        return self.first_hits(len(self.examples))

    def first_hits(self, count: int) -> np.ndarray:
        """Which of the first examples are classified correctly [count]."""
        return np.asarray(self.first(count)[:count].argmax(axis=1) == self.truth[:count])

    def repaired(self, changes: Changes) -> "_Trial":
        """A trial with changes to the preprocessing."""
        assert self.teacher.with_preprocessing is not None and self.teacher.preprocessing is not None
        steps = dataclasses.replace(self.teacher.preprocessing, **changes)
        return _Trial(self.teacher.with_preprocessing(steps), self.examples, self.truth)


def _search(base: _Trial, names: tuple[str, ...], chance: float) -> Remedy | None:
    """Searches for several repairs one after the other, and combines them."""
    confirmed: list[tuple[Repair, _Trial]] = []
    now = base
    for _ in range(ROUNDS):
        best = _round(now, names, chance, first=not confirmed)
        if best is None:
            break
        confirmed.append(best)
        now = best[1]
        if now.teacher.with_preprocessing is None:
            break
    if not confirmed:
        return None
    tested = slice(_screens(len(base.truth))[-1], None)
    before, after = base.hits[tested], now.hits[tested]
    changes: Changes = {}
    for repair, _ in confirmed:
        changes |= repair.changes
    return Remedy(
        " and ".join(repair.name for repair, _ in confirmed),
        changes,
        float(before.mean()),
        float(after.mean()),
        len(before),
        p_value(before, after),
    )


def _round(now: _Trial, names: tuple[str, ...], chance: float, *, first: bool) -> tuple[Repair, _Trial] | None:
    """The best confirmed repair of one error. For a teacher near chance, the first round also tries two repairs at once."""
    steps, shape = now.teacher.preprocessing, now.examples.shape[1:]
    assert steps is not None
    if 1 - now.hits.mean() < LEAST_GAIN:
        return None  # no repair can gain as much
    pixels = now.examples.dtype == np.uint8 or len(shape) == 3
    groups = repairs(steps, shape, pixels=pixels)
    confirmed = _confirmed(now, [repair for group in groups for repair in group], chance)
    if (classes := _classes(now, names, chance)) is not None:
        confirmed.append(classes)
    if not confirmed and first and skill(float(now.hits.mean()), chance) < LEAST_SKILL:
        confirmed = _confirmed(now, pairs(groups), chance)
    if not confirmed:
        return None
    tested = slice(_screens(len(now.truth))[-1], None)
    best = max(confirmed, key=lambda each: each[1].hits[tested].mean())[1].hits[tested]
    # a more common repair comes first and wins unless the best is clearly better
    return next(each for each in confirmed if p_value(each[1].hits[tested], best) > 0.05)


def _screens(n: int) -> tuple[int, int, int]:
    """Sizes of the three screens among n examples. The test has the rest, at least half."""
    second = min(SCREENS[1], n // 4)
    return min(SCREENS[0], second), second, min(SCREENS[2], n // 2)


def _confirmed(now: _Trial, candidates: Sequence[Repair], chance: float) -> list[tuple[Repair, _Trial]]:
    """Screens the candidates and returns those that the test confirms, in their order."""
    first, second, third = _screens(len(now.truth))
    trials: list[tuple[int, int, Repair, _Trial]] = []
    for rank, repair in enumerate(candidates):
        try:
            trial = now.repaired(repair.changes)
            if _is_same(trial, now) or _gain(now, trial, first) <= HOPELESS_GAIN or _gain(now, trial, second) <= 0:
                continue
            gain = _gain(now, trial, third)
        except InputError:  # the teacher does not accept this preprocessing
            continue
        if gain >= LEAST_GAIN / 2:
            trials.append((-round(gain * third), rank, repair, trial))
    best = sorted(trials, key=lambda each: each[:2])[:TESTED_REPAIRS]
    return [
        (repair, trial)
        for *_, repair, trial in sorted(best, key=lambda each: each[1])
        if _is_confirmed(now, trial, chance)
    ]


def _is_same(one: _Trial, other: _Trial) -> bool:
    shape = one.examples.shape[1:]
    steps = [trial.teacher.preprocessing for trial in (one, other)]
    return steps[0] is not None and steps[1] is not None and canonical(steps[0], shape) == canonical(steps[1], shape)


def _gain(now: _Trial, trial: _Trial, count: int) -> float:
    return float(trial.first_hits(count).mean() - now.hits[:count].mean())


def _is_confirmed(now: _Trial, trial: _Trial, chance: float) -> bool:
    """Whether the test examples, which did not select the repair, confirm it."""
    tested = slice(_screens(len(now.truth))[-1], None)
    try:
        return is_better(now.hits[tested], trial.hits[tested], chance)
    except InputError:
        return False


def _classes(now: _Trial, names: tuple[str, ...], chance: float) -> tuple[Repair, _Trial] | None:
    """Another class order, estimated on the first half of the examples and confirmed on the second."""
    logits, predicted = now.logits, now.logits.argmax(axis=1)
    size = logits.shape[1]
    if size < 2 or int(now.truth.max()) >= size:
        return None
    start = len(now.truth) // 2
    from_half = _permutation(predicted[:start], now.truth[:start], size)
    repaired = from_half[predicted[start:]] == now.truth[start:]
    if not is_better(now.hits[start:], repaired, chance):
        return None
    permutation = _permutation(predicted, now.truth, size)
    changes = _renamed(now.teacher, permutation, names) if size <= min(LISTED_CLASSES, len(now.truth) // 5) else {}
    trial = now.repaired(changes) if changes else _reordered(now, permutation)
    return Repair("another class order", changes), trial


def _permutation(predicted: np.ndarray, truth: np.ndarray, size: int) -> np.ndarray:
    """The class that each output most likely stands for [K], by the best matching of outputs and classes.

    References:
      Kuhn 1955, The Hungarian method for the assignment problem.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((size, size))
    np.add.at(counts, (predicted, truth), 1)
    counts += 0.5 * np.eye(size)  # without evidence an output keeps its class
    return np.asarray(linear_sum_assignment(counts, maximize=True)[1])


def _renamed(teacher: Teacher, permutation: np.ndarray, names: tuple[str, ...]) -> Changes:
    """New names of the model's outputs, such that output j counts as class permutation[j]."""
    own = teacher.output_names or names
    if len(names) != len(permutation) or not set(names) <= set(own):
        return {}
    new_names = {name: names[permutation[j]] for j, name in enumerate(names)}
    return {"classes": tuple(new_names.get(name, name) for name in own)}


def _reordered(now: _Trial, permutation: np.ndarray) -> _Trial:
    """A trial of the teacher with its columns in another order."""
    outputs, inverse = now.teacher.outputs, np.argsort(permutation)
    teacher = dataclasses.replace(
        now.teacher, outputs=lambda inputs: {"logits": outputs(inputs)["logits"][:, inverse]}, with_preprocessing=None
    )
    return _Trial(teacher, now.examples, now.truth)


def _interval(successes: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a probability (Clopper and Pearson 1934)."""
    low = clopper_pearson_lower(successes, n, confidence=0.975)
    return low, 1 - clopper_pearson_lower(n - successes, n, confidence=0.975)


def _without_labels(teacher: Teacher, examples: np.ndarray, class_names: Sequence[str]) -> Diagnosis:
    """The diagnosis on examples without labels: what the outputs look like, and which classes they name."""
    logits = _Trial(teacher, examples, np.full(len(examples), -1)).logits
    counts = np.bincount(logits.argmax(axis=1), minlength=logits.shape[1])
    known = bool(class_names or teacher.class_names or teacher.classifier or _states(teacher))
    nan = float("nan")
    return Diagnosis(
        teacher.source,
        *(nan, 0.0, 1.0, nan, 0),
        meaning=meaning_of(logits),
        stated=_states(teacher),
        predictions=Predictions(logits.shape[1], int(counts.argmax()), int(counts.max()), len(examples)),
        why_not_logits="" if known else why_not_logits(logits),
        notes=teacher.notes,
    )


def _same_frequencies(predicted: np.ndarray, truth: np.ndarray) -> bool:
    """Whether predictions have the class frequencies of the labels, up to chance and 5 % of the examples."""
    size = int(max(predicted.max(), truth.max())) + 1
    counts = [np.bincount(each, minlength=size) / len(truth) for each in (predicted, truth)]
    by_chance = np.sqrt(counts[1] * (1 - counts[1]) / len(truth)).sum()  # about the mean of the distance of two samples
    return bool(np.abs(counts[0] - counts[1]).sum() / 2 <= 0.05 + by_chance)


def _states(teacher: Teacher) -> bool:
    """Whether the user states the meaning of the outputs."""
    own = teacher.preprocessing is not None and bool(teacher.preprocessing.outputs)
    return own or any(map(_states, teacher.members))
