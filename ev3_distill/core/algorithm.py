"""The ingredients of an EV3 run: the student, its arms, the objectives that score it, and the hyperparameters."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ev3_distill.config import EV3
from ev3_distill.core.explore import on_one_device
from ev3_distill.types import Apply, Arm, Distribute, Objectives, Sample


class Ending(NamedTuple):
    """How a run ends; see `Algorithm`."""

    stop_level: float | None = None
    continues: bool = False
    has_final: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Algorithm:
    """One EV3 algorithm.

    Attributes:
      apply: the student's forward pass.
      arms: A of them.
      sample: (pool, global step) -> the batch of that step of the explore split.
      objectives: that score students.
      config: hyperparameters of the core.
      stop_level: if given, the run ends once decide proves every goal, each at this level.
      distribute: assigns proposals to devices.
      continues: whether further runs use what this one leaves of its error budget, as the stages of a search do; then no
        test is the last one.
      has_final: whether the run ends with a phase that trains on all three splits, for the fraction `config.final` of its
        budget.
    """

    apply: Apply
    arms: Sequence[Arm]
    sample: Sample
    objectives: Objectives
    config: EV3
    stop_level: float | None = None
    distribute: Distribute = on_one_device
    continues: bool = False
    has_final: bool = False

    @property
    def racers(self) -> tuple[bool, ...]:
        """Which arms take part in the race: all if none would, [A]."""
        races = tuple(arm.races for arm in self.arms)
        return races if any(races) else (True,) * len(races)

    @property
    def fast_racers(self) -> tuple[bool, ...]:
        """Which arms take part in a race that is short: those that start fast, or all if fewer than two do, [A]."""
        fast = tuple(races and arm.starts_fast for races, arm in zip(self.racers, self.arms, strict=True))
        return fast if sum(fast) > 1 else self.racers
