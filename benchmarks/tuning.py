"""Does tuning the loss while a student trains find what a grid search finds? Temperature and mix, from bad starts.

MNIST, a student of 16 units, a teacher trained by labels on the same seed's explore split. Every run is one trajectory of
AdamW at 1e-2 and its average iterate, without EV3 around it, so that nothing but the loss differs. The grid has 5 temperatures
and 5 mixes: it costs 25 runs, a tuned run some 1.4. The best cell is the one that hindsight picks by mean test accuracy, which
favours it. Controls: the final hyperparameters, frozen, from the start of a new run; the fixed loss of the default arm, trained
for as many steps more as tuning costs; and a draw from the grid, the mean of all cells: what random search gets for one run.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import students
from benchmarks import rows as statistics
from benchmarks.portfolio import FRACTIONS, TEACHER_COST, source_of, trained_teacher
from ev3_distill import pool
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw
from ev3_distill.arms.tuned import tuned_arm
from ev3_distill.compiling import jit
from ev3_distill.config import EV3
from ev3_distill.core.assess import logits_of
from ev3_distill.core.explore import draw_from, held_from
from ev3_distill.hyperparameters import distillation
from ev3_distill.sources import load_data
from ev3_distill.types import Batch, Network, Pools, Stretch, Variables

KEY = ("contender", "seed")  # names a row
STEPS = {"full": 4000, "smoke": 40}
GRID = {"full": ((1.0, 2.0, 4.0, 8.0, 20.0), (0.1, 0.3, 0.5, 0.7, 0.9)), "smoke": ((1.0, 4.0), (0.9,))}
STARTS = ((1.0, 0.1), (20.0, 0.9), (4.0, 0.9))
DEFAULT = (4.0, 0.9)
COST = 1.4  # of a tuned run, in plain runs of as many steps
FIRST_SEED = 3000
TARGET = -0.2  # points that a tuned run may lose to the best cell
RATE = 1e-2


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per contender and seed: accuracy on assess and on test, and the hyperparameters in the end.

    Args:
      seeds: from FIRST_SEED, each with splits, a teacher and initial parameters of its own.
      size: full, or smoke: digits, short runs, a small grid.
      done: keys of rows to leave out.
    """
    source = source_of("mnist" if size == "full" else "digits")
    if source is None:
        return
    dataset = load_data(source)
    teach = trained_teacher(dataset, TEACHER_COST["mnist"] // (1 if size == "full" else 10))
    network = students.named("mlp:hidden=16", dataset.inputs.shape[1:], dataset.num_classes)
    steps = STEPS[size]
    fixed, tuned = _fixed(network), {start: _tuned(network, *start) for start in STARTS}
    for seed in range(seeds):
        own = FIRST_SEED + seed
        names = [
            *map(_cell, cells(size)),
            *map(_from, STARTS),
            *(f"frozen, {_from(s)}" for s in STARTS),
            "default, longer",
        ]
        if all((name, seed) in done for name in names):
            continue
        pools, test = pool.split(dataset, teach(own), seed=own, fractions=FRACTIONS)
        judge = functools.partial(_judged, _scores(network), pools, test)
        for cell in cells(size):
            yield {"contender": _cell(cell), "seed": seed, **judge(fixed(pools, own, steps, *cell))}
        longer = round(COST * steps)
        yield {"contender": "default, longer", "seed": seed, **judge(fixed(pools, own, longer, *DEFAULT))}
        for start in STARTS:
            student, shown = tuned[start](pools, own, steps)
            found = float(shown["temperature"]), float(shown["mix"][0])
            facts = {"temperature": round(found[0], 3), "mix": round(found[1], 3)}
            yield {"contender": _from(start), "seed": seed, **facts, **judge(student)}
            yield {
                "contender": f"frozen, {_from(start)}",
                "seed": seed,
                **facts,
                **judge(fixed(pools, own, steps, *found)),
            }


def cells(size: str) -> list[tuple[float, float]]:
    """Of the grid: temperature and mix."""
    return [(temperature, mix) for temperature in GRID[size][0] for mix in GRID[size][1]]


def _cell(cell: tuple[float, float]) -> str:
    return f"T = {cell[0]:g}, mix {cell[1]:g}"


def _from(start: tuple[float, float]) -> str:
    return f"tuned from {_cell(start)}"


def _whole(pools: Pools, seed: Any, steps: Any, network: Network) -> tuple[Variables, jax.Array, Any, Stretch]:
    """A fresh student, the run's key, its batches, and all of its steps."""
    init_key, key = jax.random.split(jax.random.key(seed))
    draw = draw_from(pools.explore, pool.sampler(batch_size=EV3().batch_size), key)
    return (
        network.init(init_key),
        key,
        draw,
        Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0), jnp.float32(1 / steps)),
    )


def _fixed(network: Network) -> Callable[..., Variables]:
    """(pools, seed, steps, temperature, mix) -> what a plain run proposes."""

    @jit
    def run(pools: Pools, seed: Any, steps: Any, temperature: Any, mix: Any) -> Variables:
        loss = distillation({"temperature": temperature, "mix": jnp.stack([mix, 1 - mix])})
        arm = gradient_arm("fixed", network.apply, loss, adamw(RATE))
        begun, _, draw, whole = _whole(pools, seed, steps, network)
        return arm.propose(arm.init(begun), draw, whole)[1]

    return run


def _tuned(network: Network, temperature: float, mix: float) -> Callable[..., tuple[Variables, dict[str, jax.Array]]]:
    """(pools, seed, steps) -> what a tuned run proposes, and its hyperparameters."""
    arm = tuned_arm("tuned", network.apply, adamw(RATE), temperature=temperature, mix=mix)

    @jit
    def run(pools: Pools, seed: Any, steps: Any) -> tuple[Variables, dict[str, jax.Array]]:
        begun, key, draw, whole = _whole(pools, seed, steps, network)
        held = held_from(pools.assess, key, batch_size=EV3().batch_size)
        state, proposed = arm.propose(arm.init(begun), draw, whole, held)
        return proposed, arm.shows(state) if arm.shows else {}

    return run


@functools.cache
def _scores(network: Network) -> Callable[[Variables, Batch], jax.Array]:
    """(student, split) -> its accuracy."""

    @jit
    def accuracy(variables: Variables, split: Batch) -> jax.Array:
        logits = logits_of(network.apply, variables, split.inputs, batch_size=EV3().eval_batch_size)
        return (logits.argmax(-1) == split.labels).mean()

    return accuracy


def _judged(score: Callable[..., jax.Array], pools: Pools, test: Batch, student: Variables) -> dict[str, float]:
    return {"assess": float(score(student, pools.assess)), "accuracy": float(score(student, test))}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies, and what tuning gains over each control, paired over seeds."""
    if not rows:
        return "MNIST is not at hand."
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        points.setdefault(row["contender"], {})[row["seed"]] = 100 * row["accuracy"]
    seeds = sorted(set.intersection(*({*by_seed} for by_seed in points.values())))
    grid = {name: by_seed for name, by_seed in points.items() if name.startswith("T =")}
    best = max(grid, key=lambda name: np.mean([grid[name][seed] for seed in seeds]))
    chosen = [_chosen(rows, seed) for seed in seeds]
    drawn = [float(np.mean([by_seed[seed] for by_seed in grid.values()])) for seed in seeds]
    controls = {
        f"the best cell ({best})": [grid[best][seed] for seed in seeds],
        "the cell that assess picks": chosen,
        "a cell drawn at random": drawn,
    } | ({_cell(DEFAULT): [grid[_cell(DEFAULT)][s] for s in seeds]} if _cell(DEFAULT) in grid else {})
    controls["the default, longer"] = [points["default, longer"][seed] for seed in seeds]
    body = []
    for start in STARTS:
        ours = [points[_from(start)][seed] for seed in seeds]
        found = [row for row in rows if row["contender"] == _from(start)]
        ends = ", ".join(f"{what} {np.mean([row[what] for row in found]):.2f}" for what in ("temperature", "mix"))
        body.append([_from(start), statistics.plus_minus(statistics.mean(ours), 2), ends])
        frozen = [points[f"frozen, {_from(start)}"][seed] for seed in seeds]
        body.append(["... frozen from the start of a new run", statistics.plus_minus(statistics.mean(frozen), 2), ""])
    body += [[name, statistics.plus_minus(statistics.mean(values), 2), ""] for name, values in controls.items()]
    lines = [statistics.markdown(["contender", "test accuracy, % (95 % t interval)", "in the end"], body)]
    for start in STARTS:
        ours = [points[_from(start)][seed] for seed in seeds]
        gains = {name: statistics.paired(ours, values) for name, values in controls.items()}
        told = "; ".join(f"{statistics.spread(gain, 2)} over {name}" for name, gain in gains.items())
        verdict = statistics.verdict(next(iter(gains.values())), TARGET)
        lines.append(f"{_from(start)}: {told}. Target ≥ {TARGET:g} over the best cell: {verdict}.")
    return "\n\n".join([*lines, f"Points, paired over {len(seeds)} seeds."])


def _chosen(rows: Sequence[dict[str, Any]], seed: int) -> float:
    """The test accuracy, in percent, of the cell that is best on assess."""
    mine = [row for row in rows if row["seed"] == seed and row["contender"].startswith("T =")]
    return 100 * float(max(mine, key=lambda row: row["assess"])["accuracy"])
