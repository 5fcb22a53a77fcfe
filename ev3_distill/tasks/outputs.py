"""Outputs of a student and its teacher on a split, and the bounds of a task's metrics from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ev3_distill.certify.certificate import Bound
from ev3_distill.errors import InputError
from ev3_distill.tasks.base import has_target
from ev3_distill.tasks.metrics import Metric, MetricQuery, find_metric, resolve

__all__ = ["Outputs", "bounds_of"]

UNIT_SEED = 0  # draws the examples that stand for their units


class Outputs(NamedTuple):
    """Outputs on N examples, in host memory. Pytrees are as the task declares them; each leaf is [N, ...]."""

    student: Any  # the student's outputs
    targets: Any  # with missing ones marked as in `tasks/base.py`
    teacher: Mapping[str, Any] | None = None  # the teacher's outputs by name; None where they are unknown
    groups: np.ndarray | None = None  # [N] from 0 to num_groups - 1, -1 for none
    num_groups: int = 0
    units: np.ndarray | None = None  # [N] integers, the independent unit of each example; None: each example is one

    def with_target(self) -> "Outputs":
        """The examples that have a target.

        Raises:
          InputError: none has.
        """
        rows = np.flatnonzero(has_target(self.targets))
        if not len(rows):
            raise InputError("this metric needs labeled examples; got none: claim agreement instead")
        return self._at(rows)

    def one_per_unit(self) -> "Outputs":
        """One example of each unit, drawn uniformly by a fixed seed: independent draws of an average example of a new unit."""
        if self.units is None:
            return self
        return self._at(self.rows_of_units())._replace(units=None)

    def rows_of_units(self) -> np.ndarray:
        """The row of one example of each unit [U], ascending, drawn uniformly by a fixed seed."""
        units = np.arange(len(jax.tree.leaves(self.targets)[0])) if self.units is None else np.asarray(self.units)
        order = np.random.default_rng(UNIT_SEED).permutation(len(units))
        return np.sort(order[np.unique(units[order], return_index=True)[1]])

    def means_of_units(self, scores: np.ndarray) -> np.ndarray:
        """The mean score of each unit [U], in the order of their numbers; the scores [N] themselves without units."""
        if self.units is None:
            return scores
        number, counts = np.unique(self.units, return_inverse=True, return_counts=True)[1:]
        return np.asarray(np.bincount(number, weights=scores) / counts)

    def _at(self, rows: np.ndarray) -> "Outputs":
        arrays = (self.student, self.targets, self.teacher, self.groups, self.units)
        student, targets, teacher, groups, units = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], arrays)
        return Outputs(student, targets, teacher, groups, self.num_groups, units)


def bounds_of(
    metrics: Iterable[str],
    outputs: Outputs,
    *,
    rows: Mapping[str, Metric] | None = None,
    costs: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, Bound]:
    """The bound of each metric in the population, as a function of the claim's own confidence.

    Args:
      metrics: names as guards write them; duplicates count once.
      outputs: on the sealed split.
      rows: the task's metrics by name; all known ones by default.
      costs: [K, K] of predicting a class (column) for an example of a class (row), for `cost`.
      class_names: of the K classes; empty where they are numbered.

    Raises:
      InputError: a user's own function cannot be used, or no example has what the metric needs.
      ValueError: there is no such metric, or outputs lack what it needs.
    """
    result = {}
    for name in dict.fromkeys(metrics):
        query = find_metric(name, rows)
        if query is None or query.row.bound is None:
            raise ValueError(f"a bound needs a metric that is measured on examples; got '{name}': see tasks/metrics.py")
        bound = resolve(query.row.bound)
        result[name] = bound(MetricQuery(query.row, name, query.argument, costs, class_names), outputs)
    return result
