"""Does growing from a tiny size lead as far as training the final size from scratch, and what does it yield on the way?

MLPs on MNIST, with a teacher that learns from labels alone; and narrow ResNet-8s on CIFAR-10 JPEGs, from the pretrained
ResNet-56 if it is available. Within a family, the multiplications of a step are nearly proportional to the number of
parameters, so costs are in steps of the final size. For each seed:

- `grown`: from the smallest size up. Each size trains until it is stuck or has used a quarter of the cost of a run from
  scratch, the last one until the total is 1.2 times that cost;
- `from scratch`: every size by a run of its own, with the subject's `cost` in steps of that size;
- `separately`: every size by a run of its own, all with the same number of steps, together at the cost of `grown`;
- `synergy`: like `separately`, taught by the mean of the teacher and the grown student of the final size, which costs as much
  again;
- `plain KD`: every size by the bare trajectory of plain KD, with as many steps as `from scratch`.

Accuracy is that of the delivered student, on test images that were used for no choice.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named, default_arm_names
from ev3_distill.benchmarks import problems, statistics, trajectories
from ev3_distill.config import EV3
from ev3_distill.data import batches, split_rows
from ev3_distill.data.sources import Dataset
from ev3_distill.students import count_params
from ev3_distill.students.growth import growth_map
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Batch, Pools, State, Variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("data", "seed", "contender", "width")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; comparisons are paired by seed."
# Growth was designed on seeds below 3000, and changed twice after results on seeds 3000 to 3108.
FIRST_SEED = 3200


class Subject(NamedTuple):
    """A family of students, its data and its teacher."""

    student: str  # name with a placeholder for the width
    ladder: tuple[int, ...]  # widths
    cost: int  # steps of a run from scratch
    teacher_cost: int  # training steps of a teacher that learns from labels alone; 0: the pretrained one
    plain: str  # the arm of plain KD
    most: int = 1000  # seeds with all contenders; further seeds have only the two that are compared, at the final size


SUBJECTS = {
    "full": {
        "mnist": Subject("mlp:hidden={}", (4, 8, 16, 32), 8000, 3000, "kd4", 5),
        "cifar10": Subject("resnet8:width={}", (2, 4, 8), 800, 0, "kd4-muon", 5),
    },
    "smoke": {"digits": Subject("mlp:hidden={}", (2, 4), 300, 200, "kd4")},
}
QUARTER = 4  # an intermediate size takes at most this part of a run from scratch
MORE = 1.2  # largest allowed cost of growth, relative to the final size from scratch
WITHIN = 0.5  # points
PATIENCE = 2.0
CONTENDERS = ("plain KD", "from scratch", "separately", "grown", "synergy")


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed, contender and size.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, initial parameters and, unless it is pretrained, its
        own teacher.
      size: full, or smoke: digits only, two sizes, short runs.
      done: keys of rows to skip; a seed with a missing row is measured again as a whole.

    Raises:
      InputError: the data are missing.
    """
    for name, subject in SUBJECTS[size].items():
        keys = {
            seed: [
                (name, seed, contender, width)
                for contender in CONTENDERS
                for width in subject.ladder
                if seed < subject.most
                or contender == "grown"
                or (contender, width) == ("from scratch", subject.ladder[-1])
            ]
            for seed in range(seeds)
        }
        missing = [seed for seed in keys if not all(key in done for key in keys[seed])]
        if not missing:
            continue
        dataset, teach = problems.problem(name, subject.teacher_cost)
        bench = _Bench(subject, dataset)
        for seed in missing:
            own = FIRST_SEED + seed
            logits = teach(own)
            pools, test = batches.split(dataset, logits, seed=own, fractions=problems.FRACTIONS)
            pools = pools._replace(seen=_seen(dataset, logits, own))
            for row in bench.rows(dataset, logits, pools, test, own, whole=seed < subject.most):
                yield {"data": name, "seed": seed, **row}


def _seen(dataset: Any, logits: np.ndarray, seed: int) -> Batch:
    """As many examples of explore as assess has, without augmentation."""
    rows = split_rows(dataset.labels, dataset.test_rows, seed=seed, fractions=problems.FRACTIONS)
    among = np.random.default_rng(seed).permutation(rows["explore"])[: len(rows["assess"])]
    return batches.held_out(np.asarray(dataset.inputs)[among], dataset.labels[among], among, {"logits": logits[among]})


class _Bench:
    """All sizes, compiled once for all seeds."""

    def __init__(self, subject: Subject, dataset: Dataset):
        self.ladder, self.cost = subject.ladder, subject.cost
        shape = dataset.inputs.shape[1:]
        self.networks = {
            width: students.from_name(subject.student.format(width), shape, dataset.num_classes)
            for width in self.ladder
        }
        self.params = {
            width: count_params(jax.eval_shape(network.init, jax.random.key(0)))
            for width, network in self.networks.items()
        }
        arms = {w: arms_named(network.apply, default_arm_names(network.spec)) for w, network in self.networks.items()}
        self.once = {w: Distillation(network, arms[w]) for w, network in self.networks.items()}
        patient = EV3(patience=PATIENCE)
        self.patient = {w: Distillation(network, arms[w], config=patient) for w, network in self.networks.items()}
        self.bare = {
            w: trajectories.bare_trajectory(network, arms_named(network.apply, (subject.plain,))[0])
            for w, network in self.networks.items()
        }
        self.final = self.params[self.ladder[-1]]
        self.total = MORE * self.cost * self.final  # allowed multiplications of growth
        self.share = round(self.total / sum(self.params.values()))  # steps of each size if all have the same number

    def rows(
        self, dataset: Any, logits: np.ndarray, pools: Pools, test: Batch, seed: int, *, whole: bool
    ) -> Iterator[dict[str, Any]]:
        """The rows of one seed: of all contenders, or only of those that are compared."""

        def row(contender: str, width: int, variables: Variables, steps: int, cost: float) -> dict[str, Any]:
            right = self.once[width].evaluator.evaluate(variables, test).promise
            return {
                "contender": contender,
                "width": width,
                "params": self.params[width],
                "steps": steps,
                "cost": round(cost / self.final),  # cumulative, in steps of the final size
                "accuracy": float(right.mean()),
            }

        for width in self.ladder if whole else ():
            variables = self.bare[width](pools, seed, self.cost)
            yield row("plain KD", width, variables, self.cost, self.cost * self.params[width])
        for contender, steps in (("from scratch", self.cost), ("separately", self.share))[: 2 if whole else 1]:
            for width in self.ladder if whole else self.ladder[-1:]:
                yield row(contender, width, self._alone(width, pools, seed, steps), steps, steps * self.params[width])
        last, spent = None, 0.0
        for width, variables, steps in self._grown(pools, seed):
            spent += steps * self.params[width]
            yield row("grown", width, variables, steps, spent)
            last = variables
        if last is None:
            raise RuntimeError("a ladder has a size")
        peer = forward(self.networks[self.ladder[-1]], last)(np.asarray(dataset.inputs))
        both, _ = batches.split(dataset, (logits + peer) / 2, seed=seed, fractions=problems.FRACTIONS)
        for width in self.ladder if whole else ():
            steps = self.share
            variables = self._alone(width, both, seed, steps)
            yield row("synergy", width, variables, steps, spent + steps * self.params[width])

    def _alone(self, width: int, pools: Pools, seed: int, steps: int) -> Variables:
        distillation = self.once[width]
        pools = pools._replace(seen=None)
        return distillation.evaluator.select(pools, distillation.complete(pools, seed, budget=steps))[1]

    def _grown(self, pools: Pools, seed: int) -> Iterator[tuple[int, Variables, int]]:
        """Each size with its delivered student and its steps."""
        left, state, before = self.total, None, self.ladder[0]
        for width in self.ladder:
            distillation = self.patient[width]
            began = int(state.clock.cost) if state is not None else 0
            if state is None:
                state = distillation.begin_best(pools, seed, budget=self.cost // QUARTER)
            else:
                map_ = growth_map(jax.random.key(seed), self.networks[before].spec, self.networks[width].spec)
                state = distillation.grow(pools, state, map_)
            final = width == self.ladder[-1]
            afford = int(left // self.params[width])
            limit = began + (afford if final else min(self.cost // QUARTER, afford))
            state = _to_the_end(distillation, pools, state, limit, again=final)
            steps = int(state.clock.cost) - began
            left -= steps * self.params[width]
            before = width
            yield width, distillation.evaluator.select(pools, state)[1], steps


def _to_the_end(distillation: Distillation, pools: Pools, state: State, limit: int, *, again: bool) -> State:
    """Trains until stuck or until the limit; the final size continues when it is stuck."""
    while True:
        for after, _ in distillation.loop(pools, state, budget=limit):
            state = after
        if not again or int(state.clock.cost) >= limit:
            return state
        state = distillation.extend(pools, state)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per data set: accuracy of each size by contender, and grown against from scratch at the final size."""
    names = dict.fromkeys(row["data"] for row in rows)
    return "\n\n".join(_table_of(name, [row for row in rows if row["data"] == name]) for name in names)


def _table_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    sizes = sorted({row["width"] for row in rows})
    lines = []
    for contender in CONTENDERS:
        own = [row for row in rows if row["contender"] == contender]
        means = [statistics.mean([100 * row["accuracy"] for row in own if row["width"] == h]) for h in sizes]
        of_size = [[row["steps"] * row["params"] for row in own if row["width"] == h] for h in sizes]
        whole = sum(float(np.mean(costs)) for costs in of_size) / max(row["params"] for row in own)
        lines.append([contender, *[statistics.plus_minus(mean, 2) for mean in means], statistics.number(whole, 0)])
    final = sizes[-1]
    by_seed = {
        contender: {row["seed"]: row for row in rows if row["contender"] == contender and row["width"] == final}
        for contender in CONTENDERS
    }
    seeds = sorted(by_seed["grown"].keys() & by_seed["from scratch"].keys())
    grown, scratch = ([by_seed[name][seed] for seed in seeds] for name in ("grown", "from scratch"))
    margin = statistics.paired([100 * row["accuracy"] for row in grown], [100 * row["accuracy"] for row in scratch])
    ratio = np.mean([one["cost"] / other["cost"] for one, other in zip(grown, scratch, strict=True)])
    heads = ["contender", *[f"width {width}" for width in sizes], "cost of all sizes"]
    held = "held" if margin.low >= -WITHIN else "missed" if margin.high < -WITHIN else "open, the interval is too wide"
    return (
        f"**{name}**\n\n{statistics.markdown(heads, lines)}"
        f"\n\nTest accuracy in percent, means over {len(seeds)} seeds with 95 % t intervals; cost in steps of the final "
        f"size. Grown minus from scratch at width {final}, paired: {statistics.spread(margin, 2)} points at {ratio:.2f} times "
        f"the cost, all sizes included; target ≥ -{WITHIN} at no more than {MORE}: {held}. Synergy minus "
        f"separately, paired: {_synergy(rows, sizes)} points."
    )


def _synergy(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """The gain from adding the grown student to the teacher, by size, at equal steps."""
    texts = []
    for width in sizes:
        by_seed = [
            {row["seed"]: 100 * row["accuracy"] for row in rows if row["contender"] == name and row["width"] == width}
            for name in ("synergy", "separately")
        ]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        margin = statistics.paired(*[[of[seed] for seed in seeds] for of in by_seed])
        texts.append(f"{statistics.spread(margin, 2)} at width {width}")
    return ", ".join(texts)


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Accuracy against size, as in the EV3 paper's figure on distillation; one panel per data set."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(5.2 * len(names), 4.0), layout="constrained")
    for axes, name in zip(np.ravel(figure.subplots(1, len(names))), names, strict=True):
        _draw(axes, [row for row in rows if row["data"] == name])
        axes.set_title(name)
    return figure


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for contender, color in zip(CONTENDERS, ("#8c6d4f", "#6b7480", "#d9822b", "#20639b", "#3c8d5a"), strict=True):
        own = [row for row in rows if row["contender"] == contender]
        sizes = sorted({row["params"] for row in own})
        means = [statistics.mean([100 * row["accuracy"] for row in own if row["params"] == p]) for p in sizes]
        axes.plot(sizes, [mean.center for mean in means], marker="o", ms=4, color=color, label=contender)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
