"""Checks of the labels of a run's data: whether there are any, and what a user should know of them."""

from ev3_distill.data.class_names import untrained_classes_warning
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.tasks.base import has_target


def require_labels(dataset: Dataset, subject: str) -> None:
    """Raises InputError where no example has a label.

    Args:
      dataset: to check.
      subject: of the error, such as `evaluate`.
    """
    if not has_target(dataset.labels).any():
        raise InputError(f"{subject} needs labels; {dataset.source} has none: name a --teacher, or data with labels")


def describe_labels(dataset: Dataset) -> None:
    """Prints how many examples of a run have a label, if only some have, and warns of classes that none has.

    Args:
      dataset: of the run.
    """
    if dataset.partly_labeled:
        known, total = int(dataset.is_labeled.sum()), len(dataset.labels)
        print(
            f"{dataset.source}: {known:,} of {total:,} examples have a label ({known / total:.1%}); assess, decide and test "
            "are dealt from these, the others only train"
        )
    if text := untrained_classes_warning(dataset):
        warn(text)
