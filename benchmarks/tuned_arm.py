"""Does tuning the loss during training find what a grid search finds? Temperature and mix, from bad starts.

On MNIST, a student of 16 hidden units learns from a teacher that labels trained on the same seed's explore split. On CIFAR-10
JPEGs, a ResNet-8 of width 4 learns from the pretrained ResNet-56. Every run is one trajectory of the default arms' optimizer
and its average iterate, without EV3, so that only the loss differs. The grid has 5 temperatures and 5 mixes and costs 25
runs; a tuned run costs some 1.4. The best cell is picked by hindsight, by mean test accuracy, which favors it.

Controls: the final hyperparameters, frozen from the start of a new run; the fixed loss of the default arm, trained for as
many additional steps as tuning costs; and a random cell of the grid, the mean of all cells, which is what random search
reaches with one run.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms.tunable_loss import distillation
from ev3_distill.benchmarks import problems, statistics, trajectories
from ev3_distill.data import batches
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Network, Pools, PyTree, Variables

KEY = ("data", "contender", "seed")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; gains are paired by seed."
FIRST_SEED = 3000  # tuning was designed on other seeds


class Subject(NamedTuple):
    """A student, its training, and its teacher."""

    student: str
    steps: int
    teacher_cost: int  # training steps of a teacher that learns from labels alone; 0: the pretrained one
    most: int = 1000  # limit on the number of seeds


SUBJECTS = {
    "full": {"mnist": Subject("mlp:hidden=16", 4000, 3000), "cifar10": Subject("resnet8:width=4", 528, 0, 5)},
    "smoke": {"digits": Subject("mlp:hidden=16", 40, 300)},
}
GRID = {"full": ((1.0, 2.0, 4.0, 8.0, 20.0), (0.1, 0.3, 0.5, 0.7, 0.9)), "smoke": ((1.0, 4.0), (0.9,))}
STARTS = ((1.0, 0.1), (20.0, 0.9), (4.0, 0.9))
DEFAULT = (4.0, 0.9)
COST = 1.4  # of a tuned run, in plain runs of the same number of steps
TARGET = -0.2  # points that a tuned run may lose to the best cell


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per data set, contender and seed: accuracy on assess and on test, and the final hyperparameters.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, initial parameters and, unless it is pretrained, its
        own teacher. A subject's `most` limits the number.
      size: full, or smoke: digits, short runs, a small grid.
      done: keys of rows to skip; a seed with a missing row is measured again as a whole.

    Raises:
      InputError: the data are missing.
    """
    for name, subject in SUBJECTS[size].items():
        contenders = [*map(_cell, cells(size)), LONGER, *(of(start) for start in STARTS for of in (_from, _frozen))]
        of_subject = range(min(seeds, subject.most))
        missing = [seed for seed in of_subject if not all((name, contender, seed) in done for contender in contenders)]
        if not missing:
            continue
        dataset, teach = problems.problem(name, subject.teacher_cost)
        network = students.from_name(subject.student, dataset.inputs.shape[1:], dataset.num_classes)
        bench = _Bench(network, subject.steps, cells(size))
        for seed in missing:
            own = FIRST_SEED + seed
            pools, test = batches.split(dataset, teach(own), seed=own, fractions=problems.FRACTIONS)
            score = trajectories.accuracy_of(network)
            for contender, student, facts in bench.trained(pools, own):
                scores = {"assess": float(score(student, pools.assess)), "accuracy": float(score(student, test))}
                yield {"data": name, "contender": contender, "seed": seed, **facts, **scores}


class _Bench:
    """All contenders, compiled once for all seeds."""

    def __init__(self, network: Network, steps: int, cells: Sequence[tuple[float, float]]):
        self.steps, self.cells = steps, cells
        self.fixed, self.tuned = _fixed(network), {start: _tuned(network, *start) for start in STARTS}

    def trained(self, pools: Pools, seed: int) -> Iterator[tuple[str, Variables, dict[str, float]]]:
        """Contenders of one seed: the name, the student, and its final hyperparameters if it tuned any."""
        for cell in self.cells:
            yield _cell(cell), self.fixed(pools, seed, self.steps, *cell), {}
        yield LONGER, self.fixed(pools, seed, round(COST * self.steps), *DEFAULT), {}
        for start, tune in self.tuned.items():
            student, shown = tune(pools, seed, self.steps)
            final = float(shown["temperature"]), float(shown["mix"][0])
            facts = {"temperature": round(final[0], 3), "mix": round(final[1], 3)}
            yield _from(start), student, facts
            yield _frozen(start), self.fixed(pools, seed, self.steps, *final), facts


LONGER = "default, longer"


def cells(size: str) -> list[tuple[float, float]]:
    """The grid's cells: temperature and mix."""
    return [(temperature, mix) for temperature in GRID[size][0] for mix in GRID[size][1]]


def _cell(cell: tuple[float, float]) -> str:
    return f"T = {cell[0]:g}, mix {cell[1]:g}"


def _from(start: tuple[float, float]) -> str:
    return f"tuned from {_cell(start)}"


def _frozen(start: tuple[float, float]) -> str:
    return f"frozen, {_from(start)}"


def _fixed(network: Network) -> Callable[..., Variables]:
    """(pools, seed, steps, temperature, mix) -> the proposal of a plain run."""

    @jit
    def run(pools: Pools, seed: Any, steps: Any, temperature: Any, mix: Any) -> Variables:
        loss = distillation({"temperature": temperature, "mix": jnp.stack([mix, 1 - mix])})
        return trajectories.whole_trajectory(network, trajectories.arm_of(network, loss))(pools, seed, steps)[1]

    found: Callable[..., Variables] = run
    return found


def _tuned(network: Network, temperature: float, mix: float) -> Callable[..., tuple[Variables, dict[str, PyTree]]]:
    """(pools, seed, steps) -> the proposal of a tuned run, and its hyperparameters."""
    arm = trajectories.tuned_arm_of(network, ("temperature", "mix"), temperature=temperature, mix=mix)

    @jit
    def run(pools: Pools, seed: Any, steps: Any) -> tuple[Variables, dict[str, PyTree]]:
        state, proposed = trajectories.whole_trajectory(network, arm)(pools, seed, steps)
        return proposed, arm.hyperparameters(state) if arm.hyperparameters else {}

    found: Callable[..., tuple[Variables, dict[str, PyTree]]] = run
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per data set: accuracies, and the gain of tuning over each control, paired over seeds."""
    names = dict.fromkeys(row["data"] for row in rows)
    return "\n\n".join(_table_of(name, [row for row in rows if row["data"] == name]) for name in names)


def _table_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        points.setdefault(row["contender"], {})[row["seed"]] = 100 * row["accuracy"]
    seeds = sorted(set.intersection(*({*by_seed} for by_seed in points.values())))
    grid = {name: by_seed for name, by_seed in points.items() if name.startswith("T =")}
    best = max(grid, key=lambda name: np.mean([grid[name][seed] for seed in seeds]))
    controls = {
        f"the best cell ({best})": [grid[best][seed] for seed in seeds],
        "the cell that assess picks": [_picked_by_assess(rows, seed) for seed in seeds],
        "a cell drawn at random": [float(np.mean([by_seed[seed] for by_seed in grid.values()])) for seed in seeds],
    }
    if _cell(DEFAULT) in grid:
        controls[_cell(DEFAULT)] = [grid[_cell(DEFAULT)][seed] for seed in seeds]
    controls["the default, longer"] = [points[LONGER][seed] for seed in seeds]
    body = []
    for start in STARTS:
        own = [row for row in rows if row["contender"] == _from(start)]
        ends = ", ".join(f"{what} {np.mean([row[what] for row in own]):.2f}" for what in ("temperature", "mix"))
        body.append([_from(start), _mean(points[_from(start)], seeds), ends])
        body.append(["... frozen from the start of a new run", _mean(points[_frozen(start)], seeds), ""])
    body += [[name, statistics.plus_minus(statistics.mean(values), 2), ""] for name, values in controls.items()]
    heads = ["contender", "test accuracy, % (95 % t interval)", "final values"]
    lines = [f"**{name}**, {len(seeds)} seeds; points are paired over them", statistics.markdown(heads, body)]
    for start in STARTS:
        ours = [points[_from(start)][seed] for seed in seeds]
        gains = {name: statistics.paired(ours, values) for name, values in controls.items()}
        text = "; ".join(f"{statistics.spread(gain, 2)} over {name}" for name, gain in gains.items())
        verdict = statistics.verdict(next(iter(gains.values())), TARGET)
        lines.append(f"{_from(start)}: {text}. Target ≥ {TARGET:g} over the best cell: {verdict}.")
    return "\n\n".join(lines)


def _mean(by_seed: dict[int, float], seeds: Sequence[int]) -> str:
    return statistics.plus_minus(statistics.mean([by_seed[seed] for seed in seeds]), 2)


def _picked_by_assess(rows: Sequence[dict[str, Any]], seed: int) -> float:
    """The test accuracy, in percent, of the cell that is best on assess."""
    mine = [row for row in rows if row["seed"] == seed and row["contender"].startswith("T =")]
    return 100 * float(max(mine, key=lambda row: row["assess"])["accuracy"])
