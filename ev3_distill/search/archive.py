"""The archive of a search: all students that it trained, each with the evidence under which it was added.

`Archive.add` alone adds a student. It measures the student at once and stores a digest of its parameters, so no entry can hold
the score of another student.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.errors import InputError
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.students import count_params
from ev3_distill.training.run_dir import read_json, write_json
from ev3_distill.types import Variables

FILE = "archive.json"
CORRECT = 0.5  # scores above this count as correct
PICK_FIELDS = ("params", "accuracy", "bound")  # fields that conditions of --pick may name


class Measurement(NamedTuple):
    """Scores of one student on decide."""

    correct: np.ndarray  # [N] promise scores, 0 or 1
    goals_met: int
    least_risk: float  # standard errors above the nearest goal
    p_value: float  # the greatest of all goals

    @property
    def rank(self) -> tuple[int, float, float]:
        """Sort key: the better of two students, whatever their sizes, has the greater rank."""
        return self.goals_met, self.least_risk, float((self.correct > CORRECT).mean())


@dataclasses.dataclass(frozen=True)
class Entry:
    """One student."""

    number: int  # of its stage: the folder sizes/NN
    network: str  # as --student names it
    spec: dict[str, Any]
    params: int
    digest: str  # of its parameters and statistics
    origin: str  # how this student was created
    cost: int  # steps of the whole search when it was added
    examples: int  # of decide
    accuracy: float  # on decide
    bound: float  # lower bound of the accuracy on decide, for this entry alone: for selection, not a promise
    goals_met: int
    least_risk: float
    met: bool  # whether decide proved all its goals
    p_value: float = 1.0  # the greatest of all goals; missing in archives of older versions

    @property
    def rank(self) -> tuple[int, float, float]:
        """Sort key: the better of two students, whatever their sizes, has the greater rank."""
        return self.goals_met, self.least_risk, self.accuracy

    def as_dict(self) -> dict[str, Any]:
        """The entry as it is stored and reported, where `origin` is called `how`."""
        return {"how" if name == "origin" else name: value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Entry":
        """The inverse of `as_dict`."""
        return cls(**{"origin" if name == "how" else name: value for name, value in content.items()})


class Archive:
    """The entries of a run, stored in its directory."""

    def __init__(self, directory: Path, *, confidence: float):
        """Reads the stored entries.

        Args:
          directory: of the run.
          confidence: of the bounds.
        """
        self._path, self._confidence = directory / FILE, confidence
        content = read_json(self._path)["entries"] if self._path.exists() else []
        self.entries: list[Entry] = [Entry.from_dict(entry) for entry in content]

    def add(
        self,
        variables: Variables,
        measure: Callable[[Variables], Measurement],
        *,
        number: int,
        network: str,
        spec: dict[str, Any],
        origin: str,
        cost: int,
        meets: Callable[[Measurement], bool],
    ) -> Entry:
        """Measures a student and stores the result. If its stage has an entry already, returns that.

        Args:
          variables: of the student.
          measure: scores it on decide.
          number: of its stage.
          network: as --student names it.
          spec: of the network.
          origin: how the student was created.
          cost: steps of the whole search so far.
          meets: whether a measurement proves all goals.
        """
        if stored := [entry for entry in self.entries if entry.number == number]:
            return stored[0]
        measurement = measure(variables)
        n, correct = len(measurement.correct), int((measurement.correct > CORRECT).sum())
        entry = Entry(
            number=number,
            network=network,
            spec=spec,
            params=count_params(variables),
            digest=tree_digest(variables),
            origin=origin,
            cost=cost,
            examples=n,
            accuracy=correct / n,
            bound=clopper_pearson_lower(correct, n, confidence=self._confidence),
            goals_met=measurement.goals_met,
            least_risk=measurement.least_risk,
            p_value=measurement.p_value,
            met=meets(measurement),
        )
        self.entries.append(entry)
        write_json(self._path, {"entries": [entry.as_dict() for entry in self.entries]})
        return entry


def select(entries: Sequence[Entry]) -> Entry:
    """The smallest entry that met all goals, or the best if none did."""
    met = [entry for entry in entries if entry.met]
    return min(met, key=lambda entry: (entry.params, -entry.bound)) if met else best(entries)


def best(entries: Iterable[Entry]) -> Entry:
    """The entry of highest rank; among equals the smallest."""
    return max(entries, key=lambda entry: (entry.rank, -entry.params))


def pareto_front(entries: Sequence[Entry]) -> list[Entry]:
    """Entries for which no other of at most their size has as high a bound, smallest first."""
    front: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.params, -entry.bound)):
        if not front or entry.bound > front[-1].bound:
            front.append(entry)
    return front


def pick(entries: Sequence[Entry], conditions: str) -> Entry:
    """The entry with the highest bound that meets conditions such as `params<=20000` or `accuracy>=0.9,params<=500`.

    Raises:
      InputError: a malformed condition, or no entry meets them all.
    """
    left = list(entries)
    for condition in conditions.split(","):
        match = re.fullmatch(rf"\s*({'|'.join(PICK_FIELDS)})\s*(<=|>=)\s*([\d.eE+]+)\s*", condition)
        if match is None:
            raise InputError(
                f"a pick is conditions on {', '.join(PICK_FIELDS)}, joined by commas; got '{condition}': try 'params<=20000'"
            )
        name, side, number = match[1], match[2], float(match[3])
        left = [e for e in left if (getattr(e, name) <= number if side == "<=" else getattr(e, name) >= number)]
    if not left:
        raise InputError(
            f"a pick needs a student that meets it; got '{conditions}', and students of "
            f"{', '.join(f'{e.params:,} parameters with {e.accuracy:.1%}' for e in pareto_front(entries))}: ask for less"
        )
    return max(left, key=lambda entry: (entry.bound, -entry.params))
