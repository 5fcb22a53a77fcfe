"""The certificate's tables for classification: accuracy by class, and by group."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ev3_distill.certify.certificate import Table, part_bounds
from ev3_distill.tasks.classification.example_metrics import hit
from ev3_distill.tasks.outputs import Outputs

__all__ = ["Parts", "accuracy_by", "accuracy_tables"]


class Parts(NamedTuple):
    """A partition of a split into classes or groups."""

    of: str  # class or group
    members: np.ndarray  # [N] from 0, the part of each example; -1 for none
    names: Sequence[str]


def accuracy_tables(
    outputs: Outputs, *, class_names: Sequence[str], group_names: Sequence[str], confidence: float, among: int
) -> tuple[Table, ...]:
    """The accuracy by class, and by group where examples have groups; no table without labels.

    Args:
      outputs: on the sealed split.
      class_names: of the K classes.
      group_names: of the groups.
      confidence: of each table as a whole, in (0, 1).
      among: number of students for which the split was opened.
    """
    if not (outputs.targets >= 0).any():
        return ()
    has_units = outputs.units is not None
    outputs = outputs.with_target().one_per_unit() if has_units else outputs
    parts = [Parts("class", outputs.targets, class_names)]
    if outputs.groups is not None and not has_units:  # groups that are units are all new: none recurs
        parts.append(Parts("group", outputs.groups, group_names))
    return tuple(accuracy_by(outputs, part, confidence=confidence, among=among) for part in parts)


def accuracy_by(outputs: Outputs, parts: Parts, *, confidence: float, among: int = 1) -> Table:
    """The accuracy on each part, with bounds that hold jointly with the given confidence.

    Each of K parts has Clopper and Pearson's bound at the level (1 - confidence) / (K among) (Bonferroni). A part without
    examples has no point, and the bound 0.

    Args:
      outputs: on the sealed split, [N].
      parts: classes or groups of the same examples.
      confidence: of the table as a whole, in (0, 1).
      among: number of students for which the split was opened.
    """
    labeled = np.where(outputs.targets >= 0, parts.members, -1)
    hits = hit(outputs.student, outputs.targets)
    each = 1 - (1 - confidence) / len(parts.names) / among
    by_part = part_bounds(hits, labeled, len(parts.names), confidence=each)
    rows = [(name, k / n if n else None, bound, n) for name, (k, n, bound) in zip(parts.names, by_part, strict=True)]
    return Table(parts.of, confidence, tuple(rows))
