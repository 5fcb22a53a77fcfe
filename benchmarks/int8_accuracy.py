"""What does int8 cost: with quantization after training, or with training for it?

The pretrained ResNet-56 is distilled into a ResNet-8 on the CIFAR-10 image folder. For each seed, the figures are those of
the file that would be deployed, an ONNX file run by onnxruntime in its own process:

- `float32`: `compress --student resnet8 --budget 10e`, then `export --format onnx`;
- `after training`: the same student, `export --format onnx --int8`, with onnxruntime's quantizer on explore images;
- `in the loop`: `compress ... --deploy int8` with as many steps, then `export --format onnx`. The student is scored in int8
  throughout, and trained with rounding in the last quarter.

Each run has a guard on accuracy, by which `evaluate` judges the file that computes what was certified. Accuracy is on the
folder's 10,000 test images, which were used for no choice. Differences are paired image by image: with the run in float32,
which is another training, and with the same student without rounding. Files are timed in turns, and so are training steps of
the leading arm of each run, as ratios to those in float32.
"""

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill import students
from ev3_distill.arms import arms_named
from ev3_distill.arms.zoo import CONVOLUTIONAL
from ev3_distill.benchmarks import datasets, pytorch_quality, statistics
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.runtime.compile import jit
from ev3_distill.students.quantization import NETWORK_STATS
from ev3_distill.types import Batch, Stretch, Variables

KEY = ("seed", "contender")  # identifies a row
INTERVALS = (
    "Two kinds of intervals, both 95 %: over test images for the students of these seeds, and Student's t over "
    "seeds. Verdicts go by the interval over seeds."
)
FIRST_SEED = 60  # ranges and the late start of rounding were designed on seeds 0, 40 and 50
EPOCHS = {"full": 10, "smoke": 0.02}
GUARD = {"full": "accuracy >= 0.75", "smoke": "accuracy >= 0.05"}
RUNS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "loop": ("--deploy", "int8"),
}
FILES: dict[str, tuple[str, tuple[str, ...]]] = {  # the run that each file comes from, and the options of its export
    "float32": ("float32", ()),
    "after training": ("float32", ("--int8",)),
    "in the loop": ("loop", ()),
}
CONTENDERS = tuple(FILES)
BATCHES, TURNS, PASSES = (1, 64), 10, 10  # of the timing of files
STEPS = 10  # per turn of the timing of training
TIMED = ("step", "p50_ms", "p50_ms_of_64")  # depend on the machine
TARGET = -0.5  # points, relative to the student in float32
AT_ONCE = 1000  # images per call of a file


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed and contender.

    Args:
      seeds: number of seeds from FIRST_SEED, each with its own splits, initial parameters and batches.
      size: full, or smoke: a fiftieth of an epoch, whose figures mean nothing.
      done: keys of rows to skip; a seed with a missing row is measured again as a whole.
    """
    archive, onnx = datasets.cifar10_files()
    dataset = load_data(f"folder:{archive}")
    for seed in range(seeds):
        if all((seed, contender) in done for contender in FILES):
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs = {run: Path(folder) / run for run in RUNS}
            for run, out in runs.items():
                _command(
                    *(
                        "compress",
                        "--teacher",
                        f"onnx:{onnx}",
                        *pytorch_quality.TEACHER_OPTIONS,
                        "--data",
                        f"folder:{archive}",
                    ),
                    *("--student", "resnet8", "--budget", f"{EPOCHS[size]:g}e", "--guard", GUARD[size]),
                    *("--seed", str(FIRST_SEED + seed), "--out", str(out), *RUNS[run]),
                )
            yield from _rows(Path(folder), dataset, runs, seed=seed, size=size)


def _rows(folder: Path, dataset: Dataset, runs: dict[str, Path], *, seed: int, size: str) -> Iterator[dict[str, Any]]:
    """The rows of the files of a seed's runs, timed in turns."""
    assert dataset.test_rows is not None
    inputs, labels = dataset.inputs[dataset.test_rows], dataset.labels[dataset.test_rows]
    outs = {contender: folder / f"{contender.replace(' ', '-')}-file" for contender in FILES}
    for contender, (run, options) in FILES.items():
        if _command("export", str(runs[run]), "--format", "onnx", "--out", str(outs[contender]), *options):
            raise RuntimeError(f"the student of {run} has no int8 file that keeps its answers: see above")
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context(open_exported(out / "model.onnx")) for name, out in outs.items()}
        turns: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in files for batch in BATCHES}
        for _ in range(TURNS):
            for (name, batch), times in turns.items():
                times.extend(files[name].passes_ms(inputs[:batch], PASSES))
        starts = range(0, len(inputs), AT_ONCE)
        predicted = {
            name: np.concatenate([file.outputs(inputs[i : i + AT_ONCE]) for i in starts]).argmax(axis=1)
            for name, file in files.items()
        }
    step_times = steps_s(turns=TURNS if size == "full" else 1)
    for contender, (run, options) in FILES.items():
        cost = json.loads((runs[run] / "report.json").read_text())["cost"]
        judged = ("evaluate", str(outs[contender]), "--of", str(runs[run]), "--guard", GUARD[size])
        right = predicted[contender] == labels
        yield {
            "seed": seed, "contender": contender, "steps": cost["steps"],
            "step": float(np.median(np.divide(step_times[run], step_times["float32"]))),
            "bytes": (outs[contender] / "model.onnx").stat().st_size, "accuracy": float(right.mean()),
            "p50_ms": float(np.median(turns[contender, 1])), "p50_ms_of_64": float(np.median(turns[contender, 64])),
            "guard": GUARD[size], "passes": None if options else _command(*judged) == 0,
            "right": _packed(right),
            "unrounded": "" if run == "float32" else _packed(unrounded(runs[run], inputs) == labels),
        }  # fmt: skip


def unrounded(run: Path, inputs: np.ndarray) -> np.ndarray:
    """The classes [N] that a run's int8 student predicts without any rounding."""
    network, variables = students.load(run)
    base = students.build({name: value for name, value in network.spec.items() if name != "deploy"})
    whole = Variables(variables.params, variables.stats[NETWORK_STATS])
    classes = jit(lambda inputs: base.apply(whole, inputs, train=False)[0].argmax(axis=1))
    return np.concatenate([classes(inputs[i : i + AT_ONCE]) for i in range(0, len(inputs), AT_ONCE)])


def _packed(right: np.ndarray) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _unpacked(text: str) -> list[float]:
    """Correctness per image [N], 0 or 100 percent."""
    return list(100.0 * np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)))


def steps_s(*, turns: int) -> dict[str, list[float]]:
    """Seconds of STEPS training steps of each run's leading arm, in turns, without teacher and scoring."""
    base = students.from_name("resnet8", (32, 32, 3), 10)
    networks = {run: students.with_precision(base, "int8" if options else "float32") for run, options in RUNS.items()}
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (128, 32, 32, 3)), jnp.uint8)
    logits, labels = (
        jnp.asarray(rng.normal(size=(128, 10)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, 128), jnp.int32),
    )
    batch = Batch(images, labels, {"logits": logits}, jnp.arange(128, dtype=jnp.int32), jnp.ones(128))
    stretch = Stretch(jnp.int32(0), jnp.int32(STEPS), jnp.float32(0.1), jnp.float32(0.001))

    def trajectory(run: str) -> Callable[[], Any]:
        network = networks[run]
        (arm,) = arms_named(network.apply, CONVOLUTIONAL[:1], network=network)
        state, key = arm.init(network.init(jax.random.key(0))), jax.random.key(1)
        propose = jit(lambda state, batch, stretch: arm.propose(state, lambda step: (batch, key), stretch))
        return lambda: jax.block_until_ready(propose(state, batch, stretch))

    trajectories = {run: trajectory(run) for run in RUNS}
    seconds: dict[str, list[float]] = {run: [] for run in RUNS}
    for turn in range(-1, turns):  # the first compiles
        for run, train in trajectories.items():
            began = time.perf_counter()
            train()
            if turn >= 0:
                seconds[run].append(time.perf_counter() - began)
    return seconds


def _command(*options: str) -> int:
    """Runs a command; returns its exit code, 0, or 3 if a guard is not met."""
    done = subprocess.run([sys.executable, "-m", "ev3_distill", *options], stdout=sys.stderr, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{options[0]} ended with exit code {done.returncode}: see above")
    return done.returncode


def measures(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers, without the guard, which is not evaluated for every file."""
    return {field: row[field] for field in ("steps", "bytes", "accuracy", *TIMED)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy, size and latency of each file, and the paired cost of int8."""
    by = {contender: [row for row in rows if row["contender"] == contender] for contender in CONTENDERS}
    lines = []
    for contender, own in by.items():
        if not own:
            continue
        judged = [row["passes"] for row in own if row["passes"] is not None]
        lines.append([
            contender,
            statistics.plus_minus(statistics.mean([100 * row["accuracy"] for row in own]), 2),
            statistics.number(own[0]["bytes"], 0),
            statistics.number(float(np.median([row["p50_ms"] for row in own])), 2),
            statistics.number(float(np.median([row["p50_ms_of_64"] for row in own])), 1),
            statistics.number(float(np.median([row["step"] for row in own])), 2),
            f"{sum(judged)} of {len(judged)}" if judged else "",
        ])  # fmt: skip
    heads = ["file", "accuracy, %", "bytes", "p50 ms", "p50 ms, 64 at once", "training step", "guard certified"]
    compared = [_minus(contender, by, "float32") for contender in CONTENDERS[1:]]
    compared += [_minus(contender, by, "itself in float32") for contender in CONTENDERS[2:]]
    return (
        statistics.markdown(heads, lines)
        + "\n\n"
        + "\n".join(f"- {text}" for text in filter(None, compared))
        + f"\n\nGuard: {rows[0]['guard']}."
    )


def _minus(contender: str, by: dict[str, list[dict[str, Any]]], other: str) -> str:
    """Points of accuracy minus those of another contender: per seed over images, and over seeds.

    The other is the run in float32, or the same student without rounding.
    """
    floats = {row["seed"]: row["right"] for row in by["float32"]}
    of_others = floats if other == "float32" else {row["seed"]: row["unrounded"] for row in by[contender]}
    pairs = [(row["seed"], _unpacked(row["right"]), _unpacked(of_others[row["seed"]])) for row in by[contender]]
    if not pairs:
        return ""
    gains = [(seed, statistics.paired(ours, theirs)) for seed, ours, theirs in pairs]
    each = ", ".join(f"seed {seed} {statistics.spread(gain, 2)}" for seed, gain in gains)
    gain, over = gains[0][1], ""
    if len(gains) > 1:
        gain = statistics.mean([gain.center for _, gain in gains])
        ours, theirs = (np.mean([pair[i] for pair in pairs], axis=0) for i in (1, 2))
        together = statistics.spread(statistics.paired(list(ours), list(theirs)), 2)
        over = f", these students together {together}; over seeds {statistics.spread(gain, 2)}"
    target = f"target ≥ {TARGET:g}: {statistics.verdict(gain, TARGET)}"
    return f"{contender} minus {other}, points, image by image: {each}{over}, {target}"
