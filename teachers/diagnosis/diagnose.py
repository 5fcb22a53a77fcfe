"""Is a teacher any good on the user's data, and if not, would another preprocessing make it so? Asked before training.

The commonest mistakes are silent: classes in another order, RGB for BGR, pixels of another range, another layout. Each is
tried on few labelled examples, what looks better on some more, and what still does is put to a paired test on examples that
it was not chosen by (a class order that passed is then estimated anew on all). A remedy counts only if, on those, it is
right `LEAST_GAIN` more often, the exact one-sided McNemar test has p <= `LEVEL`, and the teacher is then better than chance.
So a fine teacher, and one that is just weak, are given a remedy with a probability of a few times `LEVEL`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy import special

from ev3_distill.errors import InputError
from ev3_distill.teachers.diagnosis.repairs import Changes, Repair, pairs, repairs
from ev3_distill.teachers.preprocessing import OPTION, normal, option_text
from ev3_distill.teachers.teacher import Teacher

LEVEL = 0.001  # of the test that confirms one remedy
LEAST_GAIN = 0.03  # share of examples that a remedy must add to those that are right
LEAST_SKILL = 0.1  # (accuracy - chance) / (1 - chance) below which a teacher is near chance
BLINK, GLANCE, LOOK = 16, 64, 256  # examples on which a repair must not look hopeless, must look better, and then good
HOPELESS = -0.3  # gain at the first
CONFIRMED = 3  # repairs put to the test in one round
ROUNDS = 3  # mistakes found one after the other
BATCH = 128
LISTED = 100  # the most classes whose order is spelt out


class Examples(Protocol):
    """Inputs in memory, or read lazily."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, ...]."""

    @property
    def dtype(self) -> np.dtype:
        """Of the inputs."""

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Examples [n, ...] of rows [n]."""


@dataclasses.dataclass(frozen=True)
class Remedy:
    """What would mend a teacher, proven on the user's examples."""

    name: str  # what the teacher would then get
    changes: Mapping[str, Any]  # fields of its Preprocessing
    before: float  # accuracy as it is ...
    after: float  # ... and with the changes, on the same examples
    n: int  # of them, those that test
    p_value: float

    @property
    def option(self) -> str:
        """The exact options to give."""
        return option_text(self.changes) or f"the names of its outputs, in their order, by {OPTION}.classes"

    @property
    def toml(self) -> str:
        """The same for the file beside the teacher."""
        return "; ".join(f"{name} = {json.dumps(value)}" for name, value in self.changes.items())


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A teacher's own accuracy on the user's data, and what would mend it."""

    source: str
    accuracy: float  # nan where no example is labelled
    low: float  # exact interval of 95 % (Clopper and Pearson) ...
    high: float  # ... for examples drawn like these
    chance: float  # the share of the largest class
    n: int  # labelled examples it was measured on
    remedy: Remedy | None = None
    probabilities: bool = False  # whether its outputs are probabilities rather than logits
    members: tuple["Diagnosis", ...] = ()  # of an ensemble

    @property
    def near_chance(self) -> bool:
        """Whether the teacher knows next to nothing of these data."""
        return self.n > 0 and (_skill(self.accuracy, self.chance) < LEAST_SKILL or self.low <= self.chance)

    def lines(self) -> list[str]:
        """For the user: the accuracy, then each warning on a line that begins with `warning:`."""
        if not self.n:
            return [f"teacher {self.source}: no labelled examples, so its own accuracy is not known"]
        told = [
            f"teacher {self.source}: {self.accuracy:.1%} right on {self.n:,} labelled examples (95 % interval {self.low:.1%} "
            f"to {self.high:.1%}; the largest class alone gives {self.chance:.1%})"
        ]
        if self.near_chance:
            told.append(
                f"warning: the teacher is NEAR CHANCE on these data, {self.accuracy:.1%} against {self.chance:.1%}"
            )
        if self.remedy is not None:
            told.append(f"warning: {_told(self.remedy)}: give {self.remedy.option}")
        elif self.near_chance and not self.members:
            told.append(
                "warning: no other class order, channel order, pixel range, mean and std or layout that was tried mends it: "
                "check that it was trained for these classes and this kind of input"
            )
        if self.probabilities:
            told.append(
                "warning: its outputs are probabilities (each row sums to 1), and distillation needs logits: leave out the "
                "softmax, or take the logarithm"
            )
        for member in self.members:
            if member.remedy is not None:
                told.append(
                    f"warning: {member.source}: {_told(member.remedy)}: in a TOML file beside it, {member.remedy.toml}"
                )
        return told


def _told(remedy: Remedy) -> str:
    return f"with {remedy.name} it would be {remedy.after:.1%} right in place of {remedy.before:.1%} ({remedy.n:,} examples)"


def diagnose(
    teacher: Teacher,
    inputs: Examples,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    *,
    limit: int = 2000,
    seed: int = 0,
) -> Diagnosis:
    """Measures a teacher on labelled examples and looks for what would mend it.

    Args:
      teacher: with `again`, so that it can be tried behind other preprocessing; without, it is only measured.
      inputs: [N, ...], in memory or read lazily.
      labels: [N], -1 where there is none.
      class_names: of the data.
      limit: examples to use at most; a fine teacher runs on about twice as many in all.
      seed: of which.

    Raises:
      InputError: the teacher fails on the data.
    """
    known = np.flatnonzero(np.asarray(labels) >= 0)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(known)[:limit])
    if not len(rows):
        return Diagnosis(teacher.source, float("nan"), 0.0, 1.0, float("nan"), 0)
    order = rng.permutation(len(rows))  # glance, look and test are random parts
    examples, truth = inputs[rows][order], np.asarray(labels)[rows][order]
    base = _Trial(teacher, examples, truth)
    chance = float(np.bincount(truth).max() / len(truth))
    low, high = _interval(int(base.right.sum()), len(truth))
    names = tuple(class_names) or teacher.class_names or ()
    remedy = None if teacher.again is None else _search(base, names, chance)
    members = tuple(diagnose(m, inputs, labels, class_names, limit=limit, seed=seed) for m in teacher.members)
    accuracy = float(base.right.mean())
    return Diagnosis(
        teacher.source, accuracy, low, high, chance, len(rows), remedy, _are_probabilities(base.logits), members
    )


class _Trial:
    """A teacher on the examples, run only as far as was asked."""

    def __init__(self, teacher: Teacher, examples: np.ndarray, truth: np.ndarray) -> None:
        self.teacher, self.examples, self.truth = teacher, examples, truth
        self._parts: list[np.ndarray] = []
        self._done = 0

    def first(self, count: int) -> np.ndarray:
        """Logits [n, K] of at least the first `count` examples."""
        while self._done < min(count, len(self.examples)):
            end = min(count, len(self.examples), self._done + BATCH)
            self._parts.append(self.teacher.outputs(self.examples[self._done : end])["logits"])
            self._done = end
        return np.concatenate(self._parts)

    @property
    def logits(self) -> np.ndarray:
        """Of all examples."""
        return self.first(len(self.examples))

    @functools.cached_property
    def right(self) -> np.ndarray:
        """Which of all examples are right [n]."""
        return self.right_of(len(self.examples))

    def right_of(self, count: int) -> np.ndarray:
        """Which of the first examples are right [count]."""
        return np.asarray(self.first(count)[:count].argmax(axis=1) == self.truth[:count])

    def repaired(self, changes: Changes) -> "_Trial":
        """The same with changes to the preprocessing in force."""
        assert self.teacher.again is not None and self.teacher.preprocessing is not None
        steps = dataclasses.replace(self.teacher.preprocessing, **changes)
        return _Trial(self.teacher.again(steps), self.examples, self.truth)


def _search(base: _Trial, names: tuple[str, ...], chance: float) -> Remedy | None:
    """Repairs found one after the other, as one remedy."""
    found: list[tuple[Repair, _Trial]] = []
    now = base
    for _ in range(ROUNDS):
        best = _round(now, names, chance, alone=not found)
        if best is None:
            break
        found.append(best)
        now = best[1]
        if now.teacher.again is None:
            break
    if not found:
        return None
    tested = slice(_parts_of(len(base.truth))[1], None)
    before, after = base.right[tested], now.right[tested]
    changes: Changes = {}
    for repair, _ in found:
        changes |= repair.changes
    return Remedy(
        " and ".join(repair.name for repair, _ in found),
        changes,
        float(before.mean()),
        float(after.mean()),
        len(before),
        _p_value(before, after),
    )


def _round(now: _Trial, names: tuple[str, ...], chance: float, *, alone: bool) -> tuple[Repair, _Trial] | None:
    """The best single repair that is confirmed; of two at once where nothing else helps a teacher that knows nothing."""
    steps, shape = now.teacher.preprocessing, now.examples.shape[1:]
    assert steps is not None
    if 1 - now.right.mean() < LEAST_GAIN:
        return None  # nothing can add as much
    pixels = now.examples.dtype == np.uint8 or len(shape) == 3
    groups = repairs(steps, shape, pixels=pixels)
    confirmed = _confirmed(now, [repair for group in groups for repair in group], chance)
    if (classes := _classes(now, names, chance)) is not None:
        confirmed.append(classes)
    if not confirmed and alone and _skill(float(now.right.mean()), chance) < LEAST_SKILL:
        confirmed = _confirmed(now, pairs(groups), chance)
    if not confirmed:
        return None
    tested = slice(_parts_of(len(now.truth))[1], None)
    best = max(confirmed, key=lambda each: each[1].right[tested].mean())[1].right[tested]
    # the more usual repair, where the best is not clearly better than it
    return next(each for each in confirmed if _p_value(each[1].right[tested], best) > 0.05)


def _parts_of(n: int) -> tuple[int, int]:
    """Where the glance and the look end among n examples; the test has the rest, half at least."""
    return min(GLANCE, n // 4), min(LOOK, n // 2)


def _confirmed(now: _Trial, candidates: Sequence[Repair], chance: float) -> list[tuple[Repair, _Trial]]:
    """The repairs that hold, in the order given."""
    glance, look = _parts_of(len(now.truth))
    trials: list[tuple[int, int, Repair, _Trial]] = []
    for rank, repair in enumerate(candidates):
        try:
            trial = now.repaired(repair.changes)
            if (
                _alike(trial, now)
                or _gain(now, trial, min(BLINK, glance)) <= HOPELESS
                or _gain(now, trial, glance) <= 0
            ):
                continue
            gain = _gain(now, trial, look)
        except InputError:  # it cannot be made, or cannot run, that way
            continue
        if gain >= LEAST_GAIN / 2:
            trials.append((-round(gain * look), rank, repair, trial))
    chosen = sorted(trials, key=lambda each: each[:2])[:CONFIRMED]
    return [
        (repair, trial) for *_, repair, trial in sorted(chosen, key=lambda each: each[1]) if _holds(now, trial, chance)
    ]


def _alike(one: _Trial, other: _Trial) -> bool:
    shape = one.examples.shape[1:]
    steps = [trial.teacher.preprocessing for trial in (one, other)]
    return steps[0] is not None and steps[1] is not None and normal(steps[0], shape) == normal(steps[1], shape)


def _gain(now: _Trial, trial: _Trial, count: int) -> float:
    return float(trial.right_of(count).mean() - now.right[:count].mean())


def _holds(now: _Trial, trial: _Trial, chance: float) -> bool:
    """Whether the examples that did not choose a repair confirm it."""
    tested = slice(_parts_of(len(now.truth))[1], None)
    try:
        return _is_better(now.right[tested], trial.right[tested], chance)
    except InputError:
        return False


def _is_better(before: np.ndarray, after: np.ndarray, chance: float) -> bool:
    better = after.mean() - before.mean() >= LEAST_GAIN and _p_value(before, after) <= LEVEL
    return bool(better and _skill(float(after.mean()), chance) >= LEAST_SKILL)


def _p_value(before: np.ndarray, after: np.ndarray) -> float:
    """Of the exact one-sided McNemar test that `after` is right no more often than `before`, both [n] of the same examples."""
    wins, losses = int((after & ~before).sum()), int((before & ~after).sum())
    return float(special.betainc(wins, losses + 1, 0.5)) if wins else 1.0


def _classes(now: _Trial, names: tuple[str, ...], chance: float) -> tuple[Repair, _Trial] | None:
    """Another order of the classes, estimated on the examples that choose and confirmed on those that test."""
    logits, predicted = now.logits, now.logits.argmax(axis=1)
    size = logits.shape[1]
    if size < 2 or int(now.truth.max()) >= size:
        return None
    start = len(now.truth) // 2
    half = _permutation(predicted[:start], now.truth[:start], size)
    mended = half[predicted[start:]] == now.truth[start:]
    if not _is_better(now.right[start:], mended, chance):
        return None
    whole = _permutation(predicted, now.truth, size)
    changes = _renamed(now.teacher, whole, names) if size <= min(LISTED, len(now.truth) // 5) else {}
    trial = now.repaired(changes) if changes else _reordered(now, whole)
    return Repair("another class order", changes), trial


def _permutation(predicted: np.ndarray, truth: np.ndarray, size: int) -> np.ndarray:
    """The class that each output most probably stands for [K], by the best matching of outputs and classes.

    References:
      Kuhn 1955, The Hungarian method for the assignment problem.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((size, size))
    np.add.at(counts, (predicted, truth), 1)
    counts += 0.5 * np.eye(size)  # what nothing speaks against stays
    return np.asarray(linear_sum_assignment(counts, maximize=True)[1])


def _renamed(teacher: Teacher, permutation: np.ndarray, names: tuple[str, ...]) -> Changes:
    """The names of the program's own outputs such that output j counts as class permutation[j]."""
    own = teacher.outputs_named or names
    if len(names) != len(permutation) or not set(names) <= set(own):
        return {}
    now_called = {name: names[permutation[j]] for j, name in enumerate(names)}
    return {"classes": tuple(now_called.get(name, name) for name in own)}


def _reordered(now: _Trial, permutation: np.ndarray) -> _Trial:
    """A teacher whose columns are put in another order."""
    outputs, inverse = now.teacher.outputs, np.argsort(permutation)
    teacher = dataclasses.replace(
        now.teacher, outputs=lambda inputs: {"logits": outputs(inputs)["logits"][:, inverse]}, again=None
    )
    return _Trial(teacher, now.examples, now.truth)


def _skill(accuracy: float, chance: float) -> float:
    """How much of what chance leaves over a teacher gets right."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else accuracy


def _interval(successes: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a probability (Clopper and Pearson 1934)."""
    low = special.betaincinv(successes, n - successes + 1, 0.025) if successes else 0.0
    high = special.betaincinv(successes + 1, n - successes, 0.975) if successes < n else 1.0
    return float(low), float(high)


def _are_probabilities(logits: np.ndarray) -> bool:
    return bool(logits.shape[1] > 1 and logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3))
