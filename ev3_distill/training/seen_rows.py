"""What a student has seen: digests of the examples of its run, by which an evaluation finds them in other data.

seen_rows.npz of a run directory and of an exported folder, 8 bytes for each example:

- used: [N] uint64, sorted digests of the examples of explore, assess and decide, see `data.row_digests`;
- sealed: [M] uint64, the same of the sealed test split;
- groups: [G] uint64, sorted digests of the names of the groups, of a run whose splits hold whole groups;
- fingerprint: of the data set.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ev3_distill.config import GROUPS, RunConfig
from ev3_distill.data import splits_of
from ev3_distill.data.row_digests import digests_where, distinct, text_digests
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.runtime import npz
from ev3_distill.runtime.files import atomic_write
from ev3_distill.training.run_reader import data_of

NAME = "seen_rows.npz"


class SeenRows(NamedTuple):
    """Sorted digests of the examples of a run."""

    used: np.ndarray  # of explore, assess and decide
    sealed: np.ndarray  # of the test split
    groups: np.ndarray  # of the names of the groups, where splits hold whole groups; else empty


def seen_rows(dataset: Dataset, rows: Mapping[str, np.ndarray], *, by_groups: bool) -> SeenRows:
    """Digests of the examples of a run.

    Args:
      dataset: of the run.
      rows: by split.
      by_groups: whether splits hold whole groups.
    """
    is_used, is_sealed = np.zeros((2, len(dataset.inputs)), bool)
    for name in ("explore", "assess", "decide"):
        is_used[rows[name]] = True
    is_sealed[rows["test"]] = True
    groups = distinct(text_digests(dataset.group_names if by_groups else ()))
    used, sealed = digests_where(dataset.inputs, [is_used, is_sealed])
    return SeenRows(distinct(used, overwrite=True), distinct(sealed, overwrite=True), groups)


def write_seen_rows(directory: Path, dataset: Dataset, rows: Mapping[str, np.ndarray], *, by_groups: bool) -> None:
    """Writes the digests of a run, atomically.

    Args:
      directory: of the run.
      dataset: of the run.
      rows: by split.
      by_groups: whether splits hold whole groups.
    """
    content = seen_rows(dataset, rows, by_groups=by_groups)._asdict()
    with atomic_write(directory / NAME) as file:
        np.savez(file, fingerprint=np.array(dataset.fingerprint), **content)


def read_seen_rows(directory: Path, fingerprint: str | None = None) -> SeenRows | None:
    """Reads the digests of a run.

    Args:
      directory: of the run, or of an exported file.
      fingerprint: of the run's data; None: any.

    Returns:
      The digests; None if there are none, or if they are of other data.

    Raises:
      InputError: the file is damaged.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    names = SeenRows._fields
    content = npz.read(path, (names,), optional="fingerprint", option=NAME, expected=", ".join(names))
    if fingerprint not in (None, str(content.get("fingerprint"))):
        return None
    if any(content[name].dtype != np.uint64 or content[name].ndim != 1 for name in names):
        raise InputError(f"{path} must hold digests [N] uint64; got other arrays: restore the file, or delete it")
    return SeenRows(*(content[name] for name in names))


def seen_rows_of_data(config: RunConfig, fingerprint: str) -> SeenRows | None:
    """The digests of an older run, from its data; None if these are missing or have changed.

    Args:
      config: of the run.
      fingerprint: of the run's data.
    """
    try:
        dataset = data_of(config)
    except InputError:
        return None
    if dataset.fingerprint != fingerprint:
        return None
    return seen_rows(dataset, splits_of(config, dataset), by_groups=config.split_by == GROUPS)
