"""Which hypergradient is right, and what does it cost? Every method beside EvoGrad as published.

Three questions, each with rows of its own:

- `one dimension`: mean and spread on the paper's problem, against the truth and against the closed form of its setting
  (`benchmarks/hypergradient_one_dimension.py`), with its two plots.
- `cosine`: the cosine with the exact hypergradient of one training step. A ResNet-8 is in training; temperature, mix and a
  weight for each of the batch's 128 examples are tuned.
- `memory` and `time` of one meta step, beside a training step of plain distillation and the same hypergradient by reverse
  over reverse: temporary bytes of the compiled programs, for networks of several sizes; and seconds in one process, in turns.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ev3_distill import students
from ev3_distill.benchmarks import datasets, hypergradient_cost, hypergradient_one_dimension, statistics
from ev3_distill.benchmarks.hypergradient_cost import BATCH, OPTIMIZER, REVERSE, Student
from ev3_distill.data.sources import load_data
from ev3_distill.hypergrad import hypergradient
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Batch, Network, PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = ("question", "contender", "seed")  # identifies a row
TIMED = ("seconds",)  # depend on the machine
REPETITION = "repetition"
INTERVALS = (
    "Cosines have 95 % t intervals over students; times are medians over turns with distribution-free "
    "intervals. Ratios of time are taken within a turn. Memory is counted once: compiled programs have a fixed "
    "size."
)
AGES = {"full": (10, 100), "smoke": (2,)}  # training steps before the cosine is measured
COPIES = {"full": (2, 8, 32, 128), "smoke": (2, 4)}
COSINES = {"jvp": 0.999, "guided": 0.99}


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """Rows of every question.

    Args:
      seeds: number of blocks of trials, of students, and of turns of timing.
      size: full, or smoke: small images, few copies.
      done: keys of rows to skip.
    """
    yield from hypergradient_one_dimension.collect(seeds=seeds, size=size, done=done)
    yield from _cosines(seeds=seeds, size=size, done=done)
    yield from hypergradient_cost.collect(seeds=seeds, size=size, done=done)


def _batches(size: str, seed: int) -> Callable[[int], Batch]:
    """step -> batch of real images (MNIST if available, else digits) with a teacher that blurs the labels."""
    source = datasets.source_of("mnist") if size == "full" else None
    dataset = load_data(source or "digits")
    rng = np.random.default_rng(seed)
    blurred = rng.normal(0, 1, (len(dataset.labels), 10)) + 6 * np.eye(10)[dataset.labels]

    def batch(step: int) -> Batch:
        rows = np.random.default_rng((seed, step)).choice(len(dataset.labels), BATCH[size], replace=False)
        inputs = np.asarray(dataset.inputs[rows])
        scale = 255 if inputs.dtype == np.uint8 else 1
        return Batch(
            jnp.asarray(inputs / scale, jnp.float32), jnp.asarray(dataset.labels[rows], jnp.int32),
            {"logits": jnp.asarray(blurred[rows], jnp.float32)}, jnp.arange(len(rows)), jnp.ones(len(rows)),
        )  # fmt: skip

    return batch


def _cosines(*, seeds: int, size: str, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    hyper = hypergradient_cost.initial_hyperparameters(size)
    contenders: dict[str, dict[str, Any]] = {
        REVERSE: {"method": "unrolled"},
        "jvp": {"method": "jvp"},
        "t1t2": {"method": "t1t2"},
        "guided": {"method": "guided"},
        **{f"evograd, K = {k}": {"method": "evograd", "copies": k} for k in COPIES[size]},
    }
    network, methods = None, {}
    for seed in range(seeds):
        if all(("cosine", f"{age} steps", seed) in done for age in AGES[size]):
            continue
        batch = _batches(size, seed)
        if network is None:
            shape = batch(0).inputs.shape[1:]
            network = students.from_name(next(iter(hypergradient_cost.NETWORKS[size].values())), shape, 10)
            methods = {name: _method(network, options) for name, options in contenders.items()}
            train = jit(functools.partial(hypergradient_cost.train, network))
        student = hypergradient_cost.initial_student(network, seed)
        for step in range(max(AGES[size]) + 1):
            if step in AGES[size] and ("cosine", f"{step} steps", seed) not in done:
                key = jax.random.key(seed)
                inputs = key, student, hyper, batch(step), batch(10_000 + step)
                found = {name: np.asarray(method(*inputs), float) for name, method in methods.items()}
                exact = found.pop(REVERSE)
                yield {
                    "question": "cosine", "contender": f"{step} steps", "seed": seed,
                    "cosine": {name: _cosine(one, exact) for name, one in found.items()},
                    "weights": {name: _cosine(one[-BATCH[size] :], exact[-BATCH[size] :]) for name, one in found.items()},
                    "ratio": {
                        name: float(np.linalg.norm(one) / np.linalg.norm(exact)) for name, one in found.items()
                    },
                }  # fmt: skip
            student, _ = train(student, hyper, batch(step))


def _method(network: Network, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """(key, student, hyper, batch, held-out batch) -> the hypergradient as one vector."""
    evograd = options["method"] == "evograd"

    @jit
    def method(key: jax.Array, student: Student, hyper: PyTree, train: Batch, val: Batch) -> jax.Array:
        own = {"rate": 0.05} if evograd else {"optimizer": OPTIMIZER, "opt_state": student.opt_state}
        train_loss, val_loss = hypergradient_cost.losses_of(network, student.variables, train, val)
        params = student.variables.params
        return ravel_pytree(hypergradient(key, params, hyper, train_loss, val_loss, **own, **options)[0])[0]

    return method


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _of(rows: Sequence[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["question"] == question]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table per question, with its targets."""
    return "\n\n".join(
        [
            hypergradient_one_dimension.table(rows),
            _cosine_table(_of(rows, "cosine")),
            hypergradient_cost.table_of_memory(_of(rows, "memory")),
            hypergradient_cost.table_of_time(_of(rows, "time")),
        ]
    )


def _cosine_table(rows: Sequence[dict[str, Any]]) -> str:
    ages, names = list(dict.fromkeys(row["contender"] for row in rows)), list(rows[0]["cosine"])
    body, verdicts = [], []
    for name in names:
        cells = []
        for age in ages:
            mine = [row for row in rows if row["contender"] == age]
            cosines, weights = (statistics.mean([row[of][name] for row in mine]) for of in ("cosine", "weights"))
            ratio = np.mean([row["ratio"][name] for row in mine])
            cells += [statistics.plus_minus(cosines, 4), statistics.plus_minus(weights, 4), f"{ratio:.2f}"]
        body.append([name, *cells])
    for name, target in COSINES.items():
        least = min(row["cosine"][name] for row in rows)
        verdicts.append(f"{name}: least {least:.5f}, target ≥ {target:g}: {'held' if least >= target else 'missed'}")
    header = [
        "hypergradient of T, mix, weights",
        *[f"{cell}, {age}" for age in ages for cell in ("cosine", "weights alone", "length")],
    ]
    return statistics.markdown(header, body) + "\n\n" + "; ".join(verdicts) + "."


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """The paper's two plots of the 1-D problem, the cosine over copies, and memory over the network's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), layout="constrained")
    axes = figure.subplots(3, 3)
    hypergradient_one_dimension.draw(rows, axes[:2])
    _draw_cosines(_of(rows, "cosine"), axes[2, 0])
    for axis, relative in ((axes[2, 1], False), (axes[2, 2], True)):
        _draw_memory(_of(rows, "memory"), axis, relative)
    return figure


def _draw_cosines(rows: Sequence[dict[str, Any]], axis: "Axes") -> None:
    for age in dict.fromkeys(row["contender"] for row in rows):
        mine = [row["weights"] for row in rows if row["contender"] == age]
        found = {name: np.mean([abs(cosines[name]) for cosines in mine]) for name in mine[0]}
        copies = [name for name in found if name.startswith("evograd")]
        axis.plot([int(name.partition("=")[2]) for name in copies], [found[name] for name in copies], "o-", label=age)
    axis.axhline(1, color="0.5", lw=0.8, ls=":", label="jvp, guided")
    axis.set(
        xscale="log", yscale="log", xlabel="copies of evograd", ylabel="mean |cosine| of the weights' hypergradient"
    )
    axis.legend(fontsize="small", frameon=False)


def _draw_memory(rows: Sequence[dict[str, Any]], axis: "Axes", relative: bool) -> None:
    sizes = [row["params"] for row in rows]
    for name in ("plain KD", "jvp", "guided", hypergradient_cost.MANY, "mixed mode", REVERSE):
        unit = [row["temporary"]["plain KD"] if relative else 2**20 for row in rows]
        axis.plot(sizes, [row["temporary"][name] / u for row, u in zip(rows, unit, strict=True)], "o-", label=name)
    ylabel = "relative to plain KD" if relative else "temporary memory, MiB"
    axis.set(xscale="log", ylim=(0, None), xlabel="parameters of the ResNet", ylabel=ylabel)
    if not relative:
        axis.legend(fontsize="small", frameon=False)
