"""Does a portfolio of arms cost more than its best member would?

All contenders have the same total cost, with every arm's steps counted. For each data set and seed these are the default
portfolio, each of its arms alone within an EV3 run, and each arm's bare trajectory: its average iterate after all the steps,
without EV3. No run has a final phase, so that all train on the same rows. The figure is the accuracy of the delivered student
on test examples that were used for no choice. The best single arm is picked by hindsight, by mean test accuracy over the
seeds, which favors it.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from ev3_distill import students
from ev3_distill.arms import DEFAULT, arms_named
from ev3_distill.benchmarks import datasets, problems, statistics, trajectories
from ev3_distill.data import batches
from ev3_distill.data.sources import load_data
from ev3_distill.training.trainer import Distillation

COST = {"digits": 4000, "mnist": 8000}  # steps in total
STUDENT = {"digits": "mlp:hidden=16", "mnist": "mlp:hidden=16"}
TEACHER_COST = {"digits": 1500, "mnist": 3000}
FIRST_SEED = 9000  # no default was chosen on these seeds
KEY = ("data", "seed", "contender")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; the comparison is paired by seed."
SINGLES = DEFAULT  # the arms of the portfolio
TARGET = -0.3  # points that the portfolio may lose to the best single arm


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per data set, seed and contender.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, teacher and initial parameters.
      size: full, or smoke: digits only, at a twentieth of the cost.
      done: keys of rows to skip.
    """
    for name in ("digits",) if size == "smoke" else tuple(COST):
        source = datasets.source_of(name)
        if source is None:
            continue
        dataset = load_data(source)
        cost = COST[name] // (20 if size == "smoke" else 1)
        teach = problems.trained_teacher(dataset, TEACHER_COST[name] // (10 if size == "smoke" else 1))
        student = students.from_name(STUDENT[name], dataset.inputs.shape[1:], dataset.num_classes)
        arms = arms_named(student.apply)
        singles = arms_named(student.apply, SINGLES)
        contenders = {"portfolio": Distillation(student, arms)}
        contenders |= {f"EV3, {arm.name} alone": Distillation(student, [arm]) for arm in singles}
        bare = {arm.name: trajectories.bare_trajectory(student, arm) for arm in singles}
        for seed in range(seeds):
            missing = {c for c in (*contenders, *(f"bare {arm}" for arm in bare)) if (name, seed, c) not in done}
            if not missing:
                continue
            own = FIRST_SEED + seed
            pools, test = batches.split(dataset, teach(own), seed=own, fractions=problems.FRACTIONS)
            for contender, distillation in contenders.items():
                if contender not in missing:
                    continue
                state = distillation.complete(pools, own, budget=cost)
                which, variables = distillation.evaluator.select(pools, state)
                students_of = {
                    "delivered": variables,
                    "champion": state.champion.variables,
                    "current": state.current.variables,
                }
                accuracy = {
                    key: float(distillation.evaluator.evaluate(one, test).promise.mean())
                    for key, one in students_of.items()
                }
                yield {
                    "data": name, "seed": seed, "contender": contender, "cost": int(state.clock.cost), "which": which,
                    "accuracy": accuracy["delivered"], "champion": accuracy["champion"],
                    "current": accuracy["current"], "iterations": int(state.clock.iteration),
                    "shares": [round(float(s), 3) for s in state.arms.cost / state.clock.cost],
                }  # fmt: skip
            for arm, train in bare.items():
                if f"bare {arm}" not in missing:
                    continue
                variables = train(pools, own, cost)
                scores = contenders["portfolio"].evaluator.evaluate(variables, test).promise
                yield {"data": name, "seed": seed, "contender": f"bare {arm}", "cost": cost,
                       "accuracy": float(scores.mean())}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per data set: mean accuracy of each contender with a t interval, and the comparison with the best single arm."""
    return "\n\n".join(_table_of(name, rows) for name in dict.fromkeys(row["data"] for row in rows))


def _table_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    points: dict[str, dict[int, float]] = {}  # contender -> seed -> accuracy in percent
    costs: dict[str, list[float]] = {}
    for row in rows:
        if row["data"] == name:
            points.setdefault(row["contender"], {})[row["seed"]] = 100 * row["accuracy"]
            costs.setdefault(row["contender"], []).append(row["cost"])
    means = {contender: statistics.mean(list(by_seed.values())) for contender, by_seed in points.items()}
    best = max((contender for contender in points if contender != "portfolio"), key=lambda c: means[c].center)
    seeds = sorted(points["portfolio"].keys() & points[best].keys())
    margin = statistics.paired([points["portfolio"][s] for s in seeds], [points[best][s] for s in seeds])
    lines = [
        [contender, statistics.plus_minus(means[contender], 2), statistics.number(float(np.mean(costs[contender])), 0)]
        for contender in points
    ]
    return (
        f"**{name}**: portfolio minus the best single arm in hindsight ({best}), paired over {len(seeds)} seeds: "
        f"{statistics.spread(margin, 2)} points; target ≥ {TARGET:g}: {statistics.verdict(margin, TARGET)}.\n\n"
        + statistics.markdown(["contender", "test accuracy, % (95 % t interval)", "steps"], lines)
    )
