"""Checks that data and student can answer the guards of a user, before anything is trained."""

from collections.abc import Mapping, Sequence

import numpy as np

from ev3_distill.data.class_names import nfc
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.guards import Guard, parse
from ev3_distill.tasks.base import has_target
from ev3_distill.tasks.metrics import GuardData, MetricQuery, find_metric, resolve


def parse_guards(
    texts: Sequence[str],
    dataset: Dataset,
    *,
    num_classes: int,
    sizes: Mapping[str, int],
    costs: np.ndarray | None,
    teacher: bool = True,
    class_names: Sequence[str] = (),
    grouped: bool = False,
) -> list[Guard]:
    """Parses guards, and refuses those that these data cannot answer or this student cannot meet.

    Args:
      texts: of the guards.
      dataset: on which the student will be scored.
      num_classes: that the student tells apart.
      sizes: the student's `params` and `bytes`.
      costs: [K, K] of predictions, where there are any.
      teacher: whether the teacher's outputs will be known.
      class_names: of the student's classes; the data's by default.
      grouped: whether the groups of the data are independent units, so that those of the sealed split are new.

    Raises:
      InputError: a guard cannot be parsed, answered or met.
    """
    guards = [parse(nfc(text)) for text in texts]
    names = tuple(map(nfc, class_names or dataset.class_names))
    data = GuardData(dataset.source, dataset.labels, num_classes, names)
    available = {
        "labels": bool(has_target(dataset.labels).any()),
        "teacher": teacher,
        "groups": dataset.groups is not None,
        "costs": costs is not None,
    }
    for guard in guards:
        query = find_metric(guard.metric)
        if grouped and query is not None and "groups" in query.row.needs:
            raise InputError(
                f"a guard on {guard.metric} needs groups that are in all splits; --split-by groups puts each group into one: "
                "omit one of the two"
            )
        if query is not None:
            _check(query, data, available)
    for guard in guards:
        if guard.row.source == "size" and sizes[guard.metric] > guard.threshold:
            raise InputError(
                f"a guard must be within reach; got '{guard}' and a student of {sizes[guard.metric]:,} {guard.row.unit}: "
                "name a smaller --student"
            )
    return guards


def _check(query: MetricQuery, data: GuardData, available: Mapping[str, bool]) -> None:
    """Raises InputError where the data cannot answer the metric."""
    ways_out = {
        "labels": f"labels; {data.source} has none: guard agreement",
        "teacher": "the teacher; evaluate has only the student: guard accuracy",
        "groups": f"groups; {data.source} has none: guard worst_class_accuracy",
        "costs": "costs; got none: give a CSV file of them with --costs",
    }
    for need in query.row.needs:
        if not available[need]:
            raise InputError(f"a guard on {query.name} needs {ways_out[need]}")
    if query.row.check is not None:
        check = resolve(query.row.check)
        check(MetricQuery(query.row, query.name, query.argument, class_names=data.class_names), data)
