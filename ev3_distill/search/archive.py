"""The archive of a search: the students it made, each with the evidence under which it entered, and what they are good for.

A student enters by `Archive.enter` alone, which measures it then and there and names it by a digest of its parameters: no entry
holds a score that another student earned.
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
RIGHT = 0.5  # a score above this
PICKED_BY = ("params", "accuracy", "bound")  # what a pick may ask of an entry


class Measured(NamedTuple):
    """What decide says of one student."""

    right: np.ndarray  # [N] promise scores, 0 or 1
    goals_met: int
    least_risk: float  # see `Distillation.rank`
    p_value: float  # see `Distillation.p_value`

    @property
    def rank(self) -> tuple[int, float, float]:
        """Which of two is better, whatever their sizes."""
        return self.goals_met, self.least_risk, float((self.right > RIGHT).mean())


@dataclasses.dataclass(frozen=True)
class Entry:
    """One student."""

    number: int  # of its rung: the folder sizes/NN
    network: str  # as --student names it
    spec: dict[str, Any]
    params: int
    digest: str  # of its parameters and statistics
    how: str  # it came about
    cost: int  # steps of the whole run when it entered
    examples: int  # of decide
    accuracy: float  # on decide
    bound: float  # on that, from below, one-sided and for this entry alone: it chooses, the certificate promises
    goals_met: int
    least_risk: float
    met: bool  # whether decide proved all goals of it
    p_value: float = 1.0  # of these, the greatest; archives of older versions do not tell

    @property
    def rank(self) -> tuple[int, float, float]:
        """Which of two is better, whatever their sizes."""
        return self.goals_met, self.least_risk, self.accuracy


class Archive:
    """The entries of a run, kept in its folder."""

    def __init__(self, directory: Path, *, confidence: float):
        """Reads what is there.

        Args:
          directory: of the run.
          confidence: of bounds.
        """
        self._path, self._confidence = directory / FILE, confidence
        found = read_json(self._path)["entries"] if self._path.exists() else []
        self.entries: list[Entry] = [Entry(**entry) for entry in found]

    def enter(
        self,
        variables: Variables,
        measure: Callable[[Variables], Measured],
        *,
        number: int,
        network: str,
        spec: dict[str, Any],
        how: str,
        cost: int,
        meets: Callable[[Measured], bool],
    ) -> Entry:
        """Measures a student and keeps what that gave, and whether it met all goals; a rung that has an entry keeps it."""
        if kept := [entry for entry in self.entries if entry.number == number]:
            return kept[0]
        measured = measure(variables)
        n, right = len(measured.right), int((measured.right > RIGHT).sum())
        entry = Entry(
            number=number,
            network=network,
            spec=spec,
            params=count_params(variables),
            digest=tree_digest(variables),
            how=how,
            cost=cost,
            examples=n,
            accuracy=right / n,
            bound=clopper_pearson_lower(right, n, confidence=self._confidence),
            goals_met=measured.goals_met,
            least_risk=measured.least_risk,
            p_value=measured.p_value,
            met=meets(measured),
        )
        self.entries.append(entry)
        write_json(self._path, {"entries": [dataclasses.asdict(entry) for entry in self.entries]})
        return entry


def chosen(entries: Sequence[Entry]) -> Entry:
    """The smallest that met all goals; where none did, the best."""
    met = [entry for entry in entries if entry.met]
    return min(met, key=lambda entry: (entry.params, -entry.bound)) if met else best(entries)


def best(entries: Iterable[Entry]) -> Entry:
    """The best of some; of equal ones the smallest."""
    return max(entries, key=lambda entry: (entry.rank, -entry.params))


def front(entries: Sequence[Entry]) -> list[Entry]:
    """The Pareto front, smallest first: entries than which no smaller or equal one has as high a bound."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.params, -entry.bound)):
        if not kept or entry.bound > kept[-1].bound:
            kept.append(entry)
    return kept


def pick(entries: Sequence[Entry], conditions: str) -> Entry:
    """The entry with the highest bound among those that meet conditions such as `params<=20000` or `accuracy>=0.9,params<=500`.

    Raises:
      InputError: no such condition, or no entry meets them all.
    """
    left = list(entries)
    for condition in conditions.split(","):
        found = re.fullmatch(rf"\s*({'|'.join(PICKED_BY)})\s*(<=|>=)\s*([\d.eE+]+)\s*", condition)
        if found is None:
            raise InputError(
                f"a pick is conditions on {', '.join(PICKED_BY)}, joined by commas; got '{condition}': try 'params<=20000'"
            )
        name, side, number = found[1], found[2], float(found[3])
        left = [e for e in left if (getattr(e, name) <= number if side == "<=" else getattr(e, name) >= number)]
    if not left:
        raise InputError(
            f"a pick needs a student that meets it; got '{conditions}', and students of "
            f"{', '.join(f'{e.params:,} parameters with {e.accuracy:.1%}' for e in front(entries))}: ask for less"
        )
    return max(left, key=lambda entry: (entry.bound, -entry.params))
