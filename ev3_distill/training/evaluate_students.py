"""What the host asks of students: their scores on a split, their rank on decide, which one to deliver."""

from collections.abc import Sequence

import jax
import numpy as np

from ev3_distill.config import EV3
from ev3_distill.core import prioritise
from ev3_distill.core.assess import Measures, logits_of, score
from ev3_distill.training.devices import Devices
from ev3_distill.types import Batch, Evidence, Goal, Network, Pools, State, Variables


class Judge:
    """Students of one network before a run's objectives, compiled once for each split.

    Attributes:
      goals: what must hold.
    """

    def __init__(self, student: Network, measures: Measures, goals: Sequence[Goal], *, config: EV3, devices: Devices):
        """Takes the network, what is measured of it and what must hold, and the devices that the run is spread over."""
        self.goals = tuple(goals)
        self._devices = devices

        @devices.jit
        def evaluate(variables: Variables, split: Batch) -> Evidence:
            return score(student.apply, variables, split, measures, batch_size=config.eval_batch_size)

        @devices.jit
        def refuted(variables: Variables, split: Batch) -> list[jax.Array]:
            logits = logits_of(student.apply, variables, split.inputs, batch_size=config.eval_batch_size)
            return [goal.refuted(logits, split) for goal in self.goals]

        self._evaluate, self._refuted = evaluate, refuted

    def evaluate(self, variables: Variables, split: Batch) -> Evidence:
        """Scores of a student on a split, leaves [N]."""
        scores: Evidence = self._evaluate(self._devices.place(variables), self._devices.place(split))
        return scores

    def delivered(self, pools: Pools, state: State, policy: str = "best") -> tuple[str, Variables]:
        """The student to deliver: 'champion', 'current' or 'safest', and its variables.

        The champion is proven; the current student has usually gone on since, by gains too small to prove on decide. Policy
        `best` takes the one that decide ranks strictly higher, among these and, where the run has goals, the student that was
        safest on assess; policy `champion` never takes another. A run that decide ended delivers what it proved.
        """
        which, delivered = self._delivered(pools, state, policy)
        return which, self._devices.taken(delivered)

    def _delivered(self, pools: Pools, state: State, policy: str) -> tuple[str, Variables]:
        if policy != "best":
            return "champion", state.champion
        if bool(state.met):
            return "current", state.current
        champion = self.evaluate(state.champion, pools.decide)._replace(promise=state.champion_decide)
        which, delivered, highest = "champion", state.champion, self.rank(champion)
        for name, student in (("current", state.current), ("safest", state.safest)):
            if isinstance(student, Variables) and (rank := self.rank(self.evaluate(student, pools.decide))) > highest:
                which, delivered, highest = name, student, rank
        return which, delivered

    def outranks(self, pools: Pools, one: Variables, other: Variables) -> bool:
        """Whether decide ranks one student strictly higher than another."""
        ours, theirs = (self.rank(self.evaluate(student, pools.decide)) for student in (one, other))
        return ours > theirs

    def p_value(self, variables: Variables, split: Batch) -> float:
        """The greatest level at which the split leaves open whether a student meets all goals, 1 where there is none."""
        return max((float(p) for p in self._refuted(*self._devices.place((variables, split)))), default=1.0)

    def rank(self, evidence: Evidence) -> tuple[int, float, float]:
        """Goals met on decide; how far it lies above the nearest goal, up to where none is at risk; its mean promise score."""
        promise = float(evidence.promise.mean())
        if not self.goals:
            return 0, 0.0, promise
        risks = np.asarray(prioritise.risks_of(evidence, prioritise.least_of(self.goals)))
        return int((risks >= 0).sum()), min(float(risks.min()), prioritise.AT_RISK), promise
