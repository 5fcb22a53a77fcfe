"""The seam for tasks: what the outputs of a network mean, and how they are trained, scored, stored and promised.

The core, training and certification know no task. What depends on the meaning of targets and outputs is a field of `Task`;
`tasks/classification/task.py` is one, and a new kind of task is another value of this class.

Conventions of every task:
  Targets, outputs and teacher outputs are pytrees of arrays whose first axis is the examples.
  A missing target is -1 in an integer leaf and nan in a floating leaf.
  Scores are per example, float32, higher is better; the promise's scores lie in [0, 1], and a missing target scores 0.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ev3_distill.certify.certificate import Table
from ev3_distill.certify.usefulness import Usefulness
from ev3_distill.tasks.metrics import Metric
from ev3_distill.types import Goal, Loss, Objective, Objectives, Promise, PyTree

__all__ = ["Metric", "Tables", "Task", "has_target", "no_tables"]


class Tables(Protocol):
    """Makes the certificate's tables."""

    def __call__(
        self,
        outputs: Any,
        *,
        class_names: Sequence[str],
        group_names: Sequence[str],
        confidence: float,
        among: int,
    ) -> tuple[Table, ...]:
        """Returns tables that each hold with the given confidence by themselves.

        Args:
          outputs: `tasks.outputs.Outputs` on the sealed split.
          class_names: of the classes, where the task has any.
          group_names: of the groups, where the data have any.
          confidence: of each table as a whole, in (0, 1).
          among: number of students for which the split was opened.
        """


def no_tables(
    outputs: Any, *, class_names: Sequence[str], group_names: Sequence[str], confidence: float, among: int
) -> tuple[Table, ...]:
    """A certificate without tables."""
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What the outputs of a network mean.

    Attributes:
      name: of the task, such as `classification`.
      target_spec: `jax.ShapeDtypeStruct`s of one example's target.
      output_spec: the same of a network's output for one example.
      teacher_spec: the same of a teacher's outputs for one example, by name. These arrays, and those of the teacher's
        features, are `Batch.teacher`.
      losses: loss factories by name. An arm of the same name trains with the loss.
      select: the smooth objective that detects the small steps of one trajectory.
      promise: what promotions prove and the certificate promises.
      metrics: rows by name; certificates claim those with `by_default`, and the guarded ones.
      strata: (targets [N, ...]) -> [N]: examples with equal values are one stratum, divided among the splits in proportion.
      targets_from_teacher: (teacher outputs by name [N, ...]) -> targets [N, ...] for data without any.
      same_answer: (outputs [N, ...], outputs [N, ...]) -> [N] bool: whether an exported file gives the same answers.
      teacher_codec: name of the codec in `teachers/cache/codec.py` that stores a teacher's outputs.
      diagnosis: name of the teacher check that applies; None for no check.
      card_task: (shape of one input) -> the task as model cards name it, such as `image-classification`.
      tables: makes the certificate's tables, such as the accuracy by class.
      usefulness: (targets, teacher outputs by name or None, scores= or outputs= of the student) -> the student beside a
        constant answer and its teacher; None for a task without such an answer.
      disagreement: (targets, teacher outputs by name) -> where the two disagree, such as the classes that are confused; None
        for a task that does not say.
    """

    name: str
    target_spec: PyTree
    output_spec: PyTree
    teacher_spec: Mapping[str, jax.ShapeDtypeStruct]
    losses: Mapping[str, Callable[..., Loss]]
    select: Objective
    promise: Promise
    metrics: Mapping[str, Metric]
    strata: Callable[[Any], np.ndarray]
    targets_from_teacher: Callable[[Mapping[str, np.ndarray]], Any]
    same_answer: Callable[[Any, Any], np.ndarray]
    teacher_codec: str
    diagnosis: str | None
    card_task: Callable[[tuple[int, ...]], str]
    tables: Tables = no_tables
    usefulness: Callable[..., Usefulness | None] | None = None
    disagreement: Callable[[Any, Mapping[str, Any]], Any] | None = None

    def objectives(self, goals: Sequence[Goal] = ()) -> Objectives:
        """The scores that select and promote students, with these requirements."""
        return Objectives(self.select, self.promise, tuple(goals))


def has_target(targets: PyTree) -> np.ndarray:
    """Which examples have a target: [N] bool, False where any entry of it is missing.

    Args:
      targets: leaves [N, ...].
    """

    def present(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        known = ~np.isnan(array) if array.dtype.kind == "f" else array != -1
        return np.asarray(known.reshape(len(array), -1).all(axis=1))

    return np.logical_and.reduce([present(leaf) for leaf in jax.tree.leaves(targets)])
