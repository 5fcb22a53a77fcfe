"""How do the steps, compiling and memory of a run grow with its rows, classes, arms, held-out examples and image size?

For each row, one process writes data and a teacher to disk, and a second one runs `compress` on them, with empty caches. One
setting varies along a curve, the others stay:

- `training examples`: vectors of 16 numbers, `--memory 1G`, which holds the last size on disk. An epoch is longer, but the
  number of steps is the same.
- `classes`: 20,000 training examples; each class has at least two examples.
- `arms`: the first ones of a list of the tool's arms, which differ by loss. Steps are summed over arms.
- `held-out examples`: in `assess` and in `decide`, and as many in the sealed split.
- `pixels`: images of 8x8 to 224x224 with three colors, `resnet:depth=8,width=8`, batches of 32.

The figures are the time of a training step (the phase `training` of the report, with assessment and promotions, divided by the
number of steps), the seconds of the phase `compiling`, the seconds of the whole command, and the peak resident set of its
process. The teacher is a linear function, so that the figures are of this tool.

The exponent of a curve is the slope of log(figure) over log(setting): 1 if the figure doubles with the setting. The last one
is that of the two largest settings, where fixed costs matter least.
"""

import json
import math
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ev3_distill.benchmarks import statistics
from ev3_distill.benchmarks.child_process import peak_memory
from ev3_distill.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ("curve", "at", "seed")  # identifies a row
TIMED = ("ms_per_step", "compile_s", "wall_s")  # depend on the machine
REPETITION = "run"
INTERVALS = (
    "Medians over runs. The interval of an exponent is the range of the exponents of the runs; the largest of them is compared "
    "with the target."
)
FIGURES = {
    "ms_per_step": "ms per step",
    "compile_s": "compiling, s",
    "wall_s": "command, s",
    "peak": "peak memory, MiB",
}
STEEPEST = 1.0  # exponent
ALLOWED = 0.05  # for noise: an exponent of 1.05 counts as linear
FEATURES = 16
ARMS = [
    *("kd4", "ce", "kd2", "mse", "dkd", "dist", "nkd", "standardized", "reverse-kl", "jsd"),
    *("kd4-fast", "kd2-slow", "ce-slow", "ce-sgd", "kd2-sgd", "trust"),
]
TEACHER = """
import numpy as np

CENTERS = np.load("centers.npy")  # [K, D]


def logits(inputs):
    x = np.asarray(inputs)
    if x.ndim == 4:
        x = x[:, : x.shape[1] // 2].mean((1, 2), dtype=np.float32) / 16
    return x.astype(np.float32) @ CENTERS.T - (CENTERS**2).sum(1) / 2
"""


class Problem(NamedTuple):
    """The settings of a run, of which a curve varies one.

    Attributes:
      explore: number of training examples.
      held_out: examples in each of assess, decide and test.
      classes: K.
      arms: number of arms.
      side: of the images, in pixels; 0 for vectors.
      steps: training steps, summed over arms.
    """

    explore: int = 20_000
    held_out: int = 1_000
    classes: int = 4
    arms: int = 1
    side: int = 0
    steps: int = 20_000


class Curve(NamedTuple):
    """A setting and its values, smallest first."""

    setting: str
    full: tuple[int, ...]
    smoke: tuple[int, ...]
    problem: Problem = Problem()


CURVES = {
    "training examples": Curve("explore", (1_000, 10_000, 100_000, 1_000_000, 10_000_000), (500, 1_000)),
    "classes": Curve("classes", (2, 10, 100, 1_000, 10_000), (2, 4), Problem(steps=2_000)),
    "arms": Curve("arms", (1, 2, 4, 8, 16), (1, 2)),
    "held-out examples": Curve("held_out", (1_000, 10_000, 100_000, 1_000_000), (500, 1_000)),
    "pixels": Curve("side", (8, 16, 32, 64, 128, 224), (8, 16), Problem(explore=640, held_out=128, side=8, steps=50)),
}
SMOKE_STEPS = 100


def collect(
    *, seeds: int, size: str, done: Collection[tuple[Any, ...]] = (), only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row per curve, setting and run.

    Args:
      seeds: number of runs of each setting.
      size: full, or smoke: small settings whose figures mean nothing.
      done: keys of rows to skip.
      only: first words of curves to measure, such as `classes`; all if empty.
    """
    words = {name.split()[0]: name for name in CURVES}
    if unknown := set(only) - set(words):
        raise InputError(
            f"--only of scaling takes {', '.join(words)}; got {', '.join(sorted(unknown))}: name some of these"
        )
    for seed in range(seeds):
        for word, name in words.items():
            curve = CURVES[name]
            for value in getattr(curve, size):
                at = value**2 if curve.setting == "side" else value
                if (name, at, seed) in done or (only and word not in only):
                    continue
                problem = curve.problem._replace(**{curve.setting: value})
                if size == "smoke":
                    problem = problem._replace(explore=min(problem.explore, 1_000), steps=SMOKE_STEPS)
                with tempfile.TemporaryDirectory() as directory:
                    yield {"curve": name, "at": at, "seed": seed, **_run(Path(directory), seed, problem)}


def _run(directory: Path, seed: int, problem: Problem) -> dict[str, Any]:
    write_data(directory, seed, problem)
    total = problem.explore + 3 * problem.held_out
    vectors = ("--student", "mlp:hidden=16")
    images = ("--student", "resnet:depth=8,width=8", "--batch-size", "32", "--augment", "none")
    command = [
        *(sys.executable, "-m", "ev3_distill", "compress", "--data", "npz:data.npz", "--teacher", "python:linear:logits"),
        *(images if problem.side else vectors),
        *("--arms", *ARMS[: problem.arms]),
        *("--budget", str(problem.steps), "--memory", "1G" if problem.explore > 20_000 else "4G", "--most", str(total)),
        *("--explore", str(problem.explore / total)),
        *(word for name in ("assess", "decide", "test") for word in (f"--{name}", str(problem.held_out / total))),
        *("--views", "1", "--teacher-as-is", "--seed", str(seed), "--out", "run"),
    ]  # fmt: skip
    peak = peak_memory(command, directory=directory, environment={"EV3_DISTILL_CACHE": "cache"}, quiet=True)
    cost = json.loads((directory / "run" / "report.json").read_text())["cost"]
    return {
        "ms_per_step": round(1000 * cost["phases"]["training"] / cost["steps"], 4),
        "compile_s": cost["compile_s"],
        "wall_s": cost["wall_s"],
        "peak": peak,
        "phases": cost["phases"],
    }


def write_data(directory: Path, seed: int, problem: Problem) -> None:
    """Writes `data.npz`, whose inputs are noisy centers of their classes, and the teacher that knows the centers."""
    rng = np.random.default_rng(seed)
    total, classes = problem.explore + 3 * problem.held_out, problem.classes
    centers: np.ndarray
    labels = (np.arange(total) % classes).astype(np.int32)
    if problem.side:  # the brightness of the upper half tells the class
        centers = np.repeat((31.5 + 32 * np.arange(classes, dtype=np.float32)[:, None]) / 16, 3, 1)
        inputs: np.ndarray = rng.integers(0, 64, (total, problem.side, problem.side, 3), np.uint8)
        inputs[:, : problem.side // 2] += (32 * labels[:, None, None, None]).astype(np.uint8)
    else:
        centers = 2 * rng.normal(size=(classes, FEATURES)).astype(np.float32)
        inputs = rng.standard_normal((total, FEATURES), np.float32)
        inputs += centers[labels]
    np.save(directory / "centers.npy", centers)
    np.savez(directory / "data.npz", inputs=inputs, labels=labels)
    (directory / "linear.py").write_text(TEACHER)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of each curve, and its exponents."""
    parts = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        values = _by_setting(rows, curve)
        body = [
            [f"{at:,}", *(_shown(name, statistics.median([row[name] for row in values[at]])) for name in FIGURES)]
            for at in values
        ]
        if len(values) > 1:
            whole = {name: exponents(values, name) for name in FIGURES}
            last = {name: exponents({at: values[at] for at in list(values)[-2:]}, name) for name in FIGURES}
            body += [
                ["exponent", *(_range(whole[name]) for name in FIGURES)],
                ["exponent, last", *(_range(last[name]) for name in FIGURES)],
            ]
            steepest = max(max(last[name]) for name in FIGURES)
            verdict = "held" if steepest <= STEEPEST + ALLOWED else "missed"
            target = f"target ≤ {STEEPEST:g}, with {ALLOWED:g} for noise: {verdict}."
            note = f"\n\nSteepest, between the two largest settings: {steepest:.2f}; {target}"
        else:
            note = ""
        parts.append(statistics.markdown([curve, *FIGURES.values()], body) + note)
    return "\n\n".join(parts)


def exponents(values: dict[int, list[dict[str, Any]]], figure: str) -> list[float]:
    """The least-squares slope of log(figure) over log(setting), one for each run.

    Args:
      values: rows by setting, at least two settings.
      figure: a field of the rows.
    """
    seeds = sorted(set.intersection(*({row["seed"] for row in rows} for rows in values.values())))
    x = np.log(list(values))
    slopes = []
    for seed in seeds:
        y = [math.log(next(row[figure] for row in rows if row["seed"] == seed)) for rows in values.values()]
        slopes.append(float(np.polyfit(x, y, 1)[0]))
    return slopes


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Each figure over each setting, on logarithmic axes."""
    from matplotlib.figure import Figure

    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure = Figure(figsize=(2.6 * len(curves), 8), layout="constrained")
    grid = figure.subplots(len(FIGURES), len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        values = _by_setting(rows, curve)
        for line, (name, label) in enumerate(FIGURES.items()):
            scale = 2**20 if name == "peak" else 1
            medians = [statistics.median([row[name] / scale for row in values[at]]).center for at in values]
            grid[line][column].plot(list(values), medians, marker="o", markersize=3)
            grid[line][column].set(xscale="log", yscale="log", ylabel=label if not column else "")
        grid[-1][column].set_xlabel(curve)
    return figure


def _by_setting(rows: Sequence[dict[str, Any]], curve: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of a curve by its setting, smallest first."""
    of_curve = [row for row in rows if row["curve"] == curve]
    return {at: [row for row in of_curve if row["at"] == at] for at in sorted({row["at"] for row in of_curve})}


def _shown(name: str, estimate: statistics.Interval) -> str:
    if name == "peak":
        return statistics.number(estimate.center / 2**20, 0)
    return statistics.number(estimate.center, 3 if name == "ms_per_step" else 1)


def _range(slopes: Sequence[float]) -> str:
    """The median of the runs, and their range if there are several."""
    center = statistics.number(float(np.median(slopes)), 2)
    if len(slopes) == 1:
        return center
    return f"{center} ({statistics.number(min(slopes), 2)} to {statistics.number(max(slopes), 2)})"
