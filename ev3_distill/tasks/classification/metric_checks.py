"""Arguments of metrics, and whether data can answer a guard where more is needed than labels, a teacher, groups or costs.

Each `check_*` function is named by a row of `tasks/metrics.py`, takes (query, data) and raises InputError where the data
cannot answer.
"""

from ev3_distill.errors import InputError
from ev3_distill.tasks.classification.user_metrics import function_named
from ev3_distill.tasks.metrics import GuardData, MetricQuery

__all__ = ["check_class", "check_top_k", "check_user_metric", "class_index"]


def class_index(query: MetricQuery, num_classes: int) -> int:
    """Index of the class in a metric of one class: a class name, or else a number from 0 unless all names are numbers.

    Raises:
      InputError: there is no such class.
    """
    names = list(query.class_names) or [str(index) for index in range(num_classes)]
    if query.argument in names:
        return names.index(query.argument)
    shown, numbered = ", ".join(names[:10]) + (", ..." if len(names) > 10 else ""), ""
    numbers = [str(index) for index in range(num_classes)]
    if names == numbers or not all(name.removeprefix("-").isdecimal() for name in names):  # else a number is a name
        if query.argument.isdecimal() and int(query.argument) < num_classes:
            return int(query.argument)
        numbered = f", or a number from 0 to {num_classes - 1}"
    raise InputError(
        f"{query.name} needs a class by its name or number; got '{query.argument}': use one of {shown}{numbered}"
    )


def check_class(query: MetricQuery, data: GuardData) -> None:
    """The class must exist and have examples."""
    index = class_index(query, data.num_classes)
    if not (data.targets == index).any():
        raise InputError(
            f"a guard on {query.name} needs examples of that class; {data.source} has none: guard another class"
        )


def check_top_k(query: MetricQuery, data: GuardData) -> None:
    """K must be below the number of classes."""
    if int(query.argument) >= data.num_classes:
        raise InputError(
            f"a guard on {query.name} needs more classes than K; {data.source} has {data.num_classes}, so any prediction "
            "is right: guard accuracy"
        )


def check_user_metric(query: MetricQuery, data: GuardData) -> None:
    """The function must be importable."""
    function_named(query.name)
