"""What does a complete EV3 iteration cost, compared with a bare training loop and with the way of the public reference?

All contenders solve one problem: scikit-learn's digits, an MLP 32-32, batches of 128, AdamW at 1e-3, cross entropy, the same
initial parameters and the same batches. EV3 explores 100 steps at a time with one arm, without averaging, and assesses and
decides on 512 and 1,024 examples. There are too few digits for that beside 1,024 to explore, so decide shares examples with
the other splits: only speed matters here.

- `ev3` and `ev3 with ledger` are complete iterations through the host loop, including the closing one, with the AdamW of the
  default arms. The second one also writes its ledger rows to a file.
- `race of four` is five iterations of a race: four arms, AdamW and SGD with cross entropy and with KD, train for 100 steps
  each, and assess compares them.
- `four bare loops` are the same steps of the same four recipes with optax, in calls of 100 steps, one recipe after another.
- `bare, one call` and `bare, calls of 100` are a scan of training steps in one jit with optax's AdamW, called once or as
  often as EV3 iterates.
- `reference way` does what the public EV3 code (google-research/ev3) does, rewritten from the description of how it spends
  its time: a jitted gradient per step, an optax update without jit, and Python loops over candidates and batches with
  unpaired confidence intervals. It omits that code's pandas frames and its growing concatenation, which recompiles for every
  batch. It is not the original, which was not timed beside it, and a busy machine slows its thousands of small calls more
  than it slows the other contenders.

All contenders take turns in one process, in varying order. A turn has thirty short rounds, and the fastest round of each
counts, because other load on the machine only slows. A ratio is taken within a turn. Speeds are in training steps per second,
without compilation.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ev3_distill import students
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.optimizers import adamw, sgd
from ev3_distill.benchmarks import statistics
from ev3_distill.config import EV3
from ev3_distill.core import allocate
from ev3_distill.data.batches import Resident, sampler
from ev3_distill.data.shuffle import batch_rows, make_order
from ev3_distill.data.sources import load_data
from ev3_distill.errors import InputError
from ev3_distill.runtime.ledger import Ledger, row_of
from ev3_distill.tasks.classification import losses
from ev3_distill.tasks.classification.task import ACCURACY
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Apply, Batch, Loss, Network, Pools, PyTree, Variables

KEY = ("seed",)  # identifies a row
TIMED = ("steps_per_s",)  # depend on the machine
REPETITION = "turn"
INTERVALS = (
    "Medians over turns, with distribution-free 95 % intervals between order statistics; ratios are taken "
    "within a turn."
)
STEPS = {"full": (2000, 50), "smoke": (200, 100)}  # per round; the second is that of the reference way, which is slow
RACE_STEPS = {"full": 500, "smoke": 100}  # of each of the four arms, per round
ROUNDS = {"full": 30, "smoke": 1}  # per turn
TARGETS = {"ev3 / bare": 0.9, "ev3 / reference way": 20.0, "race of four / four bare loops": 0.9}
LEAST_TURNS = 7
EXPLORE, ASSESS, DECIDE = 1024, 512, 1024
CONFIG = EV3(batch_size=128, length=100, max_length=100)
RATE, SGD_RATE = 1e-3, 0.1
OPTIMIZER = optax.adamw(RATE)  # the usual optimizer; arms/optimizers.py computes the same faster
LOSS = losses.cross_entropy()
RACERS = {  # loss, optimizer of the arm, and the usual one
    f"{name}, {rule}": (loss, *optimizers)
    for name, loss in (("ce", LOSS), ("kd", losses.kd(temperature=4.0)))
    for rule, optimizers in (
        ("adamw", (adamw(RATE), OPTIMIZER)),
        ("sgd", (sgd(SGD_RATE), optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(SGD_RATE, 0.9, nesterov=True)))),
    )
}
SAMPLE = sampler(batch_size=CONFIG.batch_size)

Work = Callable[[], PyTree]  # the timed function; returns trained parameters
Contender = Callable[[Pools, int], Work]  # (pools, seed) -> work, with all preparation done


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per turn: the speed of every contender.

    Args:
      seeds: number of turns, each with its own seed.
      size: full or smoke.
      done: keys of rows to skip.
    """
    if size == "full" and seeds < LEAST_TURNS:
        raise InputError(
            f"throughput needs at least {LEAST_TURNS} turns; got {seeds}: set --seeds {LEAST_TURNS} or more"
        )
    steps, reference_steps = STEPS[size]
    with tempfile.TemporaryDirectory() as directory:
        timed = contenders(steps, reference_steps, ledger=Path(directory) / "ledger.jsonl", race_steps=RACE_STEPS[size])
        for contender, _ in timed.values():
            jax.block_until_ready(contender(problem(0), 0)())  # compiles
        for seed in range(seeds):
            if (seed,) in done:
                continue
            pools, speed = problem(seed), dict.fromkeys(timed, 0.0)
            for i in range(ROUNDS[size] * len(timed)):
                name = list(timed)[(seed + i) % len(timed)]
                contender, count = timed[name]
                speed[name] = max(speed[name], count / _seconds(contender(pools, seed)))
            yield {"seed": seed, "steps": steps, "steps_per_s": {name: round(speed[name], 1) for name in timed}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speeds, and the ratios that have targets: medians over turns, with intervals between order statistics."""
    speeds = {name: [row["steps_per_s"][name] for row in rows] for name in rows[0]["steps_per_s"]}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bare = max((name for name in speeds if name.startswith("bare")), key=lambda name: medians[name].center)
    ratios = {"ev3 / bare": _ratio(speeds, "ev3", bare)}
    ratios["ev3 with ledger / bare"] = _ratio(speeds, "ev3 with ledger", bare)
    ratios["ev3 / reference way"] = _ratio(speeds, "ev3", "reference way")
    if "race of four" in speeds:  # not in results of older versions
        ratios["race of four / four bare loops"] = _ratio(speeds, "race of four", "four bare loops")
    lines = [[name, statistics.spread(estimate, 0)] for name, estimate in medians.items()]
    compared = [
        [
            name.replace("/ bare", f"/ `{bare}`"),
            statistics.spread(estimate, 2),
            f"≥ {TARGETS[name]:g}: {statistics.verdict(estimate, TARGETS[name])}" if name in TARGETS else "",
        ]
        for name, estimate in ratios.items()
    ]
    confidence = medians["ev3"].confidence
    return "\n\n".join(
        [
            statistics.markdown(["contender", "training steps per second"], lines),
            statistics.markdown(["ratio", "median", "target"], compared),
            f"Medians of {len(rows)} turns ({confidence:.0%} interval).",
        ]
    )


def problem(seed: int) -> Pools:
    """The three splits of a permutation of the digits, which is repeated where it ends."""
    digits = load_data("digits")
    repeated = np.resize(np.random.default_rng(seed).permutation(len(digits.labels)), EXPLORE + ASSESS + DECIDE)

    def split(rows: np.ndarray) -> Batch:
        n = len(rows)
        blank = jnp.zeros((n, digits.num_classes))
        inputs, labels = jnp.asarray(digits.inputs[rows]), jnp.asarray(digits.labels[rows])
        return Batch(inputs, labels, {"logits": blank}, jnp.asarray(rows, jnp.int32), jnp.ones(n))

    explore, assess, decide = np.split(repeated, [EXPLORE, EXPLORE + ASSESS])
    examples = split(explore)
    views = examples._replace(teacher={"logits": examples.teacher["logits"][None]})
    return Pools(Resident(views, make_order(EXPLORE, seed)), split(assess), split(decide))


def contenders(steps: int, reference_steps: int, *, ledger: Path, race_steps: int) -> dict[str, tuple[Contender, int]]:
    """Contenders by name, each with the number of steps of its work.

    Args:
      steps: of most contenders.
      reference_steps: of the reference way.
      ledger: file to which one contender writes.
      race_steps: of each of the four arms of the race, a multiple of the length of a trajectory.
    """
    network = students.from_name("mlp:hidden=32-32", (8, 8, 1), 10)
    distillation = Distillation(
        network, [gradient_arm("ce", network.apply, LOSS, adamw(RATE), average=None)], config=CONFIG
    )

    def start(pools: Pools, seed: int) -> Variables:
        return distillation.begin(pools, seed).current.variables

    return {
        "ev3": (_ev3(distillation, steps), steps),
        "ev3 with ledger": (_ev3(distillation, steps, Ledger(ledger)), steps),
        "bare, one call": (_bare(network, start, steps, steps), steps),
        "bare, calls of 100": (_bare(network, start, steps, CONFIG.length), steps),
        "race of four": (_race(network, race_steps), len(RACERS) * race_steps),
        "four bare loops": (_four_bare(network, start, race_steps), len(RACERS) * race_steps),
        "reference way": (_reference(network, start, reference_steps), reference_steps),
    }


def _ev3(distillation: Distillation, steps: int, ledger: Ledger | None = None) -> Contender:
    def contender(pools: Pools, seed: int) -> Work:
        begin = distillation.begin(pools, seed)

        def work() -> PyTree:
            began = time.perf_counter()
            for state, decisions in distillation.loop(pools, begin, budget=steps):  # noqa: B007
                if ledger is not None:
                    wall_s = time.perf_counter() - began
                    ledger.append([row_of(decision, ["ce"], ACCURACY, wall_s=wall_s) for decision in decisions])
            return state.current.variables.params

        return work

    return contender


def _race(network: Network, steps: int) -> Contender:
    """Iterations of a race, from which no arm drops out; the arms' parameters after `steps` each."""
    config = dataclasses.replace(CONFIG, race=0.5, drop=1e6)
    arms = [
        gradient_arm(name, network.apply, loss, optimizer, average=None)
        for name, (loss, optimizer, _) in RACERS.items()
    ]
    distillation = Distillation(network, arms, config=config)
    budget = (
        allocate.TRAJECTORIES * steps
    )  # large enough for trajectories of full length, and a race that outlasts `steps`

    def contender(pools: Pools, seed: int) -> Work:
        begin = distillation.begin(pools, seed)

        def work() -> PyTree:
            *_, (state, _) = distillation.loop(pools, begin, budget=budget, pause=steps)
            return tuple(arm.iterate.params for arm in state.arms.states)

        return work

    return contender


def _four_bare(network: Network, start: Callable[[Pools, int], Variables], steps: int) -> Contender:
    """The steps of the race without EV3."""
    loops = [
        _bare(network, start, steps, CONFIG.length, loss=loss, optimizer=optimizer)
        for loss, _, optimizer in RACERS.values()
    ]

    def contender(pools: Pools, seed: int) -> Work:
        works = [loop(pools, seed) for loop in loops]
        return lambda: tuple(work() for work in works)

    return contender


def _bare(
    network: Network,
    start: Callable[[Pools, int], Variables],
    steps: int,
    per_call: int,
    *,
    loss: Loss = LOSS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
) -> Contender:
    """Training steps alone, `per_call` of them in one jitted scan."""

    @jax.jit
    def train(
        pools: Pools, params: PyTree, opt_state: PyTree, stats: PyTree, first: jax.Array
    ) -> tuple[PyTree, PyTree]:
        def advance(carry: tuple[PyTree, PyTree], step: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
            params, opt_state = carry
            batch = SAMPLE(pools.explore, step)
            gradient = jax.grad(_objective)(params, stats, batch, network.apply, loss)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(advance, (params, opt_state), first + jnp.arange(per_call))[0]

    def contender(pools: Pools, seed: int) -> Work:
        variables = start(pools, seed)
        opt_state = jax.block_until_ready(optimizer.init(variables.params))

        def work() -> PyTree:
            carry = (variables.params, opt_state)
            for first in range(0, steps, per_call):
                carry = train(pools, *carry, variables.stats, np.int32(first))
            return carry[0]

        return work

    return contender


def _reference(network: Network, start: Callable[[Pools, int], Variables], steps: int) -> Contender:
    """Iterations like those of the public reference, except that weight decay uses the current parameters."""
    value_and_grad = jax.jit(functools.partial(jax.value_and_grad(_objective), apply=network.apply))

    @jax.jit
    def hits(params: PyTree, stats: PyTree, batch: Batch) -> jax.Array:
        logits = network.apply(Variables(params, stats), batch.inputs, train=False)[0]
        return jnp.argmax(logits, axis=-1) == batch.targets

    def interval(params: PyTree, stats: PyTree, batches: Sequence[Batch]) -> tuple[float, float]:
        scores = np.concatenate([np.asarray(hits(params, stats, batch)) for batch in batches])
        half = 1.96 * scores.std() / np.sqrt(len(scores))
        return scores.mean() - half, scores.mean() + half

    def contender(pools: Pools, seed: int) -> Work:
        variables = start(pools, seed)
        visit = jax.jit(functools.partial(batch_rows, batch_size=CONFIG.batch_size))
        visits = [np.asarray(visit(pools.explore.order, np.int32(step))) for step in range(steps)]
        examples = pools.explore.examples
        explore = jax.tree.map(np.asarray, examples._replace(teacher={"logits": examples.teacher["logits"][0]}))
        assess, decide = _batches(pools.assess), _batches(pools.decide)

        def work() -> PyTree:
            params, stats, opt_state = variables.params, variables.stats, OPTIMIZER.init(variables.params)
            for first in range(0, steps, CONFIG.length):
                candidate = params
                for at in visits[first : first + CONFIG.length]:
                    batch = jax.tree.map(lambda leaf, at=at: leaf[at], explore)
                    _, gradient = value_and_grad(candidate, stats, batch)
                    updates, opt_state = OPTIMIZER.update(gradient, opt_state, candidate)
                    candidate = optax.apply_updates(candidate, updates)
                rivals = [params, candidate]
                best = max(rivals, key=lambda rival: sum(interval(rival, stats, assess)))
                low, high = interval(best, stats, decide)[0], interval(params, stats, decide)[1]
                params = (
                    best if low > high else candidate
                )  # every contender goes on with the candidate, whatever the outcome
            return params

        return work

    return contender


def _objective(params: PyTree, stats: PyTree, batch: Batch, apply: Apply, loss: Loss = LOSS) -> jax.Array:
    return loss(apply(Variables(params, stats), batch.inputs, train=True)[0], batch)


def _batches(split: Batch) -> list[Batch]:
    """A split on the host, in batches of the training's size."""
    host, size = jax.tree.map(np.asarray, split), CONFIG.batch_size
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + size], host) for i in range(0, len(host.index), size)]


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _ratio(speeds: dict[str, list[float]], name: str, other: str) -> statistics.Interval:
    return statistics.median([a / b for a, b in zip(speeds[name], speeds[other], strict=True)])
