"""What does a population cost? Evaluations per second, bytes per member, and memory against reverse mode.

Speed: generations of 64 antithetic pairs, all contenders in turns of a second within one process, in another order each time;
evaluations of members per second, compilation excluded.

- `full rank` and `rank 1`: `ev3_distill.evolution.estimate`, as it comes, noise held where it fits, spread over all
  devices of all processes, while the others have one;
- `ask, vmap, tell`: the usual way, written here: all noise and all members at once, [N, P] each, `vmap` over members;
- `evosax`: Open-ES of that library, where it is installed (it is no dependency), the same way;
- `no noise`: forward passes of the mean on as many examples as the members see, in as large batches as `rank 1` takes.

Memory of a population: temporary buffers of the compiled generation, by XLA's own account, of a Conv4 of 64 filters; what the
usual way would hold is N P floats, and as many members. And the peak resident set of a process that runs a generation.

Memory against reverse mode: temporary buffers of one compiled evaluation of a member (its noise and parameters included),
beside those of the gradient by reverse mode of the same loss, Conv4 of 8 filters, 28x28. Two tasks grow: a learner is trained
for T steps of gradient descent on 25 images before its loss on 25 others counts (MAML, arXiv 1703.03400); and an episode of
n images is embedded whole by batch statistics, or by running ones in parts of 50, which the evaluation can do and reverse mode
cannot use, since it keeps the activations of all parts.
"""

import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.benchmarks import statistics
from ev3_distill.evolution import Fitness, Population, estimate
from ev3_distill.runtime import distributed
from ev3_distill.runtime.compile import jit
from ev3_distill.types import Network, PyTree, Variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("seed", "question", "at")  # identifies a row
TIMED = ("per_s",)  # depend on the machine
REPETITION = "turn"
INTERVALS = (
    "Speeds are medians over turns, with distribution-free intervals between order statistics; ratios are "
    "taken within a turn. Memory is counted once: compiled programs have a fixed size."
)
PAIRS = {"full": 64, "smoke": 4}
STUDENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {"mlp:hidden=64-64": (64,), "conv4:width=8": (28, 28, 1), "conv4:width=64": (28, 28, 1)},
    "smoke": {"mlp:hidden=16": (8,)},
}
EXAMPLES = {1: 128, 3: 25}  # that a member sees, by the axes of an input
MEMBERS = {"full": (1024, 8192, 65536), "smoke": (64, 128)}
STEPS = {"full": (1, 4, 16, 32, 64, 256), "smoke": (2,)}
IMAGES = {"full": (50, 200, 800, 3200), "smoke": (50,)}
PART = 50  # images that an evaluation embeds at once
SIGMA = 0.05
TURN_S = {"full": 1.0, "smoke": 0.01}  # that each contender has in a turn, about: whole generations
TARGETS = {"full rank": ("ask, vmap, tell", 1.0), "rank 1": ("no noise", 0.7)}
BYTES_PER_MEMBER, AT_MOST = 16, 64 * 2**20  # of a population; of noise and optimizer state at the largest
MANY = 40  # times less memory than reverse mode: the paper's figure


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per turn and student for speed; one per length for memory, which has no seed.

    Args:
      seeds: turns.
      size: full, or smoke, which proves nothing.
      done: keys of rows to leave out.
    """
    yield from _memory(size, done)
    for name in STUDENTS[size]:
        if all((seed, "speed", name) in done for seed in range(seeds)):
            continue
        field = contenders(name, STUDENTS[size][name], PAIRS[size])
        for work in field.values():
            jax.block_until_ready(work(jax.random.key(0)))  # compiles
        times = {name: max(1, round(TURN_S[size] / _seconds(work, 1))) for name, work in field.items()}
        for seed in range(seeds):
            if (seed, "speed", name) in done:
                continue
            speed = {}
            for i in range(len(field)):
                contender = list(field)[(seed + i) % len(field)]
                members = 2 * PAIRS[size] * times[contender]
                speed[contender] = round(members / _seconds(field[contender], times[contender], seed), 2)
            speed = {contender: speed[contender] for contender in field}
            yield {"seed": seed, "question": "speed", "at": name, "per_s": speed, "devices": jax.device_count()}


def _seconds(work: Callable[[jax.Array], PyTree], times: int, seed: int = 0) -> float:
    """That so many generations take."""
    began = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(work(jax.random.key(seed)))
    return time.perf_counter() - began


def contenders(name: str, shape: Sequence[int], pairs: int) -> dict[str, Callable[[jax.Array], PyTree]]:
    """By name, key of a generation -> something computed of all its members."""
    network = students.named(name, shape, 5)
    variables = network.init(jax.random.key(0))
    problem = _problem(network, shape)
    fitness, params = problem.fitness, variables.params

    def ours(rank: int | None) -> Callable[[jax.Array], PyTree]:
        mesh = distributed.mesh_of()
        spread = distributed.spread_over(mesh) if mesh.size > 1 else distributed.Spread()

        def generation(key: jax.Array, params: PyTree) -> PyTree:
            now = jax.random.wrap_key_data(key)
            return estimate(now, params, fitness, Population(pairs=pairs, sigma=SIGMA, rank=rank), spread=spread)[0]

        run = jit(generation if mesh.size == 1 else distributed.everywhere(generation, mesh))
        given = params if mesh.size == 1 else distributed.replicate(params, mesh)
        return lambda key: run(np.asarray(jax.random.key_data(key)), given)

    field = {"full rank": ours(None), "rank 1": ours(1), "ask, vmap, tell": _usual(fitness, params, pairs)}
    if (evosax := _evosax(fitness, params, pairs)) is not None:
        field["evosax"] = evosax
    together = 8  # members

    @jit
    def no_noise(inputs: jax.Array) -> jax.Array:
        def some(i: jax.Array) -> jax.Array:
            many = jnp.tile(inputs + 1e-3 * i, (together, *[1] * (inputs.ndim - 1)))
            return network.apply(variables, many, train=True)[0].sum()

        return jax.lax.map(some, jnp.arange(2 * pairs // together, dtype=jnp.float32))

    field["no noise"] = lambda key: no_noise(problem.inputs)
    return field


class _Problem(NamedTuple):
    inputs: jax.Array  # [B, ...]
    fitness: Fitness


def _problem(network: Network, shape: Sequence[int]) -> _Problem:
    """Random examples with random labels: what they are costs nothing and changes nothing."""
    rng = np.random.default_rng(0)
    count = EXAMPLES[len(shape)]
    inputs = jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, count))
    stats = _zeros(network).stats

    def fitness(params: PyTree, key: jax.Array) -> jax.Array:
        logits = network.apply(Variables(params, stats), inputs, train=True)[0]
        return jax.nn.log_softmax(logits)[jnp.arange(count), labels].mean()

    return _Problem(inputs, fitness)


def _usual(fitness: Fitness, params: PyTree, pairs: int) -> Callable[[jax.Array], PyTree]:
    vector, back = jax.flatten_util.ravel_pytree(params)

    @jit
    def generation(key: jax.Array, vector: jax.Array) -> jax.Array:
        half = jax.random.normal(key, (pairs, vector.size))
        population = vector + SIGMA * jnp.concatenate([half, -half])
        scores = jax.vmap(lambda member: fitness(back(member), key))(population)
        ranks = jnp.argsort(jnp.argsort(scores)) / (2 * pairs - 1) - 0.5
        return ranks @ ((population - vector) / SIGMA) / (2 * pairs * SIGMA)

    return lambda key: generation(key, vector)


def _evosax(fitness: Fitness, params: PyTree, pairs: int) -> Callable[[jax.Array], PyTree] | None:
    try:
        from evosax.algorithms import Open_ES
    except ImportError:
        return None
    strategy = Open_ES(2 * pairs, params, optimizer=optax.sgd(1.0), std_schedule=optax.constant_schedule(SIGMA))
    begun = strategy.init(jax.random.key(0), params, strategy.default_params)

    @jit
    def generation(key: jax.Array, state: PyTree) -> PyTree:
        population, state = strategy.ask(key, state, strategy.default_params)
        losses = -jax.vmap(lambda member: fitness(member, key))(population)
        return strategy.tell(key, population, losses, state, strategy.default_params)[0].mean

    return lambda key: generation(key, begun)


# Memory.


def _memory(size: str, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    asked: list[tuple[str, Sequence[int], Callable[[int], dict[str, Any]]]] = [
        ("members", MEMBERS[size], functools.partial(of_population, width=64 if size == "full" else 4)),
        ("resident", MEMBERS[size][:: len(MEMBERS[size]) - 1], _resident),
        ("inner steps", STEPS[size], of_unrolled),
        ("images", IMAGES[size], of_episode),
    ]
    for question, ats, measure in asked:
        for at in ats:
            if (0, question, at) not in done:
                yield {"seed": 0, "question": question, "at": at, **measure(at)}


def of_population(members: int, *, width: int) -> dict[str, Any]:
    """Temporary bytes of a compiled generation of Conv4, the parameters' number, and the bytes of Adam's state."""
    network = students.named(f"conv4:width={width}", (28, 28, 1), 5)
    params = _zeros(network).params
    fitness = _problem(network, (28, 28, 1)).fitness

    def generation(key: jax.Array, mean: PyTree) -> PyTree:
        return estimate(key, mean, fitness, Population(pairs=members // 2, sigma=SIGMA, chunk=1, hold_noise=False))

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": size, "bytes": _temporary(generation, params), "optimizer": 2 * 4 * size}


def _zeros(network: Network) -> Variables:
    """Variables of its shapes: what they are costs nothing and changes no memory."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _temporary(function: Callable[..., Any], *shapes: PyTree) -> int:
    key = jax.random.key(0)
    compiled = jit(function).lower(key, *shapes).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _resident(members: int) -> dict[str, Any]:
    """Peak resident bytes of a process that runs one generation of a small MLP."""
    code = f"from ev3_distill.benchmarks import evolution; evolution.resident({members})"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def resident(members: int) -> None:
    """What such a process does: prints the peaks before and after the generation, and the number of parameters."""
    network = students.named("mlp:hidden=64", (64,), 5)
    params = _zeros(network).params
    inputs = jnp.ones((4, 64))

    def fitness(params: PyTree, key: jax.Array) -> jax.Array:
        return network.apply(Variables(params, {}), inputs, train=False)[0].mean()

    run = jit(lambda key: estimate(key, params, fitness, Population(pairs=members // 2, sigma=SIGMA, chunk=16)))
    jax.block_until_ready(run(jax.random.key(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    unit = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss
    print(json.dumps({"parameters": size, "bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def of_unrolled(steps: int) -> dict[str, Any]:
    """A learner of `steps` steps of gradient descent: bytes of one evaluation, and of the gradient by reverse mode."""
    network = students.named("conv4:width=8", (28, 28, 1), 5)
    variables = _zeros(network)
    images = jnp.zeros((2, 25, 28, 28, 1))
    labels = jnp.arange(25) % 5

    def loss(params: PyTree, inputs: jax.Array) -> jax.Array:
        logits = network.apply(variables._replace(params=params), inputs, train=True)[0]
        return -jax.nn.log_softmax(logits)[jnp.arange(25), labels].mean()

    def learned(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        def descend(now: PyTree, _: None) -> tuple[PyTree, None]:
            gradient = jax.grad(loss)(now, images[0])
            return jax.tree.map(lambda x, g: x - 0.1 * g, now, gradient), None

        return -loss(jax.lax.scan(descend, params, None, length=steps)[0], images[1])

    return _compared(learned, variables.params, images)


def of_episode(count: int) -> dict[str, Any]:
    """A prototype loss over `count` images: bytes of one evaluation, whole and in parts, and of the gradient."""
    network = students.named("conv4:width=8", (28, 28, 1), 5)
    variables = _zeros(network)
    images = jnp.zeros((count, 28, 28, 1))
    assert network.features is not None
    show = network.features

    def embed(params: PyTree, images: jax.Array, train: bool) -> jax.Array:
        return show(variables._replace(params=params), images, train=train)[0][1]["embedding"]

    def score(embedded: jax.Array) -> jax.Array:
        support, query = jnp.split(embedded.reshape(-1, 5, embedded.shape[-1]), 2)
        distances = jnp.square(query[:, :, None] - support.mean(0)).sum(-1)
        return jnp.diagonal(jax.nn.log_softmax(-distances), axis1=1, axis2=2).mean()

    def whole(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        return score(embed(params, images, True))

    def parts(params: PyTree, key: jax.Array, images: jax.Array) -> jax.Array:
        def some(start: jax.Array) -> jax.Array:
            return embed(params, jax.lax.dynamic_slice_in_dim(images, start, PART), False)

        return score(jax.lax.map(some, PART * jnp.arange(count // PART)).reshape(count, -1))

    found = _compared(whole, variables.params, images)
    return {**found, "in parts": _compared(parts, variables.params, images)["evaluation"]}


def _compared(fitness: Callable[..., jax.Array], params: PyTree, data: jax.Array) -> dict[str, Any]:
    def evaluated(key: jax.Array, mean: PyTree, data: jax.Array) -> PyTree:
        return estimate(key, mean, lambda p, k: fitness(p, k, data), Population(pairs=1, sigma=SIGMA))[0]

    def reverse(key: jax.Array, mean: PyTree, data: jax.Array) -> PyTree:
        return jax.grad(fitness)(mean, key, data)

    return {"evaluation": _temporary(evaluated, params, data), "reverse": _temporary(reverse, params, data)}


# What is told.


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speeds with the ratios of record, and memory by length."""
    told = [_speeds([row for row in rows if row["question"] == "speed"])]
    told.append(_populations([row for row in rows if row["question"] in ("members", "resident")]))
    told.extend(_against(question, rows) for question in ("inner steps", "images"))
    return "\n\n".join(told)


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["at"] for row in rows))
    found = {
        name: {c: [row["per_s"][c] for row in rows if row["at"] == name] for c in rows[0]["per_s"]} for name in names
    }
    body = [
        [f"`{name}`", *[statistics.spread(statistics.median(values), 1) for values in found[name].values()]]
        for name in names
    ]
    verdicts = []
    for ours, (other, target) in TARGETS.items():
        for name in names:
            ratios = [a / b for a, b in zip(found[name][ours], found[name][other], strict=True)]
            ratio = statistics.median(ratios)
            verdicts.append(
                f"`{name}`, {ours} / {other}: {statistics.spread(ratio, 2)}, target ≥ {target:g}: "
                f"{statistics.verdict(ratio, target)}"
            )
    return "\n\n".join(
        [
            f"Evaluations of members per second (medians over turns){_spread(rows[0]['devices'])}:",
            statistics.markdown(["student", *rows[0]["per_s"]], body),
            "; ".join(verdicts) + ".",
        ]
    )


def _spread(devices: int) -> str:
    return "" if devices == 1 else f", full rank and rank 1 on {devices} devices, the others on one"


def _populations(rows: Sequence[dict[str, Any]]) -> str:
    compiled = [row for row in rows if row["question"] == "members"]
    peaks = {row["at"]: row for row in rows if row["question"] == "resident"}
    body = [
        [
            f"{row['at']:,}",
            _mib(row["bytes"]),
            _mib(row["bytes"] + row["optimizer"]),
            _mib(2 * 4 * row["at"] * row["parameters"]),
            _mib(peaks[row["at"]]["bytes"]) if row["at"] in peaks else "",
        ]
        for row in compiled
    ]
    (first, last), largest = (compiled[0], compiled[-1]), compiled[-1]
    slope = (last["bytes"] - first["bytes"]) / (last["at"] - first["at"])
    few, many = peaks[min(peaks)], peaks[max(peaks)]
    resident_slope = (many["bytes"] - few["bytes"]) / (many["at"] - few["at"])
    held = "held" if slope <= BYTES_PER_MEMBER else "missed"
    state = largest["bytes"] + largest["optimizer"]
    fits = "held" if state <= AT_MOST else "missed"
    header = [
        "members",
        "generation, MiB",
        "with Adam, MiB",
        "usual way, MiB",
        "peak resident set (MLP), MiB",
    ]
    return "\n\n".join(
        [
            f"Buffers of a generation of a Conv4 of {last['parameters']:,} parameters, a member's activations included:",
            statistics.markdown(header, body),
            f"Per member: {slope:.1f} bytes compiled, {resident_slope:.1f} resident, at most {BYTES_PER_MEMBER}: {held}; "
            f"in all {_mib(state)} MiB at {largest['at']:,} members, at most {_mib(AT_MOST)}: {fits}.",
        ]
    )


def _against(question: str, rows: Sequence[dict[str, Any]]) -> str:
    rows = sorted((row for row in rows if row["question"] == question), key=lambda row: row["at"])
    ours = "in parts" if "in parts" in rows[0] else "evaluation"
    body = [
        [
            f"{row['at']:,}",
            *([_mib(row["evaluation"])] if ours == "in parts" else []),
            _mib(row[ours]),
            _mib(row["reverse"]),
            f"{row['reverse'] / row[ours]:.1f}",
        ]
        for row in rows
    ]
    whole = ["evaluation, whole"] if ours == "in parts" else []
    header = [question, *[f"{name}, MiB" for name in (*whole, ours, "reverse mode")], "ratio"]
    reached = [row["at"] for row in rows if row["reverse"] >= MANY * row[ours]]
    where = f"from {reached[0]:,} {question} on" if reached else f"not up to {rows[-1]['at']:,} {question}"
    return f"{statistics.markdown(header, body)}\n\n{MANY} times less than reverse mode: {where}."


def _mib(count: float) -> str:
    return statistics.number(count / 2**20, 2 if count < 2**27 else 0)


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Memory of an evaluation and of reverse mode over the length of the task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, question in zip(figure.subplots(1, 2), ("inner steps", "images"), strict=True):
        chosen = sorted((row for row in rows if row["question"] == question), key=lambda row: row["at"])
        for name in ("evaluation", "in parts", "reverse"):
            if name in chosen[0]:
                axes.plot([row["at"] for row in chosen], [row[name] / 2**20 for row in chosen], marker="o", label=name)
        axes.set(xlabel=question, ylabel="temporary buffers, MiB", xscale="log", yscale="log")
        axes.legend(fontsize="small", frameon=False)
    return figure
