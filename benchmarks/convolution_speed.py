"""Is distilling a convolutional student here as fast as in a plain PyTorch loop on the same machine?

All contenders run in one process and take turns in varying order; a ratio is taken within a turn. Turns are short and many,
because the speed of a shared machine drifts. Batches hold 128 random images of 32x32x3, which are as fast as any others. Both
sides use all threads of the machine.

- `step D`: training steps of ResNet-D (D = 8, 20), cross entropy, SGD with Nesterov momentum, on one batch. `ours` is a loop
  of steps in one jitted program, `torch` the same network in channels_last memory.
- `photos`: training steps of the student family `mobilenet` (width 50) on batches of 32 images of 224x224x3, otherwise alike.
- `start`: the same in a fresh process with an empty cache of compiled programs, then in a second one: seconds of compiling,
  which are those of the first step less those of the second, and the peak memory of the process.
- `epoch`: distilling ResNet-8 from the pretrained ResNet-56 for one epoch of crops and flips. `torch` runs the teacher in the
  loop (`benchmarks/torch_kd.py`). `warm` is EV3 with cached teacher outputs, `cold` is EV3 that has to compute them, those of
  the held-out examples included, both with assessment, decisions and ledger. Left out if the teacher's file is missing.

Other questions do not count compilation. Eight turns of the epoch take eight minutes on two cores, all other turns among them.
Without PyTorch the contenders `torch` are left out.
"""

import contextlib
import json
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
from ev3_distill.benchmarks import datasets, statistics, torch_kd, torch_mobilenet, torch_resnet
from ev3_distill.benchmarks.child_process import peak_memory
from ev3_distill.config import EV3
from ev3_distill.data.augment import parse
from ev3_distill.data.batches import held_out, sampler
from ev3_distill.data.pipeline import ResidentPipeline, Views
from ev3_distill.data.sources import Dataset
from ev3_distill.runtime.compile import jit
from ev3_distill.tasks.classification import losses
from ev3_distill.tasks.classification.task import classification
from ev3_distill.teachers import load_teacher
from ev3_distill.teachers.targets import CachedTargets
from ev3_distill.training.trainer import Distillation
from ev3_distill.types import Network, Pools, PyTree, Stretch

KEY = ("question", "seed")  # identifies a row
TIMED = ("ms_per_step", "compile_s", "peak")  # depend on the machine
REPETITION = "turn"
INTERVALS = (
    "Medians over turns, with distribution-free intervals between order statistics; the table states their "
    "level. Ratios are taken within a turn."
)
BATCH = 128
DEPTHS = {"full": (8, 20), "smoke": (8,)}
STEPS = {"full": 10, "smoke": 2}  # per turn of `step`; the first step of a program allocates its memory
STEP_TURNS = 4  # for each turn of the other questions
PHOTO = {"full": 224, "smoke": 32}  # pixels along each side
PHOTO_BATCH, PHOTO_STEPS = 32, 3
EPOCH = {"full": 6_400, "smoke": 512}  # images
HELD_OUT = {"full": 350, "smoke": 64}  # images in each of assess and decide
LENGTH = {"full": 50, "smoke": 4}  # steps per iteration of EV3
TARGETS = {
    "step 8": {"ours / torch": 1.3},
    "step 20": {"ours / torch": 1.3},
    "photos": {"ours / torch": 0.8},
    "epoch": {"warm / torch": 3.0, "cold / torch": 1.3},
}
START_TARGETS: dict[str, dict[str, float]] = {
    "compile_s": {"first": 60.0, "second": 5.0},
    "peak": {"first": 2.0**32, "second": 2.0**32},
}

RARE = ("photos", "epoch")  # questions whose turns take longest
STARTS = 3  # turns of `start`

Work = Callable[[], Any]


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per question and turn: milliseconds per step of every contender.

    Args:
      seeds: number of turns of `epoch` and `photos`; `step` has STEP_TURNS times as many, `start` at most STARTS.
      size: full or smoke.
      done: keys of rows to skip.
    """
    with tempfile.TemporaryDirectory() as directory:
        questions = contenders(size, Path(directory))
        for works in questions.values():
            for work, _ in works.values():
                work()  # compiles
        for turn in range(STEP_TURNS * seeds):
            for question, works in questions.items():
                if (rare := question in RARE) and turn % STEP_TURNS:
                    continue
                seed = turn // STEP_TURNS if rare else turn
                if (question, seed) not in done:
                    yield {"question": question, "seed": seed, "ms_per_step": _turn(works, seed)}
        for seed in range(min(seeds, STARTS)):
            if ("start", seed) not in done:
                yield {"question": "start", "seed": seed, **_starts(PHOTO[size], Path(directory, f"start{seed}"))}


def _turn(works: dict[str, tuple[Work, int]], seed: int) -> dict[str, float]:
    """Milliseconds per step of each contender, which take their turn in an order that depends on the seed."""
    names, shift = list(works), seed % len(works)
    times = {}
    for name in names[shift:] + names[:shift]:
        work, steps = works[name]
        start = time.perf_counter()
        work()
        times[name] = round(1000 * (time.perf_counter() - start) / steps, 3)
    return {name: times[name] for name in names}


def contenders(size: str, directory: Path) -> dict[str, dict[str, tuple[Work, int]]]:
    """Contenders by question and name, each with the number of steps of its work."""
    steps = STEPS[size]
    questions: dict[str, dict[str, tuple[Work, int]]] = {}
    data = images(EPOCH[size] + 2 * HELD_OUT[size])
    teacher = _torch_teacher()
    for depth in DEPTHS[size]:
        network = students.build({"family": "resnet", "depth": depth, "input_shape": [32, 32, 3], "num_classes": 10})
        works = questions.setdefault(f"step {depth}", {})
        works["ours"] = _steps(network, data, steps), steps
        if teacher is not None:
            works["torch"] = _torch_loops(data, 4096, teacher, depth, steps)["student"], steps
    works = questions.setdefault("photos", {})
    works["ours"] = photo_steps(PHOTO[size]), PHOTO_STEPS
    if teacher is not None:
        works["torch"] = _torch_photo_steps(PHOTO[size]), PHOTO_STEPS
    if (onnx := datasets.teacher_file()) is not None:
        works, whole = questions.setdefault("epoch", {}), -(-EPOCH[size] // BATCH)
        if teacher is not None:
            works["torch"] = _torch_loops(data, EPOCH[size], teacher, 8, whole)["kd"], whole
        ours = _Epoch(data, onnx, size, directory)
        works["cold"] = ours.cold, whole
        works["warm"] = ours.warm, whole
    return questions


def _torch_loops(data: Dataset, count: int, teacher: Any, depth: int, steps: int) -> dict[str, Work]:
    return torch_kd.timed_loops(
        data.inputs[:count], data.labels[:count], teacher=teacher, depth=depth, steps=steps, device=_torch_device()
    )


def photo_steps(side: int, steps: int = PHOTO_STEPS) -> Work:
    """Steps of a mobilenet on one batch of side x side images."""
    network = students.build({"family": "mobilenet", "input_shape": [side, side, 3], "num_classes": 10})
    return _steps(network, images(PHOTO_BATCH, side), steps, batch_size=PHOTO_BATCH)


def _torch_photo_steps(side: int) -> Work:
    import torch
    from torch.nn import functional

    model = torch_mobilenet.mobilenet((side, side, 3), 10).train().to(_torch_device())
    data = images(PHOTO_BATCH, side)
    inputs = torch_kd.normalized(torch.tensor(data.inputs, device=_torch_device()))
    labels = torch.tensor(data.labels, dtype=torch.int64, device=_torch_device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def work() -> None:
        for _ in range(PHOTO_STEPS):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return work


START = """
import json, pathlib, sys, time
from ev3_distill.benchmarks.convolution_speed import photo_steps
from ev3_distill.runtime import compile_cache
if reason := compile_cache.start():
    raise SystemExit(reason)
def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
work = photo_steps(int(sys.argv[1]), 1)
first, second = timed(work), timed(work)
pathlib.Path(sys.argv[2]).write_text(json.dumps(first - second))
"""


def _starts(side: int, directory: Path) -> dict[str, dict[str, float]]:
    """Seconds of compiling and peak bytes of two processes, of which the second finds the programs of the first."""
    directory.mkdir()
    figures: dict[str, dict[str, float]] = {"compile_s": {}, "peak": {}}
    for name in ("first", "second"):
        command = [sys.executable, "-c", START, str(side), str(directory / name)]
        environment = {"EV3_DISTILL_CACHE": str(directory), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        figures["peak"][name] = peak_memory(command, directory=directory, environment=environment, quiet=True)
        figures["compile_s"][name] = round(json.loads((directory / name).read_text()), 2)
    return figures


def images(count: int, side: int = 32) -> Dataset:
    """Random images with labels of 10 classes."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (count, side, side, 3), np.uint8)
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


def _steps(network: Network, data: Dataset, steps: int, batch_size: int = BATCH) -> Work:
    """Steps on one batch, in one jitted loop."""
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True))
    arm = gradient_arm("ce", network.apply, losses.cross_entropy(), optimizer, average=None)
    batch = held_out(
        data.inputs[:batch_size],
        data.labels[:batch_size],
        np.arange(batch_size),
        {"logits": np.zeros((batch_size, 10), np.float32)},
    )
    batch = batch._replace(inputs=batch.inputs.astype(jnp.float32) / 255)
    state = arm.init(network.init(jax.random.key(0)))

    @jit
    def train(state: PyTree) -> PyTree:
        whole = Stretch(jnp.int32(0), jnp.int32(steps), jnp.float32(0), jnp.float32(0))
        return arm.propose(state, lambda step: (batch, jax.random.key(0)), whole)[0]

    return lambda: jax.block_until_ready(train(state))


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
    lines, compared, levels = [], [], []
    for question in dict.fromkeys(row["question"] for row in rows if "ms_per_step" in row):
        turns = [row["ms_per_step"] for row in rows if row["question"] == question]
        for name in turns[0]:
            estimate = statistics.median([turn[name] for turn in turns])
            levels += [estimate.confidence] if len(turns) > 1 else []
            lines.append([f"{question}: {name}", f"{len(turns)}", statistics.spread(estimate, 1)])
        for pair, target in TARGETS[question].items():
            one, other = pair.split(" / ")
            if one in turns[0] and other in turns[0]:
                ratio = statistics.median([turn[other] / turn[one] for turn in turns])
                text = f"≥ {target:g}: {statistics.verdict(ratio, target)}"
                compared.append([f"{question}: {pair}", statistics.spread(ratio, 2), text])
    return "\n\n".join(
        [
            statistics.markdown(["contender", "turns", "ms per step"], lines),
            statistics.markdown(["ratio of speeds", "median", "target"], compared),
            *([f"Intervals of at least {min(levels):.0%}."] if levels else []),
            *_start_table([row for row in rows if row["question"] == "start"]),
        ]
    )


def _start_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Medians and ranges of compiling and memory in a process's first seconds; the largest is compared with the target."""
    lines = []
    for figure, unit, scale in (("compile_s", "s", 1), ("peak", "MiB", 1 << 20)):
        for name, target in START_TARGETS[figure].items() if rows else ():
            values = sorted(row[figure][name] / scale for row in rows)
            text = f"{np.median(values):,.1f} {unit} ({values[0]:,.1f} to {values[-1]:,.1f})"
            verdict = "held" if values[-1] <= target / scale else "missed"
            label = "compiling" if figure == "compile_s" else "peak memory"
            lines.append([f"{name} process: {label}", f"{len(values)}", text, f"≤ {target / scale:,.0f}: {verdict}"])
    return [statistics.markdown(["start", "turns", "median (range)", "target"], lines)] if lines else []
