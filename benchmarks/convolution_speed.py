"""Is distilling a convolutional student here as fast as in a plain PyTorch loop on the same machine?

Four questions. All contenders run in one process and take turns in varying order; a ratio is taken within a turn. Batches hold
128 random images of 32x32x3, which are as fast as any others. Both sides use all threads of the machine.

- `step D`: training steps of ResNet-D (D = 8, 20), cross entropy, SGD with Nesterov momentum, on one batch. `ours` is a loop
  of steps in one jitted program, `torch` the same network in channels_last memory.
- `epoch`: distilling ResNet-8 from the pretrained ResNet-56 for one epoch of crops and flips. `torch` runs the teacher in the
  loop (`benchmarks/torch_kd.py`). `warm` is EV3 with cached teacher outputs, `cold` is EV3 that has to compute them, both with
  assessment, decisions and ledger. Compilation is not included. Left out if the teacher's file is missing.
- `iteration D`: complete iterations of EV3 with one arm, against that arm's bare trajectory of as many steps.

Without PyTorch the contenders `torch` are left out.
"""

import contextlib
import os
import sys
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
from ev3_distill.arms import arms_named
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.benchmarks import datasets, statistics, torch_kd, torch_resnet
from ev3_distill.config import EV3
from ev3_distill.core.explore import draw_from
from ev3_distill.data.augment import parse
from ev3_distill.data.batches import held_out, resident, sampler
from ev3_distill.data.pipeline import ResidentPipeline, Views
from ev3_distill.data.sources import Dataset
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.tasks.classification.task import classification
from ev3_distill.teachers import load_teacher
from ev3_distill.teachers.targets import CachedTargets
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Network, Pools, PyTree, Stretch

KEY = ("seed",)  # identifies a row
TIMED = ("ms_per_step",)  # depend on the machine
REPETITION = "turn"
INTERVALS = (
    "Medians over turns, with distribution-free intervals between order statistics; the table states their "
    "level. Ratios are taken within a turn."
)
BATCH = 128
DEPTHS = {"full": (8, 20), "smoke": (8,)}
STEPS = {"full": 40, "smoke": 2}  # per turn, for `step` and `iteration`
EPOCH = {"full": 45_000, "smoke": 512}  # images
HELD_OUT = {"full": 2500, "smoke": 64}  # images in each of assess and decide
LENGTH = {"full": 200, "smoke": 4}  # steps per iteration
TARGETS = {
    "step 8: ours / torch": 0.8,
    "step 20: ours / torch": 0.8,
    "epoch: warm / torch": 2.0,
    "epoch: cold / torch": 0.9,
    "iteration 8: ev3 / bare": 0.9,
    "iteration 20: ev3 / bare": 0.9,
}

Work = Callable[[], Any]


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per turn: milliseconds per step of every contender.

    Args:
      seeds: number of turns.
      size: full or smoke.
      done: keys of rows to skip.
    """
    with tempfile.TemporaryDirectory() as directory:
        field = contenders(size, Path(directory))
        for work, _ in field.values():
            work()  # compiles
        for seed in range(seeds):
            if (seed,) in done:
                continue
            names = list(field)
            seconds = {}
            for name in names[seed % len(names) :] + names[: seed % len(names)]:
                work, steps = field[name]
                began = time.perf_counter()
                work()
                seconds[name] = (time.perf_counter() - began) / steps
            yield {"seed": seed, "ms_per_step": {name: round(1000 * seconds[name], 3) for name in names}}


def contenders(size: str, directory: Path) -> dict[str, tuple[Work, int]]:
    """Contenders by name, each with the number of steps of its work."""
    steps, field = STEPS[size], {}
    data = images(EPOCH[size] + 2 * HELD_OUT[size])
    teacher = _torch_teacher()
    for depth in DEPTHS[size]:
        network = students.build({"family": "resnet", "depth": depth, "input_shape": [32, 32, 3], "num_classes": 10})
        field[f"step {depth}: ours"] = _steps(network, data, steps), steps
        if teacher is not None:
            theirs = torch_kd.timed_loops(
                data.inputs[:4096],
                data.labels[:4096],
                teacher=teacher,
                depth=depth,
                steps=steps,
                device=_torch_device(),
            )
            field[f"step {depth}: torch"] = theirs["student"], steps
        length = max(LENGTH[size], steps)
        field[f"iteration {depth}: ev3"] = _iterations(network, data, size, length), length
        field[f"iteration {depth}: bare"] = _bare(network, data, size, length), length
    if (onnx := datasets.teacher_file()) is not None:
        whole = -(-EPOCH[size] // BATCH)
        ours = _Epoch(data, onnx, size, directory)
        if teacher is not None:
            some = slice(EPOCH[size])
            theirs = torch_kd.timed_loops(
                data.inputs[some], data.labels[some], teacher=teacher, depth=8, steps=whole, device=_torch_device()
            )
            field["epoch: torch"] = theirs["kd"], whole
        field["epoch: cold"] = ours.cold, whole
        field["epoch: warm"] = ours.warm, whole
    return field


def images(count: int) -> Dataset:
    """Random images with labels of 10 classes."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    return Dataset(inputs, labels, 10, tuple("0123456789"), None, "random", f"random {count}")


def _torch_device() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _torch_teacher() -> Any:
    """The pretrained teacher in PyTorch, or a fresh network if its file is missing; None without PyTorch."""
    try:
        import torch
    except ImportError:
        print("bench speed: PyTorch is not installed; its contenders are left out", file=sys.stderr)
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = datasets.teacher_file()
    return torch_resnet.resnet(8, 16, 10) if path is None else torch_resnet.load_teacher(path)


def _steps(network: Network, data: Dataset, steps: int) -> Work:
    """Steps on one batch, in one jitted loop."""
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    arm = gradient_arm("ce", network.apply, losses.cross_entropy(), optimizer, average=None)
    batch = held_out(
        data.inputs[:BATCH], data.labels[:BATCH], np.arange(BATCH), {"logits": np.zeros((BATCH, 10), np.float32)}
    )
    batch = batch._replace(inputs=batch.inputs.astype(jnp.float32) / 255)
    state = arm.init(network.init(jax.random.key(0)))

    @jit
    def train(state: PyTree) -> PyTree:
        whole = Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0), jnp.float32(0))
        return arm.propose(state, lambda step: (batch, jax.random.key(0)), whole)[0]

    return lambda: jax.block_until_ready(train(state))


def _pools(data: Dataset, size: str) -> Pools:
    """The splits of an iteration, without augmentation, with teacher logits of zero."""
    n, held = EPOCH[size], HELD_OUT[size]
    parts = np.split(np.arange(n + 2 * held), [n, n + held])
    blank = np.zeros((n, 10), np.float32)
    pool = resident(data.inputs[:n], data.labels[:n], parts[0], {"logits": blank[None]}, seed=0)
    assess, decide = (
        held_out(data.inputs[rows], data.labels[rows], rows, {"logits": np.zeros((held, 10), np.float32)})
        for rows in parts[1:]
    )
    return Pools(pool, assess, decide)


def _iterations(network: Network, data: Dataset, size: str, length: int) -> Work:
    """One iteration of that length, and the closing one."""
    config = EV3(length=length, max_length=length)
    distillation = Distillation(network, arms_named(network.apply, ["ce"]), config=config)
    pools = _pools(data, size)
    begin = distillation.begin(pools, 0)
    return lambda: jax.block_until_ready(list(distillation.loop(pools, begin, budget=length))[-1][0])


def _bare(network: Network, data: Dataset, size: str, length: int) -> Work:
    """The same arm's trajectory without EV3."""
    (arm,) = arms_named(network.apply, ["ce"])
    pool, sample = _pools(data, size).explore, sampler(batch_size=BATCH)
    state = arm.init(network.init(jax.random.key(0)))

    @jit
    def train(pool: PyTree, state: PyTree) -> PyTree:
        whole = Stretch(jnp.int32(0), jnp.int32(length), jnp.float32(0), jnp.float32(1 / length))
        return arm.propose(state, draw_from(pool, sample, jax.random.key(0)), whole)

    return lambda: jax.block_until_ready(train(pool, state))


class _Epoch:
    """One epoch of EV3 with one arm, as `compress` runs it."""

    def __init__(self, data: Dataset, teacher: Path, size: str, directory: Path):
        n, held = EPOCH[size], HELD_OUT[size]
        self._data, self._directory, self._cold_epochs = data, directory, 0
        self._explore, self._assess, self._decide = np.split(np.arange(n + 2 * held), [n, n + held])
        self._steps = -(-n // BATCH)
        self._teacher = load_teacher(
            f"onnx:{teacher}",
            preprocessing=datasets.NORMALIZED,
            input_shape=(32, 32, 3),
            num_classes=10,
            class_names=(),
        )
        self._augmentation = parse("auto", (32, 32, 3))
        self._network = students.build({"family": "resnet", "depth": 8, "input_shape": [32, 32, 3], "num_classes": 10})
        sample = sampler(batch_size=BATCH, augmentation=self._augmentation)
        self._distillation = Distillation(
            self._network,
            arms_named(self._network.apply, ["kd4"]),
            config=EV3(length=LENGTH[size], max_length=LENGTH[size]),
            sample=sample,
        )

    def cold(self) -> None:
        """With an empty cache: the teacher computes its outputs."""
        self._cold_epochs += 1
        self._run(self._directory / str(self._cold_epochs))

    def warm(self) -> None:
        """With the cache of an earlier epoch."""
        if not self._cold_epochs:
            self.cold()
        self._run(self._directory / str(self._cold_epochs))

    def _run(self, root: Path) -> None:
        views = Views(self._data.inputs, self._data.labels, self._explore, self._augmentation)
        targets = CachedTargets(self._teacher, self._data, task=classification(10), root=root, warn=print)
        with contextlib.closing(targets):
            assess, decide = (
                held_out(self._data.inputs[rows], self._data.labels[rows], rows, targets.unchanged(rows))
                for rows in (self._assess, self._decide)
            )
            pipeline = ResidentPipeline(views, targets.for_views(views, 1), count=1, batch_size=BATCH, seed=0)
            pools = Pools((), assess, decide)
            begin = self._distillation.begin(pools, 0)
            for _ in self._distillation.loop(pools, begin, budget=self._steps, pipeline=pipeline):
                pass


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Times, and the ratios that have targets: medians over turns, with intervals between order statistics."""
    times = {name: [row["ms_per_step"][name] for row in rows] for name in rows[0]["ms_per_step"]}
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = [[name, statistics.spread(estimate, 1)] for name, estimate in medians.items()]
    compared = []
    for name, target in TARGETS.items():
        one, other = (f"{name.partition(':')[0]}: {of}" for of in name.partition(": ")[2].split(" / "))
        if one in times and other in times:
            ratio = statistics.median([b / a for a, b in zip(times[one], times[other], strict=True)])
            compared.append([name, statistics.spread(ratio, 2), f"≥ {target:g}: {statistics.verdict(ratio, target)}"])
    return "\n\n".join(
        [
            statistics.markdown(["contender", "ms per step"], lines),
            statistics.markdown(["ratio of speeds", "median", "target"], compared),
            f"Medians of {len(rows)} turns ({medians['step 8: ours'].confidence:.0%} interval).",
        ]
    )
