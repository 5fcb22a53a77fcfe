"""Is the default as good as the result of a grid search, and cheaper?

For each data set and seed, one student learns from one teacher in each of these ways:

- `labels alone`, and each other loss in `losses.LOSSES` by itself, as a bare trajectory: a fixed number of steps, and the
  average of the iterates;
- `grid`: the bare trajectory of alpha * KD at a temperature T + (1 - alpha) * cross entropy, at nine points. Held-out examples
  select the best point, and the cost is that of all nine;
- `KD, T = 4`: the usual point of the grid, with alpha = 0.9;
- `EV3`: the default portfolio, with 1.5 times the steps of one trajectory, all arms counted;
- `EV3, tuning`: the same, with an additional arm whose temperature and mix follow the loss on assess;
- `EV3, synergy`: EV3 twice, at twice the cost. The second student learns from the mean of the teacher and the first student,
  and decide selects which of the two is delivered.

All of them train on the same explore split, with the portfolio's optimizer, from the same initial parameters. Accuracy is on
test examples that were used for no choice. The bound is that of a certificate of accuracy alone, at 95 %.
"""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named, default_arm_names
from ev3_distill.benchmarks import problems, statistics, trajectories
from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.data import batches
from ev3_distill.data.sources import Dataset
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Pools, Variables

KEY = ("data", "seed", "contender")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; comparisons are paired by seed."
FIRST_SEED = 5000  # no default was chosen on these seeds
TEMPERATURES, ALPHAS = (1.0, 4.0, 16.0), (0.1, 0.5, 0.9)
COMMON = (4.0, 0.9)  # the usual point of the grid
ALONE = ("ce", *(name for name in losses.LOSSES if name not in ("kd", "ce")))
MORE = 1.5  # steps of EV3, in trajectories
GRID, PLAIN, OURS = "best of the grid", "KD, T = 4", "EV3"
THIRD = 1 / 3  # largest allowed cost of EV3, relative to the grid


class Subject(NamedTuple):
    """A student, its training, and its teacher."""

    student: str
    steps: int  # of one trajectory
    teacher_cost: int  # training steps of a teacher that learns from labels alone; 0: the pretrained one
    most: int = 1000  # limit on the number of seeds


SUBJECTS = {
    "full": {
        "digits": Subject("mlp:hidden=16", 4000, 1500),
        "mnist": Subject("mlp:hidden=16", 8000, 3000),
        "cifar10": Subject("resnet8:width=8", 1056, 0, 3),
    },
    "smoke": {"digits": Subject("mlp:hidden=4", 150, 150)},
}


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per data set, seed and contender; each point of the grid is a contender.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, initial parameters and, unless it is pretrained, its own
        teacher. A subject's `most` limits the number.
      size: full, or smoke: digits only, few steps.
      done: keys of rows to skip.

    Raises:
      InputError: the data are missing.
    """
    for name, subject in SUBJECTS[size].items():
        missing = {
            seed: {contender for contender in _contenders() if (name, seed, contender) not in done}
            for seed in range(min(seeds, subject.most))
        }
        if not any(missing.values()):
            continue
        dataset, teach = problems.problem(name, subject.teacher_cost)
        bench = _Bench(subject, dataset)
        for seed, contenders in missing.items():
            if contenders:
                logits = teach(FIRST_SEED + seed)
                for row in bench.rows(dataset, logits, FIRST_SEED + seed, contenders):
                    yield {"data": name, "seed": seed, **row}


def _contenders() -> list[str]:
    points = [_point(temperature, alpha) for temperature in TEMPERATURES for alpha in ALPHAS]
    return [*ALONE, *points, OURS, f"{OURS}, tuning", f"{OURS}, synergy"]


def _point(temperature: float, alpha: float) -> str:
    return f"grid T={temperature:g} alpha={alpha:g}"


class _Bench:
    """All contenders, compiled once for all seeds."""

    def __init__(self, subject: Subject, dataset: Dataset):
        self.steps = subject.steps
        student = students.from_name(subject.student, dataset.inputs.shape[1:], dataset.num_classes)
        names = default_arm_names(student.spec)
        self.student, self.ours = student, Distillation(student, arms_named(student.apply, names))
        self.tuned = Distillation(
            student, arms_named(student.apply, (*names, "tuned-temperature-mix"), network=student)
        )
        self.alone = {
            name: trajectories.bare_trajectory(student, trajectories.arm_of(student, losses.LOSSES[name]()))
            for name in ALONE
        }

        @jit
        def on_grid(pools: Pools, seed: int, steps: int, temperature: jax.Array, alpha: jax.Array) -> Variables:
            mixed = losses.mix((alpha, losses.kd(temperature=temperature)), (1 - alpha, losses.cross_entropy()))
            return trajectories.whole_trajectory(student, trajectories.arm_of(student, mixed))(pools, seed, steps)[1]

        self.on_grid = on_grid

    def rows(self, dataset: Dataset, logits: np.ndarray, seed: int, contenders: set[str]) -> Iterator[dict[str, Any]]:
        """The rows of one seed."""
        pools, test = batches.split(dataset, logits, seed=seed, fractions=problems.FRACTIONS)
        row = functools.partial(self._row, pools=pools, test=test)
        for name, train in self.alone.items():
            if name in contenders:
                yield row(name, train(pools, seed, self.steps), self.steps)
        for temperature in TEMPERATURES:
            for alpha in ALPHAS:
                if (name := _point(temperature, alpha)) in contenders:
                    point = jnp.float32(temperature), jnp.float32(alpha)
                    yield row(name, self.on_grid(pools, seed, self.steps, *point), self.steps)
        budget = round(MORE * self.steps)
        synergy = f"{OURS}, synergy"
        if contenders & {OURS, synergy}:
            first = self._delivered(self.ours, pools, seed, budget)
            yield row(OURS, first, budget)
            peer = forward(self.student, first)(np.asarray(dataset.inputs))
            both, _ = batches.split(dataset, (logits + peer) / 2, seed=seed, fractions=problems.FRACTIONS)
            second = self._delivered(self.ours, both, seed + 1, budget)
            better = second if self.ours.evaluator.outranks(pools, second, first) else first
            yield row(synergy, better, 2 * budget)
        if (name := f"{OURS}, tuning") in contenders:
            yield row(name, self._delivered(self.tuned, pools, seed, budget), budget)

    def _delivered(self, distillation: Distillation, pools: Pools, seed: int, budget: int) -> Variables:
        return distillation.evaluator.select(pools, distillation.complete(pools, seed, budget=budget))[1]

    def _row(self, contender: str, variables: Variables, cost: int, *, pools: Pools, test: Batch) -> dict[str, Any]:
        held = [
            np.asarray(self.ours.evaluator.evaluate(variables, split).promise) for split in (pools.assess, pools.decide)
        ]
        right = np.asarray(self.ours.evaluator.evaluate(variables, test).promise) > 0
        return {
            "contender": contender,
            "cost": cost,
            "held_out": float(np.concatenate(held).mean()),
            "accuracy": float(right.mean()),
            "bound": clopper_pearson_lower(int(right.sum()), len(right), confidence=statistics.CONFIDENCE),
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per data set: accuracy, bound and cost of each contender, and EV3 against the grid and against KD."""
    names = dict.fromkeys(row["data"] for row in rows)
    return "\n\n".join(_table_of(name, [row for row in rows if row["data"] == name]) for name in names)


def _compared_rows(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by contender and seed. Of the grid, these are the best point by held-out accuracy and the usual point."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["contender"], {})[row["seed"]] = row
    points = [name for name in found if name.startswith("grid ")]
    grid: dict[int, dict[str, Any]] = {}
    for seed in set.intersection(*(set(found[name]) for name in points)) if points else ():
        best = max((found[name][seed] for name in points), key=lambda row: float(row["held_out"]))
        grid[seed] = {**best, "cost": sum(found[name][seed]["cost"] for name in points)}
    plain = found.get(_point(*COMMON), {})
    return {**{name: of for name, of in found.items() if name not in points}, PLAIN: plain, GRID: grid}


def _table_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    compared = {contender: of for contender, of in _compared_rows(rows).items() if of}
    shown = {"ce": "labels alone"}
    body = [
        [shown.get(contender, contender), statistics.plus_minus(_mean(of, "accuracy"), 2),
         statistics.number(_mean(of, "bound").center, 2), statistics.number(_mean(of, "cost", 1).center, 0)]
        for contender, of in compared.items()
    ]  # fmt: skip
    lines = [_against(compared, GRID, most=THIRD, strictly=False), _against(compared, PLAIN, most=MORE, strictly=True)]
    lines += [_difference(compared, f"{OURS}, {more}") for more in ("tuning", "synergy")]
    head = statistics.markdown(["contender", "test accuracy, %", "at least, %", "steps"], body)
    return f"**{name}**, {len(compared.get(OURS, {}))} seeds, 95 % t intervals\n\n{head}\n\n" + " ".join(
        filter(None, lines)
    )


def _mean(of: dict[int, dict[str, Any]], field: str, scale: float = 100) -> statistics.Interval:
    return statistics.mean([scale * row[field] for row in of.values()])


def _paired(compared: dict[str, dict[int, dict[str, Any]]], one: str, other: str) -> statistics.Interval | None:
    seeds = sorted(compared.get(one, {}).keys() & compared.get(other, {}).keys())
    if not seeds:
        return None
    return statistics.paired(*[[100 * compared[name][seed]["accuracy"] for seed in seeds] for name in (one, other)])


def _against(compared: dict[str, dict[int, dict[str, Any]]], other: str, *, most: float, strictly: bool) -> str:
    """EV3 minus another contender, the ratio of their costs, and whether the target holds."""
    margin = _paired(compared, OURS, other)
    if margin is None:
        return ""
    cost = _mean(compared[OURS], "cost").center / _mean(compared[other], "cost").center
    if cost > most + 1e-9:
        verdict = "missed, by its cost"
    elif strictly or math.isnan(margin.low):
        verdict = statistics.verdict(margin, 0.0)
    else:
        verdict = "held" if margin.high >= 0 or margin.center >= 0 else "missed"
    target = "> 0" if strictly else "an interval that includes or exceeds 0"
    return (
        f"{OURS} minus {other}, paired: {statistics.spread(margin, 2)} points at {cost:.2f} times the cost; target {target} "
        f"at no more than {most:.2g}: {verdict}."
    )


def _difference(compared: dict[str, dict[int, dict[str, Any]]], one: str) -> str:
    margin = _paired(compared, one, OURS)
    return "" if margin is None else f"{one} minus {OURS}: {statistics.spread(margin, 2)} points."
