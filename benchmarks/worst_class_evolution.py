"""Can a population find what gradients do not? The worst class of a converged student on an imbalanced MNIST.

Data, teacher and student are those of `guard_steering.py`, with other seeds. A student is trained to convergence, by plain
distillation (T = 4 and a tenth of cross entropy) or by the same with equal weight for every class. Then each contender
continues from it at equal cost, by its bare trajectory without EV3:

- gradient arms on explore, in batches of 128, and the balanced ones also on explore and assess together;
- an evolution strategy on worst-class accuracy itself, which has no gradient. It moves the biases of the last layer or the
  whole last layer, on batches of 2,048 examples of assess. A third one moves the biases on explore, which the student has
  memorized, so that the worst class is less visible there. Three forward passes count as one training step, so a generation
  costs as many steps of 128 as its members' examples make.

The same question is asked of the student in integers (8-bit matrices, one symmetric scale each): evolution of the last layer
on the accuracy of the quantized student, beside gradient arms that do not know about quantization.

An arm that learns from assess makes assess an optimistic judge of it in an EV3 run. Decide is not affected.

Figures are those of the population, as in `guard_steering.py`. The best gradient arm is picked by hindsight, by these
figures.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.arms.evolution_arm import evolution_arm
from ev3_distill.benchmarks import datasets, guard_steering, statistics, trajectories
from ev3_distill.config import EV3
from ev3_distill.core.explore import draw_from
from ev3_distill.data import batches
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.evolution import EvolutionConfig, parameters_named
from ev3_distill.tasks.classification import example_scores, steering
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Apply, Arm, Network, Pools, PyTree, Stretch, Variables

KEY = ("seed", "start", "contender")  # identifies a row
INTERVALS = "Intervals are Student's t, 95 %, over seeds; comparisons are paired by seed."
FIRST_SEED = 4000  # rates and populations were chosen on seeds below 4000
STARTS = ("kd4", "kd4-balanced")
GRADIENTS = ("kd4", "ce", "kd4-balanced", "ce-balanced", "ce-half-balanced")
BALANCED = ("kd4-balanced", "ce-balanced")
BATCH = 2048  # examples per generation
BIASES, HEAD = parameters_named(r"\[1\]\['bias'\]"), parameters_named("head")
WORST = ("evolution, last biases", "evolution, last layer", "evolution, last biases, on explore")
INT8 = "evolution, as int8"
COST = {"full": 8000, "smoke": 400}  # of the first training, and of each continuation
FIGURES = {
    "worst_class_accuracy": "worst class",
    "accuracy": "accuracy",
    "int8_accuracy": "accuracy as int8",
}
COMPARED = ((WORST[:2], "worst_class_accuracy"), ((INT8,), "int8_accuracy"))
GENERATIONS = 768  # times pairs: about the number that the cost allows; the rate falls to zero over them
LEVELS = 127  # of int8 on each side of zero


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed, start and contender.

    Args:
      seeds: number of seeds from FIRST_SEED.
      size: full, or smoke: digits instead of MNIST, at a twentieth of the cost.
      done: keys of rows to skip.
    """
    source = datasets.required_source("digits" if size == "smoke" else "mnist")
    yield from rows_of(load_data(source), [FIRST_SEED + seed for seed in range(seeds)], size, done)


def rows_of(
    dataset: Dataset, seeds: Sequence[int], size: str, done: Collection[tuple[Any, ...]] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of given seeds."""
    shape, classes, cost = dataset.inputs.shape[1:], dataset.num_classes, COST[size]
    student, teacher = (
        students.from_name(name, shape, classes) for name in (guard_steering.STUDENT, guard_steering.TEACHER)
    )
    in_int8 = dataclasses.replace(student, apply=quantized(student.apply))
    trainer = Distillation(teacher, arms_named(teacher.apply, ("ce-slow",)))
    first = {start: trajectories.bare_trajectory(student, arms_named(student.apply, (start,))[0]) for start in STARTS}
    continued = contenders(student)
    for seed in seeds:
        if all((seed, start, name) in done for start in STARTS for name in ("stays", *continued)):
            continue
        used, unused = guard_steering.imbalanced(dataset, seed)
        blank = np.zeros((len(used.labels), classes), np.float32)
        pools, _ = batches.split(used, blank, seed=seed, fractions=guard_steering.FRACTIONS)
        teacher_variables = trainer.complete(pools, seed, budget=guard_steering.TEACHER_COST[size]).current.variables
        logits = forward(teacher, teacher_variables)(np.asarray(used.inputs))
        pools, test = batches.split(used, logits, seed=seed, fractions=guard_steering.FRACTIONS, final=False)
        share = np.bincount(used.labels, minlength=classes) / len(used.labels)
        inputs = np.concatenate([np.asarray(test.inputs), unused.inputs])
        labels = np.concatenate([np.asarray(test.targets), unused.labels])
        for start in STARTS:
            trained = first[start](pools, seed, cost)
            for name in ("stays", *continued):
                if (seed, start, name) in done:
                    continue
                variables = trained if name == "stays" else continued[name](trained, pools, seed, cost)
                figures = guard_steering.measured(forward(student, variables)(inputs), labels, share)
                of_int8 = guard_steering.measured(forward(in_int8, variables)(inputs), labels, share)["accuracy"]
                yield {
                    "seed": seed,
                    "start": start,
                    "contender": name,
                    "cost": cost,
                    **figures,
                    "int8_accuracy": of_int8,
                }


def contenders(student: Network) -> dict[str, Callable[..., Variables]]:
    """By name: (student, pools, seed, steps of the default batch size) -> the student that an arm's trajectory proposes."""
    usual = EV3().batch_size
    continued = {arm.name: _continuing(arm, "explore", usual) for arm in arms_named(student.apply, GRADIENTS)}
    for arm in arms_named(student.apply, BALANCED):
        continued[f"{arm.name}, with assess"] = _continuing(arm, "both", usual)
    worst = steering.goal("worst_class_accuracy", 0).score
    of_biases = BIASES, EvolutionConfig(pairs=8, sigma=0.3), 0.1
    of_head = HEAD, EvolutionConfig(pairs=16, sigma=0.1), 0.03
    strategies = (
        (WORST[0], "assess", student.apply, worst, of_biases),
        (WORST[1], "assess", student.apply, worst, of_head),
        (WORST[2], "explore", student.apply, worst, of_biases),
        (INT8, "assess", quantized(student.apply), example_scores.accuracy, of_head),
    )
    for name, where, apply, objective, (subspace, config, rate) in strategies:
        schedule = optax.cosine_decay_schedule(rate, GENERATIONS // config.pairs)
        arm = evolution_arm(name, apply, objective, optax.adam(schedule), config, subspace=subspace)
        continued[name] = _continuing(arm, where, BATCH)
    return continued


def _continuing(arm: Arm, where: str, batch_size: int) -> Callable[..., Variables]:
    @jax.jit
    def run(student: Variables, examples: PyTree, seed: int, steps: int) -> Variables:
        draw = draw_from(examples, batches.sampler(batch_size=batch_size), jax.random.key(seed))
        own = steps * EV3().batch_size // batch_size
        whole = Stretch(jnp.int32(0), jnp.int32(own), jnp.float32(0), jnp.float32(1 / own))
        return arm.propose(arm.init(student), draw, whole)[1]

    return lambda student, pools, seed, steps: run(student, _examples(pools, where, seed), seed, steps)


def _examples(pools: Pools, where: str, seed: int) -> PyTree:
    """The examples that an arm learns from: explore, assess, or both."""
    explore, assess = pools.explore.examples, pools.assess
    if where == "explore":
        return pools.explore
    logits = [assess.teacher["logits"]]
    if where != "assess":
        logits = [explore.teacher["logits"][0], *logits]
    of = [assess] if where == "assess" else [explore, assess]
    inputs, labels, index = (
        np.concatenate([np.asarray(getattr(part, field)) for part in of]) for field in ("inputs", "targets", "index")
    )
    return batches.resident(inputs, labels, index, {"logits": np.concatenate(logits)[None]}, seed=seed)


def quantized(apply: Apply) -> Apply:
    """The forward pass with every matrix rounded to 255 multiples of its scale."""

    def rounded(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        scale = jnp.maximum(jnp.abs(leaf).max(), 1e-30) / LEVELS
        return jnp.round(leaf / scale) * scale

    def of_rounded(variables: Variables, inputs: jax.Array, **how: Any) -> tuple[jax.Array, Variables]:
        return apply(variables._replace(params=jax.tree.map(rounded, variables.params)), inputs, **how)

    return of_rounded


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures by start and contender, and evolution against the best gradient arm, paired by seed."""
    parts = []
    for start in dict.fromkeys(row["start"] for row in rows):
        own = [row for row in rows if row["start"] == start]
        names = list(dict.fromkeys(row["contender"] for row in own))
        of = {name: [row for row in own if row["contender"] == name] for name in names}
        body = [
            [
                name,
                *[
                    statistics.plus_minus(statistics.mean([100 * row[figure] for row in of[name]]), 2)
                    for figure in FIGURES
                ],
            ]
            for name in names
        ]
        parts.append(
            f"From {start}, converged:\n\n"
            + statistics.markdown(["contender", *[f"{f}, %" for f in FIGURES.values()]], body)
        )
        parts.append("\n".join(f"- {_against(of, *compared)}" for compared in COMPARED))
    n = len({row["seed"] for row in rows})
    return "\n\n".join([f"Means over {n} seeds with 95 % t intervals, {rows[0]['cost']:,} steps each.", *parts])


def _against(of: Mapping[str, Sequence[dict[str, Any]]], names: Sequence[str], figure: str) -> str:
    """The best of some evolution strategies minus the best gradient arm, both by hindsight."""

    def best(among: Sequence[str]) -> str:
        return max(among, key=lambda name: sum(row[figure] for row in of[name]))

    ours, theirs = best(names), best([name for name in of if not name.startswith("evolution")])
    margin = statistics.paired(*[[100 * row[figure] for row in of[name]] for name in (ours, theirs)])
    return (
        f"{FIGURES[figure]}: {ours} minus {theirs}: {statistics.spread(margin, 2)} points, target > 0: "
        f"{statistics.verdict(margin, 0)}"
    )
