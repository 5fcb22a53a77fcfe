"""The ingredients of an EV3 run: a student, its arms, the objectives that score it, and the hyperparameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ev3_distill.config import EV3
from ev3_distill.core.explore import on_one_device
from ev3_distill.types import (
    Apply,
    Arm,
    Batch,
    Distribute,
    Evidence,
    Goal,
    GoalEvidence,
    GoalScores,
    Objective,
    Promise,
    Sample,
)


class Objectives(NamedTuple):
    """The scores by which students are selected and promoted."""

    select: Objective  # smooth: detects the small steps of one trajectory on assess
    promise: Promise  # compares arms on assess, and decide proves promotions by it
    goals: tuple[Goal, ...] = ()  # requirements; the one at the greatest risk takes precedence, see core/prioritise.py

    def evidence(self, outputs: Any, split: Batch) -> Evidence:
        """The scores of one student with these outputs, leaves [N]; those for goals [G, N]."""
        return Evidence(
            self.select(outputs, split), self.promise.score(outputs, split), self._goal_evidence(outputs, split)
        )

    def _goal_evidence(self, outputs: Any, split: Batch) -> GoalEvidence | tuple[()]:
        if not self.goals:
            return ()
        return GoalEvidence(
            smooth=jnp.stack([goal.smooth(outputs, split) for goal in self.goals]),
            score=jnp.stack([goal.score(outputs, split) for goal in self.goals]),
            focus=jnp.stack([goal.focus(outputs, split) for goal in self.goals]),
        )

    def goal_scores(self, outputs: Any, split: Batch, evidence: Evidence) -> GoalScores | tuple[()]:
        """The goals' scores on decide of a student, compared at the focus that `evidence` on assess has."""
        if not isinstance(evidence.goals, GoalEvidence):
            return ()
        focus = evidence.goals.focus
        return GoalScores(
            comparison=jnp.stack([goal.comparison(outputs, split, focus[g]) for g, goal in enumerate(self.goals)]),
            metric=jnp.stack([goal.score(outputs, split).mean() for goal in self.goals]),
        )

    @property
    def thresholds(self) -> jax.Array:
        """Thresholds of the goals, [G]."""
        return jnp.array([goal.threshold for goal in self.goals], jnp.float32)


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
    """

    apply: Apply
    arms: Sequence[Arm]
    sample: Sample
    objectives: Objectives
    config: EV3
    stop_level: float | None = None
    distribute: Distribute = on_one_device

    @property
    def racers(self) -> tuple[bool, ...]:
        """Which arms take part in the race: all if none would, [A]."""
        races = tuple(arm.races for arm in self.arms)
        return races if any(races) else (True,) * len(races)
