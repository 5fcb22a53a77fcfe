"""Does growing from tiny lead as far as training the final size from scratch, and what does it yield on the way?

MNIST, a teacher by labels alone, and a ladder of MLPs. A step costs as many multiplications as the student has parameters, or
twice that, so costs are in steps of the final size. For each seed:

- `grown`: from the smallest, each size until it is stuck or for a quarter of COST, the last until the total is 1.2 times COST;
- `from scratch`: every size by a run of its own, COST steps of that size;
- `separately`: every size by a run of its own, all as many steps, together as dear as `grown`;
- `synergy`: as `separately`, taught by the mean of the teacher and the grown student of the final size, so after as much again;
- `plain KD`: every size by the bare trajectory of the commonest loss, COST steps of that size.

Accuracy is of what each delivers, on test images that chose nothing.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import students
from benchmarks import portfolio
from benchmarks import rows as statistics
from ev3_distill import pool
from ev3_distill.arms import arms_named
from ev3_distill.config import EV3
from ev3_distill.errors import InputError
from ev3_distill.loop import Distillation
from ev3_distill.network import count_params
from ev3_distill.sources import load_data
from ev3_distill.types import Batch, Pools, State, Variables
from students.grow import growth
from teachers.flax import forward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("seed", "contender", "hidden")  # names a row
FIRST_SEED = 3000  # patience and the ladder were chosen on seeds below 3000
LADDER = {"full": (4, 8, 16, 32), "smoke": (2, 4)}
COST = {"full": 8000, "smoke": 300}  # steps of a run from scratch
TEACHER_COST = {"full": 3000, "smoke": 200}
QUARTER = 4  # of a run from scratch is the most that a size on the way may take
MORE = 1.2  # times as much may growth cost in all as the final size from scratch
WITHIN = 0.5  # points
PATIENCE = 2.0
CONTENDERS = ("plain KD", "from scratch", "separately", "grown", "synergy")


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed, contender and size.

    Args:
      seeds: counted from FIRST_SEED, each with splits, a teacher and initial parameters of its own.
      size: full, or smoke: digits in the place of MNIST, two sizes, short runs.
      done: keys of rows to leave out; a seed of which any is missing is run again as a whole.
    """
    source = portfolio.source_of("digits" if size == "smoke" else "mnist")
    if source is None:
        raise InputError("bench growth needs mnist.npz; it is not there: name its folder by EV3_DISTILL_DATA")
    dataset, ladder = load_data(source), LADDER[size]
    teach = portfolio.trained_teacher(dataset, TEACHER_COST[size])
    bench = _Bench(dataset.inputs.shape[1:], dataset.num_classes, ladder, COST[size])
    for seed in range(seeds):
        if all((seed, contender, hidden) in done for contender in CONTENDERS for hidden in ladder):
            continue
        own = FIRST_SEED + seed
        logits = teach(own)
        pools, test = pool.split(dataset, logits, seed=own, fractions=portfolio.FRACTIONS)
        pools = pools._replace(seen=_seen(dataset, logits, own))
        for row in bench.rows(dataset, logits, pools, test, own):
            yield {"seed": seed, **row}


def _seen(dataset: Any, logits: np.ndarray, seed: int) -> Batch:
    """As many examples of explore as assess has, as they are."""
    rows = pool.split_rows(dataset.labels, dataset.test_rows, seed=seed, fractions=portfolio.FRACTIONS)
    among = np.random.default_rng(seed).permutation(rows["explore"])[: len(rows["assess"])]
    return pool.held_out(np.asarray(dataset.inputs)[among], dataset.labels[among], among, logits[among])


class _Bench:
    """All sizes, compiled once for all seeds."""

    def __init__(self, shape: Sequence[int], classes: int, ladder: Sequence[int], cost: int):
        self.ladder, self.cost = ladder, cost
        self.networks = {hidden: students.named(f"mlp:hidden={hidden}", shape, classes) for hidden in ladder}
        self.params = {
            hidden: count_params(jax.eval_shape(network.init, jax.random.key(0)))
            for hidden, network in self.networks.items()
        }
        self.once = {h: Distillation(network, arms_named(network.apply)) for h, network in self.networks.items()}
        self.patient = {
            h: Distillation(network, arms_named(network.apply), config=EV3(patience=PATIENCE))
            for h, network in self.networks.items()
        }
        self.bare = {
            h: portfolio.bare_trajectory(network, arms_named(network.apply, ("kd4",))[0])
            for h, network in self.networks.items()
        }
        self.final = self.params[ladder[-1]]
        self.total = MORE * cost * self.final  # multiplications that growth may cost
        self.share = round(self.total / sum(self.params.values()))  # steps of each size, where all have as many

    def rows(self, dataset: Any, logits: np.ndarray, pools: Pools, test: Batch, seed: int) -> Iterator[dict[str, Any]]:
        """Those of one seed."""

        def row(contender: str, hidden: int, variables: Variables, steps: int, cost: float) -> dict[str, Any]:
            right = self.once[hidden].evaluate(variables, test).promise
            return {
                "contender": contender,
                "hidden": hidden,
                "params": self.params[hidden],
                "steps": steps,
                "cost": round(cost / self.final),  # in steps of the final size, up to this student
                "accuracy": float(right.mean()),
            }

        for hidden in self.ladder:
            variables = self.bare[hidden](pools, seed, self.cost)
            yield row("plain KD", hidden, variables, self.cost, self.cost * self.params[hidden])
        for contender, steps in (("from scratch", self.cost), ("separately", self.share)):
            for hidden in self.ladder:
                yield row(
                    contender, hidden, self._alone(hidden, pools, seed, steps), steps, steps * self.params[hidden]
                )
        last, spent = None, 0.0
        for hidden, variables, steps in self._grown(pools, seed):
            spent += steps * self.params[hidden]
            yield row("grown", hidden, variables, steps, spent)
            last = variables
        if last is None:
            raise RuntimeError("a ladder has a size")
        peer = forward(self.networks[self.ladder[-1]], last)(np.asarray(dataset.inputs))
        both, _ = pool.split(dataset, (logits + peer) / 2, seed=seed, fractions=portfolio.FRACTIONS)
        for hidden in self.ladder:
            steps = self.share
            variables = self._alone(hidden, both, seed, steps)
            yield row("synergy", hidden, variables, steps, spent + steps * self.params[hidden])

    def _alone(self, hidden: int, pools: Pools, seed: int, steps: int) -> Variables:
        distillation = self.once[hidden]
        pools = pools._replace(seen=None)
        return distillation.delivered(pools, distillation.complete(pools, seed, budget=steps))[1]

    def _grown(self, pools: Pools, seed: int) -> Iterator[tuple[int, Variables, int]]:
        """Each size with what it delivers and its steps."""
        left, state, before = self.total, None, self.ladder[0]
        for hidden in self.ladder:
            distillation = self.patient[hidden]
            if state is None:
                state = distillation.begin(pools, seed)
            else:
                map_ = growth(jax.random.key(seed), self.networks[before].spec, self.networks[hidden].spec)
                state = distillation.grown(pools, state, map_)
            began, final = int(state.cost), hidden == self.ladder[-1]
            afford = int(left // self.params[hidden])
            limit = began + (afford if final else min(self.cost // QUARTER, afford))
            state = _to_the_end(distillation, pools, state, limit, again=final)
            steps = int(state.cost) - began
            left -= steps * self.params[hidden]
            before = hidden
            yield hidden, distillation.delivered(pools, state)[1], steps


def _to_the_end(distillation: Distillation, pools: Pools, state: State, limit: int, *, again: bool) -> State:
    """Until stuck or the limit; the final size goes on when it is stuck."""
    while True:
        for packed, _ in distillation.stream(pools, state, budget=limit):
            state = distillation.unpack(packed)
        if not again or int(state.cost) >= limit:
            return state
        state = distillation.again(pools, state)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy of each size by contender, and grown against from scratch at the final size."""
    sizes = sorted({row["hidden"] for row in rows})
    lines = []
    for contender in CONTENDERS:
        own = [row for row in rows if row["contender"] == contender]
        means = [statistics.mean([100 * row["accuracy"] for row in own if row["hidden"] == h]) for h in sizes]
        each = len({row["seed"] for row in own}) * max(row["params"] for row in own)
        whole = sum(row["steps"] * row["params"] for row in own) / each  # of all sizes, for one seed
        lines.append([contender, *[statistics.plus_minus(mean, 2) for mean in means], statistics.number(whole, 0)])
    final = sizes[-1]
    by_seed = {
        contender: {row["seed"]: row for row in rows if row["contender"] == contender and row["hidden"] == final}
        for contender in CONTENDERS
    }
    seeds = sorted(by_seed["grown"].keys() & by_seed["from scratch"].keys())
    grown, scratch = ([by_seed[name][seed] for seed in seeds] for name in ("grown", "from scratch"))
    margin = statistics.paired([100 * row["accuracy"] for row in grown], [100 * row["accuracy"] for row in scratch])
    ratio = np.mean([one["cost"] / other["cost"] for one, other in zip(grown, scratch, strict=True)])
    heads = ["contender", *[f"{hidden} units" for hidden in sizes], "cost of all sizes"]
    held = "held" if margin.low >= -WITHIN else "missed" if margin.high < -WITHIN else "open, the interval is too wide"
    return (
        statistics.markdown(heads, lines)
        + f"\n\nTest accuracy in percent, means over {len(seeds)} seeds with 95 % t intervals; cost in steps of the final "
        f"size. Grown minus from scratch at {final} units, paired: {statistics.spread(margin, 2)} points at {ratio:.2f} times "
        f"the cost, which has all sizes in it; target ≥ -{WITHIN} at no more than {MORE}: {held}."
    )


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Accuracy against size, as in the EV3 paper's figure on distillation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for contender, colour in zip(CONTENDERS, ("#8c6d4f", "#6b7480", "#d9822b", "#20639b", "#3c8d5a"), strict=True):
        own = [row for row in rows if row["contender"] == contender]
        sizes = sorted({row["params"] for row in own})
        means = [statistics.mean([100 * row["accuracy"] for row in own if row["params"] == p]) for p in sizes]
        axes.plot(sizes, [mean.center for mean in means], marker="o", ms=4, color=colour, label=contender)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False)
    return figure
