"""What does one meta step cost? Temporary memory of compiled programs, and seconds in one process, in turns.

Beside the methods of `ev3_distill/hypergrad/one_step.py`: a training step of plain distillation, and the exact hypergradient
of one step by reverse over reverse and by mixed mode. `jvp`, `guided` and `t1t2` reuse the gradient of the training step.

Reference:
  Kemaev et al., Scalable meta-learning via mixed-mode differentiation, 2025 (MixFlow-MG).
"""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.arms.tunable_loss import distillation
from ev3_distill.arms.tuned_arm import VAL_PARTS
from ev3_distill.benchmarks import statistics
from ev3_distill.hypergrad import TrainLoss, ValLoss, hypergradient, student_train_loss, student_val_loss
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Network, PyTree, Variables

BATCH = {"full": 128, "smoke": 8}
NETWORKS = {  # by their names in rows
    "full": {f"resnet{depth}": f"resnet:depth={depth}" for depth in (8, 14, 20, 32)},
    "smoke": {"mlp": "mlp:hidden=8"},
}
IMAGE = {"full": (32, 32, 3), "smoke": (8, 8, 3)}
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
EVERY = 5  # training steps per meta step
REVERSE = "reverse over reverse"
MANY, FEW = "evograd, K = 64", "evograd, K = 2"
MEMORY = (
    ("jvp", "plain KD", 1.15),
    ("jvp", REVERSE, 0.5),
    (MANY, FEW, 1.05),
)  # largest allowed ratio of one to the other
TIME = (("jvp", REVERSE, 0.7), (f"{EVERY} steps of tuned KD", f"{EVERY} steps of plain KD", 1.4))


class Student(NamedTuple):
    """A student in training."""

    variables: Variables
    opt_state: PyTree


class Inputs(NamedTuple):
    """The inputs of every program."""

    key: jax.Array
    student: Student
    hyper: PyTree
    batch: Batch
    val: Batch  # held out
    gradient: PyTree  # of a training step


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A row of temporary bytes per network, then one of seconds per turn."""
    for name in NETWORKS[size]:
        if ("memory", name, 0) not in done:
            named, inputs, params = programs(name, size)
            temporary = {program: _temporary(run, inputs) for program, run in named.items()}
            facts = {"question": "memory", "contender": name, "seed": 0}
            yield facts | {"params": params, "temporary": temporary}
    smallest = next(iter(NETWORKS[size]))
    left = [seed for seed in range(seeds) if ("time", smallest, seed) not in done]
    if left:
        named, inputs, _ = programs(smallest, size)
        named.pop(MANY)
        for program in named.values():
            jax.block_until_ready(program(inputs))  # compiles
        for seed in left:
            yield {"question": "time", "contender": smallest, "seed": seed, "seconds": _turn(named, inputs, seed)}


def _temporary(program: Any, inputs: Inputs) -> int:
    """Temporary bytes of a program, without its arguments and results."""
    return int(program.lower(inputs).compile().memory_analysis().temp_size_in_bytes)


def _turn(named: dict[str, Any], inputs: Inputs, seed: int) -> dict[str, float]:
    """Seconds of every program, run once in varying order."""
    names, seconds = list(named), {}
    for name in names[seed % len(names) :] + names[: seed % len(names)]:
        began = time.perf_counter()
        jax.block_until_ready(named[name](inputs))
        seconds[name] = round(time.perf_counter() - began, 5)
    return {name: seconds[name] for name in names}


def initial_hyperparameters(size: str) -> PyTree:
    """Temperature, mix, and the example weights of a batch."""
    return {"temperature": jnp.float32(4), "mix": jnp.array([0.9, 0.1]), "weights": jnp.ones(BATCH[size])}


def losses_of(network: Network, variables: Variables, train: Batch, val: Batch) -> tuple[TrainLoss, ValLoss]:
    """The loss of tuned distillation on one batch, and of the labels on another."""
    tuned = lambda hyper, logits, batch: distillation(hyper)(logits, batch)  # noqa: E731
    train_loss = student_train_loss(network.apply, variables.stats, train, tuned)
    return train_loss, student_val_loss(network.apply, variables.stats, val, losses.cross_entropy(), parts=VAL_PARTS)


def train(network: Network, student: Student, hyper: PyTree, batch: Batch) -> tuple[Student, PyTree]:
    """One step of plain distillation; also returns the gradient."""

    def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
        logits, after = network.apply(Variables(params, student.variables.stats), batch.inputs, train=True)
        return distillation(hyper)(logits, batch), after.stats

    gradient, stats = jax.grad(objective, has_aux=True)(student.variables.params)
    updates, opt_state = OPTIMIZER.update(gradient, student.opt_state, student.variables.params)
    params = optax.apply_updates(student.variables.params, updates)
    return Student(Variables(params, stats), opt_state), gradient


def initial_student(network: Network, seed: int) -> Student:
    """A student before its first step."""
    variables = network.init(jax.random.key(seed))
    return Student(variables, OPTIMIZER.init(variables.params))


def _random_batch(rng: np.random.Generator, n: int, shape: tuple[int, ...]) -> Batch:
    return Batch(
        jnp.asarray(rng.random((n, *shape)), jnp.float32), jnp.asarray(rng.integers(0, 10, n)),
        {"logits": jnp.asarray(rng.normal(0, 3, (n, 10)), jnp.float32)}, jnp.arange(n), jnp.ones(n),
    )  # fmt: skip


def programs(name: str, size: str) -> tuple[dict[str, Any], Inputs, int]:
    """Jitted programs by name, their common inputs, and the number of the network's parameters."""
    shape = IMAGE[size]
    network = students.from_name(NETWORKS[size][name], shape, 10)
    student = initial_student(network, 0)
    rng, n = np.random.default_rng(0), BATCH[size]
    batch, val = (_random_batch(rng, n, shape) for _ in range(2))
    params = student.variables.params
    # Only the shape of the gradient matters.
    inputs = Inputs(jax.random.key(0), student, initial_hyperparameters(size), batch, val, gradient=params)

    def plain(inputs: Inputs) -> Any:
        return train(network, inputs.student, inputs.hyper, inputs.batch)

    def meta(inputs: Inputs, *, method: str, **options: Any) -> Any:
        student = inputs.student
        of = losses_of(network, student.variables, inputs.batch, inputs.val)
        if method != "evograd":
            options |= {"optimizer": OPTIMIZER, "opt_state": student.opt_state}
        if method in ("jvp", "t1t2", "guided"):
            options |= {"gradient": inputs.gradient}
        return hypergradient(inputs.key, student.variables.params, inputs.hyper, *of, method=method, **options)

    def mixed(inputs: Inputs) -> Any:
        student = inputs.student
        train_loss, val_loss = losses_of(network, student.variables, inputs.batch, inputs.val)
        gradient = _mixed_mode(train_loss)

        def reached(hyper: PyTree) -> jax.Array:
            params = student.variables.params
            updates, _ = OPTIMIZER.update(gradient(params, hyper), student.opt_state, params)
            return val_loss(optax.apply_updates(params, updates))

        return jax.value_and_grad(reached)(inputs.hyper)

    def steps(inputs: Inputs, *, tuned: bool) -> Any:
        def ahead(i: Any, student: Student) -> Student:
            return train(network, student, inputs.hyper, inputs.batch)[0]

        student = jax.lax.fori_loop(0, EVERY - 1, ahead, inputs.student)
        after, gradient = train(network, student, inputs.hyper, inputs.batch)
        return after, meta(inputs._replace(student=student, gradient=gradient), method="jvp") if tuned else ()

    named: dict[str, Callable[[Inputs], Any]] = {
        "plain KD": plain,
        "jvp": functools.partial(meta, method="jvp"),
        "guided": functools.partial(meta, method="guided"),
        FEW: functools.partial(meta, method="evograd", copies=2),
        MANY: functools.partial(meta, method="evograd", copies=64),
        "t1t2": functools.partial(meta, method="t1t2"),
        "mixed mode": mixed,
        REVERSE: functools.partial(meta, method="unrolled"),
        f"{EVERY} steps of plain KD": functools.partial(steps, tuned=False),
        f"{EVERY} steps of tuned KD": functools.partial(steps, tuned=True),
    }
    return {name: jit(program) for name, program in named.items()}, inputs, sum(x.size for x in jax.tree.leaves(params))


def _mixed_mode(loss: Callable[..., jax.Array]) -> Callable[..., PyTree]:
    """The gradient of a loss in its first argument; its own reverse mode is forward over reverse (MixFlow-MG)."""

    @jax.custom_vjp
    def gradient(params: PyTree, hyper: PyTree) -> PyTree:
        return jax.grad(loss)(params, hyper, 0)

    def forwards(params: PyTree, hyper: PyTree) -> tuple[PyTree, Any]:
        return gradient(params, hyper), (params, hyper)

    def backwards(residuals: Any, cotangent: PyTree) -> Any:
        params, hyper = residuals
        both = jax.grad(loss, (0, 1))
        return jax.jvp(lambda theta: both(theta, hyper, 0), (params,), (cotangent,))[1]

    gradient.defvjp(forwards, backwards)
    return gradient


def table_of_memory(rows: Sequence[dict[str, Any]]) -> str:
    """Temporary memory of each program, by network."""
    names = list(rows[0]["temporary"])
    body = [[name, *[f"{row['temporary'][name] / 2**20:,.0f}" for row in rows]] for name in names]
    verdicts = []
    for one, other, target in MEMORY:
        worst = max(row["temporary"][one] / row["temporary"][other] for row in rows)
        verdicts.append(f"{one} / {other}: {worst:.2f}, target ≤ {target:g}: {_held(worst, target)}")
    header = ["temporary memory, MiB", *[f"{row['contender']} ({row['params']:,} parameters)" for row in rows]]
    return f"{statistics.markdown(header, body)}\n\nThe largest ratios: {'; '.join(verdicts)}."


def table_of_time(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over turns; ratios are taken within a turn."""
    medians = {name: statistics.median([1000 * row["seconds"][name] for row in rows]) for name in rows[0]["seconds"]}
    body = [[name, statistics.spread(estimate, 0)] for name, estimate in medians.items()]
    verdicts = []
    for one, other, target in TIME:
        ratio = statistics.median([row["seconds"][one] / row["seconds"][other] for row in rows])
        verdicts.append(
            f"{one} / {other}: {statistics.spread(ratio, 2)}, target ≤ {target:g}: {_held(ratio.center, target)}"
        )
    of = f"Medians of {len(rows)} turns ({medians['plain KD'].confidence:.0%} interval)"
    shown = statistics.markdown([f"{rows[0]['contender']}, one program", "ms"], body)
    return f"{shown}\n\n{of}. {'; '.join(verdicts)}."


def _held(value: float, target: float) -> str:
    return "held" if value <= target else "missed"
