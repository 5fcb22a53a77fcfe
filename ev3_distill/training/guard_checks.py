"""Demands: what a user asks to hold of a student, once it is clear that these data and this student can answer it."""

from collections.abc import Mapping, Sequence

import numpy as np

from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.guards import FORMS, KNOWN, TOP_K, Guard, form_of, parse
from ev3_distill.tasks.classification import metric_bounds


def check_labelled(dataset: Dataset, who: str) -> None:
    """Raises InputError where no example has a label."""
    if not (dataset.labels >= 0).any():
        raise InputError(f"{who} needs labels; {dataset.source} has none: name a --teacher, or data with labels")


def guards_of(
    texts: Sequence[str],
    dataset: Dataset,
    *,
    num_classes: int,
    known: Mapping[str, int],
    costs: np.ndarray | None,
    teacher: bool = True,
) -> list[Guard]:
    """The guards, parsed, once it is clear that none is beyond what can be known, or reached.

    Args:
      texts: of the guards.
      dataset: that the student will be scored on.
      num_classes: that it tells apart.
      known: of it, see `guards.KNOWN`.
      costs: of its mistakes, where there are any.
      teacher: whether what its teacher says will be known.
    """
    parsed = [parse(text) for text in texts]
    for guard in parsed:
        _check_known(guard, dataset, num_classes, costs=costs is not None, teacher=teacher)
    for guard in parsed:
        if guard.metric in KNOWN and known[guard.metric] > guard.threshold:
            has = f"{known[guard.metric]:,} {'parameters' if guard.metric == 'params' else 'bytes'}"
            raise InputError(
                f"a guard must be within reach; got '{guard}' and a student of {has}: name a smaller --student"
            )
    return parsed


def _check_known(guard: Guard, dataset: Dataset, num_classes: int, *, costs: bool, teacher: bool) -> None:
    """Whether a guard's metric can be known of a student on these data."""
    needs, told = guard.about.needs, f"a guard on {guard.metric} needs"
    if "labels" in needs and not (dataset.labels >= 0).any():
        raise InputError(f"{told} labels; {dataset.source} has none: guard agreement")
    if "teacher" in needs and not teacher:
        raise InputError(f"{told} the teacher; evaluate has the student alone: guard accuracy")
    if "groups" in needs and dataset.groups is None:
        raise InputError(f"{told} groups; {dataset.source} has none: guard worst_class_accuracy")
    if "costs" in needs and not costs:
        raise InputError(f"{told} costs; got none: give a CSV file of them by --costs")
    top = TOP_K.search(guard.metric) if form_of(guard.metric) in FORMS else None
    if top and int(top[1]) >= num_classes:
        raise InputError(
            f"{told} more classes; {dataset.source} has {num_classes}, and any answer is right: guard accuracy"
        )
    if form_of(guard.metric) == "MODULE:FUNCTION":
        metric_bounds.function_named(guard.metric)
