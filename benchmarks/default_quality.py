"""At equal steps, is the default as good as plain distillation on all rows, and as the result of a grid search?

For each data set and seed, one student learns from one teacher in each of these ways, each with the same number of steps:

- `labels alone`, and each other loss in `losses.LOSSES` by itself, as a bare trajectory: the average of its iterates is the
  result;
- `KD, T = 4`: the same with 0.9 KD at temperature 4 + 0.1 cross-entropy;
- `KD, all rows`: the same on explore, assess and decide, all rows that are not sealed;
- `EV3`: the default portfolio, with its final phase; the steps of all arms count;
- `EV3, tuning`: the same, with an additional arm whose temperature and mix follow the loss on assess.

One contender has more:

- `best of the grid`: the bare trajectory of alpha * KD at a temperature T + (1 - alpha) * cross-entropy, at nine points.
  Held-out examples select the best point, and the cost is that of all nine.

A bare trajectory trains on explore, `KD, all rows` apart, and has the optimizer of the usual recipe: AdamW, or Muon for a
convolutional student. The default also has arms of other optimizers; `bench robustness` compares it with recipes of all of
them. Splits, initial parameters and the order of batches are those of a user's run. Accuracy is on test examples that were
used for no choice. The bound is that of a certificate of accuracy alone, at 95 %.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named, default_arm_names
from ev3_distill.benchmarks import problems, statistics, trajectories
from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.core import Ending
from ev3_distill.data import batches
from ev3_distill.data.sources import Dataset
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Pools, Variables

KEY = ("data", "seed", "contender")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; comparisons are paired by seed."
FIRST_SEED = 9000  # no default was chosen on these seeds
TEMPERATURES, ALPHAS = (1.0, 4.0, 16.0), (0.1, 0.5, 0.9)
COMMON = (4.0, 0.9)  # the usual point of the grid
ALONE = ("ce", *(name for name in losses.LOSSES if name not in ("kd", "ce")))
GRID, PLAIN, ALL_ROWS, OURS, TUNING = "best of the grid", "KD, T = 4", "KD, all rows", "EV3", "EV3, tuning"
TARGETS = {ALL_ROWS: -0.1, GRID: 0.0}  # least points of EV3 minus these


class Subject(NamedTuple):
    """A student, its training, and its teacher."""

    student: str
    steps: int  # of each contender, and of each point of the grid
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
    return [*ALONE, *points, ALL_ROWS, OURS, TUNING]


def _point(temperature: float, alpha: float) -> str:
    return f"grid T={temperature:g} alpha={alpha:g}"


class _Bench:
    """All contenders, compiled once for all seeds."""

    def __init__(self, subject: Subject, dataset: Dataset):
        self.steps = subject.steps
        student = students.from_name(subject.student, dataset.inputs.shape[1:], dataset.num_classes)
        names, ending = default_arm_names(student.spec), Ending(has_final=True)
        self.ours = Distillation(student, arms_named(student.apply, names), ending=ending)
        tuned = arms_named(student.apply, (*names, "tuned-temperature-mix"), network=student)
        self.tuned = Distillation(student, tuned, ending=ending)
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
        pools, test = batches.split(dataset, logits, seed=seed)
        row = functools.partial(self._row, steps=self.steps, test=test)
        held_out = functools.partial(self._held_out, pools=pools)
        for name, train in self.alone.items():
            if name in contenders:
                yield row(name, train(pools, seed, self.steps))
        for temperature in TEMPERATURES:
            for alpha in ALPHAS:
                if (name := _point(temperature, alpha)) in contenders:
                    variables = self.on_grid(pools, seed, self.steps, jnp.float32(temperature), jnp.float32(alpha))
                    yield {**row(name, variables), "held_out": held_out(variables)}
        if ALL_ROWS in contenders:
            yield row(ALL_ROWS, self.on_grid(with_all_rows(pools), seed, self.steps, *map(jnp.float32, COMMON)))
        for name, distillation in ((OURS, self.ours), (TUNING, self.tuned)):
            if name in contenders:
                state = distillation.complete(pools, seed, budget=self.steps)
                origin, variables = distillation.evaluator.select(pools, state)
                yield {**row(name, variables, steps=int(state.clock.cost)), "delivered": origin}

    def _held_out(self, variables: Variables, *, pools: Pools) -> float:
        """Accuracy on assess and decide, for a student that has not learned from them."""
        return float(np.concatenate([self._hits(variables, split) for split in (pools.assess, pools.decide)]).mean())

    def _hits(self, variables: Variables, split: Batch) -> np.ndarray:
        return np.asarray(self.ours.evaluator.evaluate(variables, split).promise) > 0

    def _row(self, contender: str, variables: Variables, *, steps: int, test: Batch) -> dict[str, Any]:
        right = self._hits(variables, test)
        return {
            "contender": contender,
            "cost": steps,
            "accuracy": float(right.mean()),
            "bound": clopper_pearson_lower(int(right.sum()), len(right), confidence=statistics.CONFIDENCE),
        }


def with_all_rows(pools: Pools) -> Pools:
    """The pools with the rows of all three splits to train on; those of assess and decide are then not held out."""
    explore = pools.explore
    return pools._replace(explore=explore._replace(order=explore.final_order, final_order=()))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per data set: accuracy, bound and cost of each contender, and EV3 against KD at equal steps and against the grid."""
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
    named = {**found, PLAIN: found.get(_point(*COMMON), {}), GRID: grid}
    return {name: named.get(name, {}) for name in (*ALONE, PLAIN, ALL_ROWS, OURS, TUNING, GRID)}


def _table_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    compared = {contender: of for contender, of in _compared_rows(rows).items() if of}
    shown = {"ce": "labels alone"}
    body = [
        [shown.get(contender, contender), statistics.plus_minus(_mean(of, "accuracy"), 2),
         statistics.number(_mean(of, "bound").center, 2), statistics.number(_mean(of, "cost", 1).center, 0)]
        for contender, of in compared.items()
    ]  # fmt: skip
    lines = [_against(compared, other) for other in (ALL_ROWS, PLAIN, GRID)] + [_against(compared, OURS, one=TUNING)]
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


def _against(compared: dict[str, dict[int, dict[str, Any]]], other: str, *, one: str = OURS) -> str:
    """A contender minus another one, paired by seed, with the ratio of their costs and the verdict on a target."""
    margin = _paired(compared, one, other)
    if margin is None:
        return ""
    cost = _mean(compared[one], "cost", 1).center / _mean(compared[other], "cost", 1).center
    text = f"{one} minus {other}, paired, at {cost:.2f} times its steps: {statistics.spread(margin, 2)} points"
    if other not in TARGETS:
        return f"{text}."
    return f"{text}; target ≥ {TARGETS[other]:g}: {statistics.verdict(margin, TARGETS[other])}."
