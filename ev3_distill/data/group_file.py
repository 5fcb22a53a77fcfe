"""`--groups FILE`: the group of each example from a file of its own, for data that have no column of groups."""

import csv
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.runtime import npz

__all__ = ["same_content", "with_groups"]

_HALF = 32  # hexadecimal digits of a fingerprint that identify the data without their groups


def with_groups(dataset: Dataset, file: str) -> Dataset:
    """A data set with the groups of a file in place of its own.

    Args:
      dataset: without these groups.
      file: .npz with an array `groups` (integers or text [N], in the order of the data), or .csv whose rows are the name of
        an image in the folder and its group, without a header.

    Raises:
      InputError: the file cannot be read or lacks the group of an example.
    """
    path = Path(file).expanduser()
    values = _by_name(dataset, path) if path.suffix.lower() == ".csv" else _by_position(dataset, path)
    names, groups = np.unique(values, return_inverse=True)
    digest = hashlib.sha256("\0".join(values.tolist()).encode()).hexdigest()
    fingerprint = dataset.fingerprint[:_HALF] + digest[:_HALF]
    return dataclasses.replace(
        dataset, groups=groups.astype(np.int32), group_names=tuple(map(str, names)), fingerprint=fingerprint
    )


def same_content(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same data, whatever the groups that files gave them."""
    return one[:_HALF] == other[:_HALF]


def _by_position(dataset: Dataset, path: Path) -> np.ndarray:
    content = npz.read(path, (("groups",),), optional="", option="--groups", expected="groups")["groups"]
    n = len(dataset.labels)
    if content.shape != (n,) or content.dtype.kind not in "uiU":
        raise InputError(
            f"--groups needs an integer or a text for each of the {n} examples of {dataset.source}; {path} has "
            f"{content.dtype} {list(content.shape)}: give one for each, in the order of the data"
        )
    return content.astype(str)


def _by_name(dataset: Dataset, path: Path) -> np.ndarray:
    if not dataset.names:
        raise InputError(
            f"--groups takes a .csv file for folders of images; {dataset.source} has no names of files: give an .npz file with "
            "an array `groups` in the order of the data"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--groups needs a readable file; got {path} ({error}): name another") from None
    if bad := next((row for row in rows if len(row) != 2), None):
        raise InputError(f"--groups needs rows of a name and a group; {path} has {','.join(bad)!r}: fix it")
    group_of = dict(rows)
    missing = [name for name in dataset.names if name not in group_of]
    if missing:
        raise InputError(
            f"--groups needs the group of every image; {path} lacks {len(missing)} of {len(dataset.names)}, such as "
            f"{missing[0]}: add them, with names as in the folder"
        )
    return np.array([group_of[name] for name in dataset.names])
