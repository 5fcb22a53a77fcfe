"""A rung: one size on its way through a search, and what is decided of it.

Whether it will miss its guards, whether one student leads another, and how sure decide must be: each a function of evidence or
of the ledger's rows, so that a search which was killed decides the same again.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from scipy import special

from ev3_distill.core import plateau, prioritise
from ev3_distill.core.paired_tests import paired
from ev3_distill.training.setup import TrainingRun
from ev3_distill.types import Evidence, Network, Plateau, State

TAKEOVER = 1.0  # standard errors on assess
BEHIND = 2.0  # standard errors on assess, by which a size must be sure to miss its guards to be left


@dataclasses.dataclass(eq=False)
class Rung:
    """One size on its way."""

    number: int
    folder: Path
    network: Network
    course: TrainingRun
    how: str
    start: Callable[[], State]
    state: State | None = None  # the last that is known

    def known(self) -> State:
        """That state, of a rung that was trained."""
        if self.state is None:
            raise RuntimeError("a search goes on from a rung that was trained")
        return self.state


def of_rung(state: State, number: int) -> State:
    """A state to begin a rung with: it counts its own iterations, and draws keys of its own."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)
    return state._replace(clock=state.clock._replace(iteration=jnp.int32(0)), key=jax.random.key_data(key))


def level_of(level: float, ratio: float, likely: float) -> float:
    """The level at which one split must prove a guard for another one to prove it, too, with that probability.

    By the normal approximation, with s the standard error on the second split and r s on the first, r^2 = 1 / ratio: the second
    proves what lies z s above the threshold on it, and its score differs from the first's by chance, with s sqrt(1 + r^2).

    Args:
      level: of the second split's claim.
      ratio: examples of the first split for each of the second.
      likely: the probability.
    """
    above = -special.ndtri(level) * ratio**0.5 + special.ndtri(likely) * (1 + ratio) ** 0.5
    return float(special.ndtr(-above))


def until_of(state: State) -> int:
    """The cost that a size on its way up may reach."""
    return int(state.plateau.until) if isinstance(state.plateau, Plateau) else plateau.NO_END


def falls_behind(told: Sequence[dict[str, Any]], position: int, steps: int, *, until: int) -> bool:
    """Whether a size will clearly miss its guards even if it goes on to rise as it did when its steps last doubled.

    What rises is how far it lies above the goal that is nearest, or below it, in standard errors on assess. Learning curves
    rise less with each doubling, so what follows from the last one is more than there will be.

    Args:
      told: its rows of the ledger.
      position: global step at which it began.
      steps: that it has trained for since; what came later does not count.
      until: cost that it may reach.
    """
    then, now = (next((row for row in told if row["position"] >= position + n), None) for n in (steps // 2, steps))
    if (
        then is None
        or now is None
        or now["position"] <= position
        or None in (*then["risks"].values(), *now["risks"].values())
        or not now["risks"]
    ):
        return False
    before, risk = min(then["risks"].values()), min(now["risks"].values())
    doublings = math.log2(1 + max(until - now["cost"], 0) / (now["position"] - position))
    return bool(risk + max(risk - before, 0.0) * doublings < -BEHIND)


def leads(one: Evidence, other: Evidence, course: TrainingRun) -> bool:
    """Whether one student leads another on assess, in the goal that the other is the furthest below, or in the promise."""
    thresholds = course.distillation.evaluator.objectives.thresholds
    ruling = prioritise.ruling_of(prioritise.risks_of(other, thresholds))
    ours, theirs = (prioritise.ruled(evidence, ruling).promise for evidence in (one, other))
    gain, se = paired(ours, theirs)
    return bool(gain > TAKEOVER * se)
