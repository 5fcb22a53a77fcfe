"""A stage: one candidate size of a search, trained as an EV3 run of its own, and the rules for judging it.

All rules are functions of evidence or of ledger rows, so that a search that was killed decides the same when it resumes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ev3_distill.core import plateau, prioritise
from ev3_distill.core.paired_tests import paired
from ev3_distill.training.setup import TrainingRun
from ev3_distill.types import ErrorBudget, Evidence, Network, Plateau, State

TAKEOVER = 1.0  # standard errors on assess by which one student must lead another
BEHIND = 2.0  # standard errors on assess by which a size must be expected to miss its guards to be abandoned
CHECK_AFTER = 10  # initial trajectory lengths after which a size is first checked for being behind
STAGE_SHARE = 10  # while the search grows, a size may use 1 / STAGE_SHARE of the remaining budget
TRIAL_FRACTION = 0.1  # steps of a trial as a fraction of the cost so far
SEALED_PROBABILITY = 0.9  # decide must make it this probable that the sealed split proves the guards
CANDIDATE_PROBABILITY = 0.5  # the same for a smaller student for which the sealed split is opened, too
MAX_CANDIDATES = 2  # students for which the sealed split may be opened


@dataclasses.dataclass(eq=False)
class Stage:
    """One candidate size."""

    number: int
    folder: Path
    network: Network
    run: TrainingRun
    origin: str  # how this student was created
    start: Callable[[], State]  # makes the initial state
    state: State | None = None  # the latest state
    handed: tuple[int, ErrorBudget] | None = None  # (iteration, budget): from this iteration on, it continues with the
    # error budget that other stages have left

    def latest(self) -> State:
        """The latest state of a stage that has been trained."""
        if self.state is None:
            raise RuntimeError("a search continues only from a stage that has been trained")
        return self.state

    def begin(self, stored: State | None) -> State:
        """The state of the newest checkpoint, with the error budget that other stages have left since, or the initial one."""
        if stored is None:
            return self.start()
        if self.handed is None or int(stored.clock.iteration) > self.handed[0]:
            return stored
        return stored._replace(budget=self.handed[1])

    @property
    def ledger(self) -> Path:
        """Path of the stage's ledger."""
        return self.folder / "ledger.jsonl"


def first_state(state: State, number: int) -> State:
    """The initial state of a stage: with an iteration count and random keys of its own."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)
    return state._replace(clock=state.clock._replace(iteration=jnp.int32(0)), key=jax.random.key_data(key))


def first_check(length: int) -> int:
    """Steps after which a size is first checked for being behind, by the initial trajectory length."""
    return CHECK_AFTER * length


def stage_limit(cost: int, limit: int) -> int:
    """Cost that a size may reach while the search grows, by the cost so far and that of the whole search."""
    return cost + (limit - cost) // STAGE_SHARE


def trial_steps(cost: int, each: int, length: int) -> int:
    """Steps of a trial, by the cost so far, the maximum for each trial and the initial trajectory length."""
    return min(max(2 * length, round(TRIAL_FRACTION * cost)), each)


def required_level(level: float, ratio: float, probability: float) -> float:
    """The level at which one split must prove a guard so that another split proves it too, with this probability.

    By the normal approximation. Let s be the standard error on the second split and r s that on the first, r^2 = 1 / ratio.
    The second split proves what is z s above the threshold on it, and its score differs from that on the first split by
    chance, with standard deviation s sqrt(1 + r^2).

    Args:
      level: of the claim on the second split.
      ratio: examples of the first split per example of the second.
      probability: of the proof on the second split.
    """
    from scipy import special

    margin = -special.ndtri(level) * ratio**0.5 + special.ndtri(probability) * (1 + ratio) ** 0.5
    return float(special.ndtr(-margin))


def required_levels(level: float, ratio: float, goals: int) -> tuple[float, float]:
    """Levels on decide of each goal: of a student that meets its guards, and of one that is worth opening the sealed split.

    Args:
      level: of each claim of the certificate.
      ratio: examples of decide per example of the sealed split.
      goals: number of goals that must hold together.
    """
    met = required_level(level, ratio, SEALED_PROBABILITY) / goals
    candidate = required_level(level / MAX_CANDIDATES, ratio, CANDIDATE_PROBABILITY) / goals
    return met, candidate


def cost_limit(state: State) -> int:
    """Cost that a size may reach while the search grows; no limit at other times."""
    return int(state.plateau.until) if isinstance(state.plateau, Plateau) else plateau.NO_END


def is_stuck(state: State) -> bool:
    """Whether a student stopped because it made no progress, rather than because its part of the budget was spent."""
    stopped = isinstance(state.plateau, Plateau) and bool(state.plateau.stuck)
    return stopped and int(state.clock.cost) < cost_limit(state)


def falls_behind(rows: Sequence[dict[str, Any]], position: int, steps: int, *, until: int) -> bool:
    """Whether a size will clearly miss its guards, even if it keeps the gain of the last doubling of its steps.

    The quantity that must rise is the distance above the nearest goal, in standard errors on assess. Learning curves flatten
    with each doubling, so this extrapolation is optimistic.

    Args:
      rows: of the size's ledger.
      position: global step at which the size started.
      steps: that it has trained for; later rows are ignored.
      until: cost that it may reach.
    """
    half, full = (next((row for row in rows if row["position"] >= position + n), None) for n in (steps // 2, steps))
    if (
        half is None
        or full is None
        or full["position"] <= position
        or None in (*half["risks"].values(), *full["risks"].values())
        or not full["risks"]
    ):
        return False
    before, risk = min(half["risks"].values()), min(full["risks"].values())
    doublings = math.log2(1 + max(until - full["cost"], 0) / (full["position"] - position))
    return bool(risk + max(risk - before, 0.0) * doublings < -BEHIND)


def leads(one: Evidence, other: Evidence, run: TrainingRun) -> bool:
    """Whether one student leads another on assess: in the goal that the other misses most, or else in the promise."""
    thresholds = run.distillation.evaluator.objectives.thresholds
    ruling = prioritise.ruling_of(prioritise.risks_of(other, thresholds))
    ours, theirs = (prioritise.ruled(evidence, ruling).promise for evidence in (one, other))
    gain, standard_error = paired(ours, theirs)
    return bool(gain > TAKEOVER * standard_error)
