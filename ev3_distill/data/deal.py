"""How a run divides its data: every reader of a run recomputes its splits by these functions of its configuration."""

import dataclasses

import numpy as np

from ev3_distill.config import GROUPS, RunConfig
from ev3_distill.data.group_splits import split_groups
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import SPLITS, split_rows, split_rows_jointly
from ev3_distill.errors import InputError
from ev3_distill.types import MOST_GROUPS

__all__ = ["splits_of", "units_of"]


def splits_of(config: RunConfig, dataset: Dataset, strata: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The four splits of a run.

    What is selected, promoted and certified is measured by labels. Where only some examples have one, assess, decide and test
    are therefore dealt from these, and `config.splits` are fractions of them. All others go to explore, except for those of the
    source's own test rows and those of a held-out group, which are in no split.

    Args:
      config: of the run; of a run directory, as it is stored there.
      dataset: of the run.
      strata: [N], see `split_rows`; the labels by default.

    Returns:
      Sorted rows by split.

    Raises:
      InputError: too few examples or groups, or no groups, or too many groups for a report on each.
    """
    strata = dataset.labels if strata is None else strata
    if not dataset.partly_labeled:
        return _deal(config, dataset, strata)
    rows = _deal_labeled(config, dataset, strata)
    may_train = ~dataset.is_labeled
    may_train[[] if dataset.test_rows is None else dataset.test_rows] = False
    if (units := units_of(config, dataset)) is not None:
        may_train &= ~np.isin(units, units[np.concatenate([rows[name] for name in SPLITS[1:]])])
    return rows | {"explore": np.sort(np.concatenate([rows["explore"], np.flatnonzero(may_train)]))}


def _deal_labeled(config: RunConfig, dataset: Dataset, strata: np.ndarray) -> dict[str, np.ndarray]:
    """The four splits of the labeled examples alone.

    Raises:
      InputError: too few of them.
    """
    known = np.flatnonzero(dataset.is_labeled)
    own = None if dataset.test_rows is None else np.flatnonzero(np.isin(known, dataset.test_rows))
    if own is not None and len(own) in (0, len(known)):
        place = "training" if len(own) else "test"
        raise InputError(
            f"labels of some rows must be labels of some training rows and of some test rows; {dataset.source} has none among "
            f"its {place} rows: add some, or let the test split be dealt from all rows (without a part of its own)"
        )
    labeled = dataclasses.replace(
        dataset,
        labels=dataset.labels[known],
        test_rows=own,
        groups=None if dataset.groups is None else dataset.groups[known],
    )
    dealt = _deal(config, labeled, strata[known], which="labeled ")
    return {name: known[rows] for name, rows in dealt.items()}


def _deal(config: RunConfig, dataset: Dataset, strata: np.ndarray, *, which: str = "") -> dict[str, np.ndarray]:
    """The four splits of all examples; `which` says in errors which these are."""
    if config.split_by == GROUPS:
        groups = units_of(config, dataset)
        if groups is None:
            raise InputError(
                f"--split-by groups needs the group of each example; {dataset.source} has none: add an array `groups` to the "
                "npz file, or name a file with --groups"
            )
        return split_groups(
            groups,
            strata,
            dataset.test_rows,
            seed=config.seed,
            fractions=config.splits,
            names=dataset.group_names,
            things=f"{which}groups",
        )
    if len(dataset.group_names) > MOST_GROUPS:
        raise InputError(
            f"subgroups to report on are at most {MOST_GROUPS}; {dataset.source} has {len(dataset.group_names)} groups: if "
            "examples of one group resemble each other (patients, videos), give --split-by groups; else merge or remove groups"
        )
    if config.joint_strata:
        return split_rows_jointly(strata, dataset.test_rows, seed=config.seed, fractions=config.splits)
    return split_rows(strata, dataset.test_rows, seed=config.seed, fractions=config.splits, things=f"{which}examples")


def units_of(config: RunConfig, dataset: Dataset) -> np.ndarray | None:
    """The independent unit of each example [N], where it is a group of examples; None where each example is one."""
    return dataset.groups if config.split_by == GROUPS else None
