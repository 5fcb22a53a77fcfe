"""Regret: how far a contender ends behind the best fixed recipe in hindsight, by scenario and over scenarios.

Figures are in percent by scenario, contender and seed. In a scenario, the best fixed recipe is the one with the highest mean
over the seeds; hindsight picks it by the same figures on which it is compared, which favors it.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ev3_distill.benchmarks import statistics
from ev3_distill.benchmarks.statistics import Interval

Cell = Mapping[str, Mapping[int, float]]  # contender -> seed -> figure
Cells = Mapping[str, Cell]  # scenario -> cell


class Regret(NamedTuple):
    """A contender in a scenario."""

    best: str  # fixed recipe in hindsight
    by_seed: dict[int, float]  # the best recipe's figure minus the contender's, in points; the mean is the regret

    @property
    def interval(self) -> Interval:
        """The regret, paired over seeds."""
        return statistics.mean([*self.by_seed.values()])


class Summary(NamedTuple):
    """A contender over scenarios."""

    mean: Interval
    median: float
    worst: Interval
    where: str  # the scenario of the worst regret
    scenarios: list[str]  # in which it was measured


def regret(cell: Cell, contender: str, fixed: Collection[str]) -> Regret | None:
    """The regret of a contender in a scenario, over the seeds that it shares with all fixed recipes; None without any.

    Args:
      cell: figures of the scenario.
      contender: any of them, a fixed recipe too.
      fixed: names of the fixed recipes.
    """
    recipes = [name for name in fixed if name in cell]
    if not recipes or contender not in cell:
        return None
    seeds = sorted(set.intersection(*(set(cell[name]) for name in (contender, *recipes))))
    if not seeds:
        return None
    best = max(recipes, key=lambda name: math.fsum(cell[name][seed] for seed in seeds))
    return Regret(best, {seed: cell[best][seed] - cell[contender][seed] for seed in seeds})


def summary(cells: Cells, contender: str, fixed: Collection[str]) -> Summary | None:
    """The mean, the median and the worst regret over the scenarios in which a contender was measured; None without any.

    The mean is that of the scenarios' regrets. Its interval has the width of that of the mean by seed, over the seeds that all
    these scenarios share.
    """
    found = {name: one for name, cell in cells.items() if (one := regret(cell, contender, fixed))}
    if not found:
        return None
    intervals = {name: one.interval for name, one in found.items()}
    center = math.fsum(one.center for one in intervals.values()) / len(found)
    shared = sorted(set.intersection(*(set(one.by_seed) for one in found.values())))
    half = math.nan
    if len(shared) > 1:
        by_seed = [math.fsum(one.by_seed[seed] for one in found.values()) / len(found) for seed in shared]
        spread = statistics.mean(by_seed)
        half = (spread.high - spread.low) / 2
    mean = Interval(center, center - half, center + half, len(shared), statistics.CONFIDENCE)
    where = max(intervals, key=lambda name: intervals[name].center)
    median = statistics.median([one.center for one in intervals.values()]).center
    return Summary(mean, median, intervals[where], where, [*found])


def best_overall(cells: Cells, fixed: Iterable[str]) -> str | None:
    """The fixed recipe with the lowest mean regret over all scenarios of `cells`; None if none was measured in all."""
    names = list(fixed)
    summaries = {name: one for name in names if (one := summary(cells, name, names))}
    complete = {name: one for name, one in summaries.items() if len(one.scenarios) == len(cells)}
    return min(complete, key=lambda name: complete[name].mean.center) if complete else None
