"""Evaluates students: scores on a split, ranks on decide, and the student to deliver."""

import jax
import numpy as np

from ev3_distill.core import Objectives, prioritise
from ev3_distill.core.assess import outputs_of, score
from ev3_distill.training.devices import Devices
from ev3_distill.types import Batch, Evidence, Network, Pools, State, Variables


class StudentEvaluator:
    """Evaluates students of one network by a run's objectives; compiled once for each split.

    Attributes:
      objectives: of the run.
    """

    def __init__(self, student: Network, objectives: Objectives, *, batch_size: int, devices: Devices):
        """Prepares the evaluation.

        Args:
          student: the network.
          objectives: of the run.
          batch_size: examples of one forward pass.
          devices: of the run.
        """
        self.objectives = objectives
        self._devices = devices

        @devices.jit
        def evaluate(variables: Variables, split: Batch) -> Evidence:
            return score(student.apply, variables, split, objectives, batch_size=batch_size)

        @devices.jit
        def p_values(variables: Variables, split: Batch) -> list[jax.Array]:
            outputs = outputs_of(student.apply, variables, split.inputs, batch_size=batch_size)
            return [goal.p_value(*split.one_per_unit(outputs)) for goal in objectives.goals]

        self._evaluate, self._p_values = evaluate, p_values

    def evaluate(self, variables: Variables, split: Batch) -> Evidence:
        """Scores of a student on a split, leaves [N]."""
        scores: Evidence = self._evaluate(self._devices.place(variables), self._devices.place(split))
        return scores

    def select(self, pools: Pools, state: State, policy: str = "best") -> tuple[str, Variables]:
        """Selects the student to deliver: 'champion', 'current' or 'safest', and its variables.

        The champion is proven. The current student has usually improved since, by gains too small to prove on decide.
        Policy `best` takes whichever decide ranks strictly higher, among these two and, in a run with goals, the
        student that was safest on assess. Policy `champion` always takes the champion. A run that ended because decide
        proved all goals delivers the student that it proved.
        """
        name, variables = self._select(pools, state, policy)
        return name, self._devices.gather(variables)

    def _select(self, pools: Pools, state: State, policy: str) -> tuple[str, Variables]:
        champion, current, safest = state.champion.variables, state.current.variables, state.safest.variables
        if policy != "best":
            return "champion", champion
        if bool(state.met):
            return "current", current
        evidence = self.evaluate(champion, pools.decide)._replace(promise=state.champion.decide)
        best, variables, highest = "champion", champion, self.rank(evidence)
        for name, student in (("current", current), ("safest", safest)):
            if isinstance(student, Variables) and (rank := self.rank(self.evaluate(student, pools.decide))) > highest:
                best, variables, highest = name, student, rank
        return best, variables

    def outranks(self, pools: Pools, one: Variables, other: Variables) -> bool:
        """Whether decide ranks one student strictly higher than another."""
        ours, theirs = (self.rank(self.evaluate(student, pools.decide)) for student in (one, other))
        return ours > theirs

    def p_value(self, variables: Variables, split: Batch) -> float:
        """The largest p-value of the goals on a split, 1 without goals; below a level, all goals are proven at that level."""
        return max((float(p) for p in self._p_values(*self._devices.place((variables, split)))), default=1.0)

    def rank(self, evidence: Evidence) -> tuple[int, float, float]:
        """The sort key of a student, from its evidence on decide.

        Returns:
          The number of goals met, the standard errors above the nearest goal (at most AT_RISK), and the mean promise score.
        """
        promise = float(evidence.promise.mean())
        if not self.objectives.goals:
            return 0, 0.0, promise
        risks = np.asarray(prioritise.risks_of(evidence, self.objectives.thresholds))
        return int((risks >= 0).sum()), min(float(risks.min()), prioritise.AT_RISK), promise
