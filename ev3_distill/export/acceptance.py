"""Acceptance of an exported file: it is run again, and accepted only if its outputs equal the student's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ev3_distill.errors import InputError, RequirementError
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.tasks.base import Task
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.outputs import Outputs, bounds_of

TOLERANCE = 1e-4  # largest difference from the student's outputs, relative to the largest of them if that is above 1
INT8_TOLERANCE = (
    0.2  # the same for int8, where sums in another order may round to the next integer, once or more per layer
)
INT8_AGREEMENT = 0.9  # for int8, trained for or not: smallest fraction of examples with the student's answer
CHUNK = 64  # examples per pass

Predict = Callable[[np.ndarray], np.ndarray]  # inputs [N, ...] -> outputs [N, ...]


TASKS: dict[str, Callable[[int], Task]] = {"classification": classification}  # number of classes -> task


def task_of(class_names: Sequence[str], name: str = "classification") -> Task:
    """The task with these classes.

    Args:
      class_names: of the run's data.
      name: of the task. Exported files are about classification, and so are runs whose report names no task.

    Raises:
      InputError: the task is not one that can be exported and evaluated.
    """
    if name not in TASKS:
        raise InputError(
            f"export and evaluate need a run of {' or '.join(TASKS)}; this run's task is '{name}': score its student in Python "
            "with load_student"
        )
    return TASKS[name](len(class_names))


def task_of_report(run_report: Mapping[str, Any]) -> Task:
    """The task of the run with this report."""
    return task_of(run_report["data"]["classes"], run_report.get("task", "classification"))


def run_file(path: Path, inputs: np.ndarray) -> np.ndarray:
    """The outputs [N, K] of an exported file for inputs [N, ...]."""
    with open_exported(path) as file:
        return np.concatenate([file.outputs(inputs[i : i + CHUNK]) for i in range(0, len(inputs), CHUNK)])


def compare(path: Path, student: Predict, inputs: np.ndarray, *, task: Task, output: str) -> dict[str, Any]:
    """Compares a file with its student.

    Args:
      path: of the file.
      student: returns the student's logits.
      inputs: [N, ...] as in the data set.
      task: decides which outputs are the same answer.
      output: logits or probabilities.

    Returns:
      The number of `examples`, the relative `difference` of the outputs, and the `agreement`: the fraction of same answers.
    """
    outputs = run_file(path, inputs)
    expected = student(inputs)
    same = task.same_answer(outputs, expected)
    if output == "probabilities":
        expected = np.asarray(jax.nn.softmax(expected))
    difference = np.abs(outputs - expected).max() / max(1.0, np.abs(expected).max())
    return {
        "examples": len(inputs),
        "difference": float(difference) if np.isfinite(difference) else float("inf"),
        "agreement": float(same.mean()),
    }


def check_accepted(comparison: dict[str, Any], *, format: str, precision: str, real_data: bool) -> None:
    """Raises InputError unless a file's outputs equal the student's.

    Args:
      comparison: see `compare`.
      format: of the file, for the message.
      precision: float32 or int8.
      real_data: whether the inputs were the run's data. Random inputs say nothing about the agreement of an int8 file.
    """
    tolerance, agreement = TOLERANCE, 0.0
    if precision == "int8":
        tolerance, agreement = INT8_TOLERANCE, INT8_AGREEMENT if real_data else 0.0
    if comparison["difference"] > tolerance or comparison["agreement"] < agreement:
        raise InputError(
            f"the outputs of an exported file must equal the student's; this {format} file differs by "
            f"{comparison['difference']:.2g} of the largest output on {comparison['examples']} examples, {tolerance:g} is "
            f"allowed, and gives the same answer on {comparison['agreement']:.1%}: it was deleted; try another --format, and "
            "report this as a bug"
        )


def check_quantized(comparison: dict[str, Any]) -> None:
    """Raises RequirementError unless a file that was quantized after training gives the answers of its student.

    Args:
      comparison: on the run's data, see `compare`.
    """
    if comparison["agreement"] < INT8_AGREEMENT:
        raise RequirementError(
            f"an int8 file must give its student's answer on at least {INT8_AGREEMENT:.0%} of the examples; this one does on "
            f"{comparison['agreement']:.1%} of {comparison['examples']:,} on decide, and was deleted: train the student for "
            "int8 with compress --deploy int8, or omit --int8"
        )


def mean_score(task: Task, outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean of the task's promised score, such as the accuracy, over the examples with a target."""
    name = task.promise.name
    point: float = bounds_of([name], Outputs(outputs, targets), rows=task.metrics)[name](0.5).point
    return point
