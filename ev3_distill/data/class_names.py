"""Class names: their normal form, and the classes of new data paired with those of a student by name.

Unicode has several spellings of a name: macOS stores an accented letter of a file name as two characters, Linux as one. All
names are compared in the normal form NFC (Unicode Standard Annex 15).
"""

import collections
import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np

from ev3_distill.data.sources.dataset import Dataset
from ev3_distill.errors import InputError

LISTED = 5  # most names that a message lists


def nfc(name: str) -> str:
    """A name in the normal form NFC."""
    return unicodedata.normalize("NFC", name)


def normalize(dataset: Dataset) -> Dataset:
    """The data set with class names in normal form.

    Raises:
      InputError: two names are the same, or become so.
    """
    names = tuple(map(nfc, dataset.class_names))
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(
            f"{dataset.source}: each class needs a name of its own; got {listed(repeated)} for several: rename or merge them"
        )
    return dataset if names == dataset.class_names else dataclasses.replace(dataset, class_names=names)


def name_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The data set with these class names, such as those of a teacher, if it has no labels and no names of its own."""
    if dataset.class_names or not names or (dataset.labels >= 0).any():
        return dataset
    return dataclasses.replace(dataset, class_names=tuple(map(nfc, names)), num_classes=len(names))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether names are just 0 to K-1 in order, as where a data set has numbers and no names."""
    return list(names) == [str(i) for i in range(len(names))]


def are_ids(names: Sequence[str]) -> bool:
    """Whether names are integers, but not just 0 to K-1, so that the number of a class is not its name."""
    return all(name.removeprefix("-").isdecimal() for name in names) and not are_numbers(names)


def match_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Numbers the labels of a data set as a student numbers its classes.

    A label belongs to the student's class of the same name. Labels that are just numbers from 0 are positions where the student
    has names; where its names are other integers, they are names as well.

    Args:
      dataset: with labels.
      names: of the student's K classes, in its order.

    Returns:
      The data set with labels in 0 .. K-1 and the student's class names.

    Raises:
      InputError: a class that occurs in the data is none of the student's.
    """
    known = tuple(map(nfc, names))
    counts = collections.Counter(known)
    index = {name: i for i, name in enumerate(known) if counts[name] == 1}
    own, labels = tuple(map(nfc, dataset.class_names)), dataset.labels
    present = np.unique(labels[labels >= 0])
    if own == known[: len(own)]:
        table = np.arange(len(own))
    elif unknown := [own[label] for label in present if own[label] not in index]:
        if not are_numbers(own) or are_ids(known) or present[-1] >= len(known):
            raise InputError(_unknown(dataset.source, unknown, known))
        table = np.arange(len(own))
    else:
        table = np.array([index.get(name, -1) for name in own])
    renumbered = np.where(labels >= 0, table[labels], labels).astype(labels.dtype)
    return dataclasses.replace(dataset, labels=renumbered, num_classes=len(names), class_names=tuple(names))


def _unknown(source: str, unknown: Sequence[str], known: Sequence[str]) -> str:
    """The text of an error."""
    remedy = "rename the classes of the data as the student knows them, or leave those examples out"
    if are_numbers(known):
        remedy = "the student's classes have numbers and no names: name the classes of the data by these numbers"
    return (
        f"a student can be scored on its own classes only, and they are matched by name; {source} has {listed(unknown)}, the "
        f"student knows {listed(known)}: {remedy}"
    )


def absent_classes(dataset: Dataset, rows: np.ndarray | None = None) -> list[str]:
    """Names of the classes without an example.

    Args:
      dataset: with labels.
      rows: to look at; None: all.
    """
    labels = dataset.labels if rows is None else dataset.labels[rows]
    present = set(np.unique(labels).tolist())
    return [name for i, name in enumerate(dataset.class_names) if i not in present]


def pairing_warnings(dataset: Dataset, matched: Dataset, rows: np.ndarray | None = None) -> list[str]:
    """What a user should know of the result of `match_classes`.

    Args:
      dataset: as it was.
      matched: the result.
      rows: in use; None: all.
    """
    warnings = []
    names, known = dataset.class_names, tuple(map(nfc, matched.class_names))
    if are_numbers(names) and not are_numbers(known) and not are_ids(known):
        pairs = listed([f"{i} is {name}" for i, name in zip(names, known, strict=False)])
        warnings.append(f"{dataset.source} has numbers for classes, taken in the student's order: {pairs}")
    if absent := absent_classes(matched, rows):
        warnings.append(
            f"{dataset.source} has no example of {len(absent):,} of the student's {len(known):,} classes ({listed(absent)}): "
            "nothing is shown about them"
        )
    return warnings


def untrained_classes_warning(dataset: Dataset) -> str:
    """A warning about classes that no example outside the data's own test rows has; empty if there are none."""
    if (dataset.labels < 0).all():
        return ""
    train = np.ones(len(dataset.labels), bool)
    if dataset.test_rows is not None:
        train[dataset.test_rows] = False
    absent, total = absent_classes(dataset, np.flatnonzero(train)), len(dataset.class_names)
    if not absent:
        return ""
    remedy = "a student cannot learn them; add examples, or remove the classes"
    if are_numbers(dataset.class_names):
        remedy = f"where labels are ids, or begin at 1, give {dataset.source},labels=ids; else add examples"
    if dataset.partly_labeled:
        remedy = "nothing can be shown about them, and only a teacher can tell them; label examples of each class"
    return (
        f"{dataset.source}: {len(absent):,} of {total:,} classes never occur in training ({listed(absent)}): {remedy}"
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:LISTED])
    return f"{shown} and {len(names) - LISTED:,} more" if len(names) > LISTED else shown
