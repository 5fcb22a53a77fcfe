"""Is a student from here better than one from a plain PyTorch loop of the same cost?

The pretrained ResNet-56 is distilled into a ResNet-8 on the CIFAR-10 image folder. For each seed:

- `ev3-distill`: `compress --student resnet8 --budget 10e`, with defaults otherwise;
- `torch KD`: `benchmarks/torch_kd.py`, the loop that an engineer would write: 10 epochs of the same 45,000 images, batch size
  128, SGD with Nesterov momentum, one cycle up to a rate of 0.1, weight decay 5e-4, T = 4, alpha = 0.9.

Both take the same number of training steps; EV3's are those of all its arms. Accuracy is on the folder's 10,000 test images,
which neither uses for any choice. Differences are paired image by image.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ev3_distill import students
from ev3_distill.benchmarks import datasets, statistics, torch_kd, torch_resnet
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.data.splits import split_rows
from ev3_distill.teachers.kinds.flax import forward

KEY = ("seed", "contender")  # identifies a row
TIMED = ("seconds",)  # depend on the machine
INTERVALS = (
    "Two kinds of intervals, both 95 %: over test images for the students of these seeds, and Student's t over "
    "seeds. The verdict goes by the interval over images."
)
EPOCHS = {"full": 10, "smoke": 0.02}
CONTENDERS = ("ev3-distill", "torch KD")
TARGET = 0.0  # points that ours must be ahead
TEACHER_OPTIONS = (
    *("--teacher-input.layout", "NCHW", "--teacher-input.mean", "0.485", "0.456", "0.406"),
    *("--teacher-input.std", "0.229", "0.224", "0.225"),
)


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per seed and contender.

    Args:
      seeds: number of seeds, each with its own splits, initial parameters and batches.
      size: full, or smoke: a fiftieth of an epoch, whose figures mean nothing.
      done: keys of rows to skip.
    """
    archive, onnx = datasets.cifar10_files()
    dataset = load_data(f"folder:{archive}")
    for seed in range(seeds):
        for contender in CONTENDERS:
            if (seed, contender) in done:
                continue
            began = time.perf_counter()
            run = _ours if contender == "ev3-distill" else _theirs
            right, steps = run(dataset, archive, onnx, seed, EPOCHS[size])
            yield {
                "seed": seed, "contender": contender, "steps": steps, "accuracy": float(right.mean()),
                "seconds": round(time.perf_counter() - began, 1),
                "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
            }  # fmt: skip


def _ours(dataset: Dataset, archive: Path, onnx: Path, seed: int, epochs: float) -> tuple[np.ndarray, int]:
    """Correctness per test image [N] of the delivered student, and the number of its steps."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [
            *(sys.executable, "-m", "ev3_distill", "compress", "--teacher", f"onnx:{onnx}", *TEACHER_OPTIONS),
            *("--data", f"folder:{archive}", "--student", "resnet8", "--budget", f"{epochs:g}e"),
            *("--seed", str(seed), "--out", str(run)),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        network, variables = students.load(run)
        report = json.loads((run / "report.json").read_text())
    assert dataset.test_rows is not None
    predicted = forward(network, variables)(dataset.inputs[dataset.test_rows]).argmax(axis=1)
    return predicted == dataset.labels[dataset.test_rows], int(report["cost"]["steps"])


def _theirs(dataset: Dataset, archive: Path, onnx: Path, seed: int, epochs: float) -> tuple[np.ndarray, int]:
    """The same for the PyTorch loop, which trains on the images of EV3's explore split."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    explore = split_rows(dataset.labels, dataset.test_rows, seed=seed)["explore"]
    if epochs < 1:
        explore = explore[: int(epochs * len(explore))]
    model = torch_kd.train(
        dataset.inputs[explore],
        dataset.labels[explore],
        teacher=torch_resnet.load_teacher(onnx),
        options=torch_kd.Options(depth=8, epochs=max(int(epochs), 1), seed=seed),
        on_epoch=lambda epoch, model, seconds: print(f"torch KD: epoch {epoch}, {seconds:.0f} s", file=sys.stderr),
    )
    assert dataset.test_rows is not None
    right = torch_kd.predictions(model, dataset.inputs[dataset.test_rows]) == dataset.labels[dataset.test_rows]
    return right, max(int(epochs), 1) * -(-len(explore) // 128)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracies per seed, and the paired difference with intervals over seeds and over images."""
    right: dict[str, dict[int, np.ndarray]] = {contender: {} for contender in CONTENDERS}
    for row in rows:
        packed = np.frombuffer(base64.b64decode(row["right"]), np.uint8)
        right[row["contender"]][row["seed"]] = np.unpackbits(packed).astype(float)
    seeds = sorted(right[CONTENDERS[0]].keys() & right[CONTENDERS[1]].keys())
    body = [
        [f"{row['contender']}, seed {row['seed']}", f"{100 * row['accuracy']:.2f}", f"{row['steps']:,}",
         f"{row['seconds']:,.0f}"]
        for row in sorted(rows, key=lambda row: (CONTENDERS.index(row["contender"]), row["seed"]))
    ]  # fmt: skip
    shown = statistics.markdown(["contender", "test accuracy, %", "steps", "seconds"], body)
    if not seeds:
        return shown
    ours, theirs = (np.stack([right[contender][seed] for seed in seeds]) for contender in CONTENDERS)
    by_seed = 100 * (ours - theirs).mean(axis=1)
    by_image = 100 * (ours - theirs).mean(axis=0)
    half = float(stats.norm.ppf(0.975) * by_image.std(ddof=1) / len(by_image) ** 0.5)
    of_images = statistics.Interval(
        float(by_image.mean()), by_image.mean() - half, by_image.mean() + half, len(by_image), 0.95
    )
    of_seeds = statistics.mean(list(by_seed))
    return (
        f"{shown}\n\nev3-distill minus PyTorch, paired: {statistics.spread(of_images, 2)} points (95 % interval over "
        f"{len(by_image):,} test images, for these "
        f"{len(seeds)} seeds); {statistics.spread(of_seeds, 2)} (95 % t interval over seeds); target > {TARGET:g}: "
        f"{statistics.verdict(of_images, TARGET)}."
    )
