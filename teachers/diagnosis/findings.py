"""Findings of the diagnosis of a teacher, their tests, and their sentences for the user."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify.bounds import mcnemar_p_value
from ev3_distill.teachers.output_meaning import LOGITS, PROBABILITIES, advice_on
from ev3_distill.teachers.preprocessing import OPTION, command_line_options

LEVEL = 0.001  # level of the test that confirms one repair
LEAST_GAIN = 0.03  # least gain in accuracy of a confirmed repair
LEAST_SKILL = 0.1  # (accuracy - chance) / (1 - chance); a teacher below it is near chance
NEARLY_ALL = 0.99  # share of one class among predictions at which agreement promises nothing
ENOUGH = 50  # least number of examples to tell that from


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes that repair a teacher, confirmed on the user's examples.

    Attributes:
      name: describes the input after the changes.
      changes: fields of its `Preprocessing`.
      before: accuracy without the changes, on the test examples.
      after: accuracy with them, on the same examples.
      n: number of test examples.
      p_value: of the exact one-sided McNemar test.
    """

    name: str
    changes: Mapping[str, Any]
    before: float
    after: float
    n: int
    p_value: float

    @property
    def option(self) -> str:
        """The exact options to give."""
        return command_line_options(self.changes) or f"the names of its outputs, in their order, with {OPTION}.classes"

    @property
    def toml(self) -> str:
        """The lines for the TOML file beside the teacher."""
        return "; ".join(f"{name} = {json.dumps(value)}" for name, value in self.changes.items())


@dataclasses.dataclass(frozen=True)
class RowShift:
    """A confirmed shift of recorded rows against the examples.

    Attributes:
      shift: example i has row (i + shift) modulo N, of the reversed rows if `reversed`.
      reversed: whether the rows are in reverse order.
      before: accuracy of the rows as they are, on the labeled examples compared.
      after: accuracy once they are shifted.
      n: number of these examples.
    """

    shift: int
    reversed: bool
    before: float
    after: float
    n: int

    @property
    def advice(self) -> str:
        """What is wrong, and how to save the rows."""
        if self.reversed:
            rows = "logits[::-1]"
            return f"in reverse order: save {rows if not self.shift else f'numpy.roll({rows}, {-self.shift}, axis=0)'}"
        count = "1 row" if abs(self.shift) == 1 else f"{abs(self.shift)} rows"
        return (
            f"shifted (the logits of an example are {count} too {'late' if self.shift > 0 else 'early'}): save "
            f"numpy.roll(logits, {-self.shift}, axis=0), or record them again in the order of the data set"
        )


class Predictions(NamedTuple):
    """Predictions of a teacher on examples without labels.

    Attributes:
      columns: number of outputs, taken as logits.
      largest: the class predicted most often.
      times: examples for which it is predicted.
      n: examples.
    """

    columns: int
    largest: int
    times: int
    n: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Accuracy of a teacher on the user's data, and what would repair it.

    Attributes:
      source: the teacher.
      accuracy: on the labeled examples; nan if there are none.
      low: lower end of the exact 95 % interval (Clopper and Pearson) of the accuracy.
      high: upper end.
      chance: frequency of the largest class.
      n: number of labeled examples.
      remedy: confirmed changes, if there are any.
      members: diagnoses of the members of an ensemble.
      meaning: what the outputs look like, one of `output_meaning.MEANINGS`.
      stated: whether the user states what they are.
      recorded: whether the outputs are recorded, so that their rows may be in another order than the examples.
      same_frequencies: whether each class is predicted about as often as it occurs.
      predictions: on examples without labels.
      why_not_logits: of a teacher without labels and names: why its outputs look like something else; empty if they do not.
      row_shift: of recorded outputs, if their rows clearly fit other examples; it then is the remedy.
      notes: see `Teacher`.
    """

    source: str
    accuracy: float
    low: float
    high: float
    chance: float
    n: int
    remedy: Remedy | None = None
    members: tuple["Diagnosis", ...] = ()
    meaning: str = LOGITS
    stated: bool = False
    recorded: bool = False
    same_frequencies: bool = False
    predictions: Predictions | None = None
    why_not_logits: str = ""
    row_shift: RowShift | None = None
    notes: tuple[str, ...] = ()

    @property
    def near_chance(self) -> bool:
        """Whether the teacher is hardly better than the largest class alone, or not at all."""
        return self.n > 0 and (skill(self.accuracy, self.chance) < LEAST_SKILL or self.low <= self.chance)

    @property
    def probabilities(self) -> bool:
        """Whether the outputs are probabilities instead of logits."""
        return self.meaning == PROBABILITIES

    def lines(self) -> list[str]:
        """Messages for the user: the accuracy, then one line for each note and warning; a warning begins with `warning:`."""
        lines = [self._first_line(), *(f"teacher {self.source}: {note}" for note in self.notes)]
        lines += [f"warning: {text}" for text in (*self._of_accuracy(), *self._of_predictions())]
        if not (self.stated or self.why_not_logits) and (advice := advice_on(self.meaning)):
            lines.append(f"warning: {advice}")
        for member in self.members:
            if member.remedy is not None:
                lines.append(
                    f"warning: {member.source}: {_description(member.remedy)}: in a TOML file beside it, {member.remedy.toml}"
                )
            if not member.stated and (advice := advice_on(member.meaning)) and member.meaning != self.meaning:
                lines.append(f"warning: {member.source}: {advice}")
        return lines

    def _first_line(self) -> str:
        if self.n:
            return (
                f"teacher {self.source}: accuracy {self.accuracy:.1%} on {self.n:,} labeled examples (95 % interval "
                f"{self.low:.1%} to {self.high:.1%}; the largest class alone: {self.chance:.1%})"
            )
        line = f"teacher {self.source}: no labeled examples, so its accuracy is unknown"
        if self.predictions is None:
            return line
        columns, largest, times, n = self.predictions
        return (
            f"{line}. Its {columns} outputs are taken as the logits of {columns} classes; it predicts class {largest} most "
            f"often, for {times / n:.1%} of {n:,} examples"
        )

    def _of_accuracy(self) -> list[str]:
        texts: list[str] = []
        if self.row_shift is not None:
            return texts  # the caller refuses them
        if self.near_chance:
            texts.append(f"the teacher is NEAR CHANCE on these data: {self.accuracy:.1%} against {self.chance:.1%}")
        if self.remedy is not None:
            texts.append(f"{_description(self.remedy)}: give {self.remedy.option}")
        elif self.near_chance and self.recorded:
            texts.append(
                "it predicts each class about as often as it occurs, but for other examples, so its rows are probably in "
                "another order: save them in the order of the data set, train before test"
                if self.same_frequencies
                else "no other class order or shift of the rows repairs it: check that its rows are in the order of the data "
                "set, and that it was trained for these classes"
            )
        elif self.near_chance and not self.members:
            texts.append(
                "no other class order, channel order, pixel range, mean and std or layout repairs it: check that it "
                "was trained for these classes and this kind of input"
            )
        return texts

    def _of_predictions(self) -> list[str]:
        if self.predictions is None or self.why_not_logits:
            return []  # the caller refuses them
        _, largest, times, n = self.predictions
        if n >= ENOUGH and times >= NEARLY_ALL * n:
            return [
                f"the teacher predicts class {largest} for {times / n:.1%} of the examples: a student that always predicts it "
                "agrees as often, so that a bound on the agreement promises little"
            ]
        return []


def _description(remedy: Remedy) -> str:
    return (
        f"with {remedy.name} its accuracy is {remedy.after:.1%} instead of {remedy.before:.1%} ({remedy.n:,} examples)"
    )


def is_better(before: np.ndarray, after: np.ndarray, chance: float) -> bool:
    """Whether hits [n] after a repair confirm it, compared with those before."""
    better = after.mean() - before.mean() >= LEAST_GAIN and p_value(before, after) <= LEVEL
    return bool(better and skill(float(after.mean()), chance) >= LEAST_SKILL)


def p_value(before: np.ndarray, after: np.ndarray) -> float:
    """Exact one-sided McNemar test of "`after` has no more hits than `before`", both [n] on the same examples."""
    wins, losses = int((after & ~before).sum()), int((before & ~after).sum())
    return mcnemar_p_value(wins, losses)


def skill(accuracy: float, chance: float) -> float:
    """Accuracy on a scale where chance is 0 and perfection is 1."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else accuracy
