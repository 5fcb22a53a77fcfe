"""Latency of an exported file, beside that of its run's teacher. Milliseconds."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ev3_distill.data.sources import Dataset
from ev3_distill.export import teacher_latency
from ev3_distill.export.formats.runtime import ExportedModel
from ev3_distill.runtime.timing import PASSES, quantiles

BATCH_SIZES = (1, 64)

Times = dict[int, np.ndarray]  # times [passes], by batch size


def measure(file: ExportedModel, dataset: Dataset, run: Path | None) -> tuple[Times, Times | str]:
    """Times passes of a file, and of the teacher of its run on as many cores.

    Args:
      file: an open file.
      dataset: provides the inputs.
      run: of the file; None: no teacher.

    Returns:
      The times of the file and of the teacher. A string in place of the teacher's gives the reason; it is empty without a run.
    """
    examples = np.asarray(dataset.inputs[np.arange(min(max(BATCH_SIZES), len(dataset.labels)))])
    times = {}
    for size in BATCH_SIZES:
        batch = examples[np.resize(np.arange(len(examples)), size)]
        times[size] = file.passes_ms(batch, PASSES if size == 1 else PASSES // 3)
    teacher: Times | str = ""
    if run is not None:
        teacher = teacher_latency.measure_teacher(run, dataset, examples, batch_sizes=BATCH_SIZES, threads=file.threads)
    return times, teacher


def report_lines(times: Times, teacher: Times | str, *, threads: int) -> list[str]:
    """Lines of text about the times that `measure` returned."""
    lines = [_line("", size, quantiles(of), threads=threads) for size, of in times.items()]
    if isinstance(teacher, str):
        return [*lines, f"latency of the teacher: {teacher}"] if teacher else lines
    return lines + [_line(" of the teacher", size, quantiles(of), threads=threads) for size, of in teacher.items()]


def _line(owner: str, size: int, summary: Mapping[str, float], *, threads: int) -> str:
    return (
        f"latency{owner} at batch {size}: {summary['p50']:.3g} ms p50, {summary['p99']:.3g} ms p99, "
        f"{threads} thread{'s' if threads > 1 else ''}, {summary['passes']} passes"
    )
