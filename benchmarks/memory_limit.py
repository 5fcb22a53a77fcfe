"""Does a run stay under its memory limit if the data are four times as large?

For each row, one process writes images and a teacher to disk, and a second one runs `compress --memory LIMIT` on them,
including the teacher cache and the training. The figure is the peak resident set of that second process, with all libraries.
The student sees each image once. The teacher is a linear function of a few pixels, because only memory matters here. The
batch size is 32: the activations of a training step depend on the student, some 4 MB per example here, and no limit makes
them smaller.
"""

import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.benchmarks import statistics
from ev3_distill.benchmarks.child_process import peak_memory

KEY = ("seed",)  # identifies a row
TIMED = ("seconds",)  # depend on the machine
REPETITION = "run"
INTERVALS = "The peak of each run is measured, not estimated; a further run may have another peak."
LIMIT = {"full": 2**30, "smoke": 2**30}  # bytes
TIMES = {"full": 4.0, "smoke": 0.3}  # size of the data relative to the limit
SIDE = 128  # pixels
CLASSES = 4
TEACHER = """
import numpy as np

WEIGHTS = np.random.default_rng(7).normal(size=(48, 4)).astype(np.float32)


def logits(images):
    return images[:, ::32, ::32].reshape(len(images), -1) @ WEIGHTS
"""


def collect(*, seeds: int, size: str, done: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """One row per run.

    Args:
      seeds: number of runs.
      size: full, or smoke: data smaller than the limit, whose figures mean nothing.
      done: keys of rows to skip.
    """
    for seed in range(seeds):
        if (seed,) in done:
            continue
        with tempfile.TemporaryDirectory() as directory:
            yield {"seed": seed, **_run(Path(directory), seed, LIMIT[size], int(TIMES[size] * LIMIT[size]))}


def _run(directory: Path, seed: int, limit: int, total: int) -> dict[str, Any]:
    count = total // (SIDE * SIDE * 3)
    _write(directory / "images.npz", count, seed)
    (directory / "linear.py").write_text(TEACHER)
    command = [
        *(sys.executable, "-m", "ev3_distill", "compress", "--data", "npz:images.npz", "--teacher", "python:linear:logits"),
        *("--student", "conv4:width=8", "--arms", "kd4", "--batch-size", "32", "--budget", "1e"),
        *("--memory", f"{limit // 2**20}M"),
        *("--augment", "flip", "--views", "1", "--teacher-as-is", "--seed", str(seed), "--out", "run"),
    ]  # fmt: skip
    began = time.perf_counter()
    peak = peak_memory(command, directory=directory, environment={"EV3_DISTILL_CACHE": str(directory / "cache")})
    report = json.loads((directory / "run" / "report.json").read_text())
    return {
        "limit": limit,
        "data": count * SIDE * SIDE * 3,
        "peak": peak,
        "seconds": round(time.perf_counter() - began, 1),
        "steps": report["cost"]["steps"],
    }


def _write(path: Path, count: int, seed: int) -> None:
    """Writes images of noise whose upper half encodes the label, in blocks."""
    import zipfile

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("inputs.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
            np.lib.format.write_array_header_2_0(file, header)
            for start in range(0, count, 256):
                part = labels[start : start + 256]
                block = rng.integers(0, 128, (len(part), SIDE, SIDE, 3), np.uint8)
                block[:, : SIDE // 2] += (part * 32)[:, None, None, None].astype(np.uint8)
                file.write(block.tobytes())
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, labels)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Peak, limit and data of each run, and the largest peak."""
    worst = max(rows, key=lambda row: row["peak"])
    unit = 2**30
    body = [
        [f"{row['seed']}", *(f"{row[name] / unit:.2f}" for name in ("data", "limit", "peak")), f"{row['steps']:,}",
         f"{row['seconds']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    held = "held" if worst["peak"] <= worst["limit"] else "missed"
    return (
        statistics.markdown(["run", "data, GiB", "limit, GiB", "peak resident set, GiB", "steps", "seconds"], body)
        + f"\n\nThe largest peak is {worst['peak'] / worst['limit']:.2f} of the limit: {held}."
    )
