"""Evaluates students: scores on a split, ranks on decide, and the student to deliver."""

import jax
import numpy as np

from ev3_distill.core import Objectives, prioritise
from ev3_distill.core.assess import outputs_of, score
from ev3_distill.core.paired_tests import paired
from ev3_distill.training.devices import Devices
from ev3_distill.types import Batch, BeforeFinal, Evidence, Network, Pools, State, Variables

CLEARLY = 2.0  # standard errors on decide by which another student must be better than the current one to be delivered


def final_steps(state: State) -> int:
    """Training steps of the final phase so far, 0 if it has not begun."""
    if not isinstance(state.before, BeforeFinal) or not bool(state.final):
        return 0
    return int(state.clock.cost) - int(state.before.cost)


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
        """Selects the student to deliver: 'champion', 'current', 'safest' or 'final', and its variables.

        The champion is proven. The current student has usually improved since, by gains too small to prove on decide.
        Policy `best` takes the current student if decide ranks it strictly higher. Policy `champion` always takes the champion.
        A run that ended because decide proved all goals delivers the student that it proved.

        In a run with goals, policy `best` takes the current student unless decide shows the champion, or the student that was
        safest on assess, to be clearly better by the goal at the greatest risk, CLEARLY standard errors paired by example. The
        worst class has few examples on decide, so that students are often level by it, or one example apart: an early champion
        would be as good as the last student.

        A run with a final phase delivers the student at its end, 'final', which has learned from assess and decide, too. If it
        scores lower on these rows than the student before the phase, or is not finite, the phase went wrong: that student
        is delivered.
        """
        name, variables = self.select_before_final(pools, state, policy)
        if final_steps(state) and self._gains(pools, state.current.variables, variables):
            name, variables = "final", self._devices.gather(state.current.variables)
        return name, variables

    def select_before_final(self, pools: Pools, state: State, policy: str = "best") -> tuple[str, Variables]:
        """What `select` would have returned before the final phase; only this student's scores on decide are held out."""
        if isinstance(state.before, BeforeFinal) and final_steps(state):
            state = state._replace(current=state.current._replace(variables=state.before.variables))
        name, variables = self._select(pools, state, policy)
        return name, self._devices.gather(variables)

    def _gains(self, pools: Pools, after: Variables, before: Variables) -> bool:
        """Whether a student that has learned from assess and decide is finite, and not worse there than the one before."""
        ours, theirs = (
            np.concatenate([self.evaluate(student, split).promise for split in (pools.assess, pools.decide)]).mean()
            for student in (after, before)
        )
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self._devices.gather(after)))
        return bool(finite and ours >= theirs)

    def _select(self, pools: Pools, state: State, policy: str) -> tuple[str, Variables]:
        champion, current = state.champion.variables, state.current.variables
        if policy != "best":
            return "champion", champion
        if bool(state.met):
            return "current", current
        if self.objectives.goals:
            return self._select_by_goals(pools, state)
        higher = float(self.evaluate(current, pools.decide).promise.mean()) > float(state.champion.decide.mean())
        return ("current", current) if higher else ("champion", champion)

    def _select_by_goals(self, pools: Pools, state: State) -> tuple[str, Variables]:
        """The current student, unless decide shows another one to be clearly better, or level with it in every example."""
        best, variables = "current", state.current.variables
        ours = self.evaluate(variables, pools.decide)
        for name, student in (("champion", state.champion.variables), ("safest", state.safest.variables)):
            if isinstance(student, Variables):
                theirs = self.evaluate(student, pools.decide)
                equal = name == "champion" and jax.tree.all(jax.tree.map(np.array_equal, theirs, ours))
                if equal or self._clearly_better(theirs, ours):
                    best, variables, ours = name, student, theirs
        return best, variables

    def _clearly_better(self, theirs: Evidence, ours: Evidence) -> bool:
        """Whether one student is clearly better by the objective that rules for the other, and breaks no goal of it."""
        thresholds = self.objectives.thresholds
        ruling = prioritise.ruling_of(prioritise.risks_of(ours, thresholds))
        gain, se = paired(*(prioritise.ruled(x, ruling).promise for x in (theirs, ours)))
        breaks = prioritise.breaks(jax.tree.map(lambda leaf: leaf[None], theirs), ours, thresholds)
        least = 1 / ours.promise.shape[0]  # of the error: scores that differ by rounding alone are level
        return bool(gain > CLEARLY * np.maximum(se, least)) and not bool(breaks[0])

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
